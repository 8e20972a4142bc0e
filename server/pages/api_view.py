"""The API's description: as a document for programs, and as a page that people read and try it on.

Registered by `api.py`. Both are made from the application itself by `openapi.py`, once a process.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import flask

from server.api.endpoint import operation
from server.api.openapi import EXAMPLE_URL, build_document, example_of
from server.context import Context
from server.pages.render import page

_FILE = "binary"


def register(app: flask.Flask, context: Context) -> None:
    """Add the views to an application."""
    views = _Description(app)
    app.add_url_rule("/openapi.json", "openapi", views.openapi, methods=["GET"])
    app.add_url_rule("/ui/api", "api_page", views.api_page, methods=["GET"])


class _Description:
    def __init__(self, app: flask.Flask) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._document: dict[str, Any] | None = None
        self._text = ""

    @operation(summary="Describe the API (OpenAPI 3.1)", scope=None, tag="server", answers={200: "Document"})
    def openapi(self) -> flask.Response:
        """Answer with this description."""
        self._made()
        response = flask.Response(self._text, mimetype="application/json")
        # It changes with the server's version only.
        response.headers["Cache-Control"] = "public, max-age=300"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @operation(
        summary="The page of the API",
        scope=None,
        tag="pages",
        content_type="text/html",
        answers={200: {"type": "string"}},
    )
    def api_page(self) -> flask.Response:
        """Show every call, with examples and a form to try it."""
        document = self._made()
        base = flask.request.host_url.rstrip("/")
        return page("api.html", document=document, groups=_groups(document, base), base=base)

    def _made(self) -> dict[str, Any]:
        # All views are registered when the first request comes.
        with self._lock:
            if self._document is None:
                self._document = build_document(self._app)
                self._text = json.dumps(self._document, separators=(",", ":"), ensure_ascii=False) + "\n"
            return self._document


def _groups(document: Mapping[str, Any], base: str) -> list[dict[str, Any]]:
    """Arrange the calls by tag, as the template shows them."""
    groups: dict[str, list[dict[str, Any]]] = {tag["name"]: [] for tag in document["tags"]}
    for path, item in document["paths"].items():
        for method, said in item.items():
            groups[said["tags"][0]].append(_call(path, method.upper(), said, base))
    return [{"name": name, "calls": calls} for name, calls in groups.items() if calls]


def _call(path: str, method: str, said: Mapping[str, Any], base: str) -> dict[str, Any]:
    content = said.get("requestBody", {}).get("content", {})
    kind = next((kind for kind in ("multipart/form-data", "application/json", *content) if kind in content), None)
    schema = content[kind]["schema"] if kind else {}
    scopes = [scope for way in said["security"] for scope in way.get("bearer", [])]
    return {
        "id": said["operationId"],
        "method": method,
        "path": path,
        "summary": said["summary"],
        "description": said["description"],
        "scope": scopes[0] if scopes else None,
        "parameters": [_field(one["name"], one["in"], one["schema"], one) for one in said["parameters"]],
        "body_kind": kind,
        "body_kinds": list(content),
        "body_json": json.dumps(example_of(schema), indent=2) if kind == "application/json" else None,
        "body_fields": [
            _field(name, "body", one, {"required": name in schema.get("required", []), **one})
            for name, one in schema.get("properties", {}).items()
            if kind in ("multipart/form-data", "application/x-www-form-urlencoded")
        ],
        "answers": [
            {"status": status, "description": one["description"], "shape": _shape(one)}
            for status, one in said["responses"].items()
        ],
        "samples": [
            {**sample, "source": sample["source"].replace(EXAMPLE_URL, base)} for sample in said["x-codeSamples"]
        ],
    }


def _field(name: str, place: str, schema: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    kind = schema.get("type", "string")
    kind = next((one for one in kind if one != "null"), "string") if isinstance(kind, list) else kind
    items = schema.get("items", {})
    is_file = _FILE in (schema.get("format"), items.get("format") if isinstance(items, Mapping) else None)
    lowest, highest = schema.get("minimum"), schema.get("maximum")
    facts_about = [
        f"from {lowest} to {highest}" if highest is not None else f"from {lowest}" if lowest is not None else "",
        f"default {schema['default']}" if "default" in schema else "",
    ]
    return {
        "name": name,
        "place": place,
        "kind": "file" if is_file else str(kind),
        "is_many": is_file and kind == "array",
        "is_required": bool(facts.get("required")),
        "help": facts.get("description") or schema.get("description") or "",
        "choices": [str(choice) for choice in schema.get("enum", [])],
        "minimum": lowest,
        "maximum": highest,
        "example": next(iter(schema.get("examples", [])), None) if place == "path" else None,
        "range": ", ".join(fact for fact in facts_about if fact),
    }


def _shape(response: Mapping[str, Any]) -> str:
    """Name what an answer looks like."""
    for kind, content in response.get("content", {}).items():
        reference = content["schema"].get("$ref")
        return reference.rpartition("/")[2] if reference else str(kind)
    return ""

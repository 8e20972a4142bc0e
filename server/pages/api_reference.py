"""The API's description: as a document for programs, and as a page that people read and try it on.

Registered by `api.py`. Both are made from the application itself by `openapi.py`, once a process.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import flask

from server.api.openapi import EXAMPLE_URL, build_document, example_of
from server.context import Context
from server.endpoint import operation
from server.pages.render import page

_FILE = "binary"


def register(app: flask.Flask, context: Context) -> None:
    """Add the views to an application."""
    views = _ApiDescriptionViews(app)
    app.add_url_rule("/openapi.json", "openapi", views.openapi, methods=["GET"])
    app.add_url_rule("/ui/api", "api_page", views.api_page, methods=["GET"])


class _ApiDescriptionViews:
    def __init__(self, app: flask.Flask) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._document: dict[str, Any] | None = None
        self._text = ""

    @operation(summary="Describe the API (OpenAPI 3.1)", scope=None, tag="server", responses={200: "Document"})
    def openapi(self) -> flask.Response:
        """Answer with this description."""
        self._get_document()
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
        responses={200: {"type": "string"}},
    )
    def api_page(self) -> flask.Response:
        """Show every call, with examples and a form to try it."""
        document = self._get_document()
        base = flask.request.host_url.rstrip("/")
        return page("api.html", document=document, groups=_groups(document, base), base=base)

    def _get_document(self) -> dict[str, Any]:
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
        for method, described in item.items():
            groups[described["tags"][0]].append(_call(path, method.upper(), described, base))
    return [{"name": name, "calls": calls} for name, calls in groups.items() if calls]


def _call(path: str, method: str, described: Mapping[str, Any], base: str) -> dict[str, Any]:
    content = described.get("requestBody", {}).get("content", {})
    kind = next((kind for kind in ("multipart/form-data", "application/json", *content) if kind in content), None)
    schema = content[kind]["schema"] if kind else {}
    scopes = [scope for way in described["security"] for scope in way.get("bearer", [])]
    return {
        "id": described["operationId"],
        "method": method,
        "path": path,
        "summary": described["summary"],
        "description": described["description"],
        "scope": scopes[0] if scopes else None,
        "parameters": [_field(entry["name"], entry["in"], entry["schema"], entry) for entry in described["parameters"]],
        "body_kind": kind,
        "body_kinds": list(content),
        "body_json": json.dumps(example_of(schema), indent=2) if kind == "application/json" else None,
        "body_fields": [
            _field(name, "body", entry, {"required": name in schema.get("required", []), **entry})
            for name, entry in schema.get("properties", {}).items()
            if kind in ("multipart/form-data", "application/x-www-form-urlencoded")
        ],
        "answers": [
            {"status": status, "description": entry["description"], "shape": _shape(entry)}
            for status, entry in described["responses"].items()
        ],
        "samples": [
            {**sample, "source": sample["source"].replace(EXAMPLE_URL, base)} for sample in described["x-codeSamples"]
        ],
    }


def _field(name: str, location: str, schema: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    kind = schema.get("type", "string")
    kind = next((entry for entry in kind if entry != "null"), "string") if isinstance(kind, list) else kind
    items = schema.get("items", {})
    is_file = _FILE in (schema.get("format"), items.get("format") if isinstance(items, Mapping) else None)
    lowest, highest = schema.get("minimum"), schema.get("maximum")
    facts_about = [
        f"from {lowest} to {highest}" if highest is not None else f"from {lowest}" if lowest is not None else "",
        f"default {schema['default']}" if "default" in schema else "",
    ]
    return {
        "name": name,
        "place": location,
        "kind": "file" if is_file else str(kind),
        "is_many": is_file and kind == "array",
        "is_required": bool(facts.get("required")),
        "help": facts.get("description") or schema.get("description") or "",
        "choices": [str(choice) for choice in schema.get("enum", [])],
        "minimum": lowest,
        "maximum": highest,
        "example": next(iter(schema.get("examples", [])), None) if location == "path" else None,
        "range": ", ".join(fact for fact in facts_about if fact),
    }


def _shape(response: Mapping[str, Any]) -> str:
    """Name what an answer looks like."""
    for kind, content in response.get("content", {}).items():
        reference = content["schema"].get("$ref")
        return reference.rpartition("/")[2] if reference else str(kind)
    return ""

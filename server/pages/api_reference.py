"""The API reference page: every call with its parameters, examples and a form to try it.

Made from the same OpenAPI document that `GET /openapi.json` returns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import flask

from server.api.openapi import EXAMPLE_URL, example_of, get_document
from server.context import Views
from server.endpoint import PAGES, operation
from server.pages.render import page

#: Format of a file in a JSON Schema.
_FILE = "binary"


class ApiReferenceViews(Views):
    """The view of the API reference page."""

    @operation("GET /ui/api", "The API reference page", None, tag=PAGES)
    def api_page(self) -> flask.Response:
        """Show every call, with examples and a form to try it."""
        document = get_document(flask.current_app)
        return page("api.html", document=document, groups=_groups(document, flask.request.host_url.rstrip("/")))


def _groups(document: Mapping[str, Any], base: str) -> list[dict[str, Any]]:
    """Group the calls by tag, for the template."""
    groups: dict[str, list[dict[str, Any]]] = {tag["name"]: [] for tag in document["tags"]}
    for path, item in document["paths"].items():
        for method, described in item.items():
            groups[described["tags"][0]].append(_call(path, method.upper(), described, base))
    return [{"name": name, "calls": calls} for name, calls in groups.items() if calls]


def _call(path: str, method: str, described: Mapping[str, Any], base: str) -> dict[str, Any]:
    content = described.get("requestBody", {}).get("content", {})
    kind = next((kind for kind in ("multipart/form-data", "application/json", *content) if kind in content), None)
    schema = content[kind]["schema"] if kind else {}
    scopes = [scope for scheme in described["security"] for scope in scheme.get("bearer", [])]
    return {
        **described,
        "id": described["operationId"],
        "method": method,
        "path": path,
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
        "responses": [
            {"status": status, "description": entry["description"], "schema": _schema_name(entry)}
            for status, entry in described["responses"].items()
        ],
        "samples": [
            {**sample, "source": sample["source"].replace(EXAMPLE_URL, base)} for sample in described["x-codeSamples"]
        ],
    }


def _field(name: str, location: str, schema: Mapping[str, Any], details: Mapping[str, Any]) -> dict[str, Any]:
    kind = schema.get("type", "string")
    kind = next((entry for entry in kind if entry != "null"), "string") if isinstance(kind, list) else kind
    items = schema.get("items", {})
    is_file = _FILE in (schema.get("format"), items.get("format") if isinstance(items, Mapping) else None)
    minimum, maximum = schema.get("minimum"), schema.get("maximum")
    limits = [
        f"from {minimum} to {maximum}" if maximum is not None else f"from {minimum}" if minimum is not None else "",
        f"default {schema['default']}" if "default" in schema else "",
    ]
    return {
        "name": name,
        "location": location,
        "kind": "file" if is_file else str(kind),
        "is_many": is_file and kind == "array",
        "is_required": bool(details.get("required")),
        "help": details.get("description") or schema.get("description") or "",
        "choices": [str(choice) for choice in schema.get("enum", [])],
        "minimum": minimum,
        "maximum": maximum,
        "example": next(iter(schema.get("examples", [])), None) if location == "path" else None,
        "range": ", ".join(limit for limit in limits if limit),
    }


def _schema_name(response: Mapping[str, Any]) -> str:
    """Return the name of a response's schema, or its content type if the schema has no name."""
    for kind, content in response.get("content", {}).items():
        reference = content["schema"].get("$ref")
        return reference.rpartition("/")[2] if reference else str(kind)
    return ""

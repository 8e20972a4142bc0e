"""The description of the HTTP API (OpenAPI 3.1), built from the application itself.

Built once per process; `GET /openapi.json` and the API reference page show it. Routes, and what a view does, come from
its operation, parameters from the services, models from the catalogue, errors from the table
in `server/errors.py`. Nothing of that is repeated here.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import flask

from provider_image import errors
from provider_image.models.catalogue import CATALOGUE, EMBEDDING_SUFFIX
from server.api.schemas import ref, schemas
from server.endpoint import PAGES, Field, Operation, get_operation
from server.errors import HTTP_STATUS, http_status
from server.intake.idempotency import MAX_KEY_LENGTH, is_repeatable
from server.intake.uploads import IDEMPOTENCY_KEY

VERSION = "3.1.0"
_EXTENSION = "mlg_openapi"
#: The order of the headings; others come last.
_TAGS = ("predictions", "batches", "requests", "collections", "trainings", "usage", "events", "models", "server")
#: Used in examples.
EXAMPLE_MODEL = "efficientnet_lite0"
EXAMPLE_URL = "http://127.0.0.1:5000"
#: Path parameters; a field of the same name in the view's query takes precedence.
_PATH_PARAMETERS = {
    "model": Field(name="model", help="A model of GET /models, in any spelling.", schema={"examples": [EXAMPLE_MODEL]}),
    "id": Field(name="id", help="An id from the server."),
    "version": Field(name="version", help="The number of a version.", schema={"type": "integer", "minimum": 1}),
    "name": Field(name="name", help="A name from the server."),
}
_IDEMPOTENCY_KEY = Field(
    name=IDEMPOTENCY_KEY,
    help="Any text: sent again under the same key, a request gets the first response, and nothing is done twice.",
    schema={"type": "string", "minLength": 1, "maxLength": MAX_KEY_LENGTH},
)
#: View -> the same call with the Python client.
_CLIENT_CALLS = {
    "request_prediction": f'print(client.wait(client.submit("kitten.jpg", "{EXAMPLE_MODEL}")).preds)',
    "read_prediction": 'print(client.read("ID").preds)',
    "cancel": 'client.cancel("ID")',
    "retry": 'client.retry("ID")',
    "request_predictions": f'print(client.submit_dir("photos", "{EXAMPLE_MODEL}").ids)',
    "show_batch": 'print(client.batch("ID")["counts"])',
    "cancel_batch": 'client.cancel_batch("ID")',
    "retry_batch": 'client.retry_batch("ID")',
    "create_collection": 'client.create_collection("holiday")',
    "list_collections": 'print([collection["name"] for collection in client.collections()])',
    "show_collection": 'print(client.collection("NAME")["counts"])',
    "remove_collection": 'client.delete_collection("NAME")',
    "add_to_collection": 'client.add_to_collection("NAME", "photos")',
    "list_members": 'print([image["req_id"] for image in client.collection_images("NAME")])',
    "remove_member": 'client.remove_from_collection("NAME", "ID")',
    "search_collection": 'print([match["req_id"] for match in client.search_collection("NAME", "kitten.jpg")])',
    "collection_duplicates": 'print(client.collection_duplicates("NAME")["groups"])',
    "collection_groups": 'print(client.collection_groups("NAME")["groups"])',
    "models": "print([model.name for model in client.models() if model.is_installed])",
}
#: Statuses, and the header that their responses have: its name, what it is, its type.
_HEADERS = (
    (range(300, 400), "Location", "The next page.", "string"),
    ((202,), "Location", "Path of the answer.", "string"),
    ((429, 503, 507), "Retry-After", "Seconds after which to try again.", "integer"),
)
_SUCCESS_TEXTS = {
    200: "Success.",
    201: "Created.",
    202: "Accepted; it is durable.",
    204: "Done.",
    303: "Redirect to the next page.",
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """One method of one path, and the view that answers it."""

    #: Unique in the document.
    id: str
    method: str
    operation: Operation
    view: Callable[..., Any]

    @property
    def names(self) -> list[str]:
        """List the names of the parameters in the path."""
        return re.findall(r"{(\w+)}", self.operation.template)

    @property
    def body(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the schema of the body for each content type; none for a method without a body."""
        return self.operation.body if self.method == "POST" else {}

    @property
    def takes_idempotency_key(self) -> bool:
        """Tell whether an idempotency key is accepted; see `idempotency.py`."""
        return is_repeatable(self.operation)


def list_calls(app: flask.Flask) -> Iterator[Call]:
    """List the calls of an application. Pages, and views without an operation, are left out."""
    for endpoint, view in app.view_functions.items():
        operation = get_operation(view)
        if operation is not None and operation.tag != PAGES:
            for method in operation.methods:
                is_first = method == operation.methods[0]
                id = endpoint if is_first else f"{endpoint}_{method.lower()}"
                yield Call(id=id, method=method, operation=operation, view=view)


def build_document(app: flask.Flask) -> dict[str, Any]:
    """Describe every path of an application whose view has an operation."""
    paths: dict[str, dict[str, Any]] = {}
    tags: dict[str, None] = {}
    for call in list_calls(app):
        tags.setdefault(call.operation.tag)
        paths.setdefault(call.operation.template, {})[call.method.lower()] = _describe(call)
    return {
        "openapi": VERSION,
        "info": {
            "title": "mlg",
            "version": version("mlg"),
            "summary": "Image models on other people's computers, or on this one.",
            "description": (
                "Send images, get an id at once, read the answer by the id. Every error is JSON with a `reason` "
                "that tells what to do and a `code` for programs. Keys are required only if the operator created one."
            ),
        },
        "servers": [{"url": "/", "description": "The server that returned this document."}],
        "tags": [
            {"name": tag} for tag in sorted(tags, key=lambda tag: _TAGS.index(tag) if tag in _TAGS else len(_TAGS))
        ],
        "paths": paths,
        "components": {
            "schemas": dict(schemas()),
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key, as `Authorization: Bearer KEY`, if the server requires one.",
                }
            },
        },
    }


def get_document(app: flask.Flask) -> dict[str, Any]:
    """Return the description of an application, built by the first request: every view is registered by then."""
    if _EXTENSION not in app.extensions:
        app.extensions[_EXTENSION] = build_document(app)
    document: dict[str, Any] = app.extensions[_EXTENSION]
    return document


def _describe(call: Call) -> dict[str, Any]:
    operation = call.operation
    described: dict[str, Any] = {
        "operationId": call.id,
        "tags": [operation.tag],
        "summary": operation.summary,
        "description": _view_description(call.view) or operation.summary,
        "security": [] if operation.scope is None else [{"bearer": [str(operation.scope)]}, {}],
        "parameters": list(_parameters(call)),
        "responses": _responses(call),
        "x-codeSamples": [
            {"lang": "Shell", "label": "curl", "source": _curl(call)},
            {"lang": "Python", "label": "Python", "source": _python(call)},
        ],
    }
    if call.body:
        described["requestBody"] = {
            "required": any(schema.get("required") for schema in call.body.values()),
            "content": {kind: {"schema": dict(schema)} for kind, schema in call.body.items()},
        }
    return described


def _view_description(view: Callable[..., Any]) -> str:
    """Return a view's docstring without its `:param:` and `:raises:` lines."""
    return re.split(r"\n?(?<!\w):(?:param|return|raises)\b", inspect.getdoc(view) or "")[0].strip()


def _parameters(call: Call) -> Iterator[dict[str, Any]]:
    declared = {field.name: field for field in call.operation.query}
    for name in call.names:
        field = declared.pop(name, None) or _PATH_PARAMETERS.get(name) or Field(name=name, help=name)
        yield _parameter(field, "path")
    for field in declared.values():
        yield _parameter(field, "query")
    if call.takes_idempotency_key:
        yield _parameter(_IDEMPOTENCY_KEY, "header")


def _parameter(field: Field, location: str) -> dict[str, Any]:
    schema = {"type": "string", **field.schema}
    if field.name == "model" and location == "path":
        # Not those of embeddings, which are the same with an ending.
        models = (row.name for row in CATALOGUE.values() if row.base is None and row.name != EXAMPLE_MODEL)
        schema["examples"] = [EXAMPLE_MODEL, f"{EXAMPLE_MODEL}{EMBEDDING_SUFFIX}", *models]
    if location == "path":
        schema.setdefault("minLength", 1)
        schema.setdefault("pattern", "^[^/]+$")
    return {
        "name": field.name,
        "in": location,
        "required": location == "path" or field.is_required,
        "description": field.help,
        "schema": schema,
    }


def _responses(call: Call) -> dict[str, Any]:
    declared = {**dict.fromkeys(_error_statuses(call), "Error"), **call.operation.responses}
    return {
        str(status): _response(status, schema, call.operation.content_type)
        for status, schema in sorted(declared.items())
    }


def _error_statuses(call: Call) -> list[int]:
    """List the statuses of the errors that a view of this kind can return."""
    found = [500, 503]
    found += [400] if call.operation.query or call.body else []
    found += [404] if call.names else []
    found += [413, 415, 507] if call.body else []
    found += [409, 422] if call.takes_idempotency_key else []
    found += [502] if any("url" in schema.get("properties", {}) for schema in call.body.values()) else []
    found += [401, 403, 421, 429] if call.operation.scope is not None else []
    return found


def _response(status: int, schema: str | Mapping[str, Any], content_type: str) -> dict[str, Any]:
    is_error = status >= 400
    text = _error_text(status) if is_error else _SUCCESS_TEXTS.get(status, "Done.")
    if status in (204, 304):
        return {"description": text}
    kind = "application/json" if is_error else content_type
    content_schema = ref(schema) if isinstance(schema, str) else dict(schema)
    if not kind.endswith("json"):
        content_schema = {"type": "string"}
    described: dict[str, Any] = {"description": text, "content": {kind: {"schema": content_schema}}}
    for statuses, name, help, type in _HEADERS:
        if status in statuses:
            described["headers"] = {name: {"description": help, "schema": {"type": type}}}
    return described


def _error_text(status: int) -> str:
    codes = _codes().get(status, [])
    names = ", ".join(f"`{code}`" for code in codes)
    return f"Code {names}." if names else "Something went wrong inside the server." if status == 500 else "Refused."


def _codes() -> dict[int, list[str]]:
    """List the codes of the errors by their status."""
    found: dict[int, list[str]] = {}
    kinds: list[type[errors.MlgError]] = list(HTTP_STATUS)
    for kind in kinds:
        kinds.extend(below for below in kind.__subclasses__() if below not in kinds)
        status = http_status(kind)
        if kind.code not in found.setdefault(status, []):
            found[status].append(kind.code)
    return {status: sorted(codes) for status, codes in found.items()}


def _curl(call: Call) -> str:
    arguments = ["curl"]
    if call.operation.scope is not None:
        arguments.append('-H "Authorization: Bearer $MLG_API_KEY"')
    if "multipart/form-data" in call.body:
        arguments += [f"-F {name}=@{_file_name(name)}" for name in _form_files(call)]
    elif "application/json" in call.body:
        example = json.dumps(example_of(call.body["application/json"]))
        arguments += [f"-X {call.method}", "-H 'Content-Type: application/json'", f"-d '{example}'"]
    elif call.method != "GET":
        arguments.append(f"-X {call.method}")
    return " ".join([*arguments, _example_url(call)])


def _python(call: Call) -> str:
    """Write the call with the Python client; with httpx if the client has none."""
    client_call = _CLIENT_CALLS.get(call.view.__name__)
    if client_call is not None:
        return f'from mlg_client import Client\n\nwith Client("{EXAMPLE_URL}") as client:\n    {client_call}\n'
    more, key = "", "import httpx\n\n"
    if "multipart/form-data" in call.body:
        files = ", ".join(f'"{name}": open("{_file_name(name)}", "rb")' for name in _form_files(call))
        more = f", files={{{files}}}"
    elif "application/json" in call.body:
        more = f", json={example_of(call.body['application/json'])!r}"
    if call.operation.scope is not None:
        more += ', headers={"Authorization": f"Bearer {key}"}'
        key = 'import os\n\nimport httpx\n\nkey = os.environ["MLG_API_KEY"]\n'
    result = "response.json()" if call.operation.content_type == "application/json" else "response.text"
    return f'{key}response = httpx.request("{call.method}", "{_example_url(call)}"{more})\nprint({result})\n'


def _example_url(call: Call) -> str:
    examples = {name: EXAMPLE_MODEL if name == "model" else name.upper() for name in call.names}
    return EXAMPLE_URL + call.operation.template.format(**examples)


def _form_files(call: Call) -> list[str]:
    schema = call.body["multipart/form-data"]
    return list(schema.get("required") or list(schema["properties"])[:1])


def _file_name(field: str) -> str:
    return "kitten.jpg" if "image" in field else f"{field}.zip"


def example_of(schema: Mapping[str, Any]) -> Any:
    """Build a small value that fits a schema."""
    if schema.get("examples"):
        return schema["examples"][0]
    if "default" in schema:
        return schema["default"]
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        properties = schema.get("properties", {})
        return {name: example_of(properties.get(name, {})) for name in schema.get("required", properties)}
    if kind == "array":
        return [example_of(schema.get("items", {}))]
    return {"integer": 1, "number": 1.0, "boolean": True}.get(str(kind), "...")

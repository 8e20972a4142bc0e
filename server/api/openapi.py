"""The description of the HTTP API (OpenAPI 3.1), built from the application itself.

Built once per process; `GET /openapi.json` and the API reference page show it. Paths come from the application's URL
map, what a view does from its operation, parameters from the services, models from the catalogue, errors from the table
in `server/errors.py`. Nothing of that is repeated here.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flask
from werkzeug.routing import Rule

from provider_image import errors
from provider_image.models.catalogue import CATALOGUE
from server.api.idempotency import HEADER, MAX_KEY_LENGTH
from server.api.schemas import ref, schemas
from server.endpoint import PAGES, Field, Operation, get_operation
from server.errors import HTTP_STATUS, http_status
from store.keys import Scope

VERSION = "3.1.0"
_EXTENSION = "mlg_openapi"
#: The order of the headings; others come last.
_TAGS = ("predictions", "batches", "requests", "events", "models", "server")
#: Used in examples.
EXAMPLE_MODEL = "efficientnet_lite0"
EXAMPLE_URL = "http://127.0.0.1:5000"
#: Methods whose requests carry a body.
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
#: Path parameters; a field of the same name in the view's query takes precedence.
_PATH_PARAMETERS = {
    "model": Field(name="model", help="A model of GET /models, in any spelling.", schema={"examples": [EXAMPLE_MODEL]}),
    "id": Field(name="id", help="An id from the server."),
}
_IDEMPOTENCY_KEY = Field(
    name=HEADER,
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
    "models": "print([model.name for model in client.models() if model.is_installed])",
}


def build_document(app: flask.Flask) -> dict[str, Any]:
    """Describe every path of an application whose view has an operation."""
    paths: dict[str, dict[str, Any]] = {}
    tags: dict[str, None] = {}
    for rule, method, operation in operations(app):
        tags.setdefault(operation.tag)
        paths.setdefault(openapi_path(rule), {})[method.lower()] = _describe(app, rule, method, operation)
    return {
        "openapi": VERSION,
        "info": {
            "title": "mlg",
            "version": _version(),
            "summary": "Image models on other people's computers, or on this one.",
            "description": (
                "Send images, get an id at once, read the answer by the id. Every error is JSON with a `reason` "
                "that tells what to do and a `code` for programs. Keys are required only if the operator created one."
            ),
        },
        "servers": [{"url": "/", "description": "The server that returned this document."}],
        "tags": [{"name": tag} for tag in sorted(tags, key=_tag_order)],
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


def _tag_order(tag: str) -> int:
    return _TAGS.index(tag) if tag in _TAGS else len(_TAGS)


def operations(app: flask.Flask) -> Iterator[tuple[Rule, str, Operation]]:
    """List path, method and operation. Pages, and views without an operation, are left out."""
    for rule in app.url_map.iter_rules():
        operation = get_operation(app.view_functions[rule.endpoint])
        if operation is not None and operation.tag != PAGES:
            for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
                yield rule, method, operation


def openapi_path(rule: Rule) -> str:
    """Write a path as OpenAPI does: /requests/{id}."""
    return re.sub(r"<(?:[^:<>]+:)?(\w+)>", r"{\1}", rule.rule)


def _describe(app: flask.Flask, rule: Rule, method: str, operation: Operation) -> dict[str, Any]:
    view = app.view_functions[rule.endpoint]
    methods = sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})
    described: dict[str, Any] = {
        "operationId": rule.endpoint if method == methods[0] else f"{rule.endpoint}_{method.lower()}",
        "tags": [operation.tag],
        "summary": operation.summary,
        "description": _view_description(view) or operation.summary,
        "security": [] if operation.scope is None else [{"bearer": [str(operation.scope)]}, {}],
        "parameters": [
            *_path_parameters(rule, operation),
            *(_parameter(field, "query") for field in _query_parameters(rule, operation)),
            *([_parameter(_IDEMPOTENCY_KEY, "header")] if _takes_idempotency_key(method, operation) else []),
        ],
        "responses": _responses(rule, method, operation),
        "x-codeSamples": _samples(rule, method, operation),
    }
    if operation.body and method in _WITH_BODY:
        described["requestBody"] = {
            "required": any(schema.get("required") for schema in operation.body.values()),
            "content": {kind: {"schema": dict(schema)} for kind, schema in operation.body.items()},
        }
    return described


def _view_description(view: Callable[..., Any]) -> str:
    """Return a view's docstring without its `:param:` and `:raises:` lines."""
    return re.split(r"\n?(?<!\w):(?:param|return|raises)\b", inspect.getdoc(view) or "")[0].strip()


def _query_parameters(rule: Rule, operation: Operation) -> list[Field]:
    return [field for field in operation.query if field.name not in rule.arguments]


def _path_parameters(rule: Rule, operation: Operation) -> list[dict[str, Any]]:
    own_fields = {field.name: field for field in operation.query}
    names = re.findall(r"<(?:[^:<>]+:)?(\w+)>", rule.rule)
    return [
        _parameter(own_fields.get(name) or _PATH_PARAMETERS.get(name) or Field(name=name, help=name), "path")
        for name in names
    ]


def _parameter(field: Field, location: str) -> dict[str, Any]:
    schema = {"type": "string", **field.schema}
    if field.name == "model" and location == "path":
        schema["examples"] = [EXAMPLE_MODEL, *(name for name in CATALOGUE if name != EXAMPLE_MODEL)]
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


def _responses(rule: Rule, method: str, operation: Operation) -> dict[str, Any]:
    responses = {
        str(status): _response(status, schema, operation.content_type)
        for status, schema in sorted(operation.responses.items())
    }
    for status in _errors_of(rule, method, operation):
        responses.setdefault(str(status), _response(status, "Error", "application/json"))
    return dict(sorted(responses.items()))


def _errors_of(rule: Rule, method: str, operation: Operation) -> list[int]:
    """List the statuses of the errors that a view of this kind can return."""
    known = set(HTTP_STATUS.values())
    has_body = bool(operation.body) and method in _WITH_BODY
    found = [500, 503]
    found += [400] if operation.query or has_body else []
    found += [404] if rule.arguments else []
    found += [413, 415, 507] if has_body else []
    found += [409, 422] if _takes_idempotency_key(method, operation) else []
    found += (
        [502] if has_body and any("url" in schema.get("properties", {}) for schema in operation.body.values()) else []
    )
    found += [401, 403, 421, 429] if operation.scope is not None else []
    return [status for status in found if status in known]


def _takes_idempotency_key(method: str, operation: Operation) -> bool:
    """Tell whether a view accepts an idempotency key; see `idempotency.py`."""
    return method == "POST" and operation.scope not in (None, Scope.READ)


def _response(status: int, schema: str | Mapping[str, Any], content_type: str) -> dict[str, Any]:
    is_error = status >= 400
    described: dict[str, Any] = {
        "description": _error_text(status) if is_error else _SUCCESS_TEXTS.get(status, "Done.")
    }
    if status in (204, 304):
        return described
    kind = "application/json" if is_error else content_type
    content_schema = ref(schema) if isinstance(schema, str) else dict(schema)
    if not kind.endswith("json"):
        content_schema = {"type": "string"}
    if 300 <= status < 400:
        described["headers"] = {"Location": {"description": "The next page.", "schema": {"type": "string"}}}
    described["content"] = {kind: {"schema": content_schema}}
    if status == 202:
        described["headers"] = {"Location": {"description": "Path of the answer.", "schema": {"type": "string"}}}
    if status in (429, 503, 507):
        described["headers"] = {
            "Retry-After": {"description": "Seconds after which to try again.", "schema": {"type": "integer"}}
        }
    return described


_SUCCESS_TEXTS = {
    200: "Success.",
    201: "Created.",
    202: "Accepted; it is durable.",
    204: "Done.",
    303: "Redirect to the next page.",
}


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


def _samples(rule: Rule, method: str, operation: Operation) -> list[dict[str, str]]:
    """Write the call with curl and in Python."""
    address = re.sub(
        r"<(?:[^:<>]+:)?(\w+)>", lambda match: EXAMPLE_MODEL if match[1] == "model" else match[1].upper(), rule.rule
    )
    has_body = bool(operation.body) and method in _WITH_BODY
    return [
        {"lang": "Shell", "label": "curl", "source": _curl(method, address, operation, has_body)},
        {"lang": "Python", "label": "Python", "source": _python(rule, method, address, operation, has_body)},
    ]


def _curl(method: str, address: str, operation: Operation, has_body: bool) -> str:
    arguments = ["curl"]
    if operation.scope is not None:
        arguments.append('-H "Authorization: Bearer $MLG_API_KEY"')
    if has_body and "multipart/form-data" in operation.body:
        arguments += [f"-F {name}=@{_file_name(name)}" for name in _required(operation.body["multipart/form-data"])]
    elif has_body and "application/json" in operation.body:
        example = json.dumps(example_of(operation.body["application/json"]))
        arguments += [f"-X {method}", "-H 'Content-Type: application/json'", f"-d '{example}'"]
    elif method != "GET":
        arguments.append(f"-X {method}")
    return " ".join([*arguments, EXAMPLE_URL + address])


def _python(rule: Rule, method: str, address: str, operation: Operation, has_body: bool) -> str:
    call = _CLIENT_CALLS.get(rule.endpoint)
    if call is not None:
        return f'from mlg_client import Client\n\nwith Client("{EXAMPLE_URL}") as client:\n    {call}\n'
    more = ""
    if has_body and "multipart/form-data" in operation.body:
        files = ", ".join(
            f'"{name}": open("{_file_name(name)}", "rb")' for name in _required(operation.body["multipart/form-data"])
        )
        more = f", files={{{files}}}"
    elif has_body and "application/json" in operation.body:
        more = f", json={example_of(operation.body['application/json'])!r}"
    if operation.scope is not None:
        more += ', headers={"Authorization": f"Bearer {key}"}'
    key = (
        'import os\n\nimport httpx\n\nkey = os.environ["MLG_API_KEY"]\n'
        if operation.scope is not None
        else "import httpx\n\n"
    )
    result = "response.json()" if operation.content_type == "application/json" else "response.text"
    return f'{key}response = httpx.request("{method}", "{EXAMPLE_URL}{address}"{more})\nprint({result})\n'


def _required(schema: Mapping[str, Any]) -> list[str]:
    return list(schema.get("required") or list(schema.get("properties", {}))[:1])


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


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("mlg")
    except PackageNotFoundError:
        return "0"

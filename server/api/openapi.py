"""The description of the HTTP API (OpenAPI 3.1), made from the application itself.

Called by `views/api_page.py` once a process. Addresses come from the application's map, what a view does from its
operation, parameters from the services, models from the catalogue, errors from the table of status codes. Nothing is
said here that is said there.
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
from server.api.endpoint import Field, Operation, Scope, operation_of
from server.api.idempotency import HEADER, LONGEST_KEY
from server.api.responses import HTTP_STATUS
from server.api.schemas import ref, schemas

VERSION = "3.1.0"
#: Tag of what is there for people with a browser.
PAGES = "pages"
#: The order of the headings; others come last.
_TAGS = ("predictions", "batches", "requests", "events", "models", "server")
#: What stands in examples.
STARTER = "efficientnet_lite0"
EXAMPLE_URL = "http://127.0.0.1:5000"
#: Methods whose requests carry a body.
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
#: Arguments of addresses; a view's own field of the same name says it better.
_ARGUMENTS = {
    "model": Field(name="model", help="A model of GET /models, in any spelling.", schema={"examples": [STARTER]}),
    "id": Field(name="id", help="An id that the server gave."),
}
#: Says that a POST is the same as an earlier one.
_KEY = Field(
    name=HEADER,
    help="Any text of your own: sent again under it, the same gets the first answer, and nothing is done twice.",
    schema={"type": "string", "minLength": 1, "maxLength": LONGEST_KEY},
)
#: View -> what does the same with the Python client.
_CLIENT_CALLS = {
    "request_prediction": f'print(client.wait(client.submit("kitten.jpg", "{STARTER}")).preds)',
    "read_prediction": 'print(client.read("ID").preds)',
    "cancel": 'client.cancel("ID")',
    "retry": 'client.retry("ID")',
    "request_predictions": f'print(client.submit_dir("photos", "{STARTER}").ids)',
    "show_batch": 'print(client.batch("ID")["counts"])',
    "cancel_batch": 'client.cancel_batch("ID")',
    "retry_batch": 'client.retry_batch("ID")',
    "models": "print([model.name for model in client.models() if model.is_installed])",
}


def build_document(app: flask.Flask) -> dict[str, Any]:
    """Describe every address of an application whose view has an operation."""
    paths: dict[str, dict[str, Any]] = {}
    tags: dict[str, None] = {}
    for rule, method, said in operations(app):
        tags.setdefault(said.tag)
        paths.setdefault(path_of(rule), {})[method.lower()] = _describe(app, rule, method, said)
    return {
        "openapi": VERSION,
        "info": {
            "title": "mlg",
            "version": _version(),
            "summary": "Image models on other people's computers, or on this one.",
            "description": (
                "Send pictures, get an id at once, read the answer by the id. Every error is JSON with a `reason` "
                "that says what to do and a `code` for programs. Keys are asked for only where the operator wants them."
            ),
        },
        "servers": [{"url": "/", "description": "The server that this document came from."}],
        "tags": [{"name": tag} for tag in sorted(tags, key=_place_of)],
        "paths": paths,
        "components": {
            "schemas": dict(schemas()),
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key, as `Authorization: Bearer KEY`, where the operator asks for one.",
                }
            },
        },
    }


def _place_of(tag: str) -> int:
    return _TAGS.index(tag) if tag in _TAGS else len(_TAGS)


def operations(app: flask.Flask) -> Iterator[tuple[Rule, str, Operation]]:
    """List what programs can ask for: address, method, operation. Pages, and views that say nothing, are left out."""
    for rule in app.url_map.iter_rules():
        said = operation_of(app.view_functions[rule.endpoint])
        if said is not None and said.tag != PAGES:
            for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
                yield rule, method, said


def path_of(rule: Rule) -> str:
    """Write an address as OpenAPI does: /requests/{id}."""
    return re.sub(r"<(?:[^:<>]+:)?(\w+)>", r"{\1}", rule.rule)


def _describe(app: flask.Flask, rule: Rule, method: str, said: Operation) -> dict[str, Any]:
    view = app.view_functions[rule.endpoint]
    methods = sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})
    described: dict[str, Any] = {
        "operationId": rule.endpoint if method == methods[0] else f"{rule.endpoint}_{method.lower()}",
        "tags": [said.tag],
        "summary": said.summary,
        "description": _prose(view) or said.summary,
        "security": [] if said.scope is None else [{"bearer": [str(said.scope)]}, {}],
        "parameters": [
            *_arguments(rule, said),
            *(_parameter(one, "query") for one in _queried(rule, said)),
            *([_parameter(_KEY, "header")] if _may_be_repeated(method, said) else []),
        ],
        "responses": _responses(rule, method, said),
        "x-codeSamples": _samples(rule, method, said),
    }
    if said.body and method in _WITH_BODY:
        described["requestBody"] = {
            "required": any(schema.get("required") for schema in said.body.values()),
            "content": {kind: {"schema": dict(schema)} for kind, schema in said.body.items()},
        }
    return described


def _prose(view: Callable[..., Any]) -> str:
    """Return what a view's docstring says to people, without its notes on parameters and errors."""
    return re.split(r"\n?(?<!\w):(?:param|return|raises)\b", inspect.getdoc(view) or "")[0].strip()


def _queried(rule: Rule, said: Operation) -> list[Field]:
    return [one for one in said.query if one.name not in rule.arguments]


def _arguments(rule: Rule, said: Operation) -> list[dict[str, Any]]:
    own = {one.name: one for one in said.query}
    names = re.findall(r"<(?:[^:<>]+:)?(\w+)>", rule.rule)
    return [_parameter(own.get(name) or _ARGUMENTS.get(name) or Field(name=name, help=name), "path") for name in names]


def _parameter(one: Field, place: str) -> dict[str, Any]:
    schema = {"type": "string", **one.schema}
    if one.name == "model" and place == "path":
        schema["examples"] = [STARTER, *(name for name in CATALOGUE if name != STARTER)]
    if place == "path":
        schema.setdefault("minLength", 1)
        schema.setdefault("pattern", "^[^/]+$")
    return {
        "name": one.name,
        "in": place,
        "required": place == "path" or one.is_required,
        "description": one.help,
        "schema": schema,
    }


def _responses(rule: Rule, method: str, said: Operation) -> dict[str, Any]:
    responses = {
        str(status): _answer(status, schema, said.content_type) for status, schema in sorted(said.answers.items())
    }
    for status in _errors_of(rule, method, said):
        responses.setdefault(str(status), _answer(status, "Error", "application/json"))
    return dict(sorted(responses.items()))


def _errors_of(rule: Rule, method: str, said: Operation) -> list[int]:
    """List the statuses of the errors that views of this kind have."""
    known = set(HTTP_STATUS.values())
    has_body = bool(said.body) and method in _WITH_BODY
    found = [500, 503]
    found += [400] if said.query or has_body else []
    found += [404] if rule.arguments else []
    found += [413, 415, 507] if has_body else []
    found += [409, 422] if _may_be_repeated(method, said) else []
    found += [502] if has_body and any("url" in schema.get("properties", {}) for schema in said.body.values()) else []
    found += [401, 403, 421, 429] if said.scope is not None else []
    return [status for status in found if status in known]


def _may_be_repeated(method: str, said: Operation) -> bool:
    """Tell whether a repetition under the same key is answered as the first time; see `idempotency.py`."""
    return method == "POST" and said.scope not in (None, Scope.READ)


def _answer(status: int, schema: str | Mapping[str, Any], content_type: str) -> dict[str, Any]:
    is_error = status >= 400
    described: dict[str, Any] = {"description": _error_text(status) if is_error else _GOOD.get(status, "Done.")}
    if status in (204, 304):
        return described
    kind = "application/json" if is_error else content_type
    shown = ref(schema) if isinstance(schema, str) else dict(schema)
    if not kind.endswith("json"):
        shown = {"type": "string"}
    if 300 <= status < 400:
        described["headers"] = {"Location": {"description": "Where to go.", "schema": {"type": "string"}}}
    described["content"] = {kind: {"schema": shown}}
    if status == 202:
        described["headers"] = {"Location": {"description": "Where the answer is.", "schema": {"type": "string"}}}
    if status in (429, 503, 507):
        described["headers"] = {
            "Retry-After": {"description": "Seconds after which to try again.", "schema": {"type": "integer"}}
        }
    return described


_GOOD = {200: "The answer.", 201: "Made.", 202: "Taken; it is safe.", 204: "Done.", 303: "See there."}


def _error_text(status: int) -> str:
    codes = _codes().get(status, [])
    names = ", ".join(f"`{code}`" for code in codes)
    return f"Code {names}." if names else "Something went wrong inside the server." if status == 500 else "Refused."


def _codes() -> dict[int, list[str]]:
    """List the codes of the errors that each status stands for, as far as the table names their kind."""
    found: dict[int, list[str]] = {}
    kinds: list[type[errors.MlgError]] = list(HTTP_STATUS)
    for kind in kinds:
        kinds.extend(below for below in kind.__subclasses__() if below not in kinds)
        status = next(HTTP_STATUS[base] for base in kind.__mro__ if base in HTTP_STATUS)
        if kind.code not in found.setdefault(status, []):
            found[status].append(kind.code)
    return {status: sorted(codes) for status, codes in found.items()}


def _samples(rule: Rule, method: str, said: Operation) -> list[dict[str, str]]:
    """Write the call as a person would type it."""
    address = re.sub(
        r"<(?:[^:<>]+:)?(\w+)>", lambda match: STARTER if match[1] == "model" else match[1].upper(), rule.rule
    )
    has_body = bool(said.body) and method in _WITH_BODY
    return [
        {"lang": "Shell", "label": "curl", "source": _curl(method, address, said, has_body)},
        {"lang": "Python", "label": "Python", "source": _python(rule, method, address, said, has_body)},
    ]


def _curl(method: str, address: str, said: Operation, has_body: bool) -> str:
    words = ["curl"]
    if said.scope is not None:
        words.append('-H "Authorization: Bearer $MLG_API_KEY"')
    if has_body and "multipart/form-data" in said.body:
        words += [f"-F {name}=@{_file_name(name)}" for name in _required(said.body["multipart/form-data"])]
    elif has_body and "application/json" in said.body:
        example = json.dumps(example_of(said.body["application/json"]))
        words += [f"-X {method}", "-H 'Content-Type: application/json'", f"-d '{example}'"]
    elif method != "GET":
        words.append(f"-X {method}")
    return " ".join([*words, EXAMPLE_URL + address])


def _python(rule: Rule, method: str, address: str, said: Operation, has_body: bool) -> str:
    call = _CLIENT_CALLS.get(rule.endpoint)
    if call is not None:
        return f'from mlg_client import Client\n\nwith Client("{EXAMPLE_URL}") as client:\n    {call}\n'
    more = ""
    if has_body and "multipart/form-data" in said.body:
        files = ", ".join(
            f'"{name}": open("{_file_name(name)}", "rb")' for name in _required(said.body["multipart/form-data"])
        )
        more = f", files={{{files}}}"
    elif has_body and "application/json" in said.body:
        more = f", json={example_of(said.body['application/json'])!r}"
    if said.scope is not None:
        more += ', headers={"Authorization": f"Bearer {key}"}'
    key = (
        'import os\n\nimport httpx\n\nkey = os.environ["MLG_API_KEY"]\n'
        if said.scope is not None
        else "import httpx\n\n"
    )
    shown = "response.json()" if said.content_type == "application/json" else "response.text"
    return f'{key}response = httpx.request("{method}", "{EXAMPLE_URL}{address}"{more})\nprint({shown})\n'


def _required(schema: Mapping[str, Any]) -> list[str]:
    return list(schema.get("required") or list(schema.get("properties", {}))[:1])


def _file_name(field: str) -> str:
    return "kitten.jpg" if "image" in field else f"{field}.zip"


def example_of(schema: Mapping[str, Any]) -> Any:
    """Make a small value that fits a schema."""
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

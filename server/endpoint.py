"""The declaration of a view: its route, its scope, its parameters, its body and its responses.

Every view has one, by the decorator `operation`. The application routes by it, the guard reads the scope from it, and
`server/api/openapi.py` builds the API description from it, so none can miss a view. What a parameter of a service takes
comes from the service.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from provider_image.service import Param
from provider_image.services import REGISTRY, load_service
from store.clients.keys import Scope

View = TypeVar("View", bound=Callable[..., Any])
#: Tag of the pages for browsers.
PAGES = "pages"
#: Kind of an input that can be written in JSON -> its JSON Schema.
_INPUT_SCHEMAS = {"row": {"type": "object"}, "text": {"type": "string"}}
#: The attribute of a view that holds its operation.
_ATTRIBUTE = "operation"


@dataclass(frozen=True, kw_only=True)
class Field:
    """A parameter in the query, the path or a form."""

    name: str
    help: str
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})
    is_required: bool = False


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What one view does."""

    #: Methods and path: "GET|POST /readPrediction/<id>".
    route: str
    summary: str
    #: The scope that a key needs; None is open to everybody.
    scope: Scope | None
    #: Heading in the API description.
    tag: str = "predictions"
    query: tuple[Field, ...] = ()
    #: Content type -> JSON Schema of the body.
    body: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: Status -> name of a schema in `server/api/schemas.py`, or a JSON Schema; errors that every view has are left out.
    responses: Mapping[int, str | Mapping[str, Any]] = field(default_factory=dict)
    content_type: str = "application/json"

    @property
    def methods(self) -> list[str]:
        """List the HTTP methods."""
        return self.route.partition(" ")[0].split("|")

    @property
    def path(self) -> str:
        """Return the path as Flask writes it: /requests/<id>."""
        return self.route.partition(" ")[2]

    @property
    def template(self) -> str:
        """Return the path as OpenAPI writes it: /requests/{id}."""
        return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", self.path)


def operation(
    route: str,
    summary: str,
    scope: Scope | None,
    *,
    returns: str | Mapping[str, Any] | None = None,
    errors: Sequence[int] = (),
    responses: Mapping[int, str | Mapping[str, Any]] | None = None,
    **facts: Any,
) -> Callable[[View], View]:
    """Declare what a view does; takes the fields of Operation.

    :param returns: the response with status 200, if that is JSON; shorter than `responses`.
    :param errors: statuses of errors that only this view has.
    """
    described = {**({} if returns is None else {200: returns}), **(responses or {}), **dict.fromkeys(errors, "Error")}
    if "content_type" in facts:
        described.setdefault(200, {})
    declared = Operation(route=route, summary=summary, scope=scope, responses=described, **facts)

    def decorate(view: View) -> View:
        setattr(view, _ATTRIBUTE, declared)
        return view

    return decorate


def get_operation(view: Callable[..., Any]) -> Operation | None:
    """Return the operation of a view; None if it has none."""
    found = getattr(view, _ATTRIBUTE, None)
    return found if isinstance(found, Operation) else None


def service_fields(*, is_read: bool = False) -> tuple[Field, ...]:
    """List the parameters of all services, each name once. :param is_read: only those that a read takes."""
    found: dict[str, Field] = {}
    for name in REGISTRY:
        for param in load_service(name).params:
            if param.is_read_time or not is_read:
                found.setdefault(param.name, Field(name=param.name, help=param.help, schema=_param_schema(param)))
    return tuple(found.values())


def input_schemas() -> dict[str, Mapping[str, Any]]:
    """Describe the inputs of all services, each name once."""
    found: dict[str, Mapping[str, Any]] = {}
    for service in map(load_service, REGISTRY):
        for name, one in service.inputs.items():
            kind = _INPUT_SCHEMAS.get(one.kind, {"type": "string", "format": "binary"})
            found.setdefault(name, {**kind, "description": one.help})
    return found


def form_schema(fields: tuple[Field, ...], inputs: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """Describe a form or a JSON object: its inputs, which are required if there is only one, and its fields."""
    inputs = inputs or {}
    return {
        "type": "object",
        "required": list(inputs) if len(inputs) == 1 else [],
        "properties": {**inputs, **{field.name: {**field.schema, "description": field.help} for field in fields}},
    }


def _param_schema(param: Param) -> dict[str, Any]:
    schema: dict[str, Any] = {"default": param.default}
    if param.kind == "choice":
        return {"type": "string", "enum": list(param.choices), **schema}
    schema["type"] = "integer" if param.kind == "whole" else "number"
    for word, value in (("minimum", param.minimum), ("maximum", param.maximum)):
        if value is not None:
            schema[word] = value
    return schema

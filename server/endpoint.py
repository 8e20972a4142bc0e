"""The declaration of a view: its scope, its parameters, its body and its responses.

Every view has one, by the decorator `operation`. The guard reads the scope from it, and `server/api/openapi.py` builds
the API description from it, so neither can miss a view. What a parameter of a service takes comes from the service.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from provider_image.service import Param
from provider_image.services import REGISTRY, load_service
from store.keys import Scope

View = TypeVar("View", bound=Callable[..., Any])
#: The attribute of a view that holds its operation.
_ATTRIBUTE = "operation"


@dataclass(frozen=True, kw_only=True)
class Field:
    """A parameter in the query, the path or a form."""

    name: str
    help: str
    #: JSON Schema.
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})
    is_required: bool = False


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What one view does."""

    #: One line.
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
    #: Content type of the responses.
    content_type: str = "application/json"


def operation(**facts: Any) -> Callable[[View], View]:
    """Declare what a view does; takes the fields of Operation."""

    def decorate(view: View) -> View:
        setattr(view, _ATTRIBUTE, Operation(**facts))
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
            kind = {"type": "object"} if one.kind == "row" else {"type": "string", "format": "binary"}
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

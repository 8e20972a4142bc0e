"""The parameters that a client may set, as fields of an operation: those of the services, and those of the views.

Used by the views where they say what they are for. What a parameter takes is said once, by its service.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from provider_image.service import Param
from provider_image.services import REGISTRY, load_service
from server.endpoint import Field

#: Words that a yes or no is written with.
YES_OR_NO: Mapping[str, Any] = {
    "type": "string",
    "enum": ["0", "1", "false", "no", "off", "on", "true", "yes"],
    "default": "0",
}
FRESH = Field(
    name="fresh",
    help="1 asks anew even if an equal picture was answered by the same model already.",
    schema=YES_OR_NO,
)
WAIT = Field(
    name="wait",
    help="Seconds to hold the answer until the request has ended; the server has a limit of its own.",
    schema={"type": "number", "minimum": 0, "examples": [30]},
)


def service_fields(*, is_read: bool = False) -> tuple[Field, ...]:
    """List the parameters of all services, each name once. :param is_read: only those that a read takes."""
    found: dict[str, Field] = {}
    for name in REGISTRY:
        for param in load_service(name).params:
            if param.is_read_time or not is_read:
                found.setdefault(param.name, Field(name=param.name, help=param.help, schema=param_schema(param)))
    return tuple(found.values())


def param_schema(param: Param) -> dict[str, Any]:
    """Say in JSON Schema what a service's parameter takes."""
    schema: dict[str, Any] = {"default": param.default}
    if param.kind == "choice":
        return {"type": "string", "enum": list(param.choices), **schema}
    schema["type"] = "integer" if param.kind == "whole" else "number"
    for word, value in (("minimum", param.minimum), ("maximum", param.maximum)):
        if value is not None:
            schema[word] = value
    return schema


def form_schema(fields: tuple[Field, ...], **files: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a form: its files, which must be there, and its fields."""
    return {
        "type": "object",
        "required": list(files),
        "properties": {**files, **{field.name: {**field.schema, "description": field.help} for field in fields}},
    }

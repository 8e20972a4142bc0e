"""What a view is for: its scope, its query, its body and its answers, said where the view stands.

Put on every view with the decorator. From it come the check of an API key's scope (`access.py`) and the API description
(`openapi.py`), so that neither can forget a view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from store.keys import Scope

View = TypeVar("View", bound=Callable[..., Any])
#: The attribute under which a view carries its operation.
_ATTRIBUTE = "operation"


@dataclass(frozen=True, kw_only=True)
class Field:
    """A parameter of the query or the path."""

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
    #: What a key must be good for; None is open to everybody.
    scope: Scope | None
    #: Heading under which it stands in the API description.
    tag: str = "predictions"
    query: tuple[Field, ...] = ()
    #: Content type -> JSON Schema of the body.
    body: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: Status -> name of a schema in `openapi.py`, or a JSON Schema; errors that every view has are left out.
    responses: Mapping[int, str | Mapping[str, Any]] = field(default_factory=dict)
    #: Content type of the answers.
    content_type: str = "application/json"


def operation(**facts: Any) -> Callable[[View], View]:
    """Say what a view does; takes the fields of Operation."""

    def decorate(view: View) -> View:
        setattr(view, _ATTRIBUTE, Operation(**facts))
        return view

    return decorate


def get_operation(view: Callable[..., Any]) -> Operation | None:
    """Return what a view says that it does; None if it says nothing."""
    found = getattr(view, _ATTRIBUTE, None)
    return found if isinstance(found, Operation) else None

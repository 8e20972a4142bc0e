"""Query parameters that several views share: how long to wait, and which page of a list.

Used by the views. A parameter that a view does not declare is an error, so that a misspelt one is noticed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import flask

from provider_image.errors import InvalidParams
from server.auth.cursors import CursorCodec
from server.auth.guard import visible_key_id
from server.endpoint import Field
from server.intake.uploads import query_fields

#: Entries on a page of a list.
MAX_PAGE_SIZE = 200
DEFAULT_PAGE_SIZE = 50
WAIT = Field(
    name="wait",
    help="Seconds to hold the response until the request has ended; the server has its own limit.",
    schema={"type": "number", "minimum": 0, "examples": [30]},
)
CURSOR = Field(name="cursor", help="The `next` of the previous page.")


def limit_field(maximum: int) -> Field:
    """Declare the parameter that limits a list."""
    schema = {"type": "integer", "minimum": 1, "maximum": maximum, "default": DEFAULT_PAGE_SIZE}
    return Field(name="limit", help="How many at most.", schema=schema)


def state_field(states: Sequence[str]) -> Field:
    """Declare the parameter that selects by state."""
    return Field(name="state", help="Only those in this state.", schema={"type": "string", "enum": list(states)})


LIMIT = limit_field(MAX_PAGE_SIZE)


@dataclass(frozen=True, kw_only=True)
class PageQuery:
    """Which page of a list is requested, and whose entries it may show."""

    #: Only entries of this key; None shows all.
    key_id: str | None
    cursors: CursorCodec
    #: Only numbers below this.
    before: int | None
    limit: int
    #: The other parameters, without those that may be repeated.
    fields: Mapping[str, str]

    @classmethod
    def from_request(
        cls,
        request: flask.Request,
        cursors: CursorCodec,
        others: Collection[str] = (),
        *,
        repeatable: str | None = None,
    ) -> PageQuery:
        """Read the query. :param others: the other parameters that the list has. :raises InvalidParams:"""
        fields = read_query(request, *others, "cursor", "limit", repeatable=repeatable)
        return cls(
            key_id=visible_key_id(),
            cursors=cursors,
            before=parse_cursor(cursors, "cursor", fields.pop("cursor", None)),
            limit=parse_limit(fields.pop("limit", None), MAX_PAGE_SIZE),
            fields=fields,
        )

    def next_cursor(self, number: int | None) -> str | None:
        """Write where the next page starts; None at the end of the list."""
        return None if number is None else self.cursors.write(number)


def read_query(request: flask.Request, *known: str, repeatable: str | None = None) -> dict[str, str]:
    """Read the query of a view that has these parameters. :raises InvalidParams:"""
    fields = query_fields(request, repeatable=repeatable)
    check_names(fields, known)
    return fields


def check_names(fields: Collection[str], known: Collection[str]) -> None:
    """Refuse parameters that a view does not have. :raises InvalidParams:"""
    for name in fields:
        if name not in known:
            names = f"Parameters: {', '.join(sorted(known))}." if known else "It takes none."
            raise InvalidParams(f"There is no parameter {name[:64]!r} here. {names}")


def parse_wait_seconds(raw: str | None, max_seconds: float) -> float:
    """Read how long a response may be held, at most `max_seconds`. :raises InvalidParams:"""
    if raw is None:
        return 0.0
    try:
        seconds = float(raw)
    except ValueError as error:
        raise InvalidParams("wait takes a number of seconds, for example ?wait=30") from error
    if not 0 <= seconds < float("inf"):  # also refuses nan
        raise InvalidParams("wait takes a number of seconds from 0.")
    return min(seconds, max_seconds)


def parse_state(text: str | None, states: Sequence[str]) -> str | None:
    """Check the state to select by. :raises InvalidParams:"""
    if text is not None and text not in states:
        raise InvalidParams(f"state takes one of: {', '.join(states)}.")
    return text


def parse_limit(text: str | None, maximum: int) -> int:
    """Read how many entries a list may have. :raises InvalidParams:"""
    if text is None:
        return DEFAULT_PAGE_SIZE
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= maximum):
        raise InvalidParams(f"limit takes a whole number from 1 to {maximum}.")
    return int(text)


def parse_cursor(cursors: CursorCodec, name: str, text: str | None) -> int | None:
    """Read the number where a page starts; None without a cursor. :raises InvalidParams:"""
    if text is None:
        return None
    found = cursors.read(text)
    if found is None:
        raise InvalidParams(f"{name} takes a value from an earlier response, for the same list and API key.")
    return found[0]


def parse_number(name: str, text: str) -> int:
    """Read a number that an earlier response contained. :raises InvalidParams:"""
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InvalidParams(f"{name} takes a value from an earlier response.")
    return int(text)

"""What the pages show of an input that is no image: the values of a table row, or a text.

Called by the page views. An input that was deleted, or that cannot be read now, is not shown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from provider_image.errors import MlgError
from provider_image.rows import Value, parse_row
from server.context import Context
from server.serializers import input_kind
from store.requests import RequestRecord

#: Characters of an input on a card, of a value on it, and of a text on a page.
_EXCERPT_LENGTH, _VALUE_LENGTH, _TEXT_LENGTH = 160, 24, 20_000


@dataclass(frozen=True, kw_only=True)
class PlainInput:
    """A row or a text for people."""

    #: Column -> its value; empty for a text.
    row: Mapping[str, str] = field(default_factory=dict)
    text: str = ""

    @property
    def excerpt(self) -> str:
        """The beginning, for a card."""
        values = (f"{name}: {_shorten(value, _VALUE_LENGTH)}" for name, value in self.row.items())
        return _shorten(" · ".join(values) or " ".join(self.text.split()), _EXCERPT_LENGTH)


def read_plain_input(context: Context, request: RequestRecord) -> PlainInput | None:
    """Read the first input of a request; None if it is an image or any file, or cannot be read."""
    kind = input_kind(request)
    if kind in ("row", "text"):
        with contextlib.suppress(MlgError, UnicodeDecodeError):
            data = context.read_image(request)
            if kind == "row":
                return PlainInput(row={name: _show(value) for name, value in parse_row(data).items()})
            return PlainInput(text=_shorten(data.decode(), _TEXT_LENGTH))
    return None


def read_excerpts(context: Context, requests: Iterable[RequestRecord]) -> dict[str, str]:
    """Return the id of each request with a row or a text -> the beginning of it."""
    found = ((request.id, read_plain_input(context, request)) for request in requests)
    return {id: plain.excerpt for id, plain in found if plain is not None}


def _show(value: Value) -> str:
    if value is None:
        return "–"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"

"""Table rows: an input that is a JSON object of plain values, one for each column.

Read by the server, which stores a row in one form so that equal rows are equal bytes, and by services.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from provider_image.errors import NotARow
from provider_image.schemas import parse_json

#: A value of a column.
Value = str | int | float | bool | None


def parse_row(data: bytes) -> dict[str, Value]:
    """Parse a row. :raises NotARow: it is not a JSON object with at least one value, or a value is not plain."""
    row = parse_json(data, NotARow, "The row")
    if not isinstance(row, dict) or not row:
        raise NotARow()
    for name, value in row.items():
        if value is not None and not isinstance(value, str | int | float):
            raise NotARow(f"The column {name[:64]!r} of the row must be a text, a number, true, false or null.")
    return row


def format_row(row: Mapping[str, Value]) -> bytes:
    """Format a row in the form in which it is stored: equal rows give equal bytes."""
    return json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def find_delimiter(header: str) -> str:
    """Return what separates the columns of a CSV: of comma, semicolon and tab the one its first line has most often."""
    return max(",;\t", key=header.count)


def check_columns(row: Mapping[str, Value], columns: Sequence[str]) -> None:
    """Check that a row has exactly a model's columns. :raises NotARow: names those that are missing or unknown."""
    missing, unknown = (sorted(set(one) - set(other)) for one, other in ((columns, row), (row, columns)))
    if missing or unknown:
        raise NotARow(
            f"The row must have the columns {', '.join(columns)}. "
            f"Missing: {', '.join(missing) or 'none'}. Unknown: {', '.join(unknown)[:200] or 'none'}."
        )

"""Cells of CSV files that people open in a spreadsheet.

Used by the view of a batch's results and by `mlg submit`.
"""

from __future__ import annotations

from typing import Any

#: A cell that begins with one of these is a formula for some spreadsheet, the last four where wide characters are used.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def to_cell(value: Any) -> Any:
    """Return what to write for a value: text of others gets an apostrophe in front where it would be a formula."""
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA_STARTS) else value

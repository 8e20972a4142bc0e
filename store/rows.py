"""How records become rows of the database, and rows become records."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from store.cost_split import to_amount


def to_text(moment: datetime) -> str:
    """Format an aware time as sortable UTC text with milliseconds, as it is in the database."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def from_text(text: str) -> datetime:
    """Parse a time that `to_text` formatted."""
    return datetime.fromisoformat(text)


def from_optional_text(text: str | None) -> datetime | None:
    """Parse a time that may be NULL in the database."""
    return None if text is None else from_text(text)


def to_row(record: Any) -> dict[str, Any]:
    """Turn a record into a row: times and amounts as text, mappings as JSON."""
    return {name: _to_cell(value) for name, value in asdict(record).items()}


def _to_cell(value: Any) -> Any:
    if isinstance(value, datetime):
        return to_text(value)
    if isinstance(value, Decimal):
        return to_amount(value)
    if isinstance(value, Mapping):
        return json.dumps(dict(value), ensure_ascii=False)
    return value


def insert_sql(table: str, row: Mapping[str, Any]) -> str:
    """Return what follows INSERT INTO for a row whose columns are named parameters."""
    return f"{table} ({', '.join(row)}) VALUES ({', '.join(f':{column}' for column in row)})"


def from_row(
    row: Mapping[str, Any], *, amounts: Collection[str] = (), mappings: Collection[str] = ()
) -> dict[str, Any]:
    """Turn a row back into the values of a record. Columns named `*_at` and `*_until` are times, `is_*` are bools.

    :param amounts: columns that are decimals.
    :param mappings: columns that are JSON.
    """
    values: dict[str, Any] = {}
    for name, value in dict(row).items():
        if value is None:
            values[name] = None
        elif name.endswith(("_at", "_until")):
            values[name] = from_text(value)
        elif name.startswith("is_"):
            values[name] = bool(value)
        elif name in amounts:
            values[name] = Decimal(value)
        elif name in mappings:
            values[name] = json.loads(value)
        else:
            values[name] = value
    return values

"""Fields of records as JSON.

Used by the serializers, the dashboard and, for `--json`, by the commands.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

from store.amounts import to_amount
from store.rows import to_text


def to_json(value: Any) -> Any:
    """Turn the value of a field into JSON: times and amounts into text, because a number would lose digits."""
    if isinstance(value, datetime):
        return to_text(value)
    if isinstance(value, Decimal):
        return to_amount(value)
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def fields(record: object, names: str) -> dict[str, Any]:
    """Return fields of a record as JSON. :param names: their names, separated by spaces."""
    return {name: to_json(getattr(record, name)) for name in names.split()}


def given_fields(record: object, names: str) -> dict[str, Any]:
    """Return those of the fields that are neither None nor empty, as JSON."""
    return {name: value for name, value in fields(record, names).items() if value or value == 0}

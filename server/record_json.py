"""Fields of records as JSON.

Used by the serializers, the dashboard and, for `--json`, by the commands.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

from store.amounts import to_amount
from store.rows import to_text


def to_json(value: Any) -> Any:
    """Turn the value of a field into JSON: times and amounts into text, because a number would lose digits."""
    if value is None or type(value) in (str, int, bool, float):  # most of them
        return value
    if isinstance(value, datetime):
        return to_text(value)
    if isinstance(value, Decimal):
        return to_amount(value)
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def fields(record: object, names: str) -> dict[str, Any]:
    """Return fields of a record as JSON. :param names: their names, separated by spaces."""
    keys, read = _reader(names)
    return dict(zip(keys, map(to_json, read(record)), strict=True))


def given_fields(record: object, names: str) -> dict[str, Any]:
    """Return those of the fields that are neither None nor empty, as JSON."""
    keys, read = _reader(names)
    return {name: to_json(value) for name, value in zip(keys, read(record), strict=True) if value or value == 0}


@functools.cache
def _reader(names: str) -> tuple[list[str], Callable[[object], tuple[Any, ...]]]:
    """Return the names, and what reads all of them at once: lists have thousands of fields."""
    keys = names.split()
    if len(keys) < 2:  # then it would return no tuple
        return keys, lambda record: tuple(getattr(record, name) for name in keys)
    return keys, operator.attrgetter(*keys)

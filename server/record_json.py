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

#: Types of values that are JSON as they are: those of most fields, of which a list has thousands.
_PLAIN_TYPES = frozenset({type(None), str, int, bool, float})


def to_json(value: Any) -> Any:
    """Turn the value of a field into JSON: times and amounts into text, because a number would lose digits."""
    if type(value) in _PLAIN_TYPES:
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
    return {
        name: value if type(value) in _PLAIN_TYPES else to_json(value)
        for name, value in zip(keys, read(record), strict=True)
    }


def given_fields(record: object, names: str) -> dict[str, Any]:
    """Return those of the fields that are neither None nor empty, as JSON."""
    return {name: value for name, value in fields(record, names).items() if value or value == 0}


@functools.cache
def _reader(names: str) -> tuple[list[str], Callable[[object], tuple[Any, ...]]]:
    """Return the names, and what reads all of them at once: lists have thousands of fields."""
    keys = names.split()
    if len(keys) < 2:  # then it would return no tuple
        return keys, lambda record: tuple(getattr(record, name) for name in keys)
    return keys, operator.attrgetter(*keys)

"""How records become rows of the database, and rows become records, by the types of the record's fields."""

from __future__ import annotations

import enum
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, TypeVar, cast

from store.amounts import to_amount

R = TypeVar("R")
#: Types of values that the database stores as they are.
_PLAIN_TYPES = frozenset({str, int, bool, float})


def to_text(moment: datetime) -> str:
    """Format an aware time as sortable UTC text with milliseconds, as it is in the database."""
    utc = moment if moment.tzinfo is UTC else moment.astimezone(UTC)
    return utc.isoformat(timespec="milliseconds")[: -len("+00:00")] + "Z"


def from_text(text: str) -> datetime:
    """Parse a time that `to_text` formatted."""
    return datetime.fromisoformat(text)


def to_row(record: Any, **others: Any) -> dict[str, Any]:
    """Turn a record into a row: times and amounts as text, mappings as JSON.

    :param others: further columns, and those that are not simply the values of a field.
    """
    row = {
        # Most are written as they are.
        name: value if value is None or type(value) in _PLAIN_TYPES else _to_cell(value)
        for name in record.__dataclass_fields__
        if name not in others
        for value in (getattr(record, name),)
    }
    row.update(others)
    return row


def _to_cell(value: Any) -> Any:
    if isinstance(value, datetime):
        return to_text(value)
    if isinstance(value, Decimal):
        return to_amount(value)
    if isinstance(value, Mapping):
        return mapping_to_text(value, ensure_ascii=False)
    return value


def mapping_to_text(value: Mapping[str, Any], **options: Any) -> str:
    """Format a mapping as JSON. :param options: those of `json.dumps`."""
    # Most are empty, and `json.dumps` with options makes an encoder for each call.
    return json.dumps(dict(value), **options) if value else "{}"


def insert_sql(table: str, row: Mapping[str, Any]) -> str:
    """Return what follows INSERT INTO for a row whose columns are named parameters."""
    return _insert_sql(table, tuple(row))


@functools.cache
def _insert_sql(table: str, columns: tuple[str, ...]) -> str:
    return f"{table} ({', '.join(columns)}) VALUES ({', '.join(f':{column}' for column in columns)})"


def from_row(record: type[R], row: Any, **others: Any) -> R:
    """Turn a row into a record, which has no `__post_init__`. A field without a column has its default.

    :param others: values of fields that are not simply those of a column.
    """
    plan, defaults = _plan(cast("Any", record), tuple(row.keys()), tuple(others))
    cells = tuple(row)
    # A frozen dataclass sets one field after the other by `object.__setattr__`, which takes longer than all else here.
    made = object.__new__(record)
    values = made.__dict__
    for name, default in defaults:
        values[name] = default()
    for name, place, convert in plan:
        value = cells[place]
        values[name] = value if value is None or convert is None else convert(value)
    values.update(others)
    return made


def _to_mapping(text: str) -> Any:
    return {} if text == "{}" else json.loads(text)


def _same(value: Any) -> Any:
    return value


@functools.cache
def _plan(
    record: Any, columns: tuple[str, ...], others: tuple[str, ...]
) -> tuple[list[tuple[str, int, Callable[[Any], Any] | None]], list[tuple[str, Callable[[], Any]]]]:
    """Return the name, the column and the conversion of each field that has a column, and defaults of the others."""
    hints = typing.get_type_hints(record)
    plan: list[tuple[str, int, Callable[[Any], Any] | None]] = []
    defaults: list[tuple[str, Callable[[], Any]]] = []
    for field in fields(record):
        if field.name in others:
            continue
        if field.name in columns:
            plan.append((field.name, columns.index(field.name), _conversion(hints[field.name])))
        elif field.default_factory is not MISSING:
            defaults.append((field.name, field.default_factory))
        elif field.default is not MISSING:
            defaults.append((field.name, functools.partial(_same, field.default)))
        else:
            raise TypeError(f"{record.__name__} needs a column or a value for {field.name}.")
    return plan, defaults


def _conversion(hint: Any) -> Callable[[Any], Any] | None:
    if isinstance(hint, types.UnionType):
        (hint,) = (option for option in hint.__args__ if option is not type(None))
    if hint is datetime:
        return from_text
    if typing.get_origin(hint) is Mapping:
        item: Any = hint.__args__[1]
        if is_dataclass(hint.__args__[1]):
            return lambda text: {} if text == "{}" else {k: item(**values) for k, values in json.loads(text).items()}
        return _to_mapping
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {member.value: member for member in hint}.__getitem__  # a call of the class takes ten times as long
    return cast("Callable[[Any], Any]", hint) if hint in (Decimal, bool) else None

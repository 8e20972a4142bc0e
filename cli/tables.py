"""Output of the commands that list: tables for people, JSON lines for programs."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeVar

import click

from store.amounts import format_amount

if TYPE_CHECKING:
    from rich.table import Table

Record = TypeVar("Record")


def make_table(*columns: str, right: Collection[str] = ()) -> Table:
    """Create a table without rows; it has no header if all column names are empty.

    :param right: the columns that are aligned right.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=any(columns))
    for column in columns:
        table.add_column(
            column,
            no_wrap=column in ("id", "number"),
            overflow="fold",
            justify="right" if column in right else "left",
        )
    return table


def print_records(
    records: Iterable[Record], columns: Mapping[str, str | Callable[[Record], object]], *, right: Collection[str] = ()
) -> None:
    """Print a table with a row for each record.

    :param columns: name of the column -> the field of the record, or a function that returns the cell.
    :param right: the columns that are aligned right.
    """
    table = make_table(*columns, right=right)
    for record in records:
        cells = (getattr(record, cell) if isinstance(cell, str) else cell(record) for cell in columns.values())
        table.add_row(*map(_to_cell, cells))
    print_table(table)


def _to_cell(value: object) -> str:
    if isinstance(value, datetime):
        return local_time(value)
    if isinstance(value, Decimal):
        return format_amount(value)
    return "" if value is None else "".join(each if each.isprintable() else " " for each in str(value))


def width() -> int:
    """Return the width of the terminal in characters; in a pipe a large one, so that no row is wrapped."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 250


def print_table(table: Table) -> None:
    """Print a table; in a pipe each row is one line."""
    from rich.console import Console

    Console(width=width(), markup=False, highlight=False).print(table)


def local_time(moment: datetime) -> str:
    """Format a time in the time zone of this machine."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def printable(text: str) -> str:
    """Make untrusted text safe for the terminal: one line, no control characters, at most 200 characters."""
    return "".join(character if character.isprintable() else " " for character in text)[:200]


def short_address(address: str) -> str:
    """Shorten a provider's address so that it can still be recognised, and passed to other commands."""
    return address if len(address) <= 12 else address[:10] + "…"


def print_json_lines(rows: Iterable[Mapping[str, Any]]) -> None:
    """Print JSON objects, one per line."""
    for row in rows:
        click.echo(json.dumps(row))

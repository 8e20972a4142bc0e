"""Tables on the terminal, for commands that list."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def make_table(*columns: str, right: Collection[str] = ()) -> Table:
    """Make an empty table; without any headings if all are empty.

    :param right: the columns of figures, which stand at their right edge.
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


def width() -> int:
    """Return how many columns there are to print on; many in a pipe, so that each row stays on one line."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 250


def print_table(table: Table) -> None:
    """Print a table; in a pipe each row stays on one line."""
    from rich.console import Console

    Console(width=width(), markup=False, highlight=False).print(table)


def local_time(moment: datetime) -> str:
    """Write a time for people: that of this machine's clock."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def printable(text: str) -> str:
    """Return a text of others so that it cannot steer the terminal, on one line and not too long."""
    return "".join(character if character.isprintable() else " " for character in text)[:200]


def short_address(address: str) -> str:
    """Shorten a provider's address so that it can still be recognised, and passed to other commands."""
    return address if len(address) <= 12 else address[:10] + "…"

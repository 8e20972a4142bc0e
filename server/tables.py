"""Tables on the terminal, for commands that list."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def make_table(*columns: str) -> Table:
    """Make an empty table; without any headings if all are empty."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=any(columns))
    for column in columns:
        table.add_column(column, no_wrap=column in ("id", "number"), overflow="fold")
    return table


def width() -> int:
    """Return how many columns there are to print on; many in a pipe, so that each row stays on one line."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 250


def print_table(table: Table) -> None:
    """Print a table; in a pipe each row stays on one line."""
    from rich.console import Console

    Console(width=width(), markup=False, highlight=False).print(table)

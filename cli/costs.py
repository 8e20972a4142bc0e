"""The command `mlg costs`: what rented computers cost, read from the ledger of a home.

Loaded through the table in `mlg.py`. It uses the store directly, so it works while no server runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.open_store import open_store
from cli.options import home_option, json_option
from cli.tables import local_time, make_table, print_json_lines, print_table, printable, short_address
from store.amounts import cost_per_1000_images, format_amount

if TYPE_CHECKING:
    from store.ledger import AllocationRecord, CostRow

_COLUMNS = ("images", "chunks", "paid", "open", "refused", "per 1000 images")


@click.command()
@home_option
@click.option(
    "--by",
    type=click.Choice(["day", "model", "provider"]),
    default="day",
    show_default=True,
    help="Group by this. Days are in UTC; with day, images without a settled invoice are in the row `open`.",
)
@json_option
def costs(home: Path | None, by: str, as_json: bool) -> None:
    """Show what rented computers cost, in GLM.

    The columns: images (requests that got a result), chunks, paid (accepted invoices), open (estimated cost without a
    settled invoice), refused (invoices that were not accepted), and the cost of 1000 images.

    The last row is the total. Below it are the open allocations, whose money is still reserved. The table rounds
    amounts to six decimals; --json does not, and writes the total and then the open allocations last.

    \b
    Example:
      mlg costs
      mlg costs --by provider
      mlg costs --by model --json | jq 'select(.by == "total").paid'
    """
    with open_store(home) as store:
        rows = store.ledger.costs(by)
        (total,) = store.ledger.costs("total")
        allocations = store.ledger.allocations(is_open=True)
    if as_json:
        print_json_lines(_to_json(row, by) for row in rows)
        print_json_lines([_to_json(total, "total")])
        print_json_lines(map(_allocation_to_json, allocations))
        return
    table = make_table(by, *_COLUMNS, right=_COLUMNS)
    for row in [*rows, total]:
        name = row.name if row.name == row.key else f"{printable(row.name)} {short_address(row.key)}"
        table.add_row(name, *_cells(row))
    print_table(table)
    if allocations:
        click.echo()
        open_table = make_table("open allocation", "GLM", "platform", "batcher", "since", right=("GLM",))
        for allocation in allocations:
            open_table.add_row(
                allocation.id,
                format_amount(allocation.amount),
                allocation.platform,
                allocation.batcher_id,
                local_time(allocation.created_at),
            )
        print_table(open_table)


def _cells(row: CostRow) -> tuple[str, ...]:
    price = cost_per_1000_images(row)
    return (
        str(row.images),
        str(row.chunks),
        format_amount(row.paid),
        format_amount(row.open),
        format_amount(row.refused),
        "" if price is None else format_amount(price),
    )


def _to_json(row: CostRow, by: str) -> dict[str, Any]:
    from store.cost_split import to_amount

    price = cost_per_1000_images(row)
    return {
        "by": by,
        "key": row.key,
        "name": row.name,
        "images": row.images,
        "chunks": row.chunks,
        "paid": to_amount(row.paid),
        "open": to_amount(row.open),
        "refused": to_amount(row.refused),
        # Rounded, because nobody pays exactly this amount.
        "per_1000_images": None if price is None else float(price),
    }


def _allocation_to_json(allocation: AllocationRecord) -> dict[str, Any]:
    from store.cost_split import to_amount
    from store.rows import to_text

    return {
        "by": "allocation",
        "key": allocation.id,
        "amount": to_amount(allocation.amount),
        "platform": allocation.platform,
        "address": allocation.address,
        "batcher_id": allocation.batcher_id,
        "created_at": to_text(allocation.created_at),
    }

"""The command `mlg costs`: what the work of others cost, as the ledger of a home tells it.

Works on the store itself, so that it is of use while no server runs. Found through the table in `mlg.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.open_store import open_store
from cli.options import home_option, json_option
from cli.tables import local_time, make_table, print_table, printable
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
    help="What to add up by; days are UTC, and what has no settled invoice yet stands under open.",
)
@json_option
def costs(home: Path | None, by: str, as_json: bool) -> None:
    """Show what was paid, in GLM: invoices accepted, an estimate of what is open, and what was refused.

    Images are answered requests. Below the total stand the allocations whose money is still kept ready. The table
    rounds to six decimals, --json does not; its last line but for the allocations is the total.

    \b
    Example:
      mlg costs
      mlg costs --by provider
      mlg costs --by model --json | jq 'select(.by == "total").paid'
    """
    with open_store(home) as store:
        rows = store.costs(by)
        (total,) = store.costs("total")
        allocations = store.allocations(is_open=True)
    if as_json:
        for row in rows:
            click.echo(json.dumps(_to_json(row, by)))
        click.echo(json.dumps(_to_json(total, "total")))
        for allocation in allocations:
            click.echo(json.dumps(_allocation_json(allocation)))
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


def short_address(address: str) -> str:
    """Shorten a provider's address so that it can still be recognised, and named to other commands."""
    return address if len(address) <= 12 else address[:10] + "…"


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
        # Not an amount that anybody pays, so it may be rounded.
        "per_1000_images": None if price is None else float(price),
    }


def _allocation_json(allocation: AllocationRecord) -> dict[str, Any]:
    from store.cost_split import to_amount
    from store.records import to_text

    return {
        "by": "allocation",
        "key": allocation.id,
        "amount": to_amount(allocation.amount),
        "platform": allocation.platform,
        "address": allocation.address,
        "batcher_id": allocation.batcher_id,
        "created_at": to_text(allocation.created_at),
    }

"""The command `mlg costs`: what rented computers cost, read from the ledger of a home."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cli.open_store import open_store
from cli.options import home_option, json_option
from cli.tables import print_json_lines, print_records, printable, short_address
from server.record_json import fields

if TYPE_CHECKING:
    from store.rentals.ledger import CostRow

_NUMBERS = {
    **{name: name for name in ("images", "chunks", "paid", "open", "refused")},
    "per 1000 images": "per_1000_images",
}


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
def costs(by: str, as_json: bool) -> None:
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
    with open_store() as store:
        rows = store.ledger.costs(by)
        (total,) = store.ledger.costs("total")
        allocations = store.ledger.allocations(is_open=True)
    if as_json:
        print_json_lines(_to_json(row, by) for row in rows)
        print_json_lines([_to_json(total, "total")])
        print_json_lines(
            {"by": "allocation", "key": each.id, **fields(each, "amount platform address batcher_id created_at")}
            for each in allocations
        )
        return
    print_records([*rows, total], {by: _name, **_NUMBERS}, right=_NUMBERS)
    if allocations:
        click.echo()
        print_records(
            allocations,
            {
                "open allocation": "id",
                "GLM": "amount",
                "platform": "platform",
                "batcher": "batcher_id",
                "since": "created_at",
            },
            right=("GLM",),
        )


def _name(row: CostRow) -> str:
    return row.name if row.name == row.key else f"{printable(row.name)} {short_address(row.key)}"


def _to_json(row: CostRow, by: str) -> dict[str, Any]:
    # The price is rounded, because nobody pays exactly this amount.
    price = None if row.per_1000_images is None else float(row.per_1000_images)
    return {"by": by, **fields(row, "key name images chunks paid open refused"), "per_1000_images": price}

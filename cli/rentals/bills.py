"""The group `mlg bills`: what providers have not billed yet, what was refused, and giving up to wait for a bill.

It uses the store directly. Batchers judge and pay bills; no command does.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from cli.open_store import open_store
from cli.options import home_option, json_option
from cli.tables import local_time, print_json_lines, print_records, printable
from provider_image.errors import ConfigError
from server.record_json import fields, to_json

if TYPE_CHECKING:
    from store.rentals.ledger import AgreementRecord

#: Characters of an id that a table shows; they are accepted in its place.
_ID_CHARACTERS = 16


@click.group()
def bills() -> None:
    """Show what is not billed or was refused, and give up to wait for a bill.

    A provider sends one invoice when an agreement has ended. The batcher judges it once: it pays what the agreement can
    have cost by this machine's clock, and refuses more. Until then, what the agreement may cost counts against budgets;
    after a day without a bill it is written off.

    \b
    Example:
      mlg bills open
      mlg bills write-off 3f0c
    """


@bills.command("open")
@home_option
@json_option
def list_open(as_json: bool) -> None:
    """List the agreements that run or have no settled invoice, oldest first.

    The columns: agreement (the beginning of its id), provider, model, since, ended, and may cost (the GLM that are
    reserved for it).

    \b
    Example:
      mlg bills open
      mlg bills open --json | jq -r 'select(.ended_at != null).id'
    """
    with open_store() as store:
        found = store.ledger.agreements(is_settled=False)
        reserved = {each.agreement_id: each.amount for each in store.reservations.list(is_open=True)}
    if as_json:
        names = "id provider_id provider_name model created_at ended_at reason"
        print_json_lines({**fields(each, names), "reserved": to_json(reserved.get(each.id))} for each in found)
        return
    print_records(
        found,
        {
            "agreement": lambda each: each.id[:_ID_CHARACTERS],
            "provider": lambda each: printable(each.provider_name),
            "model": "model",
            "since": "created_at",
            "ended": lambda each: "it runs" if each.ended_at is None else local_time(each.ended_at),
            "may cost": lambda each: reserved.get(each.id),
        },
        right=("may cost",),
    )


@bills.command()
@home_option
@json_option
def refused(as_json: bool) -> None:
    """List the invoices and debit notes that were refused, oldest first. They are never paid.

    The columns: bill (the beginning of its id), kind, amount (what it demands), at most (what could be owed), reason,
    refused (when), and told (whether the daemon knows).

    \b
    Example:
      mlg bills refused
      mlg bills refused --json | jq -r .reason
    """
    with open_store() as store:
        found = store.decisions.refused()
    if as_json:
        names = "bill_id kind agreement_id amount max_amount reason decided_at finished_at"
        print_json_lines(fields(each, names) for each in found)
        return
    print_records(
        found,
        {
            "bill": lambda each: each.bill_id[:_ID_CHARACTERS],
            "kind": lambda each: each.kind.replace("_", " "),
            "amount": "amount",
            "at most": "max_amount",
            "reason": lambda each: printable(each.reason or ""),
            "refused": "decided_at",
            "told": lambda each: "yes" if each.finished_at else "not yet",
        },
        right=("amount", "at most"),
    )


@bills.command("write-off")
@home_option
@click.argument("agreements", nargs=-1, metavar="AGREEMENT...")
@click.option("--all", "all_", is_flag=True, help="All agreements that ended without a settled invoice.")
def write_off(agreements: tuple[str, ...], all_: bool) -> None:
    """Give up to wait for the invoices of agreements that have ended; they no longer count against budgets.

    AGREEMENT is the id or its beginning, from `mlg bills open`. An invoice that comes within a month is paid
    nevertheless.

    \b
    Example:
      mlg bills write-off 3f0c
      mlg bills write-off --all
    """
    if bool(agreements) == all_:
        raise click.UsageError("Name agreements, or use --all.")
    with open_store() as store:
        ended = store.ledger.agreements(is_open=False, is_settled=False)
        chosen = ended if all_ else [_find(ended, beginning) for beginning in agreements]
        written_off = store.ledger.write_off([each.id for each in chosen], now=datetime.now(UTC))
    for id in written_off:
        click.echo(f"{id}\twritten off")


def _find(ended: list[AgreementRecord], beginning: str) -> AgreementRecord:
    found = [each for each in ended if each.id.startswith(beginning)]
    if len(found) != 1:
        problem = "is not the beginning of one id alone" if found else "has not ended without a settled invoice"
        raise ConfigError(f"The agreement {printable(beginning)} {problem}. See: mlg bills open")
    return found[0]

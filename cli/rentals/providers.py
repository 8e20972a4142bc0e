"""The group `mlg providers`: lists the providers of rented computers, bans and unbans them.

It uses the store directly; batchers read bans there before they choose a provider.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import click

from cli.open_store import open_store
from cli.options import home_option, json_option, parse_duration
from cli.tables import local_time, print_json_lines, print_records, printable, short_address
from server.record_json import fields, to_json
from store.amounts import format_amount

if TYPE_CHECKING:
    from store.rentals.ledger import CostRow
    from store.rentals.providers import ProviderRecord


#: An address may have the short form of the list.
_name_or_id = click.argument(
    "name_or_id", metavar="NAME_OR_ID", callback=lambda context, parameter, value: value.removesuffix("…")
)


@click.group()
def providers() -> None:
    """List the providers that have offered computers, ban or unban one.

    \b
    Example:
      mlg providers list
      mlg providers ban slowpoke --for 2h
    """


@providers.command("list")
@home_option
@json_option
def list_providers(as_json: bool) -> None:
    """List the providers, the one seen last first. Prices are in GLM.

    The columns: per hour (the price of an hour with one core in use), start (the price of a start), done and failed
    (chunks), score (the share of recent work that succeeded, from 0 to 1; 0.5 if nothing is known), spent, and for
    each model the recent speed and the price of 1000 images that follows from it, without the start.

    \b
    Example:
      mlg providers list
      mlg providers list --json | jq 'select(.ban_reason != null).id'
    """
    with open_store() as store:
        found = store.providers.list()
        costs = {row.key: row for row in store.ledger.costs("provider")}
        speeds = store.providers.speeds()
    now = datetime.now(UTC)
    if as_json:
        print_json_lines(_to_json(provider, speeds[provider.id], costs.get(provider.id), now) for provider in found)
        return

    def speed_cell(provider: ProviderRecord) -> str:
        return ", ".join(
            f"{model} {speed:.1f} ({format_amount(provider.price_per_1000_images(speed))})"
            for model, speed in speeds[provider.id].items()
        )

    print_records(
        found,
        {
            "name": lambda provider: printable(provider.name),
            "id": lambda provider: short_address(provider.id),
            "per hour": "price_per_hour",
            "start": "start_price",
            "done": "done",
            "failed": "failed",
            "score": lambda provider: f"{provider.score:.2f}",
            "spent": lambda provider: _spent(costs.get(provider.id)),
            "images/s (GLM per 1000)": speed_cell,
            "banned": lambda provider: _ban_cell(provider, now),
        },
        right=("per hour", "start", "done", "failed", "score", "spent"),
    )


@providers.command()
@home_option
@_name_or_id
@click.option(
    "--for",
    "duration",
    callback=parse_duration,
    metavar="DURATION",
    help="How long, for example 30m, 2h or 7d. [default: until unbanned]",
)
@click.option("--reason", metavar="TEXT", default="An operator banned it.", show_default=True, help="Why.")
def ban(name_or_id: str, duration: timedelta | None, reason: str) -> None:
    """Send no more chunks to a provider. It may finish the chunks that it has.

    NAME_OR_ID is its address, the beginning of its address, or its name if the name is unique.

    \b
    Example:
      mlg providers ban slowpoke --for 2h --reason "too slow at night"
      mlg providers ban 0x21fe3a80
    """
    now = datetime.now(UTC)
    until = None if duration is None else now + duration
    with open_store() as store:
        provider = store.providers.ban(name_or_id, until=until, reason=reason, by_operator=True)
    click.echo(f"{printable(provider.name)}\t{provider.id}\tbanned {_until(provider)}")


@providers.command()
@home_option
@_name_or_id
def unban(name_or_id: str) -> None:
    """Lift the ban of a provider. It does not matter whether an operator or a batcher banned it.

    \b
    Example:
      mlg providers unban slowpoke
    """
    with open_store() as store:
        provider = store.providers.unban(name_or_id)
    click.echo(f"{printable(provider.name)}\t{provider.id}\tnot banned")


def _spent(costs: CostRow | None) -> Decimal:
    return Decimal(0) if costs is None else costs.spent


def _until(provider: ProviderRecord) -> str:
    return "for good" if provider.banned_until is None else f"until {local_time(provider.banned_until)}"


def _ban_cell(provider: ProviderRecord, now: datetime) -> str:
    return f"{_until(provider)}: {printable(provider.ban_reason or '')}" if provider.is_banned(now) else ""


def _to_json(
    provider: ProviderRecord, speeds: dict[str, float], costs: CostRow | None, now: datetime
) -> dict[str, Any]:
    return {
        **fields(provider, "id name first_seen_at seen_at start_price price_per_cpu_second price_per_second"),
        "per_hour": to_json(provider.price_per_hour),
        **fields(provider, "done failed images"),
        "score": round(provider.score, 4),
        "images_per_second": {model: round(speed, 3) for model, speed in speeds.items()},
        "per_1000_images": {
            model: to_json(provider.price_per_1000_images(speed).quantize(Decimal("1e-9")))
            for model, speed in speeds.items()
        },
        "spent": to_json(_spent(costs)),
        "is_banned": provider.is_banned(now),
        **fields(provider, "banned_until ban_reason is_banned_by_operator"),
    }

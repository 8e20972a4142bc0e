"""The command `mlg usage`: what API keys have used, read from a home."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from cli.open_store import open_store
from cli.options import home_option, json_option
from cli.tables import print_json_lines, print_records, printable

if TYPE_CHECKING:
    from store.clients.usage import UsageRow


@click.command()
@home_option
@click.option("--since", metavar="DAY", help="First day, UTC, for example 2026-11-01. [29 days before the last]")
@click.option("--until", metavar="DAY", help="Last day. [today]")
@click.option("--by", default="day", show_default=True, metavar="NAMES", help="Group by some of day,key,model,client.")
@click.option("--key", metavar="ID_OR_NAME", help="Only the usage of this API key.")
@click.option("--csv", "as_csv", is_flag=True, help="Write CSV.")
@json_option
def usage(since: str | None, until: str | None, by: str, key: str | None, as_csv: bool, as_json: bool) -> None:
    """Show what API keys have sent, how it ended, and what it cost.

    A request counts on the day of its arrival, also after it was deleted. The columns: requests (accepted), done,
    cached (answered with an earlier answer), failed, cancelled, expired, refused (images that batches refused), bytes
    of the inputs, seconds in the model, and GLM, of which a part may be an estimate until bills are decided (~).

    The last row is the total. Below it are the keys with a quota, and what is left of it. `mlg keys list` shows all
    keys; GET /usage shows a client its own usage.

    \b
    Example:
      mlg usage
      mlg usage --by key,model --since 2026-11-01
      mlg usage --by day,key --csv > usage.csv
      mlg usage --key alice --json | jq -s 'map(.done) | add'
    """
    from server.status.usage_report import UsageQuery, csv_text, show_quotas, show_row

    now = datetime.now(UTC)
    given = {name: text for name, text in (("since", since), ("until", until), ("by", by)) if text is not None}
    with open_store() as store:
        keys = store.keys.list() if key is None else [store.keys.find_named(key)]
        query = UsageQuery.parse(given, now=now, key_id=None if key is None else keys[0].id)
        rows, total = query.read(store), query.read_total(store)
        quotas = show_quotas(store, keys, now=now)
    if as_json:
        print_json_lines(show_row(row, query.by) for row in rows)
        return
    if as_csv:
        click.echo(csv_text(rows, query.by), nl=False)
        return
    grouped = {name: _cell_of(name) for name in query.by}
    counts = {
        "requests": "accepted",
        **{name: name for name in ("done", "cached", "failed", "cancelled", "expired", "refused", "bytes")},
        "seconds": lambda row: f"{row.seconds:.1f}",
        "GLM": "cost",
        "": lambda row: "" if row.is_cost_final else "~",
    }
    print_records([*rows, total], {**grouped, **counts}, right=tuple(counts))
    if quotas:
        click.echo()
        print_records(
            quotas,
            {
                "key": lambda quota: printable(quota["key_name"]),
                "images today": lambda quota: quota["images_today"],
                "images a day": lambda quota: quota["images_per_day"],
                "left today": lambda quota: quota["images_left"],
                "requests a minute": lambda quota: quota["requests_per_minute"],
            },
            right=("images today", "images a day", "left today", "requests a minute"),
        )


def _cell_of(name: str) -> Callable[[UsageRow], str]:
    def cell(row: UsageRow) -> str:
        value = getattr(row, name)
        if value is None:
            return "total"
        if name == "key":
            return printable(row.key_name or row.key or "no key")
        return value or "not known"

    return cell

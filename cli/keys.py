"""The group `mlg keys`: makes, lists and revokes the keys with which clients use the HTTP API.

Works on the store itself. Found through the table in `mlg.py`. A key is written to stdout once, when it is made, and
nothing else is, so that it can be piped into a vault; it can never be shown again.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.open_store import open_store
from cli.options import environment, home_option, json_option, parse_duration
from cli.tables import local_time, make_table, print_table, printable
from provider_image.errors import ConfigError
from store.keys import Scope
from store.settings import HomeSettings

if TYPE_CHECKING:
    from store.keys import KeyRecord

#: Longest name of a key.
MAX_NAME_LENGTH = 100


@click.group()
def keys() -> None:
    """Make, list and revoke the API keys of a server.

    As long as there is none, whoever reaches the server may use it. From the first key on every client needs one.

    \b
    Example:
      mlg keys create alice
      mlg keys revoke alice
    """


@keys.command()
@home_option
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice([str(scope) for scope in Scope]),
    multiple=True,
    default=[str(Scope.SUBMIT), str(Scope.READ)],
    show_default="submit and read",
    help="What it is good for, may be given several times: submit sends pictures, read reads what was sent with the "
    "same key, operate may see and change everything.",
)
@click.option("--quota", type=click.IntRange(1, 10**12), metavar="N", help="Pictures a day (UTC). [any number]")
@click.option("--rate", type=click.IntRange(1, 10**9), metavar="N", help="Requests a minute. [any number]")
@click.option(
    "--expires",
    callback=parse_duration,
    metavar="LENGTH",
    help="How long it is good, for example 12h or 90d. [until revoked]",
)
def create(
    home: Path | None,
    name: str,
    scopes: tuple[str, ...],
    quota: int | None,
    rate: int | None,
    expires: timedelta | None,
) -> None:
    """Make a key and write it to stdout. It is shown this once: only a hash of it is kept.

    \b
    Example:
      mlg keys create alice --quota 1000 --rate 120 --expires 90d
      mlg keys create dashboard --scope operate | pass insert -m mlg/dashboard
    """
    name = name.strip()
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise click.BadParameter(f"A key's name has 1 to {MAX_NAME_LENGTH} printable signs.", param_hint="NAME")
    settings = HomeSettings.from_env(environment(home=home))
    from store.keys import KeyRecord, hash_key, make_key
    from store.sqlite import SqliteStore

    now = datetime.now(UTC)
    try:
        expires_at = None if expires is None else now + expires
    except OverflowError as error:
        raise ConfigError("--expires is further away than a calendar goes.") from error
    id, key = make_key()
    store = SqliteStore(settings)
    try:
        # Unlike the other commands this one makes the home, so that a server can have a key before its first start.
        store.migrate()
        is_first = not store.has_keys()
        store.add_key(
            KeyRecord(
                id=id,
                name=name,
                sha256=hash_key(key),
                scopes=frozenset(map(Scope, scopes)),
                images_per_day=quota,
                requests_per_minute=rate,
                created_at=now,
                expires_at=expires_at,
            )
        )
    finally:
        store.close()
    click.echo(key)
    if is_first:
        click.echo("mlg: this is the first key: from now on the server answers nobody without one.", err=True)


@keys.command("list")
@home_option
@json_option
def list_keys(home: Path | None, as_json: bool) -> None:
    """List the keys, oldest first: what each is good for, its limits, and when it was used last.

    \b
    Example:
      mlg keys list
      mlg keys list --json | jq 'select(.last_used_at == null).id'
    """
    now = datetime.now(UTC)
    with open_store(home) as store:
        found = store.list_keys()
        used = store.images_used_by_key(now=now)
    if as_json:
        for key in found:
            click.echo(json.dumps(_to_json(key, used.get(key.id, 0), now)))
        return
    limits = ("pictures today", "a minute")
    table = make_table("name", "id", "scopes", *limits, "made", "used", "state", right=limits)
    for key in found:
        quota = "" if key.images_per_day is None else f" of {key.images_per_day}"
        table.add_row(
            printable(key.name),
            key.id,
            " ".join(sorted(key.scopes)),
            f"{used.get(key.id, 0)}{quota}",
            "" if key.requests_per_minute is None else str(key.requests_per_minute),
            local_time(key.created_at),
            "" if key.last_used_at is None else local_time(key.last_used_at),
            _state(key, now),
        )
    print_table(table)


@keys.command()
@home_option
@click.argument("id_or_name", metavar="ID_OR_NAME")
def revoke(home: Path | None, id_or_name: str) -> None:
    """Revoke a key for good. Running servers refuse it within five seconds. What was sent with it stays.

    \b
    Example:
      mlg keys revoke alice
    """
    with open_store(home) as store:
        key = store.revoke_key(id_or_name.strip(), now=datetime.now(UTC))
    click.echo(f"{printable(key.name)}\t{key.id}\trevoked")


def _state(key: KeyRecord, now: datetime) -> str:
    if key.revoked_at is not None:
        return f"revoked {local_time(key.revoked_at)}"
    if key.expires_at is None:
        return "good"
    return f"good until {local_time(key.expires_at)}" if key.is_usable(now) else f"expired {local_time(key.expires_at)}"


def _to_json(key: KeyRecord, used: int, now: datetime) -> dict[str, Any]:
    from store.records import to_text

    def text(moment: datetime | None) -> str | None:
        return None if moment is None else to_text(moment)

    return {
        "id": key.id,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "pictures_per_day": key.images_per_day,
        "pictures_today": used,
        "requests_per_minute": key.requests_per_minute,
        "created_at": to_text(key.created_at),
        "expires_at": text(key.expires_at),
        "revoked_at": text(key.revoked_at),
        "last_used_at": text(key.last_used_at),
        "is_usable": key.is_usable(now),
    }

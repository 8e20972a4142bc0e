"""The group `mlg keys`: creates, lists and revokes the API keys of a server.

`create` writes the key to stdout and nothing else, so that it can be piped into a password manager; the key cannot be
shown again.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from cli.open_store import open_store
from cli.options import home_option, json_option, parse_duration
from cli.tables import local_time, print_json_lines, print_records, printable
from provider_image.errors import ConfigError
from server.record_json import fields
from store.clients.keys import Scope

if TYPE_CHECKING:
    from store.clients.keys import KeyRecord

#: Maximum length of a key's name.
MAX_NAME_LENGTH = 100


@click.group()
def keys() -> None:
    """Create, list and revoke the API keys of a server.

    While there is no key, anyone who can reach the server may use it. From the first key on every client needs one.

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
    help="What the key permits; may be given several times. submit: send images; read: read what was sent with the "
    "same key; train: train models, which every key may use; metrics: read /metrics; operate: read and change "
    "everything. [default: submit and read]",
)
@click.option("--quota", type=click.IntRange(1, 10**12), metavar="N", help="Images per day (UTC). [default: unlimited]")
@click.option("--rate", type=click.IntRange(1, 10**9), metavar="N", help="Requests per minute. [default: unlimited]")
@click.option(
    "--expires",
    callback=parse_duration,
    metavar="DURATION",
    help="How long the key is valid, for example 12h or 90d. [default: until revoked]",
)
def create(
    name: str,
    scopes: tuple[str, ...],
    quota: int | None,
    rate: int | None,
    expires: timedelta | None,
) -> None:
    """Create a key and write it to stdout. It cannot be shown again: only its hash is stored.

    \b
    Example:
      mlg keys create alice --quota 1000 --rate 120 --expires 90d
      mlg keys create dashboard --scope operate | pass insert -m mlg/dashboard
    """
    name = name.strip()
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise click.BadParameter(f"A key's name has 1 to {MAX_NAME_LENGTH} printable characters.", param_hint="NAME")
    from store.clients.keys import KeyRecord, hash_key, make_key

    now = datetime.now(UTC)
    try:
        expires_at = None if expires is None else now + expires
    except OverflowError as error:
        raise ConfigError("--expires is too far in the future: no date after the year 9999 is possible.") from error
    id, key = make_key()
    # Unlike the other commands this one creates the home, so that a key can exist before the first server starts.
    with open_store(creates=True) as store:
        is_first = not store.keys.has_any()
        store.keys.add(
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
    click.echo(key)
    if is_first:
        click.echo("mlg: this is the first key: from now on every client of the server needs a key.", err=True)


@keys.command("list")
@home_option
@json_option
def list_keys(as_json: bool) -> None:
    """List the keys, oldest first. Shows their scopes, limits, state and last use.

    \b
    Example:
      mlg keys list
      mlg keys list --json | jq 'select(.last_used_at == null).id'
    """
    now = datetime.now(UTC)
    with open_store() as store:
        found = store.keys.list()
        used = store.keys.images_used_by_key(now=now)
    if as_json:
        print_json_lines(_to_json(key, used.get(key.id, 0), now) for key in found)
        return

    def images_today(key: KeyRecord) -> str:
        quota = "" if key.images_per_day is None else f" of {key.images_per_day}"
        return f"{used.get(key.id, 0)}{quota}"

    print_records(
        found,
        {
            "name": lambda key: printable(key.name),
            "id": "id",
            "scopes": lambda key: " ".join(sorted(key.scopes)),
            "images today": images_today,
            "per minute": "requests_per_minute",
            "created": "created_at",
            "last used": "last_used_at",
            "state": lambda key: _state(key, now),
        },
        right=("images today", "per minute"),
    )


@keys.command()
@home_option
@click.argument("id_or_name", metavar="ID_OR_NAME")
def revoke(id_or_name: str) -> None:
    """Revoke a key permanently. Running servers refuse it within five seconds; requests made with it are kept.

    \b
    Example:
      mlg keys revoke alice
    """
    with open_store() as store:
        key = store.keys.revoke(id_or_name.strip(), now=datetime.now(UTC))
    click.echo(f"{printable(key.name)}\t{key.id}\trevoked")


def _state(key: KeyRecord, now: datetime) -> str:
    if key.revoked_at is not None:
        return f"revoked {local_time(key.revoked_at)}"
    if key.expires_at is None:
        return "valid"
    word = "valid until" if key.is_usable(now) else "expired"
    return f"{word} {local_time(key.expires_at)}"


def _to_json(key: KeyRecord, used: int, now: datetime) -> dict[str, Any]:
    return {
        **fields(key, "id name"),
        "scopes": sorted(key.scopes),
        "pictures_per_day": key.images_per_day,
        "pictures_today": used,
        **fields(key, "requests_per_minute created_at expires_at revoked_at last_used_at"),
        "is_usable": key.is_usable(now),
    }

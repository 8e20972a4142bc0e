"""The group `mlg webhooks`: addresses that are told of every end, and what became of the messages to them.

Works on the store itself; the server processes do the sending, but for a test. Found through the table in `mlg.py`.
"""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.open_store import open_store
from cli.options import home_option, json_option
from provider_image.errors import ConfigError

if TYPE_CHECKING:
    from store.webhooks import DeliveryRecord, EndpointRecord


@click.group()
def webhooks() -> None:
    """Tell other programs when a request or a batch is done.

    \b
    Example:
      mlg webhooks add https://example.org/hooks/mlg
      mlg webhooks list
      mlg webhooks dead
    """


@webhooks.command("add")
@click.argument("url")
@click.option(
    "--events",
    default="request.done,batch.done",
    show_default=True,
    metavar="EVENT,...",
    help="What to tell: request.done, batch.done.",
)
@home_option
@json_option
def add_webhook(url: str, events: str, home: Path | None, as_json: bool) -> None:
    """Add an address, and show the secret that signs what is sent to it.

    The receiver checks the signature with the secret (https://www.standardwebhooks.com). The messages tell of all
    requests, whosever they are.

    \b
    Example:
      mlg webhooks add https://example.org/hooks/mlg --events batch.done
    """
    from server.webhooks import check_webhook
    from store.webhooks import EVENTS, EndpointRecord, new_secret

    wanted = tuple(dict.fromkeys(event.strip() for event in events.split(",") if event.strip()))
    unknown = sorted(set(wanted) - set(EVENTS))
    if unknown or not wanted:
        raise ConfigError(f"--events {events}: it takes {' and '.join(EVENTS)}, with commas between.")
    opening = open_store(home)
    check_webhook(url, allows_private=opening.settings.allows_private_webhooks)
    with opening as store:
        endpoint = EndpointRecord(
            id=f"we_{secrets.token_hex(6)}", url=url, events=wanted, secret=new_secret(), created_at=datetime.now(UTC)
        )
        store.add_endpoint(endpoint)
    if as_json:
        click.echo(json.dumps(_endpoint_json(endpoint, has_secret=True)))
    else:
        click.echo(f"{endpoint.id}  {endpoint.secret}")


@webhooks.command("list")
@click.option("--show-secret", is_flag=True, help="Show the secrets, and the one for addresses sent with requests.")
@home_option
@json_option
def list_webhooks(show_secret: bool, home: Path | None, as_json: bool) -> None:
    """List the addresses.

    \b
    Example:
      mlg webhooks list
      mlg webhooks list --show-secret
    """
    with open_store(home) as store:
        endpoints = store.list_endpoints()
        own_secret = store.webhook_secret(None)
    if as_json:
        for endpoint in endpoints:
            click.echo(json.dumps(_endpoint_json(endpoint, has_secret=show_secret)))
        if show_secret:
            click.echo(json.dumps({"id": None, "secret": own_secret}))
        return
    from cli.tables import make_table, print_table, printable

    table = make_table("id", "url", "events", "state", *(["secret"] if show_secret else []))
    for endpoint in endpoints:
        state = "on" if endpoint.disabled_at is None else f"off: {endpoint.disabled_reason}"
        table.add_row(
            endpoint.id,
            printable(endpoint.url),
            ", ".join(endpoint.events),
            state,
            *([endpoint.secret] if show_secret else []),
        )
    if show_secret:
        table.add_row("-", "(addresses that come with requests)", "", "on", own_secret)
    print_table(table)


@webhooks.command("remove")
@click.argument("id")
@home_option
def remove_webhook(id: str, home: Path | None) -> None:
    """Remove an address, and what was still to be sent to it.

    \b
    Example:
      mlg webhooks remove we_0123456789ab
    """
    with open_store(home) as store:
        store.remove_endpoint(id)


@webhooks.command("test")
@click.argument("id")
@home_option
def test_webhook(id: str, home: Path | None) -> None:
    """Send a message of the type `webhook.test` now, and say what the receiver answers.

    \b
    Example:
      mlg webhooks test we_0123456789ab
    """
    from server.errors import DeliveryFailed
    from server.http_client import HttpClient
    from server.webhooks import send
    from store.records import to_text
    from store.webhooks import UnknownWebhook

    opening = open_store(home)
    with opening as store:
        endpoint = next((one for one in store.list_endpoints() if one.id == id), None)
    if endpoint is None:
        raise UnknownWebhook(f"There is no webhook {id[:80]}. See: mlg webhooks list")
    now = datetime.now(UTC)
    message = {"type": "webhook.test", "timestamp": to_text(now), "data": {}}
    status, _ = send(
        endpoint.url,
        id=f"msg_{secrets.token_hex(16)}",
        body=json.dumps(message).encode(),
        secret=endpoint.secret,
        now=now,
        http_client=HttpClient(allows_private=opening.settings.allows_private_webhooks),
    )
    if not 200 <= status < 300:
        raise DeliveryFailed(f"The receiver answered with status {status}.")
    click.echo(f"The receiver took it (status {status}).")


@webhooks.command("deliveries")
@click.option("--state", type=click.Choice(["pending", "delivered", "dead"]), help="Only those that stand there.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="How many at most.")
@home_option
@json_option
def list_deliveries(state: str | None, limit: int, home: Path | None, as_json: bool) -> None:
    """List messages, newest first.

    \b
    Example:
      mlg webhooks deliveries --state pending
    """
    _list(home, state, limit, as_json)


@webhooks.command("dead")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="How many at most.")
@home_option
@json_option
def list_dead(limit: int, home: Path | None, as_json: bool) -> None:
    """List the messages that were given up, newest first.

    \b
    Example:
      mlg webhooks dead --json
    """
    _list(home, "dead", limit, as_json)


@webhooks.command("redeliver")
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@home_option
def redeliver(ids: tuple[str, ...], home: Path | None) -> None:
    """Send messages again. The server sends them, so it must be running.

    \b
    Example:
      mlg webhooks redeliver msg_0123456789abcdef0123456789abcdef
    """
    with open_store(home) as store:
        for id in ids:
            delivery = store.redeliver(id, now=datetime.now(UTC))
            click.echo(f"{delivery.id}  {delivery.url}")


def _list(home: Path | None, state: str | None, limit: int, as_json: bool) -> None:
    with open_store(home) as store:
        found = store.list_deliveries(status=state, limit=limit)
    if as_json:
        from server.serializers import serialize_delivery

        for delivery in found:
            click.echo(json.dumps(serialize_delivery(delivery)))
        return
    from cli.tables import local_time, make_table, print_table, printable

    table = make_table("id", "when", "event", "url", "state", "tries", "last error", right=("tries",))
    for delivery in found:
        table.add_row(
            delivery.id,
            local_time(delivery.created_at),
            delivery.event,
            printable(delivery.url),
            _state(delivery),
            str(delivery.attempts),
            printable(delivery.last_error or ""),
        )
    print_table(table)


def _state(delivery: DeliveryRecord) -> str:
    from cli.tables import local_time

    return delivery.status if delivery.next_at is None else f"next try {local_time(delivery.next_at)}"


def _endpoint_json(endpoint: EndpointRecord, *, has_secret: bool) -> dict[str, Any]:
    from store.records import to_text

    return {
        "id": endpoint.id,
        "url": endpoint.url,
        "events": list(endpoint.events),
        "created_at": to_text(endpoint.created_at),
        "disabled_at": None if endpoint.disabled_at is None else to_text(endpoint.disabled_at),
        "disabled_reason": endpoint.disabled_reason,
        **({"secret": endpoint.secret} if has_secret else {}),
    }

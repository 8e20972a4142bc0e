"""The group `mlg webhooks`: addresses to notify when a request or a batch is done, and the messages sent to them.

The server processes send the messages; only `test` sends one itself.
"""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from cli.open_store import open_store
from cli.options import environment, home_option, json_option, with_options
from cli.tables import local_time, make_table, print_json_lines, print_records, print_table, printable
from provider_image.errors import ConfigError
from server.record_json import fields
from server.settings import ServerSettings

if TYPE_CHECKING:
    from store.webhooks import DeliveryRecord, EndpointRecord

list_options = with_options(
    click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="Maximum number."),
    home_option,
    json_option,
)


@click.group()
def webhooks() -> None:
    """Notify other programs when a request or a batch is done.

    A batch is a group of images that a client sent together (/batches in the HTTP API); it is done when all of its
    requests are. It has nothing to do with the command `mlg batch`. A running server sends the messages.

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
    help="Events to send, separated by commas.",
)
@home_option
@json_option
def add_webhook(url: str, events: str, as_json: bool) -> None:
    """Add an address. Prints its id and the secret that signs its messages.

    The receiver uses the secret to verify the signature (https://www.standardwebhooks.com). It is notified of the
    requests and batches of all clients.

    \b
    Example:
      mlg webhooks add https://example.org/hooks/mlg --events batch.done
    """
    from server.webhooks import check_webhook
    from store.webhooks import EVENTS, EndpointRecord, new_secret

    chosen = tuple(dict.fromkeys(event.strip() for event in events.split(",") if event.strip()))
    unknown = sorted(set(chosen) - set(EVENTS))
    if unknown or not chosen:
        raise ConfigError(f"--events {events}: use {' and '.join(EVENTS)}, separated by commas.")
    settings = ServerSettings.from_env(environment())
    check_webhook(url, allows_private=settings.allows_private_webhooks)
    with open_store() as store:
        endpoint = EndpointRecord(
            id=f"we_{secrets.token_hex(6)}", url=url, events=chosen, secret=new_secret(), created_at=datetime.now(UTC)
        )
        store.webhooks.add_endpoint(endpoint)
    if as_json:
        print_json_lines([_endpoint_to_json(endpoint, has_secret=True)])
    else:
        click.echo(f"{endpoint.id}  {endpoint.secret}")


@webhooks.command("list")
@click.option(
    "--show-secret",
    is_flag=True,
    help="Show the secrets too, and the one for addresses given with requests.",
)
@home_option
@json_option
def list_webhooks(show_secret: bool, as_json: bool) -> None:
    """List the addresses, and whether each is active.

    \b
    Example:
      mlg webhooks list
      mlg webhooks list --show-secret
    """
    with open_store() as store:
        endpoints = store.webhooks.list_endpoints()
        shared_secret = store.webhooks.secret(None)
    if as_json:
        print_json_lines(_endpoint_to_json(endpoint, has_secret=show_secret) for endpoint in endpoints)
        if show_secret:
            print_json_lines([{"id": None, "secret": shared_secret}])
        return
    table = make_table("id", "url", "events", "state", *(["secret"] if show_secret else []))
    for endpoint in endpoints:
        state = "on" if endpoint.disabled_at is None else f"off: {endpoint.disabled_reason}"
        secret = [endpoint.secret] if show_secret else []
        table.add_row(endpoint.id, printable(endpoint.url), ", ".join(endpoint.events), state, *secret)
    if show_secret:
        table.add_row("-", "(addresses given with requests)", "", "on", shared_secret)
    print_table(table)


@webhooks.command("remove")
@click.argument("id")
@home_option
def remove_webhook(id: str) -> None:
    """Remove an address and its messages that are not delivered yet.

    \b
    Example:
      mlg webhooks remove we_0123456789ab
    """
    with open_store() as store:
        store.webhooks.remove_endpoint(id)


@webhooks.command("test")
@click.argument("id")
@home_option
def test_webhook(id: str) -> None:
    """Send a test message now. Its type is `webhook.test`; the command reports what the receiver answers.

    \b
    Example:
      mlg webhooks test we_0123456789ab
    """
    from server.errors import DeliveryFailed
    from server.http_client import HttpClient
    from server.webhooks import send
    from store.rows import to_text
    from store.webhooks import UnknownWebhook

    settings = ServerSettings.from_env(environment())
    with open_store() as store:
        endpoint = next((one for one in store.webhooks.list_endpoints() if one.id == id), None)
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
        http_client=HttpClient(allows_private=settings.allows_private_webhooks),
    )
    if not 200 <= status < 300:
        raise DeliveryFailed(f"The receiver answered with status {status}.")
    click.echo(f"The receiver accepted it (status {status}).")


@webhooks.command("deliveries")
@click.option("--state", type=click.Choice(["pending", "delivered", "dead"]), help="Only messages in this state.")
@list_options
def list_deliveries(state: str | None, limit: int, as_json: bool) -> None:
    """List the messages, newest first.

    \b
    Example:
      mlg webhooks deliveries --state pending
    """
    with open_store() as store:
        found = store.webhooks.list_deliveries(status=state, limit=limit)
    if as_json:
        from server.serializers import serialize_delivery

        print_json_lines(map(serialize_delivery, found))
        return
    print_records(
        found,
        {
            "id": "id",
            "when": "created_at",
            "event": "event",
            "url": lambda delivery: printable(delivery.url),
            "state": _state,
            "attempts": "attempts",
            "last error": lambda delivery: printable(delivery.last_error or ""),
        },
        right=("attempts",),
    )


@webhooks.command("dead")
@list_options
@click.pass_context
def list_dead(context: click.Context, limit: int, as_json: bool) -> None:
    """List the messages that could not be delivered, newest first. The server does not send them again by itself.

    \b
    Example:
      mlg webhooks dead --json
    """
    context.invoke(list_deliveries, state="dead", limit=limit, as_json=as_json)


@webhooks.command("redeliver")
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@home_option
def redeliver(ids: tuple[str, ...]) -> None:
    """Queue messages to be sent again. A running server sends them.

    \b
    Example:
      mlg webhooks redeliver msg_0123456789abcdef0123456789abcdef
    """
    with open_store() as store:
        for id in ids:
            delivery = store.webhooks.redeliver(id, now=datetime.now(UTC))
            click.echo(f"{delivery.id}  {delivery.url}")


def _state(delivery: DeliveryRecord) -> str:
    return delivery.status if delivery.next_at is None else f"next attempt {local_time(delivery.next_at)}"


def _endpoint_to_json(endpoint: EndpointRecord, *, has_secret: bool) -> dict[str, Any]:
    secret = " secret" if has_secret else ""
    return fields(endpoint, f"id url events created_at disabled_at disabled_reason{secret}")

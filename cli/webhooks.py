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
    from store.clients.webhooks import DeliveryRecord, EndpointRecord

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
    """Add an address. Prints its id and the secret that signs its messages, which is not shown again.

    The receiver uses the secret to verify the signature (https://www.standardwebhooks.com). It is notified of the
    requests and batches of all clients.

    \b
    Example:
      mlg webhooks add https://example.org/hooks/mlg --events batch.done
    """
    from server.webhooks import check_webhook
    from store.clients.webhooks import EVENTS, EndpointRecord, new_secret

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
        print_json_lines([{**_endpoint_to_json(endpoint), "secret": endpoint.secret}])
    else:
        click.echo(f"{endpoint.id}  {endpoint.secret}")


@webhooks.command("list")
@home_option
@json_option
def list_webhooks(as_json: bool) -> None:
    """List the addresses, and whether each is active.

    \b
    Example:
      mlg webhooks list
    """
    with open_store() as store:
        endpoints = store.webhooks.list_endpoints()
    if as_json:
        print_json_lines(_endpoint_to_json(endpoint) for endpoint in endpoints)
        return
    table = make_table("id", "url", "events", "state")
    for endpoint in endpoints:
        state = "on" if endpoint.disabled_at is None else f"off: {endpoint.disabled_reason}"
        table.add_row(endpoint.id, printable(endpoint.url), ", ".join(endpoint.events), state)
    print_table(table)


@webhooks.command("rotate")
@click.argument("id", required=False, metavar="[ID]")
@home_option
@json_option
def rotate_secret(id: str | None, as_json: bool) -> None:
    """Replace a secret that signs messages, and print the new one. It is not shown again.

    ID is that of an address in `mlg webhooks list`, or the id or name of an API key, whose secret signs messages to the
    addresses that were given with its requests. Without ID it is the secret for requests without a key. All messages
    are signed with the new secret at once, also those that are sent again.

    \b
    Example:
      mlg webhooks rotate we_0123456789ab
      mlg webhooks rotate alice
    """
    from store.clients.keys import UnknownKey

    with open_store() as store:
        keys = [key for key in store.keys.list() if id in (key.id, key.name) and key.revoked_at is None]
        keys.sort(key=lambda key: key.id != id)  # names can be chosen freely
        if id is None or keys:
            secret = store.webhooks.rotate_secret(None, keys[0].id if keys else "")
        elif id.startswith("we_"):
            secret = store.webhooks.rotate_secret(id)
        else:
            raise UnknownKey()
    if as_json:
        print_json_lines([{"id": id, "secret": secret}])
    else:
        click.echo(secret)


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
    from store.clients.webhooks import UnknownWebhook
    from store.rows import to_text

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


def _endpoint_to_json(endpoint: EndpointRecord) -> dict[str, Any]:
    return fields(endpoint, "id url events created_at disabled_at disabled_reason")

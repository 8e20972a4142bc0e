"""The group `mlg requests`: lists, shows, retries and cancels requests."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.open_store import open_store
from cli.options import environment, file_option, home_option, json_option
from cli.tables import make_table, print_json_lines, print_records, print_table
from provider_image.errors import MlgError
from store.settings import HomeSettings

if TYPE_CHECKING:
    from store.requests import RequestRecord

ids_argument = click.argument("ids", nargs=-1, required=True, metavar="ID...")


@click.group()
def requests() -> None:
    """List, show, retry or cancel the requests of a home.

    A request is one image for one model, whether a client sent it alone or in a batch (/batches in the HTTP API).
    These commands use the database of the home and need no running server.

    \b
    Example:
      mlg requests list --status failed
    """


@requests.command("list")
@home_option
@click.option(
    "--status",
    type=click.Choice(["queued", "claimed", "done", "failed", "cancelled"]),
    help="Only requests with this status.",
)
@click.option("--model", metavar="MODEL", help="Only requests for this model.")
@click.option("--before", type=int, metavar="NUMBER", help="Only requests with a lower number: the next page.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="Maximum number.")
@json_option
def list_requests(status: str | None, model: str | None, before: int | None, limit: int, as_json: bool) -> None:
    """List requests, newest first.

    \b
    Example:
      mlg requests list --status failed --limit 20
      mlg requests list --json | jq .req_id
    """
    from provider_image.models.registry import find_row
    from store.states import RequestState

    settings = HomeSettings.from_env(environment())
    with open_store() as store:
        found = store.requests.list(
            state=RequestState(status) if status else None,
            model=find_row(settings.models, model).name if model else None,
            before=before,
            limit=limit,
        )
    if as_json:
        print_json_lines(_to_json(request, settings.models) for request in found)
        return
    print_records(
        found,
        {
            "number": "number",
            "id": "id",
            "status": "state",
            "model": "model",
            "created": "created_at",
            "name": "name",
            "result or reason": _short_result,
        },
    )
    if len(found) == limit:
        click.echo(f"More: mlg requests list --before {found[-1].number}", err=True)


@requests.command("show")
@home_option
@click.argument("id")
@file_option("--files", "Write the answer's files to a folder.", metavar="DIR", file_okay=False)
@json_option
def show(id: str, files: Path | None, as_json: bool) -> None:
    """Show all details of one request.

    \b
    Example:
      mlg requests show 019a3c5e77b2c4f0a1d2e3f4a5b6c7d8
      mlg requests show 019a3c5e77b2c4f0a1d2e3f4a5b6c7d8 --files answer/
    """
    with open_store() as store:
        request = store.requests.get(id)
        if files is not None:
            files.mkdir(parents=True, exist_ok=True)
            for name, file in request.files.items():
                (files / name).write_bytes(store.images.read(file.sha256))
    details = _to_json(request, HomeSettings.from_env(environment()).models)
    if as_json:
        print_json_lines([details])
        return
    table = make_table("", "")
    for name, value in details.items():
        if value is not None:
            table.add_row(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    print_table(table)


@requests.command()
@home_option
@ids_argument
def retry(ids: Sequence[str]) -> None:
    """Queue failed or cancelled requests again. Their attempts are counted from zero.

    \b
    Example:
      mlg requests retry 019a3c5e77b2c4f0a1d2e3f4a5b6c7d8
      mlg requests list --status failed --json | jq -r .req_id | xargs mlg requests retry
    """
    with open_store() as store:
        _change_each(ids, lambda id: store.requests.retry(id, now=datetime.now(UTC)))


@requests.command()
@home_option
@ids_argument
def cancel(ids: Sequence[str]) -> None:
    """Cancel requests that have not been dispatched yet.

    \b
    Example:
      mlg requests cancel 019a3c5e77b2c4f0a1d2e3f4a5b6c7d8
    """
    with open_store() as store:
        _change_each(ids, lambda id: store.requests.cancel(id, now=datetime.now(UTC)))


def _change_each(ids: Sequence[str], change: Callable[[str], RequestRecord]) -> None:
    failed = False
    for id in ids:
        try:
            request = change(id)
        except MlgError as error:
            failed = True
            click.echo(f"mlg: {id}: {error.reason}", err=True)
        else:
            click.echo(f"{request.id}\t{request.state}")
    if failed:
        raise click.exceptions.Exit(1)


def _to_json(request: RequestRecord, models: Path) -> dict[str, Any]:
    from server.serializers import parse_read_params, serialize_request

    shown = serialize_request(request, parse_read_params(request.service, {}), None, models=models)
    return {"number": request.number, **shown}


def _short_result(request: RequestRecord) -> str | None:
    if request.output and request.service == "classification":
        return f"{request.output[0][1]} {request.output[0][2]:.3f}"
    return json.dumps(request.output, ensure_ascii=False)[:60] if request.output else request.reason

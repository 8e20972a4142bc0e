"""The group `mlg requests`: lists, shows, retries, cancels and does again requests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.open_store import open_store
from cli.options import environment, file_option, home_option, json_option
from cli.tables import make_table, print_json_lines, print_records, print_table
from provider_image.errors import MlgError
from store.clients.usage import ClientKind
from store.settings import HomeSettings

if TYPE_CHECKING:
    from server.intake.redo import RedoEstimate
    from store.requests import RequestRecord

ids_argument = click.argument("ids", nargs=-1, required=True, metavar="ID...")


@click.group()
def requests() -> None:
    """List, show, retry, cancel or do again the requests of a home.

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
@click.option("--model", required=True, metavar="MODEL", help="The model whose answered requests are done again.")
@click.option(
    "--with",
    "other",
    required=True,
    metavar="MODEL",
    help="The model that answers them. The same one does those again that another version of it answered.",
)
@click.option("--label", "labels", multiple=True, metavar="NAME:VALUE", help="Only those with this label. Repeatable.")
@click.option("--batch", metavar="ID", help="Only those of this batch.")
@click.option("--since", metavar="TIME", help="Only those accepted at this time or later, 2026-12-01T08:00:00Z.")
@click.option("--until", metavar="TIME", help="Only those accepted before this time.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Add at most so many requests.")
@click.option("--name", metavar="TEXT", help="Name of the batches.")
@click.option("--dry-run", is_flag=True, help="Only count them, and estimate time and cost.")
@json_option
def redo(
    model: str,
    other: str,
    labels: Sequence[str],
    batch: str | None,
    since: str | None,
    until: str | None,
    limit: int | None,
    name: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Do answered requests again with another model.

    For each answered request whose image is still stored, a request of the other model is queued for the same image,
    with the same owner and labels. No image is copied. The earlier answers stay, and name the later ones when those are
    there. The new requests are in batches of at most 10,000, one for each API key.

    What is done again already is left out. If this command was interrupted, or more was answered since, run it again.

    \b
    Example:
      mlg requests redo --model efficientnet_lite0 --with resnet50 --dry-run
      mlg requests redo --model efficientnet_lite0 --with resnet50 --label album:2026
    """
    from server.errors import BacklogFull
    from server.intake.redo import MAX_REQUESTS, Redo, default_name, known_model
    from server.intake.request_options import parse_labels, parse_timestamp
    from server.intake.uploads import clean_name
    from server.settings import ServerSettings
    from store.search import Query

    settings = ServerSettings.from_env(environment())
    query = Query(
        model=known_model(settings.models, model),
        batch_id=batch,
        labels=tuple(parse_labels(labels).items()),
        since=None if since is None else parse_timestamp("--since", since),
        until=None if until is None else parse_timestamp("--until", until),
    )
    totals = dict.fromkeys(("found", "added", "existing", "without_inputs", "unsuitable"), 0)
    before: int | None = None
    is_full = False
    with open_store() as store:
        redo = Redo(settings, store, lambda: datetime.now(UTC))
        target = redo.find_target(other)
        name = clean_name(name) or default_name(query.model, target)
        while True:
            room = MAX_REQUESTS if limit is None else min(MAX_REQUESTS, limit - totals["found"])
            if not dry_run:
                waiting = sum(one.waiting_sent for one in store.requests.backlog())
                is_full = waiting >= settings.max_backlog
                room = min(room, settings.max_backlog - waiting)
            if room <= 0:
                break
            plan = redo.plan(query, target, before=before, limit=room)
            before = plan.next_before
            totals["found"] += len(plan.new)
            for count in ("existing", "without_inputs", "unsuitable"):
                totals[count] += getattr(plan, count)
            if not dry_run:
                report = redo.add(
                    plan, target, name=name, webhook=None, charged_key_id=None, client=ClientKind.OWN_CLIENT
                )
                totals["added"] += report.added
                for added in report.batches:
                    shown = {"batch_id": added.id, "accepted": added.total, "key_id": added.key_id}
                    if as_json:
                        print_json_lines([shown])
                    else:
                        click.echo(f"batch {added.id}: {added.total} requests")
                if report.stopped_by is not None:
                    click.echo(f"mlg: {report.stopped_by.reason}", err=True)
            if before is None:
                break
        estimate = redo.estimate(target, totals["found"]) if dry_run else None
    _print_redo(totals, estimate, target.row.name, as_json=as_json)
    if is_full:
        raise BacklogFull("So many requests wait already. Run this command again later for the rest.")


def _print_redo(totals: Mapping[str, int], estimate: RedoEstimate | None, model: str, *, as_json: bool) -> None:
    from server.record_json import to_json
    from server.status.eta import format_duration

    if as_json:
        more = {} if estimate is None else {"eta_seconds": estimate.seconds, "cost": to_json(estimate.cost)}
        print_json_lines([{**totals, **more}])
        return
    if estimate is None:
        click.echo(f"{totals['added']} requests are queued for {model}.")
    else:
        seconds, cost = estimate.seconds, estimate.cost
        click.echo(f"{totals['found']} requests would be queued for {model}.")
        click.echo(f"Estimated time: {'unknown' if seconds is None else format_duration(seconds)}")
        click.echo(f"Estimated cost: {'unknown' if cost is None else f'{cost} GLM on rented computers'}")
    for count, text in (
        ("existing", "are done again already"),
        ("without_inputs", "are left out: their image was deleted"),
        ("unsuitable", f"are left out: {model} takes another kind of input"),
    ):
        if totals[count]:
            click.echo(f"{totals[count]} {text}.")


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
    from server.serializers import Thresholds, parse_read_params, serialize_request

    shown = serialize_request(request, parse_read_params(request.service, {}), None, thresholds=Thresholds(models))
    return {"number": request.number, **shown}


def _short_result(request: RequestRecord) -> str | None:
    if request.output and request.service == "classification":
        return f"{request.output[0][1]} {request.output[0][2]:.3f}"
    return json.dumps(request.output, ensure_ascii=False)[:60] if request.output else request.reason

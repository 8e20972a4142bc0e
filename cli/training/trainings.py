"""The group `mlg trainings`: lists, shows and cancels the trainings of a home."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from cli.open_store import open_store
from cli.options import home_option, json_option
from cli.tables import print_json_lines, print_records
from cli.training.shown import headline, print_figures

if TYPE_CHECKING:
    from store.trainings.records import TrainingRecord


@click.group()
def trainings() -> None:
    """List, show or cancel the trainings of a home.

    These commands use the database of the home and need no running server.

    \b
    Example:
      mlg trainings list
    """


@trainings.command("list")
@home_option
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="Maximum number.")
@json_option
def list_trainings(limit: int, as_json: bool) -> None:
    """List trainings, newest first.

    \b
    Example:
      mlg trainings list --json | jq .state
    """
    with open_store() as store:
        found = store.trainings.list(limit=limit)
    if as_json:
        print_json_lines(map(_to_json, found))
        return
    print_records(
        found,
        {
            "id": "id",
            "name": "name",
            "version": "version",
            "state": "state",
            "created": "created_at",
            "figures or reason": lambda one: one.reason or (headline(one.figures) if one.figures else ""),
        },
    )


@trainings.command("show")
@home_option
@click.argument("id")
@json_option
def show_training(id: str, as_json: bool) -> None:
    """Show the progress and the figures of a training.

    \b
    Example:
      mlg trainings show 019a3c5e77b2c4f0a1d2e3f4a5b6c7d8
    """
    with open_store() as store:
        training = store.trainings.get(id)
    if as_json:
        print_json_lines([_to_json(training)])
        return
    version = "" if training.version is None else f", version {training.version}"
    what = headline(training.figures) if training.figures else training.reason or training.step or ""
    click.echo(f"{training.name}{version}: {training.state}{', ' * bool(what)}{what}")
    print_figures(training.figures)


@trainings.command("cancel")
@home_option
@click.argument("id")
def cancel_training(id: str) -> None:
    """Cancel a training that has not ended, and the requests for its features that wait.

    \b
    Example:
      mlg trainings cancel 019a3c5e77b2c4f0a1d2e3f4a5b6c7d8
    """
    with open_store() as store:
        now = datetime.now(UTC)
        training = store.trainings.cancel(id, now=now)
        if training.batch_id is not None:
            store.batches.cancel(training.batch_id, now=now)
    click.echo(f"{id} is cancelled")


def _to_json(training: TrainingRecord) -> dict[str, Any]:
    from server.record_json import fields, given_fields

    return {
        "training_id": training.id,
        "kind": str(training.kind),
        "state": str(training.state),
        **fields(training, "name backbone target seed examples created_at"),
        **given_fields(training, "key_id batch_id options step started_at ended_at version digest figures reason code"),
    }

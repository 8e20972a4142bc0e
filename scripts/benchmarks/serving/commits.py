"""How long each kind of write holds the write lock of a store with a million requests."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import click

from scripts.benchmarks.serving.retention import fill
from scripts.benchmarks.support import stored_requests
from scripts.benchmarks.support.measuring import print_table, timed, work_folder
from store import new_id
from store.batches import BatchRecord
from store.clients.webhooks import DeliveryRecord, DeliveryResult
from store.database import Database
from store.requests import NewRequest
from store.store import Store

#: Items of a batch.
BATCH_ITEMS = 1000
#: Labels of each item: as many as a client may give.
LABELS = {f"label number {n}": f"the value of label {n}" for n in range(16)}

#: Milliseconds for which the lock was held, and of processor time meanwhile.
Held = tuple[float, float]


@contextmanager
def measured() -> Iterator[list[Held]]:
    """Record each time that this process has the write lock, until the block ends."""
    found: list[Held] = []
    begin, commit, clean = Database._begin, Database._commit, Database._delete_unneeded
    since: list[float] = []

    def note() -> None:
        if since:
            wall, processor = since
            found.append((1000 * (time.monotonic() - wall), 1000 * (time.thread_time() - processor)))
            since.clear()

    def begin_and_start(*arguments: Any) -> None:
        note()  # the lock of a file that was deleted
        begin(*arguments)
        since[:] = time.monotonic(), time.thread_time()

    def note_and_clean(*arguments: Any) -> None:
        note()
        clean(*arguments)

    def commit_and_note(*arguments: Any) -> None:
        commit(*arguments)
        note()

    with (
        mock.patch.object(Database, "_begin", begin_and_start),
        mock.patch.object(Database, "_commit", commit_and_note),
        mock.patch.object(Database, "_delete_unneeded", note_and_clean),
    ):
        yield found


def add_batch(store: Store, labels: dict[str, str]) -> str:
    """Add a batch of small files. :return: its id."""
    id, now, model = new_id(), datetime.now(UTC), stored_requests.MODELS[0]
    batch = BatchRecord(id=id, service="classification", model=model, created_at=now)
    items = [
        (
            NewRequest(id=new_id(), service="classification", model=model, created_at=now, batch_id=id, labels=labels),
            store.images.stage(f"{id} {number}".encode()),
        )
        for number in range(BATCH_ITEMS)
    ]
    store.batches.add(batch, items, [])
    return id


def steps(store: Store) -> Iterator[tuple[str, Callable[[], object]]]:
    """Return what is measured, in an order in which each finds what it needs."""
    ids: list[str] = []

    def now() -> datetime:
        return datetime.now(UTC)

    def claim() -> None:
        for _ in range(20):
            store.requests.claim(
                models=stored_requests.MODELS,
                limit=256,
                now=now(),
                lease_ends_at=now() + timedelta(seconds=1),
                oldest_before=None,
            )

    def send_webhooks() -> None:
        claimed: list[DeliveryRecord] = []
        for _ in range(60):
            due = store.webhooks.list_due(now=now(), limit=8, per_owner=8)
            results = [DeliveryResult(delivery=each, ended_at=now(), status=204) for each in claimed]
            claimed = store.webhooks.claim_deliveries(
                {each.id: "{}" for each in due},
                now=now(),
                lease_ends_at=now() + timedelta(seconds=30),
                results=results,
            )

    def purge() -> None:
        day = now() - timedelta(hours=24)
        store.retention.purge(
            images_before=day + timedelta(hours=6), results_before=day + timedelta(hours=1), now=now()
        )

    yield f"add a batch of {BATCH_ITEMS}, {len(LABELS)} labels each", lambda: ids.append(add_batch(store, LABELS))
    yield f"add a batch of {BATCH_ITEMS}", lambda: ids.append(add_batch(store, {}))
    yield "cancel both", lambda: [store.batches.cancel(id, now=now()) for id in ids]
    yield "delete both", lambda: [store.batches.remove(id) for id in ids]
    yield "claim 256 requests", claim
    later = timedelta(hours=1)
    yield "release requests whose leases have ended", lambda: store.requests.release_expired(now() + later)
    yield "claim 8 webhooks and record 8", send_webhooks
    yield "delete the images of a part of the day, and its oldest requests", purge


@click.command()
@click.option("--requests", "count", default=1_000_000, show_default=True, help="Number of requests.")
@click.option("--webhooks", default=200_000, show_default=True, help="Number of webhooks that are due.")
@click.option("--purged", default=200_000, show_default=True, help="Requests whose images are deleted already.")
def main(count: int, webhooks: int, purged: int) -> None:
    """Measure how long commits hold the write lock. Example: scripts/bench commits --requests 100000"""
    rows = []
    with work_folder() as folder:
        home = Path(folder) / "home"
        filled = timed(lambda: fill(home, count, webhooks=webhooks, purged=purged, url="http://127.0.0.1:9/"))
        click.echo(f"{count} requests put in within {filled:.0f} s")
        with stored_requests.opened(home) as store:
            store.database.execute("UPDATE webhook_deliveries SET next_at = created_at WHERE next_at IS NOT NULL")
            for name, work in steps(store):
                with measured() as found:
                    seconds = timed(work)
                wall, processor = zip(*found, strict=True)
                last = sorted(wall)[99 * len(wall) // 100]
                figures = (statistics.median(wall), last, max(wall), statistics.median(processor), max(processor))
                rows.append([name, str(len(found)), f"{seconds:.1f}", *(f"{figure:.1f}" for figure in figures)])
    print_table(
        f"{count} requests, {webhooks} webhooks due: milliseconds for which the write lock is held",
        ("write", "commits", "seconds", "median", "99 % within", "longest", "processor, median", "most"),
        rows,
    )

"""Retention: deletes images and requests that are old enough, and files that killed processes left.

A request that gave a collection a vector is kept, with its image, for as long as it is a member. Only a retention time
of its own, which its client chose, ends that.

The batcher calls `purge` regularly (`batcher/scheduler.py`). It works in small commits and leaves the write lock to
others for three quarters of the time, so that uploads never wait long for it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from datetime import datetime, timedelta

from store.batches import Batches
from store.changes import Changes
from store.clients.idempotency import Idempotency
from store.clients.usage import Usage
from store.clients.webhooks import Webhooks
from store.collections.collections import Collections
from store.database import Database, StepFunction, Transaction
from store.files import digests_of_inputs
from store.images import ImageStore, is_needed
from store.migrations import KEEP_UNTIL_SQL
from store.rentals.providers import KEEP_UNUSED, Providers
from store.requests import ROWS_PER_COMMIT, delete_requests
from store.rows import to_text
from store.trainings.trainings import Trainings
from store.transition import correct_open

#: How long a listener may be disconnected and still receive only what it missed.
KEEP_CHANGES = timedelta(days=1)
#: How long delivered and dead webhook deliveries are kept, to be shown and sent again.
KEEP_DELIVERIES = timedelta(days=7)

# Some requests of each kind, as conditions.
_OLD = """
    number IN (SELECT number FROM requests INDEXED BY requests_purgeable
               WHERE finished_at < :before AND finished_at IS NOT NULL AND collections = 0 AND parent IS NULL
               LIMIT :rows_per_commit)
"""

# Requests with a retention time of their own, which is shorter than the operator's.
_OLD_FOR_OWNER = f"""
    number IN (SELECT number FROM requests
               WHERE keep_seconds IS NOT NULL AND finished_at IS NOT NULL AND {KEEP_UNTIL_SQL} <= :before
               LIMIT :rows_per_commit)
"""

_DELETE_IMAGES = """
    UPDATE requests SET image_deleted_at = :now
    WHERE number IN (SELECT number FROM requests INDEXED BY requests_finished_with_image
                     WHERE finished_at < :before AND image_deleted_at IS NULL AND finished_at IS NOT NULL
                       AND collections = 0 LIMIT :rows_per_commit)
    RETURNING number, image_sha256, inputs
"""

_FORGET_INPUTS = "DELETE FROM request_files WHERE number = ? AND is_input"

_BATCHES_TO_PURGE = f"""
    SELECT id FROM batches
    WHERE (created_at < :before OR {KEEP_UNTIL_SQL.replace("finished_at", "created_at")} <= :now)
      AND arrival = 0 AND NOT EXISTS (SELECT 1 FROM requests WHERE batch_id = batches.id)
"""


@dataclass(frozen=True, kw_only=True)
class PurgeReport:
    """How much a purge deleted."""

    #: Images whose retention time is over.
    images: int = 0
    #: Requests whose retention time is over.
    results: int = 0
    #: Files that killed processes left.
    leftovers: int = 0


class Retention:
    """Deleting what is old: changes, webhook deliveries, kept responses and unused providers included."""

    def __init__(
        self,
        database: Database,
        images: ImageStore,
        batches: Batches,
        changes: Changes,
        webhooks: Webhooks,
        idempotency: Idempotency,
        providers: Providers,
        collections: Collections,
        trainings: Trainings,
        usage: Usage,
    ) -> None:
        self._database = database
        self._images = images
        self._batches = batches
        self._changes = changes
        self._webhooks = webhooks
        self._idempotency = idempotency
        self._providers = providers
        self._collections = collections
        self._trainings = trainings
        self._usage = usage
        self._is_stopping = threading.Event()

    def stop(self) -> None:
        """End a purge that is in progress soon. The next one goes on."""
        self._is_stopping.set()
        self._database.end_background()

    def purge(
        self, *, images_before: datetime, results_before: datetime, usage_before: datetime | None = None, now: datetime
    ) -> PurgeReport:
        """Delete what is old, and files that killed processes left. Requests that have not ended are never touched.

        :param images_before: images of requests that ended before this time are deleted.
        :param results_before: requests that ended before this time are deleted.
        :param usage_before: the usage of the days before this time is deleted; None keeps all.
        """
        self._batches.finish_interrupted(now=now)
        correct_open(self._database)
        self._collections.finish_removals(is_stopping=self._is_stopping.is_set)
        results = self._purge_requests(_OLD, results_before, keeps_members=True)
        results += self._purge_requests(_OLD_FOR_OWNER, now)
        images = self._purge_images(images_before, now)
        self._purge_batches(results_before, now)
        self._changes.purge(before=now - KEEP_CHANGES)
        self._webhooks.purge(before=now - KEEP_DELIVERIES)
        self._idempotency.purge(now=now)
        self._providers.purge(before=now - KEEP_UNUSED)
        if usage_before is not None:
            self._usage.purge(before=usage_before)
        leftovers = self._trainings.purge(before=results_before) + self._sweep(now)
        if not self._is_stopping.is_set():
            self._collections.update_caches()
        return PurgeReport(images=images, results=results, leftovers=leftovers)

    def _purge_requests(self, which: str, before: datetime, *, keeps_members: bool = False) -> int:
        return self._in_steps(
            lambda transaction, rows: len(
                delete_requests(
                    transaction,
                    which,
                    {"before": to_text(before), "rows_per_commit": rows},
                    keeps_members=keeps_members,
                )
            )
        )

    def _purge_images(self, before: datetime, now: datetime) -> int:
        values = {"before": to_text(before), "now": to_text(now)}

        def write(transaction: Transaction, rows: int) -> int:
            found = transaction.execute(_DELETE_IMAGES, {**values, "rows_per_commit": rows}).fetchall()
            transaction.execute_many(_FORGET_INPUTS, [(row["number"],) for row in found])
            transaction.delete_files(set().union(*map(digests_of_inputs, found)))
            return len(found)

        return self._in_steps(write)

    def _in_steps(self, write: StepFunction) -> int:
        return self._database.write_in_steps(write, rows_per_commit=ROWS_PER_COMMIT, is_background=True)

    def _purge_batches(self, before: datetime, now: datetime) -> None:
        """Delete batches that have no requests left."""
        for (id,) in self._database.rows(_BATCHES_TO_PURGE, {"before": to_text(before), "now": to_text(now)}):
            self._batches.delete_empty(id)

    def _sweep(self, now: datetime) -> int:
        """Delete files that killed processes left: staged ones, and those that no request needs."""
        swept = self._images.sweep_staging(now=now.timestamp())
        with self._database.read() as connection:
            unneeded = [sha256 for sha256 in self._images.list_digests() if not is_needed(connection, sha256)]
        if unneeded:
            # Checked again under the lock: a row may have been added since.
            self._database.write(lambda transaction: transaction.delete_files(unneeded))
        return swept + sum(not self._images.path(sha256).exists() for sha256 in unneeded)

"""Retention on SQLite: deletes pictures and results that are old enough, and files that killed processes left.

A base of `SqliteStore`, which gives it the writer, the readers and the pictures. It works in small commits, so that
uploads never wait long for the lock.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from store.database import ReaderPool, Transaction, Writer
from store.images import ImageStore
from store.migrations import KEEP_UNTIL_SQL
from store.records import PurgeReport, to_text
from store.sqlite_changes import delete_changes
from store.sqlite_webhooks import delete_deliveries

#: How long a listener may have been away and is still told only what it missed.
KEEP_CHANGES = timedelta(days=1)
#: How long one may look at webhook messages that are delivered or dead, and have them sent again.
KEEP_DELIVERIES = timedelta(days=7)
#: Rows that one commit touches.
ROWS_PER_COMMIT = 500

_IMAGES_TO_PURGE = """
    SELECT number, image_sha256 FROM requests
    WHERE finished_at < :before AND image_deleted_at IS NULL AND finished_at IS NOT NULL LIMIT :step
"""

# What its owner wanted kept for a shorter time than the operator keeps it.
_EXPIRED_FOR_OWNER = f"""
    SELECT number, image_sha256 FROM requests
    WHERE keep_seconds IS NOT NULL AND finished_at IS NOT NULL AND {KEEP_UNTIL_SQL} <= :before LIMIT :step
"""

_BATCHES_TO_PURGE = f"""
    SELECT id FROM batches
    WHERE (created_at < :before OR {KEEP_UNTIL_SQL.replace("finished_at", "created_at")} <= :now)
      AND NOT EXISTS (SELECT 1 FROM requests WHERE batch_id = batches.id) LIMIT :step
"""

_RESULTS_TO_PURGE = """
    SELECT number, image_sha256 FROM requests WHERE finished_at < :before AND finished_at IS NOT NULL LIMIT :step
"""

#: A file whose row is not there was never acknowledged.
IS_REFERENCED = "SELECT EXISTS (SELECT 1 FROM requests WHERE image_sha256 = ?)"

# A picture goes only when no row that still needs it is left.
_IS_NEEDED = """
    SELECT EXISTS (SELECT 1 FROM requests WHERE image_sha256 = ? AND image_deleted_at IS NULL)
"""


class SqliteRetention:
    """What `purge` does."""

    images: ImageStore
    _writer: Writer
    _readers: ReaderPool

    def purge(self, *, images_before: datetime, results_before: datetime, now: datetime) -> PurgeReport:
        """See Store.purge."""
        results = self._purge_rows(_RESULTS_TO_PURGE, "DELETE FROM requests WHERE number = ?", results_before)
        results += self._purge_rows(_EXPIRED_FOR_OWNER, "DELETE FROM requests WHERE number = ?", now)
        images = self._purge_rows(
            _IMAGES_TO_PURGE,
            f"UPDATE requests SET image_deleted_at = '{to_text(now)}' WHERE number = ?",
            images_before,
        )
        self._purge_batches(results_before, now)
        delete_changes(self._writer, before=now - KEEP_CHANGES)
        delete_deliveries(self._writer, before=now - KEEP_DELIVERIES)
        self._writer.run(
            lambda transaction: (
                transaction.execute("DELETE FROM idempotency WHERE expires_at <= ?", (to_text(now),)).rowcount
            )
        )
        return PurgeReport(images=images, results=results, leftovers=self._sweep(now))

    def _purge_rows(self, find: str, change: str, before: datetime) -> int:
        """Change the rows that are found, step by step, and delete pictures that nobody needs any more."""

        def write(transaction: Transaction) -> int:
            found = transaction.execute(find, {"before": to_text(before), "step": ROWS_PER_COMMIT}).fetchall()
            for number, _ in found:
                transaction.execute(change, (number,))
            for sha256 in {row["image_sha256"] for row in found}:
                # The file goes before the commit: a crash in between leaves a finished request without its
                # picture, which retention wanted anyway, never a waiting one.
                if not transaction.execute(_IS_NEEDED, (sha256,)).fetchone()[0]:
                    self.images.delete(sha256)
            return len(found)

        total = 0
        while True:
            step: int = self._writer.run(write)
            total += step
            if step < ROWS_PER_COMMIT:
                return total

    def _purge_batches(self, before: datetime, now: datetime) -> None:
        """Delete batches of which no request is left."""
        values = {"before": to_text(before), "now": to_text(now), "step": ROWS_PER_COMMIT}

        def write(transaction: Transaction) -> int:
            found = transaction.execute(_BATCHES_TO_PURGE, values).fetchall()
            for (id,) in found:
                transaction.execute("DELETE FROM batch_refusals WHERE batch_id = ?", (id,))
                transaction.execute("DELETE FROM batches WHERE id = ?", (id,))
            return len(found)

        while self._writer.run(write) == ROWS_PER_COMMIT:
            continue

    def _sweep(self, now: datetime) -> int:
        """Delete files that a killed process left: temporary ones, and pictures whose row was never committed."""
        swept = self.images.sweep_staging(now=now.timestamp())
        with self._readers.connection() as connection:
            candidates = [
                sha256
                for sha256 in self.images.list_digests()
                if not connection.execute(IS_REFERENCED, (sha256,)).fetchone()[0]
            ]

        def write(transaction: Transaction) -> int:
            # Asked again under the lock: a row may have come since.
            return sum(
                self.images.delete(sha256)
                for sha256 in candidates
                if not transaction.execute(IS_REFERENCED, (sha256,)).fetchone()[0]
            )

        return swept + int(self._writer.run(write)) if candidates else swept

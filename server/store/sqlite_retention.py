"""Retention on SQLite: deletes pictures and results that are old enough, and files that killed processes left.

A base of `SqliteStore`, which gives it the writer, the readers and the pictures. It works in small commits, so that
uploads never wait long for the lock.
"""

from __future__ import annotations

from datetime import datetime

from server.store.blobs import Blobs
from server.store.connections import Readers, Transaction, Writer
from server.store.records import Purged, to_text

#: Rows that one commit touches.
PURGE_STEP = 500

_PICTURES_TO_PURGE = """
    SELECT number, image_sha256 FROM requests
    WHERE finished_at < :before AND image_deleted_at IS NULL AND finished_at IS NOT NULL LIMIT :step
"""

_RESULTS_TO_PURGE = """
    SELECT number, image_sha256 FROM requests WHERE finished_at < :before AND finished_at IS NOT NULL LIMIT :step
"""

#: A file whose row is not there was never acknowledged.
IS_REFERRED_TO = "SELECT EXISTS (SELECT 1 FROM requests WHERE image_sha256 = ?)"

# A picture goes only when no row that still needs it is left.
_IS_NEEDED = """
    SELECT EXISTS (SELECT 1 FROM requests WHERE image_sha256 = ? AND image_deleted_at IS NULL)
"""


class SqliteRetention:
    """What `purge` does."""

    blobs: Blobs
    _writer: Writer
    _readers: Readers

    def purge(self, *, pictures_before: datetime, results_before: datetime, now: datetime) -> Purged:
        """See Store.purge."""
        results = self._purge_rows(_RESULTS_TO_PURGE, "DELETE FROM requests WHERE number = ?", results_before)
        pictures = self._purge_rows(
            _PICTURES_TO_PURGE,
            f"UPDATE requests SET image_deleted_at = '{to_text(now)}' WHERE number = ?",
            pictures_before,
        )
        return Purged(pictures=pictures, results=results, leftovers=self._sweep(now))

    def _purge_rows(self, find: str, change: str, before: datetime) -> int:
        """Change the rows that are found, step by step, and delete pictures that nobody needs any more."""

        def write(transaction: Transaction) -> int:
            found = transaction.execute(find, {"before": to_text(before), "step": PURGE_STEP}).fetchall()
            for number, _ in found:
                transaction.execute(change, (number,))
            for sha256 in {row["image_sha256"] for row in found}:
                # The file goes before the commit: a crash in between leaves a finished request without its
                # picture, which retention wanted anyway, never a waiting one.
                if not transaction.execute(_IS_NEEDED, (sha256,)).fetchone()[0]:
                    self.blobs.delete(sha256)
            return len(found)

        total = 0
        while True:
            step: int = self._writer.run(write)
            total += step
            if step < PURGE_STEP:
                return total

    def _sweep(self, now: datetime) -> int:
        """Delete files that a killed process left: temporary ones, and pictures whose row was never committed."""
        swept = self.blobs.sweep_staging(now=now.timestamp())
        with self._readers.lend() as connection:
            suspects = [
                sha256
                for sha256 in self.blobs.names()
                if not connection.execute(IS_REFERRED_TO, (sha256,)).fetchone()[0]
            ]

        def write(transaction: Transaction) -> int:
            # Asked again under the lock: a row may have come since.
            return sum(
                self.blobs.delete(sha256)
                for sha256 in suspects
                if not transaction.execute(IS_REFERRED_TO, (sha256,)).fetchone()[0]
            )

        return swept + int(self._writer.run(write)) if suspects else swept

"""Progress: what workers report of requests under way, the latest of each request.

The batcher records it; the server reads it, for events and in the JSON of a request. A report belongs to a claim: one
under an older claim is dropped, and `transition` deletes the row when the claim ends, however it ends. So there are
never more rows than claims, and nothing is left of a worker or batcher that was killed.
"""

from __future__ import annotations

import builtins
import functools
import json
import sqlite3
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from store.database import Database, Transaction
from store.rows import from_row

#: Previews of one commit; one may be larger. Uploads wait for it.
BYTES_PER_COMMIT = 256 * 1024

# A new number each time, so that readers find what is new.
_RECORD = """
    INSERT OR REPLACE INTO progress (number, fraction, previews, preview)
    SELECT requests.number, :fraction, coalesce(previews, 0) + (:preview IS NOT NULL), coalesce(:preview, preview)
    FROM requests LEFT JOIN progress ON progress.number = requests.number
    WHERE requests.number = :number AND token = :token AND state = 'claimed'
"""

_SELECT = """
    SELECT seq, progress.number, requests.id, batch_id, fraction, previews
    FROM progress JOIN requests ON requests.number = progress.number
"""

_LATEST = "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'progress'), 0)"


@dataclass(frozen=True, kw_only=True)
class NewProgress:
    """A report that is about to be recorded."""

    #: Number and fencing token of the claim.
    number: int
    token: int
    #: The part that is done, 0 to 1.
    fraction: float
    #: A JPEG of what the answer looks like now; None keeps the last one.
    preview: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class ProgressRecord:
    """The latest report of a request."""

    #: Counts up with every report of any request.
    seq: int
    #: Number, id and batch of the request.
    number: int
    id: str
    batch_id: str | None
    #: The part that is done, 0 to 1.
    fraction: float
    #: How many previews were reported; the last one is kept.
    previews: int


def _write(rows: Sequence[Any], transaction: Transaction) -> None:
    transaction.execute_many(_RECORD, rows)


class Progress:
    """The table `progress`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record(self, reports: Sequence[NewProgress]) -> None:
        """Record reports in few commits; those of claims that have ended are dropped. :raises StoreError:"""
        parts: builtins.list[builtins.list[dict[str, Any]]] = [[]]
        size_bytes = 0
        for report in reports:
            size_bytes += len(report.preview or b"")
            if size_bytes > BYTES_PER_COMMIT and parts[-1]:
                parts.append([])
                size_bytes = len(report.preview or b"")
            parts[-1].append(vars(report))
        for rows in parts:
            self._database.write(functools.partial(_write, rows))

    def latest(self) -> int:
        """Return the number of the last report; 0 before the first."""
        return int(self._database.row(_LATEST)[0])

    def list(self, after: int) -> builtins.list[ProgressRecord]:
        """List the reports after a number, in order."""
        return self._database.records(ProgressRecord, f"{_SELECT} WHERE seq > ? ORDER BY seq", (after,))

    def preview(self, number: int) -> bytes | None:
        """Read the latest preview of a request; None if there is none, or the request is not under way."""
        row = self._database.row("SELECT preview FROM progress WHERE number = ?", (number,))
        return None if row is None else row[0]


def read_progress(connection: sqlite3.Connection, numbers: Collection[int]) -> Mapping[int, ProgressRecord]:
    """Read the latest reports of some requests, by number."""
    if not numbers:
        return {}
    sql = f"{_SELECT} WHERE progress.number IN (SELECT value FROM json_each(?))"
    rows = connection.execute(sql, (json.dumps(list(numbers)),)).fetchall()
    return {row["number"]: from_row(ProgressRecord, row) for row in rows}


def forget_progress(transaction: Transaction, ended: Sequence[Any]) -> None:
    """Delete the reports of claims that have ended. :param ended: rows of their requests."""
    transaction.execute_many("DELETE FROM progress WHERE number = ?", [(row["number"],) for row in ended])

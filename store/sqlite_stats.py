"""Figures for operators on SQLite, from the indexes of the requests and chunks and from the table `totals`.

A base of `SqliteStore`, which gives it the readers. The table `totals` is kept by triggers (see `m008_controls`). Every
statement here reads an index, or few rows.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from store.chunks import ChunkRecord
from store.database import ReaderPool
from store.records import from_text, to_text
from store.sqlite_chunks import chunk_from_row
from store.stats import AnsweredRequest, FailureRecord, MinuteStats, OutcomeTotal

# SQLite's own memory of AUTOINCREMENT: numbers are given without gaps, and never again.
_ACCEPTED = "SELECT seq FROM sqlite_sequence WHERE name = 'requests'"

_TOTALS = "SELECT model, outcome, code, up_to, count, seconds FROM totals ORDER BY model, outcome, code, up_to"

_MINUTES = """
    SELECT substr(finished_at, 1, 16) AS minute, model, count(*) AS chunks, sum(answers) AS answered,
           coalesce(sum(done), 0) AS images, coalesce(sum(failed), 0) AS failed, coalesce(sum(seconds), 0.0) AS seconds
    FROM chunks WHERE finished_at >= ? GROUP BY 1, 2 ORDER BY 1, 2
"""

_AT_OR_AFTER = "SELECT number, created_at FROM requests WHERE number >= ? ORDER BY number LIMIT 1"

# The inner limit bounds the work when most of the latest requests are not of the kind that is wanted.
_ANSWERED = """
    SELECT model, image_bytes, created_at, claimed_at, finished_at, seconds FROM (
        SELECT * FROM requests WHERE finished_at IS NOT NULL ORDER BY finished_at DESC LIMIT 2 * :limit
    ) WHERE state = 'done' AND NOT is_cached AND claimed_at IS NOT NULL LIMIT :limit
"""

_FAILURES = """
    SELECT id, model, coalesce(code, 'unknown') AS code, reason, provider, finished_at FROM requests
    WHERE state = 'failed' ORDER BY number DESC LIMIT ?
"""

_FAILED_CHUNKS = """
    SELECT id, model, code, coalesce(reason, '') AS reason, provider, finished_at FROM chunks
    WHERE code IS NOT NULL AND finished_at IS NOT NULL ORDER BY finished_at DESC LIMIT ?
"""

_UNFINISHED_CHUNKS = "SELECT * FROM chunks WHERE finished_at IS NULL ORDER BY dispatched_at DESC LIMIT ?"


class SqliteStats:
    """What operators see."""

    _readers: ReaderPool

    def count_accepted(self) -> int:
        """See Figures.count_accepted."""
        with self._readers.connection() as connection:
            row = connection.execute(_ACCEPTED).fetchone()
        return 0 if row is None else int(row[0])

    def list_totals(self) -> list[OutcomeTotal]:
        """See Figures.list_totals."""
        return [OutcomeTotal(**dict(row)) for row in self._rows(_TOTALS)]

    def list_minute_stats(self, since: datetime) -> list[MinuteStats]:
        """See Figures.list_minutes."""
        return [MinuteStats(**dict(row)) for row in self._rows(_MINUTES, to_text(since))]

    def count_accepted_before(self, times: Sequence[datetime]) -> list[int]:
        """See Figures.arrivals_before."""
        found = []
        with self._readers.connection() as connection:
            row = connection.execute(_ACCEPTED).fetchone()
            last = 0 if row is None else int(row[0])
            low = 1
            for mark in times:
                low = _first_since(connection, to_text(mark), low, last + 1)
                found.append(low - 1)
        return found

    def list_answered(self, *, limit: int) -> list[AnsweredRequest]:
        """See Figures.list_answered."""
        with self._readers.connection() as connection:
            rows = connection.execute(_ANSWERED, {"limit": limit}).fetchall()
        return [
            AnsweredRequest(
                model=row["model"],
                image_bytes=row["image_bytes"],
                created_at=from_text(row["created_at"]),
                claimed_at=from_text(row["claimed_at"]),
                finished_at=from_text(row["finished_at"]),
                seconds=row["seconds"],
            )
            for row in rows
        ]

    def list_failures(self, *, limit: int) -> list[FailureRecord]:
        """See Figures.list_failures."""
        return [_failure(row) for row in self._rows(_FAILURES, limit)]

    def list_failed_chunks(self, *, limit: int) -> list[FailureRecord]:
        """See Figures.list_failed_chunks."""
        return [_failure(row) for row in self._rows(_FAILED_CHUNKS, limit)]

    def list_unfinished_chunks(self, *, limit: int) -> list[ChunkRecord]:
        """See Figures.list_under_way."""
        return [chunk_from_row(row) for row in self._rows(_UNFINISHED_CHUNKS, limit)]

    def _rows(self, sql: str, *values: Any) -> list[Any]:
        with self._readers.connection() as connection:
            return connection.execute(sql, values).fetchall()


def _first_since(connection: sqlite3.Connection, mark: str, low: int, high: int) -> int:
    """Find the number of the first request that came in at or after a mark; `high` if there is none below that.

    Numbers are given in the order of arrival, but for some milliseconds, so they can be halved.
    """
    while low < high:
        middle = (low + high) // 2
        row = connection.execute(_AT_OR_AFTER, (middle,)).fetchone()
        if row is None or row["created_at"] >= mark:
            high = middle
        else:
            low = row["number"] + 1
    return low


def _failure(row: Any) -> FailureRecord:
    return FailureRecord(**{**dict(row), "finished_at": from_text(row["finished_at"])})

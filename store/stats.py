"""Statistics for operators: what ended and how, how quickly, what failed, what is in progress.

Read by `server/status/dashboard.py` and `server/status/metrics.py`. Every statement reads an index, or few rows, so it
is quick however many requests are kept: none counts requests one by one. The outcomes of all requests ever are in the
table `totals`, which `transition` keeps and which only grows, also when retention deletes requests.

What is counted is what workers compute: of a request to a pipeline its steps, not the request itself.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from store.chunks import ChunkRecord
from store.database import Database
from store.pipelines.definition import PIPELINE
from store.pipelines.runs import COUNT_ADDED
from store.rows import to_text

# SQLite's record of AUTOINCREMENT: numbers have no gaps and are never reused.
_LAST_NUMBER = "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'requests'), 0)"

_TOTALS = f"""
    SELECT model, outcome, code, up_to, count, seconds FROM totals WHERE outcome != '{PIPELINE}'
    ORDER BY model, outcome, code, up_to
"""

_MINUTES = """
    SELECT substr(finished_at, 1, 16) AS minute, model, count(*) AS chunks, sum(answers) AS answered,
           coalesce(sum(done), 0) AS images, coalesce(sum(failed), 0) AS failed, coalesce(sum(seconds), 0.0) AS seconds
    FROM chunks WHERE finished_at >= ? GROUP BY 1, 2 ORDER BY 1, 2
"""

_PIPELINES_BEFORE = """
    SELECT earlier FROM pipeline_runs INDEXED BY pipeline_runs_number
    WHERE number >= ? AND earlier IS NOT NULL ORDER BY number LIMIT 1
"""

_AT_OR_AFTER = "SELECT number, created_at FROM requests WHERE number >= ? ORDER BY number LIMIT 1"

# The inner limit bounds the work when most of the latest requests do not match.
_ANSWERED = """
    SELECT model, image_bytes, created_at, claimed_at, finished_at, seconds FROM (
        SELECT * FROM requests WHERE finished_at IS NOT NULL ORDER BY finished_at DESC LIMIT 2 * :limit
    ) WHERE state = 'done' AND NOT is_cached AND claimed_at IS NOT NULL LIMIT :limit
"""

_FAILURES = f"""
    SELECT id, model, coalesce(code, 'unknown') AS code, reason, provider, finished_at FROM (
        SELECT * FROM requests WHERE state = 'failed' ORDER BY number DESC LIMIT 10 * :limit
    ) WHERE service != '{PIPELINE}' LIMIT :limit
"""

_FAILED_CHUNKS = """
    SELECT id, model, code, coalesce(reason, '') AS reason, provider, finished_at FROM chunks
    WHERE code IS NOT NULL AND finished_at IS NOT NULL ORDER BY finished_at DESC LIMIT ?
"""

_UNFINISHED_CHUNKS = "SELECT * FROM chunks WHERE finished_at IS NULL ORDER BY dispatched_at DESC LIMIT ?"


@dataclass(frozen=True, kw_only=True)
class OutcomeTotal:
    """How many requests ever ended with one outcome, in one class of duration."""

    model: str
    #: done, cached (done at once with an earlier answer), failed, cancelled or expired.
    outcome: str
    #: Code of the failure; empty for other outcomes.
    code: str
    #: Upper bound of the class: seconds from arrival to end; infinite for the last.
    up_to: float
    count: int
    #: Sum of the seconds from arrival to end.
    seconds: float


@dataclass(frozen=True, kw_only=True)
class MinuteStats:
    """Totals of the chunks of one model that ended in one minute."""

    #: Start of the minute as text: 2026-11-21T10:12.
    minute: str
    model: str
    chunks: int
    #: Requests answered; equal images are computed once, so this may be more than `images`.
    answered: int
    images: int
    failed: int
    #: Sum of the chunks' seconds.
    seconds: float


@dataclass(frozen=True, kw_only=True)
class AnsweredRequest:
    """Size and times of one answered request."""

    model: str
    image_bytes: int
    created_at: datetime
    claimed_at: datetime
    finished_at: datetime
    #: Seconds that the model spent on it; None if the worker did not report them.
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class FailureRecord:
    """A request that failed, or a whole chunk."""

    id: str
    model: str
    code: str
    reason: str
    #: The worker or provider; None if none worked on it.
    provider: str | None
    finished_at: datetime


class Stats:
    """Statistics of requests and chunks. Each method may be called often."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def count_accepted(self) -> int:
        """Count the requests that were ever accepted."""
        ((count,),) = self._database.rows(f"SELECT ({_LAST_NUMBER}) - ({COUNT_ADDED})")
        return int(count)

    def list_totals(self) -> list[OutcomeTotal]:
        """List the outcomes of all requests that ever ended."""
        return self._database.records(OutcomeTotal, _TOTALS)

    def list_minute_stats(self, since: datetime) -> list[MinuteStats]:
        """List the totals of chunks by minute and model."""
        return self._database.records(MinuteStats, _MINUTES, (to_text(since),))

    def count_accepted_before(self, times: Sequence[datetime]) -> list[int]:
        """Count, for each time, the requests that were accepted before it. :param times: ascending."""
        counts = []
        with self._database.snapshot() as connection:
            (last,) = connection.execute(_LAST_NUMBER).fetchone()
            (pipelines,) = connection.execute(COUNT_ADDED).fetchone()
            low = 1
            for time in times:
                low = _first_since(connection, to_text(time), low, last + 1)
                later = connection.execute(_PIPELINES_BEFORE, (low,)).fetchone()
                counts.append(low - 1 - (pipelines if later is None else later["earlier"]))
        return counts

    def list_answered(self, *, limit: int) -> list[AnsweredRequest]:
        """List the requests answered last, the latest first, except those answered with an earlier answer."""
        return self._database.records(AnsweredRequest, _ANSWERED, {"limit": limit})

    def list_failures(self, *, limit: int) -> list[FailureRecord]:
        """List the failed requests that arrived last, the latest first."""
        return self._database.records(FailureRecord, _FAILURES, {"limit": limit})

    def list_failed_chunks(self, *, limit: int) -> list[FailureRecord]:
        """List the chunks that failed as a whole, the latest first."""
        return self._database.records(FailureRecord, _FAILED_CHUNKS, (limit,))

    def list_unfinished_chunks(self, *, limit: int) -> list[ChunkRecord]:
        """List the chunks that were dispatched and have not ended, the latest first; those of dead batchers too."""
        return self._database.records(ChunkRecord, _UNFINISHED_CHUNKS, (limit,))


def _first_since(connection: sqlite3.Connection, time: str, low: int, high: int) -> int:
    """Find the number of the first request that was accepted at or after a time; `high` if there is none below that.

    Numbers follow the order of arrival, except for some milliseconds, so a binary search works.
    """
    while low < high:
        middle = (low + high) // 2
        row = connection.execute(_AT_OR_AFTER, (middle,)).fetchone()
        if row is None or row["created_at"] >= time:
            high = middle
        else:
            low = row["number"] + 1
    return low

"""Figures for operators: what ended and how, how quickly, what failed, what is under way.

Read by `server/status/dashboard.py` and `server/status/metrics.py`. Every method is quick however many requests are
kept: none of them counts requests one by one. What became of all requests ever is kept in totals that only grow, also
when retention deletes the requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from store.chunks import ChunkRecord


@dataclass(frozen=True, kw_only=True)
class OutcomeTotal:
    """How many requests ended in one way after about one length of time, ever."""

    model: str
    #: done, cached (done at once with an earlier answer), failed, cancelled or expired.
    outcome: str
    #: Why it failed; empty for the others.
    code: str
    #: From arrival to end it took at most so many seconds, and more than in the class below; the last is infinite.
    up_to: float
    count: int
    #: From arrival to end, all of them together.
    seconds: float


@dataclass(frozen=True, kw_only=True)
class MinuteStats:
    """What chunks that ended in one minute brought."""

    #: Its beginning, as text to the minute: 2026-11-21T10:12.
    minute: str
    model: str
    #: Chunks that ended.
    chunks: int
    #: Requests answered; equal pictures are computed once, so there may be more of them than images.
    answered: int
    #: Pictures computed.
    images: int
    #: Items that failed.
    failed: int
    #: Working seconds.
    seconds: float


@dataclass(frozen=True, kw_only=True)
class AnsweredRequest:
    """When one request came, was taken and was answered."""

    model: str
    image_bytes: int
    created_at: datetime
    claimed_at: datetime
    finished_at: datetime
    #: Seconds the model spent on it; None if the worker did not say.
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class FailureRecord:
    """Something that failed: a request, or a whole chunk."""

    id: str
    model: str
    code: str
    reason: str
    #: Who worked on it; None if nobody did.
    provider: str | None
    finished_at: datetime


class Stats(Protocol):
    """What operators see. Each method may be called often."""

    def count_accepted(self) -> int:
        """Count the requests that were ever taken in."""

    def list_totals(self) -> list[OutcomeTotal]:
        """List what became of all requests that ever ended."""

    def list_minute_stats(self, since: datetime) -> list[MinuteStats]:
        """List what chunks brought, minute by minute and model by model."""

    def count_accepted_before(self, times: Sequence[datetime]) -> list[int]:
        """Count, for each mark, the requests that came in before it. :param times: ascending."""

    def list_answered(self, *, limit: int) -> list[AnsweredRequest]:
        """List the requests answered last, the latest first, without those that were answered from an earlier one."""

    def list_failures(self, *, limit: int) -> list[FailureRecord]:
        """List the failed requests that came last, the latest first."""

    def list_failed_chunks(self, *, limit: int) -> list[FailureRecord]:
        """List the chunks that failed as a whole, the latest first."""

    def list_unfinished_chunks(self, *, limit: int) -> list[ChunkRecord]:
        """List the chunks that were dispatched and have not ended, the latest first; those of dead batchers too."""

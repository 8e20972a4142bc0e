"""Writes a chunk's outcome into the store, one commit after another; nothing is written twice.

Used by `batcher.cycle`, which calls `write_pending` in a thread until the store accepts everything. Writing twice would
be harmless because of the fencing tokens, but the counts would be wrong.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass, fields
from datetime import datetime, timedelta

from batcher.results import ChunkOutcome, ClaimFailure
from store.errors import UnknownRequest
from store.requests import Blame, Claim, Requests
from store.states import RequestState


@dataclass
class Tally:
    """Counts of requests, of a chunk or a cycle."""

    claimed: int = 0
    done: int = 0
    failed: int = 0
    released: int = 0
    #: Dispatched chunks.
    chunks: int = 0
    #: Duration of the cycle.
    seconds: float = 0.0

    def add(self, other: Tally) -> None:
        """Add another tally to this one."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


class ResultWriter:
    """The pending writes of one chunk's outcome."""

    def __init__(self, requests: Requests, chunk_outcome: ChunkOutcome) -> None:
        self._requests = requests
        self.tally = Tally()
        self._answers = chunk_outcome.answers
        self._failures = deque(chunk_outcome.failures)

    def write_pending(self, now: datetime) -> None:
        """Write what is not yet written. :raises StoreError: the store is unavailable; call again later."""
        if self._answers:
            self.tally.done += self._requests.finish(self._answers, now=now)
            self._answers = ()
        while self._failures:
            self._fail_or_release(self._failures[0], now)
            self._failures.popleft()

    def _fail_or_release(self, failure: ClaimFailure, now: datetime) -> None:
        code, reason = failure.code, failure.reason
        if failure.blame is None:
            self.tally.failed += self._requests.fail(failure.claims, code=code, reason=reason, now=now)
            return
        due_at = now + timedelta(seconds=failure.delay_seconds)
        released = self._requests.release(
            failure.claims, blame=failure.blame, code=code, reason=reason, now=now, due_at=due_at
        )
        # Only the store knows how many attempts are allowed.
        failed = sum(map(self._has_failed, failure.claims)) if released and failure.blame is Blame.ITEM else 0
        self.tally.failed += failed
        self.tally.released += max(0, released - failed)

    def _has_failed(self, claim: Claim) -> bool:
        with contextlib.suppress(UnknownRequest):
            return self._requests.get(claim.id).state is RequestState.FAILED
        return False

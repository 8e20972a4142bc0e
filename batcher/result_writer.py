"""Writes a settlement into the store, one commit after another; what is written is not written again.

Used by `batcher.cycle`, which calls `advance` in a thread until the store takes everything. Writing twice would be
harmless (fencing tokens), but the counts would be wrong.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from batcher.results import Setback, Settlement
from provider_image.errors import UnknownRequest
from store import Store
from store.records import Blame, Claim, State


@dataclass
class Tally:
    """Counts of requests."""

    claimed: int = 0
    done: int = 0
    failed: int = 0
    released: int = 0
    chunks: int = 0

    def add(self, other: Tally) -> None:
        """Add another tally to this one."""
        self.claimed += other.claimed
        self.done += other.done
        self.failed += other.failed
        self.released += other.released
        self.chunks += other.chunks


class Recording:
    """A settlement on its way into the store."""

    def __init__(self, store: Store, settlement: Settlement) -> None:
        self._store = store
        self.tally = Tally()
        self._steps: deque[Callable[[datetime], None]] = deque()
        if settlement.answers:
            self._steps.append(lambda now: self._finish(settlement, now))
        for setback in settlement.setbacks:
            self._steps.append(lambda now, setback=setback: self._set_back(setback, now))  # type: ignore[misc]

    def advance(self, now: datetime) -> None:
        """Write what is not yet written. :raises StoreError: the store does not take it now; call again later."""
        while self._steps:
            self._steps[0](now)
            self._steps.popleft()

    def _finish(self, settlement: Settlement, now: datetime) -> None:
        self.tally.done += self._store.finish(settlement.answers, now=now)

    def _set_back(self, setback: Setback, now: datetime) -> None:
        code, reason = setback.code, setback.reason
        if setback.blame is None:
            self.tally.failed += self._store.fail(setback.claims, code=code, reason=reason, now=now)
            return
        due_at = now + timedelta(seconds=setback.delay_seconds)
        held = self._store.release(
            setback.claims, blame=setback.blame, code=code, reason=reason, now=now, due_at=due_at
        )
        # Only the store knows how many attempts there are.
        failed = sum(map(self._has_failed, setback.claims)) if held and setback.blame is Blame.ITEM else 0
        self.tally.failed += failed
        self.tally.released += max(0, held - failed)

    def _has_failed(self, claim: Claim) -> bool:
        with contextlib.suppress(UnknownRequest):
            return self._store.get(claim.id).state is State.FAILED
        return False

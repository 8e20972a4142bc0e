"""What waits and who works, as the store told it a moment ago.

Counting a long queue takes milliseconds, so a server process counts at most once a second, in a thread of its own while
the readers use the figures there are. Used by the views for estimates and for the limit on the backlog.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from server.status.eta import ALIVE_SECONDS
from store.chunks import BatcherRecord, Chunks, ModelBacklog, Throughput
from store.errors import StoreError

log = logging.getLogger(__name__)

#: Figures are used for this long.
FRESH_SECONDS = 1.0
#: Beyond this age nobody uses them any more, even while they are being counted anew.
STALE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class _Counts:
    at: float
    backlog: Sequence[ModelBacklog]
    batchers: Sequence[BatcherRecord]


class QueueStats:
    """The figures of one server process."""

    def __init__(self, journal: Chunks) -> None:
        self._journal = journal
        self._lock = threading.Lock()
        self._counts: _Counts | None = None
        self._throughputs: dict[str, tuple[float, Throughput | None]] = {}

    def backlog(self) -> Sequence[ModelBacklog]:
        """Tell what waits and is worked on, by model. :raises StoreError:"""
        return self._current().backlog

    def batchers(self) -> Sequence[BatcherRecord]:
        """List the batchers that are alive. :raises StoreError:"""
        return self._current().batchers

    def waiting(self) -> int:
        """Count the requests that wait. :raises StoreError:"""
        return sum(backlog.waiting for backlog in self.backlog())

    def throughput(self, model: str) -> Throughput | None:
        """Tell how fast the model was answered lately. :param model: canonical. :raises StoreError:"""
        now = time.monotonic()
        known = self._throughputs.get(model)
        if known is None or now - known[0] > FRESH_SECONDS:
            known = (now, self._journal.throughput(model))
            self._throughputs[model] = known
        return known[1]

    def _current(self) -> _Counts:
        counts = self._counts
        age = float("inf") if counts is None else time.monotonic() - counts.at
        if counts is not None and age < FRESH_SECONDS:
            return counts
        if counts is not None and age < STALE_SECONDS:
            if self._lock.acquire(blocking=False):
                threading.Thread(target=self._refresh_in_background, args=(counts,), name="count", daemon=True).start()
            return counts
        with self._lock:
            return self._refresh(counts)

    def _refresh_in_background(self, counts: _Counts) -> None:
        """Count while readers use the old figures; the caller has taken the lock for this."""
        try:
            self._refresh(counts)
        except StoreError as error:
            log.warning("cannot count what waits: %s", error)
        finally:
            self._lock.release()

    def _refresh(self, known: _Counts | None) -> _Counts:
        if self._counts is not known and self._counts is not None:
            return self._counts
        alive_since = datetime.now(UTC) - timedelta(seconds=ALIVE_SECONDS)
        self._counts = _Counts(
            at=time.monotonic(),
            backlog=self._journal.backlog(),
            batchers=self._journal.list_batchers(seen_since=alive_since),
        )
        return self._counts

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

from provider_image.errors import StoreError
from server.status.eta import ALIVE_SECONDS
from store import Journal
from store.chunks import Backlog, BatcherRecord, Pace

log = logging.getLogger(__name__)

#: Figures are used for this long.
FRESH_SECONDS = 1.0
#: Beyond this age nobody uses them any more, even while they are being counted anew.
STALE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class _Counted:
    at: float
    backlog: Sequence[Backlog]
    batchers: Sequence[BatcherRecord]


class Traffic:
    """The figures of one server process."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._lock = threading.Lock()
        self._counted: _Counted | None = None
        self._paces: dict[str, tuple[float, Pace | None]] = {}

    def backlog(self) -> Sequence[Backlog]:
        """Tell what waits and is worked on, by model. :raises StoreError:"""
        return self._figures().backlog

    def batchers(self) -> Sequence[BatcherRecord]:
        """List the batchers that are alive. :raises StoreError:"""
        return self._figures().batchers

    def waiting(self) -> int:
        """Count the requests that wait. :raises StoreError:"""
        return sum(backlog.waiting for backlog in self.backlog())

    def pace(self, model: str) -> Pace | None:
        """Tell how fast the model was answered lately. :param model: canonical. :raises StoreError:"""
        now = time.monotonic()
        known = self._paces.get(model)
        if known is None or now - known[0] > FRESH_SECONDS:
            known = (now, self._journal.pace(model))
            self._paces[model] = known
        return known[1]

    def _figures(self) -> _Counted:
        counted = self._counted
        age = float("inf") if counted is None else time.monotonic() - counted.at
        if counted is not None and age < FRESH_SECONDS:
            return counted
        if counted is not None and age < STALE_SECONDS:
            if self._lock.acquire(blocking=False):
                threading.Thread(target=self._count_behind, args=(counted,), name="count", daemon=True).start()
            return counted
        with self._lock:
            return self._count(counted)

    def _count_behind(self, counted: _Counted) -> None:
        """Count while readers use the old figures; the caller has taken the lock for this."""
        try:
            self._count(counted)
        except StoreError as error:
            log.warning("cannot count what waits: %s", error)
        finally:
            self._lock.release()

    def _count(self, known: _Counted | None) -> _Counted:
        if self._counted is not known and self._counted is not None:
            return self._counted
        alive_since = datetime.now(UTC) - timedelta(seconds=ALIVE_SECONDS)
        self._counted = _Counted(
            at=time.monotonic(),
            backlog=self._journal.backlog(),
            batchers=self._journal.list_batchers(seen_since=alive_since),
        )
        return self._counted

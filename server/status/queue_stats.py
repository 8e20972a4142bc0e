"""What is queued and which batchers work, cached for a moment.

What batchers have claimed is counted one by one, so a server process counts at most once a second, in the background
while readers use the counts there are. Used for estimates, for the limit on the backlog, and by the dashboard.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from server.status.eta import ALIVE_SECONDS
from server.status.stale_cache import StaleCache
from store.chunks import Throughput
from store.processes.batchers import BatcherRecord
from store.requests import ModelBacklog
from store.store import Store

#: Counts are used for this long without a reload.
FRESH_SECONDS = 1.0
#: Beyond this age they are not used any more, even while they are reloaded.
STALE_SECONDS = 5.0


class QueueStats:
    """The counts of one server process."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._counts = StaleCache(self._load, fresh_seconds=FRESH_SECONDS, stale_seconds=STALE_SECONDS)
        self._throughputs: dict[str, StaleCache[Throughput | None]] = {}

    def backlog(self) -> Sequence[ModelBacklog]:
        """Return what is queued and claimed, by model. :raises StoreError:"""
        return self._counts.get()[0]

    def batchers(self) -> Sequence[BatcherRecord]:
        """List the batchers that are alive. :raises StoreError:"""
        return self._counts.get()[1]

    def waiting_sent(self) -> int:
        """Count the requests that are queued, without the steps of pipelines. :raises StoreError:"""
        return sum(backlog.waiting_sent for backlog in self.backlog())

    def throughput(self, model: str) -> Throughput | None:
        """Return the recent throughput of a model. :param model: canonical. :raises StoreError:"""
        cache = self._throughputs.get(model)
        if cache is None:
            cache = self._throughputs.setdefault(
                model,
                # Cheap to load, so it is never used stale.
                StaleCache(
                    lambda: self._store.chunks.throughput(model),
                    fresh_seconds=FRESH_SECONDS,
                    stale_seconds=FRESH_SECONDS,
                ),
            )
        return cache.get()

    def _load(self) -> tuple[Sequence[ModelBacklog], Sequence[BatcherRecord]]:
        alive_since = datetime.now(UTC) - timedelta(seconds=ALIVE_SECONDS)
        return self._store.requests.backlog(), self._store.batchers.list(seen_since=alive_since)

"""What the sessions, worker pools and workers of one golem executor have in common.

Made by `executor.py`; each part is described in its own module.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable

from batcher.executors import ExecutorContext, Job
from batcher.executors.golem.job_queue import JobQueue
from batcher.executors.golem.ledger_writer import LedgerWriter
from batcher.executors.golem.money import Money
from batcher.executors.golem.provider_records import ProviderRecords
from batcher.executors.golem.scripts.attempt import Attempt
from batcher.executors.golem.settings import GolemSettings
from batcher.executors.golem.timings import GolemTimings
from batcher.workspace import is_alive

#: Results that are checked at the same time. A check may have to wait for a decoder, in a thread that others need too.
_MAX_CHECKS = 2


class GolemParts:
    """One executor's parts."""

    def __init__(self, context: ExecutorContext, settings: GolemSettings, timings: GolemTimings) -> None:
        self.context = context
        self.settings = settings
        self.timings = timings
        self.job_queue = JobQueue()
        self.checks = asyncio.Semaphore(_MAX_CHECKS)
        #: Model -> whether its chunks reach providers quicker than they are computed; False for good. See `worker.py`.
        self.quick_transfers: dict[str, bool] = {}
        self.ledger = context.store.ledger
        self.ledger_writer = LedgerWriter(timings)
        self.money = Money(context.store, self.ledger_writer, owner=context.owner, caps=settings.caps, timings=timings)
        self.provider_records = ProviderRecords(context.store.providers, settings, self.ledger_writer)

    def job_seconds(self, job: Job, images_per_second: float | None) -> float:
        """Return how long a queued job may take on a provider of this speed; None is an unknown one."""
        return self._seconds([(job, job.chunk.stat().st_size)], images_per_second)

    def chunk_seconds(self, attempts: Iterable[Attempt], images_per_second: float | None) -> float:
        """Return how long chunks that are sent together may take; None as above."""
        return self._seconds([(each.queued_job.job, each.size_bytes) for each in attempts], images_per_second)

    def _seconds(self, jobs: Collection[tuple[Job, int]], images_per_second: float | None) -> float:
        return self.timings.chunk_timeout(
            items=sum(job.items for job, _ in jobs),
            size_bytes=sum(size for _, size in jobs),
            images_per_second=images_per_second,
            max_seconds=sum(job.timeout_seconds for job, _ in jobs),
        )

    def is_gone(self, batcher_id: str) -> bool:
        """Return whether another batcher no longer runs."""
        return not is_alive(self.context.work.parent, batcher_id)

"""The queue of chunks that wait for a worker, and which provider may run which.

`executor.py` fills it, `worker.py` takes from it. A chunk never goes to a provider that failed on it before. Belongs
to one event loop; nothing here waits for the network.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from batcher.executors import AttemptBill, Job, Outcome
from provider_image.errors import MlgError, WorkerDied


@dataclass(kw_only=True, eq=False)
class QueuedJob:
    """A job through all its attempts."""

    job: Job
    #: Set when the job is over; cancelled when the caller no longer waits.
    outcome: asyncio.Future[Outcome]
    #: When it was queued, on the monotonic clock.
    waiting_since: float
    #: Addresses of the providers that failed on it; they do not get it again.
    failed_on: set[str] = field(default_factory=set)
    #: Addresses of the providers banned for it; lifted if the chunk itself is at fault.
    banned_providers: set[str] = field(default_factory=set)
    #: Attempts that failed through the provider, and all attempts.
    failures: int = 0
    attempts: int = 0
    #: What the attempts that have ended cost.
    bills: list[AttemptBill] = field(default_factory=list)
    #: How the last attempt ended.
    last_outcome: Outcome | None = None
    #: Address of a provider that runs it -> what stops that attempt, and whether it is a second attempt.
    running_attempts: dict[str, tuple[Callable[[], None], bool]] = field(default_factory=dict)
    #: From then on, on the monotonic clock, an idle worker may run it too; None if unknown.
    straggler_at: float | None = None

    def complete(self, outcome: Outcome) -> None:
        """Set the outcome, unless it is set already, and stop the other attempts.

        A second attempt that is no longer needed may finish: that costs less than a new start.
        """
        if not self.outcome.done():
            self.outcome.set_result(replace(outcome, bills=tuple(self.bills)))
        for stop, is_second in list(self.running_attempts.values()):
            if not is_second:
                stop()

    def cancel(self) -> None:
        """Stop all attempts."""
        for stop, _ in list(self.running_attempts.values()):
            stop()


class JobQueue:
    """Queued jobs by model, oldest first."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[QueuedJob]] = {}
        self._running: list[QueuedJob] = []
        self._change_event = asyncio.Event()
        self._is_closed = False

    def models(self) -> list[str]:
        """List the models with queued jobs."""
        return [model for model in self._waiting if self.count(model)]

    def count(self, model: str) -> int:
        """Count the queued jobs of a model."""
        return sum(1 for _ in self._active(model))

    def has_job_for(self, model: str, provider_id: str) -> bool:
        """Return whether a job is queued that this provider may run."""
        return any(provider_id not in queued_job.failed_on for queued_job in self._active(model))

    def queued_jobs(self) -> Iterator[QueuedJob]:
        """Iterate over all queued jobs."""
        for model in list(self._waiting):
            yield from list(self._active(model))

    def put(self, queued_job: QueuedJob, *, is_retry: bool = False) -> None:
        """Add a job; a retried job goes first. After `close` the job ends."""
        if self._is_closed:
            queued_job.complete(Outcome.not_run(WorkerDied("The executor is closed.")))
            return
        queued_job.waiting_since = time.monotonic()
        queue = self._waiting.setdefault(queued_job.job.model, deque())
        if is_retry:
            queue.appendleft(queued_job)
        else:
            queue.append(queued_job)
        self.notify()

    def pop(self, model: str, provider_id: str) -> QueuedJob | None:
        """Remove and return the oldest job that this provider may run; None if there is none."""
        for queued_job in self._active(model):
            if provider_id not in queued_job.failed_on:
                self._waiting[model].remove(queued_job)
                return queued_job
        return None

    def start_attempt(
        self, queued_job: QueuedJob, provider_id: str, *, stop: Callable[[], None], straggler_at: float | None
    ) -> None:
        """Record that a provider runs a job.

        :param stop: called when its answer is no longer needed.
        :param straggler_at: from then on, on the monotonic clock, an idle worker may run the job too.
        """
        queued_job.attempts += 1
        queued_job.running_attempts[provider_id] = (stop, bool(queued_job.running_attempts))
        queued_job.straggler_at = straggler_at
        self._running.append(queued_job)

    def finish_attempt(self, queued_job: QueuedJob, provider_id: str) -> None:
        """Record that a provider no longer runs a job."""
        queued_job.running_attempts.pop(provider_id, None)
        if queued_job in self._running:
            self._running.remove(queued_job)

    def straggler(self, model: str, provider_id: str) -> QueuedJob | None:
        """Return a job that runs for too long elsewhere, for an idle provider; None if there is none.

        A second attempt then costs little, and one provider that hangs does not delay the end. There is never a third.
        """
        now = time.monotonic()
        for queued_job in self._running:
            is_late = (
                queued_job.straggler_at is not None
                and now > queued_job.straggler_at
                and len(queued_job.running_attempts) == 1
            )
            is_possible = queued_job.job.model == model and provider_id not in {
                *queued_job.failed_on,
                *queued_job.running_attempts,
            }
            if is_late and is_possible and not queued_job.outcome.done():
                return queued_job
        return None

    def remove(self, queued_jobs: Iterable[QueuedJob]) -> list[QueuedJob]:
        """Remove these from the queue. :return: those that were queued."""
        removed = []
        for queued_job in queued_jobs:
            queue = self._waiting.get(queued_job.job.model, deque())
            if queued_job in queue:
                queue.remove(queued_job)
                removed.append(queued_job)
        return removed

    def fail_all(self, error: MlgError, *, model: str | None = None) -> int:
        """End all queued jobs without blame. :return: how many.

        :param model: only the jobs of this model.
        """
        failed = self.remove([each for each in self.queued_jobs() if model in (None, each.job.model)])
        for queued_job in failed:
            queued_job.complete(Outcome.not_run(error))
        return len(failed)

    def close(self) -> None:
        """End all queued jobs, and those that are added later."""
        self._is_closed = True
        self.fail_all(WorkerDied("The executor is closed."))

    async def wait_for_change(self, seconds: float) -> None:
        """Wait for a change, at most this long."""
        change_event = self._change_event
        try:
            async with asyncio.timeout(seconds):
                await change_event.wait()
        except TimeoutError:
            return

    def notify(self) -> None:
        """Wake all that wait for a change."""
        change_event, self._change_event = self._change_event, asyncio.Event()
        change_event.set()

    def _active(self, model: str) -> Iterator[QueuedJob]:
        return (queued_job for queued_job in self._waiting.get(model, ()) if not queued_job.outcome.done())

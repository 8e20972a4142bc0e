"""The queue of chunks that wait for a worker, and which provider may run which.

`executor.py` fills it, `worker.py` takes from it. A chunk never goes to a provider that failed on it before. Belongs
to one event loop; nothing here waits for the network.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from batcher.executors import AttemptBill, Job, Outcome
from provider_image.errors import MlgError, WorkerDied


@dataclass(kw_only=True, eq=False)
class QueuedJob:
    """A job through all its attempts."""

    job: Job
    #: Set when the job is over; cancelled when the caller no longer waits.
    outcome: asyncio.Future[Outcome]
    #: When it was queued last, or when there last was a worker that may take it, on the monotonic clock.
    waiting_since: float = 0.0
    #: Addresses of the providers that failed on it and were banned for that; they do not get it again.
    failed_on: set[str] = field(default_factory=set)
    #: Those of them whose results were proven to be wrong, which says nothing about the chunk.
    proven_wrong: set[str] = field(default_factory=set)
    #: Attempts of any kind.
    attempts: int = 0
    #: What the attempts that have ended cost.
    bills: list[AttemptBill] = field(default_factory=list)
    #: How the last attempt ended.
    last_outcome: Outcome | None = None
    #: Address of a provider that runs it -> what stops that attempt, and whether it is a second attempt.
    running_attempts: dict[str, tuple[Callable[[], None], bool]] = field(default_factory=dict)
    #: From then on, on the monotonic clock, an idle worker may run it too.
    straggler_at: float = math.inf

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
    """The queued jobs of all models, and the running ones that may get a second attempt."""

    def __init__(self) -> None:
        self._waiting: list[QueuedJob] = []
        self._running: list[QueuedJob] = []
        self._change_event = asyncio.Event()
        self._is_closed = False

    def queued_jobs(self, model: str | None = None) -> list[QueuedJob]:
        """List the queued jobs, of one model if it is given, in the order in which they are run."""
        return [each for each in self._waiting if model in (None, each.job.model) and not each.outcome.done()]

    def put(self, queued_job: QueuedJob, *, is_retry: bool = False) -> None:
        """Add a job; a retried job goes first. After `close` the job ends; one that nobody waits for is left out."""
        if queued_job.outcome.done():
            return
        if self._is_closed:
            queued_job.complete(Outcome.not_run(WorkerDied("The executor is closed.")))
            return
        queued_job.waiting_since = time.monotonic()
        self._waiting.insert(0 if is_retry else len(self._waiting), queued_job)
        self.notify()

    def pop(self, model: str, provider_id: str, *, limit: int = 1) -> list[QueuedJob]:
        """Remove and return the oldest jobs that this provider may run, so many at most."""
        found = [each for each in self.queued_jobs(model) if provider_id not in each.failed_on][: max(0, limit)]
        for queued_job in found:
            self._waiting.remove(queued_job)
        return found

    def start_attempt(
        self, queued_job: QueuedJob, provider_id: str, *, stop: Callable[[], None], straggler_at: float
    ) -> None:
        """Record that a provider runs a job. :param stop: called when its answer is no longer needed."""
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
            had_it = provider_id in {*queued_job.failed_on, *queued_job.running_attempts}
            is_possible = queued_job.job.model == model and len(queued_job.running_attempts) == 1 and not had_it
            if now > queued_job.straggler_at and is_possible and not queued_job.outcome.done():
                return queued_job
        return None

    def remove(self, queued_job: QueuedJob) -> None:
        """Remove a job from the queue, if it is there."""
        if queued_job in self._waiting:
            self._waiting.remove(queued_job)

    def fail_all(self, error: MlgError, *, model: str | None = None) -> None:
        """End all queued jobs, or those of one model, without blame."""
        for queued_job in self.queued_jobs(model):
            self.remove(queued_job)
            queued_job.complete(Outcome.not_run(error))

    def close(self) -> None:
        """End all queued jobs, and those that are added later."""
        self._is_closed = True
        self.fail_all(WorkerDied("The executor is closed."))

    async def wait_for_change(self, seconds: float) -> None:
        """Wait for a change, at most this long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._change_event.wait()

    def notify(self) -> None:
        """Wake all that wait for a change."""
        change_event, self._change_event = self._change_event, asyncio.Event()
        change_event.set()

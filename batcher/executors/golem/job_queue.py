"""The chunks that wait for a computer, and which computer may have which.

Filled by `executor.py`, emptied by the hires. A chunk is never given twice to a provider that failed on it. Belongs to
one event loop; nothing here waits for the network.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from batcher.executors import Job, Outcome
from provider_image.errors import MlgError


@dataclass(kw_only=True, eq=False)
class QueuedJob:
    """A job on its way to a provider, through all its attempts."""

    job: Job
    #: Set when it is over; cancelled when the caller has lost interest.
    outcome: asyncio.Future[Outcome]
    #: Since when it waits for a provider, by the monotonic clock.
    waiting_since: float
    #: Addresses of the providers that failed on it; it does not go there again.
    failed_on: set[str] = field(default_factory=set)
    #: Providers that were banned for failing on it: if it fails everywhere, it was not their fault.
    banned_providers: set[str] = field(default_factory=set)
    #: Attempts that count, and all.
    failures: int = 0
    attempts: int = 0
    #: What the last attempt ended with.
    last_outcome: Outcome | None = None
    #: Those who work on it now -> what to call when their answer is of no use any more, and whether they came second.
    running_attempts: dict[str, tuple[Callable[[], None], bool]] = field(default_factory=dict)
    #: From then on, by the monotonic clock, an idle provider may try it too; None if nobody knows.
    straggler_at: float | None = None

    def complete(self, outcome: Outcome) -> None:
        """Give the caller the outcome, unless there is one already, and call back who was outrun.

        Whoever came second and is not needed any more may as well finish: that costs less than a new start.
        """
        if not self.outcome.done():
            self.outcome.set_result(outcome)
        for stop, is_second in list(self.running_attempts.values()):
            if not is_second:
                stop()

    def cancel(self) -> None:
        """Tell all who work on it to stop."""
        for stop, _ in list(self.running_attempts.values()):
            stop()


class JobQueue:
    """Errands by model, oldest first."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[QueuedJob]] = {}
        self._running: list[QueuedJob] = []
        self._change_event = asyncio.Event()

    def models(self) -> list[str]:
        """List the models that something waits for."""
        return [model for model in self._waiting if self.count(model)]

    def count(self, model: str) -> int:
        """Count what waits for a model."""
        return sum(1 for _ in self._active(model))

    def has_job_for(self, model: str, provider_id: str) -> bool:
        """Tell whether something waits that this provider may have."""
        return any(provider_id not in queued_job.failed_on for queued_job in self._active(model))

    def queued_jobs(self) -> Iterator[QueuedJob]:
        """Go through all that waits."""
        for model in list(self._waiting):
            yield from list(self._active(model))

    def put(self, queued_job: QueuedJob, *, is_retry: bool = False) -> None:
        """Add an errand; one that comes back stands first."""
        queued_job.waiting_since = time.monotonic()
        queue = self._waiting.setdefault(queued_job.job.model, deque())
        if is_retry:
            queue.appendleft(queued_job)
        else:
            queue.append(queued_job)
        self.notify()

    def pop(self, model: str, provider_id: str) -> QueuedJob | None:
        """Take the oldest errand that this provider may have; None if there is none."""
        for queued_job in self._active(model):
            if provider_id not in queued_job.failed_on:
                self._waiting[model].remove(queued_job)
                return queued_job
        return None

    def start_attempt(
        self, queued_job: QueuedJob, provider_id: str, *, stop: Callable[[], None], straggler_at: float | None
    ) -> None:
        """Note that a provider works on an errand.

        :param stop: called when its answer is of no use any more.
        :param straggler_at: from then on the errand may be tried elsewhere at the same time.
        """
        queued_job.attempts += 1
        queued_job.running_attempts[provider_id] = (stop, bool(queued_job.running_attempts))
        queued_job.straggler_at = straggler_at
        self._running.append(queued_job)

    def finish_attempt(self, queued_job: QueuedJob, provider_id: str) -> None:
        """Note that a provider does not work on an errand any more."""
        queued_job.running_attempts.pop(provider_id, None)
        if queued_job in self._running:
            self._running.remove(queued_job)

    def straggler(self, model: str, provider_id: str) -> QueuedJob | None:
        """Return an errand that has been worked on for too long, for a provider that has nothing else to do.

        A second try is cheap then, and one hung provider does not keep everybody waiting at the end. Never a third.
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
        """Take these out, wherever they stand. :return: those that were in."""
        removed = []
        for queued_job in queued_jobs:
            queue = self._waiting.get(queued_job.job.model, deque())
            if queued_job in queue:
                queue.remove(queued_job)
                removed.append(queued_job)
        return removed

    def fail_all(self, error: MlgError, *, model: str | None = None) -> int:
        """End everything that waits, through no fault of its own. :return: how many that were."""
        failed = self.remove([each for each in self.queued_jobs() if model in (None, each.job.model)])
        for queued_job in failed:
            queued_job.complete(Outcome(provider=None, seconds=0.0, error=error, is_blameless=True))
        return len(failed)

    async def wait_for_change(self, seconds: float) -> None:
        """Wait until something was added, or so long."""
        change_event = self._change_event
        try:
            async with asyncio.timeout(seconds):
                await change_event.wait()
        except TimeoutError:
            return

    def notify(self) -> None:
        """Wake everybody who waits for a change."""
        change_event, self._change_event = self._change_event, asyncio.Event()
        change_event.set()

    def _active(self, model: str) -> Iterator[QueuedJob]:
        return (queued_job for queued_job in self._waiting.get(model, ()) if not queued_job.outcome.done())

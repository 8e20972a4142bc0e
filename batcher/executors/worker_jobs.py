"""The jobs of one local worker: those that it runs, and one that it has ahead. Used by `local.py`."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import Any

from batcher.executors import Job, Outcome


@dataclass(kw_only=True, eq=False)
class LocalQueuedJob:
    """A job that waits for a worker, or that one has."""

    job: Job
    #: Set when the job is over; cancelled when the caller no longer waits.
    outcome: asyncio.Future[Outcome]
    #: When its time begins, by the event loop's clock: when its worker should begin it, then when it does, and not
    #: before the jobs that the worker began earlier have ended. Infinite while it is only ahead.
    started_at: float = math.inf
    #: When its worker began it; infinite until then.
    begun_at: float = math.inf
    #: How many workers have ended before they began it.
    unbegun: int = 0
    #: True if its worker ran another job at any time while it ran this one.
    was_shared: bool = False
    #: True if it must not be run beside another, because it failed when it was.
    must_be_alone: bool = False
    #: True if its worker has ended it, as is known when the worker begins another, and its reply is on the way.
    has_ended: bool = False
    #: Returns the worker's reply; cancelling it takes a job back that the worker has not begun.
    reply: asyncio.Task[dict[str, Any]] | None = None


class WorkerJobs:
    """The jobs that one worker process has.

    :param slots: how many it runs at the same time.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        #: All, and those that it has begun, in this order.
        self._jobs: list[LocalQueuedJob] = []
        self._begun: list[LocalQueuedJob] = []
        #: True when the process is about to be ended, so that it takes no more.
        self.is_ending = False
        #: True once a job has ended.
        self.was_useful = False

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def has_free_slot(self) -> bool:
        """True if the worker would begin another job at once."""
        return len(self._jobs) < self._slots and not self.is_ending

    def may_take(self, queued_job: LocalQueuedJob) -> bool:
        """Tell whether the worker may get the job now."""
        if self.is_ending:
            return False
        if len(self._jobs) >= self._slots and len(self._begun) < len(self._jobs):
            # It might begin this one before one that was sent earlier. That would then wait behind it, though another
            # worker may be idle, and its time would run.
            return False
        return not self._jobs or not any(each.must_be_alone for each in (*self._jobs, queued_job))

    def add(self, queued_job: LocalQueuedJob, now: float) -> None:
        """Note that the worker gets the job."""
        self._jobs.append(queued_job)
        queued_job.started_at = queued_job.begun_at = math.inf
        queued_job.was_shared = queued_job.has_ended = False
        self._start_time(now)

    def begin(self, queued_job: LocalQueuedJob, now: float) -> None:
        """Note that it begins the job."""
        queued_job.started_at = queued_job.begun_at = now
        self._begun.append(queued_job)
        others = self._begun[:-1]
        if self._slots == 1:
            for each in others:
                each.has_ended = True
        elif others:
            # Some may have ended, and which is not known: the reply may come later than this.
            for each in self._begun:
                each.was_shared = True

    def remove(self, queued_job: LocalQueuedJob, now: float) -> None:
        """Note that it has ended the job, or that the job was taken back."""
        self._jobs.remove(queued_job)
        if queued_job in self._begun:
            place = self._begun.index(queued_job)
            del self._begun[place]
            for each in self._begun[place:]:
                each.started_at = now
            self.was_useful = True
        self._start_time(now)

    def _start_time(self, now: float) -> None:
        """Let the time of those begin that the worker should begin now, so that one that does not is noticed."""
        for each in self._jobs[: self._slots]:
            each.started_at = min(each.started_at, now)

    def take_back(self) -> bool:
        """Take the job back that the worker has ahead. :return: whether one is on its way back."""
        if len(self._jobs) <= self._slots:
            return False
        reply = self._jobs[-1].reply
        if reply is None or self._jobs[-1] in self._begun:
            return False
        return bool(reply.cancelling()) or reply.cancel()

"""Several executors as one: what has waited too long for the first goes to the next.

Made by `load_executor` for settings such as `golem,local`. Weakness: the last one takes whatever comes, so that its
queue is the longest when all others are out of order.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

from batcher.errors import ExecutorUnavailable
from batcher.executors import Executor, Job, Outcome

log = logging.getLogger(__name__)


class FallbackExecutor:
    """See `batcher.executors.Executor`.

    :param members: in the order in which they are asked.
    :param fallback_seconds: a job that nobody has begun within this time goes to the next.
    """

    def __init__(self, members: Sequence[Executor], *, fallback_seconds: float) -> None:
        self._members = list(members)
        self._fallback_seconds = fallback_seconds
        self.name = ",".join(member.name for member in members)
        # Which of them will get a chunk is not known when it is packed.
        self.is_remote = any(member.is_remote for member in members)

    async def start(self) -> None:
        """Start all. :raises MlgError: one of them never will; the others are closed."""
        try:
            for member in self._members:
                await member.start()
        except BaseException:
            await self.close()
            raise

    def capacity(self) -> int:
        """See Executor.capacity."""
        return max(member.capacity() for member in self._members)

    def workers(self) -> int:
        """See Executor.workers."""
        return sum(member.workers() for member in self._members)

    def unavailable_reason(self, model: str) -> str | None:
        """See Executor.obstacle: only what stands in the way of all."""
        reasons = [member.unavailable_reason(model) for member in self._members]
        return None if None in reasons else " ".join(reason for reason in reasons if reason)

    async def run(self, job: Job) -> Outcome:
        """See Executor.run."""
        *first, last = self._members
        for member in first:
            if member.unavailable_reason(job.model) is None:
                outcome = await self._run_or_pass_on(member, job)
                if outcome is not None:
                    return outcome
                job.results.unlink(missing_ok=True)
            log.info("a chunk goes from %s to the next", member.name, extra={"chunk_id": job.chunk_id})
        return await last.run(job)

    async def _run_or_pass_on(self, member: Executor, job: Job) -> Outcome | None:
        """Run a job; None if it has to go to the next."""
        begun = asyncio.Event()

        def on_start() -> None:
            begun.set()
            if job.on_start is not None:
                job.on_start()

        running = asyncio.create_task(member.run(replace(job, on_start=on_start)))
        beginning = asyncio.create_task(begun.wait())
        try:
            await asyncio.wait(
                {running, beginning}, timeout=self._fallback_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if not begun.is_set() and not running.done():
                return None
            outcome = await running
            is_unavailable = isinstance(outcome.error, ExecutorUnavailable) and outcome.is_blameless
            return None if is_unavailable else outcome
        finally:
            for task in (running, beginning):
                task.cancel()
            await asyncio.gather(running, beginning, return_exceptions=True)

    async def close(self) -> None:
        """See Executor.close."""
        await asyncio.gather(*(member.close() for member in self._members))

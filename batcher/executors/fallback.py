"""Several executors as one: a job that waits too long for the first goes to the next.

The last try of an item goes to those whose workers are trusted, if there are any.

Made by `load_executor` for a setting such as `golem,local`. Weakness: the last executor takes every job that the others
refuse, so its queue is the longest when all others are unavailable.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from batcher.errors import ExecutorUnavailable
from batcher.executors import Executor, Job, Outcome
from provider_image.environment import Settings, setting

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FallbackSettings(Settings):
    """Settings for several executors."""

    #: With several executors: a chunk waits this long for one before it goes to the next.
    #: MLG_FALLBACK_SECONDS. Defaults to 60 seconds.
    fallback_seconds: float = setting("MLG_FALLBACK_SECONDS", 60.0, minimum=0, maximum=86400)


class FallbackExecutor:
    """See `batcher.executors.Executor`.

    :param members: in order of preference.
    """

    def __init__(self, members: Sequence[Executor], environment: Mapping[str, str]) -> None:
        self._members = list(members)
        self._settings = FallbackSettings.from_env(environment)
        self.name = ",".join(member.name for member in members)
        # Which member gets a chunk is not known when it is packed.
        self.is_remote = any(member.is_remote for member in members)
        self.is_trusted = all(member.is_trusted for member in members)

    async def start(self) -> None:
        """See Executor.start. If one member fails, all are closed."""
        try:
            for member in self._members:
                await member.start()
        except BaseException:
            await self.close()
            raise

    def capacity(self, model: str) -> int:
        return max(member.capacity(model) for member in self._members)

    def workers(self) -> int:
        return sum(member.workers() for member in self._members)

    def has_quick_transfers(self, model: str) -> bool:
        return all(member.has_quick_transfers(model) for member in self._members)

    def unavailable_reason(self, model: str) -> str | None:
        """See Executor.unavailable_reason: None as soon as one member is available."""
        reasons = [member.unavailable_reason(model) for member in self._members]
        return None if None in reasons else " ".join(reason for reason in reasons if reason)

    async def run(self, job: Job) -> Outcome:
        trusted = [member for member in self._members if member.is_trusted]
        # Strangers together must not fail an item for good that this machine could answer.
        *first, last = trusted if trusted and job.is_last_try else self._members
        for member in first:
            if member.unavailable_reason(job.model) is None:
                outcome = await self._run_or_pass_on(member, job)
                if outcome is not None:
                    return outcome
                job.results.unlink(missing_ok=True)
            log.info("executor %s did not take a chunk, trying the next", member.name, extra={"chunk_id": job.chunk_id})
        return await last.run(job)

    async def _run_or_pass_on(self, member: Executor, job: Job) -> Outcome | None:
        """Run a job; return None if it has to go to the next member."""
        begun = asyncio.Event()

        def on_start() -> None:
            begun.set()
            if job.on_start is not None:
                job.on_start()

        running = asyncio.create_task(member.run(replace(job, on_start=on_start)))
        beginning = asyncio.create_task(begun.wait())
        try:
            await asyncio.wait(
                {running, beginning}, timeout=self._settings.fallback_seconds, return_when=asyncio.FIRST_COMPLETED
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

    def stop_seconds(self) -> float:
        return max(member.stop_seconds() for member in self._members)

    async def close(self) -> None:
        await asyncio.gather(*(member.close() for member in self._members))

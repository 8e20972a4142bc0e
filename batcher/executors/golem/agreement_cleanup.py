"""Ends agreements when their worker is done, even if yapapi or the daemon fails to.

Used by `worker_pool.py`, which does not wait for it. yapapi asks the daemon only once to end an agreement, can be
blocked by a call that hangs, and misses an approval that arrives too late; this module retries.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from batcher.executors.golem.recovery import end_agreement
from batcher.executors.golem.timings import GolemTimings
from batcher.executors.golem.yapapi_adapter import explain

log = logging.getLogger(__name__)

#: The reason that providers receive.
DONE_REASON = {"message": "All work is done", "golem.requestor.code": "Success"}
#: Attempts to end an agreement; those that remain open are ended with the session.
_TERMINATE_ATTEMPTS = 3


class AgreementCleanup:
    """Background tasks that end the agreements of one worker pool.

    :param engine: yapapi's, started.
    :param model: for the log.
    """

    def __init__(self, engine: Any, model: str, timings: GolemTimings) -> None:
        self._engine = engine
        self._model = model
        self._timings = timings
        self._tasks: set[asyncio.Task[Any]] = set()

    def add(self, task: asyncio.Task[Any]) -> None:
        """Keep a task until it is done, and log its failure."""
        self._tasks.add(task)
        task.add_done_callback(self._discard_task)

    def terminate_later(self, agreement_id: str, pool: Any) -> None:
        """Terminate an agreement if yapapi, which should do so now, does not.

        :param pool: yapapi's pool of agreements.
        """

        async def terminate() -> None:
            deadline = time.monotonic() + self._timings.cleanup_seconds
            while agreement_id in pool._agreements and time.monotonic() < deadline:
                await asyncio.sleep(0.2)
                await pool.cycle()
            if agreement_id in pool._agreements:
                await pool._terminate_agreement(agreement_id, DONE_REASON)

        self.add(asyncio.create_task(terminate()))

    def terminate_with_retries(self, agreement_id: str) -> None:
        """Terminate an agreement that yapapi wrongly considers terminated."""

        async def terminate() -> None:
            for attempt in range(1, _TERMINATE_ATTEMPTS + 1):
                try:
                    return await end_agreement(self._engine, agreement_id, DONE_REASON)
                except Exception as error:
                    log.info("an agreement for %s could not be terminated yet: %s", self._model, explain(error))
                await asyncio.sleep(self._timings.terminate_backoff.after(attempt))

        self.add(asyncio.create_task(terminate()))

    async def close(self) -> None:
        """Wait for the tasks, for a limited time, and cancel the rest."""
        if not self._tasks:
            return
        _, hanging = await asyncio.wait(self._tasks, timeout=self._timings.cleanup_seconds)
        for task in hanging:
            task.cancel()

    def _discard_task(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.info("a worker for %s failed: %s", self._model, explain(task.exception() or Exception()))

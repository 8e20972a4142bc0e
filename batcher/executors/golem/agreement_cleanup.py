"""What is still to be done when a hire is over: its activity destroyed, its agreement ended, whatever the daemon says.

Used by `rental.py`, which does not wait for it. yapapi asks for an agreement's end only once, may be kept from asking
by a call that hangs, and knows nothing of an approval that comes too late; here it is asked again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from batcher.executors.golem.recovery import end_agreement
from batcher.executors.golem.yapapi_adapter import explain

log = logging.getLogger(__name__)

#: yapapi's calls at a hire's end get this long before nobody waits for them any more.
CLEANUP_SECONDS = 5.0
#: Pauses between the tries to end an agreement that yapapi did not; whatever is left is ended with the session.
_TERMINATE_BACKOFF_SECONDS = (0.5, 2.0, 8.0)
#: What providers are told.
_REASON = {"message": "All work is done", "golem.requestor.code": "Success"}


class AgreementCleanup:
    """Tasks that nobody waits for, until the end.

    :param engine: yapapi's, started.
    :param model: for the log.
    """

    def __init__(self, engine: Any, model: str) -> None:
        self._engine = engine
        self._model = model
        self._tasks: set[asyncio.Task[Any]] = set()

    def add(self, task: asyncio.Task[Any]) -> None:
        """Keep a task until it is done, and tell of its failure."""
        self._tasks.add(task)
        task.add_done_callback(self._discard_task)

    def terminate_later(self, agreement_id: str, pool: Any) -> None:
        """See to it that an agreement ends even if yapapi, which should end it now, is kept from it.

        :param pool: yapapi's pool of agreements.
        """

        async def terminate() -> None:
            deadline = time.monotonic() + CLEANUP_SECONDS
            while agreement_id in pool._agreements and time.monotonic() < deadline:
                await asyncio.sleep(0.2)
                await pool.cycle()
            if agreement_id in pool._agreements:
                await pool._terminate_agreement(agreement_id, _REASON)

        self.add(asyncio.create_task(terminate()))

    def terminate_with_retries(self, agreement_id: str) -> None:
        """End an agreement that yapapi only takes for ended."""

        async def terminate() -> None:
            for pause in _TERMINATE_BACKOFF_SECONDS:
                try:
                    return await end_agreement(self._engine, agreement_id, _REASON)
                except Exception as error:
                    log.info("an agreement for %s is not ended yet: %s", self._model, explain(error))
                await asyncio.sleep(pause)

        self.add(asyncio.create_task(terminate()))

    async def close(self) -> None:
        """Wait for what is under way, but not for long."""
        if not self._tasks:
            return
        _, hanging = await asyncio.wait(self._tasks, timeout=CLEANUP_SECONDS)
        for task in hanging:
            task.cancel()

    def _discard_task(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.info("a hire for %s came to nothing: %s", self._model, explain(task.exception() or Exception()))

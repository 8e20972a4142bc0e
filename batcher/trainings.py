"""Starts a process for each training whose features are there, one at a time.

Run by `batcher/scheduler.py`. The process is `python -m trainer`; it claims the training, so of two batchers that start
one only one fits. It has limits and a low priority, gets no secrets, and ends with this process. One that ends too
early by itself is started again, and after some times the training fails; one that was killed with its batcher is
started again by the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from batcher.settings import BatcherTimings
from batcher.waiting import wait_for_first
from provider_image.subprocesses import child_environment, exit_description, module_command
from store.errors import StoreError
from store.trainings.records import TrainingState, UnknownTraining
from store.trainings.trainings import Trainings

log = logging.getLogger(__name__)

#: Libraries that compute with a thread for each core slow each other down, and the workers.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class TrainingRunner:
    """Fits trainings in child processes, see the module.

    :param environment: variables of the processes; they do not get the secrets in it.
    :param module: the program of the processes.
    """

    def __init__(
        self,
        trainings: Trainings,
        home: Path,
        environment: Mapping[str, str],
        *,
        module: str = "trainer",
        timings: BatcherTimings = BatcherTimings(),
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._trainings = trainings
        self._environment = {**child_environment(environment), **_ONE_THREAD, "MLG_HOME": str(home)}
        self._module = module
        self._timings = timings
        self._clock = clock

    async def run(self, stop: asyncio.Event) -> None:
        """Fit trainings as they become ready, until stopped."""
        while not stop.is_set():
            await self.run_ready(stop)
            await wait_for_first(stop.wait(), asyncio.sleep(self._timings.training_poll_seconds))

    async def run_ready(self, stop: asyncio.Event) -> None:
        """Fit the trainings that are ready, until there is none or until stopped."""
        while not stop.is_set():
            try:
                id = await asyncio.to_thread(self._find)
                if id is None:
                    return
                await self._fit(id, stop)
            except (StoreError, OSError) as error:
                log.warning("cannot train now, trying again: %s", error)
                return

    def _find(self) -> str | None:
        for id in self._trainings.release_lost():
            log.warning("the process of a training was killed, it is started again", extra={"training": id})
        return self._trainings.find_ready()

    async def _fit(self, id: str, stop: asyncio.Event) -> None:
        """Run the process of one training until it ends, is stopped, or has taken too long."""
        log.info("training begins", extra={"training": id})
        process = await asyncio.create_subprocess_exec(
            *module_command(self._module, id, "--parent", str(os.getpid())),
            stdin=asyncio.subprocess.DEVNULL,
            env=self._environment,
            # Ctrl-C reaches every process of the terminal's group; only the batcher must handle it.
            start_new_session=True,
        )
        began_at = time.monotonic()
        is_late = False
        try:
            while process.returncode is None and not stop.is_set():
                await wait_for_first(process.wait(), stop.wait(), timeout_seconds=self._timings.training_poll_seconds)
                is_late = time.monotonic() - began_at > self._timings.training_seconds
                if is_late or await asyncio.to_thread(self._has_ended, id):
                    break
        finally:
            is_killed = process.returncode is None
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            status = await process.wait()
        await asyncio.to_thread(self._trainings.release_lost)
        if is_late or (status != 0 and not is_killed):
            await asyncio.to_thread(self._count_failure, id, status, is_late=is_late)

    def _has_ended(self, id: str) -> bool:
        """Tell whether a training has ended or was deleted, so that its process has nothing to do any more."""
        try:
            state = self._trainings.get(id).state
        except UnknownTraining:
            return True
        except StoreError:
            return False  # it cannot be read now
        # The process itself ends a moment after it has recorded the end.
        return state is TrainingState.CANCELLED

    def _count_failure(self, id: str, status: int, *, is_late: bool) -> None:
        how = f"took longer than {self._timings.training_seconds:g} s" if is_late else exit_description(status)
        reason = (
            f"The process that trains the model {how}. The log of the batcher says more. Train with fewer examples, or "
            "on a machine with more memory."
        )
        log.warning("a training's process %s", how, extra={"training": id})
        is_last = is_late or status == -signal.SIGXCPU
        self._trainings.count_failure(id, reason=reason, now=self._clock(), is_last=is_last)

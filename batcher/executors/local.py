"""The local executor: warm worker processes on this machine.

Made by the registry. Each worker runs the same program as a provider and keeps running, so that a model is loaded once
and not per chunk. A worker that dies fails only its own chunk and is replaced immediately.

Weaknesses compared with other executors: it is as fast as this machine, and a worker may use all of its memory.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
import shutil
import socket
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batcher.backoff import Backoff
from batcher.executors import ExecutorContext, Job, Outcome
from batcher.executors.worker_process import WorkerProcess
from batcher.waiting import wait_for_first
from provider_image.chunk import ChunkItem, write_chunk
from provider_image.compiler import can_build_now
from provider_image.cores import default_processes, threads_per_process
from provider_image.environment import Settings, setting
from provider_image.errors import ChunkError, ChunkTimeout, MlgError, WorkerDied, error_from_reply
from provider_image.models.artefact import installed_digest
from provider_image.models.catalogue import ModelFacts
from provider_image.models.registry import list_rows
from provider_image.precision import FASTEST, PRECISIONS
from provider_image.runtime import default_net_bytes
from provider_image.schemas import MAX_CHUNK_SECONDS
from provider_image.service import Service, are_inputs, primary_input
from provider_image.services import load_service

log = logging.getLogger(__name__)

#: Jobs under way for each worker: one that it runs and one that is packed and queued, so that it never waits.
JOBS_PER_WORKER = 2
#: After this many failed starts in a row, and with no other worker running, queued jobs are ended.
MAX_FAILED_STARTS = 3
#: A grey image of one pixel, to load libraries and a model before the first request comes.
_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
)


@dataclass(frozen=True, kw_only=True, eq=False)
class _LocalQueuedJob:
    """A job that waits for a worker."""

    job: Job
    #: Set when the job is over; cancelled when the caller no longer waits.
    outcome: asyncio.Future[Outcome]


@dataclass(frozen=True, kw_only=True)
class LocalSettings(Settings):
    """Settings of the local executor."""

    #: Number of local worker processes, which share the cores, and of resizing processes.
    #: MLG_WORKERS. Defaults to the number of cores; over 8 cores, to fewer workers with several threads each.
    workers: int = setting("MLG_WORKERS", 1, unset=default_processes, minimum=1, maximum=256)
    #: Precision of local workers: f32, bf16, auto, which leaves it to the processor, or fastest, which takes the
    #: quickest of a model and its copies in other precisions that were judged on this processor.
    #: MLG_PRECISION. Defaults to f32.
    precision: str = setting("MLG_PRECISION", "f32", choices=(*PRECISIONS, FASTEST))
    #: Seconds that loading a model at the start may take, at least two minutes: MLG_CHUNK_TIMEOUT_SECONDS, because a
    #: chunk that has to load its model gets as long.
    warm_up_seconds: float = setting("MLG_CHUNK_TIMEOUT_SECONDS", 120.0, minimum=0.1, maximum=MAX_CHUNK_SECONDS)


@dataclass(frozen=True, kw_only=True)
class LocalTimings:
    """Limits of the local executor, in seconds. No settings; tests shorten them."""

    #: Pauses before a process that died without running a job is started again.
    restart_backoff: Backoff = Backoff(first_seconds=0.2, max_seconds=5.0)
    #: A worker that ran for this long started successfully, even if it had no job.
    stable_seconds: float = 5.0
    #: A worker must have warmed up within this time, or that of the settings, if it is longer.
    warm_up_seconds: float = 120.0
    #: A process must listen within this time after its start; importing takes a tenth of a second.
    start_seconds: float = 60.0
    #: One that was asked to end is killed after this time.
    stop_seconds: float = 2.0


class LocalExecutor:
    """See `batcher.executors.Executor`. Its workers get the context's environment."""

    name = "local"
    is_remote = False
    is_trusted = True

    def __init__(self, context: ExecutorContext, *, timings: LocalTimings = LocalTimings()) -> None:
        self._context = context
        self._settings = LocalSettings.from_env(context.environment)
        self._timings = timings
        self._provider = f"local/{socket.gethostname()}"
        # A unique name: several executors may share one folder.
        self._folder = context.work / f"local-{secrets.token_hex(3)}"
        self._options = ["--models", str(context.models), "--precision", self._settings.precision]
        self._options += ["--threads", str(threads_per_process(self._settings.workers))]
        self._options += ["--models-bytes", str(default_net_bytes(self._settings.workers))]
        self._queued_jobs: deque[_LocalQueuedJob] = deque()
        self._job_added = asyncio.Event()
        self._worker_loops: list[asyncio.Task[None]] = []
        self._workers: dict[int, WorkerProcess] = {}
        self._is_closed = False

    async def start(self) -> None:
        """Start the workers without waiting until they are ready."""
        self._folder.mkdir(parents=True, mode=0o700)
        self._worker_loops = [
            asyncio.create_task(self._worker_loop(number)) for number in range(self._settings.workers)
        ]

    def capacity(self, model: str) -> int:
        return JOBS_PER_WORKER * self._settings.workers

    def workers(self) -> int:
        return self._settings.workers

    def unavailable_reason(self, model: str) -> str | None:
        return None

    def pids(self) -> list[int]:
        """List the process ids of the workers that are ready."""
        return [worker.pid for worker in self._workers.values() if worker.pid is not None]

    async def run(self, job: Job) -> Outcome:
        if self._is_closed:
            return Outcome.not_run(WorkerDied("The executor is closed."))
        queued_job = _LocalQueuedJob(job=job, outcome=asyncio.get_running_loop().create_future())
        self._queued_jobs.append(queued_job)
        self._job_added.set()
        return await queued_job.outcome

    def stop_seconds(self) -> float:
        return self._timings.stop_seconds

    async def close(self) -> None:
        self._is_closed = True
        for worker_loop in self._worker_loops:
            worker_loop.cancel()
        await asyncio.gather(*self._worker_loops, return_exceptions=True)
        self._worker_loops = []
        self._fail_waiting("The executor is closed.")
        shutil.rmtree(self._folder, ignore_errors=True)

    # One loop per worker

    async def _worker_loop(self, number: int) -> None:
        """Run one worker, and replace it when it ends, until cancelled."""
        loop = asyncio.get_running_loop()
        pauses, failed_starts = 0, 0
        while not self._is_closed:
            folder = self._folder / str(number)
            worker = WorkerProcess(number, folder, self._options, self._context.environment, self._timings)
            started_at, was_useful, has_started = loop.time(), False, False
            try:
                try:
                    await worker.start()
                    self._workers[number], has_started = worker, True
                    failed_starts = 0
                    await self._warm_up(worker)
                    while await self._run_job(worker, await self._next_job(worker)):
                        was_useful = True
                    was_useful = True  # a chunk ended it, so the next start needs no pause
                finally:
                    self._workers.pop(number, None)
                    await worker.stop(is_forced=not self._is_closed)
            except Exception as error:
                if isinstance(error, WorkerDied):
                    log.warning("worker %d: %s", number, error)
                else:
                    # A bug here may end a process, but never the loop: queued jobs would wait for ever.
                    log.exception("worker %d failed, it is started again", number)
                failed_starts += not has_started
                if failed_starts >= MAX_FAILED_STARTS and not self._workers:
                    self._fail_waiting(f"No worker process can be started, see the batcher's log. {error}")
            if was_useful or loop.time() - started_at > self._timings.stable_seconds:
                pauses = 0
            else:
                pauses += 1
                await asyncio.sleep(self._timings.restart_backoff.after(pauses))

    async def _next_job(self, worker: WorkerProcess) -> _LocalQueuedJob:
        """Wait for a job. :raises WorkerDied: the worker ended while it was idle."""
        while not worker.has_ended:
            if self._queued_jobs:
                return self._queued_jobs.popleft()
            self._job_added.clear()
            await wait_for_first(self._job_added.wait(), worker.wait())
        raise WorkerDied("It ended while it was idle.")

    async def _run_job(self, worker: WorkerProcess, queued_job: _LocalQueuedJob) -> bool:
        """Run one job, unless it was cancelled. :return: whether the worker can go on."""
        job, outcome, loop = queued_job.job, queued_job.outcome, asyncio.get_running_loop()
        if outcome.done():
            return True
        started_at = loop.time()
        running = asyncio.create_task(worker.run_chunk(job.chunk, job.results, job.on_progress))
        waits: set[asyncio.Future[Any]] = {running, outcome}
        error: MlgError | None = None
        can_go_on = False
        try:
            if job.on_start is not None:
                job.on_start()
            await asyncio.wait(waits, timeout=job.timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                reply = running.result()
                error = None if reply.get("ok") is True else error_from_reply(reply)
                can_go_on = True
            else:
                error = ChunkTimeout(
                    f"The chunk took longer than {job.timeout_seconds:g} s, so its worker was stopped."
                )
        except WorkerDied as died:
            error = died
        except asyncio.CancelledError:
            if not outcome.done():
                outcome.set_result(Outcome.not_run(WorkerDied("The executor was closed.")))
            raise
        except Exception as unexpected:
            log.exception("worker %d failed", worker.number, extra={"chunk_id": job.chunk_id})
            error = ChunkError(f"{type(unexpected).__name__}: {unexpected}")
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        if outcome.done():
            log.info("worker %d: its chunk was cancelled", worker.number, extra={"chunk_id": job.chunk_id})
            return can_go_on
        # A worker that was asked to stop replies so; only one that died during a chunk makes its items suspicious.
        is_blameless = can_go_on and isinstance(error, WorkerDied)
        if not can_go_on:
            log.warning("worker %d: %s", worker.number, error, extra={"chunk_id": job.chunk_id})
        seconds = loop.time() - started_at
        outcome.set_result(Outcome(provider=self._provider, seconds=seconds, error=error, is_blameless=is_blameless))
        return can_go_on

    # Warming up, ending queued jobs

    async def _warm_up(self, worker: WorkerProcess) -> None:
        """Classify one pixel, so that libraries and a model are loaded when the first request comes."""
        chunk, results = (self._folder / f"warm-up-{worker.number}-{kind}.zip" for kind in ("chunk", "results"))
        try:
            row = _guess_first_model(self._context.models)
            if row is None or self._queued_jobs:
                return
            item = ChunkItem(number=0, inputs={primary_input(load_service(row.service)): _PIXEL})
            await asyncio.to_thread(write_chunk, chunk, "warm-up", row.service, row.name, None, [item])
            # Not wait_for: before Python 3.12 it can swallow a cancellation.
            async with asyncio.timeout(max(self._timings.warm_up_seconds, self._settings.warm_up_seconds)):
                reply = await worker.run_chunk(chunk, results)
        except TimeoutError as error:
            raise WorkerDied("It did not warm up in time.") from error
        except WorkerDied:
            raise
        except Exception as error:  # noqa: BLE001 - it may still be able to run chunks of other models
            log.warning("worker %d could not warm up: %s: %s", worker.number, type(error).__name__, error)
        else:
            if reply.get("ok") is not True:
                log.warning("worker %d could not warm up: %s", worker.number, reply.get("reason"))
        finally:
            for path in (chunk, results):
                path.unlink(missing_ok=True)

    def _fail_waiting(self, reason: str) -> None:
        while self._queued_jobs:
            outcome = self._queued_jobs.popleft().outcome
            if not outcome.done():
                outcome.set_result(Outcome.not_run(WorkerDied(reason)))


def _guess_first_model(models: Path) -> ModelFacts | None:
    """Guess which model of an image is used first: an installed one, else one that can be built."""
    known = [row for row in list_rows(models) if _takes_one_image(load_service(row.service))]
    installed = (row for row in known if installed_digest(models, row.name) is not None)
    return next(installed, next((row for row in known if can_build_now(row)), None))


def _takes_one_image(service: Service) -> bool:
    first = primary_input(service)
    return service.inputs[first].kind == "image" and are_inputs(service, [first])

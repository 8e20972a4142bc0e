"""The local executor: warm worker processes on this machine.

Made by the registry. Each worker runs the same program as a provider and keeps running, so that a model is loaded once
and not per chunk. It gets the next chunk while it runs one, and begins it at once when that has ended; until then a
worker without work may take it over. A worker with several threads runs two chunks at a time, so that no thread waits
for the last items of one. A worker that dies fails only its own chunk and is replaced immediately; if it ran others at
the same time, each is run again alone, so that no item is blamed for another.

Weaknesses compared with other executors: it is as fast as this machine, and a worker may use all of its memory.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import re
import secrets
import shutil
import socket
import subprocess
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batcher.backoff import Backoff
from batcher.executors import ExecutorContext, Job, Outcome
from batcher.executors.worker_jobs import LocalQueuedJob, WorkerJobs
from batcher.executors.worker_process import WorkerProcess
from batcher.waiting import wait_for_first
from provider_image.backends import GPU
from provider_image.chunk import ChunkItem, write_chunk
from provider_image.compiler import can_build_now
from provider_image.cores import Share, default_processes, divide_cores, format_cores
from provider_image.environment import Settings, setting
from provider_image.errors import ChunkError, ChunkTimeout, ConfigError, MlgError, WorkerDied, error_from_reply
from provider_image.models.artefact import installed_digest
from provider_image.models.catalogue import ModelFacts
from provider_image.models.registry import list_rows
from provider_image.precision import FASTEST, PRECISIONS
from provider_image.runtime import default_net_bytes
from provider_image.schemas import MAX_CHUNK_SECONDS, MAX_ITEMS
from provider_image.service import Service, are_inputs, primary_input
from provider_image.services import load_service
from provider_image.subprocesses import child_environment, exit_description, module_command

log = logging.getLogger(__name__)

#: Jobs under way for each that a worker runs: that one, and one that it has ahead or that is packed and queued.
JOBS_PER_SLOT = 2
#: Chunks that a worker with several threads has at the same time.
_SHARED_CHUNKS = 2
#: A device must answer within this time; loading CUDA for the first time takes several seconds.
_DEVICE_SECONDS = 120.0
#: After this many failed starts in a row, and with no other worker running, queued jobs are ended.
MAX_FAILED_STARTS = 3
#: A grey image of one pixel, to load libraries and a model before the first request comes.
_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
)


def _parse_devices(variable: str, text: str) -> str:
    """Read MLG_DEVICE. :raises ConfigError: it names something else, or a GPU twice."""
    names = [name.strip() for name in text.lower().split(",")]
    if names != ["cpu"] and not all(re.fullmatch(f"{GPU}[0-9]{{1,3}}", name) for name in names):
        raise ConfigError(f"{variable}={text!r} is unknown. Use cpu, or GPUs such as {GPU}0 or {GPU}0,{GPU}1.")
    if len(set(names)) < len(names):
        raise ConfigError(f"{variable}={text!r} names a GPU twice.")
    return ",".join(names)


@dataclass(frozen=True, kw_only=True)
class LocalSettings(Settings):
    """Settings of the local executor."""

    #: Number of local worker processes, which share the cores, and of resizing processes.
    #: MLG_WORKERS. Defaults to the number of cores that the machine or the container has; over 8 cores, and with less
    #: than 512 MB of memory for each, to fewer workers with several threads each.
    workers: int = setting("MLG_WORKERS", 1, unset=default_processes, minimum=1, maximum=256)
    #: Where models for onnxruntime run: cpu, a GPU such as cuda:0, or several such as cuda:0,cuda:1. With GPUs there is
    #: one local worker for each, with a part of the cores, and MLG_WORKERS counts for resizing only. MLG_DEVICE.
    #: Defaults to cpu.
    device: str = setting("MLG_DEVICE", "cpu", parse=_parse_devices)
    #: Images that a GPU gets at once. MLG_BATCH_ITEMS. Defaults to 32.
    batch_items: int = setting("MLG_BATCH_ITEMS", 32, minimum=1, maximum=1024)
    #: Precision of local workers: f32, bf16, auto, which leaves it to the processor, or fastest, which takes the
    #: quickest of a model and its copies in other precisions that were judged on this processor.
    #: MLG_PRECISION. Defaults to f32.
    precision: str = setting("MLG_PRECISION", "f32", choices=(*PRECISIONS, FASTEST))
    #: Seconds that loading a model at the start may take, at least two minutes: MLG_CHUNK_TIMEOUT_SECONDS, because a
    #: chunk that has to load its model gets as long.
    warm_up_seconds: float = setting("MLG_CHUNK_TIMEOUT_SECONDS", 120.0, minimum=0.1, maximum=MAX_CHUNK_SECONDS)

    @property
    def gpus(self) -> list[str]:
        """The GPUs on which models for onnxruntime run."""
        return [] if self.device == "cpu" else self.device.split(",")

    @property
    def processes(self) -> int:
        """Number of local worker processes."""
        return len(self.gpus) or self.workers


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
        processes = self._settings.processes
        self._options = ["--models", str(context.models), "--precision", self._settings.precision]
        self._options += ["--models-bytes", str(default_net_bytes(processes))]
        self._shares = divide_cores(processes)
        #: How many jobs each worker runs at the same time.
        self._slots = _SHARED_CHUNKS if max(share.threads for share in self._shares) > 1 else 1
        if self._settings.gpus:
            # Enough for a batch that runs, one that is ready, and images that are being decoded.
            self._slots = _SHARED_CHUNKS + math.ceil(2 * self._settings.batch_items / MAX_ITEMS)
            self._options += ["--batch-items", str(self._settings.batch_items)]
        self._options += ["--chunks", str(self._slots)]
        self._queued_jobs: deque[LocalQueuedJob] = deque()
        self._job_added = asyncio.Event()
        self._worker_loops: list[asyncio.Task[None]] = []
        self._workers: dict[int, WorkerProcess] = {}
        #: What the workers run that have warmed up.
        self._worker_jobs: dict[int, WorkerJobs] = {}
        self._is_closed = False

    async def start(self) -> None:
        """Start the workers without waiting until they are ready. :raises ConfigError: a GPU cannot be used."""
        if self._settings.gpus:
            environment = child_environment(self._context.environment)
            await asyncio.gather(
                *(asyncio.to_thread(_require_device, name, environment) for name in self._settings.gpus)
            )
        self._folder.mkdir(parents=True, mode=0o700)
        self._worker_loops = [
            asyncio.create_task(self._worker_loop(number)) for number in range(self._settings.processes)
        ]

    def has_quick_transfers(self, model: str) -> bool:
        return True

    def capacity(self, model: str) -> int:
        return JOBS_PER_SLOT * self.workers()

    def workers(self) -> int:
        return self._slots * self._settings.processes

    def unavailable_reason(self, model: str) -> str | None:
        return None

    def pids(self) -> list[int]:
        """List the process ids of the workers that are ready."""
        return [worker.pid for worker in self._workers.values() if worker.pid is not None]

    async def run(self, job: Job) -> Outcome:
        if self._is_closed:
            return Outcome.not_run(WorkerDied("The executor is closed."))
        queued_job = LocalQueuedJob(job=job, outcome=asyncio.get_running_loop().create_future())
        self._queued_jobs.append(queued_job)
        self._notify()
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
            options = [*self._options, *_share_options(self._shares[number])]
            if self._settings.gpus:
                options += ["--device", self._settings.gpus[number]]
            worker = WorkerProcess(number, folder, options, self._context.environment, self._timings)
            jobs, started_at, has_started = WorkerJobs(self._slots), loop.time(), False
            try:
                try:
                    await worker.start()
                    self._workers[number], has_started = worker, True
                    failed_starts = 0
                    await self._warm_up(worker)
                    self._worker_jobs[number] = jobs
                    await self._run_jobs(worker, jobs)
                finally:
                    self._workers.pop(number, None)
                    self._worker_jobs.pop(number, None)
                    self._notify()  # others may have left jobs to this worker
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
            if jobs.was_useful or loop.time() - started_at > self._timings.stable_seconds:
                pauses = 0
            else:
                pauses += 1
                await asyncio.sleep(self._timings.restart_backoff.after(pauses))

    async def _run_jobs(self, worker: WorkerProcess, jobs: WorkerJobs) -> None:
        """Run jobs, several at a time, until one ends the worker. :raises WorkerDied: it ended while it was idle."""
        loop = asyncio.get_running_loop()

        async def run_in_turn() -> None:
            while (queued_job := await self._next_job(worker, jobs)) is not None:
                jobs.add(queued_job, loop.time())
                self._notify()  # another worker may take the next one, now that this is not idle
                try:
                    if not await self._run_job(worker, jobs, queued_job):
                        return
                finally:
                    jobs.remove(queued_job, loop.time())
                    self._notify()  # it may have kept others from being taken

        # One more than it runs, for the job that it has ahead.
        slots = [asyncio.create_task(run_in_turn()) for _ in range(self._slots + 1)]
        try:
            await asyncio.wait(slots, return_when=asyncio.FIRST_COMPLETED)
            jobs.is_ending = True
            worker.kill()  # the other jobs end with WorkerDied, and are queued again
            for error in await asyncio.gather(*slots, return_exceptions=True):
                if isinstance(error, Exception) and not isinstance(error, WorkerDied):
                    raise error
            if all(slot.exception() is not None for slot in slots):
                raise WorkerDied("It ended while it was idle.")
        finally:
            for slot in slots:
                slot.cancel()
            await asyncio.gather(*slots, return_exceptions=True)

    async def _next_job(self, worker: WorkerProcess, jobs: WorkerJobs) -> LocalQueuedJob | None:
        """Wait for a job; None if the worker takes no more. :raises WorkerDied: it ended while it was idle."""
        while not worker.has_ended:
            if jobs.is_ending:
                return None
            while self._queued_jobs and self._queued_jobs[0].outcome.done():
                self._queued_jobs.popleft()  # it was cancelled
            # What others have ahead is older than what is queued, and is then queued again before it.
            comes_back = jobs.has_free_slot and any(each.take_back() for each in self._worker_jobs.values())
            if self._queued_jobs and not comes_back:
                able = [each for each in (jobs, *self._worker_jobs.values()) if each.may_take(self._queued_jobs[0])]
                if jobs in able and len(jobs) <= min(map(len, able)):
                    return self._queued_jobs.popleft()
            await wait_for_first(self._job_added.wait(), worker.wait())
        raise WorkerDied("It ended while it was idle.")

    def _notify(self) -> None:
        """Let all that wait for a job look again."""
        self._job_added.set()
        self._job_added = asyncio.Event()

    async def _run_job(self, worker: WorkerProcess, jobs: WorkerJobs, queued_job: LocalQueuedJob) -> bool:
        """Give the worker a job, and wait for its end or until nobody waits for it.

        :return: whether the worker can go on.
        """
        job, outcome, loop = queued_job.job, queued_job.outcome, asyncio.get_running_loop()

        def begin() -> None:
            jobs.begin(queued_job, loop.time())
            self._notify()  # now the worker may get one ahead
            if job.on_start is not None:
                job.on_start()

        running = asyncio.create_task(worker.run_chunk(job.chunk, job.results, job.on_progress, begin))
        queued_job.reply = running
        waits: set[asyncio.Future[Any]] = {running, outcome}
        error: MlgError | None = None
        can_go_on = False
        try:
            while (left := queued_job.started_at + job.timeout_seconds - loop.time()) > 0:
                timeout = min(left, job.timeout_seconds)  # its time may begin meanwhile
                if (await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED))[0]:
                    break
            if running.cancelled():
                can_go_on = True
            elif running.done():
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
            queued_job.reply = None
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        has_begun = math.isfinite(queued_job.begun_at)
        if outcome.done():
            log.info("worker %d: its chunk was cancelled", worker.number, extra={"chunk_id": job.chunk_id})
            return can_go_on or not has_begun
        was_taken_back = running.cancelled() and can_go_on
        queued_job.unbegun += not can_go_on and not has_begun
        is_untried = not has_begun and queued_job.unbegun < MAX_FAILED_STARTS
        was_innocent = queued_job.was_shared or queued_job.has_ended or is_untried
        if was_taken_back or (not can_go_on and was_innocent):
            # The worker did not begin it, or another job may be why it failed. What is run alone and fails again has
            # failed by itself.
            queued_job.must_be_alone |= queued_job.was_shared and not queued_job.has_ended
            self._queued_jobs.appendleft(queued_job)
            self._notify()
            return can_go_on
        # A worker that was asked to stop replies so; only one that died during a chunk makes its items suspicious.
        is_blameless = isinstance(error, WorkerDied) if can_go_on else not has_begun
        if not can_go_on:
            log.warning("worker %d: %s", worker.number, error, extra={"chunk_id": job.chunk_id})
        seconds = loop.time() - queued_job.begun_at if has_begun else 0.0
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


def _require_device(name: str, environment: Mapping[str, str]) -> None:
    """Try a device in a process of its own. :raises ConfigError: it cannot be used."""
    command = module_command("provider_image", "device", name)
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_DEVICE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"The device {name} cannot be used: it did not answer in {_DEVICE_SECONDS:g} s.") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [exit_description(done.returncode)]
        raise ConfigError(lines[-1].removeprefix("Error: "))


def _share_options(share: Share) -> list[str]:
    cores = [] if share.cores is None else ["--cores", format_cores(share.cores)]
    return ["--threads", str(share.threads), *cores]


def _guess_first_model(models: Path) -> ModelFacts | None:
    """Guess which model of an image is used first: an installed one, else one that can be built."""
    known = [row for row in list_rows(models) if _takes_one_image(load_service(row.service))]
    installed = (row for row in known if installed_digest(models, row.name) is not None)
    return next(installed, next((row for row in known if can_build_now(row)), None))


def _takes_one_image(service: Service) -> bool:
    first = primary_input(service)
    return service.inputs[first].kind == "image" and are_inputs(service, [first])

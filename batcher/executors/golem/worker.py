"""One worker: a provider's activity, from its first command to its last.

Run by `worker_pool.py` when yapapi has an agreement and an activity. Deploys, then runs chunk after chunk from the job
queue until it is idle for too long, something fails, or it is stopped. It always stops after a failure: the state
of a failed activity is unknown, and further scripts would only queue behind the failed one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from batcher.errors import GolemUnavailable
from batcher.executors import Outcome
from batcher.executors.golem.job_queue import JobQueue, QueuedJob
from batcher.executors.golem.offers import Price
from batcher.executors.golem.settings import GolemSettings
from batcher.executors.golem.timeouts import chunk_timeout, idle_seconds, straggler_seconds
from batcher.executors.golem.yapapi_adapter import explain
from provider_image.errors import ChunkTimeout, MalformedResults, MlgError, WorkerDied

log = logging.getLogger(__name__)

#: Paths in the provider's container. They are the same for each chunk, so that its disk does not fill.
_CHUNK, _RESULTS = "/golem/input/chunk.zip", "/golem/output/results.zip"
#: An HTTP call can hang beyond the script's own timeout; the worker is then stopped this much later.
_OVERTIME_SECONDS = 10.0
#: A larger results file is rejected.
_MAX_RESULTS_BYTES = 64 * 1024 * 1024
#: Longest wait for work before the state is checked again.
_IDLE_POLL_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class AttemptFailure:
    """Why an attempt failed."""

    error: MlgError
    #: True when the provider is at fault, or may be.
    is_provider_fault: bool
    #: True when the local file server can no longer be used.
    is_file_server_fault: bool = False


@dataclass(kw_only=True, eq=False)
class GolemWorker:
    """A provider's activity that runs chunks, and its costs."""

    model: str
    provider_id: str
    provider_name: str
    agreement_id: str
    activity_id: str
    price: Price
    created_at: datetime
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    #: Seconds that the start took; None until it is ready.
    start_seconds: float | None = None
    #: The job under way, and its deadline on the monotonic clock.
    queued_job: QueuedJob | None = None
    deadline: float | None = None
    #: Cost attributed to its chunks so far, in GLM.
    attributed_cost: Decimal = Decimal(0)
    chunks: int = 0
    #: True: it takes no further chunk. Set: it ends immediately.
    is_stopping: bool = False
    abort: asyncio.Event = field(default_factory=asyncio.Event)

    def seconds(self) -> float:
        """Return how long it has been running, or ran."""
        return (self.ended if self.ended is not None else time.monotonic()) - self.started

    def max_cost(self) -> Decimal:
        """Return the most that it can cost so far, if the job under way takes until its deadline."""
        committed_seconds = 0.0 if self.deadline is None or self.ended is not None else self.deadline - time.monotonic()
        return self.price.max_cost(self.seconds() + max(0.0, committed_seconds))

    def attribute_cost(self) -> Decimal:
        """Return the cost since the previous chunk, which is attributed to the chunk that ends now."""
        total = self.price.max_cost(self.seconds())
        part, self.attributed_cost = total - self.attributed_cost, total
        return part


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """What a worker needs of the executor, and the callbacks for its events."""

    settings: GolemSettings
    job_queue: JobQueue
    #: Folder for downloaded files.
    folder: Path
    #: Returns a worker's images per second; None if unknown.
    speed: Callable[[GolemWorker], float | None]
    #: Returns why this much more GLM cannot be spent; None if it can.
    over_budget_reason: Callable[[Decimal], str | None]
    #: Returns whether an idle worker is kept, as one of the minimum of its model.
    is_retained: Callable[[GolemWorker], bool]
    #: Called when a worker is ready, when a chunk is answered, and when a start or a chunk fails after some seconds.
    on_ready: Callable[[GolemWorker], None]
    on_done: Callable[[GolemWorker, QueuedJob, Outcome], None]
    on_failed: Callable[[GolemWorker, QueuedJob | None, AttemptFailure, float], None]


async def run_worker(
    engine: Any, job_id: str, yapapi_context: Any, worker: GolemWorker, worker_context: WorkerContext
) -> None:
    """Run a worker to its end, with all its callbacks. Raises nothing but cancellation.

    :param job_id: of the yapapi job.
    :param yapapi_context: yapapi's WorkContext.
    """
    scripts = _scripts(yapapi_context, worker, worker_context)
    batches = asyncio.create_task(_process(engine, job_id, yapapi_context, scripts))
    aborting = asyncio.create_task(worker.abort.wait())
    started_at = time.monotonic()
    try:
        while not batches.done():
            wait = _IDLE_POLL_SECONDS
            if worker.deadline is not None:
                wait = min(wait, max(0.05, worker.deadline + _OVERTIME_SECONDS - time.monotonic()))
            await asyncio.wait({batches, aborting}, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
            if batches.done():
                break
            if worker.abort.is_set():
                break
            if worker.deadline is not None and time.monotonic() >= worker.deadline + _OVERTIME_SECONDS:
                late = ChunkTimeout("The provider does not respond.")
                queued_job = worker.queued_job
                if queued_job is not None:
                    _finish_attempt(worker, queued_job, worker_context)
                worker_context.on_failed(
                    worker,
                    queued_job,
                    AttemptFailure(error=late, is_provider_fault=True),
                    time.monotonic() - started_at,
                )
                break
    finally:
        was_aborted = worker.abort.is_set()
        worker.is_stopping = True
        aborting.cancel()
        batches.cancel()
        # A call that hangs is not waited for: its response is not needed.
        await asyncio.wait({batches, aborting}, timeout=2)
        worker.ended = time.monotonic()
        queued_job = worker.queued_job
        worker.deadline = None
        if queued_job is not None:
            _finish_attempt(worker, queued_job, worker_context)
        error = None
        if batches.done() and not batches.cancelled():
            error = batches.exception()
        if queued_job is not None or error is not None:
            reason = explain(error) if error is not None else "it was stopped"
            # Stopped because a second attempt, begun later, was faster: this provider hangs or is far too slow.
            is_superseded = (
                queued_job is not None
                and queued_job.outcome.done()
                and not queued_job.outcome.cancelled()
                and was_aborted
            )
            stopped = AttemptFailure(error=WorkerDied(f"The worker ended: {reason}."), is_provider_fault=is_superseded)
            worker_context.on_failed(worker, queued_job, stopped, 0.0)


async def _process(engine: Any, job_id: str, yapapi_context: Any, scripts: AsyncGenerator[Any, Any]) -> None:
    try:
        await engine.process_batches(job_id, yapapi_context._agreement.id, yapapi_context._activity, scripts)
    except StopAsyncIteration:
        return  # how yapapi reports that there are no more scripts
    finally:
        await scripts.aclose()


async def _scripts(yapapi_context: Any, worker: GolemWorker, worker_context: WorkerContext) -> AsyncGenerator[Any, Any]:
    """Yield script after script to yapapi, which throws their errors into this generator."""
    started_at = time.monotonic()
    script = yapapi_context.new_script(timeout=timedelta(seconds=worker_context.settings.start_seconds))
    script.deploy()
    script.start()
    worker.deadline = started_at + worker_context.settings.start_seconds
    try:
        yield script
    except Exception as error:
        worker.deadline = None
        worker_context.on_failed(worker, None, _classify_error(error, "start"), time.monotonic() - started_at)
        return
    worker.deadline = None
    worker.start_seconds = time.monotonic() - started_at
    worker_context.on_ready(worker)
    while True:
        queued_job = await _next_job(worker, worker_context)
        if queued_job is None:
            return
        started_at = time.monotonic()
        received = worker_context.folder / f"{worker.activity_id[:8]}-{worker.chunks}.part"
        try:
            yield _script(yapapi_context, worker, queued_job, received)
            await asyncio.to_thread(_accept_results, received, queued_job)
        except Exception as error:
            _finish_attempt(worker, queued_job, worker_context)
            worker_context.on_failed(
                worker, queued_job, _classify_error(error, "run the chunk"), time.monotonic() - started_at
            )
            return
        finally:
            received.unlink(missing_ok=True)  # also when the worker is stopped
        _finish_attempt(worker, queued_job, worker_context)
        worker.chunks += 1
        worker_context.on_done(worker, queued_job, _outcome(worker, time.monotonic() - started_at))


async def _next_job(worker: GolemWorker, worker_context: WorkerContext) -> QueuedJob | None:
    """Wait for the next job; None when the worker should end."""
    idle_since = time.monotonic()
    start_seconds = worker.start_seconds or 0.0
    max_idle_seconds = idle_seconds(
        worker.price, start_seconds=start_seconds, max_seconds=worker_context.settings.idle_seconds
    )
    while not worker.is_stopping:
        queued_job = worker_context.job_queue.pop(worker.model, worker.provider_id)
        is_second_attempt = queued_job is None
        queued_job = queued_job or worker_context.job_queue.straggler(worker.model, worker.provider_id)
        if queued_job is not None:
            speed = worker_context.speed(worker)
            seconds = chunk_timeout(
                items=queued_job.job.items,
                # Not in a thread: a cancellation between removing the job and returning it would lose it.
                size_bytes=queued_job.job.chunk.stat().st_size,
                images_per_second=speed,
                max_seconds=queued_job.job.timeout_seconds,
            )
            if worker_context.over_budget_reason(worker.price.max_cost_per_second * Decimal(repr(seconds))) is not None:
                # The executor ends all queued jobs with the reason, this one included.
                if not is_second_attempt:
                    worker_context.job_queue.put(queued_job, is_retry=True)
                return None
            _start_attempt(
                worker,
                queued_job,
                worker_context,
                seconds,
                straggler_seconds(items=queued_job.job.items, images_per_second=speed),
            )
            return queued_job
        if time.monotonic() - idle_since > max_idle_seconds and not worker_context.is_retained(worker):
            return None
        await worker_context.job_queue.wait_for_change(min(_IDLE_POLL_SECONDS, max(0.05, max_idle_seconds)))
    return None


def _start_attempt(
    worker: GolemWorker,
    queued_job: QueuedJob,
    worker_context: WorkerContext,
    seconds: float,
    straggler_after: float | None,
) -> None:
    now = time.monotonic()
    worker.queued_job, worker.deadline = queued_job, now + seconds
    straggler_at = None if straggler_after is None else now + straggler_after
    worker_context.job_queue.start_attempt(
        queued_job, worker.provider_id, stop=worker.abort.set, straggler_at=straggler_at
    )
    if queued_job.job.on_start is not None:
        queued_job.job.on_start()


def _finish_attempt(worker: GolemWorker, queued_job: QueuedJob, worker_context: WorkerContext) -> None:
    worker.queued_job = worker.deadline = None
    worker_context.job_queue.finish_attempt(queued_job, worker.provider_id)


def _script(yapapi_context: Any, worker: GolemWorker, queued_job: QueuedJob, received: Path) -> Any:
    left = (worker.deadline or time.monotonic()) - time.monotonic()
    script = yapapi_context.new_script(timeout=timedelta(seconds=max(0.1, left)))
    script.upload_file(str(queued_job.job.chunk), _CHUNK)
    script.run("/usr/local/bin/mlg-provider", "run", _CHUNK, _RESULTS)
    script.download_file(_RESULTS, str(received))
    return script


def _accept_results(received: Path, queued_job: QueuedJob) -> None:
    """Check a downloaded results file and move it to its place. :raises MlgError: it does not answer this chunk."""
    size = received.stat().st_size
    if size > _MAX_RESULTS_BYTES:
        raise MalformedResults(f"The results file has {size} bytes, more than the {_MAX_RESULTS_BYTES} allowed.")
    if queued_job.job.check is not None:
        queued_job.job.check(received)
    if not queued_job.outcome.done():  # otherwise another attempt was faster
        received.replace(queued_job.job.results)


def _outcome(worker: GolemWorker, seconds: float) -> Outcome:
    return Outcome(
        provider=worker.provider_name,
        seconds=seconds,
        cost=f"{worker.attribute_cost():f}",
        provider_id=worker.provider_id,
        agreement_id=worker.agreement_id,
        activity_id=worker.activity_id,
    )


def _classify_error(error: Exception, what: str) -> AttemptFailure:
    """Return what an exception of yapapi means, and whose fault it is.

    :param what: the step that failed, as a verb.
    """
    name = type(error).__name__
    if isinstance(error, MlgError):
        return AttemptFailure(error=error, is_provider_fault=True)
    if name == "BatchTimeoutError":
        return AttemptFailure(error=ChunkTimeout(f"The provider did not {what} in time."), is_provider_fault=True)
    if name == "CommandExecutionError":
        message = " ".join(f"{getattr(error, 'message', '') or ''} {getattr(error, 'stderr', '') or ''}".split())
        return AttemptFailure(
            error=WorkerDied(f"The provider could not {what}: {message[:400]}"), is_provider_fault=True
        )
    if name == "BatchError":
        parts = " ".join(str(each) for each in error.args if each)
        return AttemptFailure(
            error=WorkerDied(f"The provider ended the activity: {parts[:300]}"), is_provider_fault=True
        )
    if name in ("ProtocolError", "TransportError", "JSONDecodeError", "BrokenPipeError") or "gftp" in str(error):
        broken = GolemUnavailable(f"The file server gftp failed: {explain(error)}. It is restarted.")
        return AttemptFailure(error=broken, is_provider_fault=False, is_file_server_fault=True)
    if isinstance(error, OSError) and getattr(error, "filename", None):
        return AttemptFailure(
            error=MalformedResults(f"The results file was not downloaded: {error.strerror}."), is_provider_fault=True
        )
    return AttemptFailure(
        error=GolemUnavailable(f"A call to the Golem daemon failed: {explain(error)}."), is_provider_fault=False
    )

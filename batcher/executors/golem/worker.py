"""One worker: a provider's activity, from its first command to its last.

Run by `worker_pool.py` when yapapi has an agreement and an activity. Deploys, then runs chunk after chunk from the job
queue until it is idle for too long, something fails, or it is stopped. It always stops after a failure: the state
of a failed activity is unknown, and further scripts would only queue behind the failed one.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batcher.errors import BudgetReached, GolemUnavailable, UntrueResults
from batcher.executors import AttemptBill, Outcome
from batcher.executors.golem.job_queue import QueuedJob
from batcher.executors.golem.money import Reservation
from batcher.executors.golem.offers import THREADS
from batcher.executors.golem.timings import idle_seconds
from batcher.executors.golem.yapapi_adapter import explain, stop_receiving
from provider_image.errors import ChunkTimeout, MalformedResults, MlgError, WorkerDied
from store.errors import StoreError
from store.rentals.ledger import ActivityRecord

if TYPE_CHECKING:
    from batcher.executors.golem.worker_pool import PublishedDemand, WorkerPool

log = logging.getLogger(__name__)

#: Paths in the provider's container. They are the same for each chunk, so that its disk does not fill.
_CHUNK, _RESULTS = "/golem/input/chunk.zip", "/golem/output/results.zip"
#: A larger results file is rejected.
_MAX_RESULTS_BYTES = 64 * 1024 * 1024
_COPY_BYTES = 1024 * 1024
#: Limit for attempts of any kind, those that failed through this machine or the daemon included.
_MAX_ATTEMPTS = 10
#: What yapapi raises when it cannot make sense of what the daemon returned, which may be what the provider sent.
_UNREADABLE = (AssertionError, AttributeError, LookupError, TypeError, ValueError)
#: How long a call that hangs is waited for when the worker ends.
_HANGING_SECONDS = 2.0


def elapsed() -> float:
    """Return seconds on the clock by which agreements run.

    It goes on while this machine is suspended, as the provider's does, and setting the system's time does not move it.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, kw_only=True)
class AttemptFailure:
    """Why an attempt failed."""

    error: MlgError
    #: True when the provider is at fault, or may be.
    is_provider_fault: bool
    #: True when the local file server can no longer be used.
    is_file_server_fault: bool = False
    #: True when the daemon responds, but its call for the activity failed: its own fault, or what the provider sent it.
    is_unclear: bool = False


class GolemWorker:
    """A provider's activity that runs chunks, and its costs.

    :param demand: its agreement expires with that.
    :param yapapi_context: yapapi's WorkContext.
    :param reservation: of its agreement, which is committed.
    """

    def __init__(
        self, pool: WorkerPool, demand: PublishedDemand, yapapi_context: Any, reservation: Reservation
    ) -> None:
        assert reservation.agreement is not None and reservation.price is not None, "it is not committed"
        self.model = pool.model
        self.demand = demand
        self.provider_id: str = yapapi_context.provider_id
        self.provider_name = reservation.agreement.provider_name
        self.agreement_id: str = yapapi_context._agreement.id
        self.activity_id: str = yapapi_context.id
        self.price = reservation.price
        self.reservation = reservation
        self.created_at = datetime.now(UTC)
        #: Seconds that the start took; None until it is ready.
        self.start_seconds: float | None = None
        #: The job under way.
        self.queued_job: QueuedJob | None = None
        self.chunks = 0
        #: True: it takes no further chunk.
        self.is_stopping = False
        #: Set: it ends immediately.
        self.abort = asyncio.Event()
        self._pool = pool
        self._parts = pool.parts
        self._timings = pool.parts.timings
        self._yapapi_context = yapapi_context
        self._started = elapsed()
        self._ended: float | None = None
        #: For how long idling is paid for at a time, in seconds: this limit lets a small budget keep workers at all.
        self._cover_seconds = min(self._timings.cover_seconds, pool.parts.settings.start_seconds)
        #: Where the results of the job under way arrive.
        self._received: Path | None = None
        #: Of the start or the job under way, on the monotonic clock.
        self._deadline: float | None = None
        #: Cost attributed to its chunks so far.
        self._attributed_cost = Decimal(0)

    def seconds(self) -> float:
        """Return how long it has been running, or ran."""
        return (self._ended if self._ended is not None else elapsed()) - self._started

    def is_idle(self) -> bool:
        """Return whether it has started and runs no job."""
        return self.queued_job is None and self.start_seconds is not None

    def activity_record(self) -> ActivityRecord:
        """Return the record of its activity as it is now."""
        return ActivityRecord(
            id=self.activity_id,
            agreement_id=self.agreement_id,
            created_at=self.created_at,
            ended_at=None if self._ended is None else self.created_at + timedelta(seconds=self.seconds()),
            seconds=None if self._ended is None else self.seconds(),
        )

    async def run(self, engine: Any, job_id: str) -> None:
        """Run it to its end, and report every failure. Raises nothing but cancellation."""
        batches = asyncio.create_task(self._process(engine, job_id))
        aborting = asyncio.create_task(self.abort.wait())
        try:
            while not batches.done():
                await asyncio.wait(
                    {batches, aborting}, timeout=self._poll_seconds(), return_when=asyncio.FIRST_COMPLETED
                )
                if batches.done() or self.abort.is_set():
                    break
                if self._deadline is not None and time.monotonic() >= self._deadline + self._timings.overtime_seconds:
                    late = AttemptFailure(error=ChunkTimeout("The provider does not respond."), is_provider_fault=True)
                    self._report_failure(self._finish_attempt(), late, self.seconds())
                    break
                if self._received is not None and self._received.exists():
                    try:
                        _check_size(self._received)
                    except MalformedResults as refusal:
                        too_large = AttemptFailure(error=refusal, is_provider_fault=True)
                        self._report_failure(self._finish_attempt(), too_large, self.seconds())
                        break
                await self._cover_idling()
        finally:
            was_aborted = self.abort.is_set()
            self.is_stopping = True
            aborting.cancel()
            batches.cancel()
            # A call that hangs is not waited for: its response is not needed.
            await asyncio.wait({batches, aborting}, timeout=_HANGING_SECONDS)
            self._ended = elapsed()
            queued_job = self._finish_attempt()
            error = batches.exception() if batches.done() and not batches.cancelled() else None
            if queued_job is not None or error is not None:
                reason = explain(error) if error is not None else "it was stopped"
                # Stopped because a second attempt, begun later, was faster: this provider hangs or is far too slow.
                outcome = None if queued_job is None else queued_job.outcome
                is_superseded = was_aborted and outcome is not None and outcome.done() and not outcome.cancelled()
                died = WorkerDied(f"The worker ended: {reason}.")
                self._report_failure(queued_job, AttemptFailure(error=died, is_provider_fault=is_superseded), 0.0)

    def _poll_seconds(self) -> float:
        """Return how long `run` may wait before it looks again at the time limit and the money."""
        until = [self._timings.idle_poll_seconds]
        if self._received is not None:
            until.append(self._timings.receive_poll_seconds)
        if self._deadline is not None:
            until.append(self._deadline + self._timings.overtime_seconds - time.monotonic())
        if self._is_waiting():
            until.append(self._cover_left() - self._cover_seconds / 4)
        return max(0.05, min(until))

    # Money

    def _is_waiting(self) -> bool:
        """Return whether its provider has nothing to do but is paid: it is idle, or its results are being checked."""
        is_checking = self.queued_job is not None and self._deadline is None
        return self.is_idle() or (is_checking and not self.is_stopping)

    def _cover_left(self) -> float:
        return self.reservation.covered_seconds - self.reservation.seconds()

    async def _cover_idling(self) -> None:
        """Reserve more while it waits, and end it when the budget does not allow that."""
        if not self._is_waiting() or self._cover_left() > self._cover_seconds / 4:
            return
        try:
            await self.reservation.extend(self.reservation.seconds() + self._cover_seconds)
        except BudgetReached as error:
            log.info("the worker of provider %s ends: %s", self.provider_name, error)
            self.is_stopping = True
            if self.queued_job is None:
                self._pool.give_up_minimum()
                self.abort.set()
        except StoreError as error:
            log.warning("cannot reserve money for provider %s: %s", self.provider_name, error)
            if self.queued_job is None and self._cover_left() <= 0:
                self.abort.set()

    def _bill(self, seconds: float) -> AttemptBill:
        """Return what an attempt that ends now cost: all since the attempt before."""
        total = self.price.max_cost(self.seconds())
        cost, self._attributed_cost = total - self._attributed_cost, total
        return AttemptBill(
            provider=self.provider_name,
            provider_id=self.provider_id,
            agreement_id=self.agreement_id,
            activity_id=self.activity_id,
            seconds=seconds,
            cost=cost,
        )

    # Scripts

    async def _process(self, engine: Any, job_id: str) -> None:
        scripts = self._scripts(engine)
        try:
            await engine.process_batches(job_id, self.agreement_id, self._yapapi_context._activity, scripts)
        except StopAsyncIteration:
            return  # how yapapi reports that there are no more scripts
        finally:
            await scripts.aclose()

    async def _scripts(self, engine: Any) -> AsyncGenerator[Any, Any]:
        """Yield script after script to yapapi, which throws their errors into this generator."""
        started_at = time.monotonic()
        limit_seconds = self._parts.settings.start_seconds
        script = self._yapapi_context.new_script(timeout=timedelta(seconds=limit_seconds))
        script.deploy()
        script.start()
        self._deadline = started_at + limit_seconds
        try:
            yield script
        except Exception as error:
            self._deadline = None
            self._report_failure(None, _classify_error(error, "start"), time.monotonic() - started_at)
            return
        self._deadline = None
        self.start_seconds = time.monotonic() - started_at
        # What the start did not need is given back, but for some time until the first chunk begins.
        unused = limit_seconds + self._timings.overtime_seconds - self.reservation.seconds() - self._cover_seconds
        self.reservation.lower(self.reservation.covered_seconds - max(0.0, unused))
        self._pool.release_earlier_worker()
        log.info("provider %s is ready for %s after %.1f s", self.provider_name, self.model, self.start_seconds)
        while True:
            queued_job = await self._next_job()
            if queued_job is None:
                return
            started_at = time.monotonic()
            # Not named after the activity, whose id the provider chooses.
            received = self._received = self._parts.context.work / f"{secrets.token_hex(8)}.part"
            script, is_receiving = self._script(queued_job, received), True
            try:
                yield script
                # Before the results are checked: they must not change afterwards.
                await stop_receiving(engine, script)
                # The provider has done its part: how long the check takes here is not held against it.
                self._received, self._deadline, is_receiving = None, None, False
                async with self._parts.checks:
                    images = await asyncio.to_thread(_accept_results, received, queued_job)
            except Exception as error:
                self._finish_attempt()
                failure = _classify_error(error, "run the chunk")
                self._report_failure(queued_job, failure, time.monotonic() - started_at)
                return
            finally:
                # Also when the worker is stopped.
                self._received = None
                received.unlink(missing_ok=True)
                if is_receiving:
                    await self._stop_receiving(engine, script)
            self._finish_attempt()
            self.chunks += 1
            seconds = time.monotonic() - started_at
            self._parts.provider_records.record_success(self, images=images, seconds=seconds)
            queued_job.bills.append(self._bill(seconds))
            queued_job.complete(Outcome(provider=self.provider_name, seconds=seconds))

    async def _stop_receiving(self, engine: Any, script: Any) -> None:
        try:
            async with asyncio.timeout(self._timings.cleanup_seconds):
                await stop_receiving(engine, script)
        except Exception as error:
            log.info("the file server does not stop to receive from %s: %s", self.provider_name, explain(error))

    def _script(self, queued_job: QueuedJob, received: Path) -> Any:
        left = (self._deadline or time.monotonic()) - time.monotonic()
        script = self._yapapi_context.new_script(timeout=timedelta(seconds=max(0.1, left)))
        script.upload_file(str(queued_job.job.chunk), _CHUNK)
        script.run("/usr/local/bin/mlg-provider", "run", _CHUNK, _RESULTS, "--threads", str(THREADS))
        script.download_file(_RESULTS, str(received))
        return script

    # Jobs

    async def _next_job(self) -> QueuedJob | None:
        """Wait for the next job, and begin it; None when the worker should end."""
        job_queue = self._parts.job_queue
        idle_since = time.monotonic()
        max_idle_seconds = idle_seconds(
            self.price, start_seconds=self.start_seconds or 0.0, max_seconds=self._parts.settings.idle_seconds
        )
        while not self.is_stopping and self.demand.seconds_left() > self._timings.overtime_seconds:
            queued_job = job_queue.pop(self.model, self.provider_id)
            is_second_attempt = queued_job is None
            queued_job = queued_job or job_queue.straggler(self.model, self.provider_id)
            if queued_job is not None:
                if await self._begin_attempt(queued_job, is_second_attempt=is_second_attempt):
                    return queued_job
                continue
            if time.monotonic() - idle_since > max_idle_seconds and not self._pool.is_retained():
                return None
            await job_queue.wait_for_change(min(self._timings.idle_poll_seconds, max(0.05, max_idle_seconds)))
        return None

    async def _begin_attempt(self, queued_job: QueuedJob, *, is_second_attempt: bool) -> bool:
        """Reserve what a job may cost, and begin it. :return: False: it is back in the queue, or over."""
        job, job_queue = queued_job.job, self._parts.job_queue
        speed = self._parts.provider_records.speed(self.model, self.provider_id)
        seconds = self._parts.chunk_seconds(job, speed)
        if seconds + self._timings.overtime_seconds > self.demand.seconds_left():
            # The provider would end the agreement before the chunk; a worker of the next demand takes it.
            self.is_stopping = True
            if not is_second_attempt:
                job_queue.put(queued_job, is_retry=True)
            return False
        try:
            await self.reservation.extend(self.reservation.seconds() + seconds + self._timings.overtime_seconds)
        except BudgetReached as error:
            self.is_stopping = True
            if not is_second_attempt:
                queued_job.complete(Outcome.not_run(error))
            job_queue.fail_all(error, model=self.model)
            return False
        except BaseException as error:
            # Also when the worker is stopped meanwhile: the job must not be lost.
            if not is_second_attempt:
                job_queue.put(queued_job, is_retry=True)
            if not isinstance(error, StoreError):
                raise
            log.warning("cannot reserve money for a chunk, trying again: %s", error)
            await asyncio.sleep(self._timings.idle_poll_seconds)
            return False
        # Meanwhile it may have ended, or another worker may have begun a second attempt.
        is_still_late = not is_second_attempt or job_queue.straggler(self.model, self.provider_id) is queued_job
        if queued_job.outcome.done() or not is_still_late:
            return False
        now = time.monotonic()
        self.queued_job, self._deadline = queued_job, now + seconds
        straggler_at = now + self._timings.straggler_seconds(items=job.items, images_per_second=speed)
        job_queue.start_attempt(queued_job, self.provider_id, stop=self.abort.set, straggler_at=straggler_at)
        if job.on_start is not None:
            job.on_start()
        return True

    def _finish_attempt(self) -> QueuedJob | None:
        """End the attempt under way. :return: its job."""
        queued_job, self.queued_job, self._deadline = self.queued_job, None, None
        if queued_job is not None:
            self._parts.job_queue.finish_attempt(queued_job, self.provider_id)
        return queued_job

    def _report_failure(self, queued_job: QueuedJob | None, failure: AttemptFailure, seconds: float) -> None:
        """Decide what follows from a failure of the start, or of an attempt that is finished."""
        is_over = queued_job is not None and queued_job.outcome.done()
        if is_over and not failure.is_provider_fault:
            return  # stopped because it is no longer needed, which is no failure
        if failure.is_unclear and self._parts.provider_records.is_unclear_again(self.provider_id):
            failure = replace(failure, is_provider_fault=True)
        log.warning(
            "provider %s failed: %s", self.provider_name, failure.error, extra={"agreement_id": self.agreement_id}
        )
        if failure.is_file_server_fault:
            self._pool.session.fail(failure.error.reason)
        if failure.is_provider_fault:
            self._parts.provider_records.record_failure(self, queued_job, failure.error.reason, seconds)
            if queued_job is not None and isinstance(failure.error, UntrueResults):
                queued_job.proven_wrong.add(self.provider_id)
        if queued_job is None or is_over:
            return
        queued_job.bills.append(self._bill(seconds))
        queued_job.last_outcome = Outcome(
            provider=self.provider_name,
            seconds=seconds,
            error=failure.error,
            is_blameless=not failure.is_provider_fault,
        )
        if queued_job.running_attempts:
            return  # another attempt is running
        if len(queued_job.failed_on) >= self._parts.settings.attempts or queued_job.attempts >= _MAX_ATTEMPTS:
            self._parts.provider_records.lift_bans(queued_job)
            queued_job.complete(queued_job.last_outcome)
        else:
            self._parts.job_queue.put(queued_job, is_retry=True)


def _accept_results(received: Path, queued_job: QueuedJob) -> int:
    """Check a downloaded results file and move it to its place. :raises MlgError: it does not answer this chunk.

    A copy is checked: gftp may still write what the provider sent at the end of the transfer.

    :return: the number of items that it answers.
    """
    size = _check_size(received)
    copy = received.with_name(f"copy-{received.name}")
    try:
        with received.open("rb") as source, copy.open("wb") as target:
            for _ in range(0, size, _COPY_BYTES):
                target.write(source.read(_COPY_BYTES))
        images = queued_job.job.items if queued_job.job.check is None else queued_job.job.check(copy)
        if not queued_job.outcome.done():  # otherwise another attempt was faster
            copy.replace(queued_job.job.results)
    finally:
        copy.unlink(missing_ok=True)
    return images


def _check_size(received: Path) -> int:
    size = received.stat().st_size
    if size > _MAX_RESULTS_BYTES:
        raise MalformedResults(f"The results file has {size} bytes, more than the {_MAX_RESULTS_BYTES} allowed.")
    return size


def _classify_error(error: Exception, what: str) -> AttemptFailure:
    """Return what an exception of yapapi means, and whose fault it is. :param what: the step that failed, as a verb."""
    name, status = type(error).__name__, getattr(error, "status", None)
    if isinstance(error, MlgError):
        found = error
    elif name == "BatchTimeoutError":
        found = ChunkTimeout(f"The provider did not {what} in time.")
    elif name == "CommandExecutionError":
        message = " ".join(f"{getattr(error, 'message', '') or ''} {getattr(error, 'stderr', '') or ''}".split())
        found = WorkerDied(f"The provider could not {what}: {message[:400]}")
    elif name == "BatchError":
        parts = " ".join(str(each) for each in error.args if each)
        found = WorkerDied(f"The provider ended the activity: {parts[:300]}")
    elif name in ("ProtocolError", "TransportError", "JSONDecodeError", "BrokenPipeError") or (
        "gftp" in str(error) and status is None  # what the daemon answers may quote the provider
    ):
        broken = GolemUnavailable(f"The file server gftp failed: {explain(error)}. It is restarted.")
        return AttemptFailure(error=broken, is_provider_fault=False, is_file_server_fault=True)
    elif isinstance(error, FileNotFoundError):
        found = MalformedResults(f"The results file was not downloaded: {error.strerror}.")
    else:
        failed = GolemUnavailable(f"A call to the Golem daemon failed: {explain(error)}.")
        is_unclear = status not in (None, 401) or isinstance(error, _UNREADABLE)
        return AttemptFailure(error=failed, is_provider_fault=False, is_unclear=is_unclear)
    return AttemptFailure(error=found, is_provider_fault=True)

"""One worker: a provider's activity, from its first command to its last.

Run by `worker_pool.py` when yapapi has an agreement and an activity. Deploys, then runs chunk after chunk from the job
queue until it is idle for too long, something fails, or it is stopped. It always stops after a failure: the state
of a failed activity is unknown, and further scripts would only queue behind the failed one. What has arrived by then
counts; the chunk that the provider was working on has failed, and those behind it go back to the queue.

The first chunk is alone. Its answer tells how fast the provider is and whether its image takes several chunks at a
time, see `scripts/commands.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from batcher.errors import BudgetReached, UntrueResults
from batcher.executors import AttemptBill, Outcome
from batcher.executors.golem.job_queue import QueuedJob
from batcher.executors.golem.money import Reservation
from batcher.executors.golem.scripts.attempt import Attempt, accept_results, check_size, own_seconds
from batcher.executors.golem.scripts.commands import add_chunk, add_chunks
from batcher.executors.golem.scripts.failure import AttemptFailure, classify_error
from batcher.executors.golem.timings import idle_seconds
from batcher.executors.golem.yapapi_adapter import explain, poll_without_pauses, stop_receiving
from provider_image.errors import ChunkTimeout, MalformedResults, WorkerDied
from provider_image.pipes import ACCEPTS_NEXT
from store.amounts import split
from store.errors import StoreError
from store.rentals.ledger import ActivityRecord

if TYPE_CHECKING:
    from batcher.executors.golem.worker_pool import PublishedDemand, WorkerPool

log = logging.getLogger(__name__)

#: A warm process of a provider that gets no chunk ends after five minutes.
_WARM_SECONDS = 240.0
#: Limit for attempts of any kind, those that failed through this machine or the daemon included.
_MAX_ATTEMPTS = 10
#: How long a call that hangs is waited for when the worker ends.
_HANGING_SECONDS = 2.0


def elapsed() -> float:
    """Return seconds on the clock by which agreements run.

    It goes on while this machine is suspended, as the provider's does, and setting the system's time does not move it.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)


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
        #: The chunks that the provider has, in the order in which it works on them.
        self.attempts: list[Attempt] = []
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
        #: Of the start or the script under way, on the monotonic clock.
        self._deadline: float | None = None
        #: Cost attributed to its chunks so far, and since when, on the monotonic clock, its time is not.
        self._attributed_cost = Decimal(0)
        self._unattributed_since = 0.0
        #: Whether its image takes several chunks at a time.
        self._accepts_next = False
        #: The attempts whose chunks were sent, and when a script ended last, by the clock of `elapsed`.
        self._sent: set[Attempt] = set()
        self._worked_at = 0.0

    def seconds(self) -> float:
        """Return how long it has been running, or ran."""
        return (self._ended if self._ended is not None else elapsed()) - self._started

    @property
    def queued_job(self) -> QueuedJob | None:
        """The job that its provider works on; None if there is none."""
        return self.attempts[0].queued_job if self.attempts else None

    def is_idle(self) -> bool:
        """Return whether it has started and runs no job."""
        return not self.attempts and self.start_seconds is not None

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
        failure: AttemptFailure | None = None
        try:
            while not batches.done() and failure is None:
                await asyncio.wait(
                    {batches, aborting}, timeout=self._poll_seconds(), return_when=asyncio.FIRST_COMPLETED
                )
                if batches.done() or self.abort.is_set():
                    break
                if self._deadline is not None and time.monotonic() >= self._deadline + self._timings.overtime_seconds:
                    late = ChunkTimeout("The provider does not respond.")
                    failure = AttemptFailure(error=late, is_provider_fault=True)
                    break
                try:
                    for attempt in self.attempts:
                        if attempt.received.exists():
                            check_size(attempt.received)
                except MalformedResults as refusal:
                    failure = AttemptFailure(error=refusal, is_provider_fault=True)
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
            error = batches.exception() if batches.done() and not batches.cancelled() else None
            if failure is None and (self.attempts or error is not None):
                reason = explain(error) if error is not None else "it was stopped"
                # Stopped because a second attempt, begun later, was faster: this provider hangs or is far too slow.
                outcomes = [attempt.queued_job.outcome for attempt in self.attempts]
                is_superseded = was_aborted and any(each.done() and not each.cancelled() for each in outcomes)
                died = WorkerDied(f"The worker ended: {reason}.")
                failure = AttemptFailure(error=died, is_provider_fault=is_superseded)
            if failure is not None:
                await self._end_attempts(failure)

    def _poll_seconds(self) -> float:
        """Return how long `run` may wait before it looks again at the time limit and the money."""
        until = [self._timings.idle_poll_seconds]
        if self.attempts:
            until.append(self._timings.receive_poll_seconds)
        if self._deadline is not None:
            until.append(self._deadline + self._timings.overtime_seconds - time.monotonic())
        if self._is_waiting():
            until.append(self._cover_left() - self._cover_seconds / 4)
        return max(0.05, min(until))

    # Money

    def _is_waiting(self) -> bool:
        """Return whether its provider has nothing to do but is paid: it is idle, or its results are being checked."""
        is_checking = bool(self.attempts) and self._deadline is None
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
            if not self.attempts:
                self._pool.give_up_minimum()
                self.abort.set()
        except StoreError as error:
            log.warning("cannot reserve money for provider %s: %s", self.provider_name, error)
            if not self.attempts and self._cover_left() <= 0:
                self.abort.set()

    def _attribute(self, seconds: Sequence[float]) -> list[AttemptBill]:
        """Charge attempts that end now with so many seconds each, and with what those cost.

        :return: a bill for each; the rest of the time since the last one ended is charged to later ones.
        """
        now, total = time.monotonic(), self.price.max_cost(self.seconds())
        rest = max(0.0, now - self._unattributed_since - sum(seconds))
        *costs, rest_cost = split(total - self._attributed_cost, [*seconds, rest])
        self._unattributed_since, self._attributed_cost = now - rest, total - rest_cost
        return [
            AttemptBill(
                provider=self.provider_name,
                provider_id=self.provider_id,
                agreement_id=self.agreement_id,
                activity_id=self.activity_id,
                seconds=own_seconds,
                cost=cost,
            )
            for own_seconds, cost in zip(seconds, costs, strict=True)
        ]

    # Scripts

    async def _process(self, engine: Any, job_id: str) -> None:
        scripts = self._scripts(engine)
        try:
            activity = poll_without_pauses(self._yapapi_context._activity)
            await engine.process_batches(job_id, self.agreement_id, activity, scripts)
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
            self._report_failure(None, classify_error(error, "start"), None, time.monotonic() - started_at)
            return
        self._deadline = None
        self.start_seconds = time.monotonic() - started_at
        # What the start did not need is given back, but for some time until the first chunk begins.
        unused = limit_seconds + self._timings.overtime_seconds - self.reservation.seconds() - self._cover_seconds
        self.reservation.lower(self.reservation.covered_seconds - max(0.0, unused))
        self._pool.release_earlier_worker()
        log.info("provider %s is ready for %s after %.1f s", self.provider_name, self.model, self.start_seconds)
        while await self._begin_jobs():
            script, new, awaited = self._script()
            is_receiving, sent_at = True, time.monotonic()
            try:
                results = yield script
                # Before the results are checked: they must not change afterwards.
                await stop_receiving(engine, script)
                # The provider has done its part: how long the check takes here is not held against it.
                self._deadline, is_receiving = None, False
                self._worked_at = elapsed()
                if not self._accepts_next:
                    self._accepts_next = any(ACCEPTS_NEXT in (each.stdout or "") for each in await results)
                arrivals = [attempt.arrived_at() for attempt in awaited]
                refusal = await self._accept(awaited)
                if refusal is not None:
                    raise refusal
                self._judge_transfers(new, arrivals, sent_at)
            except Exception as error:
                self._deadline = None
                await self._end_attempts(classify_error(error, "run the chunk"))
                return
            finally:
                if is_receiving:  # also when the worker is stopped
                    await self._stop_receiving(engine, script)

    async def _stop_receiving(self, engine: Any, script: Any) -> None:
        try:
            async with asyncio.timeout(self._timings.cleanup_seconds):
                await stop_receiving(engine, script)
        except Exception as error:
            log.info("the file server does not stop to receive from %s: %s", self.provider_name, explain(error))

    def _script(self) -> tuple[Any, list[Attempt], list[Attempt]]:
        """Make the next script. :return: it, the chunks that it sends, and those whose results it brings."""
        left = (self._deadline or time.monotonic()) - time.monotonic()
        script = self._yapapi_context.new_script(timeout=timedelta(seconds=max(0.1, left)))
        if not self._accepts_next:
            add_chunk(script, self.attempts[0])
            self._sent = {*self.attempts}
            return script, list(self.attempts), list(self.attempts)
        ahead = 0 if self.is_stopping else min(self._pipeline_chunks(), len(self.attempts) // 2)
        awaited = self.attempts[: len(self.attempts) - ahead]
        new = [attempt for attempt in self.attempts if attempt not in self._sent]
        add_chunks(script, new=new, awaited=awaited, has_work=len(new) < len(self.attempts))
        self._sent = {*self.attempts}
        return script, new, awaited

    def _judge_transfers(self, new: Sequence[Attempt], arrivals: Sequence[float], sent_at: float) -> None:
        """Find out whether transfers are quick, by a script that has sent as many chunks as it has brought results."""
        found, model = self._parts.quick_transfers, self.model
        was_quick = found.get(model)
        # Where it also brings results of what it sends, it takes longer for that reason.
        is_fair = not was_quick or {*new} == {*self.attempts}
        if was_quick is not False and len(new) >= len(arrivals) and is_fair:
            is_quick = self._timings.has_quick_transfers(arrivals, sent_at, bool(was_quick))
            # Once they were too slow for larger files, they stay compressed.
            if is_quick != bool(was_quick):
                found[model] = is_quick
                log.info("transfers are %s for %s", "quick" if is_quick else "too slow without compression", model)

    async def _accept(self, attempts: Sequence[Attempt]) -> Exception | None:
        """Take over the results of chunks. :return: why the first that could not be taken over were refused."""
        refusal, accepted, arrivals = None, dict[Attempt, int](), list[float]()
        try:
            for attempt in attempts:
                arrivals.append(attempt.arrived_at())
                try:
                    async with self._parts.checks:
                        images = await asyncio.to_thread(accept_results, attempt.received, attempt.queued_job)
                except Exception as error:
                    refusal = refusal or error
                    attempt.received.unlink(missing_ok=True)
                else:
                    accepted[attempt] = images
        finally:
            if accepted and len(accepted) == len(self.attempts):
                arrivals[-1:] = [time.monotonic()]  # nobody else is left whom the time since then could be charged to
            self._complete(accepted, attempts[: len(arrivals)], arrivals)
        return refusal

    def _complete(
        self, accepted: Mapping[Attempt, int], attempts: Sequence[Attempt], arrivals: Sequence[float]
    ) -> None:
        """Complete the jobs of attempts that were accepted, each with the number of its images that were computed.

        :param attempts: those whose results arrived, with the time of each.
        """
        items = [attempt.queued_job.job.items for attempt in attempts]
        seconds = dict(zip(attempts, own_seconds(arrivals, items, self._unattributed_since), strict=True))
        bills = self._attribute([seconds[attempt] for attempt in accepted])
        # Its speed is that of all: how fast one of them came also depends on the others.
        speed = sum(accepted.values()) / max(1e-3, sum(bill.seconds for bill in bills))
        for (attempt, images), bill in zip(accepted.items(), bills, strict=True):
            self._finish(attempt)
            self.chunks += 1
            self._parts.provider_records.record_success(self, images=images, seconds=bill.seconds, speed=speed)
            attempt.queued_job.bills.append(bill)
            attempt.queued_job.complete(Outcome(provider=self.provider_name, seconds=bill.seconds))

    async def _end_attempts(self, failure: AttemptFailure) -> None:
        """End all attempts: take over what has arrived, fail the chunk that was worked on, give the others back."""
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timings.cleanup_seconds):  # the provider is paid meanwhile
                    refusal = await self._accept([attempt for attempt in self.attempts if attempt.has_arrived()])
                    if isinstance(refusal, UntrueResults):
                        # What ended the script is not what was wrong with these; a part of a file proves nothing.
                        if failure.is_file_server_fault:
                            self._report_failure(None, failure, None, 0.0)
                        failure = classify_error(refusal, "run the chunk")
        finally:
            # Also when this is cancelled: no job may be lost.
            self._release_attempts(failure)

    def _release_attempts(self, failure: AttemptFailure) -> None:
        left = [*self.attempts]
        for attempt in left:
            self._finish(attempt)
        for attempt in reversed(left[1:]):
            # The provider had not begun it, so this was no attempt.
            attempt.queued_job.attempts -= 1
            if not attempt.queued_job.running_attempts:
                self._parts.job_queue.put(attempt.queued_job, is_retry=True)
        if left:
            (bill,) = self._attribute([max(0.0, time.monotonic() - self._unattributed_since)])
            self._report_failure(left[0].queued_job, failure, bill, bill.seconds)
        else:
            self._report_failure(None, failure, None, 0.0)

    # Jobs

    async def _begin_jobs(self) -> bool:
        """Begin the next jobs, and wait for some if there are none under way. :return: False: the worker should end."""
        idle_since = time.monotonic()
        max_idle_seconds = idle_seconds(
            self.price, start_seconds=self.start_seconds or 0.0, max_seconds=self._parts.settings.idle_seconds
        )
        while True:
            has_tried = False
            if not self.is_stopping and self.demand.seconds_left() > self._timings.overtime_seconds:
                has_tried = await self._take_jobs()
            if self.attempts:
                limit = self._parts.chunk_seconds(self.attempts, self._speed())
                # What is reserved may be less, when nothing was begun now.
                covered = self.reservation.covered_seconds - self.reservation.seconds()
                self._deadline = time.monotonic() + min(limit, covered - self._timings.overtime_seconds)
                return True
            if has_tried:
                continue
            if self.is_stopping or self.demand.seconds_left() <= self._timings.overtime_seconds:
                return False
            if time.monotonic() - idle_since > max_idle_seconds and not self._pool.is_retained():
                return False
            await self._parts.job_queue.wait_for_change(
                min(self._timings.idle_poll_seconds, max(0.05, max_idle_seconds))
            )

    async def _take_jobs(self) -> bool:
        """Begin as many jobs as its provider should have now. :return: whether there were any."""
        job_queue = self._parts.job_queue
        if not self.attempts and elapsed() - self._worked_at > _WARM_SECONDS:
            self._accepts_next = False  # its warm process may have ended; the next chunk is alone and starts it again
        queued_jobs = job_queue.pop(self.model, self.provider_id, limit=self._wanted_jobs())
        if queued_jobs:
            await self._begin(queued_jobs, is_second_attempt=False)
            return True
        straggler = None if self.attempts else job_queue.straggler(self.model, self.provider_id)
        if straggler is not None:
            await self._begin([straggler], is_second_attempt=True)
        return straggler is not None

    def _wanted_jobs(self) -> int:
        """Return how many jobs it should take: its share of those that wait, and not more than are done soon."""
        chunks = self._pipeline_chunks()
        if chunks == 0:
            return 0 if self.attempts else 1
        waiting = len(self._parts.job_queue.queued_jobs(self.model))
        share = math.ceil(waiting / max(1, sum(not worker.is_stopping for worker in self._pool.workers)))
        return min(share, 2 * chunks - len(self.attempts))

    def _pipeline_chunks(self) -> int:
        """Return how many chunks a script waits for, and as many are under way behind them; 0: one chunk at a time."""
        return self._timings.pipeline_chunks(self._speed()) if self._accepts_next else 0

    def _speed(self) -> float | None:
        return self._parts.provider_records.speed(self.model, self.provider_id)

    async def _begin(self, queued_jobs: Sequence[QueuedJob], *, is_second_attempt: bool) -> None:
        """Reserve what jobs may cost, together with those under way, and begin them; others go back, or are over."""
        job_queue, speed = self._parts.job_queue, self._speed()
        try:
            used = {attempt.slot for attempt in self.attempts}
            free = [slot for slot in range(len(used) + len(queued_jobs)) if slot not in used]
            attempts = [self._new_attempt(each, slot) for each, slot in zip(queued_jobs, free, strict=False)]
            seconds = self._parts.chunk_seconds([*self.attempts, *attempts], speed) + self._timings.overtime_seconds
            is_too_much = seconds > self.demand.seconds_left()
            if not is_too_much:
                await self.reservation.extend(self.reservation.seconds() + seconds)
        except BudgetReached as error:
            if len(queued_jobs) == 1 and self.attempts:
                # The limits of all together do not fit; it may be possible when those have ended.
                if not is_second_attempt:
                    self._put_back(queued_jobs)
                return
            if len(queued_jobs) == 1:
                self.is_stopping = True
                if not is_second_attempt:
                    queued_jobs[0].complete(Outcome.not_run(error))
                job_queue.fail_all(error, model=self.model)
                return
            is_too_much = True
        except BaseException as error:
            # Also when the worker is stopped meanwhile: the jobs must not be lost.
            if not is_second_attempt:
                self._put_back(queued_jobs)
            if not isinstance(error, StoreError):
                raise
            log.warning("cannot reserve money for a chunk, trying again: %s", error)
            await asyncio.sleep(self._timings.idle_poll_seconds)
            return
        if not is_too_much:
            for attempt in attempts:
                self._start_attempt(attempt, speed, is_second_attempt=is_second_attempt)
        elif len(queued_jobs) > 1:
            # One of them may be possible.
            self._put_back(queued_jobs[1:])
            if not queued_jobs[0].outcome.done():
                await self._begin(queued_jobs[:1], is_second_attempt=is_second_attempt)
        else:
            # The provider would end the agreement before the chunk; a worker of the next demand takes it.
            self.is_stopping = True
            if not is_second_attempt:
                self._put_back(queued_jobs)

    def _put_back(self, queued_jobs: Sequence[QueuedJob]) -> None:
        for queued_job in reversed(queued_jobs):
            self._parts.job_queue.put(queued_job, is_retry=True)

    def _new_attempt(self, queued_job: QueuedJob, slot: int) -> Attempt:
        return Attempt(
            queued_job=queued_job,
            size_bytes=queued_job.job.chunk.stat().st_size,
            received=self._parts.context.work / f"{secrets.token_hex(8)}.part",
            slot=slot,
        )

    def _start_attempt(self, attempt: Attempt, speed: float | None, *, is_second_attempt: bool) -> None:
        queued_job, job_queue = attempt.queued_job, self._parts.job_queue
        # Meanwhile it may have ended, or another worker may have begun a second attempt.
        is_still_late = not is_second_attempt or job_queue.straggler(self.model, self.provider_id) is queued_job
        if queued_job.outcome.done() or not is_still_late:
            return
        now = time.monotonic()
        if not self.attempts:
            self._unattributed_since = now
        self.attempts.append(attempt)
        # The provider works on one after the other.
        items = sum(each.queued_job.job.items for each in self.attempts)
        straggler_at = now + self._timings.straggler_seconds(items=items, images_per_second=speed)
        job_queue.start_attempt(queued_job, self.provider_id, stop=self.abort.set, straggler_at=straggler_at)
        if queued_job.job.on_start is not None:
            queued_job.job.on_start()

    def _finish(self, attempt: Attempt) -> None:
        """End an attempt."""
        self.attempts.remove(attempt)
        self._parts.job_queue.finish_attempt(attempt.queued_job, self.provider_id)
        attempt.received.unlink(missing_ok=True)

    def _report_failure(
        self, queued_job: QueuedJob | None, failure: AttemptFailure, bill: AttemptBill | None, seconds: float
    ) -> None:
        """Decide what follows from a failure of the start, or of an attempt that is finished.

        :param bill: what the attempt cost; None for a start.
        """
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
        if queued_job is None or bill is None or is_over:
            return
        queued_job.bills.append(bill)
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

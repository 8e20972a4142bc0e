"""One model's demand on the market, and the workers that it has found.

Made by `executor.py` for each model that has work. `step`, called a few times per second, starts as many workers as the
queue needs and the budget allows. The search for offers is restarted whenever the daemon ends it; a worker's agreement
ends with it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from batcher.errors import BudgetReached
from batcher.executors.golem.ledger_writer import describe_agreement
from batcher.executors.golem.money import Reservation
from batcher.executors.golem.offers import BadOffer, Price
from batcher.executors.golem.parts import GolemParts
from batcher.executors.golem.recovery import end_agreement
from batcher.executors.golem.session import Session
from batcher.executors.golem.worker import GolemWorker
from batcher.executors.golem.yapapi_adapter import explain, make_job

log = logging.getLogger(__name__)

#: Why an agreement is ended; providers receive it.
_DONE_REASON = {"message": "All work is done", "golem.requestor.code": "Success"}
#: Attempts to end an agreement; those that remain open are ended with the session.
_TERMINATE_ATTEMPTS = 3
#: yapapi needs unique names of jobs within a process.
_numbers = itertools.count(1)


class _WorkerFinished(Exception):
    """Makes yapapi destroy the activity and terminate the agreement; it would keep and pay an idle one."""


class WorkerPool:
    """One model's workers within one session."""

    def __init__(self, parts: GolemParts, session: Session, *, model: str, payload: Any) -> None:
        self.parts = parts
        self.session = session
        self.model = model
        #: The workers that run now.
        self.workers: set[GolemWorker] = set()
        self.last_wanted = time.monotonic()
        #: For how long a start is paid for at first, in seconds: this limit lets a small budget start workers at all.
        self.first_cover_seconds = min(parts.timings.cover_seconds, parts.settings.start_seconds)
        self._timings = parts.timings
        self._payload = payload
        #: Workers, and what ends agreements and demands; they run in the background.
        self._background: set[asyncio.Task[Any]] = set()
        self._job: Any = None
        self._search_task: asyncio.Task[None] | None = None
        self._start_task: asyncio.Task[Any] | None = None
        self._expires: float = 0.0
        self._first_offer: float | None = None
        #: Offers withheld from yapapi's pool, because every queued job failed on their provider: address -> its entry.
        self._unsuited: dict[str, Any] = {}
        self._wanted_since: float | None = None
        #: When a provider was last heard of in a negotiation, and how often the demand was published again since the
        #: last agreement.
        self._negotiated_at = 0.0
        self._restarts = 0
        self._is_closing = False
        #: Reserved for the agreement that is being made; None when none is.
        self._hire: Reservation | None = None
        #: Agreement -> what it may cost, and when it was made on the monotonic clock; removed with its worker.
        self._commitments: dict[str, tuple[Reservation, float]] = {}

    def step(self, wanted: int) -> None:
        """Move one step towards this many workers; called several times per second."""
        now = time.monotonic()
        if wanted:
            self.last_wanted = now
        if self._is_closing or not wanted:
            self._wanted_since = None
            return
        if self._job is None or now > self._expires:
            self._renew()
        if self._search_task is None or self._search_task.done():
            self._search_task = asyncio.create_task(self._search_loop())
        if len(self.workers) + self._is_starting() >= wanted:
            self._wanted_since = None
            return
        self._wanted_since = self._wanted_since or now
        quiet_seconds = now - max(self._wanted_since, self._negotiated_at)
        if quiet_seconds > self._timings.stale_demand_backoff.after(self._restarts + 1):
            self._restarts += 1
            self.restart_search()
        if not self._is_starting() and self._has_offers(now):
            self._start_task = asyncio.create_task(self._start_worker())

    def restart_search(self) -> None:
        """Publish the demand again if more workers are needed, so that rejected providers offer again."""
        if self._wanted_since is not None and self._search_task is not None:
            self._wanted_since = time.monotonic()
            self._search_task.cancel()

    def is_retained(self) -> bool:
        """Return whether an idle worker is kept, as one of the minimum of its model."""
        active = [worker for worker in self.workers if not worker.is_stopping]
        return not self._is_closing and len(active) <= self.parts.settings.min_workers

    def drain(self) -> None:
        """Start nothing more; workers finish their chunk and end."""
        self._is_closing = True
        for worker in self.workers:
            worker.is_stopping = True

    async def close(self, seconds: float) -> None:
        """Wait this long for workers to end, end the rest immediately, and close the demand. Never raises."""
        self.drain()
        deadline = time.monotonic() + seconds
        while self.workers and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for worker in self.workers:
            worker.abort.set()
        for task in (self._start_task, self._search_task):
            if task is not None:
                task.cancel()
                await asyncio.wait({task}, timeout=self._timings.cleanup_seconds)
        if self._background:
            _, hanging = await asyncio.wait(self._background, timeout=self._timings.cleanup_seconds)
            for task in hanging:
                task.cancel()
        job, self._job = self._job, None
        if job is not None:
            await self._end_job(job)

    # The demand

    def _renew(self) -> None:
        """Make a new demand; workers of the old one finish their chunk."""
        if self._job is not None:
            for worker in self.workers:
                worker.is_stopping = True
            self._keep(asyncio.create_task(self._end_job(self._job)))
            if self._search_task is not None:
                self._search_task.cancel()
                self._search_task = None
        seconds = self.parts.settings.rental_seconds
        self._expires = time.monotonic() + max(seconds / 2, seconds - self._timings.renewal_seconds)
        self._first_offer = None
        self._unsuited = {}
        self._job = make_job(
            self.session.engine,
            expires_at=datetime.now(UTC) + timedelta(seconds=seconds),
            payload=self._payload,
            id=f"{self.model}-{next(_numbers)}",
            on_event=self._on_event,
        )

    async def _search_loop(self) -> None:
        """Keep the demand on the market; ends only when cancelled."""
        failures = 1
        while True:
            started_at = time.monotonic()
            try:
                await self._job.find_offers()
            except Exception as error:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    # Closing the demand failed, which hides the cancellation; the session closes it at its end.
                    return
                if time.monotonic() - started_at > self._timings.search_backoff.max_seconds:
                    failures = 1
                log.warning("the search for offers for %s failed, trying again: %s", self.model, explain(error))
            await asyncio.sleep(self._timings.search_backoff.after(failures))
            failures += 1

    def _has_offers(self, now: float) -> bool:
        pool = self._job.agreements_pool
        pool._offer_buffer.update({**self._unsuited, **pool._offer_buffer})
        self._unsuited = {}
        # The pool may hold offers from before a ban.
        for provider_id in list(pool._offer_buffer):
            if provider_id in self.parts.provider_records.banned:
                del pool._offer_buffer[provider_id]
            elif not self._has_work_for(provider_id):
                self._unsuited[provider_id] = pool._offer_buffer.pop(provider_id)
        if not pool._offer_buffer:
            return False
        self._first_offer = self._first_offer or now
        return now - self._first_offer >= self._timings.collect_offers_seconds

    def _has_work_for(self, provider_id: str) -> bool:
        """Return whether this provider may run a queued job; it may not run those that it failed on."""
        queued_jobs = self.parts.job_queue.queued_jobs(self.model)
        return not queued_jobs or any(provider_id not in each.failed_on for each in queued_jobs)

    def _on_event(self, name: str, event_fields: dict[str, Any]) -> None:
        if name == "SubscriptionCreated":
            self.session.subscription_models[event_fields["subscription"].id] = self.model
        elif name in ("ProposalResponded", "ProposalConfirmed", "AgreementCreated"):
            self._negotiated_at = time.monotonic()
        elif name == "AgreementConfirmed":
            self._restarts = 0
            self._commit(event_fields["agreement"])
        elif name == "AgreementTerminated":
            self._end_agreement(event_fields["agreement"].id, str(event_fields["reason"].get("message")))
            if not event_fields["agreement"].terminated:
                self._terminate_with_retries(event_fields["agreement"].id)
        elif name in ("AgreementRejected", "ActivityCreateFailed"):
            details = event_fields["agreement"]._details
            if details is not None:
                provider_id = details.raw_details.offer.provider_id
                log.info("provider %s did not sign an agreement", provider_id)
                self.parts.provider_records.record_not_signed(provider_id)
            if name == "ActivityCreateFailed":
                self._terminate_later(event_fields["agreement"].id, self._job.agreements_pool)
            else:
                self._terminate_with_retries(event_fields["agreement"].id)

    def _commit(self, agreement: Any) -> None:
        """Record an agreement, which from now on may cost what was reserved for it."""
        try:
            record, price = describe_agreement(agreement.details.raw_details, allocation_id=self.session.allocation_id)
        except BadOffer:
            return
        record = replace(record, model=self.model, created_at=datetime.now(UTC))
        hire = self._hire
        if hire is None or self._first_cost(price) > hire.amount:
            # An offer that came after the reservation was taken; `_check_commitment` ends the agreement.
            self.parts.ledger_writer.enqueue(self.parts.ledger.record_agreement, record)
            return
        self._hire = None
        self._commitments[record.id] = (hire, time.monotonic())
        hire.commit(record, price, self.first_cover_seconds)

    def _check_commitment(self, agreement: Any) -> None:
        """Refuse to create an activity that nothing is reserved for. :raises BudgetReached:"""
        if agreement.id not in self._commitments:
            self._terminate_later(agreement.id, self._job.agreements_pool)
            raise BudgetReached("More would be owed for this agreement than is reserved.")

    def _first_cost(self, price: Price) -> Decimal:
        return self._timings.cost_limit(price, self.first_cover_seconds)

    def _end_agreement(self, agreement_id: str, reason: str) -> None:
        ledger = self.parts.ledger
        self.parts.ledger_writer.enqueue(ledger.end_agreement, agreement_id, reason=reason, now=datetime.now(UTC))
        if agreement_id in self._commitments:  # no worker came of it
            reservation, made_at = self._commitments.pop(agreement_id)
            reservation.end(time.monotonic() - made_at)

    async def _end_job(self, job: Any) -> None:
        try:
            async with asyncio.timeout(self._timings.cleanup_seconds):
                await job.agreements_pool.terminate_all(reason=_DONE_REASON)
        except Exception as error:
            log.warning("agreements for %s cannot be terminated: %s", self.model, explain(error))
        job.finished.set()

    # Agreements are ended even if yapapi or the daemon fails to: yapapi asks the daemon once, can be blocked by a call
    # that hangs, and misses an approval that arrives too late.

    def _keep(self, task: asyncio.Task[Any]) -> None:
        """Keep a task until it is done, and log its failure."""

        def discard(task: asyncio.Task[Any]) -> None:
            self._background.discard(task)
            error = None if task.cancelled() else task.exception()
            if error is not None:
                log.info("a worker for %s failed: %s", self.model, explain(error))

        self._background.add(task)
        task.add_done_callback(discard)

    def _terminate_later(self, agreement_id: str, pool: Any) -> None:
        """Terminate an agreement if yapapi, which should do so now, does not."""

        async def terminate() -> None:
            deadline = time.monotonic() + self._timings.cleanup_seconds
            while agreement_id in pool._agreements and time.monotonic() < deadline:
                await asyncio.sleep(0.2)
                await pool.cycle()
            if agreement_id in pool._agreements:
                await pool._terminate_agreement(agreement_id, _DONE_REASON)

        self._keep(asyncio.create_task(terminate()))

    def _terminate_with_retries(self, agreement_id: str) -> None:
        """Terminate an agreement that yapapi wrongly considers terminated."""

        async def terminate() -> None:
            for attempt in range(1, _TERMINATE_ATTEMPTS + 1):
                try:
                    return await end_agreement(self.session.engine, agreement_id, _DONE_REASON)
                except Exception as error:
                    log.info("an agreement for %s could not be terminated yet: %s", self.model, explain(error))
                await asyncio.sleep(self._timings.terminate_backoff.after(attempt))

        self._keep(asyncio.create_task(terminate()))

    # Workers

    def _is_starting(self) -> bool:
        return self._start_task is not None and not self._start_task.done()

    async def _start_worker(self) -> None:
        """Try to get an agreement and an activity; `_run_worker` adds the worker to `workers`."""
        job = self._job
        before = len(self.workers)
        try:
            self._hire = await self._reserve(job.agreements_pool)
            if self._hire is None:
                return
            await job.agreements_pool.cycle()
            task = await self.session.engine.start_worker(job, self._run_worker, self._check_commitment)
        except Exception as error:
            log.info("no agreement for %s: %s", self.model, explain(error))
            return
        finally:
            if self._hire is not None:
                self._hire.release()
                self._hire = None
        if task is None:
            return
        self._keep(task)
        # The activity is created within the task; another start before that would be one too many.
        while not task.done() and len(self.workers) == before:
            await asyncio.sleep(0.02)

    async def _reserve(self, agreements_pool: Any) -> Reservation | None:
        """Reserve what a start may cost with the dearest offer that the budget allows, and remove all dearer ones.

        :return: None: even the cheapest is above the budget. If there is no worker either, all queued jobs end.
        :raises StoreError:
        """
        offers = agreements_pool._offer_buffer
        costs = {id: self._first_cost(Price.from_offer(each.proposal.props)) for id, each in offers.items()}
        reservation = None
        try:
            left = await self.parts.money.left()
            affordable = [cost for cost in costs.values() if left is None or cost <= left]
            if affordable or (costs and not self.workers):
                # Without an affordable one the cheapest is tried, which says which budget is used up.
                amount = max(affordable) if affordable else min(costs.values())
                reservation = await self.parts.money.reserve(self.model, amount)
        except BudgetReached as error:
            if not self.workers:
                self.parts.job_queue.fail_all(error)
        for id, buffered in list(offers.items()):
            if reservation is None or self._first_cost(Price.from_offer(buffered.proposal.props)) > reservation.amount:
                del offers[id]
                if id not in costs:
                    self._unsuited[id] = buffered  # it came meanwhile
        return reservation

    async def _run_worker(self, yapapi_context: Any) -> bool:
        """Run a worker. yapapi calls this with its WorkContext of an activity, which it destroys at the end."""
        parts = self.parts
        pool = self._job.agreements_pool  # kept, because a renewed demand has another
        reservation, _ = self._commitments.pop(yapapi_context._agreement.id, (None, 0.0))
        if reservation is None:
            raise _WorkerFinished  # the agreement has ended already
        worker = GolemWorker(self, yapapi_context, reservation)
        name = worker.provider_name
        worker.is_stopping = self._is_closing
        self.workers.add(worker)
        parts.provider_records.record_signed(worker.provider_id)
        log.info("provider %s starts a worker for %s", name, self.model, extra={"agreement_id": worker.agreement_id})
        parts.ledger_writer.enqueue(parts.ledger.record_activity, worker.activity_record())
        try:
            await worker.run(self.session.engine, self._job_id(yapapi_context))
        finally:
            self.workers.discard(worker)
            log.info("the worker of provider %s ended after %d chunks", name, worker.chunks)
            worker.reservation.end(worker.seconds())
            parts.ledger_writer.enqueue(parts.ledger.record_activity, worker.activity_record())
            if self.session.payment_processor is not None:
                self.session.payment_processor.expect_invoice(worker.agreement_id, worker.seconds())
            self._terminate_later(worker.agreement_id, pool)
        raise _WorkerFinished

    def _job_id(self, yapapi_context: Any) -> str:
        """Return the id of the yapapi job of an activity; `_job` may be a renewed one."""
        manager = self.session.engine._invoice_manager
        return str(manager.agreement_job(yapapi_context._agreement.id).id)

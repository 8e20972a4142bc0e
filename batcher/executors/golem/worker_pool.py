"""One model's demand on the market, and the workers that it has found.

Made by `executor.py` for each model that has work. `step`, called a few times per second, starts as many workers as the
queue needs and the budget allows. The search for offers is restarted whenever the daemon ends it; a worker's agreement
ends with it. Agreements expire with their demand, so it is renewed long before: new workers are started, and whenever
one is ready, a worker of the earlier demand takes no further chunk.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import time
from collections.abc import Iterable
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
from batcher.executors.golem.worker import GolemWorker, elapsed
from batcher.executors.golem.yapapi_adapter import explain, make_job

log = logging.getLogger(__name__)

#: Why an agreement is ended; providers receive it.
_DONE_REASON = {"message": "All work is done", "golem.requestor.code": "Success"}
#: yapapi needs unique names of jobs within a process.
_numbers = itertools.count(1)


class _WorkerFinished(Exception):
    """Makes yapapi destroy the activity and terminate the agreement; it would keep and pay an idle one."""


class PublishedDemand:
    """A demand and its agreements, which expire with it. :param job: yapapi's Job."""

    def __init__(self, job: Any, seconds: float) -> None:
        self.job = job
        self._expires = elapsed() + seconds

    def seconds_left(self) -> float:
        """Return how long its agreements still run."""
        return self._expires - elapsed()


class WorkerPool:
    """One model's workers within one session."""

    def __init__(self, parts: GolemParts, session: Session, *, model: str, payload: Any) -> None:
        self.parts = parts
        self.session = session
        self.model = model
        #: The workers that run now.
        self.workers: set[GolemWorker] = set()
        self.last_wanted = time.monotonic()
        #: When it had work last, on the monotonic clock; the minimum of workers is kept for a while after that.
        self.last_work = time.monotonic()
        self._timings = parts.timings
        self._payload = payload
        #: Workers, and what ends agreements and demands; they run in the background.
        self._background: set[asyncio.Task[Any]] = set()
        #: New agreements are for this demand.
        self._demand: PublishedDemand | None = None
        #: Earlier ones, whose workers finish their chunks.
        self._earlier_demands: list[PublishedDemand] = []
        self._search_task: asyncio.Task[None] | None = None
        #: Those that make an agreement and an activity.
        self._start_tasks: set[asyncio.Task[None]] = set()
        #: The one of them that reserves what a start may cost, and has not yet taken an offer. One at a time: what it
        #: reserves is for the offers that it has found.
        self._choosing: asyncio.Task[None] | None = None
        #: The longest time limit of a chunk seen so far.
        self._chunk_seconds = 0.0
        #: When the first offer came, when the newest one, and the providers whose final offer is awaited.
        self._first_offer: float | None = None
        self._newest_offer = 0.0
        self._negotiating: set[str] = set()
        #: Offers withheld from yapapi's pool, because every queued job failed on their provider: address -> its entry.
        self._unsuited: dict[str, Any] = {}
        self._wanted_since: float | None = None
        #: Whether providers may offer again that were rejected before.
        self._is_search_stale = False
        #: When a provider was last heard of in a negotiation, and how often the demand was published again since the
        #: last agreement.
        self._negotiated_at = 0.0
        self._restarts = 0
        self._is_closing = False
        #: What is reserved for agreements that are being made, by the task that makes one. It pays for a start and a
        #: chunk.
        self._hires: dict[asyncio.Task[Any] | None, Reservation] = {}
        #: Agreements without a worker -> what they may cost.
        self._commitments: dict[str, Reservation] = {}

    def step(self, wanted: int, *, may_start: bool) -> None:
        """Move one step towards this many workers; called several times per second.

        :param may_start: whether the workers of all models are few enough for one more.
        """
        now = time.monotonic()
        if wanted:
            self.last_wanted = now
        self._end_earlier_demands()
        if self._is_closing or not wanted:
            self._wanted_since = None
            return
        may_start &= self._search()
        missing = wanted - len(self.current_workers()) - self.starting()
        if missing <= 0 or not may_start:
            self._wanted_since = None
            return
        self._wanted_since = self._wanted_since or now
        quiet_seconds = now - max(self._wanted_since, self._negotiated_at)
        is_quiet = quiet_seconds > self._timings.stale_demand_backoff.after(self._restarts + 1)
        if self._search_task is not None and (self._is_search_stale or is_quiet):
            self._is_search_stale, self._wanted_since = False, now
            self._restarts += is_quiet
            self._search_task.cancel()
        if self._choosing is None and self._has_offers(now, missing):
            # The next ones go on as soon as it has taken an offer: a provider that takes its time to sign delays none
            # that has.
            self._choosing = asyncio.create_task(self._start_worker())
            self._start_tasks.add(self._choosing)
            self._choosing.add_done_callback(self._end_start)

    def _end_start(self, task: asyncio.Task[None]) -> None:
        self._start_tasks.discard(task)
        if self._choosing is task:
            self._choosing = None

    def _search(self) -> bool:
        """Publish the demand, or a new one if it expires soon, and look for offers.

        :return: whether agreements can be made; otherwise some are being made for the demand that expires.
        """
        for each in self.parts.job_queue.queued_jobs(self.model):
            self._chunk_seconds = max(self._chunk_seconds, self.parts.job_seconds(each.job, None))
        lead = self._timings.renewal_lead(
            start_seconds=self.parts.settings.start_seconds, chunk_seconds=self._chunk_seconds
        )
        is_expiring = self._demand is None or self._demand.seconds_left() < lead
        # While an agreement is made, the demand must not change.
        if is_expiring and not self.starting():
            self._renew(lead)
            is_expiring = False
        if self._search_task is None or self._search_task.done():
            self._search_task = asyncio.create_task(self._search_loop())
        return not is_expiring

    def restart_search(self) -> None:
        """Publish the demand again as soon as more workers are needed, so that rejected providers offer again."""
        self._is_search_stale = True

    def current_workers(self) -> list[GolemWorker]:
        """Return the workers that are not to be replaced because their agreements expire."""
        return [worker for worker in self.workers if worker.demand is self._demand]

    def min_workers(self) -> int:
        """Return how many workers are kept though they have no work."""
        has_worked = time.monotonic() - self.last_work < self._timings.min_workers_seconds
        return self.parts.settings.min_workers if has_worked else 0

    def give_up_minimum(self) -> None:
        """Keep no worker without work until there is work again, because the budget does not allow it."""
        self.last_work = float("-inf")

    def is_retained(self) -> bool:
        """Return whether an idle worker is kept, as one of the minimum of its model."""
        active = [worker for worker in self.workers if not worker.is_stopping]
        return not self._is_closing and len(active) <= self.min_workers()

    def release_earlier_worker(self) -> None:
        """Let a worker of an earlier demand end after its chunk, because another is ready in its place."""
        active = [worker for worker in self.workers if worker.demand is not self._demand and not worker.is_stopping]
        for worker in sorted(active, key=lambda worker: not worker.is_idle())[:1]:
            worker.is_stopping = True
            self.parts.job_queue.notify()

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
        tasks = {*self._start_tasks, *((self._search_task,) if self._search_task is not None else ())}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=self._timings.cleanup_seconds)
        if self._background:
            _, hanging = await asyncio.wait(self._background, timeout=self._timings.cleanup_seconds)
            for task in hanging:
                task.cancel()
        demands = [each for each in (*self._earlier_demands, self._demand) if each is not None]
        await asyncio.gather(*(self._end_job(demand.job) for demand in demands))

    # The demand

    def _renew(self, lead: float) -> None:
        """Make a new demand; the workers of the earlier one go on until others take their place."""
        if self._demand is not None:
            log.info("the demand for %s is renewed", self.model)
            self._earlier_demands.append(self._demand)
            if self._search_task is not None:
                self._search_task.cancel()
                self._search_task = None
        seconds = min(self.parts.settings.rental_seconds + lead, self._timings.max_agreement_seconds)
        self._first_offer = None
        self._negotiating = set()
        self._unsuited = {}
        job = make_job(
            self.session.engine,
            expires_at=datetime.now(UTC) + timedelta(seconds=seconds),
            payload=self._payload,
            id=f"{self.model}-{next(_numbers)}",
            on_event=self._on_event,
        )
        self._demand = PublishedDemand(job, seconds)

    def _end_earlier_demands(self) -> None:
        used = {id(worker.demand) for worker in self.workers}
        for demand in [each for each in self._earlier_demands if id(each) not in used]:
            self._earlier_demands.remove(demand)
            self._keep(asyncio.create_task(self._end_job(demand.job)))

    @property
    def _agreements_pool(self) -> Any:
        assert self._demand is not None
        return self._demand.job.agreements_pool

    async def _search_loop(self) -> None:
        """Keep the demand on the market; ends only when cancelled."""
        assert self._demand is not None
        failures, job = 1, self._demand.job
        while True:
            started_at = time.monotonic()
            try:
                await job.find_offers()
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

    def _has_offers(self, now: float, missing: int) -> bool:
        """Return whether an agreement can be made. At first offers are collected, so that the best are taken.

        :param missing: how many more are needed. When no further ones are to be expected, so many are enough.
        """
        pool = self._agreements_pool
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
        is_quiet = now - self._newest_offer >= self._timings.quiet_offers_seconds
        are_enough = is_quiet and not self._negotiating and len(pool._offer_buffer) >= missing
        return are_enough or now - self._first_offer >= self._timings.collect_offers_seconds

    def _has_work_for(self, provider_id: str) -> bool:
        """Return whether this provider may run a queued job; it may not run those that it failed on."""
        queued_jobs = self.parts.job_queue.queued_jobs(self.model)
        return not queued_jobs or any(provider_id not in each.failed_on for each in queued_jobs)

    def _on_event(self, name: str, event_fields: dict[str, Any]) -> None:
        if name == "OfferTaken":
            self._choosing = None
        elif name == "SubscriptionCreated":
            self.session.subscription_models[event_fields["subscription"].id] = self.model
        elif name in ("ProposalResponded", "ProposalConfirmed", "AgreementCreated"):
            self._negotiated_at = time.monotonic()
            if name == "ProposalResponded":
                self._negotiating.add(event_fields["proposal"].issuer)
            elif name == "ProposalConfirmed":
                self._negotiating.discard(event_fields["proposal"].issuer)
                self._newest_offer = self._negotiated_at
                self._first_offer = self._first_offer or self._negotiated_at
        elif name == "AgreementConfirmed":
            self._restarts = 0
            self._commit(event_fields["agreement"])
        elif name == "AgreementTerminated":
            agreement_id = event_fields["agreement"].id
            self._commitments.pop(agreement_id, None)  # no worker came of it
            if event_fields["agreement"].terminated:
                self.parts.money.end_agreement(agreement_id, str(event_fields["reason"].get("message")))
            else:
                self._terminate_with_retries(agreement_id)
        elif name in ("AgreementRejected", "ActivityCreateFailed"):
            details = event_fields["agreement"]._details
            if details is not None:
                provider_id = details.raw_details.offer.provider_id
                log.info("provider %s did not sign an agreement", provider_id)
                self.parts.provider_records.record_not_signed(provider_id)
            if name == "ActivityCreateFailed":
                self._terminate_later(event_fields["agreement"].id, self._agreements_pool)
            else:
                self._terminate_with_retries(event_fields["agreement"].id)

    def _commit(self, agreement: Any) -> None:
        """Record an agreement, which from now on may cost what was reserved for it."""
        try:
            record, price = describe_agreement(agreement.details.raw_details, allocation_id=self.session.allocation_id)
        except BadOffer:
            return
        record = replace(record, model=self.model, created_at=datetime.now(UTC))
        # yapapi reports it in the task that makes it.
        hire = self._hires.get(asyncio.current_task())
        if hire is None or self._timings.cost_limit(price, hire.covered_seconds) > hire.amount:
            # An offer that came after the reservation was taken; `_check_commitment` ends the agreement.
            self.parts.money.commit_unused(record, price)
            return
        del self._hires[asyncio.current_task()]
        self._commitments[record.id] = hire
        hire.commit(record, price, hire.covered_seconds)

    def _check_commitment(self, agreement: Any) -> None:
        """Refuse to create an activity that nothing is reserved for. :raises BudgetReached:"""
        if agreement.id not in self._commitments:
            self._terminate_later(agreement.id, self._agreements_pool)
            raise BudgetReached("More would be owed for this agreement than is reserved.")

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
            # It costs as long as it is open; what is still open when the pool closes is ended with the session.
            for attempt in itertools.count(1):
                try:
                    await end_agreement(self.session.engine, agreement_id, _DONE_REASON)
                    self.parts.money.end_agreement(agreement_id, _DONE_REASON["message"])
                    return
                except Exception as error:
                    log.info("an agreement for %s could not be terminated yet: %s", self.model, explain(error))
                    if getattr(error, "status", None) == 404:  # nor will it be
                        return
                await asyncio.sleep(self._timings.terminate_backoff.after(attempt))

        self._keep(asyncio.create_task(terminate()))

    # Workers

    def starting(self) -> int:
        """Return for how many workers an agreement or an activity is being made."""
        return sum(not task.done() for task in self._start_tasks)

    async def _start_worker(self) -> None:
        """Try to get an agreement and an activity; `_run_worker` adds the worker to `workers`."""
        demand = self._demand
        assert demand is not None
        pool, has_activity, own_task = demand.job.agreements_pool, asyncio.Event(), asyncio.current_task()
        run_worker = functools.partial(self._run_worker, demand, has_activity)
        try:
            await pool.cycle()
            hire = await self._reserve(pool)
            if hire is None:
                # Until others are settled, or there are other offers, the next would find nothing either.
                await asyncio.sleep(self._timings.collect_offers_seconds)
                return
            self._hires[own_task] = hire
            task = await self.session.engine.start_worker(demand.job, run_worker, self._check_commitment)
        except Exception as error:
            log.info("no agreement for %s: %s", self.model, explain(error))
            return
        finally:
            unused = self._hires.pop(own_task, None)
            if unused is not None:
                unused.release()
        if task is None:
            return
        self._keep(task)
        # The activity is created within the task; another start before that would be one too many.
        while not (task.done() or has_activity.is_set()):
            await asyncio.sleep(0.02)

    async def _reserve(self, agreements_pool: Any) -> Reservation | None:
        """Reserve what a start may cost with the dearest offer that the budget allows, and remove all dearer ones.

        :return: None: even the cheapest is above the budget. If there is no worker either, the model's jobs end.
        :raises StoreError:
        """
        offers = agreements_pool._offer_buffer
        seconds = self._timings.start_cover(
            start_seconds=self.parts.settings.start_seconds, chunk_seconds=self._longest_chunk(offers)
        )

        def cost(offer: Any) -> Decimal:
            return self._timings.cost_limit(Price.from_offer(offer.proposal.props), seconds)

        costs = {id: cost(each) for id, each in offers.items()}
        # Other starts may have reserved more than they will need, and then give it back.
        is_alone = not self.workers and self.starting() <= 1
        reservation = None
        try:
            left = await self.parts.money.left()
            affordable = [each for each in costs.values() if left is None or each <= left]
            if affordable or (costs and is_alone):
                # Without an affordable one the cheapest is tried, which says which budget is used up.
                amount = max(affordable) if affordable else min(costs.values())
                reservation = await self.parts.money.reserve(self.model, amount)
                reservation.covered_seconds = seconds
        except BudgetReached as error:
            if is_alone:
                self.parts.job_queue.fail_all(error, model=self.model)
        for id, buffered in list(offers.items()):
            if reservation is None or cost(buffered) > reservation.amount:
                del offers[id]
                if id not in costs or self.starting() > 1:  # it came meanwhile, or may be affordable soon
                    self._unsuited[id] = buffered
        return reservation

    def _longest_chunk(self, provider_ids: Iterable[str]) -> float:
        """Return the longest that a queued chunk may take on one of these providers."""
        speeds = [self.parts.provider_records.speed(self.model, id) for id in provider_ids]
        slowest = min((speed for speed in speeds if speed is not None), default=None)
        queued_jobs = self.parts.job_queue.queued_jobs(self.model)
        return max((self.parts.job_seconds(each.job, slowest) for each in queued_jobs), default=self._chunk_seconds)

    async def _run_worker(self, demand: PublishedDemand, has_activity: asyncio.Event, yapapi_context: Any) -> bool:
        """Run a worker. yapapi calls this with its WorkContext of an activity, which it destroys at the end."""
        parts = self.parts
        has_activity.set()
        reservation = self._commitments.pop(yapapi_context._agreement.id, None)
        if reservation is None:
            raise _WorkerFinished  # the agreement has ended already
        worker = GolemWorker(self, demand, yapapi_context, reservation)
        name = worker.provider_name
        worker.is_stopping = self._is_closing
        self.workers.add(worker)
        parts.provider_records.record_signed(worker.provider_id)
        log.info("provider %s starts a worker for %s", name, self.model, extra={"agreement_id": worker.agreement_id})
        parts.ledger_writer.enqueue(parts.ledger.record_activity, worker.activity_record())
        try:
            await worker.run(self.session.engine, str(demand.job.id))
        finally:
            self.workers.discard(worker)
            log.info("the worker of provider %s ended after %d chunks", name, worker.chunks)
            parts.ledger_writer.enqueue(parts.ledger.record_activity, worker.activity_record())
            if self.session.payment_processor is not None:
                self.session.payment_processor.expect_invoice(worker.agreement_id)
            self._terminate_later(worker.agreement_id, demand.job.agreements_pool)
        raise _WorkerFinished

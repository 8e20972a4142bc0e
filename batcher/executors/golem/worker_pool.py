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
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from batcher.executors.golem.agreement_cleanup import CLEANUP_SECONDS, DONE_REASON, AgreementCleanup
from batcher.executors.golem.offers import OfferEvaluator, Price, describe_offer
from batcher.executors.golem.session import Session
from batcher.executors.golem.settings import GolemSettings
from batcher.executors.golem.worker import GolemWorker, WorkerContext, run_worker
from batcher.executors.golem.yapapi_adapter import explain, make_job
from provider_image.errors import MlgError

log = logging.getLogger(__name__)

#: Time to collect offers after the first, so that the best is taken.
_OFFERS_SECONDS = 1.0
#: A demand that brings no worker for this long, though one is needed, is published again: otherwise providers that
#: were rejected, banned or busy make no new offer.
_STALE_DEMAND_SECONDS = 20.0
#: Pause after a demand failed; doubles up to the maximum.
_INITIAL_BACKOFF_SECONDS = 0.5
_MAX_BACKOFF_SECONDS = 15.0
#: A demand is replaced this long before its agreements expire.
_RENEWAL_SECONDS = 120.0

#: yapapi needs unique names of jobs within a process.
_numbers = itertools.count(1)


class _WorkerFinished(Exception):
    """Makes yapapi destroy the activity and terminate the agreement; it would keep and pay an idle one."""


@dataclass(frozen=True, kw_only=True)
class PoolEvents:
    """Callbacks for the events of a pool."""

    #: An agreement was approved: the model, and yapapi's agreement.
    on_agreement: Callable[[str, Any], None]
    #: An agreement has ended: its id, and why.
    on_agreement_ended: Callable[[str, str], None]
    #: A provider did not approve an agreement, or could not create an activity: its address.
    on_not_signed: Callable[[str], None]
    #: A worker starts, and ends.
    on_worker_started: Callable[[GolemWorker], None]
    on_worker_ended: Callable[[GolemWorker], None]
    #: Even the cheapest of the offers, at this price, exceeds the budget.
    on_over_budget: Callable[[Price], None]


class WorkerPool:
    """One model's workers within one session.

    :param is_affordable: returns whether a new worker at this price fits into the budget.
    """

    def __init__(
        self,
        *,
        model: str,
        session: Session,
        payload: Any,
        offer_evaluator: OfferEvaluator,
        worker_context: WorkerContext,
        settings: GolemSettings,
        events: PoolEvents,
        is_affordable: Callable[[Price], bool],
    ) -> None:
        self.model = model
        self._session = session
        self._payload = payload
        self._offer_evaluator = offer_evaluator
        self._worker_context = worker_context
        self._settings = settings
        self._events = events
        self._is_affordable = is_affordable
        #: The workers that run now.
        self.workers: set[GolemWorker] = set()
        self._cleanup = AgreementCleanup(session.engine, model)
        self._job: Any = None
        self._search_task: asyncio.Task[None] | None = None
        self._start_task: asyncio.Task[Any] | None = None
        self._expires: float = 0.0
        self._first_offer: float | None = None
        #: Offers withheld from yapapi's pool, because every queued job failed on their provider: address -> its entry.
        self._unsuited: dict[str, Any] = {}
        self._wanted_since: float | None = None
        self.last_wanted = time.monotonic()
        self._is_closing = False

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
        if now - self._wanted_since > _STALE_DEMAND_SECONDS:
            self.restart_search()
        if not self._is_starting() and self._has_offers(now):
            self._start_task = asyncio.create_task(self._start_worker())

    def restart_search(self) -> None:
        """Publish the demand again if more workers are needed, so that rejected providers offer again."""
        if self._wanted_since is not None and self._search_task is not None:
            self._wanted_since = time.monotonic()
            self._search_task.cancel()

    def abort_workers(self) -> None:
        """End all workers immediately."""
        for worker in self.workers:
            worker.abort.set()

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
        self.abort_workers()
        for task in (self._start_task, self._search_task):
            if task is not None:
                task.cancel()
                await asyncio.wait({task}, timeout=CLEANUP_SECONDS)
        await self._cleanup.close()
        await self._end_job()

    # The demand

    def _renew(self) -> None:
        """Make a new demand; workers of the old one finish their chunk."""
        if self._job is not None:
            old = self._job
            for worker in self.workers:
                worker.is_stopping = True
            self._cleanup.add(asyncio.create_task(self._end_job(old)))
            if self._search_task is not None:
                self._search_task.cancel()
                self._search_task = None
        seconds = self._settings.rental_seconds
        self._expires = time.monotonic() + max(seconds / 2, seconds - _RENEWAL_SECONDS)
        self._first_offer = None
        self._unsuited = {}
        self._job = make_job(
            self._session.engine,
            expires_at=datetime.now(UTC) + timedelta(seconds=seconds),
            payload=self._payload,
            id=f"{self.model}-{next(_numbers)}",
            on_event=self._on_event,
        )

    async def _search_loop(self) -> None:
        """Keep the demand on the market; ends only when cancelled."""
        pause = _INITIAL_BACKOFF_SECONDS
        while True:
            started_at = time.monotonic()
            try:
                await self._job.find_offers()
            except Exception as error:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    # Closing the demand failed, which hides the cancellation; the session closes it at its end.
                    return
                if time.monotonic() - started_at > _MAX_BACKOFF_SECONDS:
                    pause = _INITIAL_BACKOFF_SECONDS
                log.warning(
                    "the search for offers for %s failed, trying again in %.1f s: %s", self.model, pause, explain(error)
                )
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MAX_BACKOFF_SECONDS)

    def _has_offers(self, now: float) -> bool:
        pool = self._job.agreements_pool
        pool._offer_buffer.update({**self._unsuited, **pool._offer_buffer})
        self._unsuited = {}
        if not pool._offer_buffer:
            return False
        # The pool may hold offers from before a ban or from when more budget was left.
        over_budget = []
        for provider_id, buffered in list(pool._offer_buffer.items()):
            price = Price.from_offer(buffered.proposal.props)
            is_affordable = self._is_affordable(price)
            if not is_affordable:
                over_budget.append(price)
            if self._offer_evaluator.is_banned(provider_id) or not is_affordable:
                del pool._offer_buffer[provider_id]
            elif not self._has_work_for(provider_id):
                self._unsuited[provider_id] = pool._offer_buffer.pop(provider_id)
        if not pool._offer_buffer:
            if over_budget and not self.workers:
                self._events.on_over_budget(min(over_budget, key=lambda price: price.max_cost(60.0)))
            return False
        self._first_offer = self._first_offer or now
        return now - self._first_offer >= _OFFERS_SECONDS

    def _has_work_for(self, provider_id: str) -> bool:
        """Return whether this provider may run a queued job; it may not run those that it failed on."""
        job_queue = self._worker_context.job_queue
        return not job_queue.count(self.model) or job_queue.has_job_for(self.model, provider_id)

    def _on_event(self, name: str, event_fields: dict[str, Any]) -> None:
        if name == "SubscriptionCreated":
            self._session.subscription_models[event_fields["subscription"].id] = self.model
        elif name == "AgreementConfirmed":
            self._events.on_agreement(self.model, event_fields["agreement"])
        elif name == "AgreementTerminated":
            self._events.on_agreement_ended(event_fields["agreement"].id, str(event_fields["reason"].get("message")))
            if not event_fields["agreement"].terminated:
                self._cleanup.terminate_with_retries(event_fields["agreement"].id)
        elif name in ("AgreementRejected", "ActivityCreateFailed"):
            details = event_fields["agreement"]._details
            if details is not None:
                self._events.on_not_signed(details.raw_details.offer.provider_id)
            if name == "ActivityCreateFailed":
                self._cleanup.terminate_later(event_fields["agreement"].id, self._job.agreements_pool)
            else:
                self._cleanup.terminate_with_retries(event_fields["agreement"].id)

    async def _end_job(self, job: Any = None) -> None:
        job = job or self._job
        if job is None:
            return
        if job is self._job:
            self._job = None
        try:
            async with asyncio.timeout(CLEANUP_SECONDS):
                await job.agreements_pool.terminate_all(reason=DONE_REASON)
        except Exception as error:
            log.warning("agreements for %s cannot be terminated: %s", self.model, explain(error))
        job.finished.set()

    # Workers

    def _is_starting(self) -> bool:
        return self._start_task is not None and not self._start_task.done()

    async def _start_worker(self) -> None:
        """Try to get an agreement and an activity; `_run_worker` adds the worker to `workers`."""
        job = self._job
        before = len(self.workers)
        try:
            await job.agreements_pool.cycle()
            task = await self._session.engine.start_worker(job, self._run_worker)
        except Exception as error:
            log.info("no agreement for %s: %s", self.model, explain(error))
            return
        if task is None:
            return
        self._cleanup.add(task)
        # The activity is created within the task; another start before that would be one too many.
        while not task.done() and len(self.workers) == before:
            await asyncio.sleep(0.02)

    async def _run_worker(self, yapapi_context: Any) -> bool:
        """Run a worker. yapapi calls this with an activity, which it destroys at the end.

        :param yapapi_context: yapapi's WorkContext.
        """
        details = yapapi_context._agreement_details
        provider_id = yapapi_context.provider_id
        pool = self._job.agreements_pool  # kept, because a renewed demand has another
        try:
            name, price = describe_offer(details.provider_view.properties, provider_id)
        except MlgError as error:
            raise _WorkerFinished from error
        worker = GolemWorker(
            model=self.model,
            provider_id=provider_id,
            provider_name=name,
            agreement_id=yapapi_context._agreement.id,
            activity_id=yapapi_context.id,
            price=price,
            created_at=datetime.now(UTC),
            is_stopping=self._is_closing,
        )
        self.workers.add(worker)
        self._offer_evaluator.record_signed(provider_id)
        self._events.on_worker_started(worker)
        try:
            await run_worker(
                self._session.engine, self._job_id(yapapi_context), yapapi_context, worker, self._worker_context
            )
        finally:
            self.workers.discard(worker)
            self._events.on_worker_ended(worker)
            self._cleanup.terminate_later(worker.agreement_id, pool)
        raise _WorkerFinished

    def _job_id(self, yapapi_context: Any) -> str:
        """Return the id of the yapapi job of an activity; `_job` may be a renewed one."""
        manager = self._session.engine._invoice_manager
        return str(manager.agreement_job(yapapi_context._agreement.id).id)

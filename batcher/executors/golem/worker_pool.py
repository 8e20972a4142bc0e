"""One model's rental: its demand on the market, and the hires that work for it.

Made by `executor.py` for each model that has work, and stepped a few times a second: as many computers are hired as the
backlog wants and the budget allows. The search for offers is kept alive here, whatever the daemon answers; a hire that
ends takes its agreement with it.
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

from batcher.executors.golem.agreement_cleanup import CLEANUP_SECONDS, AgreementCleanup
from batcher.executors.golem.offers import OfferEvaluator, describe_offer
from batcher.executors.golem.prices import Price
from batcher.executors.golem.session import Session
from batcher.executors.golem.settings import GolemSettings
from batcher.executors.golem.worker import GolemWorker, WorkerContext, run_worker
from batcher.executors.golem.yapapi_adapter import explain, make_job
from provider_image.errors import MlgError

log = logging.getLogger(__name__)

#: Offers get this long to come in after the first, so that the best is taken and not the first.
_OFFERS_SECONDS = 1.0
#: A demand that brings no new computer for so long, though one is wanted, is made anew: providers that were refused,
#: for a ban or for being busy, are not heard of again otherwise.
_STALE_DEMAND_SECONDS = 20.0
#: Pause after a demand failed; doubles to the last.
_INITIAL_BACKOFF_SECONDS = 0.5
_MAX_BACKOFF_SECONDS = 15.0
#: The demand ends this long before its agreements must.
_RENEWAL_SECONDS = 120.0

#: yapapi wants names of jobs that it has never seen in this process.
_numbers = itertools.count(1)


class _WorkerFinished(Exception):
    """Tells yapapi to destroy the activity and to end the agreement: an idle one would be kept and paid."""


@dataclass(frozen=True, kw_only=True)
class PoolEvents:
    """Who is told what happens."""

    #: An agreement was approved; yapapi's object.
    on_agreement: Callable[[str, Any], None]
    #: An agreement has ended: its id, and why.
    on_agreement_ended: Callable[[str, str], None]
    #: A provider did not approve, or could not begin.
    on_not_signed: Callable[[str], None]
    #: A hire begins, and ends.
    on_worker_started: Callable[[GolemWorker], None]
    on_worker_ended: Callable[[GolemWorker], None]
    #: Not even the cheapest of the offers, at this price, fits into the budget.
    over_budget: Callable[[Price], None]


class WorkerPool:
    """One model's rental within one session.

    :param is_affordable: tells whether a new hire at this price fits into the budget.
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
        #: Those at work.
        self.workers: set[GolemWorker] = set()
        self._cleanup = AgreementCleanup(session.engine, model)
        self._job: Any = None
        self._search_task: asyncio.Task[None] | None = None
        self._start_task: asyncio.Task[Any] | None = None
        self._expires: float = 0.0
        self._first_offer: float | None = None
        #: Offers of yapapi's pool that are kept out of it for now: address -> what it had there.
        self._unsuited: dict[str, Any] = {}
        self._wanted_since: float | None = None
        self.last_wanted = time.monotonic()
        self._is_closing = False

    def step(self, wanted: int) -> None:
        """Move one step towards this many hires; called several times a second."""
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
        """Make the demand anew if more computers are wanted: whoever was refused before is heard of again."""
        if self._wanted_since is not None and self._search_task is not None:
            self._wanted_since = time.monotonic()
            self._search_task.cancel()

    def abort_workers(self) -> None:
        """End at once whatever is at work."""
        for worker in self.workers:
            worker.abort.set()

    def drain(self) -> None:
        """Take nothing more: hires finish the chunk that they work on and end."""
        self._is_closing = True
        for worker in self.workers:
            worker.is_stopping = True

    async def close(self, seconds: float) -> None:
        """Wait for hires to end, then end the rest at once, and close the demand. Never raises."""
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
        """Begin a new demand; hires of the old one finish what they have."""
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
        """Keep a demand on the market; ends only when cancelled."""
        pause = _INITIAL_BACKOFF_SECONDS
        while True:
            began = time.monotonic()
            try:
                await self._job.find_offers()
            except Exception as error:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    # The demand could not be closed in passing, which hides the cancellation; `session.py` closes it.
                    return
                if time.monotonic() - began > _MAX_BACKOFF_SECONDS:
                    pause = _INITIAL_BACKOFF_SECONDS
                log.warning("the demand for %s was lost, made anew in %.1f s: %s", self.model, pause, explain(error))
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MAX_BACKOFF_SECONDS)

    def _has_offers(self, now: float) -> bool:
        pool = self._job.agreements_pool
        pool._offer_buffer.update({**self._unsuited, **pool._offer_buffer})
        self._unsuited = {}
        if not pool._offer_buffer:
            return False
        # What was put there before a ban, or when there was more money, is still there.
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
                self._events.over_budget(min(over_budget, key=lambda price: price.max_cost(60.0)))
            return False
        self._first_offer = self._first_offer or now
        return now - self._first_offer >= _OFFERS_SECONDS

    def _has_work_for(self, provider_id: str) -> bool:
        """Tell whether a provider could do something: of what waits it may not have what it has failed on."""
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
        reason = {"message": "All work is done", "golem.requestor.code": "Success"}
        try:
            async with asyncio.timeout(CLEANUP_SECONDS):
                await job.agreements_pool.terminate_all(reason=reason)
        except Exception as error:
            log.warning("agreements for %s could not be ended: %s", self.model, explain(error))
        job.finished.set()

    # Hires

    def _is_starting(self) -> bool:
        return self._start_task is not None and not self._start_task.done()

    async def _start_worker(self) -> None:
        """Try to get an agreement and an activity; what comes of it is seen in `workers`."""
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
        # The activity is created within the task; a second start before that would hire one too many.
        while not task.done() and len(self.workers) == before:
            await asyncio.sleep(0.02)

    async def _run_worker(self, context: Any) -> bool:
        """Be called by yapapi when an activity is there; it destroys the activity when this ends."""
        details = context._agreement_details
        provider_id = context.provider_id
        pool = self._job.agreements_pool  # a renewed demand has another
        try:
            name, price = describe_offer(details.provider_view.properties, provider_id)
        except MlgError as error:
            raise _WorkerFinished from error
        worker = GolemWorker(
            model=self.model,
            provider_id=provider_id,
            provider_name=name,
            agreement_id=context._agreement.id,
            activity_id=context.id,
            price=price,
            created_at=datetime.now(UTC),
            is_stopping=self._is_closing,
        )
        self.workers.add(worker)
        self._offer_evaluator.record_signed(provider_id)
        self._events.on_worker_started(worker)
        try:
            await run_worker(self._session.engine, self._job_of(context), context, worker, self._worker_context)
        finally:
            self.workers.discard(worker)
            self._events.on_worker_ended(worker)
            self._cleanup.terminate_later(worker.agreement_id, pool)
        raise _WorkerFinished

    def _job_of(self, context: Any) -> str:
        """Return the id of the job that an activity belongs to; a renewed demand has another."""
        manager = self._session.engine._invoice_manager
        return str(manager.agreement_job(context._agreement.id).id)

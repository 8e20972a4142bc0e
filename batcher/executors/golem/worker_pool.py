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

from batcher.executors.golem.agreement_cleanup import FAREWELL_SECONDS, Farewells
from batcher.executors.golem.offers import Market, describe
from batcher.executors.golem.prices import Price
from batcher.executors.golem.session import Session
from batcher.executors.golem.settings import GolemSettings
from batcher.executors.golem.worker import Hire, Orders, work
from batcher.executors.golem.yapapi_adapter import explain, make_job
from provider_image.errors import MlgError

log = logging.getLogger(__name__)

#: Offers get this long to come in after the first, so that the best is taken and not the first.
_OFFERS_SECONDS = 1.0
#: A demand that brings no new computer for so long, though one is wanted, is made anew: providers that were refused,
#: for a ban or for being busy, are not heard of again otherwise.
_STALE_DEMAND_SECONDS = 20.0
#: Pause after a demand failed; doubles to the last.
_FIRST_PAUSE_SECONDS = 0.5
_LAST_PAUSE_SECONDS = 15.0
#: The demand ends this long before its agreements must.
_RENEWAL_SECONDS = 120.0

#: yapapi wants names of jobs that it has never seen in this process.
_numbers = itertools.count(1)


class _HireIsOver(Exception):
    """Tells yapapi to destroy the activity and to end the agreement: an idle one would be kept and paid."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """Who is told what happens."""

    #: An agreement was approved; yapapi's object.
    agreement: Callable[[str, Any], None]
    #: An agreement has ended: its id, and why.
    agreement_ended: Callable[[str, str], None]
    #: A provider did not approve, or could not begin.
    unsigned: Callable[[str], None]
    #: A hire begins, and ends.
    hired: Callable[[Hire], None]
    hire_ended: Callable[[Hire], None]
    #: Not even the cheapest of the offers, at this price, fits into the budget.
    too_dear: Callable[[Price], None]


class Rental:
    """One model's rental within one session.

    :param is_affordable: tells whether a new hire at this price fits into the budget.
    """

    def __init__(
        self,
        *,
        model: str,
        session: Session,
        payload: Any,
        market: Market,
        orders: Orders,
        settings: GolemSettings,
        told: Told,
        is_affordable: Callable[[Price], bool],
    ) -> None:
        self.model = model
        self._session = session
        self._payload = payload
        self._market = market
        self._orders = orders
        self._settings = settings
        self._told = told
        self._is_affordable = is_affordable
        #: Those at work.
        self.hires: set[Hire] = set()
        self._farewells = Farewells(session.engine, model)
        self._job: Any = None
        self._finding: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[Any] | None = None
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
        if self._finding is None or self._finding.done():
            self._finding = asyncio.create_task(self._find())
        if len(self.hires) + self._is_starting() >= wanted:
            self._wanted_since = None
            return
        self._wanted_since = self._wanted_since or now
        if now - self._wanted_since > _STALE_DEMAND_SECONDS:
            self.ask_again()
        if not self._is_starting() and self._has_offers(now):
            self._starting = asyncio.create_task(self._hire())

    def ask_again(self) -> None:
        """Make the demand anew if more computers are wanted: whoever was refused before is heard of again."""
        if self._wanted_since is not None and self._finding is not None:
            self._wanted_since = time.monotonic()
            self._finding.cancel()

    def hurry(self) -> None:
        """End at once whatever is at work."""
        for hire in self.hires:
            hire.abandon.set()

    def leave(self) -> None:
        """Take nothing more: hires finish the chunk that they work on and end."""
        self._is_closing = True
        for hire in self.hires:
            hire.leaving = True

    async def close(self, seconds: float) -> None:
        """Wait for hires to end, then end the rest at once, and close the demand. Never raises."""
        self.leave()
        deadline = time.monotonic() + seconds
        while self.hires and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self.hurry()
        for task in (self._starting, self._finding):
            if task is not None:
                task.cancel()
                await asyncio.wait({task}, timeout=FAREWELL_SECONDS)
        await self._farewells.close()
        await self._end_job()

    # The demand

    def _renew(self) -> None:
        """Begin a new demand; hires of the old one finish what they have."""
        if self._job is not None:
            old = self._job
            for hire in self.hires:
                hire.leaving = True
            self._farewells.add(asyncio.create_task(self._end_job(old)))
            if self._finding is not None:
                self._finding.cancel()
                self._finding = None
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

    async def _find(self) -> None:
        """Keep a demand on the market; ends only when cancelled."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            began = time.monotonic()
            try:
                await self._job.find_offers()
            except Exception as error:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    # The demand could not be closed in passing, which hides the cancellation; `session.py` closes it.
                    return
                if time.monotonic() - began > _LAST_PAUSE_SECONDS:
                    pause = _FIRST_PAUSE_SECONDS
                log.warning("the demand for %s was lost, made anew in %.1f s: %s", self.model, pause, explain(error))
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE_SECONDS)

    def _has_offers(self, now: float) -> bool:
        pool = self._job.agreements_pool
        pool._offer_buffer.update({**self._unsuited, **pool._offer_buffer})
        self._unsuited = {}
        if not pool._offer_buffer:
            return False
        # What was put there before a ban, or when there was more money, is still there.
        too_dear = []
        for provider_id, buffered in list(pool._offer_buffer.items()):
            price = Price.of_offer(buffered.proposal.props)
            is_affordable = self._is_affordable(price)
            if not is_affordable:
                too_dear.append(price)
            if self._market.is_banned(provider_id) or not is_affordable:
                del pool._offer_buffer[provider_id]
            elif not self._is_of_use(provider_id):
                self._unsuited[provider_id] = pool._offer_buffer.pop(provider_id)
        if not pool._offer_buffer:
            if too_dear and not self.hires:
                self._told.too_dear(min(too_dear, key=lambda price: price.most(60.0)))
            return False
        self._first_offer = self._first_offer or now
        return now - self._first_offer >= _OFFERS_SECONDS

    def _is_of_use(self, provider_id: str) -> bool:
        """Tell whether a provider could do something: of what waits it may not have what it has failed on."""
        backlog = self._orders.backlog
        return not backlog.count(self.model) or backlog.could_take(self.model, provider_id)

    def _on_event(self, name: str, facts: dict[str, Any]) -> None:
        if name == "SubscriptionCreated":
            self._session.models_of[facts["subscription"].id] = self.model
        elif name == "AgreementConfirmed":
            self._told.agreement(self.model, facts["agreement"])
        elif name == "AgreementTerminated":
            self._told.agreement_ended(facts["agreement"].id, str(facts["reason"].get("message")))
            if not facts["agreement"].terminated:
                self._farewells.see_off(facts["agreement"].id)
        elif name in ("AgreementRejected", "ActivityCreateFailed"):
            details = facts["agreement"]._details
            if details is not None:
                self._told.unsigned(details.raw_details.offer.provider_id)
            if name == "ActivityCreateFailed":
                self._farewells.part_soon(facts["agreement"].id, self._job.agreements_pool)
            else:
                self._farewells.see_off(facts["agreement"].id)

    async def _end_job(self, job: Any = None) -> None:
        job = job or self._job
        if job is None:
            return
        if job is self._job:
            self._job = None
        reason = {"message": "All work is done", "golem.requestor.code": "Success"}
        try:
            async with asyncio.timeout(FAREWELL_SECONDS):
                await job.agreements_pool.terminate_all(reason=reason)
        except Exception as error:
            log.warning("agreements for %s could not be ended: %s", self.model, explain(error))
        job.finished.set()

    # Hires

    def _is_starting(self) -> bool:
        return self._starting is not None and not self._starting.done()

    async def _hire(self) -> None:
        """Try to get an agreement and an activity; what comes of it is seen in `hires`."""
        job = self._job
        before = len(self.hires)
        try:
            await job.agreements_pool.cycle()
            task = await self._session.engine.start_worker(job, self._run_worker)
        except Exception as error:
            log.info("no agreement for %s: %s", self.model, explain(error))
            return
        if task is None:
            return
        self._farewells.add(task)
        # The activity is created within the task; a second start before that would hire one too many.
        while not task.done() and len(self.hires) == before:
            await asyncio.sleep(0.02)

    async def _run_worker(self, context: Any) -> bool:
        """Be called by yapapi when an activity is there; it destroys the activity when this ends."""
        details = context._agreement_details
        provider_id = context.provider_id
        pool = self._job.agreements_pool  # a renewed demand has another
        try:
            name, price = describe(details.provider_view.properties, provider_id)
        except MlgError as error:
            raise _HireIsOver from error
        hire = Hire(
            model=self.model,
            provider_id=provider_id,
            provider_name=name,
            agreement_id=context._agreement.id,
            activity_id=context.id,
            price=price,
            created_at=datetime.now(UTC),
            leaving=self._is_closing,
        )
        self.hires.add(hire)
        self._market.signed(provider_id)
        self._told.hired(hire)
        try:
            await work(self._session.engine, self._job_of(context), context, hire, self._orders)
        finally:
            self.hires.discard(hire)
            self._told.hire_ended(hire)
            self._farewells.part_soon(hire.agreement_id, pool)
        raise _HireIsOver

    def _job_of(self, context: Any) -> str:
        """Return the id of the job that an activity belongs to; a renewed demand has another."""
        manager = self._session.engine._invoice_manager
        return str(manager.agreement_job(context._agreement.id).id)

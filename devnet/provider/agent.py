"""A provider: offers itself, agrees with one requestor at a time, does its work and bills it.

The market tells it what happens (see `market.ProviderSide`), the activities tell it what ends. It misbehaves as its
plan says. What it does by itself runs in tasks of its own, which die with the daemon.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

from devnet.constraints import parse
from devnet.errors import ApiError, InternalError
from devnet.faults import Faults
from devnet.market import MarketService, expiration
from devnet.payments import PaymentService
from devnet.provider.activities import Activities
from devnet.provider.invoicing import Invoicer
from devnet.provider.offers import make_offers
from devnet.records import Agreement, Demand, Proposal
from devnet.scenario import ProviderPlan, Scenario
from devnet.timing import ChangeNotifier

log = logging.getLogger(__name__)

_MULTI_ACTIVITY = "golem.srv.caps.multi-activity"

Report = Callable[[str], None]


class Provider:
    """See the module.

    :param cpus: where its processes run.
    :param report: gets a line for people about what is important.
    """

    def __init__(
        self,
        plan: ProviderPlan,
        *,
        scenario: Scenario,
        market: MarketService,
        payment: PaymentService,
        activities: Activities,
        faults: Faults,
        cpus: frozenset[int] | None,
        report: Report,
    ) -> None:
        self.plan = plan
        self.node_id = plan.node_id
        self.cpus = cpus
        #: What it works on, from the requestor's signature until the last process has ended.
        self.agreement: Agreement | None = None
        self._scenario = scenario
        self._market = market
        self._activities = activities
        self._faults = faults
        self._report = report
        self._offers = {offer.offer_id: offer for offer in make_offers(plan, scenario.subnet)}
        self._notifier = ChangeNotifier()
        self._last_contact_at = 0.0
        self._idle_since = 0.0
        self._invoicer = Invoicer(plan, payment=payment, activities=activities, faults=faults, report=report)
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Take part in the market, and go on with what was under way before a restart."""
        self._market.providers[self.node_id] = self
        for agreement in list(self._market.agreements.values()):
            if agreement.provider_id != self.node_id:
                continue
            if agreement.state == "Approved" and self.agreement is None:
                self._start_agreement(agreement)
            elif agreement.state == "Pending":
                self.agreement_confirmed(agreement)
            elif agreement.approved_at is not None and not agreement.is_billed:
                self._spawn(self._invoicer.send_invoice(agreement))
        if self.agreement is None:
            self._propose_to_all()

    async def close(self) -> None:
        """Stop at once, in the middle of whatever it does."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # The market's side

    def demand_opened(self, demand: Demand) -> None:
        """See ProviderSide."""
        if self.agreement is None:
            self._propose_to(demand)

    def proposal_countered(self, proposal: Proposal) -> None:
        """See ProviderSide. Whoever is busy does not answer; the requestor hears of it again later."""
        if self.agreement is not None or self._faults.triggers(self.plan.name, "no-answer"):
            return
        offer = self._offers.get(proposal.offer_id)
        demand = self._market.demands.get(proposal.demand_id)
        if offer is None or demand is None:
            return
        if not (
            offer.parsed_constraints.matches(proposal.properties)
            and parse(proposal.constraints).matches(offer.properties)
        ):
            return
        self._market.propose(
            demand,
            issuer_id=self.node_id,
            offer_id=offer.offer_id,
            properties=offer.properties,
            constraints=offer.constraints,
            previous_id=proposal.proposal_id,
        )

    def agreement_confirmed(self, agreement: Agreement) -> None:
        """See ProviderSide."""
        if self.agreement is not None:
            self._market.agreements.refuse(agreement, f"{self.plan.name} is busy with another agreement.")
        elif self._faults.triggers(self.plan.name, "reject"):
            self._report(f"{self.plan.name} refuses an agreement")
            self._market.agreements.refuse(agreement, f"{self.plan.name} does not want to.")
        elif not self._faults.triggers(self.plan.name, "never-approve"):
            self._start_agreement(agreement)

    def agreement_ended(self, agreement: Agreement) -> None:
        """See ProviderSide."""
        if agreement is self.agreement:
            self._notifier.notify()

    # The activities' side

    def record_contact(self) -> None:
        """See ActivityOwner."""
        self._last_contact_at = asyncio.get_running_loop().time()

    def create_activity(self, agreement: Agreement) -> str:
        """Start an activity for an agreement.

        :raises ApiError: the agreement does not allow it.
        """
        self.record_contact()
        if agreement.state != "Approved" or agreement is not self.agreement:
            raise ApiError(f"The agreement is {agreement.state}; it allows no activity.")
        if agreement.usage and not is_multi_activity(agreement):
            raise ApiError("The agreement is for one activity, and had it.")
        if self._faults.triggers(self.plan.name, "no-activity"):
            raise InternalError(f"{self.plan.name} cannot start an exe-unit.")
        activity_id = self._activities.create(agreement, self)
        seconds = self._invoicer.debit_note_interval_seconds()
        if seconds:
            self._spawn(self._invoicer.send_debit_notes(agreement, activity_id, seconds))
        return activity_id

    def batch_started(self, agreement: Agreement, commands: list[dict[str, Any]]) -> None:
        """Take note that a batch runs: the moment for dropping the agreement."""
        if not any("run" in command for command in commands):
            return
        fault = self._faults.triggers(self.plan.name, "drop-agreement")
        if fault is not None:
            self._spawn(self._drop(agreement, fault.seconds))

    def activity_ended(self, agreement: Agreement, activity_id: str) -> None:
        """See ActivityOwner."""
        self._idle_since = asyncio.get_running_loop().time()
        self._invoicer.send_debit_note(agreement, activity_id)
        if agreement.state == "Approved" and not is_multi_activity(agreement):
            self._terminate(agreement, "The only activity is over.")
        self._notifier.notify()

    # An agreement's life

    def _start_agreement(self, agreement: Agreement) -> None:
        self.agreement = agreement
        self._spawn(self._serve(agreement))

    async def _serve(self, agreement: Agreement) -> None:
        if agreement.state == "Pending":
            slow = self._faults.triggers(self.plan.name, "slow-approval")
            if slow is not None:
                await asyncio.sleep(slow.seconds)
            if not self._market.agreements.approve(agreement):
                self._release()
                return
            self._report(f"{self.plan.name} agreed to work: {agreement.short_name}")
        self._invoicer.decide_overbilling(agreement)
        self.record_contact()
        self._idle_since = self._last_contact_at
        await self._watch(agreement)
        for activity_id in self._activities.live_ids(agreement):
            await self._activities.destroy(activity_id, f"The agreement is {agreement.state}.")
        self._spawn(self._invoicer.send_invoice(agreement))
        self._release()

    async def _watch(self, agreement: Agreement) -> None:
        """Return when the agreement is over; end it when it is time."""
        loop = asyncio.get_running_loop()
        expires_at = expiration(agreement.demand["properties"])
        while agreement.state == "Approved":
            ends = [(self._last_contact_at + self._scenario.silent_seconds, "The requestor is silent.")]
            if not self._activities.live_ids(agreement):
                ends.append((self._idle_since + self._scenario.idle_seconds, "There is no activity."))
            if expires_at is not None:
                left = (expires_at - datetime.now(UTC)).total_seconds()
                ends.append((loop.time() + left, "The demand has expired."))
            end, reason = min(ends)
            if end <= loop.time():
                self._terminate(agreement, reason)
                return
            await self._notifier.wait_until(lambda: agreement.state != "Approved", end - loop.time())

    async def _drop(self, agreement: Agreement, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if agreement.state == "Approved":
            self._terminate(agreement, "The provider needs its computer for something else.")

    def _terminate(self, agreement: Agreement, reason: str) -> None:
        self._report(f"{self.plan.name} ends its agreement: {reason}")
        self._market.agreements.terminate(agreement.agreement_id, "Provider", {"message": reason})

    def _release(self) -> None:
        self.agreement = None
        self._propose_to_all()

    # Offers

    def _propose_to_all(self) -> None:
        for demand in self._market.list_open_demands():
            self._propose_to(demand)

    def _propose_to(self, demand: Demand) -> None:
        parsed_constraints = parse(demand.constraints)
        for offer in self._offers.values():
            if parsed_constraints.matches(offer.properties) and offer.parsed_constraints.matches(demand.properties):
                self._market.propose(
                    demand,
                    issuer_id=self.node_id,
                    offer_id=offer.offer_id,
                    properties=offer.properties,
                    constraints=offer.constraints,
                )

    # Tasks

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s: a task of its failed", self.plan.name, exc_info=task.exception())


def is_multi_activity(agreement: Agreement) -> bool:
    """Tell whether both sides agreed to have several activities, one after the other."""
    sides = (agreement.demand["properties"], agreement.offer["properties"])
    return all(side.get(_MULTI_ACTIVITY) is True for side in sides)

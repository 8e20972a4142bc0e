"""The provider agent: makes offers, has one agreement at a time, runs its activities and bills them.

Made by `Devnet`; the market, its activities and the API tell it what happens. It injects the faults of its plan. What
it does on its own initiative runs in asyncio tasks, which end with the daemon.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from devnet.constraints import parse
from devnet.errors import ApiError, InternalError
from devnet.market import MarketService, expiration
from devnet.payments import PaymentService
from devnet.provider.activities import Activities
from devnet.provider.invoicing import Invoicer
from devnet.provider.offers import offer_constraints, offer_properties
from devnet.records import Agreement, Bill, Demand, Proposal
from devnet.scenario import FaultSchedule, ProviderPlan, Scenario
from devnet.timing import ChangeNotifier

log = logging.getLogger(__name__)

_MULTI_ACTIVITY = "golem.srv.caps.multi-activity"


class Provider:
    """A simulated provider, whose processes run on some of the processor cores."""

    def __init__(
        self,
        plan: ProviderPlan,
        *,
        scenario: Scenario,
        market: MarketService,
        payment: PaymentService,
        activities: Activities,
        faults: FaultSchedule,
        cpus: frozenset[int] | None,
        report: Callable[[str], None],
    ) -> None:
        self.plan = plan
        self.node_id = plan.node_id
        self.cpus = cpus
        #: Set from the start of an agreement until its last process has ended.
        self.agreement: Agreement | None = None
        self._scenario = scenario
        self._market = market
        self._activities = activities
        self._fault = functools.partial(faults.triggers, plan.name)
        self._report = report
        #: Id of an offer -> its properties.
        self._offers = {f"{plan.name}-{each}": offer_properties(plan, each, scenario) for each in plan.runtimes}
        self._constraints = offer_constraints(scenario.subnet)
        self._notifier = ChangeNotifier()
        self._last_contact_at = 0.0
        self._idle_since = 0.0
        self._invoicer = Invoicer(
            plan=plan,
            payment=payment,
            activities=activities,
            faults=faults,
            report=report,
            on_debit_note=lambda agreement, note: self._spawn(self._await_acceptance(agreement, note)),
        )
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Resume the agreements from before a restart, and make offers."""
        for agreement in list(self._market.agreements.values()):
            if agreement.provider_id != self.node_id:
                continue
            if agreement.state == "Approved" and self.agreement is None:
                self._start_agreement(agreement)
            elif agreement.state == "Pending":
                self.agreement_confirmed(agreement)
            elif agreement.approved_at is not None and not agreement.is_billed:
                self._spawn(self._invoicer.send_invoice(agreement))
        self._propose_to_all()

    async def close(self) -> None:
        """Cancel all tasks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # Called by the market

    def demand_opened(self, demand: Demand) -> None:
        """Propose to a new demand, unless busy."""
        if self.agreement is None:
            for offer_id in self._offers:
                self._propose(offer_id, demand)

    def proposal_countered(self, proposal: Proposal) -> None:
        """Answer a counter-proposal. A busy provider does not; it makes a new proposal when it is free."""
        if self.agreement is not None or self._fault("no-answer"):
            return
        if proposal.offer_id in self._offers:
            if self.plan.latency_seconds:
                self._spawn(self._answer(proposal))
            else:
                self._propose(proposal.offer_id, proposal)

    def agreement_confirmed(self, agreement: Agreement) -> None:
        """Approve or reject an agreement that the requestor signed."""
        if self.agreement is not None:
            self._market.agreements.reject(agreement, f"{self.plan.name} is busy with another agreement.")
        elif self._expires_too_soon(agreement.demand["properties"]):
            self._market.agreements.reject(agreement, "The agreement would expire too soon.")
        elif self._fault("reject"):
            self._report(f"{self.plan.name} rejects an agreement")
            self._market.agreements.reject(agreement, f"{self.plan.name} rejects the agreement.")
        elif not self._fault("never-approve"):
            self._start_agreement(agreement)

    def agreement_ended(self, agreement: Agreement) -> None:
        """Handle the end of one of the agreements, whichever side ended it."""
        if agreement is self.agreement:
            self._notifier.notify()

    # Called by the API and by activities

    def record_contact(self) -> None:
        """Note that the requestor has just made a call."""
        self._last_contact_at = asyncio.get_running_loop().time()

    def create_activity(self, agreement: Agreement) -> str:
        """Start an activity, if the agreement allows it and the fault no-activity does not occur. :return: its id."""
        self.record_contact()
        if agreement.state != "Approved" or agreement is not self.agreement:
            raise ApiError(f"The agreement is {agreement.state}; it does not allow an activity.")
        if agreement.usage and not is_multi_activity(agreement):
            raise ApiError("The agreement allows only one activity, which was already created.")
        if self._fault("no-activity"):
            raise InternalError(f"{self.plan.name} cannot start an exe-unit.")
        activity_id = self._activities.create(agreement, self)
        seconds = self._invoicer.debit_note_interval_seconds()
        if seconds:
            self._spawn(self._invoicer.send_debit_notes(agreement, activity_id, seconds))
        return activity_id

    def batch_started(self, agreement: Agreement, commands: list[dict[str, Any]]) -> None:
        """Handle the start of a batch: the occasion of the fault drop-agreement."""
        if not any("run" in command for command in commands):
            return
        if fault := self._fault("drop-agreement"):
            self._spawn(self._terminate_after(agreement, fault.seconds))

    def activity_ended(self, agreement: Agreement, activity_id: str) -> None:
        """Handle the end of one of the activities. Its usage is in the agreement."""
        self._idle_since = asyncio.get_running_loop().time()
        self._invoicer.send_debit_note(agreement, activity_id)
        if agreement.state == "Approved" and not is_multi_activity(agreement):
            self._terminate(agreement, "Its only activity has ended.")
        self._notifier.notify()

    # Agreements

    def _start_agreement(self, agreement: Agreement) -> None:
        self.agreement = agreement
        self._spawn(self._serve(agreement))

    async def _serve(self, agreement: Agreement) -> None:
        if agreement.state == "Pending":
            await asyncio.sleep(self.plan.latency_seconds)
            if slow := self._fault("slow-approval"):
                await asyncio.sleep(slow.seconds)
            if not self._market.agreements.approve(agreement):
                self._release()
                return
            self._report(f"{self.plan.name} approves an agreement: {agreement.short_name}")
        if overbill := self._fault("overbill"):
            agreement.price_factor = overbill.factor
        self.record_contact()
        self._idle_since = self._last_contact_at
        await self._watch(agreement)
        for activity_id in self._activities.running_ids(agreement):
            await self._activities.destroy(activity_id, f"The agreement is {agreement.state}.")
        self._spawn(self._invoicer.send_invoice(agreement))
        self._release()

    async def _watch(self, agreement: Agreement) -> None:
        """Wait for the end of the agreement; terminate it at a timeout."""
        loop = asyncio.get_running_loop()
        expires_at = expiration(agreement.demand["properties"])
        while agreement.state == "Approved":
            deadlines = [(self._last_contact_at + self._scenario.silent_seconds, "The requestor is inactive.")]
            if not self._activities.running_ids(agreement):
                deadlines.append((self._idle_since + self._scenario.idle_seconds, "It has no activity."))
            if expires_at is not None:
                left = (expires_at - datetime.now(UTC)).total_seconds()
                deadlines.append((loop.time() + left, "The demand has expired."))
            deadline, reason = min(deadlines)
            if deadline <= loop.time():
                self._terminate(agreement, reason)
                return
            await self._notifier.wait_until(lambda: agreement.state != "Approved", deadline - loop.time())

    async def _await_acceptance(self, agreement: Agreement, note: Bill) -> None:
        """Terminate an agreement if a debit note is not accepted in time."""
        await asyncio.sleep(self._scenario.debit_note_accept_seconds)
        if agreement.state == "Approved" and note.status != "ACCEPTED":
            self._terminate(agreement, "A debit note was not accepted in time.")

    async def _terminate_after(self, agreement: Agreement, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if agreement.state == "Approved":
            self._terminate(agreement, "Fault of the scenario: drop-agreement.")

    def _terminate(self, agreement: Agreement, reason: str) -> None:
        self._report(f"{self.plan.name} terminates {agreement.short_name}: {reason}")
        self._market.agreements.terminate(agreement.agreement_id, {"message": reason})

    def _release(self) -> None:
        self.agreement = None
        self._propose_to_all()

    # Offers

    def _propose_to_all(self) -> None:
        for demand in self._market.list_open_demands():
            self.demand_opened(demand)

    async def _answer(self, proposal: Proposal) -> None:
        await asyncio.sleep(self.plan.latency_seconds)
        if self.agreement is None and proposal.demand_id in (
            each.demand_id for each in self._market.list_open_demands()
        ):
            self._propose(proposal.offer_id, proposal)

    def _expires_too_soon(self, properties: Mapping[str, Any]) -> bool:
        expires_at = expiration(properties)
        earliest = datetime.now(UTC) + timedelta(seconds=self._scenario.min_expiration_seconds)
        return expires_at is not None and expires_at < earliest

    def _propose(self, offer_id: str, other: Demand | Proposal) -> None:
        """Propose an offer to a demand, or answer a counter-proposal with it, if it suits both sides."""
        properties = self._offers[offer_id]
        if not parse(other.constraints)(properties) or not parse(self._constraints)(other.properties):
            return
        if self._expires_too_soon(other.properties):
            return
        counter_id = other.proposal_id if isinstance(other, Proposal) else None
        self._market.propose(
            Proposal(
                issuer_id=self.node_id,
                demand_id=other.demand_id,
                offer_id=offer_id,
                state="Initial" if counter_id is None else "Draft",
                properties=dict(properties),
                constraints=self._constraints,
                previous_id=counter_id,
            )
        )

    # Tasks

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s: a task failed", self.plan.name, exc_info=task.exception())


def is_multi_activity(agreement: Agreement) -> bool:
    """Return whether both sides agreed to more than one activity."""
    sides = (agreement.demand["properties"], agreement.offer["properties"])
    return all(side.get(_MULTI_ACTIVITY) is True for side in sides)

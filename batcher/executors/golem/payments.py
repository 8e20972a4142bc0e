"""Judges invoices and debit notes, once each, and pays them or tells the daemon that they are rejected.

Run by `session.py`. yapapi's own payment loops are switched off: one failed poll ends them, they pay any amount, and
one unexpected debit note makes them terminate the agreement with its work. This module compares a bill (an invoice or a
debit note) with the most that the agreement can have cost by the local clock until its end, keeps the decision in the
store (`store/rentals/decisions.py`), and then carries it out. A batcher that is killed in between leaves a decision
that the next one carries out; nobody judges the bill again.

Bills are found by the daemon's events, which are kept and ordered; its lists of bills are neither ordered nor complete
above the size of a page. Each bill is settled in a task of its own, which tries again until it succeeds, so that one
that cannot be paid, for example because its provider is offline, delays no other. A provider is told of one decision at
a time, so that one that has sent very many bills and does not respond delays no other either.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from batcher.executors.golem.ledger_writer import describe_agreement
from batcher.executors.golem.offers import BadOffer, Price
from batcher.executors.golem.parts import GolemParts
from batcher.executors.golem.recovery import NO_SUCH_CALL, tagged
from batcher.executors.golem.yapapi_adapter import OWNER, explain
from store.amounts import bounded
from store.rentals.decisions import BILLED_BEFORE, BillKind, DecisionRecord
from store.rentals.ledger import AgreementRecord

if TYPE_CHECKING:
    from batcher.executors.golem.session import Session

log = logging.getLogger(__name__)

#: Granularity of allocations; one for a single invoice must be a step larger than it.
_ALLOCATION_STEP = Decimal("1e-12")
#: Pause between two polls, which the daemon holds while there is nothing new.
_POLL_PAUSE_SECONDS = 0.05
#: Largest page of events that the daemon returns, and the resolution of their times.
_PAGE_EVENTS = 100
_EVENT_RESOLUTION = timedelta(milliseconds=1)
#: An event may be seen this much later than its time says.
_LATE_EVENTS = timedelta(minutes=5)
#: Limit for a call that the daemon passes on to the provider.
_PROVIDER_SECONDS = 60
#: Bills that are looked up, and decisions of which providers are told, at the same time.
_MAX_SETTLING = 16
#: Why a debit note is refused that must be paid before the end; the invoice covers the whole amount.
_NOT_AGREED = "It demands payment before the end of the agreement, which was not agreed."
#: Why a bill is refused whose amount is negative, not a number, or has so many digits that sums would not be exact.
_NO_AMOUNT = "Its amount cannot be added to others."
#: Why a bill is not paid that the daemon says is over.
_REJECTED_BEFORE, _WAS_CANCELLED = "It was rejected at the daemon.", "The provider cancelled it."
#: Most decimal places of the amount of a bill. Products of two floats, written exactly, have some hundred.
_MAX_PLACES = 150
#: Statuses of bills at the daemon.
_PAYABLE, _PAID, _REJECTED, _CANCELLED = ("RECEIVED", "FAILED"), ("ACCEPTED", "SETTLED"), "REJECTED", "CANCELLED"


@dataclass(frozen=True, kw_only=True)
class _Calls:
    """The daemon's calls for one kind of bill, and the names of its fields."""

    kind: BillKind
    get_events: Callable[..., Any]
    get: Callable[..., Any]
    accept: Callable[..., Any]
    reject: Callable[..., Any]
    id_name: str
    amount_name: str

    @property
    def title(self) -> str:
        return str(self.kind).replace("_", " ")


@dataclass(frozen=True, kw_only=True)
class _BilledAgreement:
    """The agreement of a bill."""

    record: AgreementRecord
    price: Price
    valid_to: datetime
    #: Made by this session, whose allocation is for it.
    is_own: bool


def _amount(calls: _Calls, bill: Any) -> Decimal:
    try:
        return Decimal(str(getattr(bill, calls.amount_name)))
    except InvalidOperation:
        return Decimal("nan")


class PaymentProcessor:
    """The payments of one session, which is open."""

    def __init__(self, parts: GolemParts, session: Session) -> None:
        self._parts = parts
        self._timings = parts.timings
        self._ledger, self._decisions = parts.ledger, parts.context.store.decisions
        self._now = parts.money.clock
        self._session = session
        self._engine = session.engine
        self._market = self._engine._market_api._api
        api = self._engine._payment_api._api
        self._calls = {
            BillKind.INVOICE: _Calls(
                kind=BillKind.INVOICE,
                get_events=api.get_invoice_events,
                get=api.get_invoice,
                accept=api.accept_invoice,
                reject=api.reject_invoice,
                id_name="invoice_id",
                amount_name="amount",
            ),
            BillKind.DEBIT_NOTE: _Calls(
                kind=BillKind.DEBIT_NOTE,
                get_events=api.get_debit_note_events,
                get=api.get_debit_note,
                accept=api.accept_debit_note,
                reject=api.reject_debit_note,
                id_name="debit_note_id",
                amount_name="total_amount_due",
            ),
        }
        self._tasks: list[asyncio.Task[None]] = []
        #: Ended agreements of this session whose invoice is not settled.
        self._expected: set[str] = set()
        self._settled = asyncio.Event()
        self._settled.set()
        #: Agreements whose invoice is settled, and those of others.
        self._settled_agreements: set[str] = set()
        self._foreign_agreements: set[str] = set()
        #: Bills that need no more attention, and those that are being settled.
        self._done: set[str] = set()
        self._settling: dict[str, asyncio.Task[None]] = {}
        #: Bills of other batchers, which may have to be settled here if those end.
        self._postponed: set[tuple[BillKind, str]] = set()
        #: All invoices that came before were seen; None before the first review.
        self._reviewed_at: datetime | None = None
        self._slots, self._telling_slots = (asyncio.Semaphore(_MAX_SETTLING) for _ in range(2))
        #: Provider -> held while it is told of a decision.
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def start(self) -> None:
        """Begin to poll for new bills, and to settle those that came before."""
        steps = [(self._review, self._timings.review_seconds)]
        steps += [(self._poll_new(calls), _POLL_PAUSE_SECONDS) for calls in self._calls.values()]
        self._tasks = [asyncio.create_task(self._run_forever(step, pause)) for step, pause in steps]

    def expect_invoice(self, agreement_id: str) -> None:
        """Expect the invoice of an agreement that has ended."""
        if agreement_id not in self._settled_agreements:
            self._expected.add(agreement_id)
            self._settled.clear()

    async def wait_until_settled(self, seconds: float) -> int:
        """Wait for the expected invoices, at most this long. :return: how many are missing."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._settled.wait()
        return len(self._expected)

    async def settle_known(self) -> None:
        """Settle the bills that the daemon has now, within a limited time."""
        try:
            async with asyncio.timeout(self._timings.open_seconds):
                await self._review()
                if self._settling:
                    await asyncio.wait([*self._settling.values()], timeout=self._timings.unreachable_seconds)
        except Exception as error:
            log.warning("bills from before cannot be settled yet: %s", explain(error))

    async def close(self) -> None:
        """Stop polling."""
        tasks = [*self._tasks, *self._settling.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks = []

    # Finding bills

    async def _run_forever(self, step: Callable[[], Any], pause_seconds: float) -> None:
        failures = 0
        while True:
            try:
                await step()
            except Exception as error:
                self._session.report_daemon_error(error)
                failures += 1
                await asyncio.sleep(self._timings.payment_backoff.after(failures))
                continue
            self._session.report_daemon_error(None)
            failures = 0
            await asyncio.sleep(pause_seconds)

    def _poll_new(self, calls: _Calls) -> Callable[[], Any]:
        """Return a step that waits for bills of one kind that come from now on."""
        cursor = self._now()

        async def step() -> None:
            nonlocal cursor
            cursor, _ = await self._read_events(calls, cursor)

        return step

    async def _review(self) -> None:
        """Look for everything that is open: decisions that are not carried out, and bills that were missed."""
        started_at = self._now()
        unsettled = await asyncio.to_thread(self._ledger.agreements, is_settled=False)
        await asyncio.to_thread(self._parts.money.write_off, unsettled)
        unfinished = {(each.kind, each.bill_id) for each in await asyncio.to_thread(self._decisions.unfinished)}
        postponed, self._postponed = self._postponed, set()
        for kind, bill_id in unfinished | postponed:
            self._begin(kind, bill_id)
        since = self._reviewed_at
        if since is None:  # all invoices that may be open, whenever they came
            late = started_at - timedelta(seconds=self._timings.late_invoice_seconds)
            written_off = await asyncio.to_thread(self._ledger.written_off, since=late)
            # A killed batcher may not have recorded its last agreement.
            recent = started_at - timedelta(seconds=self._timings.write_off_seconds)
            since = min([recent, *(each.created_at for each in (*unsettled, *written_off))])
        calls, cursor, is_full = self._calls[BillKind.INVOICE], since - _LATE_EVENTS, True
        while is_full:
            cursor, is_full = await self._read_events(calls, cursor, timeout=0)
        self._reviewed_at = started_at

    async def _read_events(self, calls: _Calls, after: datetime, **options: Any) -> tuple[datetime, bool]:
        """Begin to settle the bills of one page of events.

        :return: where the next page begins, and whether this one was full.
        """
        limit = self._timings.poll_limit_seconds
        events = await calls.get_events(
            after_timestamp=after, max_events=_PAGE_EVENTS, _request_timeout=limit, **options
        )
        for event in events:
            bill_id = getattr(event, calls.id_name, None)
            if bill_id:
                self._begin(calls.kind, bill_id)
        last = max((event.event_date for event in events), default=after)
        is_full = len(events) >= _PAGE_EVENTS
        # Further events may have the time of the last one.
        return (max(last - _EVENT_RESOLUTION, after) if is_full and last - _EVENT_RESOLUTION > after else last), is_full

    def _begin(self, kind: BillKind, bill_id: str) -> None:
        """Begin to settle a bill, unless that is done or under way."""
        if bill_id not in self._done and bill_id not in self._settling:
            self._settling[bill_id] = asyncio.create_task(self._settle_with_retries(self._calls[kind], bill_id))

    # Settling one bill

    async def _settle_with_retries(self, calls: _Calls, bill_id: str) -> None:
        try:
            for failures in itertools.count(1):
                try:
                    is_done = await self._settle(calls, bill_id)
                    break
                except Exception as error:
                    if failures == 1:
                        log.warning("the %s %s cannot be settled yet: %s", calls.title, bill_id, explain(error))
                await asyncio.sleep(self._timings.payment_backoff.after(failures))
            if is_done:
                self._done.add(bill_id)
            else:
                self._postponed.add((calls.kind, bill_id))
        finally:
            self._settling.pop(bill_id, None)

    async def _settle(self, calls: _Calls, bill_id: str) -> bool:
        """Judge a bill, unless that was done before, and carry the decision out.

        :return: whether it needs no more attention; otherwise it is looked at again in the next review.
        """
        async with self._slots:
            judged = await self._judge(calls, bill_id)
        if isinstance(judged, bool):
            return judged
        decision, agreement, bill = judged
        if decision is not None:
            async with self._turns[agreement.record.provider_id], self._telling_slots:
                await self._carry_out(calls, decision, agreement, bill)
        await asyncio.to_thread(self._decisions.finish, bill_id, now=self._now())
        if calls.kind is BillKind.INVOICE:
            self._note_settled(bill.agreement_id)
        return True

    async def _judge(self, calls: _Calls, bill_id: str) -> bool | tuple[DecisionRecord | None, _BilledAgreement, Any]:
        """Judge a bill, unless that was done before.

        :return: the decision that is to be carried out, None if the daemon knows it, with the agreement and the bill;
            or what `_settle` returns, because there is nothing to do now.
        """
        decision = await asyncio.to_thread(self._decisions.get, bill_id)
        if decision is not None and decision.finished_at is not None:
            if decision.kind is BillKind.INVOICE:
                self._note_settled(decision.agreement_id)
            return True
        try:
            bill = await calls.get(bill_id, _request_timeout=self._timings.poll_limit_seconds)
        except Exception as error:
            if getattr(error, "status", None) != 404:
                raise
            return True  # another daemon's
        id, status = bill.agreement_id, str(bill.status)
        if calls.kind is BillKind.DEBIT_NOTE and id in self._settled_agreements:
            return True
        agreement = await self._find_agreement(id)
        if agreement is None:
            return id in self._foreign_agreements
        if status in _PAID:
            # By a batcher that was killed before it could record that, or by the operator.
            await asyncio.to_thread(self._decisions.record_accepted, self._describe(calls, bill))
            return None, agreement, bill
        if status in _PAYABLE or status == _REJECTED:
            decision = decision or await self._decide(calls, bill, agreement)
            if status == _REJECTED and not decision.is_refused:
                log.warning("the %s %s was rejected at the daemon and is not paid", calls.title, bill_id)
                await asyncio.to_thread(self._decisions.withdraw, bill_id, reason=_REJECTED_BEFORE, now=self._now())
                return None, agreement, bill
            return decision, agreement, bill
        if status == _CANCELLED:
            if decision is None:
                return True  # as if it had never come
            await asyncio.to_thread(self._decisions.withdraw, bill_id, reason=_WAS_CANCELLED, now=self._now())
            return None, agreement, bill
        return False

    async def _find_agreement(self, agreement_id: str) -> _BilledAgreement | None:
        """Return the agreement of a bill; None if it is not ours to pay."""
        if agreement_id in self._foreign_agreements:
            return None
        try:
            agreement = await self._market.get_agreement(agreement_id)
        except Exception as error:
            if getattr(error, "status", None) != 404:
                raise
            self._foreign_agreements.add(agreement_id)  # another requestor's on the same daemon, or deleted
            return None
        owner = (agreement.demand.properties or {}).get(OWNER)
        if owner != self._session.owner and not self._session.is_left_over(owner):
            if not self._session.is_of_this_home(owner):
                self._foreign_agreements.add(agreement_id)
            return None
        try:
            record, price = describe_agreement(agreement, allocation_id=self._session.allocation_id)
        except BadOffer as error:
            log.warning("a bill cannot be checked and is ignored: %s", error)
            self._foreign_agreements.add(agreement_id)
            return None
        is_own = owner == self._session.owner
        return _BilledAgreement(record=record, price=price, valid_to=agreement.valid_to, is_own=is_own)

    async def _decide(self, calls: _Calls, bill: Any, agreement: _BilledAgreement) -> DecisionRecord:
        """Judge a bill: by what its agreement can have cost until its end, or until now while it runs."""
        max_amount = await asyncio.to_thread(self._max_amount, calls.kind, bill.agreement_id, agreement)
        made, refusal = self._describe(calls, bill), None
        if str(bill.status) == _REJECTED:
            refusal = _REJECTED_BEFORE
        elif made.amount > max_amount:
            refusal = f"It charges {made.amount:f} GLM, and at most {max_amount:f} GLM can be owed."
        elif made.amount != _amount(calls, bill):
            refusal = _NO_AMOUNT
        elif calls.kind is BillKind.DEBIT_NOTE and bill.payment_due_date is not None:
            refusal = _NOT_AGREED
        made = replace(made, max_amount=max_amount, is_refused=refusal is not None, reason=refusal)
        decision = await asyncio.to_thread(self._decisions.decide, made)
        if decision.is_refused:
            name = agreement.record.provider_name
            log.warning("the %s of provider %s is rejected: %s", calls.title, name, decision.reason)
        return decision

    def _describe(self, calls: _Calls, bill: Any) -> DecisionRecord:
        """Return the decision to pay a bill."""
        amount = bounded(_amount(calls, bill), _MAX_PLACES)
        return DecisionRecord(
            bill_id=getattr(bill, calls.id_name),
            kind=calls.kind,
            agreement_id=bill.agreement_id,
            activity_id=bill.activity_id if calls.kind is BillKind.DEBIT_NOTE else None,
            amount=amount,
            max_amount=amount,
            is_refused=False,
            decided_at=self._now(),
        )

    def _max_amount(self, kind: BillKind, agreement_id: str, agreement: _BilledAgreement) -> Decimal:
        """Return the most that a bill may demand. Called in a thread."""
        ledger, running = self._ledger, self._parts.money.running.get(agreement_id)
        ledger.record_agreement(agreement.record)
        known = ledger.agreement(agreement_id)
        assert known is not None, "it was recorded"
        seconds = min(self._now(), agreement.valid_to) - known.created_at
        if running is not None:
            own_seconds = timedelta(seconds=running.seconds())
            seconds = own_seconds if running.is_unused else max(seconds, own_seconds)
        if kind is BillKind.INVOICE and known.ended_at is None:
            # An invoice means that the agreement has ended, even if its end was not observed here.
            now = known.created_at + seconds
            ledger.end_agreement(agreement_id, reason="The provider sent its invoice.", now=now)
            known = ledger.agreement(agreement_id) or known
        if known.ended_at is not None:
            # Nothing runs beyond the expiry, though that may have been noticed later.
            seconds = min(known.ended_at, agreement.valid_to) - known.created_at
        return self._timings.bill_limit(agreement.price, seconds.total_seconds())

    async def _carry_out(self, calls: _Calls, decision: DecisionRecord, agreement: _BilledAgreement, bill: Any) -> None:
        """Accept a bill that is to be paid; tell the daemon of one that is refused. :raises Exception: it fails."""
        if not decision.is_refused:
            await self._accept(calls, decision, agreement, bill)
            return
        if decision.amount > decision.max_amount and decision.reason != BILLED_BEFORE:
            reason = f"Its {calls.title} was too high. {decision.reason}"
            self._parts.provider_records.record_overbilling(agreement.record.provider_id, reason)
        if str(bill.status) != _REJECTED:
            await self._reject(calls, decision)

    async def _accept(self, calls: _Calls, decision: DecisionRecord, agreement: _BilledAgreement, bill: Any) -> None:
        """Accept a bill; an invoice from an allocation of its own if necessary.

        The session's allocation is limited to its own budget, and a debt from before must be paid anyway.
        """
        try:
            await self._accept_from(self._session.allocation_id, calls, decision)
            return
        except Exception as error:
            if calls.kind is not BillKind.INVOICE or getattr(error, "status", None) != 400:
                raise
        extra = self._engine._payment_api.new_allocation(
            tagged(decision.amount + _ALLOCATION_STEP, self._session.tag),
            payment_platform=bill.payment_platform,
            payment_address=bill.payer_addr,
            expires=self._now() + timedelta(hours=1),
        )
        async with extra as allocation:
            await self._accept_from(allocation.id, calls, decision)
        if agreement.is_own:
            self._session.is_stale = True  # its allocation is used up

    async def _accept_from(self, allocation_id: str, calls: _Calls, decision: DecisionRecord) -> None:
        from ya_payment.models import Acceptance

        acceptance = Acceptance(total_amount_accepted=f"{decision.amount:f}", allocation_id=allocation_id)
        await calls.accept(decision.bill_id, acceptance, _request_timeout=_PROVIDER_SECONDS)

    async def _reject(self, calls: _Calls, decision: DecisionRecord) -> None:
        from ya_payment.models import Rejection

        why: Any = "INCORRECT_AMOUNT"
        rejection = Rejection(rejection_reason=why, total_amount_accepted="0", message=decision.reason)
        try:
            await calls.reject(decision.bill_id, rejection, _request_timeout=_PROVIDER_SECONDS)
        except Exception as error:
            if getattr(error, "status", None) not in NO_SUCH_CALL:
                raise
            log.info("the daemon cannot be told that a bill is rejected: %s", explain(error))

    def _note_settled(self, agreement_id: str) -> None:
        self._settled_agreements.add(agreement_id)
        self._expected.discard(agreement_id)
        if not self._expected:
            self._settled.set()

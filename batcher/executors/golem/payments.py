"""Checks and pays invoices and debit notes, those of earlier runs included.

Run by `session.py`. yapapi's own payment loops are switched off: one failed poll ends them, they pay any amount, and
one unexpected debit note makes them terminate the agreement with its work. This module compares a bill (an invoice or a
debit note) with the most that the agreement can have cost by the local clock, and records it in the ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from batcher.executors.golem.ledger_writer import describe_agreement
from batcher.executors.golem.offers import BadOffer
from batcher.executors.golem.parts import GolemParts
from batcher.executors.golem.recovery import tagged
from batcher.executors.golem.yapapi_adapter import OWNER, explain
from store.ledger import AgreementRecord, BillState, DebitNoteRecord, InvoiceRecord

if TYPE_CHECKING:
    from batcher.executors.golem.session import Session

log = logging.getLogger(__name__)

#: Granularity of allocations; one for a single invoice must be a step larger than it.
_ALLOCATION_STEP = Decimal("1e-12")
#: Pause between two polls, which the daemon holds while there is nothing new.
_POLL_PAUSE_SECONDS = 0.05


class PaymentProcessor:
    """The payments of one session, which is open."""

    def __init__(self, parts: GolemParts, session: Session) -> None:
        self._parts = parts
        self._timings = parts.timings
        self._session = session
        self._engine = session.engine
        self._payment = self._engine._payment_api._api
        self._market = self._engine._market_api._api
        self._tasks: list[asyncio.Task[None]] = []
        #: Ended agreements of this session that are not paid -> their seconds.
        self._expected: dict[str, float] = {}
        self._settled = asyncio.Event()
        self._settled.set()
        self._done: set[str] = set()
        self._lock = asyncio.Lock()

    def start(self) -> None:
        """Begin to poll for new bills, and fetch those that came before."""
        api = self._payment
        invoices = self._poll(api.get_invoice_events, "invoice_id", api.get_invoice, self._settle_invoice)
        debit_notes = self._poll(
            api.get_debit_note_events, "debit_note_id", api.get_debit_note, self._settle_debit_note
        )
        reviews = self._run_forever(self._review, self._timings.review_seconds)
        self._tasks = [asyncio.create_task(each) for each in (reviews, invoices, debit_notes)]

    def expect_invoice(self, agreement_id: str, seconds: float) -> None:
        """Expect the invoice of an agreement that has ended, whose activity ran this long by the local clock."""
        if agreement_id not in self._done:
            self._expected.setdefault(agreement_id, seconds)
            self._settled.clear()

    async def wait_until_settled(self, seconds: float) -> int:
        """Wait for the expected invoices, at most this long. :return: how many are missing."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._settled.wait()
        return len(self._expected)

    async def close(self) -> None:
        """Stop polling."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    # Polling

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

    async def _poll(
        self,
        get_events: Callable[..., Any],
        id_name: str,
        get_bill: Callable[[str], Any],
        settle: Callable[[Any], Any],
    ) -> None:
        """Settle the bills of one kind that come from now on."""
        cursor = datetime.now(UTC)

        async def step() -> None:
            nonlocal cursor
            latest = cursor
            for event in await get_events(after_timestamp=cursor, _request_timeout=self._timings.poll_limit_seconds):
                latest = max(latest, event.event_date)
                bill_id = getattr(event, id_name, None)
                if bill_id:
                    await settle(await get_bill(bill_id))
            cursor = latest  # not before: what failed is fetched again

        await self._run_forever(step, _POLL_PAUSE_SECONDS)

    async def _review(self) -> None:
        """Process all invoices since the oldest unsettled agreement, whenever they came."""
        open_agreements = await asyncio.to_thread(self._parts.ledger.agreements, is_settled=False)
        if not open_agreements:
            return
        since = min(each.created_at for each in open_agreements) - timedelta(minutes=5)
        for invoice in await self._payment.get_invoices(after_timestamp=since):
            await self._settle_invoice(invoice)

    # Checking and paying

    async def _settle_invoice(self, invoice: Any) -> None:
        async with self._lock:
            if invoice.agreement_id in self._done or str(invoice.status) not in ("RECEIVED", "ACCEPTED", "SETTLED"):
                return
            checked = await self._max_bill(invoice.agreement_id)
            if checked is None:
                return
            agreement, max_cost, is_old = checked
            amount = Decimal(str(invoice.amount))
            ledger, enqueue = self._parts.ledger, self._parts.ledger_writer.enqueue
            enqueue(ledger.record_agreement, agreement)
            # An invoice means that the agreement has ended, even if its end was not observed here.
            reason = "The provider sent its invoice."
            enqueue(ledger.end_agreement, agreement.id, reason=reason, now=datetime.now(UTC))
            state, refusal = BillState.ACCEPTED, None
            # Otherwise it was accepted before, by a batcher that was killed before it could record that.
            is_new = str(invoice.status) == "RECEIVED"
            if is_new and amount > max_cost:
                state = BillState.REFUSED
                refusal = f"It charges {amount:f} GLM, and at most {max_cost:f} GLM can be owed."
                log.warning("the invoice of provider %s is rejected: %s", agreement.provider_name, refusal)
                self._parts.provider_records.record_overbilling(
                    agreement.provider_id, f"Its invoice was too high. {refusal}"
                )
            elif is_new:
                self._record_invoice(invoice, amount, BillState.RECEIVED, None)
                try:
                    await self._accept(invoice, amount, is_old=is_old)
                except Exception as error:
                    log.warning(
                        "the invoice of provider %s cannot be paid yet: %s", agreement.provider_name, explain(error)
                    )
                    if getattr(error, "status", None) != 400:
                        raise
                    if not is_old:
                        self._session.is_stale = True
                    return
            self._record_invoice(invoice, amount, state, refusal)
            self._done.add(agreement.id)
            self._expected.pop(agreement.id, None)
            if not self._expected:
                self._settled.set()

    async def _accept(self, invoice: Any, amount: Decimal, *, is_old: bool) -> None:
        """Accept an invoice; one of an earlier session from an allocation of its own if necessary.

        The session's allocation is limited to its own budget, and a debt from before must be paid anyway.
        """
        try:
            await self._accept_from(self._session.allocation_id, invoice)
            return
        except Exception as error:
            if not is_old or getattr(error, "status", None) != 400:
                raise
        extra = self._engine._payment_api.new_allocation(
            tagged(amount + _ALLOCATION_STEP, self._session.tag),
            payment_platform=invoice.payment_platform,
            payment_address=invoice.payer_addr,
            expires=datetime.now(UTC) + timedelta(hours=1),
        )
        async with extra as allocation:
            await self._accept_from(allocation.id, invoice)

    async def _accept_from(self, allocation_id: str, invoice: Any) -> None:
        acceptance = _acceptance(invoice.amount, allocation_id)
        await self._payment.accept_invoice(invoice.invoice_id, acceptance, _request_timeout=60)

    def _record_invoice(self, invoice: Any, amount: Decimal, state: BillState, reason: str | None) -> None:
        now = datetime.now(UTC)
        record = InvoiceRecord(
            id=invoice.invoice_id,
            agreement_id=invoice.agreement_id,
            amount=amount,
            state=state,
            received_at=now,
            settled_at=None if state is BillState.RECEIVED else now,
            reason=reason,
        )
        self._parts.ledger_writer.enqueue(self._parts.ledger.record_invoice, record)

    async def _settle_debit_note(self, note: Any) -> None:
        """Accept an interim bill if it is plausible; providers stop working if it is not accepted."""
        async with self._lock:
            if str(note.status) != "RECEIVED":
                return
            checked = await self._max_bill(note.agreement_id)
            if checked is None:
                return
            agreement, max_cost, _ = checked
            amount = Decimal(str(note.total_amount_due))
            state = BillState.REFUSED
            if amount > max_cost:
                log.warning(
                    "a debit note of provider %s for %s GLM is rejected", agreement.provider_name, f"{amount:f}"
                )
                self._parts.provider_records.record_overbilling(agreement.provider_id, "Its debit note was too high.")
            elif note.payment_due_date is not None:
                # Payment before the end was not agreed; the invoice covers the whole amount.
                log.info(
                    "a debit note of provider %s demands immediate payment and is ignored", agreement.provider_name
                )
            else:
                acceptance = _acceptance(note.total_amount_due, self._session.allocation_id)
                try:
                    await self._payment.accept_debit_note(note.debit_note_id, acceptance, _request_timeout=60)
                    state = BillState.ACCEPTED
                except Exception as error:
                    log.warning(
                        "a debit note of provider %s cannot be accepted: %s", agreement.provider_name, explain(error)
                    )
                    state = BillState.RECEIVED
            record = DebitNoteRecord(
                id=note.debit_note_id,
                activity_id=note.activity_id,
                agreement_id=note.agreement_id,
                amount=amount,
                state=state,
                received_at=datetime.now(UTC),
            )
            self._parts.ledger_writer.enqueue(self._parts.ledger.record_debit_note, record)

    async def _max_bill(self, agreement_id: str) -> tuple[AgreementRecord, Decimal, bool] | None:
        """Return an agreement, the most that it can have cost, and whether an earlier session made it.

        :return: None: it is not ours to pay.
        """
        try:
            agreement = await self._market.get_agreement(agreement_id)
        except Exception as error:
            if getattr(error, "status", None) == 404:
                return None  # another requestor's on the same daemon, or deleted
            raise
        owner = (agreement.demand.properties or {}).get(OWNER)
        is_old = self._session.is_left_over(owner)
        if owner != self._session.owner and not is_old:
            return None
        try:
            record, price = describe_agreement(agreement, allocation_id=self._session.allocation_id)
        except BadOffer as error:
            log.warning("a bill cannot be checked and is ignored: %s", error)
            return None
        # Of a running agreement, or one of an earlier run, only the beginning is known.
        since_start = (datetime.now(UTC) - record.created_at).total_seconds()
        return record, self._timings.cost_limit(price, self._expected.get(agreement_id, since_start)), is_old


def _acceptance(amount: str, allocation_id: str) -> Any:
    from ya_payment.models import Acceptance

    return Acceptance(total_amount_accepted=str(amount), allocation_id=allocation_id)

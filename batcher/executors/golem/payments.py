"""Pays what is owed, and nothing else: invoices and debit notes, those of earlier runs included.

Run by `session.py`. yapapi's own payment loops are switched off: one failed poll ends them for good, they pay whatever
is asked for, and one odd debit note makes them end the agreement with the work in it. Here a bill is compared with what
the agreement can have cost by our own clock, and what became of it is written into the ledger.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from batcher.executors.golem.ledger_writer import LedgerWriter
from batcher.executors.golem.offers import describe_offer
from batcher.executors.golem.prices import BadOffer, Price
from batcher.executors.golem.recovery import tagged
from batcher.executors.golem.yapapi_adapter import OWNER, explain
from store.ledger import AgreementRecord, BillState, DebitNoteRecord, InvoiceRecord

log = logging.getLogger(__name__)

#: A bill may be this much higher than what our clock says: clocks differ, and an activity ends later there than here.
_TOLERANCE = Decimal("1.05")
_TOLERANCE_SECONDS = 15.0
#: Everything that is not settled is looked for again this often, beside the events.
_REVIEW_SECONDS = 30.0
#: Pause after the daemon failed; doubles to the last.
_INITIAL_BACKOFF_SECONDS = 0.5
_MAX_BACKOFF_SECONDS = 10.0
#: Allocations are set to whole steps of this, so that one for a bill must be a step larger.
_ALLOCATION_STEP = Decimal("1e-12")
#: Client's limit for a poll which the daemon holds for 5 s.
_POLL_LIMIT_SECONDS = 20.0


class PaymentProcessor:
    """The payments of one session.

    :param engine: yapapi's, started.
    :param owner: the session's, as its demands say it.
    :param is_left_over: tells of the batcher part of an owner whether its bills are left to us: it is gone.
    :param on_paid: called with an agreement's id and what it has cost in the end, 0 if its bill was refused.
    :param on_overbilled: called with the provider's address and the reason.
    :param on_insufficient_allocation: called when the allocation does not suffice.
    :param on_daemon_error: called with what the daemon answers when it fails, and with None when it is well again.
    """

    def __init__(
        self,
        engine: Any,
        ledger_writer: LedgerWriter,
        *,
        owner: str,
        is_left_over: Callable[[str], bool],
        allocation_id: str,
        on_paid: Callable[[str, Decimal], None],
        on_overbilled: Callable[[str, str], None],
        on_daemon_error: Callable[[BaseException | None], None],
        on_insufficient_allocation: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._payment = engine._payment_api._api
        self._market = engine._market_api._api
        self._ledger_writer = ledger_writer
        self._owner = owner
        self._is_left_over = is_left_over
        self._allocation_id = allocation_id
        self._on_paid = on_paid
        self._on_overbilled = on_overbilled
        self._on_daemon_error = on_daemon_error
        self._on_insufficient_allocation = on_insufficient_allocation
        self._tasks: list[asyncio.Task[None]] = []
        #: Agreements that were ours and are ended but not paid; told by `expect_bill`, forgotten when settled.
        self._expected: dict[str, float] = {}
        self._settled = asyncio.Event()
        self._settled.set()
        self._done: set[str] = set()
        self._lock = asyncio.Lock()

    def start(self) -> None:
        """Begin to listen, and to look for what came while nobody did."""
        since = datetime.now(UTC)
        self._tasks = [
            asyncio.create_task(self._run_forever(self._review, _REVIEW_SECONDS)),
            asyncio.create_task(self._poll_events(self._invoices_after, since)),
            asyncio.create_task(self._poll_events(self._debit_notes_after, since)),
        ]

    def expect_bill(self, agreement_id: str, seconds: float) -> None:
        """Say that an agreement has ended and will be billed.

        :param seconds: how long it was hired, by our clock.
        """
        if agreement_id not in self._done:
            self._expected[agreement_id] = seconds
            self._settled.clear()

    async def wait_until_settled(self, seconds: float) -> int:
        """Wait for the bills that are expected. :return: how many are still missing."""
        try:
            async with asyncio.timeout(seconds):
                await self._settled.wait()
        except TimeoutError:
            pass
        return len(self._expected)

    async def close(self) -> None:
        """Stop to listen."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    # Hearing of bills

    async def _run_forever(self, step: Callable[[], Any], pause_seconds: float) -> None:
        pause = _INITIAL_BACKOFF_SECONDS
        while True:
            try:
                await step()
            except Exception as error:
                self._on_daemon_error(error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _MAX_BACKOFF_SECONDS)
                continue
            self._on_daemon_error(None)
            pause = _INITIAL_BACKOFF_SECONDS
            await asyncio.sleep(pause_seconds)

    async def _poll_events(self, poll: Callable[[datetime], Any], since: datetime) -> None:
        cursor = since

        async def step() -> None:
            nonlocal cursor
            cursor = await poll(cursor)

        await self._run_forever(step, 0.05)

    async def _invoices_after(self, cursor: datetime) -> datetime:
        for event in await self._payment.get_invoice_events(
            after_timestamp=cursor, _request_timeout=_POLL_LIMIT_SECONDS
        ):
            cursor = max(cursor, event.event_date)
            if getattr(event, "invoice_id", None):
                await self._settle_invoice(await self._payment.get_invoice(event.invoice_id))
        return cursor

    async def _debit_notes_after(self, cursor: datetime) -> datetime:
        for event in await self._payment.get_debit_note_events(
            after_timestamp=cursor, _request_timeout=_POLL_LIMIT_SECONDS
        ):
            cursor = max(cursor, event.event_date)
            if getattr(event, "debit_note_id", None):
                await self._settle_debit_note(await self._payment.get_debit_note(event.debit_note_id))
        return cursor

    async def _review(self) -> None:
        """Look at all invoices since the oldest agreement that is not settled, whenever they came."""
        open_agreements = await asyncio.to_thread(self._ledger_writer.ledger.agreements, is_settled=False)
        if not open_agreements:
            return
        since = min(each.created_at for each in open_agreements) - timedelta(minutes=5)
        for invoice in await self._payment.get_invoices(after_timestamp=since):
            await self._settle_invoice(invoice)

    # Deciding

    async def _settle_invoice(self, invoice: Any) -> None:
        async with self._lock:
            if invoice.agreement_id in self._done or str(invoice.status) not in ("RECEIVED", "ACCEPTED", "SETTLED"):
                return
            judged = await self._max_bill(invoice.agreement_id)
            if judged is None:
                return
            agreement, max_cost, is_old = judged
            amount = Decimal(str(invoice.amount))
            self._ledger_writer.enqueue(lambda: self._ledger_writer.ledger.record_agreement(agreement))
            # Nobody bills before the end, whether that was seen from here or not.
            now = datetime.now(UTC)
            self._ledger_writer.enqueue(
                lambda: self._ledger_writer.ledger.end_agreement(agreement.id, reason="It was billed.", now=now)
            )
            if str(invoice.status) != "RECEIVED":
                # Accepted before, but a kill kept that from being noted.
                self._note_invoice(invoice, amount, BillState.ACCEPTED, None)
                self._finish(invoice.agreement_id, amount)
                return
            if amount > max_cost:
                reason = f"It asks for {amount:f} GLM where at most {max_cost:f} can be owed."
                log.warning("the bill of %s is refused: %s", agreement.provider_name, reason)
                self._note_invoice(invoice, amount, BillState.REFUSED, reason)
                self._on_overbilled(agreement.provider_id, f"Its bill was too high. {reason}")
                self._finish(invoice.agreement_id, Decimal(0))
                return
            self._note_invoice(invoice, amount, BillState.RECEIVED, None)
            try:
                await self._accept(invoice, amount, is_old=is_old)
            except Exception as error:
                log.warning("the bill of %s could not be paid yet: %s", agreement.provider_name, explain(error))
                if getattr(error, "status", None) != 400:
                    raise
                if not is_old:
                    self._on_insufficient_allocation()
                return
            self._note_invoice(invoice, amount, BillState.ACCEPTED, None)
            self._finish(invoice.agreement_id, amount)

    async def _accept(self, invoice: Any, amount: Decimal, *, is_old: bool) -> None:
        """Have an invoice paid, one of an earlier session from money of its own if need be.

        What this session has set aside is what it may spend itself. A debt from before is owed all the same.
        """
        try:
            await self._accept_from(self._allocation_id, invoice)
            return
        except Exception as error:
            if not is_old or getattr(error, "status", None) != 400:
                raise
        tag = self._owner.partition(".")[0]
        extra = self._engine._payment_api.new_allocation(
            tagged(amount + _ALLOCATION_STEP, tag),
            payment_platform=invoice.payment_platform,
            payment_address=invoice.payer_addr,
            expires=datetime.now(UTC) + timedelta(hours=1),
        )
        async with extra as allocation:
            await self._accept_from(allocation.id, invoice)

    async def _accept_from(self, allocation_id: str, invoice: Any) -> None:
        from ya_payment.models import Acceptance

        acceptance = Acceptance(total_amount_accepted=str(invoice.amount), allocation_id=allocation_id)
        await self._payment.accept_invoice(invoice.invoice_id, acceptance, _request_timeout=60)

    def _note_invoice(self, invoice: Any, amount: Decimal, state: BillState, reason: str | None) -> None:
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
        self._ledger_writer.enqueue(lambda: self._ledger_writer.ledger.record_invoice(record))

    def _finish(self, agreement_id: str, amount: Decimal) -> None:
        self._done.add(agreement_id)
        self._expected.pop(agreement_id, None)
        if not self._expected:
            self._settled.set()
        self._on_paid(agreement_id, amount)

    async def _settle_debit_note(self, note: Any) -> None:
        """Accept an interim bill if it is in order; providers stop to work for those who do not."""
        async with self._lock:
            if str(note.status) != "RECEIVED":
                return
            judged = await self._max_bill(note.agreement_id)
            if judged is None:
                return
            agreement, max_cost, _ = judged
            amount = Decimal(str(note.total_amount_due))
            state = BillState.REFUSED
            if amount > max_cost:
                log.warning("a debit note of %s over %s GLM is refused", agreement.provider_name, f"{amount:f}")
                self._on_overbilled(agreement.provider_id, "Its debit note was too high.")
            elif note.payment_due_date is not None:
                # Nobody agreed to pay before the end; the invoice will say it all.
                log.info("a debit note of %s wants to be paid at once and is left alone", agreement.provider_name)
            else:
                from ya_payment.models import Acceptance

                acceptance = Acceptance(
                    total_amount_accepted=str(note.total_amount_due), allocation_id=self._allocation_id
                )
                try:
                    await self._payment.accept_debit_note(note.debit_note_id, acceptance, _request_timeout=60)
                    state = BillState.ACCEPTED
                except Exception as error:
                    log.warning("a debit note of %s could not be accepted: %s", agreement.provider_name, explain(error))
                    state = BillState.RECEIVED
            record = DebitNoteRecord(
                id=note.debit_note_id,
                activity_id=note.activity_id,
                agreement_id=note.agreement_id,
                amount=amount,
                state=state,
                received_at=datetime.now(UTC),
            )
            self._ledger_writer.enqueue(lambda: self._ledger_writer.ledger.record_debit_note(record))

    async def _max_bill(self, agreement_id: str) -> tuple[AgreementRecord, Decimal, bool] | None:
        """Tell what an agreement can have cost at most, and whether an earlier session made it; None if others pay."""
        try:
            agreement = await self._market.get_agreement(agreement_id)
        except Exception as error:
            if getattr(error, "status", None) == 404:
                return None  # another requestor's of the same daemon, or long forgotten
            raise
        owner = (agreement.demand.properties or {}).get(OWNER)
        if not isinstance(owner, str):
            return None
        tag, _, batcher = owner.partition(".")
        is_ours = tag == self._owner.partition(".")[0] and (owner == self._owner or self._is_left_over(batcher))
        if not is_ours:
            return None
        try:
            name, price = describe_offer(agreement.offer.properties, agreement.offer.provider_id)
        except BadOffer as error:
            log.warning("a bill cannot be judged and is left alone: %s", error)
            return None
        record = AgreementRecord(
            id=agreement.agreement_id,
            allocation_id=self._allocation_id,
            provider_id=agreement.offer.provider_id,
            provider_name=name,
            model=str(agreement.demand.properties.get("golem.srv.app.mlg.model", "unknown")),
            start_price=price.start,
            price_per_cpu_second=price.cpu_second,
            price_per_second=price.second,
            created_at=agreement.timestamp,
        )
        return record, self._bill_limit(record, price), owner != self._owner

    def _bill_limit(self, agreement: AgreementRecord, price: Price) -> Decimal:
        # One that is still running, or of an earlier run that may have been killed, is known by its beginning only.
        known = self._expected.get(agreement.id)
        seconds = known if known is not None else (datetime.now(UTC) - agreement.created_at).total_seconds()
        return price.max_cost(seconds + _TOLERANCE_SECONDS) * _TOLERANCE

"""The payment service: invoices, debit notes, and their payment from the requestor's wallet.

The API calls it for the requestor, `Invoicer` for the providers. All amounts are exact decimals; no money is
transferred.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

from devnet.errors import ApiError, NotFound
from devnet.records import Agreement, Allocation, Bill, format_amount, from_row, to_row
from devnet.timing import ChangeNotifier, Clock, MonotonicTimestamps, format_time, parse_time, utc_now
from devnet.wallet import PLATFORMS, Wallet, parse_amount

_REJECTION_REASONS = ("UNSOLICITED_SERVICE", "BAD_SERVICE", "INCORRECT_AMOUNT")


class PaymentService:
    """All bills and payments of a devnet.

    :param funds: the initial balance of the wallet, in GLM.
    :param on_change: called after every change of the state that is kept over a restart.
    """

    def __init__(
        self, *, requestor_id: str, funds: Decimal, clock: Clock = utc_now, on_change: Callable[[], None]
    ) -> None:
        self.invoices: dict[str, Bill] = {}
        self.debit_notes: dict[str, Bill] = {}
        self.payments: list[dict[str, Any]] = []
        self.invoice_events: list[dict[str, Any]] = []
        self.debit_note_events: list[dict[str, Any]] = []
        #: Agreement id -> amount accepted so far, by invoice or debit notes.
        self.accepted: dict[str, Decimal] = {}
        #: Agreement id -> amount paid so far.
        self.paid: dict[str, Decimal] = {}
        self._requestor_id = requestor_id
        self._clock = clock
        self._timestamps = MonotonicTimestamps(clock)
        self._on_change = on_change
        self._notifier = ChangeNotifier()
        self.wallet = Wallet(requestor_id=requestor_id, funds=funds, clock=clock, on_change=self._changed)

    # The providers' side

    def send_invoice(self, agreement: Agreement, amount: Decimal, due_at: datetime) -> Bill:
        """Deliver a provider's invoice for an agreement."""
        invoice = self._bill(agreement, list(agreement.usage), amount, due_at)
        self.invoices[invoice.bill_id] = invoice
        self._event(self.invoice_events, "InvoiceReceivedEvent", "invoiceId", invoice)
        return invoice

    def send_debit_note(
        self, agreement: Agreement, activity_id: str, amount: Decimal, usage: list[float], due_at: datetime | None
    ) -> Bill:
        """Deliver a provider's debit note: the cost of an activity so far."""
        note = self._bill(agreement, [activity_id], amount, due_at)
        note.usage = usage
        earlier = [each.bill_id for each in self.debit_notes.values() if each.activity_ids == [activity_id]]
        note.previous_id = earlier[-1] if earlier else None
        self.debit_notes[note.bill_id] = note
        self._event(self.debit_note_events, "DebitNoteReceivedEvent", "debitNoteId", note)
        return note

    def _bill(self, agreement: Agreement, activity_ids: list[str], amount: Decimal, due_at: datetime | None) -> Bill:
        properties = agreement.demand["properties"]
        platform = str(properties.get("golem.com.payment.chosen-platform", PLATFORMS[0]))
        address = properties.get(f"golem.com.payment.platform.{platform}.address", self._requestor_id)
        return Bill(
            bill_id=str(uuid.uuid4()),
            issuer_id=agreement.provider_id,
            recipient_id=self._requestor_id,
            payer_address=str(address),
            platform=platform,
            agreement_id=agreement.agreement_id,
            activity_ids=activity_ids,
            amount=amount,
            created_at=self._clock(),
            due_at=due_at,
        )

    # The requestor's side

    def invoice(self, invoice_id: str) -> Bill:
        """Return an invoice. :raises NotFound: there is none."""
        if invoice_id not in self.invoices:
            raise NotFound(f"There is no invoice {invoice_id}.")
        return self.invoices[invoice_id]

    def debit_note(self, debit_note_id: str) -> Bill:
        """Return a debit note. :raises NotFound: there is none."""
        if debit_note_id not in self.debit_notes:
            raise NotFound(f"There is no debit note {debit_note_id}.")
        return self.debit_notes[debit_note_id]

    def accept_invoice(self, invoice_id: str, acceptance: Mapping[str, Any]) -> None:
        """Accept an invoice and pay what the agreement's debit notes have not."""
        invoice = self.invoice(invoice_id)
        if invoice.status == "ACCEPTED":
            return
        self._accept(invoice, acceptance, invoice.amount)

    def accept_debit_note(self, debit_note_id: str, acceptance: Mapping[str, Any]) -> None:
        """Accept a debit note; if it is payable, pay what earlier debit notes of its agreement have not."""
        note = self.debit_note(debit_note_id)
        if note.status == "ACCEPTED":
            return
        # Each debit note is the total of its activity, and an agreement can have several activities.
        highest: dict[str, Decimal] = {note.activity_ids[0]: note.amount}
        for each in self.debit_notes.values():
            if each.agreement_id == note.agreement_id and each.status == "ACCEPTED":
                activity_id = each.activity_ids[0]
                highest[activity_id] = max(highest.get(activity_id, Decimal(0)), each.amount)
        self._accept(note, acceptance, sum(highest.values(), Decimal(0)))

    def reject_invoice(self, invoice_id: str, rejection: Mapping[str, Any]) -> None:
        """Reject an invoice; it can be accepted later."""
        _reject(self.invoice(invoice_id), rejection)
        self._changed()

    def reject_debit_note(self, debit_note_id: str, rejection: Mapping[str, Any]) -> None:
        """Reject a debit note; it can be accepted later."""
        _reject(self.debit_note(debit_note_id), rejection)
        self._changed()

    def _accept(self, bill: Bill, acceptance: Mapping[str, Any], total: Decimal) -> None:
        amount = parse_amount(acceptance.get("totalAmountAccepted"), "totalAmountAccepted")
        try:
            allocation = self.wallet.find(str(acceptance.get("allocationId")))
        except NotFound as error:
            raise ApiError(str(error)) from error
        if amount != bill.amount:
            raise ApiError(f"The accepted amount must be {format_amount(bill.amount)}, not {format_amount(amount)}.")
        if (allocation.address, allocation.platform) != (bill.payer_address, bill.platform):
            raise ApiError("The allocation is for another address or payment platform.")
        needed = max(Decimal(0), total - self.accepted.get(bill.agreement_id, Decimal(0)))
        if needed > allocation.remaining:
            raise ApiError(
                f"Not enough funds. Allocated: {format_amount(allocation.remaining)}, needed: {format_amount(needed)}."
            )
        allocation.spent += needed
        self.accepted[bill.agreement_id] = self.accepted.get(bill.agreement_id, Decimal(0)) + needed
        bill.status = "ACCEPTED"
        if bill.due_at is not None:
            # A debit note without a due date is only accepted; the invoice pays it.
            unpaid = total - self.paid.get(bill.agreement_id, Decimal(0))
            if unpaid > 0:
                self._pay(bill, allocation, unpaid)
        self._changed()

    def _pay(self, bill: Bill, allocation: Allocation, amount: Decimal) -> None:
        share = {"amount": format_amount(amount), "allocationId": allocation.allocation_id}
        is_note = bill.usage is not None
        self.paid[bill.agreement_id] = self.paid.get(bill.agreement_id, Decimal(0)) + amount
        self.payments.append(
            {
                "paymentId": str(uuid.uuid4()),
                "payerId": self._requestor_id,
                "payeeId": bill.issuer_id,
                "payerAddr": bill.payer_address,
                "payeeAddr": bill.issuer_id,
                "paymentPlatform": bill.platform,
                "amount": format_amount(amount),
                "timestamp": format_time(self._timestamps.next()),
                "agreementPayments": [] if is_note else [{"agreementId": bill.agreement_id, **share}],
                "activityPayments": [{"activityId": bill.activity_ids[0], **share}] if is_note else [],
                "details": "",
            }
        )

    # Long polls

    async def poll(
        self,
        kind: str,
        after: datetime | None,
        seconds: float,
        max_items: int,
        is_wanted: Callable[[dict[str, Any]], bool],
    ) -> list[dict[str, Any]]:
        """Return the events after a time; wait if there are none.

        :param kind: "invoice", "debit note" or "payment".
        :param seconds: how long to wait.
        """
        feed, key = {
            "invoice": (self.invoice_events, "eventDate"),
            "debit note": (self.debit_note_events, "eventDate"),
            "payment": (self.payments, "timestamp"),
        }[kind]
        since = "" if after is None else format_time(after)
        return (
            await self._notifier.wait_until(
                lambda: [each for each in feed if each[key] > since and is_wanted(each)], seconds
            )
        )[:max_items]

    # Across restarts

    def dump(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {
            "allocations": self.wallet.dump(),
            "invoices": [to_row(each) for each in self.invoices.values()],
            "debit_notes": [to_row(each) for each in self.debit_notes.values()],
            "payments": self.payments,
            "invoice_events": self.invoice_events,
            "debit_note_events": self.debit_note_events,
            "accepted": {key: format_amount(each) for key, each in self.accepted.items()},
            "paid": {key: format_amount(each) for key, each in self.paid.items()},
        }

    def load(self, dumped: Mapping[str, Any]) -> None:
        """Restore the state from the result of `dump`."""
        self.wallet.load(dumped["allocations"])
        self.invoices = {each["bill_id"]: from_row(Bill, each) for each in dumped["invoices"]}
        self.debit_notes = {each["bill_id"]: from_row(Bill, each) for each in dumped["debit_notes"]}
        self.payments = list(dumped["payments"])
        self.invoice_events = list(dumped["invoice_events"])
        self.debit_note_events = list(dumped["debit_note_events"])
        self.accepted = {key: Decimal(each) for key, each in dumped["accepted"].items()}
        self.paid = {key: Decimal(each) for key, each in dumped["paid"].items()}
        for event in (*self.invoice_events, *self.debit_note_events):
            self._timestamps.advance_past(parse_time(event["eventDate"]))

    # Changes

    def _changed(self) -> None:
        self._notifier.notify()
        self._on_change()

    def _event(self, feed: list[dict[str, Any]], kind: str, key: str, bill: Bill) -> None:
        feed.append({"eventType": kind, "eventDate": format_time(self._timestamps.next()), key: bill.bill_id})
        self._changed()


def _reject(bill: Bill, rejection: Mapping[str, Any]) -> None:
    if rejection.get("rejectionReason") not in _REJECTION_REASONS:
        raise ApiError(f"rejectionReason must be one of {', '.join(_REJECTION_REASONS)}.")
    parse_amount(rejection.get("totalAmountAccepted"), "totalAmountAccepted")
    if bill.status == "ACCEPTED":
        raise ApiError("The bill has already been accepted.")
    bill.status = "REJECTED"

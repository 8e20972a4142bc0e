"""The payment service: invoices, debit notes, and their payment from the requestor's wallet.

The API calls it for the requestor, `Invoicer` for the providers. All amounts are exact decimals; no money is
transferred.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

from devnet.errors import ApiError
from devnet.gftp import REQUESTOR_ID
from devnet.records import Agreement, Allocation, Bill, format_amount, from_rows, to_rows
from devnet.timing import EventFeed
from devnet.wallet import PLATFORMS, Wallet, parse_amount

#: The published reasons for rejecting a bill.
REJECTION_REASONS = ("UNSOLICITED_SERVICE", "BAD_SERVICE", "INCORRECT_AMOUNT")


class PaymentService:
    """All bills and payments of a devnet.

    :param funds: the initial balance of the wallet, in GLM.
    :param on_change: called after every change of the state that is kept over a restart.
    """

    def __init__(self, *, funds: Decimal, on_change: Callable[[], None]) -> None:
        self.invoices: dict[str, Bill] = {}
        self.debit_notes: dict[str, Bill] = {}
        self.invoice_events, self.debit_note_events = EventFeed(), EventFeed()
        self._on_change = on_change
        self.wallet = Wallet(funds=funds, on_change=on_change)

    # The providers' side

    def send_invoice(self, agreement: Agreement, amount: Decimal, due_at: datetime) -> None:
        """Deliver a provider's invoice for an agreement."""
        invoice = self._bill(agreement, list(agreement.usage), amount, due_at)
        self.invoices[invoice.bill_id] = invoice
        self.invoice_events.add(eventType="InvoiceReceivedEvent", invoiceId=invoice.bill_id)
        self._on_change()

    def send_debit_note(
        self, agreement: Agreement, activity_id: str, amount: Decimal, usage: list[float], due_at: datetime | None
    ) -> Bill:
        """Deliver a provider's debit note: the cost of an activity so far."""
        note = self._bill(agreement, [activity_id], amount, due_at)
        note.usage = usage
        earlier = [each.bill_id for each in self.debit_notes.values() if each.activity_ids == [activity_id]]
        note.previous_id = earlier[-1] if earlier else None
        self.debit_notes[note.bill_id] = note
        self.debit_note_events.add(eventType="DebitNoteReceivedEvent", debitNoteId=note.bill_id)
        self._on_change()
        return note

    def _bill(self, agreement: Agreement, activity_ids: list[str], amount: Decimal, due_at: datetime | None) -> Bill:
        properties = agreement.demand["properties"]
        platform = str(properties.get("golem.com.payment.chosen-platform", PLATFORMS[0]))
        address = properties.get(f"golem.com.payment.platform.{platform}.address", REQUESTOR_ID)
        return Bill(
            issuer_id=agreement.provider_id,
            recipient_id=REQUESTOR_ID,
            payer_address=str(address),
            platform=platform,
            agreement_id=agreement.agreement_id,
            activity_ids=activity_ids,
            amount=amount,
            due_at=due_at,
        )

    # The requestor's side

    def accept(self, bill: Bill, acceptance: Mapping[str, Any]) -> bool:
        """Accept a bill, and spend what was not spent before. :return: False if it had been accepted already."""
        if bill.status == "ACCEPTED":
            return False
        amount = parse_amount(acceptance.get("totalAmountAccepted"), "totalAmountAccepted")
        allocation = self.wallet.find(str(acceptance.get("allocationId")), ApiError)
        if amount != bill.amount:
            raise ApiError(f"The accepted amount must be {format_amount(bill.amount)}, not {format_amount(amount)}.")
        if (allocation.address, allocation.platform) != (bill.payer_address, bill.platform):
            raise ApiError("The allocation is for another address or payment platform.")
        needed = self.accepted(bill.agreement_id, bill) - self.accepted(bill.agreement_id)
        if needed > allocation.remaining:
            raise ApiError(
                f"Not enough funds. Allocated: {format_amount(allocation.remaining)}, needed: {format_amount(needed)}."
            )
        allocation.spent += needed
        bill.status = "ACCEPTED"
        self._on_change()
        return True

    def reject(self, bill: Bill, rejection: Mapping[str, Any]) -> None:
        """Reject a bill, which may still be accepted later. :raises ApiError: it is accepted, or the body is wrong."""
        reason = rejection.get("rejectionReason")
        if reason not in REJECTION_REASONS:
            raise ApiError(f"rejectionReason must be one of {', '.join(REJECTION_REASONS)}, not {reason!r}.")
        parse_amount(rejection.get("totalAmountAccepted"), "totalAmountAccepted")
        if bill.status == "ACCEPTED":
            raise ApiError("An accepted bill cannot be rejected.")
        bill.status = "REJECTED"
        self._on_change()

    def accepted(self, agreement_id: str, *more: Bill) -> Decimal:
        """Return how much of an agreement's cost has been accepted, or would be with more bills."""
        # Each debit note is the total of its activity, and an agreement can have several activities.
        highest: dict[str, Decimal] = {}
        invoiced = Decimal(0)
        for bill in (*self.invoices.values(), *self.debit_notes.values(), *more):
            if bill.agreement_id != agreement_id or (bill.status != "ACCEPTED" and bill not in more):
                continue
            if bill.usage is None:
                invoiced = max(invoiced, bill.amount)
            else:
                highest[bill.activity_ids[0]] = max(highest.get(bill.activity_ids[0], Decimal(0)), bill.amount)
        return max(invoiced, sum(highest.values(), Decimal(0)))

    # Across restarts

    def dump(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {
            "allocations": to_rows(self.wallet.allocations),
            "invoices": to_rows(self.invoices),
            "debit_notes": to_rows(self.debit_notes),
            "invoice_events": self.invoice_events,
            "debit_note_events": self.debit_note_events,
        }

    def load(self, dumped: Mapping[str, Any]) -> None:
        """Restore the state from the result of `dump`."""
        self.wallet.allocations.update(from_rows(Allocation, dumped["allocations"]))
        self.invoices.update(from_rows(Bill, dumped["invoices"]))
        self.debit_notes.update(from_rows(Bill, dumped["debit_notes"]))
        self.invoice_events[:] = dumped["invoice_events"]
        self.debit_note_events[:] = dumped["debit_note_events"]

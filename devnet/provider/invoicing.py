"""A provider's bills: the amounts, its invoices and debit notes, and the faults in them.

Made by `Provider`, which decides when to bill.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal, localcontext

from devnet.payments import PaymentService
from devnet.provider.activities import Activities
from devnet.records import Agreement, Bill, format_amount
from devnet.scenario import FaultSchedule, ProviderPlan

#: The smallest amount of GLM.
UNIT = Decimal("1e-18")
#: Due date of invoices.
PAYMENT_DAYS = 1
#: Interval of the fault frequent-debit-notes, if it has none.
DEFAULT_FREQUENT_SECONDS = 0.5


def activity_amount(plan: ProviderPlan, usage: Sequence[float], factor: float = 1.0) -> Decimal:
    """Compute the price of an activity.

    :param usage: seconds of processor time, and seconds that it existed.
    :param factor: of the fault overbill.
    """
    processor, duration = (Decimal(repr(float(each))) for each in usage)
    with localcontext() as context:
        context.prec = 60
        amount = plan.start_price + processor * plan.price_per_cpu_second + duration * plan.price_per_second
        return (amount * Decimal(repr(float(factor)))).quantize(UNIT, rounding=ROUND_HALF_UP)


@dataclass(kw_only=True)
class Invoicer:
    """Sends the bills of one provider."""

    plan: ProviderPlan
    payment: PaymentService
    activities: Activities
    faults: FaultSchedule
    #: Receives a line of text about each invoice.
    report: Callable[[str], None]
    #: Receives each debit note that is sent.
    on_debit_note: Callable[[Agreement, Bill], None]

    def debit_note_interval_seconds(self) -> float:
        """Return the time between two debit notes of a new activity; 0 for a single one at its end."""
        frequent = self.faults.triggers(self.plan.name, "frequent-debit-notes")
        return self.plan.debit_note_seconds if frequent is None else frequent.seconds or DEFAULT_FREQUENT_SECONDS

    async def send_debit_notes(self, agreement: Agreement, activity_id: str, seconds: float) -> None:
        """Send debit notes at an interval until the activity has ended."""
        while True:
            await asyncio.sleep(seconds)
            if self.activities.reason(activity_id) is not None:
                return
            self.send_debit_note(agreement, activity_id)

    def send_debit_note(self, agreement: Agreement, activity_id: str) -> None:
        """Send a debit note for the cost of an activity so far; none after the invoice."""
        if agreement.is_billed:
            return
        usage = list(self.activities.usage(activity_id))
        amount = activity_amount(self.plan, usage, agreement.price_factor)
        is_payable = self.faults.triggers(self.plan.name, "payable-debit-note") is not None
        due_at = _due_at() if is_payable else None
        self.on_debit_note(agreement, self.payment.send_debit_note(agreement, activity_id, amount, usage, due_at))

    async def send_invoice(self, agreement: Agreement) -> None:
        """Send the invoice of an agreement that has ended."""
        if self.faults.triggers(self.plan.name, "never-bill"):
            agreement.is_billed = True
            return
        if late := self.faults.triggers(self.plan.name, "late-bill"):
            await asyncio.sleep(late.seconds)
        amounts = (activity_amount(self.plan, each, agreement.price_factor) for each in agreement.usage.values())
        amount = sum(amounts, Decimal(0))
        agreement.is_billed = True
        self.payment.send_invoice(agreement, amount, _due_at())
        self.report(f"{self.plan.name} sends an invoice for {format_amount(amount)} GLM: {agreement.short_name}")


def _due_at() -> datetime:
    return datetime.now(UTC) + timedelta(days=PAYMENT_DAYS)

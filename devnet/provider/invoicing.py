"""What a provider asks for: writes its invoices and debit notes, and does it wrongly where its faults say so.

Made by `providers.Provider`, which says when. The amounts are those of `billing.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from devnet.faults import Faults
from devnet.payments import PaymentService
from devnet.provider.activities import Activities
from devnet.provider.billing import activity_amount, agreement_amount
from devnet.records import Agreement, format_amount
from devnet.scenario import ProviderPlan

#: How long a requestor may take to pay.
PAYMENT_DAYS = 1
#: Of the fault frequent-debit-notes, if it does not say.
DEFAULT_FREQUENT_SECONDS = 0.5


class Invoicer:
    """One provider's.

    :param report: gets a line for people about every invoice.
    """

    def __init__(
        self,
        plan: ProviderPlan,
        *,
        payment: PaymentService,
        activities: Activities,
        faults: Faults,
        report: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._payment = payment
        self._activities = activities
        self._faults = faults
        self._report = report
        #: Agreement id -> how many times too much is asked for.
        self._overbill_factors: dict[str, float] = {}

    def decide_overbilling(self, agreement: Agreement) -> None:
        """Decide at the beginning of an agreement how honest to be in it."""
        overbill = self._faults.triggers(self._plan.name, "overbill")
        if overbill is not None:
            self._overbill_factors[agreement.agreement_id] = overbill.factor

    def debit_note_interval_seconds(self) -> float:
        """Return the time between two debit notes of a new activity; 0 if there is only one, at its end."""
        frequent = self._faults.triggers(self._plan.name, "frequent-debit-notes")
        return self._plan.debit_note_seconds if frequent is None else frequent.seconds or DEFAULT_FREQUENT_SECONDS

    async def send_debit_notes(self, agreement: Agreement, activity_id: str, seconds: float) -> None:
        """Send a debit note again and again until the activity is over."""
        while True:
            await asyncio.sleep(seconds)
            if self._activities.reason(activity_id) is not None:
                return
            self.send_debit_note(agreement, activity_id)

    def send_debit_note(self, agreement: Agreement, activity_id: str) -> None:
        """Send a debit note over what an activity has cost until now; none after the invoice."""
        if agreement.is_billed:
            return
        usage = list(self._activities.usage(activity_id))
        amount = activity_amount(self._plan, usage, self._overbill_factors.get(agreement.agreement_id, 1.0))
        is_payable = self._faults.triggers(self._plan.name, "payable-debit-note") is not None
        self._payment.send_debit_note(agreement, activity_id, amount, usage, _due_at() if is_payable else None)

    async def send_invoice(self, agreement: Agreement) -> None:
        """Send the invoice of an agreement that is over."""
        if self._faults.triggers(self._plan.name, "never-bill"):
            agreement.is_billed = True
            return
        late = self._faults.triggers(self._plan.name, "late-bill")
        if late is not None:
            await asyncio.sleep(late.seconds)
        factor = self._overbill_factors.pop(agreement.agreement_id, 1.0)
        amount = agreement_amount(self._plan, agreement.usage.values(), factor)
        agreement.is_billed = True
        self._payment.send_invoice(agreement, amount, _due_at())
        self._report(f"{self._plan.name} sends an invoice over {format_amount(amount)} GLM: {agreement.short_name}")


def _due_at() -> datetime:
    return datetime.now(UTC) + timedelta(days=PAYMENT_DAYS)

"""What a provider asks for: writes its invoices and debit notes, and does it wrongly where its faults say so.

Made by `providers.Provider`, which says when. The amounts are those of `billing.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from devnet.activities import Activities
from devnet.faults import Faults
from devnet.payment import Payment
from devnet.provider.billing import activity_amount, agreement_amount
from devnet.records import Agreement, money
from devnet.scenario import ProviderPlan

#: How long a requestor may take to pay.
PAYMENT_DAYS = 1
#: Of the fault frequent-debit-notes, if it does not say.
FREQUENT_SECONDS = 0.5


class Biller:
    """One provider's.

    :param tell: gets a line for people about every invoice.
    """

    def __init__(
        self,
        plan: ProviderPlan,
        *,
        payment: Payment,
        activities: Activities,
        faults: Faults,
        tell: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._payment = payment
        self._activities = activities
        self._faults = faults
        self._tell = tell
        #: Agreement id -> how many times too much is asked for.
        self._factors: dict[str, float] = {}

    def begin(self, agreement: Agreement) -> None:
        """Decide at the beginning of an agreement how honest to be in it."""
        overbill = self._faults.strikes(self._plan.name, "overbill")
        if overbill is not None:
            self._factors[agreement.agreement_id] = overbill.factor

    def note_seconds(self) -> float:
        """Return the time between two debit notes of a new activity; 0 if there is only one, at its end."""
        frequent = self._faults.strikes(self._plan.name, "frequent-debit-notes")
        return self._plan.debit_note_seconds if frequent is None else frequent.seconds or FREQUENT_SECONDS

    async def send_notes(self, agreement: Agreement, activity_id: str, seconds: float) -> None:
        """Send a debit note again and again until the activity is over."""
        while True:
            await asyncio.sleep(seconds)
            if self._activities.reason(activity_id) is not None:
                return
            self.send_note(agreement, activity_id)

    def send_note(self, agreement: Agreement, activity_id: str) -> None:
        """Send a debit note over what an activity has cost until now; none after the invoice."""
        if agreement.is_billed:
            return
        usage = list(self._activities.usage(activity_id))
        amount = activity_amount(self._plan, usage, self._factors.get(agreement.agreement_id, 1.0))
        is_payable = self._faults.strikes(self._plan.name, "payable-debit-note") is not None
        self._payment.send_debit_note(agreement, activity_id, amount, usage, _due_at() if is_payable else None)

    async def send_invoice(self, agreement: Agreement) -> None:
        """Send the invoice of an agreement that is over."""
        if self._faults.strikes(self._plan.name, "never-bill"):
            agreement.is_billed = True
            return
        late = self._faults.strikes(self._plan.name, "late-bill")
        if late is not None:
            await asyncio.sleep(late.seconds)
        factor = self._factors.pop(agreement.agreement_id, 1.0)
        amount = agreement_amount(self._plan, agreement.usage.values(), factor)
        agreement.is_billed = True
        self._payment.send_invoice(agreement, amount, _due_at())
        self._tell(f"{self._plan.name} sends an invoice over {money(amount)} GLM: {agreement.short_name}")


def _due_at() -> datetime:
    return datetime.now(UTC) + timedelta(days=PAYMENT_DAYS)

"""The rows of the ledger as frozen records: what was promised, used, asked for and paid, and to whom.

Made by the executors that pay and read by the commands that show. Amounts are in GLM, as exact decimals: they are text
in the database and `Decimal` here, never floating point. Nothing in this file calculates; `shares.py` does.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal


class BillState(enum.StrEnum):
    """Where an invoice or a debit note stands. It only moves to the right: `received -> refused -> accepted`.

    What was accepted is paid and cannot be taken back; what was refused may still be accepted later.
    """

    RECEIVED = "received"
    REFUSED = "refused"
    ACCEPTED = "accepted"


@dataclass(frozen=True, kw_only=True)
class AllocationRecord:
    """Money that the payment service keeps ready for one batcher."""

    #: The payment service's id.
    id: str
    #: The batcher that asked for it.
    batcher_id: str
    #: The payment platform, for example "erc20-polygon-glm".
    platform: str
    #: The paying account.
    address: str
    #: How much may be paid from it.
    amount: Decimal
    created_at: datetime
    #: None while the money is kept ready.
    released_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class AgreementRecord:
    """A contract with one provider."""

    #: The market's id.
    id: str
    #: Where the money comes from.
    allocation_id: str
    #: The provider's address, and the name it gives itself.
    provider_id: str
    provider_name: str
    #: The model that it works on.
    model: str
    #: Paid once for each activity.
    start_price: Decimal
    #: Paid for a second of one core at full load.
    price_per_cpu_second: Decimal
    #: Paid for a second that passes.
    price_per_second: Decimal
    created_at: datetime
    #: None while it is in force.
    ended_at: datetime | None = None
    #: Why it ended.
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class ActivityRecord:
    """One machine that ran under an agreement; for providers without them there is one an agreement."""

    id: str
    agreement_id: str
    created_at: datetime
    #: None while it runs.
    ended_at: datetime | None = None
    #: What it used, as the provider counted; None until known.
    cpu_seconds: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class DebitNoteRecord:
    """An interim bill."""

    id: str
    activity_id: str
    agreement_id: str
    #: All that the activity has cost so far, the earlier notes included.
    amount: Decimal
    state: BillState
    received_at: datetime


@dataclass(frozen=True, kw_only=True)
class InvoiceRecord:
    """The bill for an agreement."""

    id: str
    agreement_id: str
    #: What was asked for, or when it is accepted, what was accepted.
    amount: Decimal
    state: BillState
    received_at: datetime
    #: When it was accepted or refused; the money counts on that day.
    settled_at: datetime | None = None
    #: Why it was refused.
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class ProviderRecord:
    """What is known about one provider."""

    #: Its address.
    id: str
    #: The name it gives itself; several may bear the same.
    name: str
    first_seen_at: datetime
    #: When it made its latest offer.
    seen_at: datetime
    #: The prices of that offer; see AgreementRecord.
    start_price: Decimal
    price_per_cpu_second: Decimal
    price_per_second: Decimal
    #: Chunks that it answered, and that failed there.
    done: int
    failed: int
    #: Images that it answered.
    images: int
    #: How much of its latest work was good: 0 none, 1 all of it.
    score: float
    #: The end of the ban; None without a ban, and in one for good.
    banned_until: datetime | None
    #: Why it is banned; None without a ban.
    ban_reason: str | None
    #: True when a person banned it, not a batcher.
    is_banned_by_operator: bool

    def is_banned(self, now: datetime) -> bool:
        """Tell whether it gets no work now."""
        return self.ban_reason is not None and (self.banned_until is None or self.banned_until > now)


@dataclass(frozen=True, kw_only=True)
class SpeedRecord:
    """How fast one provider answered one model lately."""

    provider_id: str
    model: str
    #: Images and the seconds they took, older work counting less and less.
    images: float
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Return the speed."""
        return self.images / self.seconds


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """What one day, model or provider cost."""

    #: The day (UTC, "2026-11-20", or "open"), the model, the provider's address, or "total".
    key: str
    #: The same for people: a provider's name.
    name: str
    #: Requests answered.
    images: int
    #: Chunks that ended.
    chunks: int
    #: Accepted invoices.
    paid: Decimal
    #: An estimate of what has no accepted or refused invoice yet.
    open: Decimal
    #: Refused invoices; nobody pays them.
    refused: Decimal

"""The records of market and payments, and their conversion to and from JSON.

Only `market.py`, `agreements.py`, `payments.py`, `wallet.py` and the provider of an agreement change them. `to_api()`
returns a record as the API shows it, `to_row` and `from_row` as the state file keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from decimal import Decimal
from typing import Any, TypeVar

from devnet.timing import format_time, parse_time

_Record = TypeVar("_Record")


@dataclass(kw_only=True)
class Demand:
    """A requestor's demand on the market."""

    demand_id: str
    requestor_id: str
    properties: dict[str, Any]
    constraints: str
    created_at: datetime
    #: From golem.srv.comp.expiration; None if it is not set.
    expires_at: datetime | None
    is_open: bool = True
    #: Events that have not been fetched yet.
    events: list[dict[str, Any]] = field(default_factory=list)

    def to_api(self) -> dict[str, Any]:
        """Return the record as the API shows it."""
        return {
            "demandId": self.demand_id,
            "requestorId": self.requestor_id,
            "timestamp": format_time(self.created_at),
            "properties": self.properties,
            "constraints": self.constraints,
        }


@dataclass(kw_only=True)
class Proposal:
    """A proposal of either side in a negotiation."""

    proposal_id: str
    issuer_id: str
    demand_id: str
    offer_id: str
    #: Initial, Draft, Rejected, Accepted or Expired.
    state: str
    properties: dict[str, Any]
    constraints: str
    created_at: datetime
    previous_id: str | None = None

    def to_api(self) -> dict[str, Any]:
        """Return the record as the API shows it."""
        data = {
            "proposalId": self.proposal_id,
            "issuerId": self.issuer_id,
            "state": self.state,
            "timestamp": format_time(self.created_at),
            "properties": self.properties,
            "constraints": self.constraints,
        }
        return data if self.previous_id is None else {**data, "prevProposalId": self.previous_id}


@dataclass(kw_only=True)
class Agreement:
    """An agreement between the requestor and a provider."""

    agreement_id: str
    proposal_id: str
    provider_id: str
    #: Both sides, in the API's form.
    demand: dict[str, Any]
    offer: dict[str, Any]
    valid_to: datetime
    #: Proposal, Pending, Cancelled, Rejected, Approved, Expired or Terminated.
    state: str
    created_at: datetime
    approved_at: datetime | None = None
    session_id: str | None = None
    #: Which side ended it, and why.
    terminator: str | None = None
    reason: dict[str, Any] | None = None
    #: Activity id -> its usage counters, as last read.
    usage: dict[str, list[float]] = field(default_factory=dict)
    #: The provider has sent its invoice, or never will.
    is_billed: bool = False

    @property
    def short_name(self) -> str:
        """Return a short name for log lines."""
        return f"agreement {self.agreement_id[:8]}"

    def to_api(self) -> dict[str, Any]:
        """Return the record as the API shows it."""
        data = {
            "agreementId": self.agreement_id,
            "demand": self.demand,
            "offer": self.offer,
            "validTo": format_time(self.valid_to),
            "state": self.state,
            "timestamp": format_time(self.created_at),
        }
        if self.approved_at is not None:
            data["approvedDate"] = format_time(self.approved_at)
        if self.session_id is not None:
            data["appSessionId"] = self.session_id
        return data

    def to_api_summary(self) -> dict[str, Any]:
        """Return the agreement as the API's list of agreements shows it."""
        created = format_time(self.created_at)
        approved = None if self.approved_at is None else format_time(self.approved_at)
        # The published description has two names for these times, and requires those of one set.
        data = {
            "id": self.agreement_id,
            "timestamp": created,
            "creationTs": created,
            "approveTs": approved,
            "role": "Requestor",
        }
        return data if approved is None else {**data, "approvedDate": approved}


@dataclass(kw_only=True)
class Allocation:
    """Money reserved for some work."""

    allocation_id: str
    address: str
    platform: str
    total: Decimal
    created_at: datetime
    #: Other fields of the requestor's request, returned unchanged.
    extra: dict[str, Any] = field(default_factory=dict)
    spent: Decimal = Decimal(0)
    is_released: bool = False

    @property
    def remaining(self) -> Decimal:
        """Return the amount that can still be spent."""
        return self.total - self.spent

    def to_api(self) -> dict[str, Any]:
        """Return the record as the API shows it."""
        return {
            **self.extra,
            "allocationId": self.allocation_id,
            "address": self.address,
            "paymentPlatform": self.platform,
            "totalAmount": format_amount(self.total),
            "spentAmount": format_amount(self.spent),
            "remainingAmount": format_amount(self.remaining),
            "timestamp": format_time(self.created_at),
            "makeDeposit": False,
        }


@dataclass(kw_only=True)
class Bill:
    """An invoice, or a debit note if `usage` is set."""

    bill_id: str
    issuer_id: str
    recipient_id: str
    payer_address: str
    platform: str
    agreement_id: str
    #: All activities of the agreement for an invoice; exactly one for a debit note.
    activity_ids: list[str]
    amount: Decimal
    created_at: datetime
    due_at: datetime | None
    status: str = "RECEIVED"
    #: Usage counters and the previous debit note of the activity; debit notes only.
    usage: list[float] | None = None
    previous_id: str | None = None

    def to_api(self) -> dict[str, Any]:
        """Return the record as the API shows it."""
        data: dict[str, Any] = {
            "issuerId": self.issuer_id,
            "recipientId": self.recipient_id,
            "payeeAddr": self.issuer_id,
            "payerAddr": self.payer_address,
            "paymentPlatform": self.platform,
            "timestamp": format_time(self.created_at),
            "agreementId": self.agreement_id,
            "status": self.status,
        }
        if self.due_at is not None:
            data["paymentDueDate"] = format_time(self.due_at)
        if self.usage is None:
            return {
                **data,
                "invoiceId": self.bill_id,
                "activityIds": self.activity_ids,
                "amount": format_amount(self.amount),
            }
        if self.previous_id is not None:
            data["previousDebitNoteId"] = self.previous_id
        return {
            **data,
            "debitNoteId": self.bill_id,
            "activityId": self.activity_ids[0],
            "totalAmountDue": format_amount(self.amount),
            "usageCounterVector": self.usage,
        }


def format_amount(amount: Decimal) -> str:
    """Format an amount exactly and without an exponent."""
    text = format(amount, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


# As JSON


def to_row(record: Any) -> dict[str, Any]:
    """Convert a record to JSON values."""
    row = {each.name: getattr(record, each.name) for each in fields(record)}
    return {name: _to_json(value) for name, value in row.items()}


def from_row(kind: type[_Record], row: Mapping[str, Any]) -> _Record:
    """Make a record from the result of `to_row`."""
    values = dict(row)
    for each in fields(kind):  # type: ignore[arg-type]
        value = values.get(each.name)
        if isinstance(value, str) and str(each.type).startswith("datetime"):
            values[each.name] = parse_time(value)
        elif isinstance(value, str) and each.type == "Decimal":
            values[each.name] = Decimal(value)
    return kind(**values)


def _to_json(value: Any) -> Any:
    if isinstance(value, datetime):
        return format_time(value)
    return str(value) if isinstance(value, Decimal) else value

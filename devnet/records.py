"""The records of market and payments, and their conversion to and from JSON.

A new record gets a random id and the current time. Only `market.py`, `agreements.py`, `payments.py`, `wallet.py` and
the provider of an agreement change records. `to_api()` returns one as the API shows it; `to_rows` and `from_rows` are
for the state file.
"""

from __future__ import annotations

import re
import secrets
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Any, TypeVar

from devnet.timing import format_time, parse_time, utc_now

_Record = TypeVar("_Record")

#: Names of fields in the API that are not merely written in another way.
_API_NAMES = {
    "created_at": "timestamp",
    "approved_at": "approvedDate",
    "due_at": "paymentDueDate",
    "platform": "paymentPlatform",
    "payer_address": "payerAddr",
}


@dataclass(kw_only=True)
class Demand:
    """A requestor's demand on the market."""

    demand_id: str = field(default_factory=lambda: secrets.token_hex(16))
    requestor_id: str
    properties: dict[str, Any]
    constraints: str
    created_at: datetime = field(default_factory=utc_now)
    #: From golem.srv.comp.expiration; None if it is not set.
    expires_at: datetime | None
    is_open: bool = True
    #: Events that have not been fetched yet.
    events: list[dict[str, Any]] = field(default_factory=list)

    def to_api(self) -> dict[str, Any]:
        """Return the record as the API shows it."""
        return _api_fields(self, "demand_id", "requestor_id", "created_at", "properties", "constraints")


@dataclass(kw_only=True)
class Proposal:
    """A proposal of either side in a negotiation."""

    proposal_id: str = field(default_factory=lambda: f"R-{secrets.token_hex(16)}")
    issuer_id: str
    demand_id: str
    offer_id: str
    #: Initial, Draft, Rejected, Accepted or Expired.
    state: str
    properties: dict[str, Any]
    constraints: str
    created_at: datetime = field(default_factory=utc_now)
    previous_id: str | None = None

    def to_api(self) -> dict[str, Any]:
        """Return the record as the API shows it."""
        data = _api_fields(self, "proposal_id", "issuer_id", "state", "created_at", "properties", "constraints")
        return data if self.previous_id is None else {**data, "prevProposalId": self.previous_id}


@dataclass(kw_only=True)
class Agreement:
    """An agreement between the requestor and a provider."""

    agreement_id: str = field(default_factory=lambda: secrets.token_hex(32))
    proposal_id: str
    provider_id: str
    #: Both sides, in the API's form.
    demand: dict[str, Any]
    offer: dict[str, Any]
    valid_to: datetime
    #: Proposal, Pending, Cancelled, Rejected, Approved, Expired or Terminated.
    state: str
    created_at: datetime = field(default_factory=utc_now)
    approved_at: datetime | None = None
    #: Why it ended.
    reason: dict[str, Any] | None = None
    #: Activity id -> its usage counters, as last read.
    usage: dict[str, list[float]] = field(default_factory=dict)
    #: Factor of the fault overbill.
    price_factor: float = 1.0
    #: The provider has sent its invoice, or never will.
    is_billed: bool = False

    @property
    def short_name(self) -> str:
        """Return a short name for log lines."""
        return f"agreement {self.agreement_id[:8]}"

    def to_api(self) -> dict[str, Any]:
        """Return the record as the API shows it."""
        return _api_fields(self, "agreement_id", "demand", "offer", "valid_to", "state", "created_at", "approved_at")

    def to_api_summary(self) -> dict[str, Any]:
        """Return the agreement as the API's list of agreements shows it."""
        data = _api_fields(self, "created_at", "approved_at")
        # The published description has two names for these times, and requires those of one set.
        more = {"creationTs": data["timestamp"], "approveTs": data.get("approvedDate")}
        return {"id": self.agreement_id, "role": "Requestor", **data, **more}


@dataclass(kw_only=True)
class Allocation:
    """Money reserved for some work."""

    allocation_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    address: str
    platform: str
    total: Decimal
    created_at: datetime = field(default_factory=utc_now)
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
        amounts = {f"{name}Amount": format_amount(getattr(self, name)) for name in ("total", "spent", "remaining")}
        data = _api_fields(self, "allocation_id", "address", "platform", "created_at")
        return {**self.extra, **data, **amounts, "makeDeposit": False}


@dataclass(kw_only=True)
class Bill:
    """An invoice, or a debit note if `usage` is set."""

    bill_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    issuer_id: str
    recipient_id: str
    payer_address: str
    platform: str
    agreement_id: str
    #: All activities of the agreement for an invoice; exactly one for a debit note.
    activity_ids: list[str]
    amount: Decimal
    created_at: datetime = field(default_factory=utc_now)
    due_at: datetime | None
    status: str = "RECEIVED"
    #: Usage counters and the previous debit note of the activity; debit notes only.
    usage: list[float] | None = None
    previous_id: str | None = None

    def to_api(self) -> dict[str, Any]:
        """Return the record as the API shows it."""
        names = ("issuer_id", "recipient_id", "payer_address", "platform", "created_at", "agreement_id", "status")
        data = {**_api_fields(self, *names, "due_at"), "payeeAddr": self.issuer_id}
        amount = format_amount(self.amount)
        if self.usage is None:
            return {**data, "invoiceId": self.bill_id, "activityIds": self.activity_ids, "amount": amount}
        if self.previous_id is not None:
            data["previousDebitNoteId"] = self.previous_id
        ids = {"debitNoteId": self.bill_id, "activityId": self.activity_ids[0]}
        return {**data, **ids, "totalAmountDue": amount, "usageCounterVector": self.usage}


def format_amount(amount: Decimal) -> str:
    """Format an amount exactly and without an exponent."""
    text = format(amount, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def parse_decimal(value: object) -> Decimal | None:
    """Parse a decimal number; None if the value is no finite one."""
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


# As JSON


def _api_fields(record: Any, *names: str) -> dict[str, Any]:
    """Return fields of a record as the API names and formats them, without those that are None."""
    values = {name: _to_json(getattr(record, name)) for name in names}
    return {
        _API_NAMES.get(name) or re.sub(r"_(\w)", lambda found: found[1].upper(), name): value
        for name, value in values.items()
        if value is not None
    }


def to_rows(records: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Convert records, by id, to JSON values."""
    return [{each.name: _to_json(getattr(record, each.name)) for each in fields(record)} for record in records.values()]


def from_rows(kind: type[_Record], rows: Iterable[Mapping[str, Any]]) -> dict[str, _Record]:
    """Make records, by id, from the result of `to_rows`. Unknown fields are left out."""
    known = fields(kind)  # type: ignore[arg-type]
    found = {}
    for row in rows:
        values = {each.name: _from_json(row[each.name], str(each.type)) for each in known if each.name in row}
        # The id is the first field.
        found[values[known[0].name]] = kind(**values)
    return found


def _from_json(value: Any, kind: str) -> Any:
    if isinstance(value, str) and kind.startswith("datetime"):
        return parse_time(value)
    return Decimal(value) if kind == "Decimal" else value


def _to_json(value: Any) -> Any:
    if isinstance(value, datetime):
        return format_time(value)
    return str(value) if isinstance(value, Decimal) else value

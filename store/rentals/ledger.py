"""The ledger: allocations, agreements, activities, debit notes, invoices, and how costs follow from them.

Executors that pay write it; budgets, commands and the dashboard read it. An agreement costs

- its accepted invoice;
- nothing, when its invoice was refused, or when it was written off because none came;
- until then the larger of its accepted debit notes (the latest of each activity) and the estimated costs of its chunks.
  An invoice that is neither accepted nor refused yet changes nothing.

An amount counts at the moment when its invoice was accepted; open amounts count now, whatever period is
queried. So each amount belongs to exactly one day, or is open, and the days and the open amounts add up to the total.

An accepted invoice is split over the finished chunks of its agreement, in proportion to their seconds, so that the
shares add up to it exactly; a chunk that finishes later causes a new split. Without chunks the amount stays with the
agreement.

Guarantees beside those in `store/__init__.py`: every method may be called again with the same values, late or out of
order. An invoice may come before its agreement is known, and an accepted one never becomes unaccepted.

Amounts are in GLM, as exact decimals: text in the database, `Decimal` here, never floating point. Sums are made here
and not in SQL, which knows only floating point. Weakness: adding up everything ever paid reads every invoice; with a
hundred thousand, `spent` takes a tenth of a second and `costs` half a second. The dashboard passes `since`
for today, which has an index. Long because it has the records, the statements and the rules of one noun.
"""

from __future__ import annotations

import enum
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any

from store.amounts import EXACT, ROUNDED, ZERO, split, to_amount, total
from store.clients.usage import settle_chunk
from store.database import Database, Transaction
from store.rentals.reservations import ReservationRecord, change_commitment, commit_reservation, settle_reservation
from store.rows import insert_sql, to_row, to_text

#: What costs can be grouped by.
COSTS_BY = ("day", "model", "provider", "total")

#: Key of costs that have no day yet.
OPEN = "open"
#: Key of costs of an unknown agreement.
UNKNOWN = "unknown"

#: What a record of a row that is known changes.
_ON_KNOWN_ALLOCATION = "UPDATE SET amount = excluded.amount, released_at = coalesce(released_at, excluded.released_at)"
_ON_KNOWN_ACTIVITY = """
    UPDATE SET ended_at = coalesce(ended_at, excluded.ended_at),
        cpu_seconds = coalesce(excluded.cpu_seconds, cpu_seconds), seconds = coalesce(excluded.seconds, seconds)
"""
# The state only moves on, and once it is decided the amount is fixed: a repeated or late event changes nothing.
_IS_LATER_STATE = """
    CASE excluded.state WHEN 'received' THEN 0 WHEN 'refused' THEN 1 ELSE 2 END
    > CASE {table}.state WHEN 'received' THEN 0 WHEN 'refused' THEN 1 ELSE 2 END
"""
_ON_KNOWN_DEBIT_NOTE = f"""
    UPDATE SET amount = excluded.amount, state = excluded.state WHERE {_IS_LATER_STATE.format(table="debit_notes")}
"""
_ON_KNOWN_INVOICE = f"""
    UPDATE SET amount = excluded.amount, state = excluded.state, settled_at = excluded.settled_at,
        reason = excluded.reason
    WHERE {_IS_LATER_STATE.format(table="invoices")}
"""

_DECIDED = "SELECT state, amount FROM invoices WHERE agreement_id = ? AND state IN ('accepted', 'refused')"

_CHUNKS_TO_SPLIT = """
    SELECT id, seconds FROM chunks WHERE agreement_id = ? AND finished_at IS NOT NULL ORDER BY finished_at, id
"""

_SET_SHARE = "UPDATE chunks SET cost = ?, is_cost_final = 1 WHERE id = ?"

_IS_SETTLED = """
    (ended_at IS NOT NULL AND (written_off_at IS NOT NULL OR EXISTS (
        SELECT 1 FROM invoices WHERE agreement_id = agreements.id AND state IN ('accepted', 'refused'))))
"""

_END = "UPDATE agreements SET ended_at = ?, reason = ? WHERE id = ? AND ended_at IS NULL"
_WRITE_OFF = f"UPDATE agreements SET written_off_at = ? WHERE id = ? AND ended_at IS NOT NULL AND NOT {_IS_SETTLED}"

_PAID = """
    SELECT amount FROM invoices WHERE state = 'accepted' AND (:since IS NULL OR settled_at >= :since)
"""

# A chunk's cost becomes final with the first decision about its agreement's invoice, so these have none yet.
_ESTIMATES = """
    SELECT agreement_id, cost FROM chunks
    WHERE agreement_id IS NOT NULL AND is_cost_final = 0 AND finished_at IS NOT NULL AND cost IS NOT NULL
"""

_DEBITS = """
    SELECT agreement_id, activity_id, amount FROM debit_notes
    WHERE state = 'accepted' AND NOT EXISTS (
        SELECT 1 FROM invoices
        WHERE agreement_id = debit_notes.agreement_id AND state IN ('accepted', 'refused')
    ) AND NOT EXISTS (SELECT 1 FROM agreements WHERE id = debit_notes.agreement_id AND written_off_at IS NOT NULL)
"""

_WORK = """
    SELECT agreement_id, count(*) AS chunks, sum(answers) AS images, min(model) AS model,
           min(provider_id) AS provider_id, min(provider) AS provider_name
    FROM chunks WHERE agreement_id IS NOT NULL AND finished_at IS NOT NULL GROUP BY agreement_id
"""


class BillState(enum.StrEnum):
    """State of an invoice or a debit note. It only moves to the right: `received -> refused -> accepted`.

    An accepted one is paid and cannot be undone; a refused one may still be accepted later.
    """

    RECEIVED = "received"
    REFUSED = "refused"
    ACCEPTED = "accepted"


@dataclass(frozen=True, kw_only=True)
class AllocationRecord:
    """An amount that the payment service reserves for one batcher."""

    #: The payment service's id.
    id: str
    #: The batcher that created it.
    batcher_id: str
    #: The payment platform, for example "erc20-polygon-glm".
    platform: str
    #: The paying account.
    address: str
    #: How much may be paid from it.
    amount: Decimal
    created_at: datetime
    #: None while it is reserved.
    released_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class AgreementRecord:
    """An agreement with one provider."""

    #: The market's id.
    id: str
    #: The allocation that pays for it.
    allocation_id: str
    #: The provider's address, and its own name for itself.
    provider_id: str
    provider_name: str
    #: The model that it runs.
    model: str
    #: Paid once for each activity.
    start_price: Decimal
    #: Paid for each second of one core at full load.
    price_per_cpu_second: Decimal
    #: Paid for each second of real time.
    price_per_second: Decimal
    created_at: datetime
    #: None while it is in force.
    ended_at: datetime | None = None
    #: Why it ended.
    reason: str | None = None
    #: When it was given up to wait for its invoice. One that comes later counts nevertheless.
    written_off_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class ActivityRecord:
    """One activity that ran under an agreement."""

    id: str
    agreement_id: str
    created_at: datetime
    #: None while it runs.
    ended_at: datetime | None = None
    #: Its usage as the provider counted it; None until known.
    cpu_seconds: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class DebitNoteRecord:
    """An interim bill of one activity."""

    id: str
    activity_id: str
    agreement_id: str
    #: Cost of the activity so far, the earlier notes included.
    amount: Decimal
    state: BillState
    received_at: datetime


@dataclass(frozen=True, kw_only=True)
class InvoiceRecord:
    """The final bill of an agreement."""

    id: str
    agreement_id: str
    #: The requested amount; once it is accepted, the accepted amount.
    amount: Decimal
    state: BillState
    received_at: datetime
    #: When it was accepted or refused; the amount counts on that day.
    settled_at: datetime | None = None
    #: Why it was refused.
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """Costs of one day, model or provider, or of all."""

    #: The day (UTC, "2026-11-20", or "open"), the model, the provider's address, or "total".
    key: str
    #: The key as it is shown: a provider's name.
    name: str
    #: Requests answered.
    images: int = 0
    #: Chunks that ended.
    chunks: int = 0
    #: Sum of the accepted invoices.
    paid: Decimal = ZERO
    #: Estimated costs of agreements without an accepted or refused invoice.
    open: Decimal = ZERO
    #: Sum of the refused invoices; they are not paid.
    refused: Decimal = ZERO

    @property
    def spent(self) -> Decimal:
        """The paid and open amounts."""
        return EXACT.add(self.paid, self.open)

    @property
    def per_1000_images(self) -> Decimal | None:
        """What was spent for a thousand images; None without images."""
        return ROUNDED.divide(EXACT.multiply(self.spent, 1000), self.images) if self.images else None


def split_invoices(transaction: Transaction, agreement_id: str) -> None:
    """Split the accepted amount of an agreement over its finished chunks; nothing before an invoice is decided."""
    amount = _paid(transaction, agreement_id)
    if amount is None:
        return
    chunks = transaction.execute(_CHUNKS_TO_SPLIT, (agreement_id,)).fetchall()
    for chunk, share in zip(chunks, split(amount, [row["seconds"] or 0.0 for row in chunks]), strict=True):
        transaction.execute(_SET_SHARE, (to_amount(share), chunk["id"]))
        settle_chunk(transaction, chunk["id"])


def _paid(transaction: Transaction, agreement_id: str) -> Decimal | None:
    """Return what was paid for an agreement, 0 if it is settled without payment; None before it is settled."""
    decided = transaction.execute(_DECIDED, (agreement_id,)).fetchall()
    if not decided:
        row = transaction.execute("SELECT written_off_at FROM agreements WHERE id = ?", (agreement_id,)).fetchone()
        return None if row is None or row["written_off_at"] is None else ZERO
    return total(Decimal(row["amount"]) for row in decided if row["state"] == BillState.ACCEPTED)


def _settle(transaction: Transaction, agreement_id: str, now: str) -> None:
    """Settle the reservation of an agreement, if its invoice is decided."""
    amount = _paid(transaction, agreement_id)
    if amount is not None:
        settle_reservation(transaction, agreement_id, amount, now)


def write_debit_note(transaction: Transaction, note: DebitNoteRecord) -> None:
    """Write a debit note or its new state."""
    _record(transaction, "debit_notes", to_row(note), _ON_KNOWN_DEBIT_NOTE)


def write_invoice(transaction: Transaction, invoice: InvoiceRecord) -> None:
    """Write an invoice or its new state, and what follows from it for the agreement."""
    row = to_row(invoice)
    if invoice.state == BillState.RECEIVED:
        row["settled_at"] = None
    elif invoice.settled_at is None:
        row["settled_at"] = row["received_at"]
    if _record(transaction, "invoices", row, _ON_KNOWN_INVOICE):
        split_invoices(transaction, invoice.agreement_id)
        _settle(transaction, invoice.agreement_id, row["settled_at"] or row["received_at"])


def _record(transaction: Transaction, table: str, row: Mapping[str, Any], on_known: str = "NOTHING") -> bool:
    """Add a row, or change the known one. :return: whether that changed anything."""
    sql = f"INSERT INTO {insert_sql(table, row)} ON CONFLICT (id) DO {on_known}"
    return bool(transaction.execute(sql, row).rowcount)


class Ledger:
    """The tables from `allocations` to `invoices`, and the costs of `chunks`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record_allocation(self, allocation: AllocationRecord) -> None:
        """Record an allocation or its new amount. A released one stays released."""
        row = to_row(allocation)
        self._database.write(lambda transaction: _record(transaction, "allocations", row, _ON_KNOWN_ALLOCATION))

    def release_allocation(self, id: str, *, now: datetime) -> None:
        """Record that an allocation was released. The first release counts."""
        sql = "UPDATE allocations SET released_at = ? WHERE id = ? AND released_at IS NULL"
        self._database.execute(sql, (to_text(now), id))

    def record_agreement(self, agreement: AgreementRecord, commitment: ReservationRecord | None = None) -> None:
        """Record an agreement; does nothing when it is known.

        :param commitment: what it may cost; counts against the caps until its invoice is accepted or refused.
        """

        def write(transaction: Transaction) -> None:
            _record(transaction, "agreements", to_row(agreement))
            if commitment is not None:
                commit_reservation(transaction, commitment)
                _settle(transaction, agreement.id, to_text(commitment.changed_at))

        self._database.write(write)

    def end_agreement(self, id: str, *, reason: str, now: datetime, owed: Decimal | None = None) -> None:
        """Record when and why an agreement ended. The first end counts.

        :param owed: the most that it may cost until then; replaces what is committed to it. None leaves that.
        """

        def write(transaction: Transaction) -> None:
            is_first = transaction.execute(_END, (to_text(now), reason, id)).rowcount
            if is_first and owed is not None:
                change_commitment(transaction, id, owed, to_text(now))

        self._database.write(write)

    def write_off(self, ids: Iterable[str], *, now: datetime) -> list[str]:
        """Give up to wait for the invoices of agreements; those that run or are settled are left out.

        They no longer count. An invoice that comes later counts nevertheless.

        :return: the agreements that were written off.
        """

        def write(transaction: Transaction) -> list[str]:
            found = [id for id in ids if transaction.execute(_WRITE_OFF, (to_text(now), id)).rowcount]
            for id in found:
                split_invoices(transaction, id)
                _settle(transaction, id, to_text(now))
            return found

        return self._database.write(write)

    def record_activity(self, activity: ActivityRecord) -> None:
        """Record an activity, its end or its usage. None changes nothing."""
        row = to_row(activity)
        self._database.write(lambda transaction: _record(transaction, "activities", row, _ON_KNOWN_ACTIVITY))

    def record_debit_note(self, note: DebitNoteRecord) -> None:
        """Record a debit note or its new state."""
        self._database.write(lambda transaction: write_debit_note(transaction, note))

    def record_invoice(self, invoice: InvoiceRecord) -> None:
        """Record an invoice or its new state; split it over the agreement's chunks once it is accepted."""
        self._database.write(lambda transaction: write_invoice(transaction, invoice))

    def allocations(self, *, is_open: bool | None = None) -> list[AllocationRecord]:
        """List allocations, oldest first. :param is_open: True for unreleased ones, False for released ones."""
        which = {None: "1", True: "released_at IS NULL", False: "released_at IS NOT NULL"}[is_open]
        sql = f"SELECT * FROM allocations WHERE {which} ORDER BY created_at, id"
        return self._database.records(AllocationRecord, sql)

    def agreement(self, id: str) -> AgreementRecord | None:
        """Return an agreement; None if it is not known."""
        found = self._database.records(AgreementRecord, "SELECT * FROM agreements WHERE id = ?", (id,))
        return found[0] if found else None

    def agreements(self, *, is_open: bool | None = None, is_settled: bool | None = None) -> list[AgreementRecord]:
        """List agreements, oldest first.

        :param is_open: True for those in force, False for those that ended.
        :param is_settled: True for those that ended and have an accepted or refused invoice or were written off,
            False for the others.
        """
        in_force = {None: "1", True: "ended_at IS NULL", False: "ended_at IS NOT NULL"}[is_open]
        settled = {None: "1", True: _IS_SETTLED, False: f"NOT {_IS_SETTLED}"}[is_settled]
        sql = f"SELECT * FROM agreements WHERE {in_force} AND {settled} ORDER BY created_at, id"
        return self._database.records(AgreementRecord, sql)

    def written_off(self, *, since: datetime) -> list[AgreementRecord]:
        """List the agreements made since a time that were written off, oldest first."""
        sql = "SELECT * FROM agreements WHERE written_off_at IS NOT NULL AND created_at >= ? ORDER BY created_at, id"
        return self._database.records(AgreementRecord, sql, (to_text(since),))

    def spent(self, *, since: datetime | None = None) -> Decimal:
        """Add up the amounts paid since a time and all open amounts."""
        which = {"since": None if since is None else to_text(since)}
        with self._database.snapshot() as connection:
            paid = total(Decimal(row["amount"]) for row in connection.execute(_PAID, which))
            unsettled = self._unsettled_costs(connection)
        return total([paid, *unsettled.values()])

    def costs(self, by: str) -> list[CostRow]:
        """Group all costs, sorted by key.

        :param by: one of COSTS_BY; "total" gives one row, also when it is zero.
        """
        if by not in COSTS_BY:
            raise ValueError(f"costs can be grouped by {', '.join(COSTS_BY)}, not by {by!r}")
        with self._database.snapshot() as connection:
            agreements = {row["id"]: row for row in connection.execute("SELECT * FROM agreements")}
            work = {row["agreement_id"]: row for row in connection.execute(_WORK)}
            bills = connection.execute("SELECT * FROM invoices WHERE state IN ('accepted', 'refused')").fetchall()
            unsettled = self._unsettled_costs(connection)
        #: agreement -> the first day on which an invoice of it was decided, or the day on which it was written off.
        days: dict[str, str] = {}
        for row in bills:
            day, agreement_id = row["settled_at"][:10], row["agreement_id"]
            days[agreement_id] = min(day, days.get(agreement_id, day))
        for agreement_id, row in agreements.items():
            if row["written_off_at"] is not None:
                days.setdefault(agreement_id, row["written_off_at"][:10])
        found: dict[str, CostRow] = {"total": CostRow(key="total", name="total")} if by == "total" else {}

        def add(column: str, amount: Decimal | int, agreement_id: str, day: str) -> None:
            # An unknown agreement may still have chunks.
            known: Mapping[str, Any] = dict(agreements.get(agreement_id) or work.get(agreement_id) or {})
            key, name = {
                "day": (day, day),
                "model": (known.get("model") or UNKNOWN,) * 2,
                "provider": (known.get("provider_id") or UNKNOWN, known.get("provider_name") or UNKNOWN),
                "total": ("total", "total"),
            }[by]
            row = found.get(key) or CostRow(key=key, name=name)
            known_amount = getattr(row, column)
            both: Any = EXACT.add(known_amount, amount) if isinstance(amount, Decimal) else known_amount + amount
            found[key] = replace(row, **{column: both})

        for row in bills:
            column = "paid" if row["state"] == BillState.ACCEPTED else "refused"
            add(column, Decimal(row["amount"]), row["agreement_id"], row["settled_at"][:10])
        for agreement_id, amount in unsettled.items():
            add("open", amount, agreement_id, OPEN)
        for agreement_id, row in work.items():
            for column in ("chunks", "images"):
                add(column, row[column], agreement_id, days.get(agreement_id, OPEN))
        return [row for _, row in sorted(found.items())]

    @staticmethod
    def _unsettled_costs(connection: sqlite3.Connection) -> dict[str, Decimal]:
        """Estimate the cost of every agreement without a decided invoice."""
        estimates: dict[str, list[Decimal]] = defaultdict(list)
        for row in connection.execute(_ESTIMATES):
            estimates[row["agreement_id"]].append(Decimal(row["cost"]))
        activities: dict[str, dict[str, Decimal]] = defaultdict(dict)
        for row in connection.execute(_DEBITS):
            # Each note includes the earlier ones of its activity, so the latest is the largest.
            known = activities[row["agreement_id"]]
            known[row["activity_id"]] = max(Decimal(row["amount"]), known.get(row["activity_id"], ZERO))
        return {
            id: max(total(estimates.get(id, [])), total(activities.get(id, {}).values()))
            for id in (*estimates, *(id for id in activities if id not in estimates))
        }

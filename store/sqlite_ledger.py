"""The ledger on SQLite: allocations, agreements, activities, bills, and how bills are split over chunks.

A base of `SqliteStore`, which gives it the writer and the readers. Sums are made here and not in SQL, which knows only
floating point. Weakness: adding up everything ever paid reads every invoice; with a hundred thousand, `spent` takes a
tenth of a second and `costs` half a second. A budget asks with `since`, which has an index.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

from store.cost_split import ZERO, split, to_amount, total
from store.database import ReaderPool, Transaction, Writer
from store.ledger import COSTS_BY
from store.ledger_records import (
    ActivityRecord,
    AgreementRecord,
    AllocationRecord,
    BillState,
    CostRow,
    DebitNoteRecord,
    InvoiceRecord,
)
from store.records import from_text, to_text

#: Where costs stand that have no day yet.
OPEN = "open"
#: What is shown for an agreement that nobody has noted, so that its money is not lost.
UNKNOWN = "unknown"

_RECORD_ALLOCATION = """
    INSERT INTO allocations (id, batcher_id, platform, address, amount, created_at, released_at)
    VALUES (:id, :batcher_id, :platform, :address, :amount, :created_at, :released_at)
    ON CONFLICT (id) DO UPDATE SET amount = excluded.amount, released_at = coalesce(released_at, excluded.released_at)
"""

_RELEASE_ALLOCATION = "UPDATE allocations SET released_at = :now WHERE id = :id AND released_at IS NULL"

_RECORD_AGREEMENT = """
    INSERT INTO agreements (id, allocation_id, provider_id, provider_name, model, start_price, price_per_cpu_second,
                            price_per_second, created_at, ended_at, reason)
    VALUES (:id, :allocation_id, :provider_id, :provider_name, :model, :start_price, :price_per_cpu_second,
            :price_per_second, :created_at, :ended_at, :reason)
    ON CONFLICT (id) DO NOTHING
"""

_END_AGREEMENT = "UPDATE agreements SET ended_at = :now, reason = :reason WHERE id = :id AND ended_at IS NULL"

_RECORD_ACTIVITY = """
    INSERT INTO activities (id, agreement_id, created_at, ended_at, cpu_seconds, seconds)
    VALUES (:id, :agreement_id, :created_at, :ended_at, :cpu_seconds, :seconds)
    ON CONFLICT (id) DO UPDATE
    SET ended_at = coalesce(ended_at, excluded.ended_at), cpu_seconds = coalesce(excluded.cpu_seconds, cpu_seconds),
        seconds = coalesce(excluded.seconds, seconds)
"""

# A bill's state only moves on, and once it is decided its amount is fixed: a repeated or late event changes nothing.
_IS_LATER_STATE = """
    CASE excluded.state WHEN 'received' THEN 0 WHEN 'refused' THEN 1 ELSE 2 END
    > CASE {table}.state WHEN 'received' THEN 0 WHEN 'refused' THEN 1 ELSE 2 END
"""

_RECORD_DEBIT_NOTE = f"""
    INSERT INTO debit_notes (id, activity_id, agreement_id, amount, state, received_at)
    VALUES (:id, :activity_id, :agreement_id, :amount, :state, :received_at)
    ON CONFLICT (id) DO UPDATE SET amount = excluded.amount, state = excluded.state
    WHERE {_IS_LATER_STATE.format(table="debit_notes")}
"""

_RECORD_INVOICE = f"""
    INSERT INTO invoices (id, agreement_id, amount, state, received_at, settled_at, reason)
    VALUES (:id, :agreement_id, :amount, :state, :received_at, :settled_at, :reason)
    ON CONFLICT (id) DO UPDATE
    SET amount = excluded.amount, state = excluded.state, settled_at = excluded.settled_at, reason = excluded.reason
    WHERE {_IS_LATER_STATE.format(table="invoices")}
"""

_DECIDED = "SELECT state, amount FROM invoices WHERE agreement_id = ? AND state IN ('accepted', 'refused')"

_CHUNKS_TO_SPLIT = """
    SELECT id, seconds FROM chunks WHERE agreement_id = ? AND finished_at IS NOT NULL ORDER BY finished_at, id
"""

_SET_SHARE = "UPDATE chunks SET cost = ?, is_cost_final = 1 WHERE id = ?"

_IS_SETTLED = """
    (ended_at IS NOT NULL AND EXISTS (
        SELECT 1 FROM invoices WHERE agreement_id = agreements.id AND state IN ('accepted', 'refused')))
"""

#: Whether the batcher that is asked for pays for the agreement in the column {agreement}; all do when none is.
_IS_PAID_BY = """
    (:batcher_id IS NULL OR {agreement} IN (
        SELECT agreements.id FROM agreements JOIN allocations ON allocations.id = allocation_id
        WHERE batcher_id = :batcher_id))
"""

_PAID = f"""
    SELECT agreement_id, state, amount, settled_at FROM invoices
    WHERE state = 'accepted' AND (:since IS NULL OR settled_at >= :since)
      AND {_IS_PAID_BY.format(agreement="agreement_id")}
"""

_REFUSED = "SELECT agreement_id, amount, settled_at FROM invoices WHERE state = 'refused'"

# A chunk's cost becomes final with the first decision about its agreement's bill, so these have none yet.
_ESTIMATES = f"""
    SELECT agreement_id, cost FROM chunks
    WHERE agreement_id IS NOT NULL AND is_cost_final = 0 AND finished_at IS NOT NULL AND cost IS NOT NULL
      AND {_IS_PAID_BY.format(agreement="agreement_id")}
"""

_DEBITS = f"""
    SELECT agreement_id, activity_id, amount FROM debit_notes
    WHERE state = 'accepted' AND NOT EXISTS (
        SELECT 1 FROM invoices
        WHERE agreement_id = debit_notes.agreement_id AND state IN ('accepted', 'refused'))
      AND {_IS_PAID_BY.format(agreement="agreement_id")}
"""

_WORK = """
    SELECT agreement_id, count(*) AS chunks, sum(answers) AS images, min(model) AS model,
           min(provider_id) AS provider_id, min(provider) AS provider_name
    FROM chunks WHERE agreement_id IS NOT NULL AND finished_at IS NOT NULL GROUP BY agreement_id
"""


def to_row(record: Any) -> dict[str, Any]:
    """Turn a record of `money.py` into a row: times and amounts as text."""
    row = asdict(record)
    for name, value in row.items():
        if isinstance(value, datetime):
            row[name] = to_text(value)
        elif isinstance(value, Decimal):
            row[name] = to_amount(value)
    return row


def from_row(row: Mapping[str, Any], *, amounts: tuple[str, ...]) -> dict[str, Any]:
    """Turn a row back into a record's values. :param amounts: the columns that are decimals."""
    return {
        name: None
        if value is None
        else from_text(value)
        if name.endswith("_at") or name.endswith("_until")
        else Decimal(value)
        if name in amounts
        else value
        for name, value in dict(row).items()
    }


def split_invoices(transaction: Transaction, agreement_id: str) -> None:
    """Split what was accepted for an agreement over its finished chunks; nothing when no bill of it was decided."""
    decided = transaction.execute(_DECIDED, (agreement_id,)).fetchall()
    if not decided:
        return
    amount = total(Decimal(row["amount"]) for row in decided if row["state"] == BillState.ACCEPTED)
    chunks = transaction.execute(_CHUNKS_TO_SPLIT, (agreement_id,)).fetchall()
    for chunk, share in zip(chunks, split(amount, [row["seconds"] or 0.0 for row in chunks]), strict=True):
        transaction.execute(_SET_SHARE, (to_amount(share), chunk["id"]))


@dataclass
class _CostSum:
    """A CostRow that is being added up."""

    name: str
    images: int = 0
    chunks: int = 0
    paid: list[Decimal] = field(default_factory=list)
    open: list[Decimal] = field(default_factory=list)
    refused: list[Decimal] = field(default_factory=list)


class SqliteLedger:
    """The money, in the tables from `allocations` to `invoices` and in the costs of `chunks`."""

    _writer: Writer
    _readers: ReaderPool

    def record_allocation(self, allocation: AllocationRecord) -> None:
        """See Ledger.note_allocation."""
        self._write(_RECORD_ALLOCATION, to_row(allocation))

    def release_allocation(self, id: str, *, now: datetime) -> None:
        """See Ledger.release_allocation."""
        self._write(_RELEASE_ALLOCATION, {"id": id, "now": to_text(now)})

    def record_agreement(self, agreement: AgreementRecord) -> None:
        """See Ledger.note_agreement."""
        self._write(_RECORD_AGREEMENT, to_row(agreement))

    def end_agreement(self, id: str, *, reason: str, now: datetime) -> None:
        """See Ledger.end_agreement."""
        self._write(_END_AGREEMENT, {"id": id, "reason": reason, "now": to_text(now)})

    def record_activity(self, activity: ActivityRecord) -> None:
        """See Ledger.note_activity."""
        self._write(_RECORD_ACTIVITY, to_row(activity))

    def record_debit_note(self, note: DebitNoteRecord) -> None:
        """See Ledger.note_debit."""
        self._write(_RECORD_DEBIT_NOTE, to_row(note))

    def record_invoice(self, invoice: InvoiceRecord) -> None:
        """See Ledger.note_invoice."""
        row = to_row(invoice)
        if invoice.state == BillState.RECEIVED:
            row["settled_at"] = None
        elif invoice.settled_at is None:
            row["settled_at"] = row["received_at"]

        def write(transaction: Transaction) -> None:
            if transaction.execute(_RECORD_INVOICE, row).rowcount:
                split_invoices(transaction, invoice.agreement_id)

        self._writer.run(write)

    def allocations(self, *, is_open: bool | None = None) -> list[AllocationRecord]:
        """See Ledger.allocations."""
        which = {None: "1", True: "released_at IS NULL", False: "released_at IS NOT NULL"}[is_open]
        with self._readers.connection() as connection:
            rows = connection.execute(f"SELECT * FROM allocations WHERE {which} ORDER BY created_at, id").fetchall()
        return [AllocationRecord(**from_row(row, amounts=("amount",))) for row in rows]

    def agreements(self, *, is_open: bool | None = None, is_settled: bool | None = None) -> list[AgreementRecord]:
        """See Ledger.agreements."""
        which = [{None: "1", True: "ended_at IS NULL", False: "ended_at IS NOT NULL"}[is_open]]
        which += [{None: "1", True: _IS_SETTLED, False: f"NOT {_IS_SETTLED}"}[is_settled]]
        with self._readers.connection() as connection:
            rows = connection.execute(
                f"SELECT * FROM agreements WHERE {' AND '.join(which)} ORDER BY created_at, id"
            ).fetchall()
        prices = ("start_price", "price_per_cpu_second", "price_per_second")
        return [AgreementRecord(**from_row(row, amounts=prices)) for row in rows]

    def spent(self, *, since: datetime | None = None, batcher_id: str | None = None) -> Decimal:
        """See Ledger.spent."""
        which = {"since": None if since is None else to_text(since), "batcher_id": batcher_id}
        with self._read_transaction() as connection:
            paid = total(Decimal(row["amount"]) for row in connection.execute(_PAID, which))
            unsettled = self._unsettled_costs(connection, batcher_id)
        return total([paid, *unsettled.values()])

    def costs(self, by: str) -> list[CostRow]:
        """See Ledger.costs."""
        if by not in COSTS_BY:
            raise ValueError(f"costs can be added up by {', '.join(COSTS_BY)}, not by {by!r}")
        everything = {"since": None, "batcher_id": None}
        with self._read_transaction() as connection:
            agreements = {row["id"]: row for row in connection.execute("SELECT * FROM agreements")}
            work = {row["agreement_id"]: row for row in connection.execute(_WORK)}
            paid = connection.execute(_PAID, everything).fetchall()
            refused = connection.execute(_REFUSED).fetchall()
            unsettled = self._unsettled_costs(connection, None)
        #: agreement -> the first day on which a bill of it was decided.
        days: dict[str, str] = {}
        for row in (*paid, *refused):
            day, agreement_id = row["settled_at"][:10], row["agreement_id"]
            days[agreement_id] = min(day, days.get(agreement_id, day))
        sums: dict[str, _CostSum] = {"total": _CostSum("total")} if by == "total" else {}

        def sum_of(agreement_id: str, day: str) -> _CostSum:
            # An agreement that nobody noted is known by its chunks at least, if there are any.
            known: Mapping[str, Any] = dict(agreements.get(agreement_id) or work.get(agreement_id) or {})
            key, name = {
                "day": (day, day),
                "model": (known.get("model") or UNKNOWN,) * 2,
                "provider": (known.get("provider_id") or UNKNOWN, known.get("provider_name") or UNKNOWN),
                "total": ("total", "total"),
            }[by]
            return sums.setdefault(key, _CostSum(name))

        for row in paid:
            sum_of(row["agreement_id"], row["settled_at"][:10]).paid.append(Decimal(row["amount"]))
        for row in refused:
            sum_of(row["agreement_id"], row["settled_at"][:10]).refused.append(Decimal(row["amount"]))
        for agreement_id, amount in unsettled.items():
            sum_of(agreement_id, OPEN).open.append(amount)
        for agreement_id, row in work.items():
            found = sum_of(agreement_id, days.get(agreement_id, OPEN))
            found.chunks += row["chunks"]
            found.images += row["images"]
        return [
            CostRow(
                key=key,
                name=found.name,
                images=found.images,
                chunks=found.chunks,
                paid=total(found.paid),
                open=total(found.open),
                refused=total(found.refused),
            )
            for key, found in sorted(sums.items())
        ]

    # What they are made of

    def _write(self, sql: str, row: Mapping[str, Any]) -> None:
        # The result is not the cursor: an open one would keep the statement alive.
        self._writer.run(lambda transaction: transaction.execute(sql, row).rowcount)

    @contextlib.contextmanager
    def _read_transaction(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection whose reads all see the same state, so that no bill is counted twice or not at all."""
        with self._readers.connection() as connection:
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                connection.execute("ROLLBACK")

    @staticmethod
    def _unsettled_costs(connection: sqlite3.Connection, batcher_id: str | None) -> dict[str, Decimal]:
        """Estimate what every agreement costs of which no bill was decided."""
        which = {"batcher_id": batcher_id}
        estimates: dict[str, list[Decimal]] = defaultdict(list)
        for row in connection.execute(_ESTIMATES, which):
            estimates[row["agreement_id"]].append(Decimal(row["cost"]))
        activities: dict[str, dict[str, Decimal]] = defaultdict(dict)
        for row in connection.execute(_DEBITS, which):
            # The notes of an activity add to each other, so the latest is the largest.
            known = activities[row["agreement_id"]]
            known[row["activity_id"]] = max(Decimal(row["amount"]), known.get(row["activity_id"], ZERO))
        return {
            id: max(total(estimates.get(id, [])), total(activities.get(id, {}).values()))
            for id in (*estimates, *(id for id in activities if id not in estimates))
        }

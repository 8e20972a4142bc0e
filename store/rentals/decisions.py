"""Decisions: whether an invoice or a debit note is paid. Each bill is judged once, and the decision is kept.

The golem executor decides before it tells the daemon anything, so that a bill that was refused is refused for every
later batcher, whatever it would think of it. An agreement has one invoice: a second one is refused. `decide` writes the
bill into the ledger in the same transaction, and `finish` what the daemon has accepted.
"""

from __future__ import annotations

import builtins
import enum
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal

from store.database import Database, Transaction
from store.rentals.ledger import BillState, DebitNoteRecord, InvoiceRecord, write_debit_note, write_invoice
from store.rows import from_row, insert_sql, to_row, to_text

#: Why the second invoice of an agreement is refused.
BILLED_BEFORE = "There is an invoice for this agreement already."

# What is about an agreement with an invoice is decided by the invoice.
_UNFINISHED = """
    SELECT * FROM decisions WHERE finished_at IS NULL AND (kind = 'invoice' OR NOT EXISTS (
        SELECT 1 FROM decisions AS invoice WHERE invoice.agreement_id = decisions.agreement_id
        AND invoice.kind = 'invoice'))
    ORDER BY decided_at, bill_id
"""

_IS_BILLED = """
    SELECT 1 FROM decisions WHERE agreement_id = :agreement_id AND kind = 'invoice'
    UNION ALL
    SELECT 1 FROM invoices WHERE agreement_id = :agreement_id AND id != :id AND state IN ('accepted', 'refused')
"""


class BillKind(enum.StrEnum):
    """What a provider sends: one invoice at the end of an agreement, debit notes for an activity before."""

    INVOICE = "invoice"
    DEBIT_NOTE = "debit_note"


@dataclass(frozen=True, kw_only=True)
class DecisionRecord:
    """What was decided about one bill."""

    #: The payment service's id of the invoice or debit note.
    bill_id: str
    kind: BillKind
    agreement_id: str
    #: Of a debit note; None for an invoice.
    activity_id: str | None = None
    #: What it demands, and the most that could be owed when it was judged.
    amount: Decimal
    max_amount: Decimal
    is_refused: bool
    #: Why it is refused; None for one that is paid.
    reason: str | None = None
    decided_at: datetime
    #: When the daemon had accepted it, or knew of the refusal; None before.
    finished_at: datetime | None = None


class Decisions:
    """The table `decisions`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, bill_id: str) -> DecisionRecord | None:
        """Return the decision about a bill; None if there is none yet."""
        with self._database.read() as connection:
            row = connection.execute("SELECT * FROM decisions WHERE bill_id = ?", (bill_id,)).fetchone()
        return None if row is None else from_row(DecisionRecord, row)

    def decide(self, decision: DecisionRecord) -> DecisionRecord:
        """Keep a decision, unless the bill was judged before. :return: the decision that holds."""

        def write(transaction: Transaction) -> DecisionRecord:
            known = _find(transaction, decision.bill_id)
            if known is not None:
                return known
            made = decision
            names = {"agreement_id": made.agreement_id, "id": made.bill_id}
            is_second = made.kind is BillKind.INVOICE and transaction.execute(_IS_BILLED, names).fetchone() is not None
            if is_second:
                made = replace(made, is_refused=True, reason=BILLED_BEFORE)
            row = to_row(made)
            transaction.execute(f"INSERT INTO {insert_sql('decisions', row)}", row)
            if not is_second:  # the ledger has one invoice of an agreement
                _write_bill(transaction, made, BillState.REFUSED if made.is_refused else BillState.RECEIVED)
            return made

        return self._database.write(write)

    def finish(self, bill_id: str, *, now: datetime) -> None:
        """Record that the daemon has accepted a bill that is to be paid, or knows that it is refused."""

        def write(transaction: Transaction) -> None:
            known = _find(transaction, bill_id)
            if known is None or known.finished_at is not None:
                return
            transaction.execute("UPDATE decisions SET finished_at = ? WHERE bill_id = ?", (to_text(now), bill_id))
            if not known.is_refused:
                _write_bill(transaction, replace(known, decided_at=now), BillState.ACCEPTED)

        self._database.write(write)

    def withdraw(self, bill_id: str, *, reason: str, now: datetime) -> None:
        """Record that a bill cannot be paid any more, whatever was decided. One that was never judged stays unknown.

        It counts as refused, so that its agreement is settled.
        """

        def write(transaction: Transaction) -> None:
            known = _find(transaction, bill_id)
            if known is None or known.finished_at is not None:
                return
            made = replace(known, is_refused=True, reason=known.reason or reason, finished_at=now)
            sql = "UPDATE decisions SET is_refused = 1, reason = ?, finished_at = ? WHERE bill_id = ?"
            transaction.execute(sql, (made.reason, to_text(now), bill_id))
            if not known.is_refused:
                _write_bill(transaction, replace(made, decided_at=now), BillState.REFUSED)

        self._database.write(write)

    def record_accepted(self, decision: DecisionRecord) -> None:
        """Record a bill that the daemon has accepted, whoever decided that."""
        self._database.write(lambda transaction: _write_bill(transaction, decision, BillState.ACCEPTED))

    def unfinished(self) -> builtins.list[DecisionRecord]:
        """List the decisions of which the daemon does not know, oldest first."""
        return self._database.records(DecisionRecord, _UNFINISHED)

    def refused(self) -> builtins.list[DecisionRecord]:
        """List the refused bills, oldest first."""
        sql = "SELECT * FROM decisions WHERE is_refused = 1 ORDER BY decided_at, bill_id"
        return self._database.records(DecisionRecord, sql)


def _find(transaction: Transaction, bill_id: str) -> DecisionRecord | None:
    row = transaction.execute("SELECT * FROM decisions WHERE bill_id = ?", (bill_id,)).fetchone()
    return None if row is None else from_row(DecisionRecord, row)


def _write_bill(transaction: Transaction, decision: DecisionRecord, state: BillState) -> None:
    """Write the bill of a decision into the ledger."""
    if decision.kind is BillKind.INVOICE:
        invoice = InvoiceRecord(
            id=decision.bill_id,
            agreement_id=decision.agreement_id,
            amount=decision.amount,
            state=state,
            received_at=decision.decided_at,
            settled_at=None if state is BillState.RECEIVED else decision.decided_at,
            reason=decision.reason,
        )
        write_invoice(transaction, invoice)
        return
    note = DebitNoteRecord(
        id=decision.bill_id,
        activity_id=decision.activity_id or "",
        agreement_id=decision.agreement_id,
        amount=decision.amount,
        state=state,
        received_at=decision.decided_at,
    )
    write_debit_note(transaction, note)

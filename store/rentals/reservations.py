"""Reservations: amounts that agreements with providers may still cost, and the caps of batchers on their spending.

    reserve -> commit -> settle      the agreement's invoice was accepted or refused, or is not expected any more
       |
       +-----> release               no agreement came of it

Executors that pay reserve before each step that costs, so caps hold for all batchers of a home together: `reserve`
checks them and writes in one transaction. What counts against a cap is every open reservation, and what was paid: by
this batcher (`run`), today in UTC (`day`), ever (`total`). `ledger.py` commits with the record of an agreement and
settles with its invoice, each in one transaction, whatever comes first.

Weakness: a cap on the total adds up every accepted invoice at each step, a tenth of a second with a hundred thousand.
"""

from __future__ import annotations

import builtins
import enum
import sqlite3
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal

from store.amounts import EXACT, ZERO, to_amount, total
from store.database import Database, Transaction
from store.rows import from_row, to_row, to_text

_OPEN_AMOUNTS = "SELECT amount FROM reservations WHERE state != 'settled'"
_RUN_AMOUNTS = "SELECT amount FROM reservations WHERE batcher_id = ?"
_PAID_AMOUNTS = "SELECT amount FROM invoices WHERE state = 'accepted'"

_SAVE = """
    INSERT INTO reservations (id, batcher_id, purpose, amount, state, agreement_id, changed_at)
    VALUES (:id, :batcher_id, :purpose, :amount, :state, :agreement_id, :changed_at)
    ON CONFLICT (id) DO UPDATE SET amount = excluded.amount, state = excluded.state,
        agreement_id = excluded.agreement_id, changed_at = excluded.changed_at
"""

_RELEASE = "DELETE FROM reservations WHERE id = ? AND state = 'reserved'"

_SETTLE = "UPDATE reservations SET state = 'settled', amount = ?, changed_at = ? WHERE agreement_id = ?"

_CHANGE = "UPDATE reservations SET amount = ?, changed_at = ? WHERE agreement_id = ? AND state = 'committed'"


class ReservationState(enum.StrEnum):
    """State of a reservation. It only moves to the right; a released one is deleted."""

    RESERVED = "reserved"
    COMMITTED = "committed"
    SETTLED = "settled"


@dataclass(frozen=True, kw_only=True)
class ReservationRecord:
    """An amount that counts against the caps."""

    id: str
    #: The batcher that spends it.
    batcher_id: str
    #: What for, for people: the model.
    purpose: str
    #: The most that may come to be owed; once settled, what was paid.
    amount: Decimal
    state: ReservationState = ReservationState.RESERVED
    #: The agreement that may cost so much; None before there is one.
    agreement_id: str | None = None
    changed_at: datetime


@dataclass(frozen=True, kw_only=True)
class Denial:
    """Why an amount is not reserved."""

    #: The cap that it would exceed: run, day or total.
    cap: str
    limit: Decimal
    #: What counts against the cap already, and what should be added.
    used: Decimal
    extra: Decimal


def check_caps(caps: Mapping[str, Decimal], used: Mapping[str, Decimal], extra: Decimal) -> Denial | None:
    """Return the first cap that an extra amount would exceed; None if it may be spent."""
    for name, limit in caps.items():
        if total([used[name], extra]) > limit:
            return Denial(cap=name, limit=limit, used=used[name], extra=extra)
    return None


def amount_left(caps: Mapping[str, Decimal], used: Mapping[str, Decimal]) -> Decimal | None:
    """Return what may still be spent under all caps; None without caps."""
    return max(ZERO, min(EXACT.subtract(limit, used[name]) for name, limit in caps.items())) if caps else None


def used_amounts(
    connection: sqlite3.Connection, names: Collection[str], batcher_id: str, now: datetime
) -> dict[str, Decimal]:
    """Add up what counts against these caps of a batcher."""

    def add(sql: str, *parameters: str) -> Decimal:
        return total(Decimal(row[0]) for row in connection.execute(sql, parameters))

    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    found = {}
    for name in names:
        if name == "run":
            found[name] = add(_RUN_AMOUNTS, batcher_id)
        elif name == "day":
            found[name] = total([add(_OPEN_AMOUNTS), add(f"{_PAID_AMOUNTS} AND settled_at >= ?", to_text(midnight))])
        else:
            found[name] = total([add(_OPEN_AMOUNTS), add(_PAID_AMOUNTS)])
    return found


def commit_reservation(transaction: Transaction, commitment: ReservationRecord) -> None:
    """Turn the reservation of this id into an agreement's commitment; make one if there is none.

    A commitment that the agreement has already is only raised: somebody else was first to find the agreement.
    """
    known = _find(transaction, "agreement_id", commitment.agreement_id)
    if known is None:
        transaction.execute(_SAVE, to_row(commitment))
        return
    if known.id != commitment.id:
        transaction.execute(_RELEASE, (commitment.id,))
    if known.state is not ReservationState.SETTLED:
        transaction.execute(_SAVE, to_row(replace(known, amount=max(known.amount, commitment.amount))))


def change_commitment(transaction: Transaction, agreement_id: str, amount: Decimal, now: str) -> None:
    """Replace an agreement's commitment by what it may have cost by its end."""
    transaction.execute(_CHANGE, (to_amount(amount), now, agreement_id))


def settle_reservation(transaction: Transaction, agreement_id: str, amount: Decimal, now: str) -> None:
    """Replace an agreement's commitment by what was paid."""
    transaction.execute(_SETTLE, (to_amount(amount), now, agreement_id))


class Reservations:
    """The tables `reservations` and `budgets`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def set_caps(self, batcher_id: str, caps: Mapping[str, Decimal]) -> None:
        """Set a batcher's caps. :param caps: run, day, total -> amount; a name that is missing has no limit."""

        def write(transaction: Transaction) -> None:
            transaction.execute("DELETE FROM budgets WHERE batcher_id = ?", (batcher_id,))
            for name, amount in caps.items():
                transaction.execute("INSERT INTO budgets VALUES (?, ?, ?)", (batcher_id, name, to_amount(amount)))

        self._database.write(write)

    def caps(self, batcher_id: str) -> dict[str, Decimal]:
        """Return a batcher's caps; empty for one that spends nothing."""
        with self._database.read() as connection:
            return _read_caps(connection, batcher_id)

    def used(self, batcher_id: str, *, now: datetime) -> dict[str, Decimal]:
        """Return what counts against each cap of a batcher."""
        with self._database.snapshot() as connection:
            return used_amounts(connection, _read_caps(connection, batcher_id), batcher_id, now)

    def used_by_all(self, *, now: datetime) -> dict[str, Decimal]:
        """Return what counts against the caps on the day and on the total, which all batchers share."""
        with self._database.snapshot() as connection:
            return used_amounts(connection, ("day", "total"), "", now)

    def reserve(self, id: str, *, batcher_id: str, purpose: str, amount: Decimal, now: datetime) -> Denial | None:
        """Reserve an amount, or raise an open reservation or commitment to it. :return: None if that was possible."""

        def write(transaction: Transaction) -> Denial | None:
            known = _find(transaction, "id", id)
            if known is not None and (known.state is ReservationState.SETTLED or known.amount >= amount):
                return None
            extra = amount if known is None else EXACT.subtract(amount, known.amount)
            caps = _read_caps(transaction.connection, batcher_id)
            denial = check_caps(caps, used_amounts(transaction.connection, caps, batcher_id, now), extra)
            if denial is None:
                new = ReservationRecord(id=id, batcher_id=batcher_id, purpose=purpose, amount=amount, changed_at=now)
                record = new if known is None else replace(known, amount=amount, changed_at=now)
                transaction.execute(_SAVE, to_row(record))
            return denial

        return self._database.write(write)

    def lower(self, id: str, amount: Decimal, *, now: datetime) -> None:
        """Lower a commitment to what its agreement may still cost; does nothing if it is lower."""

        def write(transaction: Transaction) -> None:
            known = _find(transaction, "id", id)
            if known is not None and known.state is ReservationState.COMMITTED and amount < known.amount:
                transaction.execute(_SAVE, to_row(replace(known, amount=amount, changed_at=now)))

        self._database.write(write)

    def release(self, id: str) -> None:
        """Give up a reservation that no agreement came of."""
        self._database.execute(_RELEASE, (id,))

    def release_all_of(self, batcher_id: str) -> None:
        """Give up what a batcher reserved without an agreement."""
        self._database.execute("DELETE FROM reservations WHERE batcher_id = ? AND state = 'reserved'", (batcher_id,))

    def list(self, *, is_open: bool | None = None) -> builtins.list[ReservationRecord]:
        """List reservations in the order of their last change. :param is_open: False for settled ones only."""
        which = {None: "1", True: "state != 'settled'", False: "state = 'settled'"}[is_open]
        sql = f"SELECT * FROM reservations WHERE {which} ORDER BY changed_at, id"
        return self._database.records(ReservationRecord, sql)

    def reserving_batchers(self) -> set[str]:
        """Return the batchers with caps, or with reservations that no agreement came of yet."""
        sql = "SELECT batcher_id FROM budgets UNION SELECT batcher_id FROM reservations WHERE state = 'reserved'"
        return {row[0] for row in self._database.rows(sql)}


def _find(transaction: Transaction, column: str, value: str | None) -> ReservationRecord | None:
    row = transaction.execute(f"SELECT * FROM reservations WHERE {column} = ?", (value,)).fetchone()
    return None if row is None else from_row(ReservationRecord, row)


def _read_caps(connection: sqlite3.Connection, batcher_id: str) -> dict[str, Decimal]:
    rows = connection.execute("SELECT cap, amount FROM budgets WHERE batcher_id = ?", (batcher_id,))
    return {row[0]: Decimal(row[1]) for row in rows}

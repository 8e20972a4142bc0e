"""Decisions about bills: made once, whoever judges again and however often."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from store.rentals.decisions import BILLED_BEFORE, BillKind, DecisionRecord
from store.rentals.ledger import BillState, InvoiceRecord
from store.store import Store

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


def pay(bill_id: str, agreement_id: str = "a1", amount: str = "0.2", **changes: object) -> DecisionRecord:
    made = DecisionRecord(
        bill_id=bill_id,
        kind=BillKind.INVOICE,
        agreement_id=agreement_id,
        amount=Decimal(amount),
        max_amount=Decimal("0.3"),
        is_refused=False,
        decided_at=NOON,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def refuse(bill_id: str, agreement_id: str = "a1", **changes: object) -> DecisionRecord:
    return pay(bill_id, agreement_id, "9", is_refused=True, reason="too much", **changes)


def note(bill_id: str, **changes: object) -> DecisionRecord:
    return pay(bill_id, kind=BillKind.DEBIT_NOTE, activity_id="ac1", **changes)


def test_the_first_decision_holds(store: Store) -> None:
    first = store.decisions.decide(refuse("i1"))
    second = store.decisions.decide(pay("i1", amount="9", decided_at=NOON + timedelta(hours=1)))

    assert first == second == store.decisions.get("i1") == refuse("i1")
    assert store.decisions.get("i2") is None
    assert store.ledger.costs("total")[0].refused == 9


def test_of_many_who_judge_at_the_same_moment_one_decides(store: Store) -> None:
    held: list[DecisionRecord] = []
    judges = [pay("i1", decided_at=NOON + timedelta(seconds=number)) for number in range(8)]
    threads = [threading.Thread(target=lambda each=each: held.append(store.decisions.decide(each))) for each in judges]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(held) == 8 and len({each.decided_at for each in held}) == 1


@pytest.mark.parametrize("first", [pay("i1"), refuse("i1")], ids=["paid", "refused"])
def test_a_second_invoice_of_an_agreement_is_refused(store: Store, first: DecisionRecord) -> None:
    store.decisions.decide(first)
    second = store.decisions.decide(pay("i2"))
    other = store.decisions.decide(pay("i3", "a2"))

    assert (second.is_refused, second.reason) == (True, BILLED_BEFORE)
    assert not other.is_refused
    assert store.reservations.list() == []


def test_an_invoice_is_refused_if_one_was_paid_before_there_were_decisions(store: Store) -> None:
    store.ledger.record_invoice(
        InvoiceRecord(id="i1", agreement_id="a1", amount=Decimal(1), state=BillState.ACCEPTED, received_at=NOON)
    )

    assert store.decisions.decide(pay("i2")).is_refused


def test_only_what_the_daemon_has_accepted_is_paid(store: Store) -> None:
    store.decisions.decide(pay("i1"))
    store.decisions.decide(refuse("i2", "a2"))
    before = store.ledger.spent()
    for id in ("i1", "i2", "unknown", "i1"):
        store.decisions.finish(id, now=NOON + timedelta(minutes=1))

    (costs,) = store.ledger.costs("total")
    assert (before, costs.paid, costs.refused) == (0, Decimal("0.2"), 9)
    assert store.decisions.unfinished() == []
    assert [each.bill_id for each in store.decisions.refused()] == ["i2"]


def test_debit_notes_are_left_when_there_is_an_invoice(store: Store) -> None:
    for made in (note("d1"), note("d2", amount=Decimal("0.1"), agreement_id="a2")):
        store.decisions.decide(made)
    store.decisions.finish("d1", now=NOON)
    open_before = [each.bill_id for each in store.decisions.unfinished()]
    spent = store.ledger.spent()
    store.decisions.decide(pay("i2", "a2"))

    assert (open_before, spent) == (["d2"], Decimal("0.2"))
    assert [each.bill_id for each in store.decisions.unfinished()] == ["i2"]

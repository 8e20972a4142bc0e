"""Contract of the reservations: what may be spent, in any order of events, a kill at any moment included."""

from __future__ import annotations

import os
import signal
import sqlite3
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from store.amounts import total
from store.database import Transaction
from store.rentals.ledger import AgreementRecord, AllocationRecord, BillState, DebitNoteRecord, InvoiceRecord
from store.rentals.reservations import Denial, ReservationRecord, ReservationState, amount_left, check_caps
from store.settings import HomeSettings
from store.store import Store
from tests import stores
from tests.contracts.conftest import OpenStore

NOON = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
CAPS = {"run": Decimal("0.6"), "day": Decimal(1), "total": Decimal("1.5")}
BATCHERS = ("b1", "b2")


def agreement(id: str, now: datetime = NOON) -> AgreementRecord:
    return AgreementRecord(
        id=id,
        allocation_id="al1",
        provider_id="0xa1fa",
        provider_name="alpha",
        model="resnet50",
        start_price=Decimal("0.01"),
        price_per_cpu_second=Decimal(0),
        price_per_second=Decimal("0.001"),
        created_at=now,
    )


def invoice(id: str, amount: str | Decimal, state: BillState, now: datetime = NOON) -> InvoiceRecord:
    return InvoiceRecord(
        id=f"i-{id}", agreement_id=id, amount=Decimal(amount), state=state, received_at=now, settled_at=now
    )


def reserve(store: Store, id: str, amount: str | Decimal, *, batcher: str = "b1", now: datetime = NOON) -> Any:
    return store.reservations.reserve(id, batcher_id=batcher, purpose="resnet50", amount=Decimal(amount), now=now)


def commitment(
    id: str, agreement_id: str, amount: str | Decimal, *, batcher: str = "b1", now: datetime = NOON
) -> ReservationRecord:
    return ReservationRecord(
        id=id,
        batcher_id=batcher,
        purpose="resnet50",
        amount=Decimal(amount),
        state=ReservationState.COMMITTED,
        agreement_id=agreement_id,
        changed_at=now,
    )


def commit(store: Store, id: str, amount: str | Decimal, *, batcher: str = "b1", now: datetime = NOON) -> None:
    """Commit the reservation `r-ID` for the agreement `ID`."""
    store.ledger.record_agreement(agreement(id, now), commitment(f"r-{id}", id, amount, batcher=batcher, now=now))


def open_amount(store: Store) -> Decimal:
    return total(each.amount for each in store.reservations.list(is_open=True))


# The rules


amounts = st.decimals(min_value=0, max_value=2, places=4)


@given(
    st.dictionaries(st.sampled_from(list(CAPS)), amounts), st.fixed_dictionaries(dict.fromkeys(CAPS, amounts)), amounts
)
def test_exactly_what_is_left_may_be_spent(caps: Any, used: Any, extra: Decimal) -> None:
    left = amount_left(caps, used)

    denial = check_caps(caps, used, extra)

    assert (left is None) == (not caps)
    # Zero is denied too where a cap is exceeded already.
    assert (denial is None) == all(used[name] + extra <= limit for name, limit in caps.items())
    if denial is not None:
        assert denial.used + denial.extra > denial.limit == caps[denial.cap]
        assert left is not None and (extra > left or left == 0)


def test_a_reservation_that_would_exceed_a_cap_is_denied_with_the_reason(store: Store) -> None:
    store.reservations.set_caps("b1", CAPS)

    allowed, denied = reserve(store, "r1", "0.6"), reserve(store, "r2", "0.1")

    assert allowed is None
    assert denied == Denial(cap="run", limit=Decimal("0.6"), used=Decimal("0.6"), extra=Decimal("0.1"))
    assert [each.id for each in store.reservations.list()] == ["r1"]


def test_other_batchers_of_the_home_count_for_the_day_and_the_total_but_not_for_the_run(store: Store) -> None:
    for batcher in BATCHERS:
        store.reservations.set_caps(batcher, CAPS)
    reserve(store, "r1", "0.6", batcher="b1")

    denied = reserve(store, "r2", "0.5", batcher="b2")
    allowed = reserve(store, "r2", "0.4", batcher="b2")

    assert denied is not None and denied.cap == "day"
    assert allowed is None
    assert store.reservations.used("b2", now=NOON) == {"run": Decimal("0.4"), "day": Decimal(1), "total": Decimal(1)}


def test_the_next_day_has_a_new_budget_but_open_amounts_count_again(store: Store) -> None:
    store.reservations.set_caps("b1", {"day": Decimal(1)})
    commit(store, "a1", "0.7")
    store.ledger.record_invoice(invoice("a1", "0.7", BillState.ACCEPTED))
    commit(store, "a2", "0.3")
    tomorrow = NOON + timedelta(days=1)

    assert reserve(store, "r1", "0.1") is not None
    assert store.reservations.used("b1", now=tomorrow) == {"day": Decimal("0.3")}


def test_a_reservation_is_raised_only_as_far_as_the_caps_allow_and_never_lowered_by_that(store: Store) -> None:
    store.reservations.set_caps("b1", CAPS)
    reserve(store, "r1", "0.2")

    assert reserve(store, "r1", "0.5") is None
    assert reserve(store, "r1", "0.1") is None
    assert reserve(store, "r1", "0.7") is not None
    assert open_amount(store) == Decimal("0.5")


def test_a_bill_replaces_what_was_committed_whether_it_is_accepted_or_refused(store: Store) -> None:
    for id, state in (("a1", BillState.ACCEPTED), ("a2", BillState.REFUSED)):
        reserve(store, f"r-{id}", "0.3")
        commit(store, id, "0.25")
        before = open_amount(store)
        store.ledger.record_invoice(invoice(id, "0.2", BillState.RECEIVED))
        received = open_amount(store)
        store.ledger.record_invoice(invoice(id, "0.2", state))

        assert before == received == Decimal("0.25")
        assert open_amount(store) == 0
    assert {each.agreement_id: each.amount for each in store.reservations.list(is_open=False)} == {
        "a1": Decimal("0.2"),
        "a2": Decimal(0),
    }
    assert store.ledger.spent() == Decimal("0.2")


def test_a_bill_that_comes_before_its_agreement_is_recorded_settles_it_too(store: Store) -> None:
    reserve(store, "r-a1", "0.3")
    store.ledger.record_invoice(invoice("a1", "0.2", BillState.ACCEPTED))

    commit(store, "a1", "0.3")

    (settled,) = store.reservations.list()
    assert (settled.state, settled.amount) == (ReservationState.SETTLED, Decimal("0.2"))


def test_an_agreement_that_nobody_billed_is_written_off_and_a_late_bill_counts_nevertheless(store: Store) -> None:
    store.reservations.set_caps("b1", {"run": Decimal(1)})
    for id in ("a1", "a2", "running"):
        commit(store, id, "0.2")
    for id in ("a1", "a2"):
        store.ledger.end_agreement(id, reason="done", now=NOON)
    store.ledger.record_debit_note(
        DebitNoteRecord(
            id="d1", activity_id="ac1", agreement_id="a1", amount=Decimal("0.1"), state=BillState.ACCEPTED,
            received_at=NOON,
        )
    )  # fmt: skip
    store.ledger.record_invoice(invoice("a2", "0.05", BillState.ACCEPTED))
    open_before = store.ledger.spent()

    ids = store.ledger.write_off(["a1", "a2", "running", "unknown"], now=NOON + timedelta(days=1))
    again = store.ledger.write_off(["a1"], now=NOON + timedelta(days=2))
    used, spent = store.reservations.used("b1", now=NOON), store.ledger.spent()
    unsettled = store.ledger.agreements(is_settled=False)
    written_off = store.ledger.written_off(since=NOON)
    store.ledger.record_invoice(invoice("a1", "0.15", BillState.ACCEPTED))

    assert (ids, again, open_before) == (["a1"], [], Decimal("0.15"))
    assert (used, spent) == ({"run": Decimal("0.25")}, Decimal("0.05"))
    assert [each.id for each in unsettled] == ["running"]
    assert [(each.id, each.written_off_at) for each in written_off] == [("a1", NOON + timedelta(days=1))]
    assert store.reservations.used("b1", now=NOON) == {"run": Decimal("0.4")}
    assert store.ledger.spent() == Decimal("0.2")


def test_a_commitment_is_lowered_but_not_raised(store: Store) -> None:
    commit(store, "a1", "0.5")
    for amount in ("0.7", "0.3", "0.4"):
        store.reservations.lower("r-a1", Decimal(amount), now=NOON)

    assert open_amount(store) == Decimal("0.3")


def test_an_agreement_that_ended_is_committed_with_what_it_may_have_cost_by_then(store: Store) -> None:
    for id in ("a1", "a2", "a3"):
        commit(store, id, "0.5")

    store.ledger.end_agreement("a1", reason="done", now=NOON, owed=Decimal("0.3"))
    store.ledger.end_agreement("a1", reason="again", now=NOON + timedelta(hours=1), owed=Decimal("0.4"))
    store.ledger.end_agreement("a2", reason="late", now=NOON, owed=Decimal("0.7"))
    store.ledger.end_agreement("a3", reason="gone", now=NOON)

    amounts = {each.agreement_id: each.amount for each in store.reservations.list(is_open=True)}
    assert amounts == {"a1": Decimal("0.3"), "a2": Decimal("0.7"), "a3": Decimal("0.5")}


def test_an_agreement_found_at_the_daemon_takes_over_the_reservation_of_its_dead_batcher(store: Store) -> None:
    reserve(store, "r-a1", "0.3")
    found = commitment("found", "a1", "0.4")

    store.ledger.record_agreement(agreement("a1"), found)
    store.ledger.record_agreement(agreement("a1"), replace(found, id="again", amount=Decimal("0.35")))
    commit(store, "a1", "0.2")  # written late by the dead batcher's own record

    (only,) = store.reservations.list()
    assert (only.id, only.amount, only.state) == ("found", Decimal("0.4"), ReservationState.COMMITTED)


def test_a_home_from_before_commits_what_its_open_agreements_were_estimated_to_cost(tmp_path: Path) -> None:
    store = Store(HomeSettings(home=tmp_path / "home", busy_seconds=5))
    store.migrate()
    store.ledger.record_allocation(
        AllocationRecord(id="al1", batcher_id="old", platform="p", address="0x", amount=Decimal(1), created_at=NOON)
    )
    for id in ("billed", "open"):
        store.ledger.record_agreement(agreement(id))
    store.ledger.record_invoice(invoice("billed", "0.2", BillState.ACCEPTED))
    store.chunks.start(chunk())
    store.chunks.finish(
        "c1", provider="alpha", bytes_received=1, seconds=1, done=1, failed=0, cost="0.07", code=None, reason=None,
        now=NOON, agreement_id="open", activity_id="ac1", provider_id="0xa1fa",
    )  # fmt: skip
    store.close()
    with sqlite3.connect(tmp_path / "home" / "mlg.db") as database:
        database.execute("DROP TABLE reservations")
        database.execute("DROP TABLE budgets")
        database.execute("DELETE FROM migrations WHERE name = 'm010_reservations'")
    database.close()

    store = Store(HomeSettings(home=tmp_path / "home", busy_seconds=5))
    applied = store.migrate()
    (committed,) = store.reservations.list()
    store.reservations.set_caps("new", {"total": Decimal(1)})
    used = store.reservations.used("new", now=NOON)
    store.close()

    assert applied == ["m010_reservations"]
    assert (committed.agreement_id, committed.batcher_id, committed.amount) == ("open", "old", Decimal("0.07"))
    assert used == {"total": Decimal("0.27")}


def test_a_home_from_before_writes_off_what_no_longer_counted_against_the_budget(tmp_path: Path) -> None:
    store = Store(HomeSettings(home=tmp_path / "home", busy_seconds=5))
    store.migrate()
    for id in ("given up", "billed", "open"):
        commit(store, id, "0.2")
        store.ledger.end_agreement(id, reason="done", now=NOON)
    store.ledger.record_invoice(invoice("billed", "0.1", BillState.REFUSED))
    store.close()
    with sqlite3.connect(tmp_path / "home" / "mlg.db") as database:
        database.execute("UPDATE reservations SET state = 'settled', amount = '0' WHERE agreement_id = 'given up'")
        database.execute("DROP INDEX agreements_written_off")
        database.execute("ALTER TABLE agreements DROP COLUMN written_off_at")
        database.execute("DROP TABLE decisions")
        database.execute("DELETE FROM migrations WHERE name = 'm015_bills'")
    database.close()

    store = Store(HomeSettings(home=tmp_path / "home", busy_seconds=5))
    applied = store.migrate()
    written_off, unsettled = store.ledger.written_off(since=NOON), store.ledger.agreements(is_settled=False)
    refused = store.decisions.refused()
    store.close()

    assert applied == ["m015_bills"]
    assert ([each.id for each in written_off], [each.id for each in unsettled]) == (["given up"], ["open"])
    assert [(each.agreement_id, each.finished_at) for each in refused] == [("billed", None)]


def chunk() -> Any:
    from store.chunks import ChunkRecord

    return ChunkRecord(
        id="c1", batcher_id="old", executor="golem", provider=None, service="classification", model="resnet50",
        items=1, bytes_sent=1, bytes_received=None, dispatched_at=NOON, finished_at=None, seconds=None,
        done=None, failed=None, cost=None, code=None, reason=None,
    )  # fmt: skip


# Any order of events


class Spending(RuleBasedStateMachine):
    """Two batchers of a home in any order of events, kills included; each obeys only the answers of the store."""

    def __init__(self, open_store: OpenStore) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = open_store(Path(self.folder.name) / "home")
        self.now = NOON
        for batcher in BATCHERS:
            self.store.reservations.set_caps(batcher, CAPS)
        #: Agreement -> (batcher, the most that its bill may be); reserved, committed, ended, in this order.
        self.reserved: dict[str, tuple[str, Decimal]] = {}
        self.committed: dict[str, tuple[str, Decimal]] = {}
        self.ended: dict[str, tuple[str, Decimal]] = {}
        self.paid: dict[str, tuple[str, Decimal, datetime]] = {}
        self.count = 0

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    @rule(batcher=st.sampled_from(BATCHERS), amount=st.decimals("0.01", "0.4", places=2))
    def reserve(self, batcher: str, amount: Decimal) -> None:
        self.count += 1
        if reserve(self.store, f"r-a{self.count}", amount, batcher=batcher, now=self.now) is None:
            self.reserved[f"a{self.count}"] = (batcher, amount)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), part=st.decimals("0.5", 1, places=1))
    def commit(self, data: Any, part: Decimal) -> None:
        id = data.draw(st.sampled_from(sorted(self.reserved)))
        batcher, amount = self.reserved.pop(id)
        commit(self.store, id, amount * part, batcher=batcher, now=self.now)
        self.committed[id] = (batcher, amount * part)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        id = data.draw(st.sampled_from(sorted(self.reserved)))
        self.store.reservations.release(f"r-{id}")
        self.store.reservations.release(f"r-{id}")
        del self.reserved[id]

    @precondition(lambda self: self.committed)
    @rule(data=st.data(), more=st.decimals("0.01", "0.3", places=2))
    def extend(self, data: Any, more: Decimal) -> None:
        id = data.draw(st.sampled_from(sorted(self.committed)))
        batcher, amount = self.committed[id]
        if reserve(self.store, f"r-{id}", amount + more, batcher=batcher, now=self.now) is None:
            self.committed[id] = (batcher, amount + more)

    @precondition(lambda self: self.committed)
    @rule(data=st.data(), part=st.decimals("0.1", 1, places=1))
    def end(self, data: Any, part: Decimal) -> None:
        id = data.draw(st.sampled_from(sorted(self.committed)))
        batcher, amount = self.committed.pop(id)
        self.store.ledger.end_agreement(id, reason="done", now=self.now, owed=amount * part)
        self.ended[id] = (batcher, amount * part)

    @precondition(lambda self: self.committed or self.ended)
    @rule(data=st.data(), part=st.decimals(0, 1, places=1), is_refused=st.booleans())
    def bill(self, data: Any, part: Decimal, is_refused: bool) -> None:
        open_agreements = {**self.committed, **self.ended}
        id = data.draw(st.sampled_from(sorted(open_agreements)))
        batcher, amount = open_agreements[id]
        self.committed.pop(id, None)
        self.ended.pop(id, None)
        state = BillState.REFUSED if is_refused else BillState.ACCEPTED
        for _ in range(2):
            self.store.ledger.record_invoice(invoice(id, amount * part, state, self.now))
        if not is_refused:
            self.paid[id] = (batcher, amount * part, self.now)

    @rule(batcher=st.sampled_from(BATCHERS))
    def kill(self, batcher: str) -> None:
        """The next batcher finds the agreements at the daemon, then releases the rest; a new run begins."""
        for id in [id for id, (owner, _) in self.committed.items() if owner == batcher]:
            commit(self.store, id, self.committed[id][1], batcher=batcher, now=self.now)
        self.store.reservations.release_all_of(batcher)
        self.reserved = {id: one for id, one in self.reserved.items() if one[0] != batcher}
        self.store.reservations.set_caps(batcher, CAPS)

    @rule()
    def wait_a_day(self) -> None:
        self.now += timedelta(days=1)
        written_off = self.store.ledger.write_off([*self.ended, *self.committed, *self.paid], now=self.now)
        assert sorted(written_off) == sorted(self.ended)
        self.ended = {}

    @invariant()
    def what_is_open_is_what_may_still_be_billed(self) -> None:
        expected = total(
            amount for _, amount in (*self.reserved.values(), *self.committed.values(), *self.ended.values())
        )

        assert open_amount(self.store) == expected

    @invariant()
    def the_ledger_is_the_sum_of_what_was_paid(self) -> None:
        paid = total(amount for _, amount, _ in self.paid.values())

        assert self.store.ledger.spent() == paid
        assert self.store.reservations.used("b1", now=self.now)["total"] == paid + open_amount(self.store)

    @invariant()
    def no_cap_is_exceeded(self) -> None:
        for batcher in BATCHERS:
            used = self.store.reservations.used(batcher, now=self.now)
            mine = [*self.reserved.values(), *self.committed.values(), *self.ended.values()]
            mine += [(owner, amount) for owner, amount, _ in self.paid.values()]

            assert used["run"] == total(amount for owner, amount in mine if owner == batcher)
            assert all(used[name] <= CAPS[name] for name in CAPS)


def test_spending_in_any_order_stays_within_the_caps(open_store: OpenStore) -> None:
    run_state_machine_as_test(
        lambda: Spending(open_store),
        settings=settings(
            max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


# kill -9


def spend(store: Store, pay: Callable[[str], None]) -> None:
    """Go through all steps of money: two agreements, one of which is accepted and one refused, and one that fails."""
    store.reservations.set_caps("b1", CAPS)
    for id, state in (("a1", BillState.ACCEPTED), ("a2", BillState.REFUSED)):
        reserve(store, f"r-{id}", "0.2")
        commit(store, id, "0.15")
        reserve(store, f"r-{id}", "0.3")
        store.ledger.end_agreement(id, reason="done", now=NOON, owed=Decimal("0.25"))
        store.ledger.record_invoice(invoice(id, "0.2", BillState.RECEIVED))
        if state is BillState.ACCEPTED:
            pay(id)
        store.ledger.record_invoice(invoice(id, "0.2", state))
    reserve(store, "r-none", "0.1")
    store.reservations.release("r-none")
    store.reservations.release_all_of("b1")


def run_and_kill(home: HomeSettings, paid: Path, kill_at: int) -> bool:
    """Spend in a child process that kills itself before its n-th statement. :return: whether it came so far."""
    pid = os.fork()
    if pid == 0:
        executed = 0
        plain = Transaction.execute

        def execute(self: Transaction, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
            nonlocal executed
            executed += 1
            if executed == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(self, sql, parameters)

        Transaction.execute = execute  # type: ignore[method-assign]
        try:
            spend(Store(home), lambda id: paid.touch())
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def test_a_kill_before_any_statement_loses_and_doubles_nothing(tmp_path: Path) -> None:
    kill_at = 0
    was_killed = True
    while was_killed:
        kill_at += 1
        folder = tmp_path / str(kill_at)
        home, paid = HomeSettings(home=folder / "home", busy_seconds=5), folder / "paid"
        folder.mkdir()
        stores.open_store(home).close()

        was_killed = run_and_kill(home, paid, kill_at)

        # The next batcher: the daemon says which agreements exist and which invoices were accepted.
        store = Store(home)
        before = store.reservations.used("b1", now=NOON)
        assert all(amount <= CAPS[name] for name, amount in before.items()), kill_at
        known = {each.id for each in store.ledger.agreements()}
        if paid.exists():
            assert "a1" in known, kill_at
            store.ledger.record_invoice(invoice("a1", "0.2", BillState.ACCEPTED))
        store.reservations.release_all_of("b1")
        committed = {each.agreement_id: each for each in store.reservations.list()}
        assert committed.keys() == known, "exactly one for each agreement, and none without one"
        store.ledger.write_off(known, now=NOON + timedelta(days=2))
        for id in known - {each.id for each in store.ledger.agreements(is_open=False)}:
            store.ledger.record_invoice(invoice(id, "0.2", BillState.REFUSED))  # ended by the recovery
        assert store.reservations.list(is_open=True) == [], kill_at
        assert store.ledger.spent() == (Decimal("0.2") if paid.exists() else 0), kill_at
        store.close()
    assert kill_at > 30, "there were steps to be killed at"

"""Bills of all kinds, in any order, with failures of the daemon and killed batchers.

The daemon's payment service is that of the devnet, without HTTP, providers and yapapi.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from batcher.backoff import Backoff
from batcher.errors import BudgetReached
from batcher.executors.golem.ledger_writer import describe_agreement
from batcher.executors.golem.money import Money
from batcher.executors.golem.offers import Price
from batcher.executors.golem.parts import GolemParts
from batcher.executors.golem.payments import PaymentProcessor
from batcher.executors.golem.recovery import Recovery
from batcher.executors.golem.settings import GolemSettings
from batcher.executors.golem.timings import GolemTimings
from batcher.executors.golem.yapapi_adapter import OWNER
from devnet.errors import ApiError
from devnet.payments import PaymentService
from devnet.records import Agreement, Bill
from devnet.timing import format_time, parse_time
from store.amounts import total
from store.rentals.decisions import BILLED_BEFORE, BillKind, DecisionRecord
from store.rentals.ledger import AllocationRecord
from store.settings import HomeSettings
from store.store import Store
from tests.contexts import make_context
from tests.stores import open_store
from tests.timing import until

TAG = "0123456789abcdef"
PLATFORM = "erc20-holesky-tglm"
#: 0.01 GLM for the start, 0.001 GLM a second.
PRICE = Price(start=Decimal("0.01"), cpu_second=Decimal(0), second=Decimal("0.001"))
TIMINGS = GolemTimings(
    payment_backoff=Backoff(first_seconds=0.001, max_seconds=0.01),
    cover_seconds=60.0,
    ending_seconds=10.0,
)


class DaemonError(Exception):
    """An error of the daemon, as yapapi's client reports it."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Daemon:
    """The daemon, as far as payments need it, with a clock that tests set."""

    def __init__(self) -> None:
        self.now = datetime(2026, 11, 20, 12, tzinfo=UTC)
        self.service = PaymentService(funds=Decimal(1000), on_change=lambda: None)
        for feed in ("invoice_events", "debit_note_events"):
            setattr(self.service, feed, _Feed(self))
        self.agreements: dict[str, Agreement] = {}
        #: Every call that was executed: (name, id of the bill).
        self.calls: list[tuple[str, str]] = []
        #: (name of a call, bill or "") -> status, for each call until it is removed.
        self.failing: dict[tuple[str, str], int] = {}
        #: Bills for which the daemon waits for the provider.
        self.unanswered: set[str] = set()
        #: The next calls end in this way: "fail" before it is executed, "lose" after, "kill" and "kill-after" likewise.
        self.next_failures: list[str | None] = []

    def agree(self, owner: str, *, seconds: float = 3600) -> str:
        """Make an agreement. :return: its id."""
        properties = {OWNER: owner, "golem.com.payment.chosen-platform": PLATFORM, "golem.srv.app.mlg.model": "m"}
        offer = {
            "golem.com.pricing.model": "linear",
            "golem.com.usage.vector": ["golem.usage.duration_sec"],
            "golem.com.pricing.model.linear.coeffs": [0.001, 0.01],
        }
        made = Agreement(
            agreement_id=f"a{len(self.agreements)}",
            proposal_id="p",
            provider_id=f"0xprovider{len(self.agreements)}",
            demand={"properties": properties},
            offer={"properties": offer},
            valid_to=self.now + timedelta(seconds=seconds),
            state="Approved",
            created_at=self.now,
        )
        self.agreements[made.agreement_id] = made
        return made.agreement_id

    def send_invoice(self, agreement_id: str, amount: Decimal | str) -> str:
        self.service.send_invoice(self.agreements[agreement_id], Decimal(amount), self.now)
        return list(self.service.invoices)[-1]

    def send_debit_note(self, agreement_id: str, amount: Decimal | str, *, is_payable: bool = False) -> str:
        due_at = self.now if is_payable else None
        activity = f"of {agreement_id}"
        self.service.send_debit_note(self.agreements[agreement_id], activity, Decimal(amount), [1.0], due_at)
        return list(self.service.debit_notes)[-1]

    def paid(self) -> Decimal:
        """Return what was paid, by invoices alone: debit notes without a due date are only accepted."""
        return total(bill.amount for bill in self.service.invoices.values() if bill.status == "ACCEPTED")

    # What yapapi's client calls

    async def call(self, name: str, id: str, execute: Callable[[], Any]) -> Any:
        """Execute a call, with the failure that is due."""
        failure = self.next_failures.pop(0) if self.next_failures else None
        status = self.failing.get((name, id)) or self.failing.get((name, ""))
        await asyncio.sleep(3600 if id in self.unanswered and name.startswith(("accept", "reject")) else 0)
        if status is not None:
            raise DaemonError(status)
        if failure == "fail":
            raise DaemonError(500)
        if failure == "kill":
            raise asyncio.CancelledError
        try:
            answer = execute()
        except ApiError as error:
            raise DaemonError(error.status) from error
        self.calls.append((name, id))
        if failure == "lose":
            raise DaemonError(500)
        if failure == "kill-after":
            raise asyncio.CancelledError
        return answer

    def engine(self) -> Any:
        """Return what is used of yapapi's engine."""
        bills: dict[str, Any] = {}
        for name, known, feed in (
            ("invoice", self.service.invoices, self.service.invoice_events),
            ("debit_note", self.service.debit_notes, self.service.debit_note_events),
        ):
            bills |= self._bill_calls(name, known, feed)
        market = SimpleNamespace(get_agreement=lambda id: self.call("get_agreement", id, lambda: self._agreement(id)))
        payment = SimpleNamespace(_api=SimpleNamespace(**bills), new_allocation=self._new_allocation)
        return SimpleNamespace(_market_api=SimpleNamespace(_api=market), _payment_api=payment)

    def _bill_calls(self, name: str, known: dict[str, Bill], feed: Any) -> dict[str, Any]:
        async def get_events(*, after_timestamp: datetime, max_events: int = 10, **_: Any) -> Any:
            return await self.call(f"get_{name}_events", "", lambda: feed.page(after_timestamp, max_events))

        async def get(id: str, **_: Any) -> Any:
            return await self.call(f"get_{name}", id, lambda: _from_api(known[id].to_api()))

        async def accept(id: str, acceptance: Any, **_: Any) -> None:
            body = {"totalAmountAccepted": acceptance.total_amount_accepted, "allocationId": acceptance.allocation_id}
            await self.call(f"accept_{name}", id, lambda: self.service.accept(known[id], body))

        async def reject(id: str, rejection: Any, **_: Any) -> None:
            body = {"rejectionReason": rejection.rejection_reason, "totalAmountAccepted": "0"}
            await self.call(f"reject_{name}", id, lambda: self.service.reject(known[id], body))

        calls = {f"get_{name}_events": get_events, f"get_{name}": get}
        return {**calls, f"accept_{name}": accept, f"reject_{name}": reject}

    def allocate(self, amount: Decimal | str) -> str:
        body = {"totalAmount": str(amount), "paymentPlatform": PLATFORM}
        return self.service.wallet.allocate(body).allocation_id

    @contextlib.asynccontextmanager
    async def _new_allocation(self, amount: Decimal, **_: Any) -> AsyncIterator[Any]:
        id = self.allocate(amount)
        try:
            yield SimpleNamespace(id=id)
        finally:
            self.service.wallet.release(id)

    def _agreement(self, id: str) -> Any:
        found = self.agreements[id]
        return SimpleNamespace(
            agreement_id=id,
            demand=SimpleNamespace(properties=found.demand["properties"]),
            offer=SimpleNamespace(properties=found.offer["properties"], provider_id=found.provider_id),
            timestamp=found.created_at,
            valid_to=found.valid_to,
            state=found.state,
        )


class _Feed(list[dict[str, Any]]):
    """Events with the times of the test's clock, which may be equal, as those of the daemon may."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__()
        self._daemon = daemon

    def add(self, **fields: Any) -> None:
        self.append({"eventDate": format_time(self._daemon.now), **fields})

    def page(self, after: datetime, count: int) -> list[Any]:
        assert count <= 100, "the published limit"
        return [_from_api(each) for each in self if parse_time(each["eventDate"]) > after][:count]


def _from_api(values: dict[str, Any]) -> Any:
    """Return values of the API as yapapi's client does: as attributes, times parsed."""
    names = {
        "eventDate": "event_date", "invoiceId": "invoice_id", "debitNoteId": "debit_note_id", "amount": "amount",
        "totalAmountDue": "total_amount_due", "agreementId": "agreement_id", "activityId": "activity_id",
        "status": "status", "paymentDueDate": "payment_due_date", "paymentPlatform": "payment_platform",
        "payerAddr": "payer_addr",
    }  # fmt: skip
    found = {names[key]: value for key, value in values.items() if key in names}
    if "event_date" in found:
        found["event_date"] = parse_time(found["event_date"])
    return SimpleNamespace(**{"payment_due_date": None, **found})


class Batcher:
    """One batcher's payments and money, on a daemon and a store that it shares with others."""

    def __init__(self, daemon: Daemon, store: Store, folder: Path, name: str, dead: set[str], **caps: str) -> None:
        self.daemon, self.store, self.name = daemon, store, name
        context = make_context(folder / name, folder / "models", store=store)
        self.parts = GolemParts(context, GolemSettings(), TIMINGS)
        self.money = self.parts.money = Money(
            store,
            self.parts.ledger_writer,
            owner=name,
            caps={cap: Decimal(amount) for cap, amount in caps.items()},
            timings=TIMINGS,
            clock=lambda: daemon.now,
            monotonic=lambda: daemon.now.timestamp(),
        )
        self.allocation_id = daemon.allocate("0.001")
        self.session: Any = SimpleNamespace(
            engine=daemon.engine(),
            owner=f"{TAG}.{name}-1",
            tag=TAG,
            allocation_id=self.allocation_id,
            is_left_over=lambda owner: str(owner).partition(".")[2].partition("-")[0] in dead,
            is_of_this_home=lambda owner: str(owner).startswith(TAG),
            report_daemon_error=lambda error: None,
            is_stale=False,
        )
        self.processor = PaymentProcessor(self.parts, self.session)
        self._poll_notes = self.processor._poll_new(self.processor._calls[BillKind.DEBIT_NOTE])

    async def start(self) -> None:
        self.parts.ledger_writer.start()
        await self.money.start()

    async def hire(self) -> str | None:
        """Reserve, agree and commit. :return: the agreement; None if the budget does not allow it."""
        try:
            reservation = await self.money.reserve("m", TIMINGS.cost_limit(PRICE, TIMINGS.cover_seconds))
        except BudgetReached:
            return None
        id = self.daemon.agree(f"{TAG}.{self.name}-1")
        record, price = describe_agreement(self.daemon._agreement(id), allocation_id=self.allocation_id)
        reservation.commit(record, price, TIMINGS.cover_seconds)
        await self.written()
        return id

    async def end(self, id: str) -> None:
        """Record that the daemon has acknowledged the end of an agreement."""
        self.money.end_agreement(id, "done")
        await self.written()

    async def settle(self) -> None:
        """Settle all bills that there are."""
        with contextlib.suppress(DaemonError):
            await self._poll_notes()
        await self.processor.settle_known()
        await self.written()

    async def written(self) -> None:
        await self.parts.ledger_writer._writes.join()

    async def close(self) -> None:
        await self.processor.close()
        await self.parts.ledger_writer.close()


Body = Callable[[Daemon, Callable[..., Coroutine[Any, Any, Batcher]], Store], Coroutine[Any, Any, None]]


@pytest.fixture
def play(store: Store, tmp_path: Path) -> Callable[[Body], None]:
    """Run a body with a daemon, a function that makes batchers (killing those before), and the store."""

    def play(body: Body) -> None:
        async def main() -> None:
            daemon, dead, batchers = Daemon(), set[str](), list[Batcher]()

            async def next_batcher(**caps: str) -> Batcher:
                for each in batchers:
                    dead.add(each.name)
                    await each.close()
                batchers.append(Batcher(daemon, store, tmp_path, f"b{len(batchers)}", dead, **caps))
                await batchers[-1].start()
                return batchers[-1]

            try:
                await body(daemon, next_batcher, store)
            finally:
                for each in batchers:
                    await each.close()

        asyncio.run(asyncio.wait_for(main(), 120))

    return play


Play = Callable[[Body], None]


@pytest.mark.parametrize("amount", ["-1", "nan", "0.01" + "0" * 250 + "1", "1e-999999", "1e999999"])
def test_an_amount_that_would_spoil_every_sum_is_refused(play: Play, amount: str) -> None:
    async def body(daemon: Daemon, next_batcher: Any, store: Store) -> None:
        batcher = await next_batcher(day="1")
        strange, other = await batcher.hire(), await batcher.hire()
        for each in (strange, other):
            daemon.now += timedelta(seconds=10)
            await batcher.end(each)
        refused, paid = daemon.send_invoice(strange, amount), daemon.send_invoice(other, "0.01" + "1" * 140)
        await batcher.settle()

        (decision,) = store.decisions.refused()
        assert decision.bill_id == refused and len(f"{decision.amount:f} {decision.reason}") < 200
        bills = [call for call in daemon.calls if call[0] in ("reject_invoice", "accept_invoice")]
        assert sorted(bills) == [("accept_invoice", paid), ("reject_invoice", refused)]
        assert await batcher.hire() is not None, "the budget can still be computed"

    play(body)


def test_a_refused_invoice_is_never_paid_and_the_daemon_is_told(play: Play) -> None:
    async def body(daemon: Daemon, next_batcher: Any, store: Store) -> None:
        batcher = await next_batcher()
        agreement, other = await batcher.hire(), await batcher.hire()
        daemon.now += timedelta(seconds=10)
        await batcher.end(agreement)
        await batcher.end(other)
        invoice = daemon.send_invoice(agreement, "0.05")  # 0.02 is due
        await batcher.settle()
        for _ in range(3):
            daemon.now += timedelta(hours=1)
            await (await next_batcher()).settle()  # looks again, because `other` is not billed

        assert daemon.paid() == 0
        assert daemon.service.invoices[invoice].status == "REJECTED"
        assert [call for call in daemon.calls if "accept" in call[0]] == []
        (decision,) = store.decisions.refused()
        assert (decision.bill_id, decision.max_amount) == (invoice, Decimal("0.021"))
        (total_costs,) = store.ledger.costs("total")
        assert (total_costs.refused, total_costs.paid) == (Decimal("0.05"), 0)
        assert "too high" in next(iter(batcher.parts.provider_records.banned.values()))

    play(body)


def test_a_batcher_that_knows_nothing_of_the_end_judges_by_the_first_look_and_never_again(play: Play) -> None:
    async def body(daemon: Daemon, next_batcher: Any, store: Store) -> None:
        batcher = await next_batcher()
        agreement = await batcher.hire()
        daemon.now += timedelta(seconds=10)
        await next_batcher()  # the first was killed before it ended the agreement
        daemon.send_invoice(agreement, "0.05")
        daemon.failing["reject_invoice", ""] = 500
        settling = asyncio.create_task((await next_batcher()).settle())
        await until(store.decisions.refused)
        settling.cancel()
        (first,) = store.decisions.refused()
        del daemon.failing["reject_invoice", ""]
        daemon.now += timedelta(minutes=30)
        await (await next_batcher()).settle()

        (second,) = store.decisions.refused()
        assert (first.finished_at, second.finished_at) == (None, daemon.now)
        assert (second.decided_at, second.max_amount) == (first.decided_at, first.max_amount)
        assert daemon.paid() == 0

    play(body)


@pytest.mark.parametrize("is_end_recorded", [False, True])
def test_the_end_of_an_agreement_is_its_expiry_at_the_latest(play: Play, is_end_recorded: bool) -> None:
    async def body(daemon: Daemon, next_batcher: Any, store: Store) -> None:
        batcher = await next_batcher()
        agreement = await batcher.hire()  # for an hour: at most 3.61 GLM, and 5 % more
        daemon.now += timedelta(days=3)
        if is_end_recorded:
            await batcher.end(agreement)
        daemon.send_invoice(agreement, "4")
        await (await next_batcher()).settle()

        (decision,) = store.decisions.refused()
        assert decision.max_amount == Decimal("3.61") * Decimal("1.05")

    play(body)


def test_an_invoice_that_cannot_be_paid_delays_no_other(play: Play) -> None:
    async def body(daemon: Daemon, next_batcher: Any, store: Store) -> None:
        batcher = await next_batcher()
        agreements = [await batcher.hire() for _ in range(30)]
        daemon.now += timedelta(seconds=10)
        for each in agreements:
            await batcher.end(each)
        stuck = [daemon.send_invoice(each, "0.02") for each in agreements[:20]]
        for invoice in stuck:
            daemon.failing["accept_invoice", invoice] = 500
        rest = [daemon.send_invoice(each, "0.02") for each in agreements[20:]]
        batcher.processor.start()
        await until(lambda: all(daemon.service.invoices[each].status == "ACCEPTED" for each in rest))
        for each in agreements:
            batcher.processor.expect_invoice(each)
        still_open = await batcher.processor.wait_until_settled(0.0)
        daemon.failing.clear()
        missing = await batcher.processor.wait_until_settled(60)

        assert 20 <= still_open <= 30
        assert missing == 0
        assert store.ledger.spent() == daemon.paid() == Decimal("0.6")

    play(body)


def test_a_provider_with_many_bills_that_does_not_respond_delays_no_other(play: Play) -> None:
    async def body(daemon: Daemon, next_batcher: Any, store: Store) -> None:
        batcher = await next_batcher()
        silent, other = await batcher.hire(), await batcher.hire()
        await batcher.end(other)
        daemon.now += timedelta(seconds=1)
        daemon.unanswered.update([daemon.send_debit_note(silent, "0.001") for _ in range(20)])
        notes = asyncio.create_task(batcher.settle())
        await until(lambda: len(store.decisions.unfinished()) == 20)
        daemon.send_invoice(other, "0.01")
        settling = asyncio.create_task(batcher.processor._review())

        await until(lambda: store.ledger.spent() == Decimal("0.01"))
        for task in (notes, settling):
            task.cancel()

    play(body)


def test_an_invoice_above_the_allocation_is_paid_from_another_and_the_session_replaced(play: Play) -> None:
    async def body(daemon: Daemon, next_batcher: Any, store: Store) -> None:
        batcher = await next_batcher()
        old = await batcher.hire()
        daemon.send_invoice(old, "0.01")
        last = await next_batcher()
        await last.settle()
        is_stale_after_old = last.session.is_stale
        own = await last.hire()
        daemon.failing["accept_invoice", daemon.send_invoice(own, "0.01")] = 400
        settling = asyncio.create_task(last.settle())
        await until(store.decisions.unfinished)
        is_stale_after_failure = last.session.is_stale
        daemon.failing.clear()
        await until(lambda: last.session.is_stale)
        await settling

        assert (is_stale_after_old, is_stale_after_failure) == (False, False)
        assert [each.allocation_id for each in daemon.service.wallet.list_active()] == [
            batcher.allocation_id,
            last.allocation_id,
        ]
        assert daemon.paid() == Decimal("0.02")

    play(body)


def test_all_pages_are_read_also_if_many_events_have_the_same_time(play: Play) -> None:
    async def body(daemon: Daemon, next_batcher: Any, store: Store) -> None:
        batcher = await next_batcher()
        agreements = [await batcher.hire() for _ in range(260)]
        for number, each in enumerate(agreements):
            daemon.now += timedelta(milliseconds=number % 90 == 0)
            daemon.send_invoice(each, "0.01")
        last = await next_batcher()
        await last.settle()
        await until(lambda: len(daemon.calls) > 0 and not last.processor._settling)

        assert store.ledger.spent() == daemon.paid() == Decimal("2.6")

    play(body)


def test_an_agreement_is_paid_once_however_many_invoices_come(play: Play) -> None:
    async def body(daemon: Daemon, next_batcher: Any, store: Store) -> None:
        batcher = await next_batcher()
        agreement, _ = await batcher.hire(), await batcher.hire()
        daemon.now += timedelta(seconds=10)
        await batcher.end(agreement)
        first, second = daemon.send_invoice(agreement, "0.015"), daemon.send_invoice(agreement, "0.01")
        await batcher.settle()
        third = daemon.send_invoice(agreement, "0.02")
        await (await next_batcher()).settle()

        statuses = Counter(daemon.service.invoices[each].status for each in (first, second, third))
        assert statuses == {"ACCEPTED": 1, "REJECTED": 2}
        assert {each.reason for each in store.decisions.refused()} == {BILLED_BEFORE}
        assert store.ledger.spent() == daemon.paid() > 0
        assert batcher.parts.provider_records.banned == {}

    play(body)


def test_debit_notes_are_judged_once_too_and_the_daemon_is_told(play: Play) -> None:
    async def body(daemon: Daemon, next_batcher: Any, store: Store) -> None:
        batcher = await next_batcher()
        daemon.service.wallet.allocations[batcher.allocation_id].total = Decimal(1)
        agreement = await batcher.hire()
        notes = []
        for seconds, amount in ((10, "0.02"), (10, "0.2"), (1000, "0.3")):
            daemon.now += timedelta(seconds=seconds)
            notes.append(daemon.send_debit_note(agreement, amount, is_payable=amount == "0.3"))
            await batcher.settle()
        daemon.now += timedelta(seconds=1000)
        await batcher.settle()

        assert [daemon.service.debit_notes[each].status for each in notes] == ["ACCEPTED", "REJECTED", "REJECTED"]
        reasons = [each.reason for each in store.decisions.refused()]
        assert "at most" in str(reasons[0]) and "not agreed" in str(reasons[1])
        assert store.decisions.unfinished() == []
        assert store.ledger.spent() == Decimal("0.02")

    play(body)


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_daemon_that_cannot_be_told_of_a_refusal_is_not_asked_again(play: Play, status: int) -> None:
    async def body(daemon: Daemon, next_batcher: Any, store: Store) -> None:
        batcher = await next_batcher()
        agreement = await batcher.hire()
        daemon.failing["reject_invoice", ""] = status
        daemon.send_invoice(agreement, "5")
        await batcher.settle()

        assert store.decisions.unfinished() == []
        assert store.reservations.list(is_open=True) == []

    play(body)


def test_what_was_settled_at_the_daemon_before_is_a_fact(play: Play) -> None:
    async def body(daemon: Daemon, next_batcher: Any, store: Store) -> None:
        batcher = await next_batcher()
        paid, rejected = await batcher.hire(), await batcher.hire()
        first, second = daemon.send_invoice(paid, "5"), daemon.send_invoice(rejected, "0.001")
        acceptance = {"totalAmountAccepted": "5", "allocationId": daemon.allocate("5")}
        daemon.service.accept(daemon.service.invoices[first], acceptance)
        rejection = {"rejectionReason": "BAD_SERVICE", "totalAmountAccepted": "0"}
        daemon.service.reject(daemon.service.invoices[second], rejection)
        await batcher.settle()

        assert store.ledger.spent() == daemon.paid() == 5
        assert daemon.service.invoices[second].status == "REJECTED"
        assert [(each.bill_id, each.finished_at) for each in store.decisions.refused()] == [(second, daemon.now)]
        assert store.reservations.list(is_open=True) == []

    play(body)


@pytest.mark.parametrize("status", ["CANCELLED", "REJECTED"])
@pytest.mark.parametrize("kind", ["invoice", "debit_note"])
def test_a_bill_that_is_over_before_it_could_be_paid_leaves_nothing_open(play: Play, kind: str, status: str) -> None:
    async def body(daemon: Daemon, next_batcher: Any, store: Store) -> None:
        batcher = await next_batcher()
        agreement = await batcher.hire()
        daemon.now += timedelta(seconds=1)
        daemon.failing[f"accept_{kind}", ""] = 500
        if kind == "invoice":
            await batcher.end(agreement)
            bill = daemon.service.invoices[daemon.send_invoice(agreement, "0.01")]
        else:
            bill = daemon.service.debit_notes[daemon.send_debit_note(agreement, "0.01")]
        settling = asyncio.create_task(batcher.settle())
        await until(store.decisions.unfinished)
        bill.status = status
        await settling

        assert store.decisions.unfinished() == []
        (refused,) = store.decisions.refused()
        assert (refused.bill_id, refused.finished_at) == (bill.bill_id, daemon.now)
        assert store.ledger.spent() == daemon.paid() == 0
        is_running = kind == "debit_note"
        assert len(store.reservations.list(is_open=True)) == is_running
        assert len(store.ledger.agreements(is_settled=False)) == is_running

    play(body)


@pytest.mark.parametrize("is_ended", [False, True])
@pytest.mark.parametrize(("amount", "is_paid"), [("0.0105", True), ("0.0106", False)])
def test_an_agreement_that_gets_no_activity_may_bill_its_start_only(
    play: Play, is_ended: bool, amount: str, is_paid: bool
) -> None:
    async def body(daemon: Daemon, next_batcher: Any, store: Store) -> None:
        batcher = await next_batcher()
        agreement = daemon.agree(f"{TAG}.{batcher.name}-1")
        record, price = describe_agreement(daemon._agreement(agreement), allocation_id=batcher.allocation_id)
        batcher.money.commit_unused(record, price)
        await batcher.written()
        reserved = [each.amount for each in store.reservations.list(is_open=True)]
        daemon.now += timedelta(seconds=100)
        if is_ended:
            await batcher.end(agreement)
        daemon.send_invoice(agreement, amount)
        await batcher.settle()

        assert reserved == [Decimal("0.0105")]
        assert store.ledger.spent() == daemon.paid() == (Decimal(amount) if is_paid else 0)
        assert store.reservations.list(is_open=True) == []

    play(body)


def test_agreements_that_the_daemon_does_not_know_end_when_nobody_is_left_who_uses_them(play: Play) -> None:
    async def body(daemon: Daemon, next_batcher: Any, store: Store) -> None:
        gone, running = await next_batcher(), await next_batcher()
        now = datetime.now(UTC).replace(microsecond=0)
        for batcher in (gone, running):
            store.ledger.record_allocation(
                AllocationRecord(
                    id=batcher.name,
                    batcher_id=batcher.name,
                    platform="p",
                    address="0x",
                    amount=Decimal(1),
                    created_at=now,
                )
            )
        long_ago = now - timedelta(seconds=TIMINGS.max_agreement_seconds + 1)
        made = {"of the gone": (gone.name, now), "running": (running.name, now)}
        made |= {"expired": ("unknown", long_ago), "recent": ("unknown", now)}
        record, _ = describe_agreement(daemon._agreement(daemon.agree("?")), allocation_id="?")
        for id, (allocation_id, created_at) in made.items():
            store.ledger.record_agreement(replace(record, id=id, allocation_id=allocation_id, created_at=created_at))
            daemon.failing["get_agreement", id] = 404
        recovery = Recovery(running.parts, daemon.engine(), tag=TAG, is_gone=lambda name: name == gone.name)
        for id in made:
            await recovery._end_agreement(id)

        assert {each.id for each in store.ledger.agreements(is_open=True)} == {"running", "recent"}
        ended = store.ledger.agreement("expired")
        assert ended is not None and ended.ended_at is not None
        assert (ended.ended_at - long_ago).total_seconds() == TIMINGS.max_agreement_seconds

    play(body)


def test_a_late_invoice_of_an_agreement_that_was_written_off_is_paid_within_a_month(play: Play) -> None:
    async def body(daemon: Daemon, next_batcher: Any, store: Store) -> None:
        batcher = await next_batcher()
        agreements = [await batcher.hire(), await batcher.hire()]
        for each in agreements:
            await batcher.end(each)
        daemon.now += timedelta(days=2)
        await (await next_batcher()).settle()
        unsettled, reserved = store.ledger.agreements(is_settled=False), store.reservations.list(is_open=True)
        daemon.send_invoice(agreements[0], "0.01")
        daemon.now += timedelta(days=20)
        await (await next_batcher()).settle()
        daemon.send_invoice(agreements[1], "0.01")
        daemon.now += timedelta(days=20)
        await (await next_batcher()).settle()

        assert (unsettled, reserved) == ([], [])
        assert store.ledger.spent() == daemon.paid() == Decimal("0.01")

    play(body)


def test_an_invoice_that_could_not_be_paid_for_days_stays_owed(play: Play) -> None:
    async def body(daemon: Daemon, next_batcher: Any, store: Store) -> None:
        batcher = await next_batcher()
        agreement, unbilled = await batcher.hire(), await batcher.hire()
        for each in (agreement, unbilled):
            await batcher.end(each)
        daemon.failing["accept_invoice", ""] = 500
        daemon.send_invoice(agreement, "0.01")
        settling = asyncio.create_task(batcher.settle())
        await until(store.decisions.unfinished)
        daemon.now += timedelta(days=2)
        await asyncio.to_thread(batcher.money.write_off, store.ledger.agreements(is_settled=False))
        still_open = [each.id for each in store.ledger.agreements(is_settled=False)]
        reserved = [each.agreement_id for each in store.reservations.list(is_open=True)]
        daemon.failing.clear()
        await settling

        assert (still_open, reserved) == ([agreement], [agreement])
        assert store.ledger.spent() == daemon.paid() == Decimal("0.01")
        assert store.ledger.agreements(is_settled=False) == []

    play(body)


def test_an_agreement_that_ended_before_its_killed_batcher_recorded_it_is_paid_too(play: Play) -> None:
    async def body(daemon: Daemon, next_batcher: Any, store: Store) -> None:
        agreement = daemon.agree(f"{TAG}.{(await next_batcher()).name}-1")
        daemon.agreements[agreement].state = "Terminated"
        daemon.send_invoice(agreement, "0.01")
        daemon.now += timedelta(hours=20)
        await (await next_batcher()).settle()

        assert store.ledger.spent() == daemon.paid() == Decimal("0.01")

    play(body)


# Any order of events

CAPS = {"day": "1", "total": "1.5"}


class Payments(RuleBasedStateMachine):
    """Two batchers, providers that bill right and wrong, a daemon that fails, and kills, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name)
        self.store = open_store(HomeSettings(home=self.path / "home", busy_seconds=5))
        self.loop = asyncio.new_event_loop()
        self.daemon = Daemon()
        self.dead: set[str] = set()
        self.batchers: list[Batcher] = []
        self.count = 0
        #: Agreements that run: id -> batcher; the time of their end for the others.
        self.running: dict[str, Batcher] = {}
        self.ended: dict[str, datetime] = {}
        #: The first invoice of each agreement -> whether it is right.
        self.first_invoices: dict[str, tuple[str, bool]] = {}
        #: What was decided, as it was seen first.
        self.decided: dict[str, DecisionRecord] = {}
        for _ in range(2):
            self.add_batcher()

    def run(self, body: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(body, 60))

    def add_batcher(self) -> None:
        self.count += 1
        batcher = Batcher(self.daemon, self.store, self.path, f"b{self.count}", self.dead, **CAPS)
        # More than an own allocation for each invoice, which other tests have.
        self.daemon.service.wallet.allocations[batcher.allocation_id].total = Decimal(5)
        self.run(batcher.start())
        self.batchers.append(batcher)

    @rule(number=st.integers(0, 1))
    def hire(self, number: int) -> None:
        batcher = self.batchers[number]
        id = self.run(batcher.hire())
        if id is not None:
            self.running[id] = batcher

    @rule(seconds=st.sampled_from([0.5, 5.0, 40.0]))
    def wait(self, seconds: float) -> None:
        # A provider gives up, or a worker is ended, before what is reserved is used up.
        for id in [id for id in self.running if self.age(id) + seconds > TIMINGS.cover_seconds]:
            self.end(id)
        self.daemon.now += timedelta(seconds=seconds)

    def age(self, id: str) -> float:
        return (self.daemon.now - self.daemon.agreements[id].created_at).total_seconds()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end_one(self, data: Any) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.running))))

    def end(self, id: str) -> None:
        batcher = self.running.pop(id)
        self.ended[id] = self.daemon.now
        self.daemon.agreements[id].state = "Terminated"
        if batcher in self.batchers:
            self.run(batcher.end(id))

    @precondition(lambda self: self.ended)
    @rule(data=st.data(), factor=st.sampled_from(["1", "1", "0.5", "3", "40"]))
    def bill(self, data: Any, factor: str) -> None:
        id = data.draw(st.sampled_from(sorted(self.ended)))
        seconds = (self.ended[id] - self.daemon.agreements[id].created_at).total_seconds()
        invoice = self.daemon.send_invoice(id, PRICE.max_cost(seconds) * Decimal(factor))
        self.first_invoices.setdefault(id, (invoice, Decimal(factor) <= 1))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), factor=st.sampled_from(["0.5", "1", "10"]), is_payable=st.booleans())
    def send_debit_note(self, data: Any, factor: str, is_payable: bool) -> None:
        id = data.draw(st.sampled_from(sorted(self.running)))
        amount = PRICE.max_cost(self.age(id)) * Decimal(factor)
        self.daemon.send_debit_note(id, amount, is_payable=is_payable)

    @rule(number=st.integers(0, 1), failures=st.lists(st.sampled_from([None, None, "fail", "lose"]), max_size=8))
    def settle(self, number: int, failures: list[str | None]) -> None:
        self.daemon.next_failures = list(failures)
        self.run(self.batchers[number].settle())
        self.daemon.next_failures = []

    @rule(number=st.integers(0, 1), calls=st.integers(0, 9), how=st.sampled_from(["kill", "kill-after"]))
    def kill(self, number: int, calls: int, how: str) -> None:
        """Kill a batcher in the middle of its payments, and start another."""
        killed = self.batchers.pop(number)
        self.daemon.next_failures = [*[None] * calls, *[how] * 200]
        with contextlib.suppress(asyncio.CancelledError):
            self.run(killed.settle())
        self.daemon.next_failures = []
        self.run(killed.close())
        self.store.reservations.release_all_of(killed.name)
        self.store.reservations.set_caps(killed.name, {})
        self.dead.add(killed.name)
        self.add_batcher()

    @invariant()
    def nothing_is_judged_twice(self) -> None:
        for bill_id in (*self.daemon.service.invoices, *self.daemon.service.debit_notes):
            decision = self.store.decisions.get(bill_id)
            if decision is None:
                continue
            first = self.decided.setdefault(bill_id, decision)
            assert (decision.is_refused, decision.max_amount, decision.decided_at) == (
                first.is_refused,
                first.max_amount,
                first.decided_at,
            )

    @invariant()
    def nothing_is_accepted_after_a_refusal(self) -> None:
        refused = {each.bill_id for each in self.store.decisions.refused()}

        assert not refused & {id for name, id in self.daemon.calls if name.startswith("accept")}

    @invariant()
    def no_agreement_is_paid_twice(self) -> None:
        paid = Counter(bill.agreement_id for bill in self.daemon.service.invoices.values() if bill.status == "ACCEPTED")

        assert all(count == 1 for count in paid.values())

    @invariant()
    def the_caps_hold(self) -> None:
        assert self.daemon.paid() <= Decimal(CAPS["day"])
        for amount in self.store.reservations.used_by_all(now=self.daemon.now).values():
            assert amount >= self.daemon.paid() - self.unrecorded()

    def unrecorded(self) -> Decimal:
        """Return what was paid by a batcher that was killed before it recorded that."""
        return total(
            bill.amount
            for id, bill in self.daemon.service.invoices.items()
            if bill.status == "ACCEPTED" and id in {each.bill_id for each in self.store.decisions.unfinished()}
        )

    def teardown(self) -> None:
        try:
            self.settle_all()
        finally:
            for batcher in self.batchers:
                self.run(batcher.close())
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()
            self.store.close()
            self.folder.cleanup()

    def settle_all(self) -> None:
        """In the end, ledger and daemon agree, and every first invoice had the answer that it deserves."""
        for batcher in self.batchers:
            self.run(batcher.settle())
            # Those of the batchers that were killed since its first review.
            batcher.processor._reviewed_at = None
            self.run(batcher.settle())
        self.nothing_is_judged_twice()
        self.nothing_is_accepted_after_a_refusal()
        self.no_agreement_is_paid_twice()
        (costs,) = self.store.ledger.costs("total")
        assert costs.paid == self.daemon.paid()
        for id, (invoice, is_right) in self.first_invoices.items():
            status = self.daemon.service.invoices[invoice].status
            # What a killed batcher did not record as ended may have run longer, as far as anybody knows.
            if is_right or not self.is_end_known(id):
                assert status in ("ACCEPTED", "REJECTED")
            else:
                assert status == "REJECTED", (id, invoice)
            if is_right and self.is_first_decided(id, invoice):
                assert status == "ACCEPTED", (id, invoice)
        for bill in (*self.daemon.service.invoices.values(), *self.daemon.service.debit_notes.values()):
            decision = self.store.decisions.get(bill.bill_id)
            assert decision is None or decision.is_refused == (bill.status == "REJECTED")

    def is_end_known(self, id: str) -> bool:
        found = self.store.ledger.agreement(id)
        return found is not None and found.reason == "done"

    def is_first_decided(self, id: str, invoice: str) -> bool:
        """Return whether this invoice of the agreement was judged before its others, whose order is not defined."""
        decision = self.store.decisions.get(invoice)
        return decision is not None and decision.reason != BILLED_BEFORE


def test_bills_in_any_order_with_failures_and_kills() -> None:
    run_state_machine_as_test(
        Payments,
        settings=settings(
            max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )

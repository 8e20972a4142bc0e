"""Money: nothing is spent that was not reserved, and what ended is no longer reserved."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batcher.errors import BudgetReached
from batcher.executors.golem.ledger_writer import LedgerWriter
from batcher.executors.golem.money import Money
from batcher.executors.golem.offers import Price
from batcher.executors.golem.timings import GolemTimings
from store.rentals.ledger import AgreementRecord, BillState, InvoiceRecord
from store.store import Store

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
PRICE = Price(start=Decimal("0.1"), cpu_second=Decimal(0), second=Decimal("0.01"))
#: Without tolerances, so that amounts are easy to follow.
EXACT = GolemTimings(bill_tolerance=Decimal(1), ending_seconds=0.0)
AGREEMENT = AgreementRecord(
    id="a1",
    allocation_id="al1",
    provider_id="0xa1fa",
    provider_name="alpha",
    model="resnet50",
    start_price=PRICE.start,
    price_per_cpu_second=PRICE.cpu_second,
    price_per_second=PRICE.second,
    created_at=NOON,
)


class Spender:
    """One batcher's money with its writer, and a clock that tests set."""

    def __init__(self, store: Store, owner: str = "b1", **caps: str) -> None:
        self.store = store
        self.now = NOON
        self.monotonic = 0.0
        self.writer = LedgerWriter(EXACT)
        self.money = Money(
            store,
            self.writer,
            owner=owner,
            caps={name: Decimal(cap) for name, cap in caps.items()},
            timings=EXACT,
            clock=lambda: self.now,
            monotonic=lambda: self.monotonic,
        )

    async def __aenter__(self) -> Spender:
        self.writer.start()
        await self.money.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.money.close()
        await self.writer.close()


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(body, 60))


def open_amounts(store: Store) -> list[Decimal]:
    return [each.amount for each in store.reservations.list(is_open=True)]


@given(
    st.decimals(0, 1, places=4),
    st.decimals(0, 1, places=6),
    st.lists(st.floats(0, 10_000), min_size=2, max_size=2).map(sorted),
)
def test_no_bill_for_an_agreement_that_ended_in_time_is_above_what_was_reserved(
    start: Decimal, second: Decimal, seconds: list[float]
) -> None:
    price = Price(start=start, cpu_second=second, second=second)
    ended_after, covered = seconds

    assert price.max_cost(ended_after) <= GolemTimings().cost_limit(price, ended_after)
    assert GolemTimings().cost_limit(price, ended_after) <= GolemTimings().cost_limit(price, covered)


def test_without_caps_any_amount_may_be_spent(store: Store) -> None:
    async def body() -> None:
        async with Spender(store) as spender:
            await spender.money.reserve("resnet50", Decimal(10**9))

            assert await spender.money.left() is None
            assert spender.money.unavailable_reason("resnet50") is None

    run(body())


def test_start_work_and_idling_are_reserved_step_by_step_until_the_budget_is_used_up(store: Store) -> None:
    async def body() -> None:
        async with Spender(store, run="0.5") as spender:
            reservation = await spender.money.reserve("resnet50", Decimal("0.3"))
            reservation.commit(AGREEMENT, PRICE, 10.0)
            await reservation.extend(40.0)
            await reservation.extend(5.0)
            with pytest.raises(BudgetReached, match=r"The budget of this run is used up: 0\.5 of 0\.5 GLM"):
                await reservation.extend(40.1)

            assert open_amounts(store) == [Decimal("0.5")]
            assert reservation.covered_seconds == 40.0
            with pytest.raises(BudgetReached):
                await spender.money.left()
            spender.now += timedelta(seconds=12)
            spender.money.end_agreement("a1", "done")

        assert open_amounts(store) == [Decimal("0.22")]

    run(body())


def test_what_no_agreement_came_of_is_released(store: Store) -> None:
    async def body() -> None:
        async with Spender(store, day="1") as spender:
            released = await spender.money.reserve("resnet50", Decimal("0.3"))
            await spender.money.reserve("resnet50", Decimal("0.4"))
            released.release()
        assert open_amounts(store) == []
        assert store.reservations.caps("b1") == {}

    run(body())


def test_a_denial_is_shown_until_there_is_room_again(store: Store) -> None:
    async def body() -> None:
        async with Spender(store, day="1") as spender:
            reservation = await spender.money.reserve("resnet50", Decimal("0.9"))
            reservation.commit(AGREEMENT, PRICE, 80.0)
            with pytest.raises(BudgetReached):
                await spender.money.reserve("resnet50", Decimal("0.2"))
            await spender.money.refresh()
            denied = spender.money.unavailable_reason("resnet50")
            bill = InvoiceRecord(
                id="i1", agreement_id="a1", amount=Decimal("0.5"), state=BillState.ACCEPTED, received_at=NOON
            )
            await spender.writer.enqueue(store.ledger.record_invoice, bill)
            await spender.money.refresh()

            assert denied is not None and "continues by itself tomorrow" in denied
            assert spender.money.unavailable_reason("resnet50") is None
            assert await spender.money.left() == Decimal("0.5")

    run(body())


def test_the_next_day_has_a_new_budget(store: Store) -> None:
    async def body() -> None:
        async with Spender(store, day="1") as spender:
            reservation = await spender.money.reserve("resnet50", Decimal(1))
            reservation.commit(AGREEMENT, PRICE, 90.0)
            bill = InvoiceRecord(
                id="i1", agreement_id="a1", amount=Decimal(1), state=BillState.ACCEPTED, received_at=NOON
            )
            await spender.writer.enqueue(store.ledger.record_invoice, bill)
            with pytest.raises(BudgetReached):
                await spender.money.left()
            spender.now += timedelta(days=1)
            await spender.money.refresh()

            assert spender.money.unavailable_reason("resnet50") is None
            assert await spender.money.left() == Decimal(1)

    run(body())


def test_batchers_of_a_home_that_hire_at_the_same_moment_do_not_exceed_the_budget_together(store: Store) -> None:
    async def body() -> None:
        async with Spender(store, "b1", day="1") as one, Spender(store, "b2", day="1") as other:
            hires = [spender.money.reserve("resnet50", Decimal("0.3")) for spender in (one, other) * 4]
            outcomes = await asyncio.gather(*hires, return_exceptions=True)

            assert sum(isinstance(outcome, BudgetReached) for outcome in outcomes) == 5
            assert open_amounts(store) == [Decimal("0.3")] * 3

    run(body())


def test_the_next_batcher_releases_what_a_dead_one_reserved_and_writes_off_what_nobody_billed(
    store: Store,
) -> None:
    async def body() -> None:
        dead = Spender(store, "dead", day="1")
        dead.writer.start()
        await dead.money.start()
        await dead.money.reserve("resnet50", Decimal("0.2"))
        for id, seconds in (("unbilled", 5.0), ("running", 2.0)):
            reservation = await dead.money.reserve("resnet50", Decimal("0.3"))
            reservation.commit(replace(AGREEMENT, id=id), PRICE, seconds)
        dead.money.end_agreement("unbilled", "done")
        await dead.writer.close()

        async with Spender(store, "b1", day="1") as spender:
            await asyncio.to_thread(spender.money.recover, lambda batcher_id: batcher_id == "dead")
            await asyncio.to_thread(spender.money.write_off, store.ledger.agreements(is_settled=False))
            left_at_first = await spender.money.left()
            spender.now += timedelta(days=2)
            await asyncio.to_thread(spender.money.write_off, store.ledger.agreements(is_settled=False))
            left_later = await spender.money.left()

            assert left_at_first == Decimal("0.78")  # 1 - 0.1 - 0.12
            assert left_later == Decimal("0.88"), "what still runs is not written off"
            assert store.reservations.caps("dead") == {}

    run(body())


@pytest.mark.parametrize(
    ("wall", "monotonic"),
    [(30.0, 30.0), (-3600.0, 30.0), (30.0, 5.0)],
    ids=["both clocks", "set back", "suspended"],
)
def test_an_agreement_lasts_as_long_as_the_clock_says_that_says_more(
    store: Store, wall: float, monotonic: float
) -> None:
    async def body() -> None:
        async with Spender(store, day="1") as spender:
            reservation = await spender.money.reserve("resnet50", Decimal("0.3"))
            reservation.commit(AGREEMENT, PRICE, 10.0)
            spender.now += timedelta(seconds=wall)
            spender.monotonic += monotonic
            spender.money.end_agreement("a1", "done")

    run(body())

    ended = store.ledger.agreement("a1")
    assert ended is not None and ended.ended_at == NOON + timedelta(seconds=30)
    assert open_amounts(store) == [Decimal("0.4")], "more than was reserved, because it is owed"


@given(
    st.decimals(0, 1, places=4),
    st.decimals("0.000001", 1, places=6),
    st.floats(0.1, 100_000),
)
def test_the_tolerance_for_a_bill_is_a_small_part_of_it(start: Decimal, second: Decimal, seconds: float) -> None:
    price = Price(start=start, cpu_second=second, second=second)

    assert price.max_cost(seconds) < GolemTimings().bill_limit(price, seconds) < price.max_cost(seconds) * 11 / 10

"""The purse: no cap is passed, whatever happens in whatever order."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

from hypothesis import given, settings
from hypothesis import strategies as st

from batcher.executors.golem.budget import Caps, Purse

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        return self.now


def purse(clock: Clock | None = None, **caps: str) -> Purse:
    return Purse(Caps(**{name: Decimal(cap) for name, cap in caps.items()}), clock=clock or Clock())


def test_without_caps_everything_may_be_spent() -> None:
    assert purse().refusal(Decimal(10**9)) is None
    assert purse().left() is None


def test_what_is_under_way_counts_with_the_most_it_can_cost_and_what_is_over_with_what_it_cost() -> None:
    mine = purse(run="1")
    mine.open("a", lambda: Decimal("0.9"))

    assert mine.refusal(Decimal("0.2")) is not None
    assert mine.refusal(Decimal("0.1")) is None
    mine.pay("a", Decimal("0.3"))
    assert mine.refusal(Decimal("0.7")) is None
    assert mine.left() == Decimal("0.7")


def test_what_others_spent_counts_for_the_day_and_in_total_but_not_for_the_run() -> None:
    mine = purse(run="1", day="2", total="10")
    mine.others_spent(Decimal("9.5"), Decimal("1.2"))

    assert mine.left() == Decimal("0.5")
    assert "in total" in str(mine.refusal(Decimal("0.6")))
    assert "MLG_BUDGET_TOTAL" in str(mine.refusal(Decimal("0.6")))


def test_the_next_day_has_its_own_budget() -> None:
    clock = Clock()
    mine = purse(clock, day="1")
    mine.open("a", lambda: Decimal(1))
    mine.pay("a", Decimal(1))
    mine.others_spent(Decimal(5), Decimal("0.5"))
    refused = mine.refusal(Decimal("0.1"))

    clock.now += timedelta(days=1)

    assert refused is not None and "tomorrow" in refused
    assert mine.refusal(Decimal(1)) is None


def test_what_runs_over_midnight_counts_for_the_day_it_is_paid_on() -> None:
    clock = Clock()
    mine = purse(clock, day="1")
    mine.open("a", lambda: Decimal("0.8"))
    clock.now += timedelta(days=1)

    assert mine.refusal(Decimal("0.3")) is not None


def test_a_refused_bill_costs_nothing() -> None:
    mine = purse(day="1")
    mine.open("a", lambda: Decimal("0.8"))
    mine.pay("a", Decimal(0))

    assert mine.left() == Decimal(1)


amounts = st.decimals(min_value=0, max_value=1, places=4)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(amounts, amounts), max_size=20), st.decimals(min_value=0, max_value=3, places=3))
def test_whoever_asks_first_never_passes_a_cap(steps: list[tuple[Decimal, Decimal]], cap: Decimal) -> None:
    mine = purse(run=str(cap))
    for number, (most, share) in enumerate(steps):
        if mine.refusal(most) is None:
            mine.open(str(number), lambda most=most: most)  # type: ignore[misc]
            if number % 2:
                mine.pay(str(number), most * share)

        assert mine.spent() <= cap

"""The budget: no cap is ever exceeded, in any order of events."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

from hypothesis import given, settings
from hypothesis import strategies as st

from batcher.executors.golem.budget import Budget, BudgetCaps

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        return self.now


def budget(clock: Clock | None = None, **caps: str) -> Budget:
    return Budget(BudgetCaps(**{name: Decimal(cap) for name, cap in caps.items()}), clock=clock or Clock())


def test_without_caps_any_amount_may_be_spent() -> None:
    assert budget().over_budget_reason(Decimal(10**9)) is None
    assert budget().left() is None


def test_a_running_agreement_counts_with_its_maximum_cost_and_an_ended_one_with_its_actual_cost() -> None:
    mine = budget(run="1")
    mine.add_agreement("a", lambda: Decimal("0.9"))

    assert mine.over_budget_reason(Decimal("0.2")) is not None
    assert mine.over_budget_reason(Decimal("0.1")) is None
    mine.record_payment("a", Decimal("0.3"))
    assert mine.over_budget_reason(Decimal("0.7")) is None
    assert mine.left() == Decimal("0.7")


def test_spending_of_other_batchers_counts_for_the_day_and_the_total_but_not_for_the_run() -> None:
    mine = budget(run="1", day="2", total="10")
    mine.set_spent_by_others(Decimal("9.5"), Decimal("1.2"))

    assert mine.left() == Decimal("0.5")
    assert "The total budget is used up" in str(mine.over_budget_reason(Decimal("0.6")))
    assert "MLG_BUDGET_TOTAL" in str(mine.over_budget_reason(Decimal("0.6")))


def test_the_next_day_has_a_new_budget() -> None:
    clock = Clock()
    mine = budget(clock, day="1")
    mine.add_agreement("a", lambda: Decimal(1))
    mine.record_payment("a", Decimal(1))
    mine.set_spent_by_others(Decimal(5), Decimal("0.5"))
    refused = mine.over_budget_reason(Decimal("0.1"))

    clock.now += timedelta(days=1)

    assert refused is not None and "tomorrow" in refused
    assert mine.over_budget_reason(Decimal(1)) is None


def test_an_agreement_over_midnight_counts_for_the_day_it_is_paid_on() -> None:
    clock = Clock()
    mine = budget(clock, day="1")
    mine.add_agreement("a", lambda: Decimal("0.8"))
    clock.now += timedelta(days=1)

    assert mine.over_budget_reason(Decimal("0.3")) is not None


def test_a_rejected_invoice_costs_nothing() -> None:
    mine = budget(day="1")
    mine.add_agreement("a", lambda: Decimal("0.8"))
    mine.record_payment("a", Decimal(0))

    assert mine.left() == Decimal(1)


amounts = st.decimals(min_value=0, max_value=1, places=4)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(amounts, amounts), max_size=20), st.decimals(min_value=0, max_value=3, places=3))
def test_spending_that_is_checked_first_never_exceeds_a_cap(steps: list[tuple[Decimal, Decimal]], cap: Decimal) -> None:
    mine = budget(run=str(cap))
    for number, (max_cost, share) in enumerate(steps):
        if mine.over_budget_reason(max_cost) is None:
            mine.add_agreement(str(number), lambda max_cost=max_cost: max_cost)  # type: ignore[misc]
            if number % 2:
                mine.record_payment(str(number), max_cost * share)

        assert mine.spent() <= cap

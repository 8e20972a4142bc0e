"""The budget: caps on spending, and what is spent. Pure, except for the clock it is given; amounts in GLM.

`executor.py` checks it before anything that costs. Running agreements count with the most that they can still cost, so
the caps are never exceeded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal


@dataclass(frozen=True, kw_only=True)
class BudgetCaps:
    """The most that may be spent; None is no limit."""

    run: Decimal | None = None
    day: Decimal | None = None
    total: Decimal | None = None


@dataclass
class _Account:
    """What one agreement has cost or may cost."""

    #: None while it is running.
    amount: Decimal | None
    #: Returns the most that it can cost so far, committed work included.
    max_cost: Callable[[], Decimal]
    #: The day to which it counts; None until it is paid, which counts to the current day.
    paid_on: str | None = None


class Budget:
    """One batcher's budget.

    :param clock: returns the current time; days are in UTC.
    """

    def __init__(self, caps: BudgetCaps, *, clock: Callable[[], datetime]) -> None:
        self._caps = caps
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._others_total = Decimal(0)
        self._others_today = Decimal(0)
        self._others_day = ""

    def set_spent_by_others(self, total: Decimal, today: Decimal) -> None:
        """Set what other batchers and earlier runs of the same home have spent, in total and today."""
        self._others_total, self._others_today, self._others_day = total, today, self._today()

    def add_agreement(self, agreement_id: str, max_cost: Callable[[], Decimal]) -> None:
        """Count an agreement from now on.

        :param max_cost: returns the most that it can cost so far, committed work included.
        """
        self._accounts[agreement_id] = _Account(amount=None, max_cost=max_cost)

    def record_payment(self, agreement_id: str, amount: Decimal) -> None:
        """Set the final cost of an agreement; 0 if its invoice was rejected."""
        if agreement_id in self._accounts:
            account = self._accounts[agreement_id]
            account.amount, account.paid_on = amount, self._today()

    def spent(self) -> Decimal:
        """Return what this batcher has spent or may still have to pay."""
        return sum((self._amount(each) for each in self._accounts.values()), Decimal(0))

    def left(self) -> Decimal | None:
        """Return what may still be spent today; None when there is no limit."""
        lefts = [cap - used for cap, used, _ in self._used() if cap is not None]
        return max(Decimal(0), min(lefts)) if lefts else None

    def over_budget_reason(self, extra: Decimal) -> str | None:
        """Return, in a sentence, why this much more cannot be spent now; None if it can."""
        for cap, used, name in self._used():
            if cap is not None and used + extra > cap:
                title, remedy = _MESSAGES[name]
                return (
                    f"{title} is used up: {_format_amount(used)} of {_format_amount(cap)} GLM are spent or committed, "
                    f"and the next step may cost up to {_format_amount(extra)} GLM. {remedy}"
                )
        return None

    def _used(self) -> list[tuple[Decimal | None, Decimal, str]]:
        """List each cap, what counts against it, and its name."""
        mine, today = self.spent(), self._today()
        mine_today = sum(
            (self._amount(each) for each in self._accounts.values() if each.paid_on in (None, today)), Decimal(0)
        )
        others_today = self._others_today if self._others_day == today else Decimal(0)
        return [
            (self._caps.run, mine, "run"),
            (self._caps.day, mine_today + others_today, "day"),
            (self._caps.total, mine + self._others_total, "total"),
        ]

    @staticmethod
    def _amount(account: _Account) -> Decimal:
        return account.max_cost() if account.amount is None else account.amount

    def _today(self) -> str:
        return self._clock().date().isoformat()


#: Name of a cap -> its title, and what to do when it is reached.
_MESSAGES = {
    "run": ("The budget of this run", "Raise MLG_BUDGET_RUN, or start another run."),
    "day": (
        "The budget of the day",
        "Work continues by itself tomorrow (UTC), or immediately with a higher MLG_BUDGET_DAY.",
    ),
    "total": ("The total budget", "Raise MLG_BUDGET_TOTAL."),
}


def _format_amount(amount: Decimal) -> str:
    """Format an amount for people: at most six decimal places, no exponent."""
    return f"{amount:.6f}".rstrip("0").rstrip(".") or "0"

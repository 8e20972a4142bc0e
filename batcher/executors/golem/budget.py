"""The purse: caps on what is spent, and what is spent already. Pure, but for the clock it is given; amounts in GLM.

Asked before anything that costs. What is under way counts with the most that it can cost, so that a cap is a promise
and not a hope.
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
    """What one agreement has cost or may come to cost."""

    #: None while it is still running.
    amount: Decimal | None
    #: Tells what it costs at most by now and with what is promised to it.
    max_cost: Callable[[], Decimal]
    #: The day on which it counts: today until it is paid.
    paid_on: str | None = None


class Budget:
    """One batcher's purse.

    :param clock: gives the time; days are those of UTC.
    """

    def __init__(self, caps: BudgetCaps, *, clock: Callable[[], datetime]) -> None:
        self._caps = caps
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._others_total = Decimal(0)
        self._others_today = Decimal(0)
        self._others_day = ""

    def set_spent_by_others(self, total: Decimal, today: Decimal) -> None:
        """Say what everybody but this batcher has spent from the same home, ever and today."""
        self._others_total, self._others_today, self._others_day = total, today, self._today()

    def add_agreement(self, agreement_id: str, max_cost: Callable[[], Decimal]) -> None:
        """Begin to count an agreement.

        :param max_cost: tells what it costs at most by now, what is under way on it included.
        """
        self._accounts[agreement_id] = _Account(amount=None, max_cost=max_cost)

    def record_payment(self, agreement_id: str, amount: Decimal) -> None:
        """Say what an agreement has cost in the end; 0 if its bill was refused."""
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
        """Say why this much more cannot be spent now; None when it can."""
        for cap, used, name in self._used():
            if cap is not None and used + extra > cap:
                return (
                    f"The budget {name} is used up: {_format_amount(used)} of {_format_amount(cap)} "
                    "GLM are spent or promised, and the "
                    f"next step may cost {_format_amount(extra)} GLM. {_CURES[name]}"
                )
        return None

    def _used(self) -> list[tuple[Decimal | None, Decimal, str]]:
        mine, today = self.spent(), self._today()
        mine_today = sum(
            (self._amount(each) for each in self._accounts.values() if each.paid_on in (None, today)), Decimal(0)
        )
        others_today = self._others_today if self._others_day == today else Decimal(0)
        return [
            (self._caps.run, mine, "of this run"),
            (self._caps.day, mine_today + others_today, "of the day"),
            (self._caps.total, mine + self._others_total, "in total"),
        ]

    @staticmethod
    def _amount(account: _Account) -> Decimal:
        return account.max_cost() if account.amount is None else account.amount

    def _today(self) -> str:
        return self._clock().date().isoformat()


_CURES = {
    "of this run": "Raise MLG_BUDGET_RUN, or start another run.",
    "of the day": "It goes on by itself tomorrow (UTC), or at once with a higher MLG_BUDGET_DAY.",
    "in total": "Raise MLG_BUDGET_TOTAL.",
}


def _format_amount(amount: Decimal) -> str:
    """Write an amount for people: no exponent, not more digits than tell something."""
    return f"{amount:.6f}".rstrip("0").rstrip(".") or "0"

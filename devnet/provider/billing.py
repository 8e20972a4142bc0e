"""What a provider asks for its work: pure arithmetic, in exact decimals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import ROUND_HALF_UP, Decimal, localcontext

from devnet.scenario import ProviderPlan

#: GLM is counted in units of 1e-18.
UNIT = Decimal("1e-18")


def activity_amount(plan: ProviderPlan, usage: Sequence[float], factor: float = 1.0) -> Decimal:
    """Compute what an activity costs.

    :param usage: seconds of processor time, and seconds it existed.
    :param factor: how much too much is asked for.
    """
    processor, duration = (Decimal(repr(float(each))) for each in usage)
    with localcontext() as context:
        context.prec = 60
        amount = plan.start_price + processor * plan.price_per_cpu_second + duration * plan.price_per_second
        return (amount * Decimal(repr(float(factor)))).quantize(UNIT, rounding=ROUND_HALF_UP)


def agreement_amount(plan: ProviderPlan, usages: Iterable[Sequence[float]], factor: float = 1.0) -> Decimal:
    """Compute what an agreement costs: the sum of its activities."""
    return sum((activity_amount(plan, usage, factor) for usage in usages), Decimal(0))

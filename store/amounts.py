"""Amounts of money: exact sums and shares, as they are stored and as they are shown. Pure arithmetic on decimals.

Used by the ledger, which splits an invoice over chunks, for a request's share of its chunk, and by all that shows
amounts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from decimal import ROUND_HALF_EVEN, Context, Decimal, DivisionByZero, Inexact, InvalidOperation, Overflow
from fractions import Fraction

#: GLM has this many decimal places.
GLM_DECIMAL_PLACES = 18
#: Never rounds: what would not fit is an error.
EXACT = Context(prec=200, traps=[Inexact, InvalidOperation, DivisionByZero, Overflow])
#: Rounds what is shown. Wide enough for any amount.
ROUNDED = Context(prec=200, rounding=ROUND_HALF_EVEN)
#: The last decimal that a table shows of an amount; `--json` gives all.
_DISPLAY_STEP = Decimal("0.000001")
ZERO = Decimal(0)
#: The highest amount that is taken from a stranger, with whose decimal places sums remain within EXACT.
_MAX_AMOUNT = Decimal(10**12)


def total(amounts: Iterable[Decimal]) -> Decimal:
    """Add amounts up, exactly, whatever the decimal context of the thread is."""
    result = ZERO
    for amount in amounts:
        result = EXACT.add(result, amount)
    return result


def bounded(amount: Decimal, places: int) -> Decimal:
    """Return the nearest amount that can be stored and added up, for one that a stranger wrote.

    A text as short as 1e-999999 has a million digits, and one amount like that would make every sum inexact.

    :param places: most decimal places, at most 150.
    """
    if not amount.is_finite() or amount <= 0:
        return ZERO
    if amount >= _MAX_AMOUNT:
        return _MAX_AMOUNT
    rounded = amount.quantize(Decimal(1).scaleb(-places), context=ROUNDED)
    return amount if rounded == amount else rounded


def to_amount(amount: Decimal) -> str:
    """Format an amount exactly, without exponent and trailing zeros.

    :raises ValueError: it is negative or not a number.
    """
    if not amount.is_finite() or amount < 0:
        raise ValueError(f"{amount} is not an amount of money")
    text = format(amount, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text if amount else "0"


def format_amount(amount: Decimal) -> str:
    """Format an amount for display; one below the last decimal shown is "<0.000001", not zero."""
    if 0 < amount < _DISPLAY_STEP:
        return f"<{_DISPLAY_STEP}"
    return format(amount.quantize(_DISPLAY_STEP, context=ROUNDED), "f")


def split(amount: Decimal, weights: Sequence[float]) -> list[Decimal]:
    """Split an amount in proportion to weights, exactly: the shares add up to it.

    Each share is rounded down to GLM's last place, or to the amount's if that is finer; the remainder goes, one unit
    each, to the shares that lost most by rounding. Weights that are not positive numbers count as 0; if all do, all are
    equal.
    """
    if not weights:
        return []
    units, places = _to_units(amount)
    parts = [Fraction(weight) if math.isfinite(weight) and weight > 0 else Fraction(0) for weight in weights]
    whole = sum(parts)
    if not whole:
        parts, whole = [Fraction(1)] * len(parts), Fraction(len(parts))
    ideals = [units * part / whole for part in parts]
    shares = [math.floor(ideal) for ideal in ideals]
    # Sorting is stable: among equal ones the first gets the unit.
    by_loss = sorted(range(len(parts)), key=lambda position: shares[position] - ideals[position])
    for position in by_loss[: units - sum(shares)]:
        shares[position] += 1
    return [_from_units(share, places) for share in shares]


def equal_share(amount: Decimal, count: int, position: int) -> Decimal:
    """Return one share, counted from 0, of an amount that is split equally, as `split` with equal weights does."""
    units, places = _to_units(amount)
    share, remainder = divmod(units, count)
    return _from_units(share + (position < remainder), places)


def _to_units(amount: Decimal) -> tuple[int, int]:
    exponent = amount.as_tuple().exponent
    assert isinstance(exponent, int), f"{amount} is not a number"
    places = max(GLM_DECIMAL_PLACES, -exponent)
    return int(EXACT.scaleb(amount, places)), places


def _from_units(units: int, places: int) -> Decimal:
    return EXACT.scaleb(Decimal(units), -places)

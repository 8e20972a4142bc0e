"""Amounts of money and rates as they are shown: rounding, prices an hour and for a thousand images.

Used by the commands and the dashboard. Exact arithmetic is in `cost_split.py`. Pure; amounts in GLM.
"""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Context, Decimal

from store.ledger import CostRow
from store.providers import ProviderRecord

#: Decimals that a table shows of an amount; `--json` gives all.
DISPLAY_STEP = Decimal("0.000001")
#: Rounds what is shown. Wide enough for any amount; the ledger itself never rounds.
_DISPLAY_CONTEXT = Context(prec=200, rounding=ROUND_HALF_EVEN)


def format_amount(amount: Decimal) -> str:
    """Format an amount for display; one below the last decimal shown is "<0.000001", not zero."""
    if 0 < amount < DISPLAY_STEP:
        return f"<{DISPLAY_STEP}"
    return format(amount.quantize(DISPLAY_STEP, context=_DISPLAY_CONTEXT), "f")


def cost_per_1000_images(row: CostRow) -> Decimal | None:
    """Return the paid and open amounts for a thousand images; None without images."""
    if not row.images:
        return None
    return _DISPLAY_CONTEXT.divide(
        _DISPLAY_CONTEXT.multiply(_DISPLAY_CONTEXT.add(row.paid, row.open), Decimal(1000)), row.images
    )


def price_per_hour(provider: ProviderRecord) -> Decimal:
    """Return the price of an hour with one busy core, without the start price."""
    return 3600 * (provider.price_per_second + provider.price_per_cpu_second)


def price_per_1000_images(provider: ProviderRecord, images_per_second: float) -> Decimal:
    """Estimate the price of a thousand images at a measured speed with one busy core, without the start price."""
    return price_per_hour(provider) / 3600 * 1000 / Decimal(repr(max(1e-6, images_per_second)))

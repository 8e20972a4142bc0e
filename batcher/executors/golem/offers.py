"""Offers of providers: reading their names and prices. Amounts in GLM.

`provider_records.py` rates offers by `Price`; budget, payments and the ledger use it too. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from provider_image.errors import MlgError
from store.amounts import bounded

#: Property names of an offer, from Golem's standards.
_MODEL = "golem.com.pricing.model"
_COEFFICIENTS = "golem.com.pricing.model.linear.coeffs"
_COUNTERS = "golem.com.usage.vector"
_NAME = "golem.node.id.name"
_CPU, _DURATION = "golem.usage.cpu_sec", "golem.usage.duration_sec"


#: Threads of a provider that a chunk uses, whatever the provider has. `worker.py` asks for so many, and
#: `mlg-provider` limits itself to so many cores, so that prices and bills can be compared with it.
THREADS = 1


#: Highest price that is read, in GLM, and the decimal places that are kept of one, which costs multiply.
_MAX_PRICE, _PRICE_PLACES = 10**9, 40


class BadOffer(MlgError):
    """The prices of the offer cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """A linear price: a fixed amount at the start, and amounts per second."""

    #: GLM for the start of an activity.
    start: Decimal
    #: GLM per CPU second.
    cpu_second: Decimal
    #: GLM per second of running time, idle or not.
    second: Decimal

    @classmethod
    def from_offer(cls, properties: Mapping[str, Any]) -> Price:
        """Read an offer's properties. :raises BadOffer: not linear, or priced by unknown counters."""
        try:
            if properties[_MODEL] != "linear":
                raise BadOffer(f"The price model is {properties[_MODEL]!r}, not linear.")
            counters = list(properties[_COUNTERS])
            *by_counter, start = (_parse_price(each) for each in properties[_COEFFICIENTS])
            prices = dict(zip(counters, by_counter, strict=True))
            if len(prices) != len(counters):
                raise ValueError("a counter twice")
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise BadOffer(f"The prices of the offer cannot be read: {type(error).__name__} {error}.") from error
        unknown = [name for name, price in prices.items() if name not in (_CPU, _DURATION) and price]
        if unknown:
            raise BadOffer(f"The offer charges for unknown counters: {', '.join(unknown)}.")
        return cls(
            start=start,
            cpu_second=prices.get(_CPU, Decimal(0)),
            second=prices.get(_DURATION, Decimal(0)),
        )

    @property
    def max_cost_per_second(self) -> Decimal:
        """GLM per second with the threads of a chunk busy: no correct invoice is higher."""
        return self.second + self.cpu_second * THREADS

    @property
    def per_hour(self) -> Decimal:
        """GLM per hour with the threads of a chunk busy, the start not counted."""
        return 3600 * self.max_cost_per_second

    def max_cost(self, seconds: float) -> Decimal:
        """Return the most that an activity of this length can cost."""
        # Times are accurate to a microsecond at best, and amounts have at most 18 digits.
        return self.start + self.max_cost_per_second * Decimal(round(max(0.0, seconds) * 1_000_000)).scaleb(-6)

    def per_image(self, images_per_second: float, images: int) -> Decimal:
        """Estimate the cost per image for an activity that processes this many images."""
        return self.start / max(1, images) + self.max_cost_per_second / Decimal(repr(max(1e-6, images_per_second)))


def _parse_price(value: Any) -> Decimal:
    """Read a price. :raises ValueError, ArithmeticError: it is not a number, negative or absurdly high."""
    price = Decimal(str(value))
    if not price.is_finite() or not 0 <= price <= _MAX_PRICE:
        raise ValueError(f"{str(value)[:40]} is no price")
    return bounded(price, _PRICE_PLACES)


def describe_offer(properties: Mapping[str, Any], provider_id: str) -> tuple[str, Price]:
    """Return a provider's name and price. :raises BadOffer: the prices cannot be read."""
    return provider_name(properties, provider_id), Price.from_offer(properties)


def provider_name(properties: Mapping[str, Any], provider_id: str) -> str:
    """Return the name that a provider gives itself, limited to printable characters; its address if it has none."""
    name = "".join(letter for letter in str(properties.get(_NAME) or "") if letter.isprintable())[:60].strip()
    return name or provider_id[:10]

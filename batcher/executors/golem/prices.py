"""What a provider asks for: the linear prices of an offer, and what follows from them. Pure; amounts in GLM.

Used by `market.py` to choose, by `purse.py` to stay within caps, and by `settling.py` to know what a bill may be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from provider_image.errors import MlgError

#: Property names of an offer, as Golem's standards give them.
_MODEL = "golem.com.pricing.model"
_COEFFICIENTS = "golem.com.pricing.model.linear.coeffs"
_COUNTERS = "golem.com.usage.vector"
_THREADS = "golem.inf.cpu.threads"
_NAME = "golem.node.id.name"
_CPU, _DURATION = "golem.usage.cpu_sec", "golem.usage.duration_sec"


class BadOffer(MlgError):
    """The offer's prices cannot be understood."""

    code = "bad_offer"


@dataclass(frozen=True, kw_only=True)
class Price:
    """A linear price: once at the start, and by the second."""

    #: GLM an activity costs at its start.
    start: Decimal
    #: GLM a second of one processor.
    cpu_second: Decimal
    #: GLM a second of time, idle or not.
    second: Decimal
    #: Threads that the provider may have busy at the same time, so that no more CPU seconds than this go by a second.
    threads: int = 1

    @classmethod
    def from_offer(cls, properties: Mapping[str, Any]) -> Price:
        """Read an offer's properties. :raises BadOffer: not linear, or with counters that are not known here."""
        try:
            if properties[_MODEL] != "linear":
                raise BadOffer(f"The price model is {properties[_MODEL]!r}, not linear.")
            counters = list(properties[_COUNTERS])
            *by_counter, start = (Decimal(str(each)) for each in properties[_COEFFICIENTS])
            prices = dict(zip(counters, by_counter, strict=True))
            threads = max(1, int(properties.get(_THREADS, 1)))
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise BadOffer(f"The offer's prices cannot be understood: {type(error).__name__} {error}.") from error
        unknown = [name for name, price in prices.items() if name not in (_CPU, _DURATION) and price]
        if unknown:
            raise BadOffer(f"The offer asks to be paid for {', '.join(unknown)}.")
        found = cls(
            start=start,
            cpu_second=prices.get(_CPU, Decimal(0)),
            second=prices.get(_DURATION, Decimal(0)),
            threads=threads,
        )
        if not all(each.is_finite() and each >= 0 for each in (found.start, found.cpu_second, found.second)):
            raise BadOffer("The offer has prices below nothing.")
        return found

    @property
    def max_cost_per_second(self) -> Decimal:
        """GLM a second with all threads busy: no honest bill is higher."""
        return self.second + self.cpu_second * self.threads

    @property
    def per_hour(self) -> Decimal:
        """GLM an hour with all threads busy, the start not counted."""
        return 3600 * self.max_cost_per_second

    def max_cost(self, seconds: float) -> Decimal:
        """Return what an activity of this length costs at most."""
        # Times are not known to more than a microsecond, and amounts have 18 digits at most.
        return self.start + self.max_cost_per_second * Decimal(round(max(0.0, seconds) * 1_000_000)).scaleb(-6)

    def per_image(self, images_per_second: float, images: int) -> Decimal:
        """Estimate the cost of an image when this many come to one activity."""
        return self.start / max(1, images) + self.max_cost_per_second / Decimal(repr(max(1e-6, images_per_second)))


def provider_name(properties: Mapping[str, Any], provider_id: str) -> str:
    """Return the name that a provider gives itself, made harmless; its address if it gives none."""
    name = "".join(letter for letter in str(properties.get(_NAME) or "") if letter.isprintable())[:60].strip()
    return name or provider_id[:10]

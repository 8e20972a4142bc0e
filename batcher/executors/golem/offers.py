"""Offers of providers: reading their prices, and rating them by the expected cost per image. Amounts in GLM.

yapapi's market strategy asks `OfferEvaluator` about each offer. An offer is rated by the cost per image, not per hour:
its price divided by the provider's measured speed, start-up included, weighted by the provider's reliability. Budget,
payments and the ledger use `Price`. Pure, except for the clock it is given.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from batcher.backoff import Backoff
from batcher.executors.golem.settings import GolemSettings
from provider_image.errors import MlgError

#: Assumed speed of a provider as long as none was measured, in images per second.
ASSUMED_SPEED = 5.0
#: Images that a new activity is expected to process; they share the price of its start.
EXPECTED_IMAGES = 160
#: Lowest reliability in a rating. Providers that fail are excluded by bans, not by their rating.
_MIN_SCORE = 0.05
#: Reliability of a provider that has not worked yet, the store's initial score.
_NEW_PROVIDER_SCORE = 0.5
#: How long a provider that did not sign an agreement is skipped.
_UNSIGNED_BACKOFF = Backoff(first_seconds=30.0, max_seconds=3600.0)
#: Older offers do not appear in `unavailable_reason`.
_RECENT_SECONDS = 120.0
#: Property names of an offer, from Golem's standards.
_MODEL = "golem.com.pricing.model"
_COEFFICIENTS = "golem.com.pricing.model.linear.coeffs"
_COUNTERS = "golem.com.usage.vector"
_THREADS = "golem.inf.cpu.threads"
_NAME = "golem.node.id.name"
_CPU, _DURATION = "golem.usage.cpu_sec", "golem.usage.duration_sec"


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
    #: Threads of the provider: the most CPU seconds that can be billed per second.
    threads: int = 1

    @classmethod
    def from_offer(cls, properties: Mapping[str, Any]) -> Price:
        """Read an offer's properties. :raises BadOffer: not linear, or priced by unknown counters."""
        try:
            if properties[_MODEL] != "linear":
                raise BadOffer(f"The price model is {properties[_MODEL]!r}, not linear.")
            counters = list(properties[_COUNTERS])
            *by_counter, start = (Decimal(str(each)) for each in properties[_COEFFICIENTS])
            prices = dict(zip(counters, by_counter, strict=True))
            threads = max(1, int(properties.get(_THREADS, 1)))
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise BadOffer(f"The prices of the offer cannot be read: {type(error).__name__} {error}.") from error
        unknown = [name for name, price in prices.items() if name not in (_CPU, _DURATION) and price]
        if unknown:
            raise BadOffer(f"The offer charges for unknown counters: {', '.join(unknown)}.")
        found = cls(
            start=start,
            cpu_second=prices.get(_CPU, Decimal(0)),
            second=prices.get(_DURATION, Decimal(0)),
            threads=threads,
        )
        if not all(each.is_finite() and each >= 0 for each in (found.start, found.cpu_second, found.second)):
            raise BadOffer("The offer has negative prices.")
        return found

    @property
    def max_cost_per_second(self) -> Decimal:
        """GLM per second with all threads busy: no correct invoice is higher."""
        return self.second + self.cpu_second * self.threads

    @property
    def per_hour(self) -> Decimal:
        """GLM per hour with all threads busy, the start not counted."""
        return 3600 * self.max_cost_per_second

    def max_cost(self, seconds: float) -> Decimal:
        """Return the most that an activity of this length can cost."""
        # Times are accurate to a microsecond at best, and amounts have at most 18 digits.
        return self.start + self.max_cost_per_second * Decimal(round(max(0.0, seconds) * 1_000_000)).scaleb(-6)

    def per_image(self, images_per_second: float, images: int) -> Decimal:
        """Estimate the cost per image for an activity that processes this many images."""
        return self.start / max(1, images) + self.max_cost_per_second / Decimal(repr(max(1e-6, images_per_second)))


class OfferEvaluator:
    """Rates offers by what this batcher knows of their providers.

    :param monotonic: returns seconds that never decrease.
    """

    def __init__(self, settings: GolemSettings, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._now = monotonic
        #: Address -> reason. Has what this batcher decides before the store has it.
        self.banned: dict[str, str] = {}
        #: Address -> 0 to 1.
        self.reliability: dict[str, float] = {}
        #: Model -> address -> images per second, as far as it was measured.
        self.speeds: defaultdict[str, dict[str, float]] = defaultdict(dict)
        #: Address -> (skipped until, how often it did not sign).
        self._unsigned: dict[str, tuple[float, int]] = {}
        #: (model, address) -> (time, why its offer was rejected, in words that fit after "2 providers").
        self._recent: dict[tuple[str, str], tuple[float, str | None]] = {}

    def speed(self, model: str, provider_id: str) -> float | None:
        """Return a provider's images per second; for a new one the mean of the others; None if none is known."""
        known = self.speeds[model]
        return known.get(provider_id, sum(known.values()) / len(known) if known else None)

    def record_not_signed(self, provider_id: str) -> None:
        """Record that a provider did not approve a proposed agreement."""
        times = self._unsigned.get(provider_id, (0.0, 0))[1] + 1
        self._unsigned[provider_id] = (self._now() + _UNSIGNED_BACKOFF.after(times), times)

    def record_signed(self, provider_id: str) -> None:
        """Record that a provider approved an agreement."""
        self._unsigned.pop(provider_id, None)

    def rate_offer(self, model: str, provider_id: str, properties: Mapping[str, Any]) -> float:
        """Rate an offer on yapapi's scale, where more is better and less than zero is rejected."""
        try:
            price = Price.from_offer(properties)
        except BadOffer:
            price = None
        rejection = self._rejection(provider_id, price)
        self._recent[model, provider_id] = (self._now(), rejection)
        if price is None or rejection is not None:
            return -1.0
        cost = float(price.per_image(self.speed(model, provider_id) or ASSUMED_SPEED, EXPECTED_IMAGES))
        # yapapi prefers higher scores; a price of zero would be infinite.
        return max(_MIN_SCORE, self.reliability.get(provider_id, _NEW_PROVIDER_SCORE)) / max(cost, 1e-12)

    def _rejection(self, provider_id: str, price: Price | None) -> str | None:
        if provider_id in self.banned:
            return "banned"
        if self._unsigned.get(provider_id, (0.0, 0))[0] > self._now():
            return "did not sign recently"
        if price is None:
            return "with unreadable prices"
        settings = self._settings
        if settings.max_price_start is not None and price.start > settings.max_price_start:
            return f"above {settings.max_price_start} GLM per start (MLG_MAX_PRICE_START)"
        if settings.max_price_hour is not None and price.per_hour > settings.max_price_hour:
            return f"above {settings.max_price_hour} GLM per hour (MLG_MAX_PRICE_HOUR)"
        return None

    def unavailable_reason(self, model: str) -> str:
        """Return, in a sentence, why no provider works on a model, and what to do."""
        since = self._now() - _RECENT_SECONDS
        recent = [reason for (of, _), (at, reason) in self._recent.items() if of == model and at > since]
        if not recent:
            return (
                "No provider on the market offers what the model needs. The search continues; "
                "MLG_EXECUTOR=golem,local uses this machine meanwhile."
            )
        rejections = Counter(reason for reason in recent if reason is not None)
        acceptable = len(recent) - rejections.total()
        parts = [f"{count} {reason}" for reason, count in sorted(rejections.items())]
        if acceptable:
            parts.insert(0, f"{acceptable} busy or not responding")
        offers = "1 offer" if len(recent) == 1 else f"{len(recent)} offers"
        return (
            f"No provider is available: of {offers}, {', '.join(parts)}. The search continues. See: mlg providers list"
        )


def describe_offer(properties: Mapping[str, Any], provider_id: str) -> tuple[str, Price]:
    """Return a provider's name and price. :raises BadOffer: the prices cannot be read."""
    return provider_name(properties, provider_id), Price.from_offer(properties)


def provider_name(properties: Mapping[str, Any], provider_id: str) -> str:
    """Return the name that a provider gives itself, limited to printable characters; its address if it has none."""
    name = "".join(letter for letter in str(properties.get(_NAME) or "") if letter.isprintable())[:60].strip()
    return name or provider_id[:10]

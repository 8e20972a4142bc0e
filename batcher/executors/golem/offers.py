"""Offers of providers: reading their prices, and rating them by the expected cost per image. Amounts in GLM.

yapapi's market strategy asks `OfferEvaluator` about each offer. An offer is rated by the cost per image, not per hour:
its price divided by the provider's measured speed, start-up included, weighted by the provider's reliability. Budget,
payments and the ledger use `Price`. Pure, except for the clock it is given.
"""

from __future__ import annotations

import time
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


@dataclass(frozen=True, kw_only=True)
class OfferRating:
    """The rating of an offer."""

    #: Higher is better, negative is rejected; the scale that yapapi uses.
    score: float
    #: Why it is rejected, in a few words that fit after "2 providers"; None if it is not.
    rejection_reason: str | None = None


class OfferEvaluator:
    """Rates offers by what this batcher knows of their providers.

    :param monotonic: returns seconds that never decrease.
    """

    def __init__(
        self,
        settings: GolemSettings,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._now = monotonic
        #: Address -> reason.
        self._banned: dict[str, str] = {}
        #: Address -> 0 to 1.
        self._reliability: dict[str, float] = {}
        #: (model, address) -> images per second.
        self._speed: dict[tuple[str, str], float] = {}
        #: Address -> (skipped until, how often it did not sign).
        self._unsigned: dict[str, tuple[float, int]] = {}
        #: (model, address) -> (time, rating).
        self._recent_ratings: dict[tuple[str, str], tuple[float, OfferRating]] = {}

    def update_providers(self, *, banned: Mapping[str, str], reliability: Mapping[str, float]) -> None:
        """Replace the bans and reliability scores by those of the store."""
        self._banned = dict(banned)
        self._reliability = dict(reliability)

    def update_speeds(self, model: str, speeds: Mapping[str, float]) -> None:
        """Add measured speeds.

        :param speeds: address -> images per second.
        """
        for provider_id, speed in speeds.items():
            self._speed[model, provider_id] = speed

    def speed(self, model: str, provider_id: str) -> float | None:
        """Return a provider's images per second; for a new one the mean of the others; None if none is known."""
        if (model, provider_id) in self._speed:
            return self._speed[model, provider_id]
        others = [speed for (of, _), speed in self._speed.items() if of == model]
        return sum(others) / len(others) if others else None

    def ban(self, provider_id: str, reason: str) -> None:
        """Ban immediately, before the store has the ban."""
        self._banned[provider_id] = reason

    def unban(self, provider_id: str) -> None:
        """Lift a ban immediately."""
        self._banned.pop(provider_id, None)

    def is_banned(self, provider_id: str) -> bool:
        """Return whether a provider is banned now."""
        return provider_id in self._banned

    def banned(self) -> set[str]:
        """Return the addresses of the providers that are banned now."""
        return set(self._banned)

    def record_not_signed(self, provider_id: str) -> None:
        """Record that a provider did not approve a proposed agreement."""
        times = self._unsigned.get(provider_id, (0.0, 0))[1] + 1
        self._unsigned[provider_id] = (self._now() + _UNSIGNED_BACKOFF.after(times), times)

    def record_signed(self, provider_id: str) -> None:
        """Record that a provider approved an agreement."""
        self._unsigned.pop(provider_id, None)

    def rate_offer(self, model: str, provider_id: str, properties: Mapping[str, Any]) -> OfferRating:
        """Rate an offer, and remember the rating for `unavailable_reason`."""
        rating = self._rate_offer(model, provider_id, properties)
        self._recent_ratings[model, provider_id] = (self._now(), rating)
        return rating

    def _rate_offer(self, model: str, provider_id: str, properties: Mapping[str, Any]) -> OfferRating:
        if provider_id in self._banned:
            return _reject("banned")
        if self._unsigned.get(provider_id, (0.0, 0))[0] > self._now():
            return _reject("did not sign recently")
        try:
            price = Price.from_offer(properties)
        except BadOffer:
            return _reject("with unreadable prices")
        settings = self._settings
        if settings.max_price_start is not None and price.start > settings.max_price_start:
            return _reject(f"above {settings.max_price_start} GLM per start (MLG_MAX_PRICE_START)")
        if settings.max_price_hour is not None and price.per_hour > settings.max_price_hour:
            return _reject(f"above {settings.max_price_hour} GLM per hour (MLG_MAX_PRICE_HOUR)")
        speed = self.speed(model, provider_id) or ASSUMED_SPEED
        cost = float(price.per_image(speed, EXPECTED_IMAGES))
        reliability = max(_MIN_SCORE, self._reliability.get(provider_id, _NEW_PROVIDER_SCORE))
        # yapapi prefers higher scores; a price of zero would be infinite.
        return OfferRating(score=reliability / max(cost, 1e-12))

    def unavailable_reason(self, model: str) -> str:
        """Return, in a sentence, why no provider works on a model, and what to do."""
        recent = [
            rating for (of, _), (at, rating) in self._recent_ratings.items() if of == model and at > self._recent()
        ]
        if not recent:
            return (
                "No provider on the market offers what the model needs. The search continues; "
                "MLG_EXECUTOR=golem,local uses this machine meanwhile."
            )
        rejections: dict[str, int] = {}
        for rating in recent:
            if rating.rejection_reason is not None:
                rejections[rating.rejection_reason] = rejections.get(rating.rejection_reason, 0) + 1
        acceptable = len(recent) - sum(rejections.values())
        parts = [f"{count} {reason}" for reason, count in sorted(rejections.items())]
        if acceptable:
            parts.insert(0, f"{acceptable} busy or not responding")
        offers = "1 offer" if len(recent) == 1 else f"{len(recent)} offers"
        return (
            f"No provider is available: of {offers}, {', '.join(parts)}. The search continues. See: mlg providers list"
        )

    def _recent(self) -> float:
        return self._now() - _RECENT_SECONDS


def describe_offer(properties: Mapping[str, Any], provider_id: str) -> tuple[str, Price]:
    """Return a provider's name and price. :raises BadOffer: the prices cannot be read."""
    return provider_name(properties, provider_id), Price.from_offer(properties)


def provider_name(properties: Mapping[str, Any], provider_id: str) -> str:
    """Return the name that a provider gives itself, limited to printable characters; its address if it has none."""
    name = "".join(letter for letter in str(properties.get(_NAME) or "") if letter.isprintable())[:60].strip()
    return name or provider_id[:10]


def _reject(reason: str) -> OfferRating:
    return OfferRating(score=-1.0, rejection_reason=reason)

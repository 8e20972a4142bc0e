"""The market as this batcher sees it: which offers are acceptable, and which gives the cheapest picture.

Asked by the strategy that yapapi calls for each offer. Not the cheapest hour is looked for but the cheapest picture:
price divided by the speed that was measured of that very provider, start included, and by how often it lived up to its
promises. Pure, but for the clock it is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from batcher.executors.golem.prices import BadOffer, Price, provider_name
from batcher.executors.golem.settings import GolemSettings

#: Speed that a provider is assumed to have as long as nobody was measured, in images a second.
ASSUMED_SPEED = 5.0
#: Images that a new activity is expected to get; its start is shared by them.
EXPECTED_IMAGES = 160
#: Of a provider that has failed every time, the score is still this much: bans are another matter.
_MIN_SCORE = 0.05
#: Score of a provider that has not worked yet, as the store begins to count.
_NEW_PROVIDER_SCORE = 0.5
#: A provider that did not sign is left alone for so long at first; doubles with each time.
_UNSIGNED_SECONDS = 30.0
#: Offers that came in longer ago than this are not told of any more.
_RECENT_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class OfferRating:
    """What is thought of an offer."""

    #: The higher the better, below 0 it is refused; as yapapi wants it.
    score: float
    #: Why it is refused, in a few words that fit after "2 providers"; None if it is not.
    rejection_reason: str | None = None


class OfferEvaluator:
    """One batcher's view of the providers.

    :param monotonic: gives seconds that only grow.
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
        #: (model, address) -> images a second.
        self._speed: dict[tuple[str, str], float] = {}
        #: Address -> (until, how often).
        self._unsigned: dict[str, tuple[float, int]] = {}
        #: (model, address) -> (when, verdict).
        self._recent_ratings: dict[tuple[str, str], tuple[float, OfferRating]] = {}

    def update_providers(self, *, banned: Mapping[str, str], reliability: Mapping[str, float]) -> None:
        """Take over what the store knows of the providers."""
        self._banned = dict(banned)
        self._reliability = dict(reliability)

    def update_speeds(self, model: str, speeds: Mapping[str, float]) -> None:
        """Take over what was measured.

        :param speeds: address -> images a second.
        """
        for provider_id, speed in speeds.items():
            self._speed[model, provider_id] = speed

    def speed(self, model: str, provider_id: str) -> float | None:
        """Return a provider's images a second; the mean of the others if it is new; None if nobody is known."""
        if (model, provider_id) in self._speed:
            return self._speed[model, provider_id]
        others = [speed for (of, _), speed in self._speed.items() if of == model]
        return sum(others) / len(others) if others else None

    def ban(self, provider_id: str, reason: str) -> None:
        """Ban at once, before the store tells it again."""
        self._banned[provider_id] = reason

    def unban(self, provider_id: str) -> None:
        """Lift a ban at once."""
        self._banned.pop(provider_id, None)

    def is_banned(self, provider_id: str) -> bool:
        """Tell whether a provider gets nothing now."""
        return provider_id in self._banned

    def banned(self) -> set[str]:
        """List the addresses of those who get nothing now."""
        return set(self._banned)

    def record_not_signed(self, provider_id: str) -> None:
        """Note that an agreement was proposed to a provider and not approved."""
        times = self._unsigned.get(provider_id, (0.0, 0))[1] + 1
        self._unsigned[provider_id] = (self._now() + min(3600.0, _UNSIGNED_SECONDS * 2 ** (times - 1)), times)

    def record_signed(self, provider_id: str) -> None:
        """Note that a provider approved an agreement."""
        self._unsigned.pop(provider_id, None)

    def rate_offer(self, model: str, provider_id: str, properties: Mapping[str, Any]) -> OfferRating:
        """Judge an offer, and remember the verdict for `unavailable_reason`."""
        rating = self._rate_offer(model, provider_id, properties)
        self._recent_ratings[model, provider_id] = (self._now(), rating)
        return rating

    def _rate_offer(self, model: str, provider_id: str, properties: Mapping[str, Any]) -> OfferRating:
        if provider_id in self._banned:
            return _reject("banned")
        if self._unsigned.get(provider_id, (0.0, 0))[0] > self._now():
            return _reject("did not sign lately")
        try:
            price = Price.from_offer(properties)
        except BadOffer:
            return _reject("with prices that cannot be understood")
        settings = self._settings
        if settings.max_price_start is not None and price.start > settings.max_price_start:
            return _reject(f"dearer than {settings.max_price_start} GLM a start (MLG_MAX_PRICE_START)")
        if settings.max_price_hour is not None and price.per_hour > settings.max_price_hour:
            return _reject(f"dearer than {settings.max_price_hour} GLM an hour (MLG_MAX_PRICE_HOUR)")
        speed = self.speed(model, provider_id) or ASSUMED_SPEED
        cost = float(price.per_image(speed, EXPECTED_IMAGES))
        reliability = max(_MIN_SCORE, self._reliability.get(provider_id, _NEW_PROVIDER_SCORE))
        # yapapi wants a number that is the higher the better; nothing at all to pay would be infinitely good.
        return OfferRating(score=reliability / max(cost, 1e-12))

    def unavailable_reason(self, model: str) -> str:
        """Say in a sentence why nobody works on a model."""
        recent = [
            rating for (of, _), (at, rating) in self._recent_ratings.items() if of == model and at > self._recent()
        ]
        if not recent:
            return "No provider on the market offers what the model needs."
        rejections: dict[str, int] = {}
        for rating in recent:
            if rating.rejection_reason is not None:
                rejections[rating.rejection_reason] = rejections.get(rating.rejection_reason, 0) + 1
        acceptable = len(recent) - sum(rejections.values())
        parts = [f"{count} {reason}" for reason, count in sorted(rejections.items())]
        if acceptable:
            parts.insert(0, f"{acceptable} busy or not answering")
        return f"No provider takes it: {len(recent)} offered to, of which {', '.join(parts)}."

    def _recent(self) -> float:
        return self._now() - _RECENT_SECONDS


def describe_offer(properties: Mapping[str, Any], provider_id: str) -> tuple[str, Price]:
    """Return a provider's name and price. :raises BadOffer:"""
    return provider_name(properties, provider_id), Price.from_offer(properties)


def _reject(reason: str) -> OfferRating:
    return OfferRating(score=-1.0, rejection_reason=reason)

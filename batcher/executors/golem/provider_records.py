"""What one batcher knows of providers: their offers, how their work ended, who is banned, and which offer is best.

A provider that fails is banned, twice as long for each further failure in a row. But when a chunk fails on several
providers, the chunk is at fault, and their bans are lifted. yapapi's market strategy asks for the rating of each offer,
which is by the cost per image, not per hour: the price divided by the provider's measured speed, start-up included,
weighted by the provider's reliability. The store keeps what is learned.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from batcher.backoff import Backoff
from batcher.executors.golem.job_queue import QueuedJob
from batcher.executors.golem.ledger_writer import LedgerWriter
from batcher.executors.golem.offers import BadOffer, Price, describe_offer
from batcher.executors.golem.settings import GolemSettings
from store.rentals.providers import Providers
from store.requests import ISOLATION_STEPS, MAX_ATTEMPTS

if TYPE_CHECKING:
    from batcher.executors.golem.worker import GolemWorker

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
#: Bans in a row that are lifted because a chunk failed everywhere: as often as one bad image can fail, with its chunk,
#: with a smaller one, and alone until it has no attempt left.
_MAX_FORGIVEN = len(ISOLATION_STEPS) - 1 + MAX_ATTEMPTS
#: Older offers do not appear in `unavailable_reason`.
_RECENT_SECONDS = 120.0
#: Longest ban for failures.
_MAX_BAN_SECONDS = 7 * 86_400.0
#: Ban of a provider that charged too much.
_OVERBILLING_BAN_SECONDS = 30 * 86_400.0
#: An offer that is repeated with the same price is recorded this often.
_OFFER_SECONDS = 3600.0


class ProviderRecords:
    """One batcher's providers."""

    def __init__(
        self,
        providers: Providers,
        settings: GolemSettings,
        ledger_writer: LedgerWriter,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._providers = providers
        self._settings = settings
        self._ledger_writer = ledger_writer
        self._now = monotonic
        self._ban_backoff = Backoff(first_seconds=settings.ban_seconds, max_seconds=_MAX_BAN_SECONDS)
        #: Address -> reason. Has what this batcher decides before the store has it.
        self.banned: dict[str, str] = {}
        #: Those of them that are not yet in the store.
        self._unwritten_bans: dict[str, str] = {}
        self._has_unbanned = False
        #: Address -> 0 to 1.
        self.reliability: dict[str, float] = {}
        #: Model -> address -> images per second, as far as it was measured.
        self.speeds: defaultdict[str, dict[str, float]] = defaultdict(dict)
        #: Address -> (skipped until, how often it did not sign).
        self._unsigned: dict[str, tuple[float, int]] = {}
        #: (model, address) -> (time, why its offer was rejected, in words that fit after "2 providers").
        self._recent: dict[tuple[str, str], tuple[float, str | None]] = {}
        #: Address -> failures in a row.
        self._failures: dict[str, int] = {}
        #: Addresses of providers that have not succeeded since a call for an activity of theirs failed.
        self._unclear: set[str] = set()
        #: Address -> bans that were lifted because of a chunk since the provider succeeded.
        self._forgiven: Counter[str] = Counter()
        #: Address -> when its offer was recorded, and the price.
        self._offers: dict[str, tuple[float, Price]] = {}

    def refresh(self) -> None:
        """Read bans by operators and other batchers, and scores, from the store. Called in a thread."""
        unwritten = dict(self._unwritten_bans)  # one that is written meanwhile is read, or is in here
        banned = {**self._providers.banned(datetime.now(UTC)), **unwritten, **self._unwritten_bans}
        self._has_unbanned = self._has_unbanned or bool(self.banned.keys() - banned.keys())
        self.banned = banned
        self.reliability = self._providers.scores()

    def record_offer(self, provider_id: str, properties: Mapping[str, Any]) -> None:
        """Record a provider's prices, unless they were recorded recently."""
        try:
            name, price = describe_offer(properties, provider_id)
        except BadOffer:
            return
        known = self._offers.get(provider_id)
        if known is not None and known[1] == price and self._now() - known[0] < _OFFER_SECONDS:
            return
        self._offers[provider_id] = (self._now(), price)
        self._ledger_writer.enqueue(
            self._providers.record_offer,
            provider_id,
            name=name,
            start_price=price.start,
            price_per_cpu_second=price.cpu_second,
            price_per_second=price.second,
            now=datetime.now(UTC),
        )

    def forget_old(self) -> None:
        """Forget offers that no longer matter: there may be any number of addresses, which cost nothing."""
        now = self._now()
        self._recent = {key: each for key, each in self._recent.items() if each[0] > now - _RECENT_SECONDS}
        self._offers = {id: each for id, each in self._offers.items() if each[0] > now - _OFFER_SECONDS}
        since = now - _UNSIGNED_BACKOFF.max_seconds
        self._unsigned = {id: each for id, each in self._unsigned.items() if each[0] > since}

    def record_success(self, worker: GolemWorker, *, images: int, seconds: float, speed: float) -> None:
        """Record that a provider answered a chunk.

        :param images: those that it has computed.
        :param speed: images per second, of this and the other chunks that came with it.
        """
        self._failures.pop(worker.provider_id, None)
        self._unclear.discard(worker.provider_id)
        self._forgiven.pop(worker.provider_id, None)
        self._record_work(worker, images, seconds, is_failure=False)
        if images:
            self.speeds[worker.model][worker.provider_id] = speed

    def record_failure(self, worker: GolemWorker, queued_job: QueuedJob | None, reason: str, seconds: float) -> None:
        """Record that a provider failed, on this chunk if it had one, and ban it."""
        self._record_work(worker, 0, seconds, is_failure=True)
        failures_in_a_row = self._failures[worker.provider_id] = self._failures.get(worker.provider_id, 0) + 1
        self._ban(worker.provider_id, reason, self._ban_backoff.after(failures_in_a_row))
        if queued_job is not None:
            queued_job.failed_on.add(worker.provider_id)

    def is_unclear_again(self, provider_id: str) -> bool:
        """Record a failure for which the daemon may be at fault as well as the provider.

        :return: whether it is not the first in a row: then it counts as the provider's, which would otherwise be hired
            and paid again and again.
        """
        is_again = provider_id in self._unclear
        self._unclear.add(provider_id)
        return is_again

    def lift_bans(self, queued_job: QueuedJob) -> None:
        """Lift the bans caused by a chunk that failed on several providers.

        Only so often of a provider that never succeeds in between: those of one owner that always fail together would
        get every chunk again, and fail all requests.
        """
        suspicious = queued_job.failed_on - queued_job.proven_wrong
        if len(suspicious) < 2:
            return
        for provider_id in suspicious:
            if self._forgiven[provider_id] >= _MAX_FORGIVEN:
                continue
            self._forgiven[provider_id] += 1
            self._failures.pop(provider_id, None)
            self.banned.pop(provider_id, None)
            self._unwritten_bans.pop(provider_id, None)
            self._has_unbanned = True
            self._ledger_writer.enqueue(self._providers.unban, provider_id, by_operator=False)

    def take_unbanned(self) -> bool:
        """Return whether bans were lifted or have ended since the last call; those providers have to be asked again."""
        has_unbanned, self._has_unbanned = self._has_unbanned, False
        return has_unbanned

    def record_overbilling(self, provider_id: str, reason: str) -> None:
        """Ban a provider that charged more than it can have earned."""
        self._ban(provider_id, reason, _OVERBILLING_BAN_SECONDS)

    def _record_work(self, worker: GolemWorker, images: int, seconds: float, *, is_failure: bool) -> None:
        self._ledger_writer.enqueue(
            self._providers.record_work,
            worker.provider_id,
            model=worker.model,
            images=images,
            seconds=seconds,
            is_failure=is_failure,
            now=datetime.now(UTC),
        )

    def _ban(self, provider_id: str, reason: str, seconds: float) -> None:
        self.banned[provider_id] = self._unwritten_bans[provider_id] = reason
        until = datetime.now(UTC) + timedelta(seconds=seconds)
        written = self._ledger_writer.enqueue(
            self._providers.ban, provider_id, until=until, reason=reason[:500], by_operator=False
        )
        written.add_done_callback(lambda _: self._unwritten_bans.pop(provider_id, None))

    # Rating

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
        return self._settings.price_rejection(price)

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

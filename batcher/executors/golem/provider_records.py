"""What one batcher learns of providers: their offers, how their work ended, and who is banned for that.

A provider that fails is banned, twice as long for each further failure in a row. But when a chunk fails on several
providers, the chunk is at fault, and their bans are lifted. `offers.py` rates with it, the store keeps it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from batcher.backoff import Backoff
from batcher.executors.golem.job_queue import QueuedJob
from batcher.executors.golem.ledger_writer import LedgerWriter
from batcher.executors.golem.offers import BadOffer, OfferEvaluator, Price, describe_offer
from batcher.executors.golem.settings import GolemSettings
from store.providers import Providers

if TYPE_CHECKING:
    from batcher.executors.golem.worker import GolemWorker

#: Longest ban for failures.
_MAX_BAN_SECONDS = 7 * 86_400.0
#: Ban of a provider that charged too much.
_OVERBILLING_BAN_SECONDS = 30 * 86_400.0
#: An offer that is repeated with the same price is recorded this often.
_OFFER_SECONDS = 3600.0


class ProviderRecords:
    """The offers, the work and the bans of one batcher's providers."""

    def __init__(
        self,
        providers: Providers,
        settings: GolemSettings,
        offer_evaluator: OfferEvaluator,
        ledger_writer: LedgerWriter,
    ) -> None:
        self._ban_backoff = Backoff(first_seconds=settings.ban_seconds, max_seconds=_MAX_BAN_SECONDS)
        self._offer_evaluator = offer_evaluator
        self._ledger_writer = ledger_writer
        self._providers = providers
        #: Address -> failures in a row.
        self._failures: dict[str, int] = {}
        #: Address -> when its offer was recorded, and the price.
        self._offers: dict[str, tuple[float, Price]] = {}

    def refresh(self) -> None:
        """Read bans by operators and other batchers, and scores, from the store. Called in a thread."""
        self._offer_evaluator.banned = self._providers.banned(datetime.now(UTC))
        self._offer_evaluator.reliability = {each.id: each.score for each in self._providers.list()}

    def record_offer(self, provider_id: str, properties: Mapping[str, Any]) -> None:
        """Record a provider's prices, unless they were recorded recently."""
        try:
            name, price = describe_offer(properties, provider_id)
        except BadOffer:
            return
        known = self._offers.get(provider_id)
        if known is not None and known[1] == price and time.monotonic() - known[0] < _OFFER_SECONDS:
            return
        self._offers[provider_id] = (time.monotonic(), price)
        self._ledger_writer.enqueue(
            self._providers.record_offer,
            provider_id,
            name=name,
            start_price=price.start,
            price_per_cpu_second=price.cpu_second,
            price_per_second=price.second,
            now=datetime.now(UTC),
        )

    def record_success(self, worker: GolemWorker, *, images: int, seconds: float) -> None:
        """Record that a provider answered a chunk."""
        self._failures.pop(worker.provider_id, None)
        self._record_work(worker, images, seconds, is_failure=False)
        self._offer_evaluator.speeds[worker.model][worker.provider_id] = images / max(1e-3, seconds)

    def record_failure(self, worker: GolemWorker, queued_job: QueuedJob | None, reason: str, seconds: float) -> None:
        """Record that a provider failed, on this chunk if it had one, and ban it."""
        self._record_work(worker, 0, seconds, is_failure=True)
        failures_in_a_row = self._failures[worker.provider_id] = self._failures.get(worker.provider_id, 0) + 1
        self._ban(worker.provider_id, reason, self._ban_backoff.after(failures_in_a_row))
        if queued_job is not None:
            queued_job.failed_on.add(worker.provider_id)

    def lift_bans(self, queued_job: QueuedJob) -> None:
        """Lift the bans caused by a chunk that failed on several providers."""
        if len(queued_job.failed_on) < 2:
            return
        for provider_id in queued_job.failed_on:
            self._failures.pop(provider_id, None)
            self._offer_evaluator.banned.pop(provider_id, None)
            self._ledger_writer.enqueue(self._providers.unban, provider_id, by_operator=False)

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
        self._offer_evaluator.banned[provider_id] = reason
        until = datetime.now(UTC) + timedelta(seconds=seconds)
        self._ledger_writer.enqueue(
            self._providers.ban, provider_id, until=until, reason=reason[:500], by_operator=False
        )

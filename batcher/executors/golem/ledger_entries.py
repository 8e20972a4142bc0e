"""What the golem executor writes down of providers, agreements and hires, each as a line of the ledger.

Called by `executor.py` and `blame.py` from the event loop; `ledger.py` does the writing. Nothing is decided here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from batcher.executors.golem.ledger_writer import LedgerWriter
from batcher.executors.golem.offers import describe_offer
from batcher.executors.golem.prices import BadOffer, Price
from batcher.executors.golem.worker import GolemWorker
from store.ledger import ActivityRecord, AgreementRecord

#: An offer that is repeated with the same price is noted this often.
_OFFER_SECONDS = 3600.0


class LedgerEntries:
    """See the module."""

    def __init__(self, ledger_writer: LedgerWriter) -> None:
        self._ledger_writer = ledger_writer
        self._ledger = ledger_writer.ledger
        #: Address -> when its offer was noted, and the price.
        self._offers: dict[str, tuple[float, Price]] = {}

    def record_offer(self, provider_id: str, properties: Mapping[str, Any]) -> None:
        """Note a provider's prices, but not each time that it repeats its offer."""
        try:
            name, price = describe_offer(properties, provider_id)
        except BadOffer:
            return
        known = self._offers.get(provider_id)
        if known is not None and known[1] == price and time.monotonic() - known[0] < _OFFER_SECONDS:
            return
        self._offers[provider_id] = (time.monotonic(), price)
        now = datetime.now(UTC)
        self._ledger_writer.enqueue(
            lambda: self._ledger.record_offer(
                provider_id,
                name=name,
                start_price=price.start,
                price_per_cpu_second=price.cpu_second,
                price_per_second=price.second,
                now=now,
            )
        )

    def record_agreement(self, model: str, agreement: Any, allocation_id: str) -> None:
        """Note an agreement. :param agreement: yapapi's."""
        offer = agreement.details.raw_details.offer
        try:
            name, price = describe_offer(offer.properties, offer.provider_id)
        except BadOffer:
            return
        record = AgreementRecord(
            id=agreement.id,
            allocation_id=allocation_id,
            provider_id=offer.provider_id,
            provider_name=name,
            model=model,
            start_price=price.start,
            price_per_cpu_second=price.cpu_second,
            price_per_second=price.second,
            created_at=datetime.now(UTC),
        )
        self._ledger_writer.enqueue(lambda: self._ledger.record_agreement(record))

    def record_agreement_end(self, id: str, reason: str) -> None:
        """Note why an agreement ended."""
        now = datetime.now(UTC)
        self._ledger_writer.enqueue(lambda: self._ledger.end_agreement(id, reason=reason, now=now))

    def record_activity_start(self, worker: GolemWorker) -> None:
        """Note that an activity begins."""
        record = ActivityRecord(id=worker.activity_id, agreement_id=worker.agreement_id, created_at=worker.created_at)
        self._ledger_writer.enqueue(lambda: self._ledger.record_activity(record))

    def record_activity_end(self, worker: GolemWorker) -> None:
        """Note that an activity has ended."""
        record = ActivityRecord(
            id=worker.activity_id,
            agreement_id=worker.agreement_id,
            created_at=worker.created_at,
            ended_at=datetime.now(UTC),
            seconds=worker.seconds(),
        )
        self._ledger_writer.enqueue(lambda: self._ledger.record_activity(record))

    def record_work(self, worker: GolemWorker, *, images: int, seconds: float, is_failure: bool) -> None:
        """Note how a chunk ended at a provider."""
        now = datetime.now(UTC)
        self._ledger_writer.enqueue(
            lambda: self._ledger.record_work(
                worker.provider_id, model=worker.model, images=images, seconds=seconds, is_failure=is_failure, now=now
            )
        )

    def record_ban(self, provider_id: str, reason: str, length: timedelta) -> None:
        """Note a ban from now on."""
        until = datetime.now(UTC) + length
        self._ledger_writer.enqueue(
            lambda: self._ledger.ban_provider(provider_id, until=until, reason=reason[:500], by_operator=False)
        )

    def record_unban(self, provider_id: str) -> None:
        """Note that a ban is lifted, unless a person made it."""
        self._ledger_writer.enqueue(lambda: self._clear(provider_id))

    def _clear(self, provider_id: str) -> None:
        known = {each.id: each for each in self._ledger.list_providers()}
        if provider_id in known and not known[provider_id].is_banned_by_operator:
            self._ledger.unban_provider(provider_id)

"""What the golem executor writes down of providers, agreements and hires, each as a line of the ledger.

Called by `executor.py` and `blame.py` from the event loop; `books.py` does the writing. Nothing is decided here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from batcher.executors.golem.ledger_writer import Bookkeeper
from batcher.executors.golem.offers import describe
from batcher.executors.golem.prices import BadOffer, Price
from batcher.executors.golem.worker import Hire
from store.ledger_records import ActivityRecord, AgreementRecord

#: An offer that is repeated with the same price is noted this often.
_OFFER_SECONDS = 3600.0


class Diary:
    """See the module."""

    def __init__(self, keeper: Bookkeeper) -> None:
        self._keeper = keeper
        self._books = keeper.books
        #: Address -> when its offer was noted, and the price.
        self._offers: dict[str, tuple[float, Price]] = {}

    def offered(self, provider_id: str, properties: Mapping[str, Any]) -> None:
        """Note a provider's prices, but not each time that it repeats its offer."""
        try:
            name, price = describe(properties, provider_id)
        except BadOffer:
            return
        known = self._offers.get(provider_id)
        if known is not None and known[1] == price and time.monotonic() - known[0] < _OFFER_SECONDS:
            return
        self._offers[provider_id] = (time.monotonic(), price)
        now = datetime.now(UTC)
        self._keeper.note(
            lambda: self._books.note_provider(
                provider_id,
                name=name,
                start_price=price.start,
                price_per_cpu_second=price.cpu_second,
                price_per_second=price.second,
                now=now,
            )
        )

    def agreed(self, model: str, agreement: Any, allocation_id: str) -> None:
        """Note an agreement. :param agreement: yapapi's."""
        offer = agreement.details.raw_details.offer
        try:
            name, price = describe(offer.properties, offer.provider_id)
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
        self._keeper.note(lambda: self._books.note_agreement(record))

    def agreement_ended(self, id: str, reason: str) -> None:
        """Note why an agreement ended."""
        now = datetime.now(UTC)
        self._keeper.note(lambda: self._books.end_agreement(id, reason=reason, now=now))

    def hired(self, hire: Hire) -> None:
        """Note that an activity begins."""
        record = ActivityRecord(id=hire.activity_id, agreement_id=hire.agreement_id, created_at=hire.created_at)
        self._keeper.note(lambda: self._books.note_activity(record))

    def hire_ended(self, hire: Hire) -> None:
        """Note that an activity has ended."""
        record = ActivityRecord(
            id=hire.activity_id,
            agreement_id=hire.agreement_id,
            created_at=hire.created_at,
            ended_at=datetime.now(UTC),
            seconds=hire.seconds(),
        )
        self._keeper.note(lambda: self._books.note_activity(record))

    def worked(self, hire: Hire, *, images: int, seconds: float, is_failure: bool) -> None:
        """Note how a chunk ended at a provider."""
        now = datetime.now(UTC)
        self._keeper.note(
            lambda: self._books.note_work(
                hire.provider_id, model=hire.model, images=images, seconds=seconds, is_failure=is_failure, now=now
            )
        )

    def banned(self, provider_id: str, reason: str, length: timedelta) -> None:
        """Note a ban from now on."""
        until = datetime.now(UTC) + length
        self._keeper.note(
            lambda: self._books.ban_provider(provider_id, until=until, reason=reason[:500], by_operator=False)
        )

    def cleared(self, provider_id: str) -> None:
        """Note that a ban is lifted, unless a person made it."""
        self._keeper.note(lambda: self._clear(provider_id))

    def _clear(self, provider_id: str) -> None:
        known = {each.id: each for each in self._books.list_providers()}
        if provider_id in known and not known[provider_id].is_banned_by_operator:
            self._books.unban_provider(provider_id)

"""Writes the golem executor's records into the ledger: in order, in a thread, retried until the store accepts them.

Used by `executor.py`, `provider_bans.py`, `session.py` and `payments.py` from the event loop. Work does not wait for
it; what is still queued is written when the executor closes. It decides nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from batcher.executors.golem.offers import BadOffer, Price, describe_offer
from batcher.executors.golem.worker import GolemWorker
from provider_image.errors import MlgError
from store.errors import StoreError
from store.ledger import ActivityRecord, AgreementRecord, AllocationRecord, DebitNoteRecord, InvoiceRecord, Ledger
from store.providers import Providers

log = logging.getLogger(__name__)

_INITIAL_BACKOFF_SECONDS = 0.2
_MAX_BACKOFF_SECONDS = 5.0
#: An offer that is repeated with the same price is recorded this often.
_OFFER_SECONDS = 3600.0


def describe_agreement(agreement: Any, *, allocation_id: str) -> tuple[AgreementRecord, Price]:
    """Return the record of an agreement, and its price.

    :param agreement: as the daemon returns it.
    :raises BadOffer: its prices cannot be read.
    """
    offer = agreement.offer
    name, price = describe_offer(offer.properties, offer.provider_id)
    record = AgreementRecord(
        id=agreement.agreement_id,
        allocation_id=allocation_id,
        provider_id=offer.provider_id,
        provider_name=name,
        model=str(agreement.demand.properties.get("golem.srv.app.mlg.model", "unknown")),
        start_price=price.start,
        price_per_cpu_second=price.cpu_second,
        price_per_second=price.second,
        created_at=agreement.timestamp,
    )
    return record, price


class LedgerWriter:
    """A queue of records on their way into the ledger."""

    def __init__(self, ledger: Ledger, providers: Providers) -> None:
        #: For reads.
        self.ledger = ledger
        self.providers = providers
        self._writes: asyncio.Queue[Callable[[], object]] = asyncio.Queue()
        self._writer_task: asyncio.Task[None] | None = None
        #: Address -> when its offer was recorded, and the price.
        self._offers: dict[str, tuple[float, Price]] = {}

    def start(self) -> None:
        """Begin to write."""
        self._writer_task = asyncio.create_task(self._write_loop())

    async def close(self, seconds: float = 5.0) -> None:
        """Write what is queued, within this time, and stop."""
        if self._writer_task is None:
            return
        try:
            async with asyncio.timeout(seconds):
                await self._writes.join()
        except TimeoutError:
            log.error("%d ledger records could not be written", self._writes.qsize() + 1)
        self._writer_task.cancel()
        await asyncio.gather(self._writer_task, return_exceptions=True)
        self._writer_task = None

    # Providers

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
        now = datetime.now(UTC)
        self._enqueue(
            lambda: self.providers.record_offer(
                provider_id,
                name=name,
                start_price=price.start,
                price_per_cpu_second=price.cpu_second,
                price_per_second=price.second,
                now=now,
            )
        )

    def record_work(self, worker: GolemWorker, *, images: int, seconds: float, is_failure: bool) -> None:
        """Record how a chunk ended on a provider."""
        now = datetime.now(UTC)
        self._enqueue(
            lambda: self.providers.record_work(
                worker.provider_id, model=worker.model, images=images, seconds=seconds, is_failure=is_failure, now=now
            )
        )

    def record_ban(self, provider_id: str, reason: str, length: timedelta) -> None:
        """Record a ban that begins now."""
        until = datetime.now(UTC) + length
        self._enqueue(lambda: self.providers.ban(provider_id, until=until, reason=reason[:500], by_operator=False))

    def record_unban(self, provider_id: str) -> None:
        """Lift a ban, unless an operator imposed it."""
        self._enqueue(lambda: self._unban(provider_id))

    def _unban(self, provider_id: str) -> None:
        known = {each.id: each for each in self.providers.list()}
        if provider_id in known and not known[provider_id].is_banned_by_operator:
            self.providers.unban(provider_id)

    # Allocations, agreements, activities

    def record_allocation(self, record: AllocationRecord) -> None:
        """Record an allocation."""
        self._enqueue(lambda: self.ledger.record_allocation(record))

    def record_allocation_release(self, id: str) -> None:
        """Record that an allocation is released."""
        now = datetime.now(UTC)
        self._enqueue(lambda: self.ledger.release_allocation(id, now=now))

    def record_agreement(self, record: AgreementRecord) -> None:
        """Record an agreement."""
        self._enqueue(lambda: self.ledger.record_agreement(record))

    def record_agreement_end(self, id: str, reason: str) -> None:
        """Record why an agreement ended."""
        now = datetime.now(UTC)
        self._enqueue(lambda: self.ledger.end_agreement(id, reason=reason, now=now))

    def record_activity_start(self, worker: GolemWorker) -> None:
        """Record that an activity begins."""
        record = ActivityRecord(id=worker.activity_id, agreement_id=worker.agreement_id, created_at=worker.created_at)
        self._enqueue(lambda: self.ledger.record_activity(record))

    def record_activity_end(self, worker: GolemWorker) -> None:
        """Record that an activity has ended."""
        record = ActivityRecord(
            id=worker.activity_id,
            agreement_id=worker.agreement_id,
            created_at=worker.created_at,
            ended_at=datetime.now(UTC),
            seconds=worker.seconds(),
        )
        self._enqueue(lambda: self.ledger.record_activity(record))

    # Bills

    def record_invoice(self, record: InvoiceRecord) -> None:
        """Record an invoice and its state."""
        self._enqueue(lambda: self.ledger.record_invoice(record))

    def record_debit_note(self, record: DebitNoteRecord) -> None:
        """Record a debit note and its state."""
        self._enqueue(lambda: self.ledger.record_debit_note(record))

    # The queue

    def _enqueue(self, write: Callable[[], object]) -> None:
        self._writes.put_nowait(write)

    async def _write_loop(self) -> None:
        while True:
            write = await self._writes.get()
            try:
                await self._write_with_retries(write)
            finally:
                self._writes.task_done()

    async def _write_with_retries(self, write: Callable[[], object]) -> None:
        pause = _INITIAL_BACKOFF_SECONDS
        while True:
            try:
                await asyncio.to_thread(write)
                return
            except StoreError as error:
                log.warning("cannot write to the ledger, trying again in %.1f s: %s", pause, error)
            except MlgError as error:
                log.warning("the ledger rejected a record: %s", error)
                return
            except Exception:
                # A bug in one record must not block all others.
                log.exception("a ledger record could not be written")
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MAX_BACKOFF_SECONDS)

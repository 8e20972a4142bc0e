"""Writes the golem executor's records into the ledger: in order, in a thread, retried until the store accepts them.

Used from the event loop. Work does not wait for it; what is still queued is written when the executor closes. It
decides nothing.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
from collections.abc import Callable
from typing import Any, ParamSpec

from batcher.executors.golem.offers import Price, describe_offer
from batcher.executors.golem.timings import GolemTimings
from provider_image.errors import MlgError
from store.errors import StoreError
from store.rentals.ledger import AgreementRecord

log = logging.getLogger(__name__)

P = ParamSpec("P")


def describe_agreement(agreement: Any, *, allocation_id: str) -> tuple[AgreementRecord, Price]:
    """Return the record of an agreement of the daemon, and its price. :raises BadOffer: the price cannot be read."""
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

    def __init__(self, timings: GolemTimings) -> None:
        self._timings = timings
        self._writes: asyncio.Queue[tuple[Callable[[], object], asyncio.Future[None]]] = asyncio.Queue()
        self._writer_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to write."""
        self._writer_task = asyncio.create_task(self._write_loop())

    def enqueue(self, write: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[None]:
        """Have a method of the store called, after those before. :return: done when the store has the record."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writes.put_nowait((functools.partial(write, *args, **kwargs), written))
        return written

    async def close(self) -> None:
        """Write what is queued, within a limited time, and stop."""
        if self._writer_task is None:
            return
        try:
            async with asyncio.timeout(self._timings.ledger_close_seconds):
                await self._writes.join()
        except TimeoutError:
            log.error("%d ledger records could not be written", self._writes.qsize() + 1)
        self._writer_task.cancel()
        await asyncio.gather(self._writer_task, return_exceptions=True)
        self._writer_task = None

    async def _write_loop(self) -> None:
        while True:
            write, written = await self._writes.get()
            try:
                await self._write_with_retries(write)
            finally:
                self._writes.task_done()
                if not written.done():
                    written.set_result(None)

    async def _write_with_retries(self, write: Callable[[], object]) -> None:
        for failures in itertools.count(1):
            try:
                await asyncio.to_thread(write)
                return
            except StoreError as error:
                pause = self._timings.ledger_backoff.after(failures)
                log.warning("cannot write to the ledger, trying again in %.1f s: %s", pause, error)
            except MlgError as error:
                log.warning("the ledger rejected a record: %s", error)
                return
            except Exception:
                # A bug in one record must not block all others.
                log.exception("a ledger record could not be written")
                return
            await asyncio.sleep(pause)

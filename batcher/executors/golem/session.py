"""One session with the daemon: a connection, an allocation, a file server, and a settler.

Opened and closed by `executor.py`, again and again if need be: what cannot be mended within a session (the daemon was
away, the file server is out of step, the day's money is another) is mended by a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from batcher.errors import GolemUnavailable
from batcher.executors.golem.ledger_writer import LedgerWriter
from batcher.executors.golem.offers import OfferEvaluator, OfferRating
from batcher.executors.golem.payments import PaymentProcessor
from batcher.executors.golem.recovery import Recovery, tagged
from batcher.executors.golem.settings import GolemSettings
from batcher.executors.golem.yapapi_adapter import (
    explain,
    import_yapapi,
    make_strategy,
    run_with_timeout,
    shield_file_server,
    temporary_files_in,
)
from store.ledger import AllocationRecord

log = logging.getLogger(__name__)

#: The daemon must answer within this time when a session is opened.
_OPEN_SECONDS = 30.0
#: The daemon counts as away when it has answered nothing but failures for so long.
_UNREACHABLE_SECONDS = 8.0
#: yapapi gets this long to close.
_CLOSE_SECONDS = 20.0
#: So often, after such pauses, is tried to close what is still open at the end.
_SWEEPS, _SWEEP_PAUSE_SECONDS = 3, 0.5


class Session:
    """A session, not yet open.

    :param number: counts the sessions of this batcher.
    :param amount: GLM to set aside.
    :param on_paid: see Settler.
    :param on_overbilled: see Settler.
    :param on_offer: called with the provider's address and the properties of each offer.
    :param is_gone: tells of the batcher part of an owner whether nobody works under it any more.
    """

    def __init__(
        self,
        *,
        batcher_id: str,
        number: int,
        tag: str,
        amount: Decimal,
        folder: Path,
        settings: GolemSettings,
        offer_evaluator: OfferEvaluator,
        ledger_writer: LedgerWriter,
        on_paid: Callable[[str, Decimal], None],
        on_overbilled: Callable[[str, str], None],
        on_offer: Callable[[str, Mapping[str, Any]], None],
        is_gone: Callable[[str], bool],
    ) -> None:
        self.owner = f"{tag}.{batcher_id}-{number}"
        self.day = datetime.now(UTC).date()
        #: Why the session is of no more use; None while it is.
        self.broken_reason: str | None = None
        #: True when it should be replaced as soon as nothing runs in it.
        self.is_stale = False
        #: Subscription -> model: the strategy is asked about offers without being told what they are for.
        self.subscription_models: dict[str, str] = {}
        self._batcher_id = batcher_id
        self._tag = tag
        self._amount = tagged(amount, tag)
        self._folder = folder
        self._settings = settings
        self._offer_evaluator = offer_evaluator
        self._ledger_writer = ledger_writer
        self._on_paid = on_paid
        self._on_overbilled = on_overbilled
        self._on_offer = on_offer
        self._is_gone = is_gone
        self._golem: Any = None
        self._failing_since: float | None = None
        self._allocation_id = ""
        self.payment_processor: PaymentProcessor | None = None

    @property
    def engine(self) -> Any:
        """yapapi's engine, once open."""
        return self._golem._engine

    async def open(self) -> None:
        """Open. :raises GolemUnavailable: the daemon does not want or cannot; says why."""
        import_yapapi()
        from yapapi import Golem
        from yapapi.config import ApiConfig

        settings = self._settings
        api_config = ApiConfig(app_key=settings.app_key)
        if settings.api_url:
            api_config.api_url = settings.api_url
        self._golem = Golem(
            budget=self._amount,
            strategy=make_strategy(self._rate_offer),
            subnet_tag=settings.subnet,
            payment_driver=settings.payment_driver,
            payment_network=settings.payment_network,
            event_consumer=_ignore,
            api_config=api_config,
        )
        try:
            with temporary_files_in(self._folder):
                async with asyncio.timeout(_OPEN_SECONDS):
                    await self._golem.start()
        except asyncio.CancelledError:
            await self._stop()
            raise
        except Exception as error:
            url = api_config.api_url
            await self._stop()
            raise GolemUnavailable(f"The Golem daemon at {url} cannot be used: {explain(error)}.") from error
        engine = self.engine
        shield_file_server(engine)
        for task in engine._services:
            task.cancel()  # see settling.py
        allocation = engine._budget_allocations[0]
        self._allocation_id = allocation.id
        record = AllocationRecord(
            id=allocation.id,
            batcher_id=self._batcher_id,
            platform=str(allocation.payment_platform),
            address=str(allocation.payment_address),
            amount=self._amount,
            created_at=datetime.now(UTC),
        )
        self._ledger_writer.enqueue(lambda: self._ledger_writer.ledger.record_allocation(record))
        self.payment_processor = PaymentProcessor(
            engine,
            self._ledger_writer,
            owner=self.owner,
            is_left_over=self._is_left_over,
            allocation_id=allocation.id,
            on_paid=self._on_paid,
            on_overbilled=self._on_overbilled,
            on_daemon_error=self._on_daemon_error,
            on_insufficient_allocation=self._on_insufficient_allocation,
        )
        self.payment_processor.start()
        await self.clean_up()
        log.info("a session with the Golem daemon is open", extra={"allocation": allocation.id})

    @property
    def allocation_id(self) -> str:
        """The allocation that is paid from."""
        return self._allocation_id

    async def clean_up(self) -> None:
        """Close what batchers that are gone have left; a failure is told, and tried again with the next session."""
        await self._recover(self._is_left_over)

    async def _recover(self, is_gone: Callable[[str], bool]) -> bool:
        recovery = Recovery(self.engine, self._ledger_writer.ledger, tag=self._tag, is_gone=is_gone)
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                await recovery.run(keep_allocations=[self._allocation_id])
        except Exception as error:
            log.warning("what was left open could not be closed yet: %s", explain(error))
            return False
        return recovery.is_complete

    async def _sweep(self) -> None:
        """Close what should be closed by now, and is not because a call failed: yapapi tries everything only once."""
        for _ in range(_SWEEPS):
            if await self._recover(lambda owner: owner.partition("-")[0] == self._batcher_id):
                return
            await asyncio.sleep(_SWEEP_PAUSE_SECONDS)

    def _is_left_over(self, owner: str) -> bool:
        # Of our own, only earlier sessions are over.
        batcher_id, _, _ = owner.partition("-")
        if batcher_id == self._batcher_id:
            return owner not in (self._batcher_id, self.owner.partition(".")[2])
        return self._is_gone(batcher_id)

    async def close(self, settle_seconds: float) -> None:
        """Wait for bills that are due, release the allocation, close. Never raises."""
        if self._golem is None:
            return
        if self.payment_processor is not None:
            if not self.broken_reason:
                await self._sweep()
            missing = await self.payment_processor.wait_until_settled(0.0 if self.broken_reason else settle_seconds)
            if missing:
                log.warning("%d bills have not come yet; the next batcher settles them", missing)
            await self.payment_processor.close()
        await self._stop()

    async def _stop(self) -> None:
        if self._golem is None:
            return
        stopped = await run_with_timeout(_CLOSE_SECONDS, self._stop_golem(), "closing the session", log)
        # What was to come back and did not, as the file server, which ends with yapapi, may have made it at the last.
        for file in self._folder.glob("*.part"):
            file.unlink(missing_ok=True)
        if not stopped and self._allocation_id:
            stopped = await run_with_timeout(_CLOSE_SECONDS, self._release(), "releasing the allocation", log)
        if stopped and self._allocation_id:
            id = self._allocation_id
            self._ledger_writer.enqueue(
                lambda: self._ledger_writer.ledger.release_allocation(id, now=datetime.now(UTC))
            )

    async def _stop_golem(self) -> None:
        if self._golem.operative:
            await self._golem.stop(wait_for_payments=False)
        else:  # half started: what is open must be closed all the same
            with contextlib.suppress(Exception):
                await self.engine._stack.aclose()

    async def _release(self) -> None:
        """Release the allocation with a connection of its own: yapapi's are closed when its own try has failed."""
        from ya_payment import RequestorApi

        async with self.engine._api_config.payment() as client:
            try:
                await RequestorApi(client).release_allocation(self._allocation_id)
            except Exception as error:
                if getattr(error, "status", None) not in (404, 410):
                    raise

    # What comes from outside

    def _rate_offer(self, provider_id: str, properties: Mapping[str, Any], subscription_id: str) -> OfferRating:
        self._on_offer(provider_id, properties)
        return self._offer_evaluator.rate_offer(
            self.subscription_models.get(subscription_id, ""), provider_id, properties
        )

    def _on_insufficient_allocation(self) -> None:
        self.is_stale = True

    def _on_daemon_error(self, error: BaseException | None) -> None:
        now = time.monotonic()
        if error is None:
            self._failing_since = None
            return
        if self._failing_since is None:
            self._failing_since = now
            log.warning("the Golem daemon fails, trying again: %s", explain(error))
        elif now - self._failing_since > _UNREACHABLE_SECONDS and self.broken_reason is None:
            self.broken_reason = f"The Golem daemon is away: {explain(error)}."
            log.error("%s", self.broken_reason)


def _ignore(event: object) -> None:
    """Take yapapi's events, which it would log otherwise."""

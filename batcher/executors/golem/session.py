"""One session with the Golem daemon: a connection, an allocation, a file server, and a payment processor.

Opened and closed by `executor.py`. What cannot be repaired within a session (the daemon did not respond, the file
server failed, a new day has a new budget) is repaired by opening another.
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

#: The daemon must respond within this time when a session is opened.
_OPEN_SECONDS = 30.0
#: The session ends when all calls to the daemon have failed for this long.
_UNREACHABLE_SECONDS = 8.0
#: Limit for closing yapapi.
_CLOSE_SECONDS = 20.0
#: Attempts to close what is still open at the end, and the pause between them.
_CLEANUP_ATTEMPTS, _CLEANUP_PAUSE_SECONDS = 3, 0.5


class Session:
    """A session; call `open` first.

    :param number: of the session, counted per batcher.
    :param amount: size of the allocation, in GLM.
    :param on_paid: see PaymentProcessor.
    :param on_overbilled: see PaymentProcessor.
    :param on_offer: called with the provider's address and the properties of each offer.
    :param is_gone: returns, for the id of another batcher, whether it no longer runs.
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
        #: Why the session can no longer be used; None while it can.
        self.broken_reason: str | None = None
        #: True when it should be replaced as soon as it has no workers.
        self.is_stale = False
        #: Subscription id -> model: yapapi does not tell the strategy which demand an offer answers.
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
        """Open the session. :raises GolemUnavailable: the daemon cannot be used; says why."""
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
            raise GolemUnavailable(
                f"The Golem daemon at {url} cannot be used: {explain(error)}. "
                "Check that it runs (yagna service run) and has funds (yagna payment status)."
            ) from error
        engine = self.engine
        shield_file_server(engine)
        for task in engine._services:
            task.cancel()  # see payments.py
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
        self._ledger_writer.record_allocation(record)
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
        await self._recover(self._is_left_over)
        log.info("opened a session with the Golem daemon", extra={"allocation": allocation.id})

    @property
    def allocation_id(self) -> str:
        """The id of the session's allocation."""
        return self._allocation_id

    async def _recover(self, is_gone: Callable[[str], bool], *, awaits_invoices: bool = False) -> bool:
        """Close what is left open.

        :param awaits_invoices: whether the end of the session waits for the invoices of what is closed.
        :return: whether all of it is closed; the next session retries.
        """
        recovery = Recovery(self.engine, self._ledger_writer.ledger, tag=self._tag, is_gone=is_gone)
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                await recovery.run(keep_allocations=[self._allocation_id])
        except Exception as error:
            log.warning(
                "demands, agreements or allocations that were left over cannot be closed yet: %s", explain(error)
            )
            return False
        finally:
            if awaits_invoices and self.payment_processor is not None:
                for agreement_id, seconds in recovery.terminated.items():
                    self.payment_processor.expect_invoice(agreement_id, seconds)
        return recovery.is_complete

    async def _close_own(self) -> None:
        """Close what this batcher left open because a call failed: yapapi tries each call only once."""
        for _ in range(_CLEANUP_ATTEMPTS):
            if await self._recover(lambda owner: owner.partition("-")[0] == self._batcher_id, awaits_invoices=True):
                return
            await asyncio.sleep(_CLEANUP_PAUSE_SECONDS)

    def _is_left_over(self, owner: str) -> bool:
        # Earlier sessions of this batcher are over, the current one is not.
        batcher_id, _, _ = owner.partition("-")
        if batcher_id == self._batcher_id:
            return owner not in (self._batcher_id, self.owner.partition(".")[2])
        return self._is_gone(batcher_id)

    async def close(self, settle_seconds: float) -> None:
        """Wait for expected invoices, release the allocation, and close. Never raises."""
        if self._golem is None:
            return
        if self.payment_processor is not None:
            if not self.broken_reason:
                await self._close_own()
            missing = await self.payment_processor.wait_until_settled(0.0 if self.broken_reason else settle_seconds)
            if missing:
                log.warning("%d invoices have not arrived; the next batcher pays them", missing)
            await self.payment_processor.close()
        await self._stop()

    async def _stop(self) -> None:
        if self._golem is None:
            return
        stopped = await run_with_timeout(_CLOSE_SECONDS, self._stop_golem(), "closing the session", log)
        # Partial downloads: the file server ends with yapapi and may have created one until then.
        for file in self._folder.glob("*.part"):
            file.unlink(missing_ok=True)
        if not stopped and self._allocation_id:
            stopped = await run_with_timeout(_CLOSE_SECONDS, self._release(), "releasing the allocation", log)
        if stopped and self._allocation_id:
            self._ledger_writer.record_allocation_release(self._allocation_id)

    async def _stop_golem(self) -> None:
        if self._golem.operative:
            await self._golem.stop(wait_for_payments=False)
        else:  # it started in part; that part must be closed
            with contextlib.suppress(Exception):
                await self.engine._stack.aclose()

    async def _release(self) -> None:
        """Release the allocation over a new connection: yapapi closes its own even if its attempt failed."""
        from ya_payment import RequestorApi

        async with self.engine._api_config.payment() as client:
            try:
                await RequestorApi(client).release_allocation(self._allocation_id)
            except Exception as error:
                if getattr(error, "status", None) not in (404, 410):
                    raise

    # Callbacks of yapapi and the payment processor

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
            log.warning("a call to the Golem daemon failed, trying again: %s", explain(error))
        elif now - self._failing_since > _UNREACHABLE_SECONDS and self.broken_reason is None:
            self.broken_reason = (
                f"The Golem daemon does not respond: {explain(error)}. The batcher reconnects by itself; "
                "check that the daemon runs (yagna service run)."
            )
            log.error("%s", self.broken_reason)


def _ignore(event: object) -> None:
    """Consume yapapi's events, which it would log otherwise."""

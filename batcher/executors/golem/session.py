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
from typing import Any

from batcher.errors import GolemUnavailable
from batcher.executors.golem.parts import GolemParts
from batcher.executors.golem.payments import PaymentProcessor
from batcher.executors.golem.recovery import Recovery, tagged
from batcher.executors.golem.yapapi_adapter import (
    explain,
    import_yapapi,
    make_strategy,
    run_with_timeout,
    shield_file_server,
    temporary_files_in,
)
from store.rentals.ledger import AllocationRecord

log = logging.getLogger(__name__)

#: Attempts to close what is still open at the end.
_RECOVERY_ATTEMPTS = 3


class Session:
    """A session; call `open` first.

    :param tag: the home's, see `recovery.py`.
    :param amount: size of the allocation, in GLM.
    """

    def __init__(self, parts: GolemParts, *, number: int, tag: str, amount: Decimal) -> None:
        self._parts = parts
        self._timings = parts.timings
        self._batcher_id = parts.context.owner
        self.tag = tag
        self.owner = f"{tag}.{self._batcher_id}-{number}"
        self.day = datetime.now(UTC).date()
        #: Why the session can no longer be used; None while it can.
        self.broken_reason: str | None = None
        #: True when it should be replaced as soon as it has no workers.
        self.is_stale = False
        #: Subscription id -> model: yapapi does not tell the strategy which demand an offer answers.
        self.subscription_models: dict[str, str] = {}
        self._amount = tagged(amount, tag)
        self._golem: Any = None
        self._failing_since: float | None = None
        self.allocation_id = ""
        self.payment_processor: PaymentProcessor | None = None
        self._recovering: asyncio.Task[None] | None = None

    @property
    def engine(self) -> Any:
        """yapapi's engine, once open."""
        return self._golem._engine

    async def open(self, *, awaits_invoices: bool = False) -> None:
        """Open the session.

        :param awaits_invoices: whether the end of the session waits for the invoices of what others left open.
        :raises GolemUnavailable: the daemon cannot be used; says why.
        """
        import_yapapi()
        from yapapi import Golem
        from yapapi.config import ApiConfig

        settings = self._parts.settings
        api_config = ApiConfig(app_key=settings.app_key)
        if settings.api_url:
            api_config.api_url = settings.api_url
        self._golem = Golem(
            budget=self._amount,
            strategy=make_strategy(self._rate_offer),
            subnet_tag=settings.subnet,
            payment_driver=settings.payment_driver,
            payment_network=settings.payment_network,
            event_consumer=lambda event: None,  # yapapi would log them otherwise
            api_config=api_config,
        )
        try:
            with temporary_files_in(self._parts.context.work):
                async with asyncio.timeout(self._timings.open_seconds):
                    await self._golem.start()
        except asyncio.CancelledError:
            await self._stop()
            raise
        except Exception as error:
            url = api_config.api_url
            await self._stop()
            raise GolemUnavailable(
                f"The Golem daemon at {url} cannot be used: {explain(error)}. To find the cause, run: mlg golem check"
            ) from error
        engine = self.engine
        shield_file_server(engine)
        for task in engine._services:
            task.cancel()  # see payments.py
        allocation = engine._budget_allocations[0]
        self.allocation_id = allocation.id
        record = AllocationRecord(
            id=allocation.id,
            batcher_id=self._batcher_id,
            platform=str(allocation.payment_platform),
            address=str(allocation.payment_address),
            amount=self._amount,
            created_at=datetime.now(UTC),
        )
        self._parts.ledger_writer.enqueue(self._parts.ledger.record_allocation, record)
        self.payment_processor = PaymentProcessor(self._parts, self)
        self.payment_processor.start()
        await self._recover(self._is_over, awaits_invoices=awaits_invoices)
        if awaits_invoices:
            await self.payment_processor.settle_known()
        self._recovering = asyncio.create_task(self._keep_recovering())
        log.info("opened a session with the Golem daemon", extra={"allocation": allocation.id})

    async def _recover(self, is_gone: Callable[[str], bool], *, awaits_invoices: bool = False) -> bool:
        """Close what is left open.

        :param awaits_invoices: whether the end of the session waits for the invoices of what is closed.
        :return: whether all of it is closed; the next session retries.
        """
        recovery = Recovery(self._parts, self.engine, tag=self.tag, is_gone=is_gone)
        try:
            await recovery.run(keep_allocation=self.allocation_id)
        except Exception as error:
            log.warning(
                "demands, agreements or allocations that were left over cannot be closed yet: %s", explain(error)
            )
            return False
        finally:
            if awaits_invoices and self.payment_processor is not None:
                for agreement_id in recovery.terminated:
                    self.payment_processor.expect_invoice(agreement_id)
        return recovery.is_complete

    async def _keep_recovering(self) -> None:
        """Close what other batchers leave open that are killed meanwhile, and what could not be closed before."""
        while True:
            await asyncio.sleep(self._timings.recover_again_seconds)
            await self._recover(self._is_over)

    async def _close_own(self) -> None:
        """Close what this batcher left open because a call failed: yapapi tries each call only once."""
        for _ in range(_RECOVERY_ATTEMPTS):
            if await self._recover(lambda owner: owner.partition("-")[0] == self._batcher_id, awaits_invoices=True):
                return
            await asyncio.sleep(self._timings.recovery_pause_seconds)

    def is_left_over(self, owner: object) -> bool:
        """Return whether the owner property of a demand names a session of this home that is over."""
        return self.is_of_this_home(owner) and self._is_over(str(owner).partition(".")[2])

    def is_of_this_home(self, owner: object) -> bool:
        """Return whether the owner property of a demand names a session of this home."""
        return isinstance(owner, str) and owner.partition(".")[0] == self.tag

    def _is_over(self, name: str) -> bool:
        # Earlier sessions of this batcher are over, the current one is not.
        batcher_id, _, _ = name.partition("-")
        if batcher_id == self._batcher_id:
            return name not in (self._batcher_id, self.owner.partition(".")[2])
        return self._parts.is_gone(batcher_id)

    async def close(self, settle_seconds: float) -> None:
        """Wait for expected invoices, release the allocation, and close. Never raises."""
        if self._golem is None:
            return
        if self._recovering is not None:
            self._recovering.cancel()
            await asyncio.gather(self._recovering, return_exceptions=True)
        if self.payment_processor is not None:
            if not self.broken_reason:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._timings.recovery_seconds):
                        await self._close_own()
            missing = await self.payment_processor.wait_until_settled(0.0 if self.broken_reason else settle_seconds)
            if missing:
                log.warning("%d invoices have not arrived; the next batcher pays them", missing)
            await self.payment_processor.close()
        await self._stop()

    async def _stop(self) -> None:
        if self._golem is None:
            return
        seconds = self._timings.stop_seconds
        stopped = await run_with_timeout(seconds, self._stop_golem(), "closing the session", log)
        # Partial downloads: the file server ends with yapapi and may have created one until then.
        for file in self._parts.context.work.glob("*.part"):
            file.unlink(missing_ok=True)
        if not stopped and self.allocation_id:
            stopped = await run_with_timeout(
                self._timings.stop_seconds, self._release(), "releasing the allocation", log
            )
        if stopped and self.allocation_id:
            release = self._parts.ledger.release_allocation
            self._parts.ledger_writer.enqueue(release, self.allocation_id, now=datetime.now(UTC))
        self._golem = None

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
                await RequestorApi(client).release_allocation(self.allocation_id)
            except Exception as error:
                if getattr(error, "status", None) not in (404, 410):
                    raise

    def _rate_offer(self, provider_id: str, properties: Mapping[str, Any], subscription_id: str) -> float:
        """Rate an offer for yapapi's strategy."""
        self._parts.provider_records.record_offer(provider_id, properties)
        model = self.subscription_models.get(subscription_id, "")
        return self._parts.provider_records.rate_offer(model, provider_id, properties)

    def fail(self, reason: str) -> None:
        """Report that the session can no longer be used. The first reason counts."""
        if self.broken_reason is None:
            self.broken_reason = reason
            log.error("%s", reason)

    def report_daemon_error(self, error: BaseException | None) -> None:
        """Report that a call to the daemon failed; None: that it works again."""
        now = time.monotonic()
        if error is None:
            self._failing_since = None
            return
        if self._failing_since is None:
            self._failing_since = now
            log.warning("a call to the Golem daemon failed, trying again: %s", explain(error))
        elif now - self._failing_since > self._timings.unreachable_seconds:
            self.fail(
                f"The Golem daemon does not respond: {explain(error)}. The batcher reconnects by itself; "
                "check that the daemon runs (yagna service run)."
            )

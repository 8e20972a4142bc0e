"""Closes what batchers of this home that no longer run left open: demands, agreements and allocations.

Run by `session.py` at its start and once a minute, and at its end for its own. Demands and agreements are recognised by
the owner property of the demand, even if the batcher was killed before it could record them. An allocation has no
properties: it is recognised by its id in the ledger, or by the last digits of its amount (`tagged`).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from batcher.executors.golem.ledger_writer import describe_agreement
from batcher.executors.golem.offers import BadOffer
from batcher.executors.golem.parts import GolemParts
from batcher.executors.golem.yapapi_adapter import OWNER, explain
from store.errors import StoreError
from store.images import sync_folder

log = logging.getLogger(__name__)

#: Unit of the last digits of an allocation, which are worth nothing and identify its home.
_TAG_UNIT = Decimal("1e-18")
_TAGS = 1_000_000
#: An allocation younger than this that is not in the ledger may belong to a running batcher about to record it.
_UNRECORDED_SECONDS = 120.0
#: Why an agreement ended that a killed batcher left open.
GONE_REASON = "The batcher that made it no longer runs."
#: Statuses of a daemon that does not have a call.
NO_SUCH_CALL = (404, 405, 501)
#: States of an agreement that costs something or still can.
_LIVE_STATES = ("Proposal", "Pending", "Approved")


def home_tag(file: Path) -> str:
    """Return the random name of a home, which providers see; created on the first call, and kept in a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        opened.seek(0)
        tag = opened.read().strip()
        if not tag:
            tag = secrets.token_hex(8)
            opened.write(tag + "\n")
            opened.flush()
            # Lost in a power cut, it would leave agreements that nobody recognises.
            os.fsync(opened.fileno())
            sync_folder(file.parent)
    return tag


def tagged(amount: Decimal, tag: str) -> Decimal:
    """Return an amount whose last digits identify the home of the allocation."""
    return amount.quantize(Decimal("1e-12")) + (int(tag, 16) % (_TAGS - 1) + 1) * _TAG_UNIT


def is_tagged(amount: Decimal, tag: str) -> bool:
    """Return whether an amount was made by `tagged` with this tag."""
    return amount % Decimal("1e-12") == tagged(Decimal(0), tag)


async def end_agreement(engine: Any, agreement_id: str, reason: dict[str, str]) -> None:
    """End an agreement, also one that is not approved yet; does nothing if it has ended.

    :raises Exception: the daemon fails, or the provider approves it at the same moment.
    """
    market = engine._market_api._api
    state = str((await market.get_agreement(agreement_id)).state)
    if state == "Approved":
        await market.terminate_agreement(agreement_id, request_body=reason)
    elif state in _LIVE_STATES:
        # yapapi's client lacks this call.
        url = f"{engine._api_config.market_url}/agreements/{agreement_id}/cancel"
        async with engine._root_api_session.post(url, json=reason) as response:
            response.raise_for_status()


class Recovery:
    """One cleanup. :param is_gone: returns whether the session that an owner names no longer runs."""

    def __init__(self, parts: GolemParts, engine: Any, *, tag: str, is_gone: Callable[[str], bool]) -> None:
        self._parts = parts
        #: How many demands, agreements and allocations were closed.
        self._closed = 0
        #: True as long as nothing failed.
        self.is_complete = True
        #: Agreements that were terminated, so that an invoice follows.
        self.terminated: list[str] = []
        self._engine = engine
        self._market = engine._market_api._api
        self._payment = engine._payment_api._api
        self._ledger = parts.ledger
        self._tag = tag
        self._is_gone = is_gone

    async def run(self, *, keep_allocation: str) -> None:
        """Close all that is left over. Each part is tried, whatever fails; the next run closes the rest.

        :raises StoreError:
        """
        parts: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "demands": self._end_demands,
            "agreements": self._end_agreements,
            "allocations": lambda: self._release_allocations(keep_allocation),
        }
        seconds = self._parts.timings.open_seconds / len(parts)
        for what, close in parts.items():
            await self._try(close(), what, seconds)
        if self._closed:
            log.warning("closed %d demands, agreements and allocations of batchers that no longer run", self._closed)

    async def _end_demands(self) -> None:
        for demand in await self._market.get_demands():
            if self._is_left_over((demand.properties or {}).get(OWNER)):
                await self._close(self._market.unsubscribe_demand(demand.demand_id), "a demand")

    async def _end_agreements(self) -> None:
        # Before the daemon lists its own, so that none that is made meanwhile is missed in the list.
        ids = {each.id: None for each in await asyncio.to_thread(self._ledger.agreements, is_open=True)}
        is_all = await self._try(self._add_live(ids), "agreements that are not in the ledger")
        for id in ids:
            is_all &= await self._try(self._end_agreement(id), "an agreement")
        if is_all:
            # What was reserved for an agreement has been committed to it.
            await asyncio.to_thread(self._parts.money.recover, self._is_gone)

    async def _add_live(self, ids: dict[str, None]) -> None:
        """Add the agreements that cost something or still can, as the daemon lists them."""
        # yapapi's client cannot list agreements, so this call is made without it.
        url, http = f"{self._engine._api_config.market_url}/agreements", self._engine._root_api_session
        for state in _LIVE_STATES:
            async with http.get(url, params={"state": state}) as response:
                if response.status in NO_SUCH_CALL:
                    log.info("the daemon cannot list agreements: those that are not in the ledger are not found")
                    return
                response.raise_for_status()
                ids.update((entry["id"], None) for entry in await response.json())

    async def _end_agreement(self, id: str) -> None:
        """End an agreement that is left over, and record its end."""
        try:
            agreement = await self._market.get_agreement(id)
        except Exception as error:
            if getattr(error, "status", None) != 404:
                raise
            # Another daemon's, or deleted. What its batcher committed to it counts until it is written off.
            await asyncio.to_thread(self._end_unknown, id)
            return
        if not self._is_left_over((agreement.demand.properties or {}).get(OWNER)):
            return
        was_approved = agreement.state == "Approved"
        if was_approved:
            await asyncio.to_thread(self._commit, agreement)
        if agreement.state in _LIVE_STATES:
            reason = {"message": "The requestor no longer runs", "golem.requestor.code": "Cancelled"}
            if not await self._close(end_agreement(self._engine, id, reason), "an agreement"):
                return
            if was_approved:
                self.terminated.append(id)
        if id in self._parts.money.running:
            self._parts.money.end_agreement(id, GONE_REASON)
        else:
            await asyncio.to_thread(self._record_end, agreement)

    async def _release_allocations(self, keep: str) -> None:
        recorded = {each.id: each for each in await asyncio.to_thread(self._ledger.allocations)}
        for allocation in await self._payment.get_allocations():
            id, record = allocation.allocation_id, recorded.get(allocation.allocation_id)
            if record is None:
                age = (datetime.now(UTC) - allocation.timestamp).total_seconds()
                is_left_over = is_tagged(Decimal(str(allocation.total_amount)), self._tag) and age > _UNRECORDED_SECONDS
            else:
                is_left_over = self._is_gone(record.batcher_id)
            if not is_left_over or id == keep:
                continue
            if await self._close(self._payment.release_allocation(id), "an allocation"):
                await asyncio.to_thread(self._ledger.release_allocation, id, now=datetime.now(UTC))

    def _is_left_over(self, owner: object) -> bool:
        if not isinstance(owner, str):
            return False
        tag, _, batcher = owner.partition(".")
        return tag == self._tag and self._is_gone(batcher)

    def _commit(self, agreement: Any) -> None:
        """Record an agreement, and what it may cost by now: its batcher may have been killed before it did."""
        with contextlib.suppress(BadOffer):
            record, price = describe_agreement(agreement, allocation_id="unknown")
            batcher_id = agreement.demand.properties[OWNER].partition(".")[2].partition("-")[0]
            seconds = (datetime.now(UTC) - record.created_at).total_seconds()
            commitment = self._parts.money.commitment(secrets.token_hex(16), batcher_id, record, price, seconds)
            self._ledger.record_agreement(record, commitment)

    def _record_end(self, agreement: Any) -> None:
        """Record that an agreement has ended; if it did so by itself, nobody knows when, so the latest time counts."""
        known, now = self._ledger.agreement(agreement.agreement_id), min(datetime.now(UTC), agreement.valid_to)
        owed = None
        if known is not None:
            with contextlib.suppress(BadOffer):
                _, price = describe_agreement(agreement, allocation_id="unknown")
                owed = self._parts.timings.bill_limit(price, (now - known.created_at).total_seconds())
        self._ledger.end_agreement(agreement.agreement_id, reason=GONE_REASON, now=now, owed=owed)

    def _end_unknown(self, id: str) -> None:
        """End an agreement in the ledger that the daemon does not know, if nobody is left who uses it."""
        agreement, now = self._ledger.agreement(id), datetime.now(UTC)
        if agreement is None:
            return
        # One without a reservation was made by the batcher of its allocation.
        batchers = {each.id: each.batcher_id for each in self._ledger.allocations()}
        reservations = self._parts.money.reservations.list(is_open=True)
        committed = {each.agreement_id: each.batcher_id for each in reservations}
        batcher_id = committed.get(id, batchers.get(agreement.allocation_id))
        # No agreement is made for longer than this.
        expires_at = agreement.created_at + timedelta(seconds=self._parts.timings.max_agreement_seconds)
        if now > expires_at or (batcher_id is not None and self._is_gone(batcher_id)):
            self._ledger.end_agreement(id, reason=GONE_REASON, now=min(now, expires_at))

    async def _close(self, call: Awaitable[Any], what: str) -> bool:
        try:
            await call
        except Exception as error:
            if getattr(error, "status", None) not in (404, 410):  # those mean that it is closed already
                log.warning("%s that was left over cannot be closed: %s", what, explain(error))
                self.is_complete = False
                return False
        self._closed += 1
        return True

    async def _try(self, step: Awaitable[None], what: str, seconds: float | None = None) -> bool:
        """Run a step, and log its failure. :return: whether it succeeded, within so many seconds if any are given."""
        try:
            # Not wait_for, which in Python 3.11 loses a cancellation that comes as the step ends.
            async with asyncio.timeout(seconds):
                await step
        except StoreError:
            raise
        except Exception as error:
            log.warning("%s that may be left over cannot be closed yet: %s", what, explain(error))
            self.is_complete = False
            return False
        return True

"""Closes what batchers of this home that no longer run left open: demands, agreements and allocations.

Run by `session.py` at its start, and at its end for its own. Demands and agreements are recognised by the owner
property of the demand, even if the batcher was killed before it could record them. An allocation has no properties: it
is recognised by its id in the ledger, or by the last digits of its amount (`tagged`).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from batcher.executors.golem.ledger_writer import describe_agreement
from batcher.executors.golem.money import GONE_REASON
from batcher.executors.golem.offers import BadOffer
from batcher.executors.golem.parts import GolemParts
from batcher.executors.golem.yapapi_adapter import OWNER, explain

log = logging.getLogger(__name__)

#: Unit of the last digits of an allocation, which are worth nothing and identify its home.
_TAG_UNIT = Decimal("1e-18")
_TAGS = 1_000_000
#: An allocation younger than this that is not in the ledger may belong to a running batcher about to record it.
_UNRECORDED_SECONDS = 120.0
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
        #: Agreements that could not be ended.
        self._running: set[str] = set()
        #: How many demands, agreements and allocations were closed.
        self._closed = 0
        #: True as long as nothing failed.
        self.is_complete = True
        #: Agreements that were terminated, so that an invoice follows -> their seconds.
        self.terminated: dict[str, float] = {}
        self._engine = engine
        self._market = engine._market_api._api
        self._payment = engine._payment_api._api
        self._ledger = parts.ledger
        self._tag = tag
        self._is_gone = is_gone

    async def run(self, *, keep_allocation: str) -> None:
        """Close all that is left over. :raises Exception: the daemon fails; the next run closes the rest."""
        for demand in await self._market.get_demands():
            if self._is_left_over((demand.properties or {}).get(OWNER)):
                await self._try(self._market.unsubscribe_demand(demand.demand_id), "a demand")
        await self._end_agreements()
        # After that, because what was reserved for an agreement is committed to it first.
        await asyncio.to_thread(self._parts.money.recover, self._is_gone, running=self._running)
        await self._release_allocations(keep_allocation)
        if self._closed:
            log.warning("closed %d demands, agreements and allocations of batchers that no longer run", self._closed)

    async def _end_agreements(self) -> None:
        listed: list[dict[str, Any]] = []
        # yapapi's client cannot list agreements, so this call is made without it.
        url, http = f"{self._engine._api_config.market_url}/agreements", self._engine._root_api_session
        for state in _LIVE_STATES:
            async with http.get(url, params={"state": state}) as response:
                response.raise_for_status()
                listed += await response.json()
        for entry in listed:
            agreement = await self._market.get_agreement(entry["id"])
            if self._is_left_over((agreement.demand.properties or {}).get(OWNER)):
                if agreement.state == "Approved":
                    await asyncio.to_thread(self._commit, agreement)
                reason = {"message": "The requestor no longer runs", "golem.requestor.code": "Cancelled"}
                id, now = agreement.agreement_id, datetime.now(UTC)
                if await self._try(end_agreement(self._engine, id, reason), "an agreement"):
                    if agreement.state == "Approved":
                        self.terminated[id] = (now - agreement.timestamp).total_seconds()
                    await asyncio.to_thread(self._ledger.end_agreement, id, reason=GONE_REASON, now=now)
                else:
                    self._running.add(id)

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
            if await self._try(self._payment.release_allocation(id), "an allocation"):
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

    async def _try(self, call: Awaitable[Any], what: str) -> bool:
        try:
            await call
        except Exception as error:
            if getattr(error, "status", None) not in (404, 410):  # those mean that it is closed already
                log.warning("%s that was left over cannot be closed: %s", what, explain(error))
                self.is_complete = False
                return False
        self._closed += 1
        return True

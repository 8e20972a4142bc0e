"""Closes what a batcher of this home that is no more has left open at the daemon: demands, agreements, allocations.

Run by `session.py` at its start. Ours are recognized by the owner that every demand carries, so that even what was
agreed in the moment of a kill, before it could be noted, is found; an allocation, which carries nothing, by its id in
the ledger or by its odd last digits.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import secrets
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from batcher.executors.golem.books import Books
from batcher.executors.golem.market import describe
from batcher.executors.golem.prices import BadOffer
from batcher.executors.golem.yapapi_edge import OWNER, explain
from server.store.money import AgreementRecord

log = logging.getLogger(__name__)

#: Digits below this are worth nothing, and tell whose allocation it is.
_TAG_UNIT = Decimal("1e-18")
_TAGS = 1_000_000


def home_tag(file: Path) -> str:
    """Return the random name of a home, made once: providers see it, and it tells them nothing."""
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
    """Return an amount whose last digits say whose allocation it is."""
    return amount.quantize(Decimal("1e-12")) + (int(tag, 16) % (_TAGS - 1) + 1) * _TAG_UNIT


def is_tagged(amount: Decimal, tag: str) -> bool:
    """Tell whether an amount was made by `tagged` with this tag."""
    return amount % Decimal("1e-12") == (int(tag, 16) % (_TAGS - 1) + 1) * _TAG_UNIT


class Recovery:
    """One clean-up.

    :param engine: yapapi's, started.
    :param is_gone: tells of an owner whether nobody works under that name any more.
    """

    def __init__(self, engine: Any, books: Books, *, tag: str, is_gone: Callable[[str], bool]) -> None:
        self._market = engine._market_api._api
        # yapapi's client knows no list of agreements, so that one call is made without it.
        self._http = engine._root_api_session
        self._agreements_url = f"{engine._api_config.market_url}/agreements"
        self._payment = engine._payment_api._api
        self._books = books
        self._tag = tag
        self._is_gone = is_gone

    async def run(self, *, keep_allocations: Iterable[str]) -> int:
        """Close everything that nobody works with. :return: how many demands, agreements and allocations that were.

        :param keep_allocations: ids that are in use.
        :raises Exception: the daemon fails; what is left is closed by the next run.
        """
        closed = await self._close_demands()
        closed += await self._end_agreements()
        closed += await self._release_allocations(set(keep_allocations))
        if closed:
            log.warning("closed %d demands, agreements and allocations of batchers that are gone", closed)
        return closed

    async def _close_demands(self) -> int:
        closed = 0
        for demand in await self._market.get_demands():
            if self._is_left_over((demand.properties or {}).get(OWNER)):
                closed += await self._try(self._market.unsubscribe_demand(demand.demand_id), "a demand")
        return closed

    async def _end_agreements(self) -> int:
        ended = 0
        async with self._http.get(self._agreements_url, params={"state": "Approved"}) as response:
            response.raise_for_status()
            listed = await response.json()
        for entry in listed:
            agreement = await self._market.get_agreement(entry["id"])
            if self._is_left_over((agreement.demand.properties or {}).get(OWNER)):
                await asyncio.to_thread(self._note, agreement)
                reason = {"message": "The requestor went away", "golem.requestor.code": "Cancelled"}
                ended += await self._try(
                    self._market.terminate_agreement(agreement.agreement_id, request_body=reason), "an agreement"
                )
                await asyncio.to_thread(
                    self._books.end_agreement,
                    agreement.agreement_id,
                    reason="The batcher that made it went away.",
                    now=datetime.now(UTC),
                )
        return ended

    async def _release_allocations(self, keep: set[str]) -> int:
        released = 0
        noted = {each.id: each for each in await asyncio.to_thread(self._books.allocations)}
        for allocation in await self._payment.get_allocations():
            id, record = allocation.allocation_id, noted.get(allocation.allocation_id)
            is_ours = record is not None or is_tagged(Decimal(str(allocation.total_amount)), self._tag)
            is_left_over = id not in keep and is_ours
            if is_left_over and (record is None or self._is_gone(record.batcher_id)):
                released += await self._try(self._payment.release_allocation(id), "an allocation")
                await asyncio.to_thread(self._books.release_allocation, id, now=datetime.now(UTC))
        return released

    def _is_left_over(self, owner: object) -> bool:
        if not isinstance(owner, str):
            return False
        tag, _, batcher = owner.partition(".")
        return tag == self._tag and self._is_gone(batcher)

    def _note(self, agreement: Any) -> None:
        """Note an agreement that was made in the moment of a kill."""
        properties = agreement.offer.properties
        try:
            name, price = describe(properties, agreement.offer.provider_id)
        except BadOffer:
            return
        self._books.note_agreement(
            AgreementRecord(
                id=agreement.agreement_id,
                allocation_id="unknown",
                provider_id=agreement.offer.provider_id,
                provider_name=name,
                model=str(agreement.demand.properties.get("golem.srv.app.mlg.model", "unknown")),
                start_price=price.start,
                price_per_cpu_second=price.cpu_second,
                price_per_second=price.second,
                created_at=agreement.timestamp,
            )
        )

    @staticmethod
    async def _try(call: Any, what: str) -> int:
        try:
            await call
        except Exception as error:
            if getattr(error, "status", None) in (404, 410):
                return 1  # somebody was first
            log.warning("%s of a batcher that is gone could not be closed: %s", what, explain(error))
            return 0
        return 1

"""Money: every amount is reserved in the ledger before it can come to be owed. Amounts in GLM.

`worker_pool.py` reserves a start and a chunk before it makes an agreement and commits when it has one; `worker.py`
extends the reservation before further chunks and while a worker idles; `end_agreement` replaces it by what the
agreement may cost until the end that the daemon acknowledged, and `payments.py` settles it with the bill, in the
transaction that records the invoice. All batchers of a home reserve in the same table, so the caps hold for them
together. The rules are in `store/rentals/reservations.py`; how much an agreement may cost is `GolemTimings.cost_limit`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from batcher.errors import BudgetReached
from batcher.executors.golem.ledger_writer import LedgerWriter
from batcher.executors.golem.offers import Price
from batcher.executors.golem.timings import GolemTimings
from store.amounts import ZERO
from store.errors import StoreBusy
from store.rentals.decisions import BillKind
from store.rentals.ledger import AgreementRecord
from store.rentals.reservations import Denial, ReservationRecord, ReservationState, amount_left, check_caps
from store.store import Store

log = logging.getLogger(__name__)

#: With less than this, in GLM, nothing can be done.
_SMALLEST_AMOUNT = Decimal("1e-9")
#: Name of a cap -> its title, its setting, and what to do when it is reached.
_MESSAGES = {
    "run": ("The budget of this run", "MLG_BUDGET_RUN", "Raise MLG_BUDGET_RUN, or start another run."),
    "day": (
        "The budget of the day",
        "MLG_BUDGET_DAY",
        "Work continues by itself tomorrow (UTC), or immediately with a higher MLG_BUDGET_DAY.",
    ),
    "total": ("The total budget", "MLG_BUDGET_TOTAL", "Raise MLG_BUDGET_TOTAL."),
}


def describe_denial(denial: Denial) -> str:
    """Return, in a sentence, which cap is reached and what to do."""
    title, variable, remedy = _MESSAGES[denial.cap]
    if denial.extra > denial.limit:
        return (
            f"{title} is too small: the next step may cost up to {_format_amount(denial.extra)} GLM, and the limit is "
            f"{_format_amount(denial.limit)} GLM. Raise {variable}; lower values of MLG_GOLEM_START_SECONDS and "
            "MLG_CHUNK_TIMEOUT_SECONDS make a step cheaper."
        )
    return (
        f"{title} is used up: {_format_amount(denial.used)} of {_format_amount(denial.limit)} GLM are spent or "
        f"committed, and the next step may cost up to {_format_amount(denial.extra)} GLM. {remedy}"
    )


class Money:
    """One batcher's spending.

    :param caps: run, day, total -> the most that may be spent.
    """

    def __init__(
        self,
        store: Store,
        ledger_writer: LedgerWriter,
        *,
        owner: str,
        caps: Mapping[str, Decimal],
        timings: GolemTimings,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ledger_writer = ledger_writer
        self.ledger = store.ledger
        self.reservations = store.reservations
        self.decisions = store.decisions
        self.owner = owner
        self.timings = timings
        self.clock = clock
        self.monotonic = monotonic
        #: The agreements of this batcher that run: id -> what is committed to it.
        self.running: dict[str, Reservation] = {}
        self._caps = dict(caps)
        #: Purpose -> the cheapest step for it that the caps did not allow, and have had no room for since; under "" a
        #: step for any purpose.
        self._denials: dict[str, Denial] = {}

    async def start(self) -> None:
        """Make the caps known to the store."""
        await asyncio.to_thread(self.reservations.set_caps, self.owner, self._caps)

    async def reserve(self, purpose: str, amount: Decimal) -> Reservation:
        """Reserve what an agreement may cost at first. :raises BudgetReached: a cap forbids it. :raises StoreError:"""
        reservation = Reservation(self, secrets.token_hex(16), purpose, amount)
        await self.raise_to(reservation.id, purpose, amount)
        for each in ("", purpose):
            self._denials.pop(each, None)
        return reservation

    async def raise_to(self, id: str, purpose: str, amount: Decimal) -> None:
        """Make or raise a reservation. :raises BudgetReached: a cap does not allow it. :raises StoreError:"""
        denial = await asyncio.to_thread(
            self.reservations.reserve, id, batcher_id=self.owner, purpose=purpose, amount=amount, now=self.clock()
        )
        if denial is not None:
            raise self._deny(purpose, denial)

    def commitment(
        self, id: str, batcher_id: str, agreement: AgreementRecord, price: Price, seconds: float
    ) -> ReservationRecord:
        """Return the commitment of an agreement that is paid for until some seconds after its start."""
        return ReservationRecord(
            id=id,
            batcher_id=batcher_id,
            purpose=agreement.model,
            amount=self.timings.cost_limit(price, seconds),
            state=ReservationState.COMMITTED,
            agreement_id=agreement.id,
            changed_at=self.clock(),
        )

    def commit_unused(self, agreement: AgreementRecord, price: Price) -> None:
        """Record an agreement that gets no activity: only its start may be billed, and is committed."""
        start = replace(price, cpu_second=ZERO, second=ZERO)
        Reservation(self, secrets.token_hex(16), agreement.model, ZERO).commit(agreement, start, 0.0, is_unused=True)

    async def left(self) -> Decimal | None:
        """Return what may be spent today; None without a limit. :raises BudgetReached: nothing. :raises StoreError:"""
        used = await self._used()
        denial = check_caps(self._caps, used, _SMALLEST_AMOUNT)
        if denial is not None:
            raise self._deny("", denial)
        return amount_left(self._caps, used)

    def unavailable_reason(self, purpose: str) -> str | None:
        """Return, in a sentence, why nothing more can be spent for a purpose now; None if it can."""
        denial = self._denials.get("") or self._denials.get(purpose)
        return None if denial is None else describe_denial(denial)

    async def refresh(self) -> None:
        """Look whether there is room again for what was denied. :raises StoreError:"""
        if self._denials:
            used = await self._used()
            for purpose, denial in list(self._denials.items()):
                if check_caps(self._caps, used, denial.extra) is None:
                    self._denials.pop(purpose, None)

    def end_agreement(self, agreement_id: str, reason: str) -> None:
        """Record that the daemon has acknowledged the end of an agreement, and what it may have cost until now."""
        reservation, now = self.running.pop(agreement_id, None), self.clock()
        owed = None
        if reservation is not None and reservation.agreement is not None and reservation.price is not None:
            seconds = reservation.seconds()
            now = reservation.agreement.created_at + timedelta(seconds=seconds)
            owed = self.timings.bill_limit(reservation.price, seconds)
        self.ledger_writer.enqueue(self.ledger.end_agreement, agreement_id, reason=reason, now=now, owed=owed)

    def recover(self, is_gone: Callable[[str], bool]) -> None:
        """Release what batchers that no longer run reserved without an agreement.

        Called in a thread, after what they left at the daemon is committed.
        """
        for batcher_id in self.reservations.reserving_batchers():
            if batcher_id != self.owner and is_gone(batcher_id):
                self.reservations.release_all_of(batcher_id)
                self.reservations.set_caps(batcher_id, {})

    def write_off(self, unsettled: Iterable[AgreementRecord]) -> None:
        """Write off those agreements that ended so long ago that no bill is expected any more. Called in a thread.

        Those with an invoice that is to be paid are left out, though it could not be paid yet.
        """
        now = self.clock()
        before = now - timedelta(seconds=self.timings.write_off_seconds)
        ids = [each.id for each in unsettled if each.ended_at is not None and each.ended_at < before]
        if ids:
            unfinished = self.decisions.unfinished()
            owed = {each.agreement_id for each in unfinished if each.kind is BillKind.INVOICE and not each.is_refused}
            ids = [id for id in ids if id not in owed]
        written_off = self.ledger.write_off(ids, now=now) if ids else []
        if written_off:
            log.warning("%d agreements were never billed and are written off", len(written_off))

    def has_leftovers(self, is_gone: Callable[[str], bool]) -> bool:
        """Return whether something is open that no running batcher but this one will settle."""
        found = self.reservations.list(is_open=True)
        return any(each.batcher_id == self.owner or is_gone(each.batcher_id) for each in found)

    def release_all(self) -> None:
        """Release what is reserved without an agreement; called when no agreement is being made."""
        self.ledger_writer.enqueue(self.reservations.release_all_of, self.owner)

    def close(self) -> None:
        """Release what is reserved without an agreement, and forget the caps."""
        self.release_all()
        self.ledger_writer.enqueue(self.reservations.set_caps, self.owner, {})

    def _deny(self, purpose: str, denial: Denial) -> BudgetReached:
        known = self._denials.get(purpose)
        if known is None:
            log.warning("%s", describe_denial(denial))
        if known is None or denial.extra < known.extra:
            self._denials[purpose] = denial
        return BudgetReached(describe_denial(denial))

    async def _used(self) -> Mapping[str, Decimal]:
        return await asyncio.to_thread(self.reservations.used, self.owner, now=self.clock())


class Reservation:
    """What one agreement may cost, before and after it is made."""

    def __init__(self, money: Money, id: str, purpose: str, amount: Decimal) -> None:
        self.id = id
        #: What was reserved at first.
        self.amount = amount
        #: Until when the agreement is paid for, in seconds after its start.
        self.covered_seconds = 0.0
        self._money = money
        self._purpose = purpose
        #: The agreement and its price, once it is committed.
        self.agreement: AgreementRecord | None = None
        self.price: Price | None = None
        #: True if the agreement gets no activity, so that only its start may be billed.
        self.is_unused = False
        self._committing: asyncio.Future[None] | None = None
        self._committed_at = 0.0

    def seconds(self) -> float:
        """Return how long ago it was committed, 0 without an activity.

        By the clock that says more: the monotonic one stands still while the machine is suspended, and the other one
        may be set back.
        """
        assert self.agreement is not None, "it is not committed"
        if self.is_unused:
            return 0.0
        since = (self._money.clock() - self.agreement.created_at).total_seconds()
        return max(since, self._money.monotonic() - self._committed_at)

    def commit(self, agreement: AgreementRecord, price: Price, seconds: float, *, is_unused: bool = False) -> None:
        """Record an agreement, and commit what it costs until some seconds after its start."""
        self.agreement, self.price, self.covered_seconds, self.is_unused = agreement, price, seconds, is_unused
        self._committed_at = self._money.monotonic()
        self._money.running[agreement.id] = self
        commitment = self._money.commitment(self.id, self._money.owner, agreement, price, seconds)
        ledger = self._money.ledger
        self._committing = self._money.ledger_writer.enqueue(ledger.record_agreement, agreement, commitment)

    async def extend(self, seconds: float) -> None:
        """Reserve more, so that the agreement is paid for until some seconds after its start.

        :raises BudgetReached: a cap does not allow it.
        :raises StoreError:
        """
        assert self.price is not None and self._committing is not None, "extended before it was committed"
        if seconds <= self.covered_seconds:
            return
        await asyncio.wait({self._committing}, timeout=self._money.timings.idle_poll_seconds)
        if not self._committing.done():
            raise StoreBusy()
        await self._money.raise_to(self.id, self._purpose, self._money.timings.cost_limit(self.price, seconds))
        self.covered_seconds = max(seconds, self.covered_seconds)

    def lower(self, seconds: float) -> None:
        """Give back what lies beyond some seconds after the agreement's start."""
        assert self.price is not None
        if seconds < self.covered_seconds:
            amount = self._money.timings.cost_limit(self.price, seconds)
            lower = self._money.reservations.lower
            # A later `extend` waits for it, so that it is not lowered afterwards.
            self._committing = self._money.ledger_writer.enqueue(lower, self.id, amount, now=self._money.clock())
            self.covered_seconds = seconds

    def release(self) -> None:
        """Give it up, because no agreement came of it."""
        self._money.ledger_writer.enqueue(self._money.reservations.release, self.id)


def _format_amount(amount: Decimal) -> str:
    """Format an amount for people: at most six decimal places, no exponent."""
    return f"{amount:.6f}".rstrip("0").rstrip(".") or "0"

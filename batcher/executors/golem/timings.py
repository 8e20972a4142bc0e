"""Intervals, limits and tolerances of the golem executor, and what follows from them and measured speeds. Pure.

They suit a public network. They are no settings; tests shorten them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal

from batcher.backoff import Backoff
from batcher.executors.golem.offers import Price


@dataclass(frozen=True, kw_only=True)
class GolemTimings:
    """Intervals and limits, in seconds where nothing else is said."""

    # The executor

    #: Interval at which the number of workers is adjusted to the queue.
    step_seconds: float = 0.2
    #: Interval at which bans, scores and spending are read from the store.
    refresh_seconds: float = 5.0
    #: Pauses after a session could not be opened.
    session_backoff: Backoff = Backoff(first_seconds=1.0, max_seconds=30.0)
    #: Waiting requests show a reason once a chunk has been queued for this long.
    explain_wait_seconds: float = 5.0
    #: A demand without work for this long is withdrawn.
    unused_pool_seconds: float = 60.0
    #: A model that had work within this time keeps its minimum of workers.
    min_workers_seconds: float = 3600.0
    #: When the executor closes, workers get this long to end by themselves; their chunks are released before.
    close_seconds: float = 1.0
    #: Pauses while the store does not accept a record, and the limit for the last records at the end.
    ledger_backoff: Backoff = Backoff(first_seconds=0.2, max_seconds=5.0)
    ledger_close_seconds: float = 5.0

    # Sessions

    #: The daemon must respond within this time when a session is opened.
    open_seconds: float = 30.0
    #: The session ends when all calls to the daemon have failed for this long.
    unreachable_seconds: float = 8.0
    #: Limit for closing yapapi.
    stop_seconds: float = 20.0
    #: Pause between two attempts to close what is still open at the end.
    recovery_pause_seconds: float = 0.5

    # Demands

    #: Time to collect offers after the first, so that the best is taken.
    collect_offers_seconds: float = 1.0
    #: A demand that brings no worker and no negotiation for this long, though a worker is needed, is published again:
    #: otherwise providers that were rejected or banned make no new offer. Longer each time, until there is a worker:
    #: publishing ends the negotiations under way, and a distant provider is slow.
    stale_demand_backoff: Backoff = Backoff(first_seconds=20.0, max_seconds=120.0)
    #: Pauses after a demand failed.
    search_backoff: Backoff = Backoff(first_seconds=0.5, max_seconds=15.0)
    #: A demand is replaced this long before its agreements expire.
    renewal_seconds: float = 120.0
    #: Limit for yapapi's calls at the end of an activity.
    cleanup_seconds: float = 5.0
    #: Pauses between attempts to end an agreement.
    terminate_backoff: Backoff = Backoff(first_seconds=0.5, max_seconds=8.0, factor=4.0)

    # Workers

    #: An HTTP call can hang beyond the script's own timeout; the worker is then stopped this much later.
    overtime_seconds: float = 10.0
    #: Longest wait for work before the state is checked again.
    idle_poll_seconds: float = 1.0
    #: Money for a start and for idling is reserved for this long at a time; chunks are reserved until their timeout.
    cover_seconds: float = 60.0
    #: A chunk may take this many times its expected duration, because a provider's machine is shared, and some seconds
    #: more, for loading the model and for a slow daemon.
    timeout_factor: float = 5.0
    timeout_grace_seconds: float = 30.0
    #: A chunk that takes this many times its expected duration, plus some seconds, gets a second attempt.
    straggler_factor: float = 3.0
    straggler_grace_seconds: float = 2.0
    #: The slowest transfer that is waited for, in bytes per second; the time for it is added to all others.
    min_bytes_per_second: float = 200_000.0

    # Bills

    #: A bill may exceed the local estimate by this factor and time: clocks differ, and an activity ends later there.
    bill_tolerance: Decimal = Decimal("1.05")
    bill_tolerance_seconds: float = 15.0
    #: Interval at which all unsettled invoices are fetched, in addition to the events.
    review_seconds: float = 30.0
    #: Pauses after the daemon failed, and the timeout of a poll, which the daemon holds for 5 s.
    payment_backoff: Backoff = Backoff(first_seconds=0.5, max_seconds=10.0)
    poll_limit_seconds: float = 20.0
    #: An agreement that ended this long ago without a bill no longer counts against the budget.
    write_off_seconds: float = 86_400.0

    def cost_limit(self, price: Price, seconds: float) -> Decimal:
        """Return the most that an agreement can come to cost: its start, and all seconds until its end, work or not.

        So much is reserved before, and no higher bill is paid.
        """
        return price.max_cost(seconds + self.bill_tolerance_seconds) * self.bill_tolerance

    def chunk_timeout(
        self, *, items: int, size_bytes: int, images_per_second: float | None, max_seconds: float
    ) -> float:
        """Return how long a chunk may take, transfer included.

        :param images_per_second: None if unknown.
        :param max_seconds: the most that it may take without the transfer.
        """
        transfer = size_bytes / self.min_bytes_per_second
        if images_per_second is None or images_per_second <= 0:
            return max_seconds + transfer
        return transfer + min(max_seconds, self.timeout_grace_seconds + self.timeout_factor * items / images_per_second)

    def straggler_seconds(self, *, items: int, images_per_second: float | None) -> float:
        """Return after how long an idle worker may try a chunk too; infinite if the speed is unknown."""
        if images_per_second is None or images_per_second <= 0:
            return math.inf
        return self.straggler_grace_seconds + self.straggler_factor * items / images_per_second


def idle_seconds(price: Price, *, start_seconds: float, max_seconds: float) -> float:
    """Return how long an activity may idle before that has cost as much as a new start.

    Without knowledge of the future this costs at most twice the optimum (the ski rental problem).

    :param start_seconds: how long the start took; it is paid for too.
    """
    if price.second <= 0:
        return max_seconds
    return min(max_seconds, float(price.start / price.second) + start_seconds)

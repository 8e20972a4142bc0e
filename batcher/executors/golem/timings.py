"""Intervals, limits and tolerances of the golem executor, and what follows from them and measured speeds. Pure.

They suit a public network. They are no settings; tests shorten them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from batcher.backoff import Backoff
from batcher.executors.golem.offers import Price
from provider_image.schemas import MAX_ITEMS


@dataclass(frozen=True, kw_only=True)
class GolemTimings:
    """Intervals and limits, in seconds where nothing else is said."""

    # The executor

    #: Interval at which the number of workers is adjusted to the queue.
    step_seconds: float = 0.05
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
    #: Pause between two attempts to close what is still open at the end, and the limit for all of them.
    recovery_pause_seconds: float = 0.5
    recovery_seconds: float = 15.0
    #: Interval at which a session looks for what other batchers left open.
    recover_again_seconds: float = 60.0

    # Demands

    #: Time to collect offers after the first, so that the best is taken; less if none comes for a while, no provider is
    #: still negotiating, and as many are there as workers are needed.
    collect_offers_seconds: float = 1.0
    quiet_offers_seconds: float = 0.25
    #: A demand that brings no worker and no negotiation for this long, though a worker is needed, is published again:
    #: otherwise providers that were rejected or banned make no new offer. Longer each time, until there is a worker:
    #: publishing ends the negotiations under way, and a distant provider is slow.
    stale_demand_backoff: Backoff = Backoff(first_seconds=20.0, max_seconds=120.0)
    #: Pauses after a demand failed.
    search_backoff: Backoff = Backoff(first_seconds=0.5, max_seconds=15.0)
    #: Providers refuse an agreement that would expire sooner than this.
    min_agreement_seconds: float = 300.0
    #: From five hours on, providers demand interim payments, which yapapi does not handle well.
    max_agreement_seconds: float = 17_900.0
    #: Time to collect offers and to sign an agreement, before its start begins.
    signing_seconds: float = 30.0
    #: Limit for yapapi's calls at the end of an activity.
    cleanup_seconds: float = 5.0
    #: Pauses between attempts to end an agreement.
    terminate_backoff: Backoff = Backoff(first_seconds=0.5, max_seconds=8.0, factor=4.0)

    # Workers

    #: An HTTP call can hang beyond the script's own timeout; the worker is then stopped this much later.
    overtime_seconds: float = 10.0
    #: Longest wait for work before the state is checked again.
    idle_poll_seconds: float = 1.0
    #: Interval at which the size of a results file is checked while a provider may send it.
    receive_poll_seconds: float = 0.25
    #: Money for idling is reserved for this long at a time; a start with its first chunk, and each chunk, as a whole.
    cover_seconds: float = 60.0
    #: A chunk may take this many times its expected duration, because a provider's machine is shared, and some seconds
    #: more, for loading the model and for a slow daemon.
    timeout_factor: float = 5.0
    timeout_grace_seconds: float = 30.0
    #: A chunk that takes this many times its expected duration, plus some seconds, gets a second attempt.
    straggler_factor: float = 3.0
    straggler_grace_seconds: float = 2.0
    #: A script waits for the chunks that a provider computes in so many seconds, for one at least and so many at most.
    #: As many are computed while the next script is on its way. A provider that takes longer than `ahead_seconds` for a
    #: full chunk gets one at a time: it loses little between two of them, and another may be free sooner.
    script_seconds: float = 2.0
    max_script_chunks: int = 4
    ahead_seconds: float = 10.0
    #: Transfers are quick when the chunks of a script are sent while a provider computes this many: images without
    #: compression have 2.4 times the bytes. They no longer are when it takes this share of as many as are sent.
    quick_transfer_chunks: float = 1.2
    slow_transfer_share: float = 0.8
    #: The slowest transfer that is waited for, in bytes per second; the time for it is added to all others.
    min_bytes_per_second: float = 200_000.0

    # Bills

    #: A bill may exceed the cost of the time from the agreement's start to its end by this factor, because a provider
    #: measures processor time more coarsely. It is a factor and not a time, which on a short hire would be a multiple.
    bill_tolerance: Decimal = Decimal("1.05")
    #: So long it may take until the daemon has acknowledged the end of an agreement; money for that is reserved too.
    ending_seconds: float = 15.0
    #: Interval at which all events since the oldest unsettled agreement are read again, in addition to new ones.
    review_seconds: float = 30.0
    #: Pauses after the daemon failed or a bill could not be settled, and the timeout of a poll, which the daemon holds
    #: for 5 s.
    payment_backoff: Backoff = Backoff(first_seconds=0.5, max_seconds=10.0)
    poll_limit_seconds: float = 20.0
    #: An agreement that ended this long ago without an invoice is written off: it no longer counts. An invoice that
    #: comes later is paid nevertheless, if it comes within `late_invoice_seconds`.
    write_off_seconds: float = 86_400.0
    late_invoice_seconds: float = 30 * 86_400.0

    def bill_limit(self, price: Price, seconds: float) -> Decimal:
        """Return the most that is paid for an agreement: its start, and all seconds until its end, work or not."""
        return price.max_cost(seconds) * self.bill_tolerance

    def cost_limit(self, price: Price, seconds: float) -> Decimal:
        """Return what is reserved for an agreement that should end after so many seconds."""
        return self.bill_limit(price, seconds + self.ending_seconds)

    def start_cover(self, *, start_seconds: float, chunk_seconds: float) -> float:
        """Return the seconds that are reserved before an agreement is made: a start and a chunk, both with overtime.

        A start that can no longer be followed by a chunk would be paid for nothing.
        """
        return start_seconds + chunk_seconds + 2 * self.overtime_seconds

    def renewal_lead(self, *, start_seconds: float, chunk_seconds: float) -> float:
        """Return how long before its agreements expire a demand is renewed.

        An agreement that is made at the last moment is one that providers accept, and a chunk fits in after its start.
        """
        until_ready = max(self.min_agreement_seconds, start_seconds + self.overtime_seconds)
        return self.signing_seconds + until_ready + chunk_seconds + self.overtime_seconds

    def chunk_timeout(
        self, *, items: int, size_bytes: int, images_per_second: float | None, max_seconds: float
    ) -> float:
        """Return how long a chunk may take, transfer included.

        :param images_per_second: None if unknown.
        :param max_seconds: the most that it may take without the transfer.
        """
        transfer = size_bytes / self.min_bytes_per_second
        if images_per_second is not None and images_per_second > 0:
            expected = self.timeout_grace_seconds + self.timeout_factor * items / images_per_second
            max_seconds = min(max_seconds, expected)
        # Whatever the operator allows, it must fit into an agreement.
        return min(transfer + max_seconds, self.max_agreement_seconds / 2)

    def pipeline_chunks(self, images_per_second: float | None) -> int:
        """Return how many full chunks a script waits for; 0 for a provider that is slow or of unknown speed."""
        if not images_per_second or MAX_ITEMS / images_per_second > self.ahead_seconds:
            return 0
        return max(1, min(self.max_script_chunks, int(self.script_seconds * images_per_second / MAX_ITEMS)))

    def has_quick_transfers(self, arrivals: Sequence[float], since: float, was_quick: bool) -> bool:
        """Return whether a script's chunks were sent so quickly that transfers take no time of a provider.

        While they are sent, it computes those that were sent before. One says nothing; two are not enough to find that
        transfers became slow.

        :param arrivals: of the results, and `since`: when the script was sent. As many chunks were sent with it.
        :param was_quick: whether they were found to be quick before.
        """
        if len(arrivals) < 2 + was_quick:
            return was_quick
        sending, chunk = arrivals[0] - since, (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)
        most = self.slow_transfer_share * len(arrivals) if was_quick else self.quick_transfer_chunks
        return sending < most * chunk

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

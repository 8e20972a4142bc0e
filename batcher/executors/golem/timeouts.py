"""Time limits derived from measured speeds and prices: for a chunk, a second attempt, an idle activity. Pure."""

from __future__ import annotations

from batcher.executors.golem.offers import Price

#: A chunk may take this many times its expected duration, because a provider's machine is shared.
_TIMEOUT_FACTOR = 5.0
#: Added to that, for loading the model and for a slow daemon.
_GRACE_SECONDS = 30.0
#: A chunk that takes this many times its expected duration, plus some seconds, gets a second attempt on an idle worker.
_STRAGGLER_FACTOR = 3.0
_STRAGGLER_SECONDS = 2.0
#: The slowest transfer that is waited for, in bytes per second.
_MIN_BYTES_PER_SECOND = 200_000


def chunk_timeout(*, items: int, size_bytes: int, images_per_second: float | None, max_seconds: float) -> float:
    """Return how long a chunk may take, transfer included.

    :param images_per_second: measured; None if unknown, which returns `max_seconds`.
    :param max_seconds: the upper limit.
    """
    if images_per_second is None or images_per_second <= 0:
        return max_seconds
    return min(
        max_seconds, _GRACE_SECONDS + _TIMEOUT_FACTOR * items / images_per_second + size_bytes / _MIN_BYTES_PER_SECOND
    )


def straggler_seconds(*, items: int, images_per_second: float | None) -> float | None:
    """Return after how long an idle worker may try a chunk too; None if the speed is unknown."""
    if images_per_second is None or images_per_second <= 0:
        return None
    return _STRAGGLER_SECONDS + _STRAGGLER_FACTOR * items / images_per_second


def idle_seconds(price: Price, *, start_seconds: float, max_seconds: float) -> float:
    """Return how long an activity may idle before that has cost as much as a new start.

    Without knowledge of the future this costs at most twice the optimum (the ski rental problem).

    :param start_seconds: how long the start took; it is paid for too.
    :param max_seconds: the upper limit, even if idling is free.
    """
    if price.second <= 0:
        return max_seconds
    return min(max_seconds, float(price.start / price.second) + start_seconds)

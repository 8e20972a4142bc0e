"""Time limits that follow from measurements: how long a chunk may take, how long an idle activity is kept. Pure."""

from __future__ import annotations

from batcher.executors.golem.prices import Price

#: A chunk gets this many times what it should take, because other people's computers have other things to do too.
_TIMEOUT_FACTOR = 5.0
#: And this much on top, for a model that is not yet loaded and a daemon that is slow.
_GRACE_SECONDS = 30.0
#: A chunk that takes so many times what it should, and so much longer, is tried by somebody idle as well.
_STRAGGLER_FACTOR = 3.0
_STRAGGLER_SECONDS = 2.0
#: The slowest line that is waited for, in bytes a second.
_MIN_BYTES_PER_SECOND = 200_000


def chunk_timeout(*, items: int, size_bytes: int, images_per_second: float | None, max_seconds: float) -> float:
    """Return how long a chunk may take, sending included.

    :param images_per_second: as measured; None when nothing is known, which allows the most.
    :param max_seconds: the longest that is allowed at all.
    """
    if images_per_second is None or images_per_second <= 0:
        return max_seconds
    return min(
        max_seconds, _GRACE_SECONDS + _TIMEOUT_FACTOR * items / images_per_second + size_bytes / _MIN_BYTES_PER_SECOND
    )


def straggler_seconds(*, items: int, images_per_second: float | None) -> float | None:
    """Return after how long somebody idle may try a chunk too; None as long as nothing is known of the speed."""
    if images_per_second is None or images_per_second <= 0:
        return None
    return _STRAGGLER_SECONDS + _STRAGGLER_FACTOR * items / images_per_second


def idle_seconds(price: Price, *, start_seconds: float, max_seconds: float) -> float:
    """Return how long an activity may have nothing to do before it has cost as much as a new start would.

    Whoever knows nothing of the future pays at most twice what the best guess had paid (the ski rental problem).

    :param start_seconds: what a start took, as measured here; it is paid for too.
    :param max_seconds: kept no longer than this even when idling costs next to nothing.
    """
    if price.second <= 0:
        return max_seconds
    return min(max_seconds, float(price.start / price.second) + start_seconds)

"""A chunk that a provider has, and how its results are taken over. Called by `worker.py`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from batcher.executors.golem.job_queue import QueuedJob
from provider_image.errors import MalformedResults

#: A larger results file is rejected.
_MAX_RESULTS_BYTES = 64 * 1024 * 1024
_COPY_BYTES = 1024 * 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class Attempt:
    """A chunk that a worker has begun."""

    queued_job: QueuedJob
    #: Size of the chunk file, which is removed as soon as another worker has answered.
    size_bytes: int
    #: Where the results arrive. Not named after the activity, whose id the provider chooses.
    received: Path
    #: Number of its files at the provider, not used by another of its chunks.
    slot: int

    def has_arrived(self) -> bool:
        """Return whether some of its results are here, and somebody waits for them."""
        is_wanted = not self.queued_job.outcome.done()
        return is_wanted and self.received.exists() and self.received.stat().st_size > 0

    def arrived_at(self) -> float:
        """Return when its results arrived, on the monotonic clock; now if there are none."""
        now = time.monotonic()
        if not self.received.exists():
            return now
        return min(now, now - (time.time() - self.received.stat().st_mtime))


def own_seconds(arrivals: Sequence[float], items: Sequence[int], since: float) -> list[float]:
    """Divide a provider's time over its chunks: to each the time between the arrivals before it and its own.

    Where a later one came quicker, it was computed while the one before it was sent: their time is theirs together, in
    proportion to their items. So one that is slow is no part of the time of those before it.

    :param arrivals: in the order of the chunks, by the clock of `since`, when the first was begun.
    """
    groups: list[tuple[float, int, int]] = []  # seconds, items, chunks
    for arrival, count in zip(arrivals, items, strict=True):
        seconds = max(0.0, arrival - since)
        since += seconds
        group = (seconds, max(1, count), 1)
        while groups and groups[-1][0] * group[1] > group[0] * groups[-1][1]:
            earlier = groups.pop()
            group = (earlier[0] + group[0], earlier[1] + group[1], earlier[2] + group[2])
        groups.append(group)
    rates = [seconds / count for seconds, count, chunks in groups for _ in range(chunks)]
    return [rate * max(1, count) for rate, count in zip(rates, items, strict=True)]


def accept_results(received: Path, queued_job: QueuedJob) -> int:
    """Check a downloaded results file and move it to its place. :raises MlgError: it does not answer this chunk.

    A copy is checked: gftp may still write what the provider sent at the end of the transfer.

    :return: the number of items that it answers.
    """
    size = check_size(received)
    copy = received.with_name(f"{secrets.token_hex(8)}.copy.part")  # an earlier check may not have ended
    try:
        with received.open("rb") as source, copy.open("wb") as target:
            for _ in range(0, size, _COPY_BYTES):
                target.write(source.read(_COPY_BYTES))
        images = queued_job.job.items if queued_job.job.check is None else queued_job.job.check(copy)
        if not queued_job.outcome.done():  # otherwise another attempt was faster
            copy.replace(queued_job.job.results)
    finally:
        copy.unlink(missing_ok=True)
    return images


def check_size(received: Path) -> int:
    """Return the size of a results file in bytes. :raises MalformedResults: it is too large."""
    size = received.stat().st_size
    if size > _MAX_RESULTS_BYTES:
        raise MalformedResults(f"The results file has {size} bytes, more than the {_MAX_RESULTS_BYTES} allowed.")
    return size

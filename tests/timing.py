"""Waiting for conditions, and bounds on durations that hold on slow and busy machines.

A test never sleeps and then expects something to have happened: it waits for it, with a deadline that only a failure
reaches. Where a duration is promised, the bound is what the promise says of an idle machine times `slowness()`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

#: Far more than anything takes that happens at all.
DEADLINE_SECONDS = 300.0
#: How long the work of `slowness` takes on one idle core of 2020.
_REFERENCE_SECONDS = 0.0375


def wait_until(condition: Callable[[], Any], seconds: float = DEADLINE_SECONDS) -> Any:
    """Wait until a call returns something true, and return that."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.02)
    return found


async def until(condition: Callable[[], Any], seconds: float = DEADLINE_SECONDS) -> Any:
    """Wait in an event loop until a call returns something true, and return that."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        await asyncio.sleep(0.01)
    return found


def slowness() -> float:
    """Measure how many times as long as on an idle core something takes here and now; at least 1."""
    return max(1.0, _work_seconds(time.perf_counter) / _REFERENCE_SECONDS)


def cpu_slowness() -> float:
    """Measure the same for processor time, which a busy machine does not lengthen much; at least 1."""
    return max(1.0, _work_seconds(time.thread_time) / _REFERENCE_SECONDS)


def _work_seconds(clock: Callable[[], float]) -> float:
    started = clock()
    total = 0
    for number in range(500_000):
        total += number & 3
    assert total
    return clock() - started

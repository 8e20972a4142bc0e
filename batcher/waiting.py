"""Waiting for the first of several things, for everything in the batcher that waits for more than one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable


async def wait_for_first(*awaitables: Awaitable[object], timeout_seconds: float | None = None) -> None:
    """Wait until the first of these ends, or for a limited time, and cancel the others."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        await asyncio.wait(tasks, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()  # no effect on a task that is done
        await asyncio.gather(*tasks, return_exceptions=True)

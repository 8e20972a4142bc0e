"""Times and waiting: what a long poll needs.

A `ChangeNotifier` is rung whenever something changed; whoever waits looks again. Dates of events only ever grow,
because a requestor asks for what came after the last one it saw.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TypeVar

Clock = Callable[[], datetime]
_Value = TypeVar("_Value")


def utc_now() -> datetime:
    """Return the time."""
    return datetime.now(UTC)


def format_time(timestamp: datetime) -> str:
    """Write a time as the API does, with microseconds and a Z."""
    return timestamp.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_time(text: str) -> datetime:
    """Read a time in ISO 8601; UTC if it names no zone.

    :raises ValueError: it is none.
    """
    text = text.strip()
    if "T" in text:
        # In a query a + that was not escaped has become a space.
        text = text.replace(" ", "+")
    timestamp = datetime.fromisoformat(text)
    return timestamp if timestamp.tzinfo else timestamp.replace(tzinfo=UTC)


class MonotonicTimestamps:
    """Gives every event a date of its own, later than those before."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = datetime.min.replace(tzinfo=UTC)

    def advance_past(self, timestamp: datetime) -> None:
        """Take note of a date that was given before a restart."""
        self._last = max(self._last, timestamp)

    def next(self) -> datetime:
        """Give the next date: now, or a microsecond after the last."""
        self._last = max(self._clock(), self._last + timedelta(microseconds=1))
        return self._last


class ChangeNotifier:
    """Wakes those who wait for a change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Have everyone who waits look again."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait_until(self, condition: Callable[[], _Value], seconds: float | None) -> _Value:
        """Wait until what `condition` returns is true, at most so many seconds, and return what it returned last."""
        try:
            async with asyncio.timeout(seconds):
                while not (value := condition()):
                    await self._event.wait()
                return value
        except TimeoutError:
            return condition()

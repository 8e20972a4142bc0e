"""Timestamps and change notification: what long polls are made of.

Timestamps of events strictly increase, because a requestor asks for the events after the last one that it received.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TypeVar

Clock = Callable[[], datetime]
_Value = TypeVar("_Value")


def utc_now() -> datetime:
    """Return the current time."""
    return datetime.now(UTC)


def format_time(timestamp: datetime) -> str:
    """Format a time as the API does, in UTC with microseconds and a Z."""
    return timestamp.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_time(text: str) -> datetime:
    """Parse a time in ISO 8601; UTC if it has no zone.

    :raises ValueError: the text is not a time.
    """
    text = text.strip()
    if "T" in text:
        # In a query string an unescaped + is decoded as a space.
        text = text.replace(" ", "+")
    timestamp = datetime.fromisoformat(text)
    return timestamp if timestamp.tzinfo else timestamp.replace(tzinfo=UTC)


class MonotonicTimestamps:
    """Gives every event a unique time, later than those before."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = datetime.min.replace(tzinfo=UTC)

    def advance_past(self, timestamp: datetime) -> None:
        """Continue after a time that was given before a restart."""
        self._last = max(self._last, timestamp)

    def next(self) -> datetime:
        """Return the next time: now, or a microsecond after the last."""
        self._last = max(self._clock(), self._last + timedelta(microseconds=1))
        return self._last


class ChangeNotifier:
    """Wakes the tasks that wait for a change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Make every waiting task check its condition again."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait_until(self, condition: Callable[[], _Value], seconds: float | None) -> _Value:
        """Wait until `condition` returns a true value; return its last value.

        :param seconds: at most; without a limit if None.
        """
        try:
            async with asyncio.timeout(seconds):
                while not (value := condition()):
                    await self._event.wait()
                return value
        except TimeoutError:
            return condition()

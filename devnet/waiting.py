"""Times and waiting: what a long poll needs.

A `Bell` is rung whenever something changed; whoever waits looks again. Dates of events only ever grow, because a
requestor asks for what came after the last one it saw.
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


def written(moment: datetime) -> str:
    """Write a time as the API does, with microseconds and a Z."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def read(text: str) -> datetime:
    """Read a time in ISO 8601; UTC if it names no zone.

    :raises ValueError: it is none.
    """
    text = text.strip()
    if "T" in text:
        # In a query a + that was not escaped has become a space.
        text = text.replace(" ", "+")
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class Dates:
    """Gives every event a date of its own, later than those before."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = datetime.min.replace(tzinfo=UTC)

    def seen(self, moment: datetime) -> None:
        """Take note of a date that was given before a restart."""
        self._last = max(self._last, moment)

    def next(self) -> datetime:
        """Give the next date: now, or a microsecond after the last."""
        self._last = max(self._clock(), self._last + timedelta(microseconds=1))
        return self._last


class Bell:
    """Wakes those who wait for a change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        """Have everyone who waits look again."""
        self._event.set()
        self._event = asyncio.Event()

    async def until(self, look: Callable[[], _Value], seconds: float | None) -> _Value:
        """Wait until what `look` returns is true, at most so many seconds, and return what it returned last."""
        try:
            async with asyncio.timeout(seconds):
                while not (value := look()):
                    await self._event.wait()
                return value
        except TimeoutError:
            return look()

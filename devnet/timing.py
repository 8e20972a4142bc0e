"""Timestamps, change notification, and the events that requestors poll for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from devnet.errors import ApiError

_Value = TypeVar("_Value")


def utc_now() -> datetime:
    """Return the current time."""
    return datetime.now(UTC)


def format_time(timestamp: datetime) -> str:
    """Format a time as the API does, in UTC with microseconds and a Z."""
    return timestamp.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_time(text: str) -> datetime:
    """Parse a time in ISO 8601; UTC if it has no zone. :raises ValueError: the text is not a time."""
    text = text.strip()
    if "T" in text:
        # In a query string an unescaped + is decoded as a space.
        text = text.replace(" ", "+")
    timestamp = datetime.fromisoformat(text)
    return timestamp if timestamp.tzinfo else timestamp.replace(tzinfo=UTC)


def read_time(name: str, value: object) -> datetime:
    """Parse a time in a call. :raises ApiError: it is not a time."""
    try:
        return parse_time(str(value))
    except ValueError as error:
        raise ApiError(f"{name} must be a time in ISO 8601, not {value!r}.") from error


class ChangeNotifier:
    """Wakes the tasks that wait for a change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Make every waiting task check its condition again."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait_until(self, condition: Callable[[], _Value], seconds: float | None) -> _Value:
        """Wait until `condition` is true, at most for so many seconds if any are given; return its last value."""
        try:
            async with asyncio.timeout(seconds):
                while not (value := condition()):
                    await self._event.wait()
                return value
        except TimeoutError:
            return condition()


class EventFeed(list[dict[str, Any]]):
    """Events, oldest first. Their times strictly increase: requestors ask for those after the last that they have."""

    def __init__(self) -> None:
        super().__init__()
        self._notifier = ChangeNotifier()

    def add(self, **fields: Any) -> None:
        """Add an event with the current time, or a microsecond after the last one."""
        now = utc_now()
        if self:
            now = max(now, parse_time(self[-1]["eventDate"]) + timedelta(microseconds=1))
        self.append({"eventDate": format_time(now), **fields})
        self._notifier.notify()

    async def poll(self, after: datetime | None, seconds: float, max_items: int) -> list[dict[str, Any]]:
        """Return the events after a time; wait for so many seconds if there are none."""
        since = "" if after is None else format_time(after)
        found = await self._notifier.wait_until(lambda: [each for each in self if each["eventDate"] > since], seconds)
        return found[:max_items]

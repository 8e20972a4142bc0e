"""The daemon's HTTP API: how calls are read, and the event streams that answer some.

`application.py` makes the application; `market.py`, `activities.py` and `payments.py` contain the calls of the three
APIs, which use the functions here. Only the daemon imports this package, because it needs aiohttp.
"""

from __future__ import annotations

import json
import math
from datetime import datetime
from typing import Any

from aiohttp import web

from devnet.errors import ApiError
from devnet.timing import parse_time

#: The published default of long polls.
DEFAULT_POLL_SECONDS = 5.0


async def read_json(request: web.Request) -> Any:
    """Parse the body as JSON; return None if it is empty. :raises ApiError: it is not JSON."""
    text = await request.text()
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise ApiError(f"The body is not JSON: {error}") from error


async def read_object(request: web.Request, *required: str) -> dict[str, Any]:
    """Parse the body as a JSON object. :raises ApiError: it is none, or a required key is missing."""
    body = await read_json(request)
    if not isinstance(body, dict):
        raise ApiError("The body must be a JSON object.")
    missing = [key for key in required if body.get(key) is None]
    if missing:
        raise ApiError(f"Missing in the body: {', '.join(missing)}.")
    return body


async def read_reason(request: web.Request) -> dict[str, Any] | None:
    """Parse the optional reason in the body of a call that ends something."""
    body = await read_json(request)
    if body is None:
        return None
    if not isinstance(body, dict) or not isinstance(body.get("message"), str):
        raise ApiError('A reason is a JSON object with a "message".')
    return body


def read_timeout_seconds(request: web.Request) -> float:
    """Return the query parameter `timeout`."""
    text = request.query.get("timeout")
    if text is None:
        return DEFAULT_POLL_SECONDS
    try:
        value = float(text)
    except ValueError as error:
        raise ApiError(f"timeout must be a number of seconds, not {text!r}.") from error
    if not math.isfinite(value) or value < 0:
        raise ApiError(f"timeout must be 0 or more, not {text}.")
    return value


def read_max_items(request: web.Request, name: str) -> int:
    """Return a query parameter that limits the number of items: maxEvents or maxItems."""
    text = request.query.get(name, "10")
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 100:
        raise ApiError(f"{name} must be an integer from 1 to 100, not {text!r}.")
    return int(text)


def read_time(request: web.Request, name: str) -> datetime | None:
    """Return a query parameter that is a time; None if it is missing."""
    text = request.query.get(name)
    if text is None:
        return None
    try:
        return parse_time(text)
    except ValueError as error:
        raise ApiError(f"{name} must be a time in ISO 8601, not {text!r}.") from error


class EventStream(web.StreamResponse):
    """A response that consists of server-sent events. To be prepared before the first event."""

    def __init__(self) -> None:
        super().__init__(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        #: All bytes sent so far, for the journal; a batch has few and short events.
        self.sent = bytearray()
        self._number = 0

    async def send(self, kind: str, event: dict[str, Any]) -> None:
        """Send an event as JSON."""
        text = f"event: {kind}\ndata: {json.dumps(event)}\nid: {self._number}\n\n".encode()
        self._number += 1
        self.sent += text
        await self.write(text)

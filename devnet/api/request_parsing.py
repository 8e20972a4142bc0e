"""What a call of the API says: its body and its query, checked."""

from __future__ import annotations

import json
import math
from datetime import datetime
from typing import Any

from aiohttp import web

from devnet.errors import ApiError
from devnet.timing import parse_time

#: The published default of long polls and of waiting for the other side.
DEFAULT_POLL_SECONDS = 5.0


async def json_body(request: web.Request) -> Any:
    """Return the body, read as JSON; None if there is none."""
    text = await request.text()
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise ApiError(f"The body is not JSON: {error}") from error


async def json_object(request: web.Request, *required: str) -> dict[str, Any]:
    """Return the body, a JSON object that has these keys."""
    body = await json_body(request)
    if not isinstance(body, dict):
        raise ApiError("The body must be a JSON object.")
    missing = [key for key in required if body.get(key) is None]
    if missing:
        raise ApiError(f"The body lacks {', '.join(missing)}.")
    return body


async def reason(request: web.Request) -> dict[str, Any] | None:
    """Return the body of a call that may say why."""
    body = await json_body(request)
    if body is None:
        return None
    if not isinstance(body, dict) or not isinstance(body.get("message"), str):
        raise ApiError('A reason is a JSON object with a "message".')
    return body


def timeout_seconds(request: web.Request, default: float = DEFAULT_POLL_SECONDS) -> float:
    """Return how long the caller wants to wait."""
    text = request.query.get("timeout")
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError as error:
        raise ApiError(f"timeout is no number of seconds: {text!r}.") from error
    if not math.isfinite(value) or value < 0:
        raise ApiError(f"timeout must be 0 or more, not {text}.")
    return value


def max_items(request: web.Request, name: str) -> int:
    """Return how many items the caller takes: maxEvents or maxItems."""
    text = request.query.get(name, "10")
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 100:
        raise ApiError(f"{name} must be a whole number from 1 to 100, not {text!r}.")
    return int(text)


def timestamp(request: web.Request, name: str) -> datetime | None:
    """Return a date of the query."""
    text = request.query.get(name)
    if text is None:
        return None
    try:
        return parse_time(text)
    except ValueError as error:
        raise ApiError(f"{name} is no date in ISO 8601: {text!r}.") from error

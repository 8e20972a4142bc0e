"""The daemon's HTTP API: what a call asks for, and how it is answered.

`application.py` makes the application; `market.py`, `activities.py` and `payments.py` contain the calls of the three
APIs as tables of routes. Only the daemon imports this package, because it needs aiohttp.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from datetime import datetime
from typing import Any

from aiohttp import web

from devnet.errors import ApiError
from devnet.timing import read_time

#: The published default of long polls.
DEFAULT_POLL_SECONDS = 5.0


class IncomingCall:
    """A call: its path, its query and its body, each checked when it is read. An invalid value is an ApiError."""

    def __init__(self, request: web.Request, text: str) -> None:
        self.request = request
        self._text = text

    def __getitem__(self, name: str) -> str:
        """Return a part of the path."""
        return self.request.match_info[name]

    def query(self, name: str) -> str | None:
        """Return a parameter of the query; None if it is missing."""
        return self.request.query.get(name)

    def timeout_seconds(self) -> float:
        """Return the query parameter `timeout`."""
        text = self.query("timeout")
        if text is None:
            return DEFAULT_POLL_SECONDS
        try:
            value = float(text)
        except ValueError as error:
            raise ApiError(f"timeout must be a number of seconds, not {text!r}.") from error
        if not math.isfinite(value) or value < 0:
            raise ApiError(f"timeout must be 0 or more, not {text}.")
        return value

    def max_items(self, name: str) -> int:
        """Return a query parameter that limits the number of items: maxEvents or maxItems."""
        text = self.request.query.get(name, "10")
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 100:
            raise ApiError(f"{name} must be an integer from 1 to 100, not {text!r}.")
        return int(text)

    def time(self, name: str) -> datetime | None:
        """Return a query parameter that is a time; None if it is missing."""
        text = self.query(name)
        return None if text is None else read_time(name, text)

    def polling(self) -> tuple[datetime | None, float, int]:
        """Return after which time events are asked for, how many seconds to wait, and how many to return at most."""
        return self.time("afterTimestamp"), self.timeout_seconds(), self.max_items("maxEvents")

    def body(self) -> Any:
        """Return the body, which is JSON; None if it is empty."""
        if not self._text.strip():
            return None
        try:
            return json.loads(self._text)
        except ValueError as error:
            raise ApiError(f"The body is not JSON: {error}") from error

    def object(self, *required: str) -> dict[str, Any]:
        """Return the body, which is a JSON object with the required keys."""
        body = self.body()
        if not isinstance(body, dict):
            raise ApiError("The body must be a JSON object.")
        missing = [key for key in required if body.get(key) is None]
        if missing:
            raise ApiError(f"Missing in the body: {', '.join(missing)}.")
        return body

    def reason(self) -> dict[str, Any] | None:
        """Return the optional reason in the body of a call that ends something."""
        body = self.body()
        if body is not None and not (isinstance(body, dict) and isinstance(body.get("message"), str)):
            raise ApiError('A reason is a JSON object with a "message".')
        return body


class Routes(list[web.RouteDef]):
    """The routes of an API, whose paths have the same root."""

    def __init__(self, root: str) -> None:
        super().__init__()
        self._root = root

    def add(self, method: str, path: str, handle: Callable[[IncomingCall], Any], status: int = 200) -> None:
        """Add a route.

        :param handle: returns the answer as JSON values, or an awaitable of it.
        :param status: of the answer; 204 has no body.
        """

        async def respond(request: web.Request) -> web.Response:
            answer = handle(IncomingCall(request, await request.text()))
            if inspect.isawaitable(answer):
                answer = await answer
            return web.Response(status=204) if status == 204 else web.json_response(answer, status=status)

        self.append(web.route(method, self._root + path, respond))

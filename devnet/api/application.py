"""The daemon's HTTP application, and the journal of its calls.

Made by `Devnet.start`. Its middleware records every call, reports errors, checks the app key, and injects the daemon's
faults.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from aiohttp import web

from devnet.api import Routes
from devnet.errors import ApiError
from devnet.gftp import REQUESTOR_ID
from devnet.scenario import DAEMON, FaultSchedule
from devnet.timing import format_time, utc_now

log = logging.getLogger(__name__)

#: Scripts can be long; files are not sent this way.
MAX_BODY_BYTES = 32 * 1024 * 1024
#: Version of yagna whose API this is.
VERSION = "0.17.3"
#: Number of calls kept in memory.
MAX_CALLS = 20_000
#: Where images are published, for everybody as on the real network.
IMAGE_PATH = "/images/{name}"
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, kw_only=True)
class ApiCall:
    """A call of the API, recorded at its end."""

    at: datetime
    method: str
    path: str
    query: str
    #: None if the caller disconnected before the response.
    status: int | None
    seconds: float
    request_bytes: int
    answer_bytes: int
    #: The beginning of each body, as text.
    request: str
    answer: str


class CallJournal:
    """The latest calls, in memory and, if a path is given, as lines of JSON in a file."""

    #: Longer bodies are cut.
    max_body_bytes = 4000

    def __init__(self, path: Path | None = None) -> None:
        self.calls: deque[ApiCall] = deque(maxlen=MAX_CALLS)
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8", buffering=1)

    def add(
        self, at: datetime, request: web.Request, body: bytes, response: web.StreamResponse | None, seconds: float
    ) -> None:
        """Record a call; without a response, the caller disconnected before."""
        answer = getattr(response, "body", None)
        answer = answer if isinstance(answer, bytes) else b""
        call = ApiCall(
            at=at,
            method=request.method,
            path=request.path,
            query=request.query_string,
            status=None if response is None else response.status,
            seconds=seconds,
            request_bytes=len(body),
            answer_bytes=len(answer),
            request=body[: self.max_body_bytes].decode("utf-8", "replace"),
            answer=answer[: self.max_body_bytes].decode("utf-8", "replace"),
        )
        self.calls.append(call)
        if self._file is not None:
            row = {**asdict(call), "at": format_time(call.at), "seconds": round(call.seconds, 4)}
            self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def make_application(
    routes: list[web.RouteDef],
    *,
    app_key: str,
    images: Mapping[str, bytes],
    journal: CallJournal,
    faults: FaultSchedule,
) -> web.Application:
    """Make the application of all routes.

    :param images: the published images, by hash.
    """

    async def answer(request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Check the app key, inject the daemon's faults, and report errors."""
        try:
            if not _is_authorised(request, app_key):
                return _error_response(
                    401, "The app key is missing or wrong. Set YAGNA_APPKEY to the value that mlg devnet prints."
                )
            call = f"{request.method} {request.path}"
            if faults.triggers(DAEMON, "http-500", call):
                return _error_response(500, "Fault of the scenario: http-500.")
            if hang := faults.triggers(DAEMON, "http-hang", call):
                # Without `seconds` it hangs until the caller or the daemon ends.
                await asyncio.sleep(hang.seconds) if hang.seconds else await asyncio.Event().wait()
            if faults.triggers(DAEMON, "gone", call) and request.transport is not None:
                request.transport.abort()
            return await handler(request)
        except ApiError as error:
            return _error_response(error.status, str(error))
        except web.HTTPException as error:
            return _error_response(error.status, f"{request.method} {request.path}: {error.reason}")
        except ConnectionResetError:
            raise
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            return _error_response(500, "Internal error of the devnet; see its log.")

    @web.middleware
    async def record(request: web.Request, handler: _Handler) -> web.StreamResponse:
        if request.path.startswith(IMAGE_PATH.format(name="")):
            return await handler(request)  # no call of the daemon
        at, started_at = utc_now(), time.monotonic()
        response: web.StreamResponse | None = None
        body = b""
        try:
            try:
                body = await request.read()
            except web.HTTPRequestEntityTooLarge:
                response = _error_response(413, f"The body has more than {MAX_BODY_BYTES} bytes.")
            else:
                response = await answer(request, handler)
            return response
        finally:
            journal.add(at, request, body, response, time.monotonic() - started_at)

    dates = dict.fromkeys(("releaseTs", "insertionTs", "updateTs"), "2026-01-01T00:00:00")
    version = {"current": {"version": VERSION, "name": f"v{VERSION} devnet", "seen": True, **dates}}
    me = {"identity": REQUESTOR_ID, "name": "devnet", "role": "manager"}
    app = web.Application(middlewares=[record], client_max_size=MAX_BODY_BYTES)
    general = Routes("")
    general.add("GET", "/me", lambda call: me)
    general.add("GET", "/version/get", lambda call: version)

    async def send_image(request: web.Request) -> web.Response:
        content = images.get(request.match_info["name"])
        return _error_response(404, "There is no such image.") if content is None else web.Response(body=content)

    app.add_routes([*general, *routes, web.get(IMAGE_PATH, send_image)])
    return app


def _is_authorised(request: web.Request, app_key: str) -> bool:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    given = (key.strip() if scheme.lower() == "bearer" else "") or request.query.get("authToken", "")
    return secrets.compare_digest(given.encode(), app_key.encode())


def _error_response(status: int, message: str) -> web.Response:
    return web.json_response({"message": message}, status=status)

"""The daemon's HTTP application: who may call, what is written down, what goes wrong on purpose.

Made by `running.Devnet`. aiohttp is yapapi's HTTP library, so it is there whenever a devnet is of use; this module and
those of the three APIs import it, and are themselves imported only when a devnet starts.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from devnet.api.event_stream import EventStream
from devnet.errors import ApiError
from devnet.faults import DAEMON, Faults
from devnet.journal import Call, CallJournal
from devnet.timing import utc_now

log = logging.getLogger(__name__)

#: Scripts can be long; pictures do not come this way.
MAX_BODY_BYTES = 32 * 1024 * 1024
VERSION = "0.17.3"
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_application(
    routes: list[web.RouteDef], *, identity: str, app_key: str, journal: CallJournal, faults: Faults
) -> web.Application:
    """Make the application.

    :param routes: those of the three APIs.
    :param identity: the requestor's node id.
    """

    async def me(request: web.Request) -> web.Response:
        return web.json_response({"identity": identity, "name": "devnet", "role": "manager"})

    middlewares = [_record_calls(journal), _handle_errors, _require_app_key(app_key), _inject_faults(faults)]
    app = web.Application(middlewares=middlewares, client_max_size=MAX_BODY_BYTES)
    app.add_routes([web.get("/me", me), web.get("/version/get", _version), *routes])
    return app


async def _version(request: web.Request) -> web.Response:
    dates = dict.fromkeys(("releaseTs", "insertionTs", "updateTs"), "2026-01-01T00:00:00")
    current = {"version": VERSION, "name": f"v{VERSION} devnet", "seen": True, **dates}
    return web.json_response({"current": current})


def _record_calls(journal: CallJournal) -> Any:
    @web.middleware
    async def middleware(request: web.Request, handler: _Handler) -> web.StreamResponse:
        at, started_at = utc_now(), time.monotonic()
        response: web.StreamResponse | None = None
        body = b""
        try:
            try:
                body = await request.read()
            except web.HTTPRequestEntityTooLarge:
                response = _error_response(413, f"The body is longer than {MAX_BODY_BYTES} bytes.")
            else:
                response = await handler(request)
            return response
        finally:
            answer = response.body if isinstance(response, web.Response) else None
            answer = bytes(response.sent) if isinstance(response, EventStream) else answer
            answer = answer if isinstance(answer, bytes) else b""
            journal.add(
                Call(
                    at=at,
                    method=request.method,
                    path=request.path,
                    query=request.query_string,
                    status=None if response is None else response.status,
                    seconds=time.monotonic() - started_at,
                    request_bytes=len(body),
                    answer_bytes=len(answer),
                    request=body[: journal.max_body_bytes].decode("utf-8", "replace"),
                    answer=answer[: journal.max_body_bytes].decode("utf-8", "replace"),
                )
            )

    return middleware


@web.middleware
async def _handle_errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        return _error_response(error.status, str(error))
    except web.HTTPException as error:
        return _error_response(error.status, f"{request.method} {request.path}: {error.reason}")
    except ConnectionResetError:
        raise
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return _error_response(500, "The devnet has a bug; see its log.")


def _require_app_key(app_key: str) -> Any:
    @web.middleware
    async def middleware(request: web.Request, handler: _Handler) -> web.StreamResponse:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        given = (key.strip() if scheme.lower() == "bearer" else "") or request.query.get("authToken", "")
        if not secrets.compare_digest(given.encode(), app_key.encode()):
            return _error_response(401, "The app key is missing or wrong. Set YAGNA_APPKEY as mlg devnet says.")
        return await handler(request)

    return middleware


def _inject_faults(faults: Faults) -> Any:
    @web.middleware
    async def middleware(request: web.Request, handler: _Handler) -> web.StreamResponse:
        call = f"{request.method} {request.path}"
        if faults.triggers(DAEMON, "http-500", call):
            return _error_response(500, "A fault of the scenario: http-500.")
        hang_fault = faults.triggers(DAEMON, "http-hang", call)
        if hang_fault is not None:
            # Without an end: until the caller gives up, or the daemon.
            await asyncio.sleep(hang_fault.seconds) if hang_fault.seconds else await asyncio.Event().wait()
        if faults.triggers(DAEMON, "gone", call) and request.transport is not None:
            request.transport.abort()
        return await handler(request)

    return middleware


def _error_response(status: int, message: str) -> web.Response:
    return web.json_response({"message": message}, status=status)

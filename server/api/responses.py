"""Responses of the HTTP API: JSON with its headers, and errors as JSON.

Used by every view. The HTTP status of each error is in `server/errors.py`.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flask
from werkzeug.exceptions import HTTPException

from provider_image.errors import MlgError, ModelError
from server.errors import RETRY_AFTER_SECONDS, http_status, retry_after_seconds
from store.errors import StoreError

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment
    from werkzeug.datastructures import Headers

log = logging.getLogger(__name__)

#: A response is not cached, and its content type is not guessed.
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)

#: `code` of the errors that Werkzeug raises.
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_media_type"}


def install_error_handlers(app: flask.Flask) -> None:
    """Answer every error of an application with JSON that tells what to do."""
    app.register_error_handler(MlgError, _error_response)
    app.register_error_handler(HTTPException, _http_error_response)
    app.register_error_handler(Exception, _internal_error)


class _JsonResponse(flask.Response):
    """A response whose headers are as they shall be sent, so that Werkzeug need not look at each again."""

    def get_wsgi_headers(self, environ: WSGIEnvironment) -> Headers:
        return self.headers


def json_response(
    payload: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> flask.Response:
    """Build a JSON response that is not cached.

    :param status: of a response that has a body.
    :param headers: ASCII only.
    """
    body = _ENCODER.encode(payload).encode() + b"\n"
    found = {"Content-Type": "application/json", **_HEADERS, **(headers or {}), "Content-Length": str(len(body))}
    return _JsonResponse([body], status, list(found.items()))


def error_response(reason: str, code: str, status: int, headers: Mapping[str, str] | None = None) -> flask.Response:
    """Build the response of an error."""
    return json_response({"success": False, "reason": reason, "code": code}, status, headers)


def set_headers(response: flask.Response) -> flask.Response:
    """Forbid to cache a response, and to guess its content type."""
    response.headers.update(_HEADERS)
    return response


def wants_page() -> bool:
    """Tell whether the client is a browser that wants a page, not a program that wants JSON."""
    accept = flask.request.accept_mimetypes
    return "text/html" in accept.values() and accept["text/html"] >= accept["application/json"]


def _error_response(error: MlgError) -> flask.Response:
    status = http_status(type(error))
    if status == 500:
        return _internal_error(error)
    if isinstance(error, StoreError | ModelError):
        log.error("%s: %s", error.code, error.reason, extra={"path": flask.request.path})
    return exception_response(error)


def exception_response(error: MlgError) -> flask.Response:
    """Build the response of an error that has a status; needs no request."""
    status = http_status(type(error))
    is_temporary = status in (503, 507) or type(error) in RETRY_AFTER_SECONDS
    seconds = retry_after_seconds(type(error)) if is_temporary else None
    headers = {} if seconds is None else {"Retry-After": str(seconds)}
    return error_response(error.reason, error.code, status, headers)


def _http_error_response(error: HTTPException) -> flask.Response:
    status = error.code or 500
    headers = {name: value for name, value in error.get_headers() if name.lower() != "content-type"}
    if status == 404:
        reason = "There is nothing at this path. GET / lists the paths."
    elif status == 405:
        reason = f"The method {flask.request.method} is not allowed here. Use: {headers.get('Allow', '')}."
    else:
        reason = f"{error.description or error.name}"
    code = _HTTP_CODES.get(status, "bad_request" if status < 500 else "internal_error")
    return error_response(reason, code, status, headers)


def _internal_error(error: Exception) -> flask.Response:
    error_id = secrets.token_hex(4)
    where = f"{flask.request.method} {flask.request.path}"
    log.error("error %s at %s", error_id, where, exc_info=error, extra={"error": error_id})
    reason = f"Something went wrong inside the server; its log has the details (error {error_id})."
    return error_response(reason, "internal_error", 500)

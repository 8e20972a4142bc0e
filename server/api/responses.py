"""Answers of the HTTP API: JSON with its headers, and what an error becomes.

Used by every view. The one table of status codes stands here.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping
from typing import Any

import flask
from werkzeug.exceptions import HTTPException

from provider_image import errors
from server.errors import (
    AccessRefused,
    BacklogFull,
    FetchFailed,
    KeyMissing,
    KeyRefused,
    UnsupportedMediaType,
    WrongHost,
)
from server.live.changes import StreamsFull
from store.batches import BatchInProgress, DuplicateClientId
from store.errors import (
    DiskFull,
    ImageGone,
    LimitReached,
    NotCancellable,
    NotRemovable,
    NotRetryable,
    StoreBusy,
    StoreError,
    UnknownRequest,
)
from store.idempotency import IdempotencyKeyReused
from store.providers import UnknownProvider
from store.webhooks import UnknownWebhook

log = logging.getLogger(__name__)

#: The one table of status codes: a class's own row, else that of the nearest class above it.
HTTP_STATUS: dict[type[errors.MlgError], int] = {
    errors.MlgError: 500,
    errors.BadInput: 400,
    errors.UnsupportedFormat: 415,
    UnsupportedMediaType: 415,
    errors.ImageTooLarge: 413,
    errors.TooManyBytes: 413,
    errors.UnknownModel: 404,
    UnknownRequest: 404,
    UnknownProvider: 404,
    errors.NotInstalled: 503,
    errors.ModelError: 503,
    BacklogFull: 503,
    StreamsFull: 503,
    UnknownWebhook: 404,
    NotCancellable: 409,
    BatchInProgress: 409,
    DuplicateClientId: 409,
    NotRemovable: 409,
    IdempotencyKeyReused: 422,
    ImageGone: 410,
    NotRetryable: 409,
    StoreError: 503,
    DiskFull: 507,
    AccessRefused: 403,
    KeyMissing: 401,
    KeyRefused: 401,
    WrongHost: 421,
    LimitReached: 429,
    FetchFailed: 502,
}
#: Seconds after which a client may try again, for errors that pass; likewise the nearest class counts.
RETRY_AFTER_SECONDS: dict[type[errors.MlgError], int] = {
    StoreBusy: 1,
    StoreError: 5,
    DiskFull: 60,
    BacklogFull: 30,
    StreamsFull: 5,
    errors.NotInstalled: 60,
    errors.ModelError: 60,
}
#: `code` of the errors that Werkzeug raises.
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_media_type"}


def install_error_handlers(app: flask.Flask) -> None:
    """Have every error of an application answered as JSON that says what to do."""
    app.register_error_handler(errors.MlgError, _error_response)
    app.register_error_handler(HTTPException, _http_error_response)
    app.register_error_handler(Exception, _internal_error)


def json_response(
    payload: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> flask.Response:
    """Make a JSON answer that nobody keeps."""
    response = flask.Response(
        json.dumps(payload, separators=(",", ":"), ensure_ascii=False) + "\n", status, mimetype="application/json"
    )
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
    if headers:
        response.headers.update(headers)
    return response


def _nearest(table: Mapping[type[errors.MlgError], int], error: errors.MlgError) -> int | None:
    return next((table[kind] for kind in type(error).__mro__ if kind in table), None)


def _error_response(error: errors.MlgError) -> flask.Response:
    status = _nearest(HTTP_STATUS, error) or 500
    if status == 500:
        return _internal_error(error)
    if isinstance(error, StoreError | errors.ModelError):
        log.error("%s: %s", error.code, error.reason, extra={"path": flask.request.path})
    retry_after = _nearest(RETRY_AFTER_SECONDS, error) if status in (503, 507) else None
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return json_response({"success": False, "reason": error.reason, "code": error.code}, status, headers)


def _http_error_response(error: HTTPException) -> flask.Response:
    status = error.code or 500
    headers = {name: value for name, value in error.get_headers() if name.lower() != "content-type"}
    if status == 404:
        reason = "There is nothing at this address. GET / lists what there is."
    elif status == 405:
        reason = f"{flask.request.method} is not taken here. Use: {headers.get('Allow', '')}."
    else:
        reason = f"{error.description or error.name}"
    code = _HTTP_CODES.get(status, "bad_request" if status < 500 else "internal_error")
    return json_response({"success": False, "reason": reason, "code": code}, status, headers)


def _internal_error(error: Exception) -> flask.Response:
    error_id = secrets.token_hex(4)
    log.error(
        "error %s at %s %s",
        error_id,
        flask.request.method,
        flask.request.path,
        exc_info=error,
        extra={"error": error_id},
    )
    reason = f"Something went wrong inside the server; its log says what (error {error_id})."
    return json_response({"success": False, "reason": reason, "code": "internal_error"}, 500)

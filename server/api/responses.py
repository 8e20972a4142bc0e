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
from server import errors as server_errors
from server.live.changes import StreamsFull
from store.batches import BatchUnderWay, DuplicateClientId
from store.idempotency import KeyReused
from store.ledger import UnknownProvider
from store.search import NotRemovable, PictureGone
from store.webhooks import UnknownWebhook

log = logging.getLogger(__name__)

#: The one table of status codes: a class's own row, else that of the nearest class above it.
HTTP_STATUS: dict[type[errors.MlgError], int] = {
    errors.MlgError: 500,
    errors.BadInput: 400,
    errors.UnsupportedFormat: 415,
    errors.UnsupportedMediaType: 415,
    errors.ImageTooLarge: 413,
    errors.TooManyBytes: 413,
    errors.UnknownModel: 404,
    errors.UnknownRequest: 404,
    UnknownProvider: 404,
    errors.NotInstalled: 503,
    errors.ModelError: 503,
    errors.BacklogFull: 503,
    StreamsFull: 503,
    UnknownWebhook: 404,
    errors.NotCancellable: 409,
    BatchUnderWay: 409,
    DuplicateClientId: 409,
    NotRemovable: 409,
    KeyReused: 422,
    PictureGone: 410,
    errors.NotRetryable: 409,
    errors.StoreError: 503,
    errors.DiskFull: 507,
    server_errors.AccessRefused: 403,
    server_errors.KeyMissing: 401,
    server_errors.KeyRefused: 401,
    server_errors.WrongHost: 421,
    server_errors.LimitReached: 429,
    server_errors.FetchFailed: 502,
}
#: Seconds after which a client may try again, for errors that pass; likewise the nearest class counts.
RETRY_AFTER_SECONDS: dict[type[errors.MlgError], int] = {
    errors.StoreBusy: 1,
    errors.StoreError: 5,
    errors.DiskFull: 60,
    errors.BacklogFull: 30,
    StreamsFull: 5,
    errors.NotInstalled: 60,
    errors.ModelError: 60,
}
#: `code` of the errors that Werkzeug raises.
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_media_type"}


def handle_errors(app: flask.Flask) -> None:
    """Have every error of an application answered as JSON that says what to do."""
    app.register_error_handler(errors.MlgError, _refuse)
    app.register_error_handler(HTTPException, _refuse_http)
    app.register_error_handler(Exception, _confess)


def answer(payload: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> flask.Response:
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


def _refuse(error: errors.MlgError) -> flask.Response:
    status = _nearest(HTTP_STATUS, error) or 500
    if status == 500:
        return _confess(error)
    if isinstance(error, errors.StoreError | errors.ModelError):
        log.error("%s: %s", error.code, error.reason, extra={"path": flask.request.path})
    retry_after = _nearest(RETRY_AFTER_SECONDS, error) if status in (503, 507) else None
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return answer({"success": False, "reason": error.reason, "code": error.code}, status, headers)


def _refuse_http(error: HTTPException) -> flask.Response:
    status = error.code or 500
    headers = {name: value for name, value in error.get_headers() if name.lower() != "content-type"}
    if status == 404:
        reason = "There is nothing at this address. GET / lists what there is."
    elif status == 405:
        reason = f"{flask.request.method} is not taken here. Use: {headers.get('Allow', '')}."
    else:
        reason = f"{error.description or error.name}"
    code = _HTTP_CODES.get(status, "bad_request" if status < 500 else "internal_error")
    return answer({"success": False, "reason": reason, "code": code}, status, headers)


def _confess(error: Exception) -> flask.Response:
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
    return answer({"success": False, "reason": reason, "code": "internal_error"}, 500)

"""`Idempotency-Key`: a POST that is sent again under the same key gets the first response, and is done once.

Installed by `server/app.py` after the guard, because keys are separate for each API key. Two requests are the same if
method, path, query and body are; the body is hashed while the view reads it, without a form's boundary, which clients
choose anew each time. Errors of the server, and temporary ones, are not stored: a repetition is then tried again. A
POST that only reads is never stored.

It must not decide anything about the request itself; see `store/idempotency.py` for what a killed server leaves.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import flask
from werkzeug.http import parse_options_header

from provider_image.errors import InvalidParams
from server.api.responses import error_response
from server.auth.guard import current_key_id
from server.context import Context
from server.endpoint import get_operation
from store.errors import StoreError
from store.idempotency import EarlierRequest, IdempotencyKeyReused, SavedResponse
from store.keys import Scope

log = logging.getLogger(__name__)

HEADER = "Idempotency-Key"
REPLAYED = "Idempotent-Replayed"
#: Longest key, in characters.
MAX_KEY_LENGTH = 255
#: Responses are kept this long.
RETENTION_SECONDS = 86400.0
#: A running request holds its key this long; reading the body renews it.
LEASE_SECONDS = 600.0
_RENEW_AFTER_SECONDS = 60.0
#: Bytes of the rest of a refused request's body that are read for the fingerprint.
_MAX_UNREAD_BYTES = 64 * 1024
_BUFFER_BYTES = 1024 * 1024
#: Headers that are stored with a response.
_HEADERS = ("Content-Type", "Location", "Cache-Control")
#: Client errors that are temporary.
_RETRYABLE_STATUSES = frozenset({401, 403, 408, 409, 425, 429})


def install_idempotency(app: flask.Flask, context: Context) -> None:
    """Answer repeated requests of an application with their first response."""
    handler = _IdempotencyHandler(app, context)
    app.before_request(handler.before_request)
    app.after_request(handler.after_request)


@dataclass(kw_only=True)
class _PendingRequest:
    """One request under a key, while it runs."""

    owner: str
    key: str
    body: _HashingBody
    renewed_at: datetime
    token: str = field(default_factory=lambda: secrets.token_hex(16))


class _IdempotencyHandler:
    def __init__(self, app: flask.Flask, context: Context) -> None:
        self._app = app
        self._context = context

    def before_request(self) -> flask.Response | None:
        """Reserve the key of a request, or answer with the first response."""
        request = flask.request
        key = request.headers.get(HEADER)
        view = self._app.view_functions.get(request.endpoint or "")
        if key is None or request.method != "POST" or view is None:
            return None
        found = get_operation(view)
        if found is not None and found.scope is Scope.READ:
            return None
        if not 0 < len(key) <= MAX_KEY_LENGTH:
            raise InvalidParams(f"{HEADER} takes 1 to {MAX_KEY_LENGTH} characters.")
        now = self._context.clock()
        pending = _PendingRequest(owner=current_key_id() or "", key=key, body=_HashingBody(request), renewed_at=now)
        operation = f"{request.method} {request.full_path}"
        earlier = self._context.store.idempotency.reserve(
            pending.owner,
            key,
            operation=operation,
            token=pending.token,
            now=now,
            lease_ends_at=now + timedelta(seconds=LEASE_SECONDS),
            expires_at=now + timedelta(seconds=RETENTION_SECONDS),
        )
        if earlier is not None:
            return self._replay(pending.body, earlier, operation, now)
        pending.body.on_read = lambda: self._renew(pending)
        request.environ["wsgi.input"] = pending.body
        flask.g.pending = pending
        return None

    def after_request(self, response: flask.Response) -> flask.Response:
        """Store the response of a request under its key, or release the key."""
        pending: _PendingRequest | None = flask.g.pop("pending", None)
        if pending is None:
            return response
        store = self._context.store
        try:
            status = response.status_code
            is_storable = status < 500 and status not in _RETRYABLE_STATUSES and not response.is_streamed
            # A body that was cut short is not the client's request: the whole one comes under the same key.
            max_bytes = self._context.settings.max_batch_bytes if status < 400 else _MAX_UNREAD_BYTES
            if is_storable and pending.body.read_rest(max_bytes) and not pending.body.is_cut_short:
                stored = SavedResponse(
                    fingerprint=pending.body.fingerprint(),
                    status=status,
                    headers={name: response.headers[name] for name in _HEADERS if name in response.headers},
                    body=response.get_data(),
                )
                store.idempotency.save_response(pending.owner, pending.key, pending.token, stored)
            else:
                store.idempotency.release(pending.owner, pending.key, pending.token)
        except (StoreError, OSError) as error:
            # The work is done and the response is right; only a repetition has to wait for the lease.
            log.warning("cannot store the response for repetitions of a request: %s", error)
        return response

    def _replay(self, body: _HashingBody, earlier: EarlierRequest, operation: str, now: datetime) -> flask.Response:
        if earlier.operation != operation:
            raise IdempotencyKeyReused(
                f"This {HEADER} was used for another request: {earlier.operation.rstrip('?')[:200]}"
            )
        if earlier.response is None:
            reason = "The first request under this key is still running. Send it again in a moment."
            seconds = max(1, min(5, int((earlier.lease_ends_at - now).total_seconds())))
            return error_response(reason, "key_under_way", 409, {"Retry-After": str(seconds)})
        with self._context.active_reads.track():
            is_whole = body.read_rest(self._context.settings.max_batch_bytes)
        if not is_whole or body.fingerprint() != earlier.response.fingerprint:
            raise IdempotencyKeyReused(f"This {HEADER} was used for a request with another body.")
        response = flask.Response(earlier.response.body, earlier.response.status)
        response.headers.update(dict(earlier.response.headers))
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers[REPLAYED] = "true"
        return response

    def _renew(self, pending: _PendingRequest) -> None:
        now = self._context.clock()
        if (now - pending.renewed_at).total_seconds() < _RENEW_AFTER_SECONDS:
            return
        pending.renewed_at = now
        self._context.store.idempotency.renew(
            pending.owner, pending.key, pending.token, lease_ends_at=now + timedelta(seconds=LEASE_SECONDS)
        )


class _HashingBody:
    """A request's body that is hashed while it is read; it has only what the views use of a stream."""

    def __init__(self, request: flask.Request) -> None:
        self._stream: Any = request.environ["wsgi.input"]
        self._declared = request.content_length
        self._has_end = self._declared is not None or bool(request.environ.get("wsgi.input_terminated"))
        kind, options = parse_options_header(request.environ.get("CONTENT_TYPE", ""))
        self._boundary = options.get("boundary", "").encode("latin-1", "replace")
        self._hash = hashlib.sha256(kind.lower().encode("utf-8", "replace") + b"\0")
        self._carry = b""
        self._size = 0
        self._is_at_end = not self._has_end
        #: Called after each reading.
        self.on_read: Callable[[], None] = lambda: None

    def read(self, size: int = -1) -> bytes:
        """Read like the server's stream."""
        piece: bytes = self._stream.read(size) if size is not None and size >= 0 else self._stream.read()
        if piece:
            self._size += len(piece)
            self._update(piece)
            self.on_read()
        if (not piece and size != 0) or (self._declared is not None and self._size >= self._declared):
            self._is_at_end = True
        return piece

    def read_rest(self, max_bytes: int) -> bool:
        """Read the rest, at most `max_bytes`. :return: whether the end was reached."""
        while not self._is_at_end and max_bytes > 0:
            step = min(_BUFFER_BYTES, max_bytes)
            if self._declared is not None:
                step = min(step, self._declared - self._size)
            max_bytes -= len(self.read(step)) if step else 0
            if not step:
                self._is_at_end = True
        return self._is_at_end

    @property
    def is_cut_short(self) -> bool:
        """Tell whether it ended before the declared length."""
        return self._is_at_end and self._declared is not None and self._size < self._declared

    def fingerprint(self) -> str:
        """Return the hash of the body; valid only after its end."""
        final = self._hash.copy()
        final.update(self._carry)
        return final.hexdigest()

    def _update(self, piece: bytes) -> None:
        """Hash what was read without a form's boundaries, also those across two reads."""
        if not self._boundary:
            self._hash.update(piece)
            return
        rest = self._carry + piece
        while (index := rest.find(self._boundary)) >= 0:
            self._hash.update(rest[:index])
            rest = rest[index + len(self._boundary) :]
        keep = min(len(rest), len(self._boundary) - 1)
        self._hash.update(rest[: len(rest) - keep])
        self._carry = rest[len(rest) - keep :]

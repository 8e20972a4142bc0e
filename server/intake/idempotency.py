"""`Idempotency-Key`: a POST that is sent again under the same key gets the first response, and is done once.

Two requests are the same if method, path, query and body are, without a form's boundary, which clients choose anew each
time. The key is reserved when all of the request has been read and before anything is done for it. So a request that
was cut short or refused leaves nothing under its key, and may be sent again.

`server/app.py` installs it after the guard, because keys are separate for each API key; views that are open to
everybody, those that only read and the pages have no part in it. A view with a body calls `once` when it has read the
body; for other views `Views.register` does. What a killed server leaves is said in `store/clients/idempotency.py`.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from urllib.parse import urlsplit

import flask
from werkzeug.wrappers import Response

from provider_image.errors import InvalidParams
from server.auth.guard import current_key_id
from server.endpoint import PAGES, Operation, get_operation
from server.errors import KeyUnderWay
from server.intake.uploads import IDEMPOTENCY_KEY, ActiveReads, body_digest, read_fields, read_pieces
from store.clients.idempotency import EarlierRequest, Idempotency, IdempotencyKeyReused, SavedResponse
from store.clients.keys import Scope
from store.errors import StoreError

log = logging.getLogger(__name__)

REPLAYED = "Idempotent-Replayed"
#: Longest key, in characters.
MAX_KEY_LENGTH = 255
#: Responses are kept this long, unless newer ones need the room.
RETENTION_SECONDS = 86400.0
#: Headers that are stored with a response.
_HEADERS = ("Content-Type", "Location", "Cache-Control")


def is_repeatable(operation: Operation) -> bool:
    """Tell whether a view takes an idempotency key: it is a POST that needs an API key and changes something."""
    return operation.methods == ["POST"] and operation.scope not in (None, Scope.READ) and operation.tag != PAGES


class Repetitions:
    """Answers repeated requests in one server process.

    :param max_body_bytes: beyond that, the body of a repeated request is not compared.
    """

    def __init__(
        self, keys: Idempotency, *, active_reads: ActiveReads, max_body_bytes: int, clock: Callable[[], datetime]
    ) -> None:
        self._keys = keys
        self._active_reads = active_reads
        self._max_body_bytes = max_body_bytes
        self._clock = clock
        #: What the store does not know yet of requests that have ended.
        self._unwritten: collections.deque[Callable[[], object]] = collections.deque()

    def answer_repeated(self) -> flask.Response | None:
        """Answer a request whose key was used before; None for any other, which its view answers.

        :raises InvalidParams: the key is too long. :raises IdempotencyKeyReused: :raises KeyUnderWay:
        :raises StoreError:
        """
        key = flask.request.headers.get(IDEMPOTENCY_KEY)
        if key is None:
            return None
        view = flask.current_app.view_functions.get(flask.request.endpoint or "")
        operation = None if view is None else get_operation(view)
        if flask.request.method != "POST" or operation is None or not is_repeatable(operation):
            return None
        if not 0 < len(key) <= MAX_KEY_LENGTH:
            raise InvalidParams(f"{IDEMPOTENCY_KEY} takes 1 to {MAX_KEY_LENGTH} characters.")
        self._write_ends()
        earlier = self._keys.find(current_key_id() or "", key, now=self._clock())
        if earlier is None:
            return None
        if earlier.response is None:
            return _replay(earlier)
        digest = self._read_body() if operation.body else self._read_fields()
        earlier.check(_fingerprint(digest))
        return _replay(earlier)

    def once(self, digest: str | None, work: Callable[[], Response]) -> Response:
        """Do the work of a request, unless its key was used since it came; keep the response for repetitions.

        :param digest: of the whole body; None for a request without a key.
        :raises IdempotencyKeyReused: :raises KeyUnderWay: :raises StoreError:
        :raises MlgError: what the work raises; then the key is free.
        """
        if digest is None:
            return work()
        key, fingerprint, now = flask.request.headers[IDEMPOTENCY_KEY], _fingerprint(digest), self._clock()
        expires_at = now + timedelta(seconds=RETENTION_SECONDS)
        found = self._keys.reserve(current_key_id() or "", key, fingerprint, now=now, expires_at=expires_at)
        if isinstance(found, EarlierRequest):
            found.check(fingerprint)
            return _replay(found)
        end = functools.partial(self._keys.release, found)
        try:
            response = work()
            if response.status_code < 400 and not response.is_streamed:
                end = functools.partial(self._keys.save_response, found, _to_saved(response))
            return response
        finally:
            self._unwritten.append(end)
            self._write_ends()

    def wrap(self, view: Callable[..., Response]) -> Callable[..., Response]:
        """Let a view without a body, but for fields, answer repeated requests."""

        @functools.wraps(view)
        def once(**values: str) -> Response:
            digest = self._read_fields() if IDEMPOTENCY_KEY in flask.request.headers else None
            return self.once(digest, functools.partial(view, **values))

        return once

    def _read_fields(self) -> str:
        fields = read_fields(flask.request, active_reads=self._active_reads)
        return hashlib.sha256(repr(sorted(fields.items())).encode("utf-8", "surrogatepass")).hexdigest()

    def _read_body(self) -> str:
        """Read a body only to compare it. :raises MalformedRequest: :raises IdempotencyKeyReused: it is too large."""
        digest = body_digest(flask.request)
        assert digest is not None
        pieces = read_pieces(flask.request, self._max_body_bytes, IdempotencyKeyReused(), self._active_reads)
        for piece in pieces:
            digest.update(piece)
        return digest.hexdigest()

    def _write_ends(self) -> None:
        """Tell the store how requests ended. What cannot be written, for example to a full disk, is tried again."""
        with contextlib.suppress(IndexError):  # another thread took the last one
            for _ in range(len(self._unwritten)):
                end = self._unwritten.popleft()
                try:
                    end()
                except StoreError as error:
                    log.warning("cannot store how a request under an idempotency key ended: %s", error)
                    self._unwritten.append(end)
                    return


def _fingerprint(digest: str) -> str:
    request = flask.request
    return hashlib.sha256(f"{request.method} {request.full_path}\n{digest}".encode()).hexdigest()


def _to_saved(response: Response) -> SavedResponse:
    headers = {name: response.headers[name] for name in _HEADERS if name in response.headers}
    subject = (flask.request.view_args or {}).get("id") or urlsplit(headers.get("Location", "")).path.rpartition("/")[2]
    return SavedResponse(
        status=response.status_code, headers=headers, body=response.get_data(), subject=subject or None
    )


def _replay(earlier: EarlierRequest) -> flask.Response:
    """Build the first response again. :raises KeyUnderWay:"""
    saved = earlier.response
    if saved is None:
        raise KeyUnderWay()
    response = flask.Response(saved.body, saved.status)
    response.headers.update(dict(saved.headers))
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers[REPLAYED] = "true"
    return response

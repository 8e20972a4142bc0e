"""Sessions of browsers: a signed cookie with the id of the key that was used to log in.

Used by `guard.py` and the view that logs in. The cookie holds the key's id, not the key, and every request looks the
key up again: when the key ends, so does the session. The signing secret is a file in the home, readable by its owner
only, created by the first login; delete it and start the server again to end all sessions.

Weakness: a single session cannot be ended. Logging out deletes the cookie in that browser; a copy of it is valid until
SESSION_SECONDS have passed or its key is revoked.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

import flask
from itsdangerous import BadData, URLSafeTimedSerializer
from werkzeug.wrappers import Response

from store.images import as_store_error

#: Name of the cookie.
COOKIE = "mlg_session"
#: A session ends after this time.
SESSION_SECONDS = 12 * 3600
_SECRET_FILE = "session.secret"


class Sessions:
    """Creates and reads the cookies of one home."""

    def __init__(self, home: Path, *, max_age_seconds: int = SESSION_SECONDS) -> None:
        self._max_age_seconds = max_age_seconds
        self._file = home / _SECRET_FILE
        self._signer: URLSafeTimedSerializer | None = None

    def key_id(self, cookie: str) -> str | None:
        """Return the key id that a cookie was signed with; None if it was not signed here, or too long ago.

        :raises StoreError: the secret cannot be read.
        """
        if self._signer is None and not self._file.exists():
            return None
        try:
            id = self._get_signer().loads(cookie, max_age=self._max_age_seconds)
        except BadData:
            return None
        return id if isinstance(id, str) else None

    def start(self, response: Response, key_id: str) -> None:
        """Give a browser the cookie of a key. :raises StoreError: the secret cannot be written."""
        response.set_cookie(
            COOKIE,
            str(self._get_signer().dumps(key_id)),
            max_age=SESSION_SECONDS,
            httponly=True,
            samesite="Strict",
            # A proxy that terminates TLS sends this header; a forged one only makes the sender's own cookie stricter.
            secure=flask.request.is_secure or flask.request.headers.get("X-Forwarded-Proto", "").lower() == "https",
        )

    @staticmethod
    def end(response: Response) -> None:
        """Delete the cookie in a browser."""
        response.delete_cookie(COOKIE, httponly=True, samesite="Strict")

    def _get_signer(self) -> URLSafeTimedSerializer:
        if self._signer is None:
            try:
                self._signer = URLSafeTimedSerializer(self._secret(), salt="mlg session v1")
            except OSError as error:
                raise as_store_error(error, self._file) from error
        return self._signer

    def _secret(self) -> bytes:
        """Read the secret; create it if there is none. Of several processes that create one, the first wins."""
        with contextlib.suppress(FileNotFoundError):
            return self._file.read_bytes()
        draft = self._file.with_name(f"{_SECRET_FILE}.{secrets.token_hex(8)}")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        try:
            with contextlib.suppress(FileExistsError):
                os.link(draft, self._file)
        finally:
            draft.unlink()
        return self._file.read_bytes()

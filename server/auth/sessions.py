"""Sessions of browsers: a signed cookie with the id of the key that was used to log in.

Used by `guard.py` and the view that logs in. The cookie holds the key's id, not the key, and every request looks the
key up again: when the key ends, so does the session. It is signed with the secret of the home, see `home_secret.py`;
delete that file and start the server again to end all sessions.

Weakness: a single session cannot be ended. Logging out deletes the cookie in that browser; a copy of it is valid until
SESSION_SECONDS have passed or its key is revoked.
"""

from __future__ import annotations

from pathlib import Path

import flask
from itsdangerous import BadData, URLSafeTimedSerializer
from werkzeug.wrappers import Response

from server.auth.home_secret import has_home_secret, read_home_secret

#: Name of the cookie.
COOKIE = "mlg_session"
#: A session ends after this time.
SESSION_SECONDS = 12 * 3600


class Sessions:
    """Creates and reads the cookies of one home."""

    def __init__(self, home: Path, *, max_age_seconds: int = SESSION_SECONDS) -> None:
        self._max_age_seconds = max_age_seconds
        self._home = home
        self._signer: URLSafeTimedSerializer | None = None

    def key_id(self, cookie: str) -> str | None:
        """Return the key id that a cookie was signed with; None if it was not signed here, or too long ago.

        :raises StoreError: the secret cannot be read.
        """
        if self._signer is None and not has_home_secret(self._home):
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
            self._signer = URLSafeTimedSerializer(read_home_secret(self._home), salt="mlg session v1")
        return self._signer

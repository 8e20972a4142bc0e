"""The secret of a home: a file that only its owner can read, created when it is first needed.

Used by `sessions.py`, which signs cookies with it, and by `cursors.py`, which encrypts with it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from store.images import as_store_error

_FILE = "session.secret"


def has_home_secret(home: Path) -> bool:
    """Tell whether a home has a secret yet."""
    return (home / _FILE).exists()


def read_home_secret(home: Path) -> bytes:
    """Read the secret of a home; create it if there is none. Of several processes that create one, the first wins.

    :raises StoreError: it cannot be read or written.
    """
    file = home / _FILE
    try:
        with contextlib.suppress(FileNotFoundError):
            return file.read_bytes()
        draft = home / f"{_FILE}.{secrets.token_hex(8)}"
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
            opened.write(secrets.token_bytes(32))
            opened.flush()
            os.fsync(opened.fileno())
        try:
            with contextlib.suppress(FileExistsError):
                os.link(draft, file)
        finally:
            draft.unlink()
        return file.read_bytes()
    except OSError as error:
        raise as_store_error(error, file) from error

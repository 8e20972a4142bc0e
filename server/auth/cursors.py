"""Cursors: positions in lists and event streams, as text for clients.

Used by the views and by `server/live/sse.py`. A position is a number that counts the requests, the batches or the
changes of all keys. In a cursor it is encrypted, so that a client cannot tell how much others send, and authenticated:
a cursor is valid for the key and the list that it was made for, as long as the secret of the home is the same. Two
cursors of the same position differ: that they were equal would tell that nobody has sent anything in between.

The construction is that of SIV (RFC 5297) with HMAC-SHA256: a tag of the position and of random bytes before it, which
is also the nonce of their encryption.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hmac
import secrets
import struct
from dataclasses import dataclass
from pathlib import Path

from server.auth.home_secret import read_home_secret

_TAG_BYTES = 16
_RANDOM_BYTES = 8
_NUMBER_BYTES = 8
#: As many as one SHA-256 encrypts beside the random bytes.
_MAX_NUMBERS = 3


class Cursors:
    """The cursors of one home."""

    def __init__(self, home: Path) -> None:
        self._home = home

    @functools.cached_property
    def secret(self) -> bytes:
        """What cursors are encrypted with, read when the first is needed. :raises StoreError:"""
        return hmac.digest(read_home_secret(self._home), b"mlg cursors v1", "sha256")

    def codec(self, list_name: str, key_id: str | None) -> CursorCodec:
        """Return what writes and reads the cursors of a list.

        :param key_id: of the key whose entries the list has; None for those of all keys.
        """
        return CursorCodec(cursors=self, scope=f"{list_name}\0{key_id or ''}".encode())


@dataclass(frozen=True, kw_only=True)
class CursorCodec:
    """Writes and reads the cursors of one list for one key.

    :raises StoreError: by both methods, when the secret of the home cannot be read.
    """

    cursors: Cursors
    #: Name of the list and id of the key.
    scope: bytes

    def write(self, *position: int) -> str:
        """Return a position as text. :param position: up to three numbers of 63 bits."""
        plain = secrets.token_bytes(_RANDOM_BYTES) + struct.pack(f">{len(position)}q", *position)
        tag = self._tag(plain)
        return base64.urlsafe_b64encode(tag + self._encrypt(plain, tag)).decode().rstrip("=")

    def read(self, text: str) -> tuple[int, ...] | None:
        """Return the position that was written; None for any other text."""
        if len(text) > 100:
            return None
        try:
            data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        except (binascii.Error, ValueError):
            return None
        count, rest = divmod(len(data) - _TAG_BYTES - _RANDOM_BYTES, _NUMBER_BYTES)
        if rest or not 1 <= count <= _MAX_NUMBERS:
            return None
        tag = data[:_TAG_BYTES]
        plain = self._encrypt(data[_TAG_BYTES:], tag)  # which also decrypts
        if not hmac.compare_digest(tag, self._tag(plain)):
            return None
        return struct.unpack(f">{count}q", plain[_RANDOM_BYTES:])

    def _tag(self, plain: bytes) -> bytes:
        return hmac.digest(self.cursors.secret, b"tag\0" + self.scope + b"\0" + plain, "sha256")[:_TAG_BYTES]

    def _encrypt(self, text: bytes, tag: bytes) -> bytes:
        mask = hmac.digest(self.cursors.secret, b"mask\0" + tag, "sha256")
        return bytes(a ^ b for a, b in zip(text, mask, strict=False))

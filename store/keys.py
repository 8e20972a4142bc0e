"""API keys: what they look like, what is kept of them, and the protocol of the store's part that keeps them.

A key is `mlg_ID_SECRET`. The id is looked up and may be shown anywhere; of the whole only a hash is kept, so that
nobody who reads the database can use a key. The secret is 256 random bits, so a plain sha256 is
enough: there is nothing to guess that a slow hash would protect. Nothing here may write a key into a log or an error.

A quota counts pictures by day (UTC) and is exact: it is counted in the same commit that adds the pictures.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import re
import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from provider_image.errors import MlgError
from store.records import from_text

#: Keeps the hash of a key apart from any other sha256 of the same text.
_DOMAIN = b"mlg api key v1\0"
_ID_ALPHABET = string.ascii_lowercase + string.digits
_KEY = re.compile(r"mlg_([a-z0-9]{12})_[A-Za-z0-9_-]{32,64}")
#: What an unknown id is compared with, so that it takes as long as a known one.
_DUMMY_HASH = "0" * 64


class Scope(enum.StrEnum):
    """What an API key may be good for."""

    #: Send pictures, cancel and retry one's own.
    SUBMIT = "submit"
    #: Read what is one's own.
    READ = "read"
    #: See and change everything.
    OPERATE = "operate"


class UnknownKey(MlgError):
    """There is no such API key, or it is revoked already. `mlg keys list` shows those there are."""

    code = "unknown_key"
    permanent = True


class KeyNameTaken(MlgError):
    """There is an API key with this name. Choose another, or revoke that one first: mlg keys revoke NAME"""

    code = "key_name_taken"
    permanent = True


@dataclass(frozen=True, kw_only=True)
class KeyRecord:
    """A key as the store knows it."""

    #: Twelve letters and digits; not secret.
    id: str
    #: What the operator calls it.
    name: str
    #: Hash of the whole key.
    sha256: str = field(repr=False)
    #: What it is good for.
    scopes: frozenset[Scope]
    #: Pictures a day (UTC); None is as many as one likes.
    images_per_day: int | None = None
    #: Requests a minute; None is as many as one likes.
    requests_per_minute: int | None = None
    #: When it was made.
    created_at: datetime
    #: Not good any more from then on.
    expires_at: datetime | None = None
    #: When it was revoked.
    revoked_at: datetime | None = None
    #: When it was used, to a minute.
    last_used_at: datetime | None = None

    @property
    def is_operator(self) -> bool:
        """Tell whether it may see and change everything."""
        return Scope.OPERATE in self.scopes

    def has_scope(self, scope: Scope) -> bool:
        """Tell whether it has a scope; to operate includes everything."""
        return self.is_operator or scope in self.scopes

    def is_usable(self, now: datetime) -> bool:
        """Tell whether it is neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> KeyRecord:
        """Build the record from a row of the table `api_keys`."""

        def moment(column: str) -> datetime | None:
            return None if row[column] is None else from_text(row[column])

        return cls(
            id=row["id"],
            name=row["name"],
            sha256=row["sha256"],
            scopes=frozenset(Scope(word) for word in row["scopes"].split()),
            images_per_day=row["pictures_per_day"],
            requests_per_minute=row["requests_per_minute"],
            created_at=from_text(row["created_at"]),
            expires_at=moment("expires_at"),
            revoked_at=moment("revoked_at"),
            last_used_at=moment("last_used_at"),
        )


def make_key() -> tuple[str, str]:
    """Make a key. :return: its id, and the whole of it."""
    id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(12))
    return id, f"mlg_{id}_{secrets.token_urlsafe(32)}"


def key_id_of(key: str) -> str | None:
    """Return the id that stands in a key; None if the text is none."""
    found = _KEY.fullmatch(key)
    return None if found is None else found[1]


def hash_key(key: str) -> str:
    """Return what is kept of a key, as hex digits."""
    return hashlib.sha256(_DOMAIN + key.encode()).hexdigest()


def verify_key(key: str, record: KeyRecord | None) -> bool:
    """Tell whether a text is the key of a record, in a time that does not depend on how nearly it is."""
    return hmac.compare_digest(hash_key(key), _DUMMY_HASH if record is None else record.sha256) and record is not None


@dataclass(frozen=True, kw_only=True)
class Grant:
    """A part of a minute's requests that was given to one server process."""

    #: Requests that the process may answer.
    granted: int
    #: Those that nobody has been given.
    left: int


class Keys(Protocol):
    """The keys, and what was used of their limits."""

    def add_key(self, key: KeyRecord) -> None:
        """Add a key. :raises KeyNameTaken: one that is not revoked has the name."""

    def find_key(self, id: str) -> KeyRecord | None:
        """Read a key, also one that is good no more; None if there is none."""

    def list_keys(self) -> list[KeyRecord]:
        """List all keys, oldest first."""

    def has_keys(self) -> bool:
        """Tell whether there was ever a key: the last one's end must not open the door to everybody."""

    def revoke_key(self, id_or_name: str, *, now: datetime) -> KeyRecord:
        """Revoke a key for good. :raises UnknownKey: none that is not revoked has this id or name."""

    def touch_key(self, id: str, *, now: datetime) -> None:
        """Note that a key was used, unless that was noted less than a minute ago."""

    def grant_requests(self, id: str, *, minute: int, limit: int, per_minute: int) -> Grant:
        """Take up to `limit` of the requests that a key may send in a minute, for one process.

        :param minute: minutes since 1970.
        """

    def images_used(self, id: str, *, now: datetime) -> int:
        """Count the pictures that a key sent on this day."""

    def images_used_by_key(self, *, now: datetime) -> dict[str, int]:
        """Count the pictures of this day: key id -> pictures."""

"""API keys: their format, and the table `api_keys`.

A key is `mlg_ID_SECRET`. The id is looked up and may be shown anywhere; of the whole key only a hash is stored, so that
reading the database gives nobody a usable key. The secret is 256 random bits, so a plain sha256 is enough: there is
nothing to guess that a slow hash would protect. Nothing here may write a key into a log or an error.

A quota counts images by day (UTC) and is exact: `usage.py` counts and compares in the commit that adds the images.
"""

from __future__ import annotations

import builtins
import enum
import hashlib
import hmac
import re
import secrets
import sqlite3
import string
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from provider_image.errors import MlgError
from store.clients.usage import USED
from store.database import Database, Transaction
from store.rows import from_row, insert_sql, to_row, to_text

#: Keeps the hash of a key apart from any other sha256 of the same text.
_DOMAIN = b"mlg api key v1\0"
_ID_ALPHABET = string.ascii_lowercase + string.digits
_KEY = re.compile(r"mlg_([a-z0-9]{12})_[A-Za-z0-9_-]{32,64}")
#: Compared with for an unknown id, so that it takes as long as a known one.
_DUMMY_HASH = "0" * 64

#: A key's last use is not written again within this time.
TOUCH_SECONDS = 60

# An id takes precedence over a name: names can be chosen freely.
_REVOKE = """
    UPDATE api_keys SET revoked_at = :now
    WHERE revoked_at IS NULL
      AND id = coalesce((SELECT id FROM api_keys WHERE id = :id_or_name),
                        (SELECT id FROM api_keys WHERE name = :id_or_name AND revoked_at IS NULL))
    RETURNING *
"""

_FIND_NAMED = """
    SELECT * FROM api_keys WHERE :id_or_name IN (id, name)
    ORDER BY id = :id_or_name DESC, revoked_at IS NULL DESC, created_at DESC LIMIT 1
"""

_TOUCH = """
    UPDATE api_keys SET last_used_at = :now WHERE id = :id AND (last_used_at IS NULL OR last_used_at < :before)
"""

_MINUTE = "SELECT minute, minute_requests FROM api_keys WHERE id = ?"

_SET_MINUTE = "UPDATE api_keys SET minute = ?, minute_requests = ? WHERE id = ?"

_USED_BY_KEY = """
    SELECT key_id, sum(accepted + refused) FROM usage WHERE day = ? AND key_id != '' GROUP BY key_id
"""


class Scope(enum.StrEnum):
    """What an API key allows."""

    #: Send images; cancel and retry the key's own requests.
    SUBMIT = "submit"
    #: Read the key's own requests.
    READ = "read"
    #: Train models, which every key may use then; install earlier versions of them.
    TRAIN = "train"
    #: Read the figures of all keys together, for Prometheus.
    METRICS = "metrics"
    #: See and change everything.
    OPERATE = "operate"


class UnknownKey(MlgError):
    """There is no such API key, or it is revoked already. `mlg keys list` shows those there are."""

    permanent = True


class KeyNameTaken(MlgError):
    """There is an API key with this name. Choose another name, or revoke that key first: mlg keys revoke NAME"""

    permanent = True


@dataclass(frozen=True, kw_only=True)
class KeyRecord:
    """One key as it is stored."""

    #: Twelve letters and digits; not secret.
    id: str
    name: str
    #: Hash of the whole key.
    sha256: str = field(repr=False)
    scopes: frozenset[Scope]
    #: Images a day (UTC); None is unlimited.
    images_per_day: int | None = None
    #: Requests a minute; None is unlimited.
    requests_per_minute: int | None = None
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    #: When it was last used, to TOUCH_SECONDS.
    last_used_at: datetime | None = None

    @property
    def is_operator(self) -> bool:
        """Tell whether it allows to see and change everything."""
        return Scope.OPERATE in self.scopes

    def has_scope(self, scope: Scope) -> bool:
        """Tell whether it has a scope; OPERATE includes all others."""
        return self.is_operator or scope in self.scopes

    def is_usable(self, now: datetime) -> bool:
        """Tell whether it is neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


def make_key() -> tuple[str, str]:
    """Make a key. :return: (its id, the whole key)."""
    id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(12))
    return id, f"mlg_{id}_{secrets.token_urlsafe(32)}"


def key_id_of(key: str) -> str | None:
    """Return the id in a key; None if the text is not a key."""
    found = _KEY.fullmatch(key)
    return None if found is None else found[1]


def hash_key(key: str) -> str:
    """Return the hash of a key that is stored, as hex digits."""
    return hashlib.sha256(_DOMAIN + key.encode()).hexdigest()


def verify_key(key: str, record: KeyRecord | None) -> bool:
    """Tell whether a text is the key of a record, in constant time."""
    return hmac.compare_digest(hash_key(key), _DUMMY_HASH if record is None else record.sha256) and record is not None


@dataclass(frozen=True, kw_only=True)
class Grant:
    """A part of a key's requests of one minute, granted to one server process."""

    #: Requests that the process may accept.
    granted: int
    #: Requests of the minute that no process has been granted.
    left: int


def _to_record(row: Any) -> KeyRecord:
    scopes = frozenset(map(Scope, row["scopes"].split()))
    return from_row(KeyRecord, row, scopes=scopes, images_per_day=row["pictures_per_day"])


class Keys:
    """The keys, and what was used of their limits."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, key: KeyRecord) -> None:
        """Add a key. :raises KeyNameTaken: a key that is not revoked has the name."""
        row = to_row(key, scopes=" ".join(sorted(key.scopes)), pictures_per_day=key.images_per_day)
        del row["images_per_day"]

        def write(transaction: Transaction) -> None:
            try:
                transaction.execute(f"INSERT INTO {insert_sql('api_keys', row)}", row)
            except sqlite3.IntegrityError as error:
                if "api_keys.name" in str(error):
                    raise KeyNameTaken() from error
                raise

        self._database.write(write)

    def find(self, id: str) -> KeyRecord | None:
        """Read a key, also a revoked or expired one; None if there is none."""
        row = self._database.row("SELECT * FROM api_keys WHERE id = ?", (id,))
        return None if row is None else _to_record(row)

    def find_named(self, id_or_name: str) -> KeyRecord:
        """Read a key by its id, else by its name; of several with this name one that is not revoked, the latest.

        :raises UnknownKey:
        """
        row = self._database.row(_FIND_NAMED, {"id_or_name": id_or_name})
        if row is None:
            raise UnknownKey("There is no API key with this id or name. `mlg keys list` shows those there are.")
        return _to_record(row)

    def has_any(self) -> bool:
        """Tell whether there was ever a key: revoking the last one must not give access to everybody."""
        return bool(self._database.row("SELECT EXISTS (SELECT 1 FROM api_keys)")[0])

    def revoke(self, id_or_name: str, *, now: datetime) -> KeyRecord:
        """Revoke a key for good. :raises UnknownKey: no key that is not revoked has this id or name."""

        def write(transaction: Transaction) -> KeyRecord:
            rows = transaction.execute(_REVOKE, {"id_or_name": id_or_name, "now": to_text(now)}).fetchall()
            if not rows:
                raise UnknownKey()
            return _to_record(rows[0])

        return self._database.write(write)

    def touch(self, id: str, *, now: datetime) -> None:
        """Record that a key was used, unless that was recorded within TOUCH_SECONDS."""
        row = {"id": id, "now": to_text(now), "before": to_text(now - timedelta(seconds=TOUCH_SECONDS))}
        self._database.execute(_TOUCH, row)

    def grant_requests(self, id: str, *, minute: int, limit: int, per_minute: int) -> Grant:
        """Grant one process up to `limit` of the requests that a key may send in a minute.

        :param minute: minutes since 1970.
        """

        def write(transaction: Transaction) -> Grant:
            known = transaction.execute(_MINUTE, (id,)).fetchone()
            if known is None:
                return Grant(granted=0, left=0)
            # A process that is late by a minute uses the current one; a clock that was set back starts again.
            current = max(minute, known["minute"]) if known["minute"] <= minute + 1 else minute
            used = known["minute_requests"] if known["minute"] == current else 0
            granted = max(0, min(limit, per_minute - used))
            transaction.execute(_SET_MINUTE, (current, used + granted, id))
            return Grant(granted=granted, left=max(0, per_minute - used - granted))

        return self._database.write(write)

    def images_used(self, id: str, *, now: datetime) -> int:
        """Count the images that a key sent on this day (UTC)."""
        return int(self._database.row(USED, {"key_id": id, "day": to_text(now)[:10]})[0])

    def images_used_by_key(self, *, now: datetime) -> dict[str, int]:
        """Count the images of this day (UTC): key id -> images."""
        return dict(self._database.rows(_USED_BY_KEY, (to_text(now)[:10],)))

    def list(self) -> builtins.list[KeyRecord]:
        """List all keys, oldest first."""
        rows = self._database.rows("SELECT * FROM api_keys ORDER BY created_at, id")
        return [_to_record(row) for row in rows]

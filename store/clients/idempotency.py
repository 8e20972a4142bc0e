"""Idempotency keys: the table `idempotency`.

A client that does not know whether its request arrived repeats it under the same key. Used by
`server/intake/idempotency.py`. The store keeps a fingerprint of the request and its response for each owner and key.
While the request is in progress the key is reserved for the process that works on it, until that process ends (see
`process_lock.py`). An owner is an API key's id, or the empty text where none is required. Bodies are compressed, and
the responses of one owner are limited together: the oldest make room. `retention.py` deletes expired keys,
`requests.py` and `batches.py` the responses that tell of what they delete.

Weakness: the work and the response are two commits. A server that is killed between them leaves a key without a
response, and the repetition does the work again.
"""

from __future__ import annotations

import secrets
import sqlite3
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from provider_image.errors import MlgError
from store.database import Database, Transaction
from store.processes.process_lock import ProcessLock
from store.rows import from_row, to_row, to_text

#: All responses of one owner, compressed; each counts as MIN_BYTES at least, so the number is limited as well.
MAX_BYTES_PER_OWNER = 128 * 1024 * 1024
MIN_BYTES = 512
#: Fingerprint of a request that was answered by a version before fingerprints covered everything; any request matches.
ANY_FINGERPRINT = ""
_ROWS_PER_COMMIT = 500

_READ = "SELECT * FROM idempotency WHERE owner = :owner AND key = :key AND expires_at > :now"

_RESERVE = """
    INSERT OR REPLACE INTO idempotency (owner, key, fingerprint, token, expires_at)
    VALUES (:owner, :key, :fingerprint, :token, :expires_at)
"""

_IS_RESERVED = "owner = :owner AND key = :key AND token = :token AND status IS NULL"

# The position is the number of bytes of the owner's responses up to this one.
_SAVE_RESPONSE = f"""
    UPDATE idempotency
    SET status = :status, headers = :headers, body = :body, subject = :subject,
        position = :size + coalesce((SELECT max(position) FROM idempotency WHERE owner = :owner), 0)
    WHERE {_IS_RESERVED}
    RETURNING position
"""

_MAKE_ROOM = f"""
    DELETE FROM idempotency WHERE rowid IN (
        SELECT rowid FROM idempotency WHERE owner = :owner AND position <= :before
        ORDER BY position LIMIT {_ROWS_PER_COMMIT})
"""

_RELEASE = f"DELETE FROM idempotency WHERE {_IS_RESERVED}"

_PURGE = """
    DELETE FROM idempotency WHERE rowid IN (
        SELECT rowid FROM idempotency WHERE expires_at <= :now LIMIT :rows_per_commit)
"""


class IdempotencyKeyReused(MlgError):
    """This Idempotency-Key was used for a different request. Use a new key for each request."""

    code = "key_reused"
    permanent = True


@dataclass(frozen=True, kw_only=True)
class SavedResponse:
    """The first response to a request; its body is not compressed here."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    #: Id of the request or batch that it tells of, with which it is deleted.
    subject: str | None = None


@dataclass(frozen=True, kw_only=True)
class EarlierRequest:
    """An earlier request under the same key."""

    #: Identifies the request.
    fingerprint: str
    #: Its response; None while it is in progress.
    response: SavedResponse | None

    def check(self, fingerprint: str) -> None:
        """Check that a request is this one. :raises IdempotencyKeyReused:"""
        if self.fingerprint not in (fingerprint, ANY_FINGERPRINT):
            raise IdempotencyKeyReused()


@dataclass(frozen=True, kw_only=True)
class KeyReservation:
    """A key that is reserved for a request in progress."""

    owner: str
    key: str
    #: Starts with the id of the process that works on the request.
    token: str


class Idempotency:
    """The idempotency keys."""

    def __init__(self, database: Database, *, max_bytes_per_owner: int = MAX_BYTES_PER_OWNER) -> None:
        self._database = database
        self._max_bytes_per_owner = max_bytes_per_owner
        self._process = ProcessLock(database.path.parent / "locks")

    def find(self, owner: str, key: str, *, now: datetime) -> EarlierRequest | None:
        """Find the request that has a key; None if the key is free. :raises StoreError:"""
        return self._earlier(self._database.row(_READ, {"owner": owner, "key": key, "now": to_text(now)}))

    def reserve(
        self, owner: str, key: str, fingerprint: str, *, now: datetime, expires_at: datetime
    ) -> KeyReservation | EarlierRequest:
        """Reserve a key: of two simultaneous requests one succeeds. :return: the request that has it, if another has.

        :raises StoreError:
        """
        token = f"{self._process.acquire()}-{secrets.token_hex(8)}"
        values = {"owner": owner, "key": key, "fingerprint": fingerprint, "token": token}
        times = {"now": to_text(now), "expires_at": to_text(expires_at)}

        def write(transaction: Transaction) -> KeyReservation | EarlierRequest:
            earlier = self._earlier(transaction.execute(_READ, {**values, **times}).fetchone())
            if earlier is None:
                transaction.execute(_RESERVE, {**values, **times})
            return earlier or KeyReservation(owner=owner, key=key, token=token)

        return self._database.write(write)

    def save_response(self, reservation: KeyReservation, response: SavedResponse) -> bool:
        """Save the response for repetitions. :return: whether the key was still reserved. :raises StoreError:"""
        body = zlib.compress(response.body, 1)
        values = {**to_row(response, body=body), **vars(reservation), "size": max(MIN_BYTES, len(body))}

        def write(transaction: Transaction) -> bool:
            saved = transaction.execute(_SAVE_RESPONSE, values).fetchone()
            if saved is not None:
                before = saved["position"] - self._max_bytes_per_owner
                transaction.execute(_MAKE_ROOM, {"owner": reservation.owner, "before": before})
            return saved is not None

        return self._database.write(write)

    def release(self, reservation: KeyReservation) -> bool:
        """Free the key: there is no response worth keeping. :return: whether it was still reserved."""
        return bool(self._database.execute(_RELEASE, vars(reservation)))

    def purge(self, *, now: datetime) -> int:
        """Delete expired keys. :return: how many."""
        return self._database.execute_in_steps(
            _PURGE, {"now": to_text(now)}, rows_per_commit=_ROWS_PER_COMMIT, is_background=True
        )

    def close(self) -> None:
        """Give up what this process has reserved."""
        self._process.release()

    def _earlier(self, row: sqlite3.Row | None) -> EarlierRequest | None:
        """Read a row; None if its key is free, because the process that reserved it has ended."""
        if row is None:
            return None
        if row["status"] is not None:
            response = from_row(SavedResponse, row, body=zlib.decompress(row["body"]))
            return EarlierRequest(fingerprint=row["fingerprint"], response=response)
        is_alive = self._process.is_alive(row["token"].partition("-")[0])
        return EarlierRequest(fingerprint=row["fingerprint"], response=None) if is_alive else None

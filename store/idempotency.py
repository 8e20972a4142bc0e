"""Idempotency keys: the table `idempotency`.

A client that does not know whether its request arrived repeats it under the same key. Used by
`server/api/idempotency.py`. The store keeps the operation and the first response for each owner and key. While
the first request is in progress the key is reserved under a lease, so a server that is killed in the middle of a
request leaves nothing permanent. An owner is an API key's id, or the empty text where none is required. Bodies are
compressed. `retention.py` deletes expired keys.

Weakness: the work and the response are two commits. A server that is killed between them leaves a key without a
response, and the repetition, once the lease has ended, does the work again.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from provider_image.errors import MlgError
from store.database import Database, Transaction
from store.rows import from_row, to_row, to_text

# A key is free again when it has expired, or when its server was killed before it saved a response.
_RESERVE = """
    INSERT INTO idempotency (owner, key, operation, token, lease_ends_at, expires_at)
    VALUES (:owner, :key, :operation, :token, :lease_ends_at, :expires_at)
    ON CONFLICT (owner, key) DO UPDATE
    SET operation = excluded.operation, token = excluded.token, lease_ends_at = excluded.lease_ends_at,
        expires_at = excluded.expires_at, fingerprint = NULL, status = NULL, headers = NULL, body = NULL
    WHERE idempotency.expires_at <= :now OR (idempotency.status IS NULL AND idempotency.lease_ends_at <= :now)
"""

_READ = "SELECT * FROM idempotency WHERE owner = :owner AND key = :key"

_IS_RESERVED = "owner = :owner AND key = :key AND token = :token AND status IS NULL"

_RENEW = f"UPDATE idempotency SET lease_ends_at = :lease_ends_at WHERE {_IS_RESERVED}"

_SAVE_RESPONSE = f"""
    UPDATE idempotency SET fingerprint = :fingerprint, status = :status, headers = :headers, body = :body
    WHERE {_IS_RESERVED}
"""

_RELEASE = f"DELETE FROM idempotency WHERE {_IS_RESERVED}"


class IdempotencyKeyReused(MlgError):
    """This key was used for a different request. Use a new key for each request."""

    code = "key_reused"
    permanent = True


@dataclass(frozen=True, kw_only=True)
class SavedResponse:
    """The first response to a request; its body is not compressed here."""

    #: Identifies the request body that it belongs to.
    fingerprint: str
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, kw_only=True)
class EarlierRequest:
    """An earlier request under the same key."""

    operation: str
    #: Its response; None while it is in progress.
    response: SavedResponse | None
    #: When its lease ends, if it is in progress.
    lease_ends_at: datetime


class Idempotency:
    """The idempotency keys."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def reserve(
        self,
        owner: str,
        key: str,
        *,
        operation: str,
        token: str,
        now: datetime,
        lease_ends_at: datetime,
        expires_at: datetime,
    ) -> EarlierRequest | None:
        """Reserve a key, in one statement: of two simultaneous requests one succeeds.

        :param token: proves the reservation to the other methods.
        :return: None when the key is reserved now, else the earlier request.
        """
        values = {
            "owner": owner,
            "key": key,
            "operation": operation,
            "token": token,
            "now": to_text(now),
            "lease_ends_at": to_text(lease_ends_at),
            "expires_at": to_text(expires_at),
        }

        def write(transaction: Transaction) -> EarlierRequest | None:
            if transaction.execute(_RESERVE, values).rowcount:
                return None
            row = transaction.execute(_READ, values).fetchone()
            is_answered = row["status"] is not None
            response = from_row(SavedResponse, row, body=zlib.decompress(row["body"])) if is_answered else None
            return from_row(EarlierRequest, row, response=response)

        return self._database.write(write)

    def renew(self, owner: str, key: str, token: str, *, lease_ends_at: datetime) -> bool:
        """Extend the lease. :return: whether the key is still reserved by this token."""
        return self._change(_RENEW, owner, key, token, lease_ends_at=to_text(lease_ends_at))

    def save_response(self, owner: str, key: str, token: str, response: SavedResponse) -> bool:
        """Save the response for repetitions. :return: whether the key was still reserved by this token."""
        return self._change(_SAVE_RESPONSE, owner, key, token, **to_row(response, body=zlib.compress(response.body, 1)))

    def release(self, owner: str, key: str, token: str) -> bool:
        """Free the key: there is no response worth keeping. :return: whether it was still reserved by this token."""
        return self._change(_RELEASE, owner, key, token)

    def _change(self, sql: str, owner: str, key: str, token: str, **values: str | int | bytes) -> bool:
        return bool(self._database.execute(sql, {"owner": owner, "key": key, "token": token, **values}))

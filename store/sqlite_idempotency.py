"""The keys of repeated requests on SQLite: the table `idempotency`. Bodies are compressed.

A base of `SqliteStore`, which gives it the writer and the readers. What is over is deleted by `sqlite_retention.py`.
"""

from __future__ import annotations

import json
import zlib
from datetime import datetime

from store.database import ReaderPool, Transaction, Writer
from store.idempotency import EarlierRequest, SavedResponse
from store.records import from_text, to_text

# Over is what has expired, and what was under way when its server was killed.
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


class SqliteIdempotency:
    """What `Idempotency` promises."""

    _writer: Writer
    _readers: ReaderPool

    def reserve_idempotency_key(
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
        """See Idempotency.begin_once."""
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
            answer = None
            if row["status"] is not None:
                answer = SavedResponse(
                    fingerprint=row["fingerprint"],
                    status=row["status"],
                    headers=json.loads(row["headers"]),
                    body=zlib.decompress(row["body"]),
                )
            return EarlierRequest(
                operation=row["operation"], answer=answer, lease_ends_at=from_text(row["lease_ends_at"])
            )

        earlier: EarlierRequest | None = self._writer.run(write)
        return earlier

    def renew_idempotency_key(self, owner: str, key: str, token: str, *, lease_ends_at: datetime) -> bool:
        """See Idempotency.renew_once."""
        return self._change(_RENEW, owner, key, token, lease_ends_at=to_text(lease_ends_at))

    def save_response(self, owner: str, key: str, token: str, answer: SavedResponse) -> bool:
        """See Idempotency.keep_answer."""
        return self._change(
            _SAVE_RESPONSE,
            owner,
            key,
            token,
            fingerprint=answer.fingerprint,
            status=answer.status,
            headers=json.dumps(dict(answer.headers)),
            body=zlib.compress(answer.body, 1),
        )

    def release_idempotency_key(self, owner: str, key: str, token: str) -> bool:
        """See Idempotency.forget_once."""
        return self._change(_RELEASE, owner, key, token)

    def _change(self, sql: str, owner: str, key: str, token: str, **values: str | int | bytes) -> bool:
        row = {"owner": owner, "key": key, "token": token, **values}
        changed: int = self._writer.run(lambda transaction: transaction.execute(sql, row).rowcount)
        return bool(changed)

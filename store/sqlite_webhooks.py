"""Webhooks on SQLite: the tables `webhook_endpoints`, `webhook_deliveries` and `webhook_secret`.

A base of `SqliteStore`, which gives it the writer and the readers. Messages are added by triggers of `requests`.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict
from datetime import datetime
from typing import Any

from store.database import ReaderPool, Transaction, Writer
from store.records import from_text, to_text
from store.webhooks import MAX_DELIVERIES_PER_URL, DeliveryRecord, EndpointRecord, UnknownWebhook

#: Messages that one commit deletes.
ROWS_PER_COMMIT = 500

_ADD_ENDPOINT = """
    INSERT INTO webhook_endpoints (id, url, events, secret, created_at, disabled_at, disabled_reason)
    VALUES (:id, :url, :events, :secret, :created_at, :disabled_at, :disabled_reason)
"""

_IS_DUE = """
    SELECT 1 FROM webhook_deliveries WHERE next_at IS NOT NULL AND next_at <= ? LIMIT 1
"""

# A few an address, so that an address that does not answer does not hold up the others.
_CLAIM = """
    UPDATE webhook_deliveries SET attempts = attempts + 1, next_at = :lease_ends_at
    WHERE id IN (
        SELECT id FROM (
            SELECT id, next_at, row_number() OVER (PARTITION BY url ORDER BY next_at, id) AS place
            FROM webhook_deliveries
            WHERE next_at IS NOT NULL AND next_at <= :now AND url NOT IN (SELECT value FROM json_each(:except_urls)))
        WHERE place <= :most ORDER BY next_at LIMIT :limit)
    RETURNING *
"""

# The count of tries is the fencing token.
_FINISH_DELIVERY = """
    UPDATE webhook_deliveries
    SET next_at = :next_at, delivered_at = :delivered_at, dead_at = :dead_at, last_status = :status, last_error = :error
    WHERE id = :id AND attempts = :attempts AND next_at IS NOT NULL
"""

_GIVE_UP = """
    UPDATE webhook_deliveries SET next_at = NULL, dead_at = :now, last_error = :reason
    WHERE endpoint_id = :id AND next_at IS NOT NULL
"""

_REDELIVER = """
    UPDATE webhook_deliveries SET next_at = :now, delivered_at = NULL, dead_at = NULL, attempts = 0
    WHERE id = :id RETURNING *
"""

_PURGE = """
    DELETE FROM webhook_deliveries WHERE id IN (
        SELECT id FROM webhook_deliveries WHERE delivered_at < :before
        UNION ALL
        SELECT id FROM webhook_deliveries WHERE dead_at < :before
        LIMIT :step)
"""

_WHICH = {
    None: "1",
    "pending": "next_at IS NOT NULL",
    "delivered": "delivered_at IS NOT NULL",
    "dead": "dead_at IS NOT NULL",
}


def delete_deliveries(writer: Writer, *, before: datetime) -> int:
    """Delete messages that were delivered, or given up, before that time, in small commits. :return: how many."""
    values = {"before": to_text(before), "step": ROWS_PER_COMMIT}
    total = 0
    while True:
        deleted: int = writer.run(lambda transaction: transaction.execute(_PURGE, values).rowcount)
        total += deleted
        if deleted < ROWS_PER_COMMIT:
            return total


class SqliteWebhooks:
    """Who wants messages, and the messages."""

    _writer: Writer
    _readers: ReaderPool

    def add_endpoint(self, endpoint: EndpointRecord) -> None:
        """See Webhooks.add_endpoint."""
        row = {
            name: to_text(value) if isinstance(value, datetime) else value for name, value in asdict(endpoint).items()
        }
        row["events"] = ",".join(endpoint.events)
        self._write_rows(_ADD_ENDPOINT, row)

    def remove_endpoint(self, id: str) -> None:
        """See Webhooks.remove_endpoint."""

        def write(transaction: Transaction) -> int:
            transaction.execute("DELETE FROM webhook_deliveries WHERE endpoint_id = ? AND next_at IS NOT NULL", (id,))
            return transaction.execute("DELETE FROM webhook_endpoints WHERE id = ?", (id,)).rowcount

        if not self._writer.run(write):
            raise UnknownWebhook(f"There is no webhook {id[:80]}. See: mlg webhooks list")

    def list_endpoints(self) -> list[EndpointRecord]:
        """See Webhooks.list_endpoints."""
        with self._readers.connection() as connection:
            rows = connection.execute("SELECT * FROM webhook_endpoints ORDER BY created_at, id").fetchall()
        return [EndpointRecord(**{**_values(row), "events": tuple(row["events"].split(","))}) for row in rows]

    def webhook_secret(self, endpoint_id: str | None) -> str:
        """See Webhooks.webhook_secret."""
        with self._readers.connection() as connection:
            if endpoint_id is None:
                row = connection.execute("SELECT secret FROM webhook_secret").fetchone()
            else:
                row = connection.execute("SELECT secret FROM webhook_endpoints WHERE id = ?", (endpoint_id,)).fetchone()
        if row is None:
            raise UnknownWebhook()
        return str(row[0])

    def claim_deliveries(
        self, *, now: datetime, lease_ends_at: datetime, limit: int, except_urls: Collection[str]
    ) -> list[DeliveryRecord]:
        """See Webhooks.claim_deliveries."""
        # Looking costs no write lock; most looks find nothing.
        with self._readers.connection() as connection:
            if connection.execute(_IS_DUE, (to_text(now),)).fetchone() is None:
                return []
        values = {
            "now": to_text(now),
            "lease_ends_at": to_text(lease_ends_at),
            "limit": limit,
            "most": MAX_DELIVERIES_PER_URL,
            "except_urls": json.dumps(sorted(except_urls)),
        }
        rows = self._writer.run(lambda transaction: transaction.execute(_CLAIM, values).fetchall())
        return [_delivery(row) for row in rows]

    def save_payload(self, id: str, payload: str) -> None:
        """See Webhooks.note_payload."""
        self._write_rows("UPDATE webhook_deliveries SET payload = coalesce(payload, ?) WHERE id = ?", (payload, id))

    def delete_delivery(self, id: str) -> None:
        """See Webhooks.drop_delivery."""
        self._write_rows("DELETE FROM webhook_deliveries WHERE id = ?", (id,))

    def finish_delivery(
        self,
        delivery: DeliveryRecord,
        *,
        now: datetime,
        retry_at: datetime | None,
        status: int | None,
        error: str | None,
    ) -> bool:
        """See Webhooks.settle_delivery."""
        row = {
            "id": delivery.id,
            "attempts": delivery.attempts,
            "next_at": None if retry_at is None else to_text(retry_at),
            "delivered_at": to_text(now) if error is None else None,
            "dead_at": to_text(now) if error is not None and retry_at is None else None,
            "status": status,
            "error": error,
        }
        return bool(self._write_rows(_FINISH_DELIVERY, row))

    def disable_endpoint(self, id: str, *, reason: str, now: datetime) -> None:
        """See Webhooks.disable_endpoint."""
        row = {"id": id, "reason": reason, "now": to_text(now)}

        def write(transaction: Transaction) -> None:
            transaction.execute(
                "UPDATE webhook_endpoints SET disabled_at = :now, disabled_reason = :reason WHERE id = :id", row
            )
            transaction.execute(_GIVE_UP, row)

        self._writer.run(write)

    def list_deliveries(self, *, status: str | None = None, limit: int = 50) -> list[DeliveryRecord]:
        """See Webhooks.list_deliveries."""
        with self._readers.connection() as connection:
            rows = connection.execute(
                f"SELECT * FROM webhook_deliveries WHERE {_WHICH[status]} ORDER BY created_at DESC, id LIMIT ?",
                (limit,),
            ).fetchall()
        return [_delivery(row) for row in rows]

    def redeliver(self, id: str, *, now: datetime) -> DeliveryRecord:
        """See Webhooks.redeliver."""
        row = {"id": id, "now": to_text(now)}
        rows = self._writer.run(lambda transaction: transaction.execute(_REDELIVER, row).fetchall())
        if not rows:
            raise UnknownWebhook(f"There is no delivery {id[:80]}. See: mlg webhooks dead")
        return _delivery(rows[0])

    def purge_deliveries(self, *, before: datetime) -> int:
        """See Webhooks.purge_deliveries."""
        return delete_deliveries(self._writer, before=before)

    def _write_rows(self, sql: str, values: Any) -> int:
        changed: int = self._writer.run(lambda transaction: transaction.execute(sql, values).rowcount)
        return changed


def _values(row: Any) -> dict[str, Any]:
    return {
        name: from_text(value) if name.endswith("_at") and value is not None else value
        for name, value in dict(row).items()
    }


def _delivery(row: Any) -> DeliveryRecord:
    return DeliveryRecord(**_values(row))

"""Webhooks: the tables `webhook_endpoints`, `webhook_deliveries` and `webhook_secret`.

Commands and views manage endpoints, `server/webhooks.py` sends. `transition` adds a delivery in the
transaction that makes a request or batch final, so there is exactly one for each event and URL. A delivery is sent at
least once: when a sender dies, another one claims its delivery after the lease has ended.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from provider_image.errors import MlgError
from store.database import Database, Transaction
from store.rows import from_row, insert_sql, to_row, to_text

#: The events. A request is done when it is final, whatever the outcome; a batch when all of its requests are.
EVENTS = ("request.done", "batch.done")
#: Prefix that marks a text as a webhook secret.
SECRET_PREFIX = "whsec_"
_SECRET_BYTES = 32
#: Deliveries that one claim takes for one URL.
MAX_DELIVERIES_PER_URL = 4

#: Deliveries that one commit deletes.
ROWS_PER_COMMIT = 500

_IS_DUE = """
    SELECT 1 FROM webhook_deliveries WHERE next_at IS NOT NULL AND next_at <= ? LIMIT 1
"""

# A few for each URL, so that a URL that does not answer does not delay the others.
_CLAIM = """
    UPDATE webhook_deliveries SET attempts = attempts + 1, next_at = :lease_ends_at
    WHERE id IN (
        SELECT id FROM (
            SELECT id, next_at, row_number() OVER (PARTITION BY url ORDER BY next_at, id) AS place
            FROM webhook_deliveries
            WHERE next_at IS NOT NULL AND next_at <= :now AND url NOT IN (SELECT value FROM json_each(:except_urls)))
        WHERE place <= :max_per_url ORDER BY next_at LIMIT :limit)
    RETURNING *
"""

# The number of attempts is the fencing token.
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
        LIMIT :rows_per_commit)
"""

_WHICH = {
    None: "1",
    "pending": "next_at IS NOT NULL",
    "delivered": "delivered_at IS NOT NULL",
    "dead": "dead_at IS NOT NULL",
}


def new_secret() -> str:
    """Make a secret for signing deliveries."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


class UnknownWebhook(MlgError):
    """There is no such webhook or delivery. See: mlg webhooks list, mlg webhooks deliveries"""

    permanent = True


@dataclass(frozen=True, kw_only=True)
class EndpointRecord:
    """A URL that receives all events of some kinds."""

    #: Starts with "we_".
    id: str
    url: str
    #: Which of EVENTS it receives.
    events: tuple[str, ...]
    #: Signs the deliveries.
    secret: str
    created_at: datetime
    #: Since when it receives nothing any more; None while it is enabled.
    disabled_at: datetime | None = None
    disabled_reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class DeliveryRecord:
    """One event for one URL."""

    #: The same however often it is sent: receivers recognise repetitions by it.
    id: str
    #: The endpoint; None for a URL that was sent with a request or batch.
    endpoint_id: str | None
    url: str
    #: One of EVENTS.
    event: str
    #: The request's or the batch's id.
    subject: str
    state: str
    #: The body; None before the first attempt.
    payload: str | None
    created_at: datetime
    #: Attempts so far, the current one included.
    attempts: int
    #: When it is sent next, or when the lease of the current attempt ends; None once it is delivered or dead.
    next_at: datetime | None
    delivered_at: datetime | None
    dead_at: datetime | None
    last_status: int | None
    last_error: str | None

    @property
    def status(self) -> str:
        """One of DELIVERY_STATES."""
        return "delivered" if self.delivered_at else "dead" if self.dead_at else "pending"


#: Values of `DeliveryRecord.status`.
DELIVERY_STATES = ("pending", "delivered", "dead")


class Webhooks:
    """The endpoints and the deliveries."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add_endpoint(self, endpoint: EndpointRecord) -> None:
        """Add an endpoint."""
        row = to_row(endpoint, events=",".join(endpoint.events))
        self._database.execute(f"INSERT INTO {insert_sql('webhook_endpoints', row)}", row)

    def remove_endpoint(self, id: str) -> None:
        """Remove an endpoint and its pending deliveries. :raises UnknownWebhook:"""

        def write(transaction: Transaction) -> int:
            transaction.execute("DELETE FROM webhook_deliveries WHERE endpoint_id = ? AND next_at IS NOT NULL", (id,))
            return transaction.execute("DELETE FROM webhook_endpoints WHERE id = ?", (id,)).rowcount

        if not self._database.write(write):
            raise UnknownWebhook(f"There is no webhook {id[:80]}. See: mlg webhooks list")

    def list_endpoints(self) -> list[EndpointRecord]:
        """List the endpoints, oldest first."""
        rows = self._database.rows("SELECT * FROM webhook_endpoints ORDER BY created_at, id")
        return [from_row(EndpointRecord, row, events=tuple(row["events"].split(","))) for row in rows]

    def secret(self, endpoint_id: str | None) -> str:
        """Return the secret that signs deliveries to an endpoint.

        :param endpoint_id: None for URLs that were sent with requests and batches.
        :raises UnknownWebhook:
        """
        if endpoint_id is None:
            row = self._database.row("SELECT secret FROM webhook_secret")
        else:
            row = self._database.row("SELECT secret FROM webhook_endpoints WHERE id = ?", (endpoint_id,))
        if row is None:
            raise UnknownWebhook()
        return str(row[0])

    def claim_deliveries(
        self, *, now: datetime, lease_ends_at: datetime, limit: int, except_urls: Collection[str]
    ) -> list[DeliveryRecord]:
        """Claim due deliveries, the longest due first, at most MAX_DELIVERIES_PER_URL for each URL."""
        # Reading needs no write lock, and most calls find nothing.
        if self._database.row(_IS_DUE, (to_text(now),)) is None:
            return []
        values = {
            "now": to_text(now),
            "lease_ends_at": to_text(lease_ends_at),
            "limit": limit,
            "max_per_url": MAX_DELIVERIES_PER_URL,
            "except_urls": json.dumps(sorted(except_urls)),
        }
        rows = self._database.write(lambda transaction: transaction.execute(_CLAIM, values).fetchall())
        return [from_row(DeliveryRecord, row) for row in rows]

    def save_payload(self, id: str, payload: str) -> None:
        """Save the body of a delivery, so that every attempt sends the same. The first one counts."""
        self._database.execute(
            "UPDATE webhook_deliveries SET payload = coalesce(payload, ?) WHERE id = ?", (payload, id)
        )

    def delete_delivery(self, id: str) -> None:
        """Delete a delivery whose event no longer holds."""
        self._database.execute("DELETE FROM webhook_deliveries WHERE id = ?", (id,))

    def finish_delivery(
        self,
        delivery: DeliveryRecord,
        *,
        now: datetime,
        retry_at: datetime | None,
        status: int | None,
        error: str | None,
    ) -> bool:
        """Record the result of an attempt.

        :param retry_at: when to try again; None with an error gives the delivery up, without one it is delivered.
        :return: False when the lease had ended and another sender has claimed the delivery.
        """
        row = {
            "id": delivery.id,
            "attempts": delivery.attempts,
            "next_at": None if retry_at is None else to_text(retry_at),
            "delivered_at": to_text(now) if error is None else None,
            "dead_at": to_text(now) if error is not None and retry_at is None else None,
            "status": status,
            "error": error,
        }
        return bool(self._database.execute(_FINISH_DELIVERY, row))

    def disable_endpoint(self, id: str, *, reason: str, now: datetime) -> None:
        """Disable an endpoint and give up its pending deliveries."""
        row = {"id": id, "reason": reason, "now": to_text(now)}

        def write(transaction: Transaction) -> None:
            transaction.execute(
                "UPDATE webhook_endpoints SET disabled_at = :now, disabled_reason = :reason WHERE id = :id", row
            )
            transaction.execute(_GIVE_UP, row)

        self._database.write(write)

    def list_deliveries(self, *, status: str | None = None, limit: int = 50) -> list[DeliveryRecord]:
        """List deliveries, newest first. :param status: one of DELIVERY_STATES; None lists all."""
        return self._database.records(
            DeliveryRecord,
            f"SELECT * FROM webhook_deliveries WHERE {_WHICH[status]} ORDER BY created_at DESC, id LIMIT ?",
            (limit,),
        )

    def redeliver(self, id: str, *, now: datetime) -> DeliveryRecord:
        """Queue a delivery again, due now, its attempts reset. :raises UnknownWebhook:"""
        row = {"id": id, "now": to_text(now)}
        rows = self._database.write(lambda transaction: transaction.execute(_REDELIVER, row).fetchall())
        if not rows:
            raise UnknownWebhook(f"There is no delivery {id[:80]}. See: mlg webhooks dead")
        return from_row(DeliveryRecord, rows[0])

    def purge(self, *, before: datetime) -> int:
        """Delete deliveries that were delivered, or given up, before a time. :return: how many."""
        return self._database.execute_in_steps(_PURGE, {"before": to_text(before)}, rows_per_commit=ROWS_PER_COMMIT)

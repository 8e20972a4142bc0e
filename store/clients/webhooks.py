"""Webhooks: the tables `webhook_endpoints`, `webhook_deliveries` and `webhook_secrets`.

Commands and views manage endpoints, `server/webhooks.py` sends. `transition` adds a delivery in the
transaction that makes a request or batch final, so there is exactly one for each event and URL. A delivery is sent at
least once: when a sender dies, another one claims its delivery after the lease has ended.

A delivery belongs to an owner: the endpoint, else the key with which its URL was sent, else nobody (""). Claims are
divided among owners, so that one whose receivers do not answer delays only itself; and among its hosts. Each owner has
a secret of its own.

Weakness: of an owner with more than MAX_HOSTS_PER_LIST hosts, one list of what is due has only a part of them.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import secrets
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
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
#: Deliveries to one host of an owner that a process sends at once.
MAX_DELIVERIES_PER_HOST = 4
#: Hosts of one owner that one list of what is due looks at; the next one looks at those behind them.
MAX_HOSTS_PER_LIST = 100

#: Deliveries that one commit changes or deletes.
ROWS_PER_COMMIT = 100

_IS_DUE = """
    SELECT 1 FROM webhook_deliveries WHERE next_at IS NOT NULL AND next_at <= ? LIMIT 1
"""

# Skip scans: one step of the index for each owner and host, however many deliveries wait.
_NEXT_OWNER = """
    SELECT min(owner) FROM webhook_deliveries INDEXED BY webhook_deliveries_claimed
    WHERE next_at IS NOT NULL AND owner >= ?
"""

_NEXT_HOST = """
    SELECT min(host) FROM webhook_deliveries INDEXED BY webhook_deliveries_claimed
    WHERE next_at IS NOT NULL AND owner = ? AND host >= ?
"""

_DUE = """
    SELECT id, next_at FROM webhook_deliveries INDEXED BY webhook_deliveries_claimed
    WHERE next_at IS NOT NULL AND owner = ? AND host = ? AND next_at <= ? ORDER BY next_at LIMIT ?
"""

_FOUND = "SELECT * FROM webhook_deliveries WHERE id IN (SELECT value FROM json_each(?))"

# The payload is not saved when the request or batch was deleted meanwhile: what was said of it must not stay.
_CLAIM = """
    UPDATE webhook_deliveries SET attempts = attempts + 1, next_at = :lease_ends_at, payload = coalesce(payload,
        CASE WHEN EXISTS (SELECT 1 FROM requests WHERE requests.id = subject)
               OR EXISTS (SELECT 1 FROM batches WHERE batches.id = subject) THEN :payload END)
    WHERE id = :id AND next_at <= :now
    RETURNING *
"""

_DROP = "DELETE FROM webhook_deliveries WHERE id = ? AND next_at <= ?"

# The number of attempts is the fencing token.
_FINISH_DELIVERY = """
    UPDATE webhook_deliveries
    SET next_at = :next_at, delivered_at = :delivered_at, dead_at = :dead_at, last_status = :status, last_error = :error
    WHERE id = :id AND attempts = :attempts AND next_at IS NOT NULL
"""

_SOME_PENDING = """
    id IN (SELECT id FROM webhook_deliveries INDEXED BY webhook_deliveries_claimed
           WHERE owner = :id AND next_at IS NOT NULL LIMIT :rows_per_commit)
"""

_GIVE_UP = f"""
    UPDATE webhook_deliveries SET next_at = NULL, dead_at = :now, last_error = :reason WHERE {_SOME_PENDING}
"""

_REDELIVER = """
    UPDATE webhook_deliveries SET next_at = :now, delivered_at = NULL, dead_at = NULL, attempts = 0
    WHERE id = :id RETURNING *
"""

_PURGE = """
    DELETE FROM webhook_deliveries WHERE id IN (
        SELECT id FROM webhook_deliveries INDEXED BY webhook_deliveries_ended
        WHERE next_at IS NULL AND coalesce(delivered_at, dead_at) < :before LIMIT :rows_per_commit)
"""

# As in the index `webhook_deliveries_status`. Rows are numbered in the order in which they were added.
_STATUS = "CASE WHEN next_at IS NOT NULL THEN 'pending' WHEN delivered_at IS NOT NULL THEN 'delivered' ELSE 'dead' END"

_LIST = f"SELECT * FROM webhook_deliveries WHERE {_STATUS} = :status ORDER BY rowid DESC LIMIT :limit"

_LIST_ALL = "SELECT * FROM webhook_deliveries ORDER BY rowid DESC LIMIT :limit"

# A key that has none yet gets one that nobody knows, until it is rotated.
_ADD_SECRET = "INSERT OR IGNORE INTO webhook_secrets (owner, secret) VALUES (?, ?)"

_ROTATE_SECRET = """
    INSERT INTO webhook_secrets (owner, secret) VALUES (?, ?) ON CONFLICT (owner) DO UPDATE SET secret = excluded.secret
"""


def new_secret() -> str:
    """Make a secret for signing deliveries."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def host_of(url: str) -> str:
    """Return the host of a URL, with its port; of any text, because a URL is checked where it comes in."""
    return re.split("[/?#]", url.partition("://")[2], maxsplit=1)[0].rpartition("@")[2].lower()


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
    #: The endpoint's id, or the id of the key that the URL was sent with; empty without one.
    owner: str
    #: Host of the URL, with its port.
    host: str
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


@dataclass(frozen=True, kw_only=True)
class DeliveryResult:
    """How an attempt to send a delivery ended."""

    #: As it was claimed.
    delivery: DeliveryRecord
    ended_at: datetime
    #: When to try again; None with an error gives the delivery up, without one it is delivered.
    retry_at: datetime | None = None
    #: The HTTP status of the response; None without one.
    status: int | None = None
    error: str | None = None


#: Values of `DeliveryRecord.status`.
DELIVERY_STATES = ("pending", "delivered", "dead")


def _finish(transaction: Transaction, results: Sequence[DeliveryResult]) -> list[bool]:
    """Record results. :return: which of them count."""
    found = []
    for result in results:
        is_delivered = result.error is None
        row = {
            "id": result.delivery.id,
            "attempts": result.delivery.attempts,
            "next_at": None if result.retry_at is None else to_text(result.retry_at),
            "delivered_at": to_text(result.ended_at) if is_delivered else None,
            "dead_at": None if is_delivered or result.retry_at else to_text(result.ended_at),
            "status": result.status,
            "error": result.error,
        }
        found.append(bool(transaction.execute(_FINISH_DELIVERY, row).rowcount))
    return found


class Webhooks:
    """The endpoints and the deliveries."""

    def __init__(self, database: Database) -> None:
        self._database = database
        #: Owner -> host with which the next list begins; only of owners with many hosts.
        self._first_hosts: dict[str, str] = {}
        #: Owner -> number of the list that had its deliveries last.
        self._last_turns: dict[str, int] = {}
        self._turns = 0

    def add_endpoint(self, endpoint: EndpointRecord) -> None:
        """Add an endpoint."""
        row = to_row(endpoint, events=",".join(endpoint.events))
        self._database.execute(f"INSERT INTO {insert_sql('webhook_endpoints', row)}", row)

    def remove_endpoint(self, id: str) -> None:
        """Remove an endpoint and its pending deliveries. :raises UnknownWebhook:"""

        if not self._database.execute("DELETE FROM webhook_endpoints WHERE id = ?", (id,)):
            raise UnknownWebhook(f"There is no webhook {id[:80]}. See: mlg webhooks list")
        self._database.execute_in_steps(
            f"DELETE FROM webhook_deliveries WHERE {_SOME_PENDING}", {"id": id}, rows_per_commit=ROWS_PER_COMMIT
        )

    def list_endpoints(self) -> list[EndpointRecord]:
        """List the endpoints, oldest first."""
        rows = self._database.rows("SELECT * FROM webhook_endpoints ORDER BY created_at, id")
        return [from_row(EndpointRecord, row, events=tuple(row["events"].split(","))) for row in rows]

    def secret(self, endpoint_id: str | None, key_id: str = "") -> str:
        """Return the secret that signs deliveries to an endpoint, or to URLs that were sent with a key.

        :param endpoint_id: None for URLs that were sent with requests and batches.
        :param key_id: empty for those that were sent without a key.
        :raises UnknownWebhook: there is no such endpoint.
        """
        if endpoint_id is not None:
            row = self._database.row("SELECT secret FROM webhook_endpoints WHERE id = ?", (endpoint_id,))
            if row is None:
                raise UnknownWebhook()
            return str(row[0])
        read = "SELECT secret FROM webhook_secrets WHERE owner = ?"
        row = self._database.row(read, (key_id,))
        if row is None:
            self._database.execute(_ADD_SECRET, (key_id, new_secret()))
            row = self._database.row(read, (key_id,))
        return str(row[0])

    def rotate_secret(self, endpoint_id: str | None, key_id: str = "") -> str:
        """Replace a secret at once; the parameters are those of `secret`. :return: the new one.

        :raises UnknownWebhook:
        """
        secret = new_secret()
        if endpoint_id is None:
            self._database.execute(_ROTATE_SECRET, (key_id, secret))
        elif not self._database.execute("UPDATE webhook_endpoints SET secret = ? WHERE id = ?", (secret, endpoint_id)):
            raise UnknownWebhook(f"There is no webhook {endpoint_id[:80]}. See: mlg webhooks list")
        return secret

    def list_due(
        self, *, now: datetime, limit: int, per_owner: int, sending: Collection[tuple[str, str]] = ()
    ) -> list[DeliveryRecord]:
        """List deliveries that are due, in turns of their owners, and of an owner's in turns of its hosts.

        Reading needs no write lock: it is held only when those that were chosen here are claimed.

        :param per_owner: how many of one owner may be in progress, and of one host MAX_DELIVERIES_PER_HOST.
        :param sending: owner and host of each delivery that the process has in progress.
        """
        if self._database.row(_IS_DUE, (to_text(now),)) is None:
            return []
        owners, hosts = Counter(owner for owner, _ in sending), Counter(sending)
        #: (how many of the owner are in progress by then, when it had its last turn, id, owner).
        found: list[tuple[int, int, str, str]] = []
        with self._database.read() as connection:
            for owner in self._values(connection, _NEXT_OWNER, ()):
                count = per_owner - owners[owner]
                if count > 0:
                    due = self._due(connection, owner, hosts, to_text(now))
                    last = self._last_turns.get(owner, 0)
                    found += [(owners[owner] + turn, last, id, owner) for turn, id in enumerate(due[:count])]
        chosen = sorted(found)[:limit]
        if not chosen:
            return []
        self._turns += 1
        self._last_turns |= {owner: self._turns for *_, owner in chosen}
        return self._database.records(DeliveryRecord, _FOUND, (json.dumps([id for _, _, id, _ in chosen]),))

    def claim_deliveries(
        self,
        payloads: Mapping[str, str | None],
        *,
        now: datetime,
        lease_ends_at: datetime,
        dropped: Collection[str] = (),
        results: Sequence[DeliveryResult] = (),
    ) -> list[DeliveryRecord]:
        """Claim deliveries that are still due and save their bodies; first record results. All in one commit.

        :param payloads: id -> body, so that every attempt sends the same. The first one counts, and none is saved when
            the request or batch was deleted meanwhile.
        :param dropped: ids of deliveries whose event no longer holds; they are deleted if they are still due.
        :param results: of earlier claims, see `finish_deliveries`.
        """
        times = {"now": to_text(now), "lease_ends_at": to_text(lease_ends_at)}

        def write(transaction: Transaction) -> list[DeliveryRecord]:
            _finish(transaction, results)
            transaction.execute_many(_DROP, [(id, times["now"]) for id in dropped])
            claimed = []
            for id, payload in payloads.items():
                claimed += transaction.execute(_CLAIM, {**times, "id": id, "payload": payload}).fetchall()
            return [from_row(DeliveryRecord, row) for row in claimed]

        return self._database.write(write)

    def finish_deliveries(self, results: Sequence[DeliveryResult]) -> list[bool]:
        """Record the results of attempts in one commit.

        :return: for each of them, False when the lease had ended and another sender has claimed the delivery.
        """
        return self._database.write(lambda transaction: _finish(transaction, results))

    def _due(
        self, connection: sqlite3.Connection, owner: str, sending: Mapping[tuple[str, str], int], now: str
    ) -> list[str]:
        """Return the ids of an owner's deliveries that may be claimed, in turns of the hosts, the oldest first."""
        first = self._first_hosts.pop(owner, "")
        hosts = list(itertools.islice(self._values(connection, _NEXT_HOST, (owner,), first), MAX_HOSTS_PER_LIST))
        if len(hosts) == MAX_HOSTS_PER_LIST:
            self._first_hosts[owner] = f"{hosts[-1]}\0"
        due = []
        for host in hosts:
            count = max(0, MAX_DELIVERIES_PER_HOST - sending.get((owner, host), 0))
            rows = connection.execute(_DUE, (owner, host, now, count)).fetchall()
            due += [(turn, next_at, id) for turn, (id, next_at) in enumerate(rows)]
        return [id for *_, id in sorted(due)]

    @staticmethod
    def _values(connection: sqlite3.Connection, sql: str, first: tuple[str, ...], start: str = "") -> Iterator[str]:
        """Walk over the different values of a column, in order. :param sql: finds the first from a value on."""
        while (value := connection.execute(sql, (*first, start)).fetchone()[0]) is not None:
            yield value
            start = f"{value}\0"

    def delete_delivery(self, id: str) -> None:
        """Delete a delivery whose event no longer holds."""
        self._database.execute("DELETE FROM webhook_deliveries WHERE id = ?", (id,))

    def disable_endpoint(self, id: str, *, reason: str, now: datetime) -> None:
        """Disable an endpoint and give up its pending deliveries."""
        row = {"id": id, "reason": reason, "now": to_text(now)}
        self._database.execute(
            "UPDATE webhook_endpoints SET disabled_at = :now, disabled_reason = :reason WHERE id = :id", row
        )
        self._database.execute_in_steps(_GIVE_UP, row, rows_per_commit=ROWS_PER_COMMIT)

    def list_deliveries(self, *, status: str | None = None, limit: int = 50) -> list[DeliveryRecord]:
        """List deliveries, newest first. :param status: one of DELIVERY_STATES; None lists all."""
        sql = _LIST_ALL if status is None else _LIST
        return self._database.records(DeliveryRecord, sql, {"status": status, "limit": limit})

    def redeliver(self, id: str, *, now: datetime) -> DeliveryRecord:
        """Queue a delivery again, due now, its attempts reset. :raises UnknownWebhook:"""
        row = {"id": id, "now": to_text(now)}
        rows = self._database.write(lambda transaction: transaction.execute(_REDELIVER, row).fetchall())
        if not rows:
            raise UnknownWebhook(f"There is no delivery {id[:80]}. See: mlg webhooks dead")
        return from_row(DeliveryRecord, rows[0])

    def purge(self, *, before: datetime) -> int:
        """Delete deliveries that were delivered, or given up, before a time. :return: how many."""
        return self._database.execute_in_steps(
            _PURGE, {"before": to_text(before)}, rows_per_commit=ROWS_PER_COMMIT, is_background=True
        )

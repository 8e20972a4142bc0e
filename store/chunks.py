"""Chunks and batchers: the tables `chunks` (one row for each dispatch) and `batchers` (those that are alive).

Batchers write them; the server reads them for operators, for estimates of waiting times and for costs.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

import sqlite_utils

from store.cost_split import to_amount
from store.database import ReaderPool, Transaction, Writer
from store.ledger import split_invoices
from store.records import from_row, from_text, to_row, to_text

#: The throughput is measured over this many latest chunks of a model.
THROUGHPUT_CHUNKS = 20

_FINISH_CHUNK = """
    UPDATE chunks
    SET provider = :provider, bytes_received = :bytes_received, seconds = :seconds, done = :done, failed = :failed,
        cost = :cost, is_cost_final = 0, code = :code, reason = :reason, finished_at = :finished_at,
        agreement_id = :agreement_id, activity_id = :activity_id, provider_id = :provider_id
    WHERE id = :id
"""

_BACKLOG = """
    SELECT model, min(service) AS service, count(*) AS waiting, 0 AS claimed, min(number) AS oldest_number
    FROM requests INDEXED BY requests_queued WHERE state = 'queued' GROUP BY model
    UNION ALL
    SELECT model, min(service), 0, count(*), NULL
    FROM requests INDEXED BY requests_claimed WHERE state = 'claimed' GROUP BY model
"""

_THROUGHPUT = """
    SELECT sum(done), avg(seconds), sum(seconds) FROM (
        SELECT done, seconds FROM chunks
        WHERE model = ? AND finished_at IS NOT NULL AND done > 0 ORDER BY finished_at DESC LIMIT ?
    )
"""


@dataclass(frozen=True, kw_only=True)
class ModelBacklog:
    """How many requests of one model wait."""

    #: The kind of service.
    service: str
    #: The model.
    model: str
    #: Requests queued.
    waiting: int
    #: Requests claimed.
    claimed: int
    #: The oldest queued request's number; None if none is queued.
    oldest_number: int | None
    #: When that request was accepted.
    oldest_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class ChunkRecord:
    """One chunk that was handed to an executor."""

    #: Random; the only id that a provider sees.
    id: str
    #: The batcher that sent it.
    batcher_id: str
    #: The executor's name.
    executor: str
    #: Name of the worker or provider; None until known.
    provider: str | None
    #: The kind of service.
    service: str
    #: The model.
    model: str
    #: How many items it has.
    items: int
    #: Size of the chunk file.
    bytes_sent: int
    #: Size of the results file.
    bytes_received: int | None
    #: When it was handed to the executor.
    dispatched_at: datetime
    #: When it ended; None while it is in progress.
    finished_at: datetime | None
    #: Seconds that it took, as the executor measured them.
    seconds: float | None
    #: Items answered, items failed.
    done: int | None
    failed: int | None
    #: Cost in GLM as decimal text; None where nothing is paid.
    cost: str | None
    #: Why the whole chunk failed.
    code: str | None
    reason: str | None
    #: Agreement and activity under which it ran; None where nothing is paid.
    agreement_id: str | None = None
    activity_id: str | None = None
    #: Address of the provider.
    provider_id: str | None = None
    #: Requests that it answered; they share its cost equally.
    answers: int = 0
    #: False while the cost is an estimate.
    is_cost_final: bool = False

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> ChunkRecord:
        """Build the record from a row of the table `chunks`."""
        return cls(**from_row(row))


@dataclass(frozen=True, kw_only=True)
class BatcherRecord:
    """A batcher that is alive: it sends a heartbeat every few seconds."""

    #: Random, one per process.
    id: str
    #: Host and process id.
    host: str
    pid: int
    #: Executor names, comma separated.
    executor: str
    #: Interval of the timer on which it claims everything that is queued.
    every_seconds: float
    #: A request is claimed after this long at the latest.
    max_wait_seconds: float
    #: Number of chunks that it runs at once.
    capacity: int
    started_at: datetime
    seen_at: datetime
    #: Model -> a sentence that explains why it claims none of it now.
    notices: Mapping[str, str] = field(default_factory=dict)
    #: "run", "day", "total" -> spending limit in GLM as decimal text; empty where nothing is paid.
    budget: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """How fast a model was answered recently."""

    #: Number of answered items that were measured.
    items: int
    #: Seconds from dispatch to end, mean over chunks.
    chunk_seconds: float
    #: Items a second of one running chunk.
    items_per_second: float


class Chunks:
    """The chunks, the batchers, and what follows from them."""

    _writer: Writer
    _readers: ReaderPool

    def start_chunk(self, chunk: ChunkRecord) -> None:
        """Record that a chunk was handed to an executor."""
        self._writer.run(lambda transaction: _table(transaction, "chunks").insert(to_row(chunk)))

    def finish_chunk(
        self,
        id: str,
        *,
        provider: str | None,
        bytes_received: int | None,
        seconds: float,
        done: int,
        failed: int,
        cost: str | None,
        code: str | None,
        reason: str | None,
        now: datetime,
        agreement_id: str | None = None,
        activity_id: str | None = None,
        provider_id: str | None = None,
    ) -> None:
        """Record how a chunk ended.

        :param cost: an estimate until the agreement's invoice is accepted; see `ledger.py`.
        """
        values = {
            "id": id,
            "provider": provider,
            "bytes_received": bytes_received,
            "seconds": seconds,
            "done": done,
            "failed": failed,
            "cost": None if cost is None else to_amount(Decimal(cost)),
            "code": code,
            "reason": reason,
            "finished_at": to_text(now),
            "agreement_id": agreement_id,
            "activity_id": activity_id,
            "provider_id": provider_id,
        }

        def write(transaction: Transaction) -> None:
            earlier = transaction.execute("SELECT agreement_id FROM chunks WHERE id = ?", (id,)).fetchone()
            transaction.execute(_FINISH_CHUNK, values)
            # The invoice may have come first; then it is split again.
            for changed_agreement_id in {agreement_id, earlier and earlier[0]} - {None}:
                split_invoices(transaction, changed_agreement_id)

        self._writer.run(write)

    def list_chunks(self, *, limit: int = 50) -> list[ChunkRecord]:
        """List chunks, newest first."""
        with self._readers.connection() as connection:
            rows = connection.execute("SELECT * FROM chunks ORDER BY dispatched_at DESC LIMIT ?", (limit,)).fetchall()
        return [ChunkRecord.from_row(row) for row in rows]

    def get_chunk(self, id: str) -> ChunkRecord | None:
        """Read one chunk; None when it is unknown."""
        with self._readers.connection() as connection:
            row = connection.execute("SELECT * FROM chunks WHERE id = ?", (id,)).fetchone()
        return None if row is None else ChunkRecord.from_row(row)

    def heartbeat(self, batcher: BatcherRecord) -> None:
        """Record that a batcher is alive; the first heartbeat registers it."""
        self._writer.run(lambda transaction: _table(transaction, "batchers").upsert(to_row(batcher), pk="id"))

    def deregister(self, batcher_id: str) -> None:
        """Remove a batcher that has ended."""
        self._writer.execute("DELETE FROM batchers WHERE id = ?", (batcher_id,))

    def list_batchers(self, *, seen_since: datetime) -> list[BatcherRecord]:
        """List the batchers whose last heartbeat is not older."""
        with self._readers.connection() as connection:
            rows = connection.execute(
                "SELECT * FROM batchers WHERE seen_at >= ? ORDER BY started_at", (to_text(seen_since),)
            ).fetchall()
        return [BatcherRecord(**from_row(row, mappings=("notices", "budget"))) for row in rows]

    def backlog(self) -> list[ModelBacklog]:
        """Count the queued and the claimed requests by model."""
        with self._readers.connection() as connection:
            rows = connection.execute(_BACKLOG).fetchall()
            by_model: dict[str, ModelBacklog] = {}
            for row in rows:
                earlier = by_model.get(row["model"])
                number = row["oldest_number"] or (earlier.oldest_number if earlier else None)
                by_model[row["model"]] = ModelBacklog(
                    service=row["service"],
                    model=row["model"],
                    waiting=row["waiting"] + (earlier.waiting if earlier else 0),
                    claimed=row["claimed"] + (earlier.claimed if earlier else 0),
                    oldest_number=number,
                    oldest_at=_created_at(connection, number),
                )
        return sorted(by_model.values(), key=lambda backlog: backlog.model)

    def throughput(self, model: str) -> Throughput | None:
        """Measure how fast a model was answered in its latest chunks; None when there were none."""
        with self._readers.connection() as connection:
            items, mean, total = connection.execute(_THROUGHPUT, (model, THROUGHPUT_CHUNKS)).fetchone()
        if not items or not total:
            return None
        return Throughput(items=items, chunk_seconds=mean, items_per_second=items / total)


def _created_at(connection: sqlite3.Connection, number: int | None) -> datetime | None:
    row = connection.execute("SELECT created_at FROM requests WHERE number = ?", (number,)).fetchone()
    return None if row is None else from_text(row[0])


def _table(transaction: Transaction, name: str) -> sqlite_utils.db.Table:
    table = sqlite_utils.Database(transaction.connection)[name]
    assert isinstance(table, sqlite_utils.db.Table)
    return table

"""The journal on SQLite: dispatches, live batchers, and what follows from them.

A base of `SqliteStore`, which gives it the writer and the readers.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from decimal import Decimal
from typing import Any

import sqlite_utils

from store.chunks import BatcherRecord, ChunkRecord, ModelBacklog, Throughput
from store.cost_split import to_amount
from store.database import ReaderPool, Transaction, Writer
from store.records import from_text, to_text
from store.sqlite_ledger import split_invoices

#: The pace is taken from this many latest chunks of a model.
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


def _to_row(record: ChunkRecord | BatcherRecord) -> dict[str, Any]:
    return {name: _to_cell(value) for name, value in asdict(record).items()}


def _to_cell(value: Any) -> Any:
    if isinstance(value, Mapping):
        return json.dumps(dict(value), ensure_ascii=False)
    return to_text(value) if isinstance(value, datetime) else value


def chunk_from_row(row: Mapping[str, Any]) -> ChunkRecord:
    """Build the record from a row of the table `chunks`."""
    values = dict(row)
    values["dispatched_at"] = from_text(values["dispatched_at"])
    values["finished_at"] = None if values["finished_at"] is None else from_text(values["finished_at"])
    values["is_cost_final"] = bool(values["is_cost_final"])
    return ChunkRecord(**values)


class SqliteChunks:
    """What the batchers did, in the tables `chunks` and `batchers`."""

    _writer: Writer
    _readers: ReaderPool

    def start_chunk(self, chunk: ChunkRecord) -> None:
        """See Journal.start_chunk."""
        self._writer.run(lambda transaction: _table(transaction, "chunks").insert(_to_row(chunk)))

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
        """See Journal.finish_chunk."""
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
            # The bill may have come first; then its chunks share it anew.
            for billed in {agreement_id, earlier and earlier[0]} - {None}:
                split_invoices(transaction, billed)

        self._writer.run(write)

    def list_chunks(self, *, limit: int = 50) -> list[ChunkRecord]:
        """See Journal.list_chunks."""
        with self._readers.connection() as connection:
            rows = connection.execute("SELECT * FROM chunks ORDER BY dispatched_at DESC LIMIT ?", (limit,)).fetchall()
        return [chunk_from_row(row) for row in rows]

    def heartbeat(self, batcher: BatcherRecord) -> None:
        """See Journal.beat."""
        self._writer.run(lambda transaction: _table(transaction, "batchers").upsert(_to_row(batcher), pk="id"))

    def deregister(self, batcher_id: str) -> None:
        """See Journal.leave."""
        self._writer.run(lambda transaction: transaction.execute("DELETE FROM batchers WHERE id = ?", (batcher_id,)))

    def list_batchers(self, *, seen_since: datetime) -> list[BatcherRecord]:
        """See Journal.list_batchers."""
        with self._readers.connection() as connection:
            rows = connection.execute(
                "SELECT * FROM batchers WHERE seen_at >= ? ORDER BY started_at", (to_text(seen_since),)
            ).fetchall()
        return [
            BatcherRecord(
                **{
                    **dict(row),
                    "started_at": from_text(row["started_at"]),
                    "seen_at": from_text(row["seen_at"]),
                    "notices": json.loads(row["notices"]),
                    "budget": json.loads(row["budget"]),
                }
            )
            for row in rows
        ]

    def backlog(self) -> list[ModelBacklog]:
        """See Journal.backlog."""
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
        """See Journal.pace."""
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

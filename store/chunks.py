"""Chunks: the table `chunks`, one row for each dispatch.

Batchers write them; the server reads them for operators, for estimates of waiting times and for costs.
"""

from __future__ import annotations

import builtins
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from store.amounts import to_amount
from store.clients.usage import settle_chunk
from store.database import Database, Transaction
from store.rentals.ledger import split_invoices
from store.rows import from_row, insert_sql, to_row, to_text

#: The throughput is measured over this many latest chunks of a model.
THROUGHPUT_CHUNKS = 20

_FINISH_CHUNK = """
    UPDATE chunks
    SET provider = :provider, bytes_received = :bytes_received, seconds = :seconds, done = :done, failed = :failed,
        cost = :cost, is_cost_final = 0, code = :code, reason = :reason, finished_at = :finished_at,
        agreement_id = :agreement_id, activity_id = :activity_id, provider_id = :provider_id
    WHERE id = :id
"""

_THROUGHPUT = """
    SELECT sum(done), avg(seconds), sum(seconds) FROM (
        SELECT done, seconds FROM chunks
        WHERE model = ? AND finished_at IS NOT NULL AND done > 0 ORDER BY finished_at DESC LIMIT ?
    )
"""


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
    provider: str | None = None
    #: The kind of service.
    service: str
    #: The model.
    model: str
    #: How many items it has.
    items: int
    #: Size of the chunk file.
    bytes_sent: int
    #: Size of the results file.
    bytes_received: int | None = None
    #: When it was handed to the executor.
    dispatched_at: datetime
    #: When it ended; None while it is in progress.
    finished_at: datetime | None = None
    #: Seconds that it took, as the executor measured them.
    seconds: float | None = None
    #: Items answered, items failed.
    done: int | None = None
    failed: int | None = None
    #: Cost in GLM as decimal text; None where nothing is paid.
    cost: str | None = None
    #: Why the whole chunk failed.
    code: str | None = None
    reason: str | None = None
    #: Agreement and activity under which it ran; None where nothing is paid.
    agreement_id: str | None = None
    activity_id: str | None = None
    #: Address of the provider.
    provider_id: str | None = None
    #: Requests that it answered; they share its cost equally.
    answers: int = 0
    #: False while the cost is an estimate.
    is_cost_final: bool = False


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
    """The chunks, and what follows from them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def start(self, chunk: ChunkRecord) -> None:
        """Record that a chunk was handed to an executor."""
        row = to_row(chunk)
        self._database.execute(f"INSERT INTO {insert_sql('chunks', row)}", row)

    def finish(
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
            settle_chunk(transaction, id)

        self._database.write(write)

    def get(self, id: str) -> ChunkRecord | None:
        """Read one chunk; None when it is unknown."""
        row = self._database.row("SELECT * FROM chunks WHERE id = ?", (id,))
        return None if row is None else from_row(ChunkRecord, row)

    def throughput(self, model: str) -> Throughput | None:
        """Measure how fast a model was answered in its latest chunks; None when there were none."""
        items, mean, total = self._database.row(_THROUGHPUT, (model, THROUGHPUT_CHUNKS))
        if not items or not total:
            return None
        return Throughput(items=items, chunk_seconds=mean, items_per_second=items / total)

    def list(self, *, limit: int = 50) -> builtins.list[ChunkRecord]:
        """List chunks, newest first."""
        return self._database.records(ChunkRecord, "SELECT * FROM chunks ORDER BY dispatched_at DESC LIMIT ?", (limit,))

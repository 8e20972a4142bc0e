"""Batches: the tables `batches` and `batch_refusals`, the requests that belong to a batch, and deadlines.

The server adds, reads, cancels and retries; the batcher lets requests expire. An item that a batch refused (a file that
is no image) is kept beside it, so that a client that sent ten thousand finds the three that were refused.

Guarantees beside those in `store/__init__.py`: a batch is added whole or not at all, in one commit. Requests that ended
are numbered in the order of the commits (see `transition.py`), so a client that has read the results up to
a number and asks again later misses nothing and reads nothing twice; a request that is retried ends again, under a new
number.

Weakness: adding a batch is one commit however large it is, so for ten thousand images other writers wait about a
second. Long because it has the records, the statements and the rules of one noun.
"""

from __future__ import annotations

import builtins
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal

from provider_image.errors import MlgError
from store.amounts import equal_share, total
from store.database import Database, Transaction
from store.errors import UnknownRequest
from store.images import ImageStore, StagedImage
from store.keys import count_images
from store.requests import (
    RESET,
    ROWS_PER_COMMIT,
    NewRequest,
    RequestRecord,
    SubmissionFacts,
    delete_requests,
    insert_requests,
    read_requests,
    request_row,
)
from store.rows import from_row, insert_sql, to_row, to_text
from store.states import EXPIRED, RequestState
from store.transition import transition

_ADD_REFUSAL = """
    INSERT INTO batch_refusals (batch_id, position, client_id, code, reason)
    VALUES (:batch_id, :position, :client_id, :code, :reason)
"""

# One index answers it alone, except for the costs of the chunks.
_PROGRESS = """
    SELECT state, counted.code AS code, counted.count AS count, last_number, shares,
           chunks.cost AS cost, chunks.answers AS answers, chunks.is_cost_final AS is_cost_final
    FROM (
        SELECT state, code, chunk_id, count(*) AS count, max(number) AS last_number, group_concat(share) AS shares
        FROM requests INDEXED BY requests_batch_progress WHERE batch_id = ? GROUP BY state, code, chunk_id
    ) AS counted
    LEFT JOIN chunks ON chunks.id = chunk_id
"""

_RESULTS = """
    SELECT * FROM requests
    WHERE batch_id = :id AND ended_number IS NOT NULL AND ended_number > :after AND finished_at IS NOT NULL
    ORDER BY ended_number LIMIT :limit
"""

_ITEMS = """
    SELECT * FROM requests INDEXED BY requests_batch
    WHERE batch_id = :id AND number > :after ORDER BY number LIMIT :limit
"""

_IS_IN_PROGRESS = """
    SELECT EXISTS (SELECT 1 FROM requests WHERE batch_id = :id AND state IN ('queued', 'claimed'))
"""

_SOME_ITEMS = f"""
    number IN (SELECT number FROM requests WHERE batch_id = :id AND finished_at IS NOT NULL LIMIT {ROWS_PER_COMMIT})
"""


class UnknownBatch(UnknownRequest):
    """There is no batch with this id. It was never accepted here, or its retention time is over."""


class BatchInProgress(MlgError):
    """Requests of the batch are still queued or in progress. Cancel it, or wait until it has ended."""

    code = "batch_under_way"
    permanent = True


class DuplicateClientId(MlgError):
    """Two items of the batch have the same client id. Give each a different one."""

    permanent = True


@dataclass(frozen=True, kw_only=True)
class RefusedItem:
    """One item that a batch refused."""

    #: Its position in the upload, from 0.
    position: int
    #: The client's own id.
    client_id: str
    #: Code of the error.
    code: str
    #: Message of the error.
    reason: str


@dataclass(frozen=True, kw_only=True)
class BatchRecord(SubmissionFacts):
    """One batch as it was accepted; its outcome is in `BatchProgress`."""

    #: Requests that were accepted.
    total: int = 0
    #: Items that were refused.
    refused: int = 0
    #: When it was cancelled.
    cancelled_at: datetime | None = None
    #: URL that is notified when all of its requests are final.
    webhook: str | None = None
    #: Counts up in the order of arrival; 0 before it is added.
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class BatchProgress:
    """How far a batch is."""

    queued: int = 0
    claimed: int = 0
    done: int = 0
    failed: int = 0
    #: Not counting those that expired.
    cancelled: int = 0
    expired: int = 0
    #: Sum of its requests' shares of their chunks' costs, in GLM; None while none has a cost.
    cost: Decimal | None = None
    #: False while the cost is an estimate.
    is_cost_final: bool = False
    #: The failed ones: code -> count.
    failures: Mapping[str, int] = field(default_factory=dict)
    #: Number of the last queued request, else of the last claimed one; None when all have ended.
    last_number: int | None = None

    @property
    def waiting(self) -> int:
        """Count those that have not ended."""
        return self.queued + self.claimed

    @property
    def ended(self) -> int:
        """Count those that have ended."""
        return self.done + self.failed + self.cancelled + self.expired


class Batches:
    """The batches, their requests and their refused items."""

    def __init__(self, database: Database, images: ImageStore) -> None:
        self._database = database
        self._images = images

    def add(
        self, batch: BatchRecord, items: Sequence[tuple[NewRequest, StagedImage]], refused_items: Sequence[RefusedItem]
    ) -> list[RequestRecord]:
        """Add a batch, its requests in this order, and its refused items; return when all are durable.

        :raises StoreError: nothing is left behind, the staged images included.
        :raises QuotaReached: likewise.
        """
        labels = json.dumps(dict(batch.labels), sort_keys=True, ensure_ascii=False)
        values = to_row(batch, labels=labels, total=len(items), refused=len(refused_items))
        del values["number"]
        rows = [(new, staged, request_row(new, staged)) for new, staged in items]

        def write(transaction: Transaction) -> list[RequestRecord]:
            if batch.key_id is not None:
                count_images(transaction, batch.key_id, len(items), now=to_text(batch.created_at))
            transaction.execute(f"INSERT INTO {insert_sql('batches', values)}", values)
            transaction.execute_many(_ADD_REFUSAL, [to_row(one, batch_id=batch.id) for one in refused_items])
            return insert_requests(transaction, rows, now=batch.created_at)

        try:
            return self._database.write(write)
        except BaseException:
            for _, staged in items:
                self._images.discard(staged)
            raise

    def get(self, id: str) -> BatchRecord:
        """Read one batch. :raises UnknownBatch:"""
        row = self._database.row("SELECT * FROM batches WHERE id = ?", (id,))
        if row is None:
            raise UnknownBatch()
        return from_row(BatchRecord, row)

    def refused_items(self, batch_id: str) -> list[RefusedItem]:
        """List what a batch refused, in order; empty for an unknown batch."""
        return self._database.records(
            RefusedItem,
            "SELECT position, client_id, code, reason FROM batch_refusals WHERE batch_id = ? ORDER BY position",
            (batch_id,),
        )

    def progress(self, id: str) -> BatchProgress:
        """Count the requests of a batch by state; all zero for an unknown batch."""
        rows = self._database.rows(_PROGRESS, (id,))
        counts: Counter[str] = Counter()
        failures: Counter[str] = Counter()
        last: dict[str, int] = {}
        costs: list[Decimal] = []
        is_final = True
        for row in rows:
            state = str(row["state"])
            status = EXPIRED if state == RequestState.CANCELLED and row["code"] == EXPIRED else state
            counts[status] += row["count"]
            last[state] = max(last.get(state, 0), row["last_number"])
            if state == RequestState.FAILED:
                failures[row["code"] or "unknown"] += row["count"]
            if row["shares"] is not None and row["cost"] is not None:
                amount = Decimal(row["cost"])
                costs += [equal_share(amount, row["answers"], int(share)) for share in row["shares"].split(",")]
                is_final = is_final and bool(row["is_cost_final"])
        return BatchProgress(
            **{name: counts[name] for name in (*RequestState, EXPIRED)},
            cost=total(costs) if costs else None,
            is_cost_final=bool(costs) and is_final,
            failures=dict(failures),
            last_number=last.get(RequestState.QUEUED) or last.get(RequestState.CLAIMED),
        )

    def results(self, id: str, *, after: int = 0, limit: int = 200) -> list[tuple[int, RequestRecord]]:
        """List the requests that ended, in the order in which they ended.

        :param after: only those that ended under a higher number.
        :return: (number of the end, request).
        """
        with self._database.read() as connection:
            rows = connection.execute(_RESULTS, {"id": id, "after": after, "limit": limit}).fetchall()
            return list(zip((row["ended_number"] for row in rows), read_requests(connection, rows), strict=True))

    def items(self, id: str, *, after: int = 0, limit: int = 200) -> list[RequestRecord]:
        """List the requests of a batch in the order in which they were sent. :param after: only higher numbers."""
        with self._database.read() as connection:
            rows = connection.execute(_ITEMS, {"id": id, "after": after, "limit": limit}).fetchall()
            return read_requests(connection, rows)

    def last_unfinished(self, id: str, progress: BatchProgress) -> RequestRecord | None:
        """Read the last request of a batch that is queued, else the last that is claimed; None when all have ended."""
        if progress.last_number is None:
            return None
        found = self.items(id, after=progress.last_number - 1, limit=1)
        return found[0] if found else None

    def cancel(self, id: str, *, now: datetime) -> int:
        """Cancel the queued requests of a batch. :return: how many. :raises UnknownBatch:"""
        return self._change_items(
            id,
            "UPDATE batches SET cancelled_at = coalesce(cancelled_at, :now) WHERE id = :id",
            RequestState.CANCELLED,
            where="batch_id = :id",
            columns="code = NULL, reason = NULL",
            now=now,
        )

    def retry(self, id: str, *, now: datetime) -> int:
        """Queue those failed requests of a batch again whose image is kept.

        :return: how many.
        :raises UnknownBatch:
        """
        return self._change_items(
            id,
            "UPDATE batches SET cancelled_at = NULL WHERE id = :id",
            RequestState.QUEUED,
            where="batch_id = :id AND state = 'failed' AND image_deleted_at IS NULL",
            columns=RESET,
            now=now,
        )

    def _change_items(
        self, id: str, change_batch: str, to: RequestState, *, where: str, columns: str, now: datetime
    ) -> int:
        def write(transaction: Transaction) -> int:
            if not transaction.execute(change_batch, {"id": id, "now": to_text(now)}).rowcount:
                raise UnknownBatch()
            return len(transition(transaction, to, where, [{"id": id}], columns=columns, now=now))

        return self._database.write(write)

    def remove(self, id: str) -> int:
        """Delete a batch with its requests and images.

        :return: how many requests.
        :raises UnknownBatch:
        :raises BatchInProgress: nothing was deleted.
        """

        def write(transaction: Transaction) -> int:
            if transaction.execute("SELECT 1 FROM batches WHERE id = ?", (id,)).fetchone() is None:
                raise UnknownBatch()
            if transaction.execute(_IS_IN_PROGRESS, {"id": id}).fetchone()[0]:
                raise BatchInProgress()
            removed = delete_requests(transaction, self._images, _SOME_ITEMS, {"id": id})
            if removed < ROWS_PER_COMMIT:
                transaction.execute("DELETE FROM batch_refusals WHERE batch_id = ?", (id,))
                transaction.execute("DELETE FROM batches WHERE id = ?", (id,))
            return removed

        return self._database.write_in_steps(write, rows_per_commit=ROWS_PER_COMMIT)

    def list(
        self, *, key_id: str | None = None, before: int | None = None, limit: int = 50
    ) -> builtins.list[BatchRecord]:
        """List batches, newest first.

        :param key_id: only those of this key.
        :param before: only lower numbers.
        """
        conditions = ["key_id = :key_id"] if key_id is not None else []
        conditions += ["number < :before"] if before is not None else []
        return self._database.records(
            BatchRecord,
            f"SELECT * FROM batches WHERE {' AND '.join(conditions) or '1'} ORDER BY number DESC LIMIT :limit",
            {"key_id": key_id, "before": before, "limit": limit},
        )

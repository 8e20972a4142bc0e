"""Batches on SQLite: the tables `batches` and `batch_refusals`, and the requests that belong to a batch.

A base of `SqliteStore`, which gives it the writer, the readers and the pictures. The numbers of the ends are given by
triggers, see the migration. Weakness: adding a batch is one commit however large it is, so that for ten thousand
pictures other writers wait about a second.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from store.batches import EXPIRED, BatchInProgress, BatchProgress, BatchRecord, RefusedItem, UnknownBatch
from store.cost_split import equal_share, total
from store.database import ReaderPool, Transaction, Writer
from store.images import ImageStore, StagedImage
from store.records import NewRequest, RequestRecord, RequestState, from_text, to_text
from store.sqlite_costs import request_with_cost
from store.sqlite_keys import count_images

#: Requests that one commit deletes or lets expire.
ROWS_PER_COMMIT = 500

_ADD_BATCH = """
    INSERT INTO batches (id, service, model, params, name, labels, key_id, created_at, deadline_at, keep_seconds,
                         total, refused, webhook)
    VALUES (:id, :service, :model, :params, :name, :labels, :key_id, :created_at, :deadline_at, :keep_seconds,
            :total, :refused, :webhook)
"""

_ADD_REFUSAL = "INSERT INTO batch_refusals (batch_id, position, client_id, code, reason) VALUES (?, ?, ?, ?, ?)"

# Answered by one index alone, but for the costs of the chunks.
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

_CANCEL_BATCH = "UPDATE batches SET cancelled_at = coalesce(cancelled_at, :now) WHERE id = :id"

_CANCEL_ITEMS = """
    UPDATE requests SET state = 'cancelled', finished_at = :now, code = NULL, reason = NULL
    WHERE batch_id = :id AND state = 'queued'
"""

_RETRY_ITEMS = """
    UPDATE requests
    SET state = 'queued', attempts = 0, finished_at = NULL, due_at = :now,
        deadline_at = CASE WHEN deadline_at <= :now THEN NULL ELSE deadline_at END
    WHERE batch_id = :id AND state = 'failed' AND image_deleted_at IS NULL
"""

_IS_IN_PROGRESS = """
    SELECT EXISTS (SELECT 1 FROM requests WHERE batch_id = :id AND state IN ('queued', 'claimed'))
"""

_REMOVE_ITEMS = """
    DELETE FROM requests
    WHERE number IN (SELECT number FROM requests WHERE batch_id = :id AND finished_at IS NOT NULL LIMIT :step)
    RETURNING image_sha256
"""

_IS_NEEDED = "SELECT EXISTS (SELECT 1 FROM requests WHERE image_sha256 = ? AND image_deleted_at IS NULL)"

_IS_OVERDUE = "SELECT 1 FROM requests WHERE state = 'queued' AND deadline_at IS NOT NULL AND deadline_at <= ? LIMIT 1"

_EXPIRE = f"""
    UPDATE requests
    SET state = 'cancelled', finished_at = :now, code = '{EXPIRED}',
        reason = 'Its deadline passed before anybody could work on it.'
    WHERE number IN (SELECT number FROM requests
                     WHERE state = 'queued' AND deadline_at IS NOT NULL AND deadline_at <= :now LIMIT :step)
"""


def _parse_optional_time(text: str | None) -> datetime | None:
    return None if text is None else from_text(text)


def _from_row(row: Mapping[str, Any]) -> BatchRecord:
    return BatchRecord(
        number=row["number"],
        id=row["id"],
        service=row["service"],
        model=row["model"],
        params=json.loads(row["params"]),
        name=row["name"],
        labels=json.loads(row["labels"]),
        key_id=row["key_id"],
        created_at=from_text(row["created_at"]),
        deadline_at=_parse_optional_time(row["deadline_at"]),
        keep_seconds=row["keep_seconds"],
        total=row["total"],
        refused=row["refused"],
        cancelled_at=_parse_optional_time(row["cancelled_at"]),
        webhook=row["webhook"],
    )


class SqliteBatches:
    """What `Batches` promises."""

    images: ImageStore
    _writer: Writer
    _readers: ReaderPool

    @staticmethod
    def _row_of(new: NewRequest, staged: StagedImage) -> dict[str, Any]:
        raise NotImplementedError

    def _insert(
        self, transaction: Transaction, new: NewRequest, staged: StagedImage, row: dict[str, Any]
    ) -> RequestRecord:
        raise NotImplementedError

    def add_batch(
        self, batch: BatchRecord, items: Sequence[tuple[NewRequest, StagedImage]], refused_items: Sequence[RefusedItem]
    ) -> list[RequestRecord]:
        """See Batches.add_batch."""
        values = {
            "id": batch.id,
            "service": batch.service,
            "model": batch.model,
            "params": json.dumps(dict(batch.params), sort_keys=True),
            "name": batch.name,
            "labels": json.dumps(dict(batch.labels), sort_keys=True, ensure_ascii=False),
            "key_id": batch.key_id,
            "created_at": to_text(batch.created_at),
            "deadline_at": None if batch.deadline_at is None else to_text(batch.deadline_at),
            "keep_seconds": batch.keep_seconds,
            "total": len(items),
            "refused": len(refused_items),
            "webhook": batch.webhook,
        }
        rows = [self._row_of(new, staged) for new, staged in items]

        def write(transaction: Transaction) -> list[RequestRecord]:
            if batch.key_id is not None:
                count_images(transaction, batch.key_id, len(items), now=to_text(batch.created_at))
            transaction.execute(_ADD_BATCH, values)
            for one in refused_items:
                transaction.execute(_ADD_REFUSAL, (batch.id, one.position, one.client_id, one.code, one.reason))
            return [self._insert(transaction, new, staged, row) for (new, staged), row in zip(items, rows, strict=True)]

        try:
            added: list[RequestRecord] = self._writer.run(write)
        except BaseException:
            for _, staged in items:
                self.images.discard(staged)
            raise
        return added

    def get_batch(self, id: str) -> BatchRecord:
        """See Batches.get_batch."""
        with self._readers.connection() as connection:
            row = connection.execute("SELECT * FROM batches WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise UnknownBatch()
        return _from_row(row)

    def refused_items(self, batch_id: str) -> list[RefusedItem]:
        """See Batches.refusals."""
        with self._readers.connection() as connection:
            rows = connection.execute(
                "SELECT position, client_id, code, reason FROM batch_refusals WHERE batch_id = ? ORDER BY position",
                (batch_id,),
            ).fetchall()
        return [RefusedItem(**dict(row)) for row in rows]

    def list_batches(
        self, *, key_id: str | None = None, before: int | None = None, limit: int = 50
    ) -> list[BatchRecord]:
        """See Batches.list_batches."""
        conditions = ["key_id = :key_id"] if key_id is not None else []
        conditions += ["number < :before"] if before is not None else []
        with self._readers.connection() as connection:
            rows = connection.execute(
                f"SELECT * FROM batches WHERE {' AND '.join(conditions) or '1'} ORDER BY number DESC LIMIT :limit",
                {"key_id": key_id, "before": before, "limit": limit},
            ).fetchall()
        return [_from_row(row) for row in rows]

    def batch_progress(self, id: str) -> BatchProgress:
        """See Batches.batch_progress."""
        with self._readers.connection() as connection:
            rows = connection.execute(_PROGRESS, (id,)).fetchall()
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

    def batch_results(self, id: str, *, after: int = 0, limit: int = 200) -> list[tuple[int, RequestRecord]]:
        """See Batches.batch_results."""
        with self._readers.connection() as connection:
            rows = connection.execute(_RESULTS, {"id": id, "after": after, "limit": limit}).fetchall()
            costs: dict[str, Any] = {}
            return [(row["ended_number"], request_with_cost(row, connection, costs)) for row in rows]

    def batch_items(self, id: str, *, after: int = 0, limit: int = 200) -> list[RequestRecord]:
        """See Batches.batch_items."""
        with self._readers.connection() as connection:
            rows = connection.execute(_ITEMS, {"id": id, "after": after, "limit": limit}).fetchall()
            costs: dict[str, Any] = {}
            return [request_with_cost(row, connection, costs) for row in rows]

    def cancel_batch(self, id: str, *, now: datetime) -> int:
        """See Batches.cancel_batch."""
        return self._change_items(id, now, _CANCEL_BATCH, _CANCEL_ITEMS)

    def retry_batch(self, id: str, *, now: datetime) -> int:
        """See Batches.retry_batch."""
        return self._change_items(id, now, "UPDATE batches SET cancelled_at = NULL WHERE id = :id", _RETRY_ITEMS)

    def _change_items(self, id: str, now: datetime, change_batch: str, change_items: str) -> int:
        values = {"id": id, "now": to_text(now)}

        def write(transaction: Transaction) -> int:
            if not transaction.execute(change_batch, values).rowcount:
                raise UnknownBatch()
            return transaction.execute(change_items, values).rowcount

        changed: int = self._writer.run(write)
        return changed

    def remove_batch(self, id: str) -> int:
        """See Batches.remove_batch."""

        def write(transaction: Transaction) -> tuple[int, bool]:
            if transaction.execute("SELECT 1 FROM batches WHERE id = ?", (id,)).fetchone() is None:
                raise UnknownBatch()
            if transaction.execute(_IS_IN_PROGRESS, {"id": id}).fetchone()[0]:
                raise BatchInProgress()
            removed = transaction.execute(_REMOVE_ITEMS, {"id": id, "step": ROWS_PER_COMMIT}).fetchall()
            for sha256 in {row[0] for row in removed}:
                if not transaction.execute(_IS_NEEDED, (sha256,)).fetchone()[0]:
                    self.images.delete(sha256)
            is_last = len(removed) < ROWS_PER_COMMIT
            if is_last:
                transaction.execute("DELETE FROM batch_refusals WHERE batch_id = ?", (id,))
                transaction.execute("DELETE FROM batches WHERE id = ?", (id,))
            return len(removed), is_last

        count, is_last = 0, False
        while not is_last:
            step, is_last = self._writer.run(write)
            count += step
        return count

    def expire(self, now: datetime) -> int:
        """See Batches.expire."""
        moment = to_text(now)
        # Looking costs no write lock; most looks find nothing.
        with self._readers.connection() as connection:
            if connection.execute(_IS_OVERDUE, (moment,)).fetchone() is None:
                return 0
        expired, step = 0, ROWS_PER_COMMIT
        while step == ROWS_PER_COMMIT:
            step = self._writer.run(
                lambda transaction: transaction.execute(_EXPIRE, {"now": moment, "step": ROWS_PER_COMMIT}).rowcount
            )
            expired += step
        return expired

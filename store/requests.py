"""Requests: adding, claiming, answering, failing, releasing, cancelling, retrying, reading and deleting one.

Every statement that depends on a request's state is named SQL text in this file, save those about whole batches
(`batches.py`) and those that delete old requests (`retention.py`). The server adds and reads; the batcher claims,
renews, finishes, fails and releases. `store/__init__.py` draws the states and lists the guarantees.
"""

from __future__ import annotations

import builtins
import json
import sqlite3
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from store.cost_split import equal_share
from store.database import ReaderPool, Transaction, Writer
from store.errors import NotCancellable, NotRemovable, NotRetryable, UnknownRequest
from store.images import ImageStore, StagedImage, as_store_error, delete_unneeded_images
from store.keys import count_images
from store.records import ISOLATION_STEPS, Answer, Blame, Claim, NewRequest, RequestRecord, RequestState, to_text

#: A request fails after this many failures that it is to blame for.
MAX_ATTEMPTS = 3

_FIND_ANSWER = """
    SELECT output, digest, provider, seconds, chunk_id FROM requests
    WHERE image_sha256 = :image_sha256 AND model = :model AND service = :service AND params = :params
      AND digest = :digest AND state = 'done'
    LIMIT 1
"""

_ADD = """
    INSERT INTO requests (id, service, model, params, name, image_sha256, image_bytes, state, is_fresh, is_cached,
                          created_at, due_at, finished_at, chunk_id, provider, digest, seconds, output,
                          batch_id, client_id, labels, key_id, keep_seconds, deadline_at, webhook)
    VALUES (:id, :service, :model, :params, :name, :image_sha256, :image_bytes, :state, :is_fresh, :is_cached,
            :created_at, :created_at, :finished_at, :chunk_id, :provider, :digest, :seconds, :output,
            :batch_id, :client_id, :labels, :key_id, :keep_seconds, :deadline_at, :webhook)
    RETURNING *
"""

_GET = "SELECT * FROM requests WHERE id = ?"

# A skip scan: one step of the index per model, however many requests wait.
_QUEUED_MODELS = """
    WITH RECURSIVE queued (model) AS (
        SELECT min(model) FROM requests WHERE state = 'queued'
        UNION ALL
        SELECT (SELECT min(model) FROM requests WHERE state = 'queued' AND model > queued.model)
        FROM queued WHERE queued.model IS NOT NULL
    )
    SELECT model FROM queued WHERE model IS NOT NULL
"""

# INDEXED BY: without statistics SQLite may choose another index that begins with the model, and then reads every
# answered request of the model too.
_OLDEST_DUE = """
    SELECT created_at FROM requests INDEXED BY requests_queued
    WHERE state = 'queued' AND model = :model AND due_at <= :now ORDER BY number LIMIT 1
"""

_HAS_REQUEUED = """
    SELECT EXISTS (SELECT 1 FROM requests
                   WHERE state = 'queued' AND claimed_at IS NOT NULL AND model = :model AND due_at <= :now)
"""

_COUNT_DUE = """
    SELECT count(*) FROM (SELECT 1 FROM requests INDEXED BY requests_queued
                          WHERE state = 'queued' AND model = :model AND due_at <= :now LIMIT :limit)
"""

_CLAIM = """
    UPDATE requests
    SET state = 'claimed', token = token + 1, claimed_at = :now, lease_ends_at = :lease_ends_at
    WHERE number IN (SELECT number FROM requests INDEXED BY requests_queued
                     WHERE state = 'queued' AND model = :model AND due_at <= :now ORDER BY number LIMIT :count)
    RETURNING number, id, token, service, model, params, image_sha256, image_bytes, attempts, isolation, created_at
"""

_RENEW = """
    UPDATE requests SET lease_ends_at = :lease_ends_at WHERE number = :number AND token = :token AND state = 'claimed'
"""

_FINISH = """
    UPDATE requests
    SET state = 'done', lease_ends_at = NULL, finished_at = :now, chunk_id = :chunk_id, provider = :provider,
        digest = :digest, seconds = :seconds, output = :output, share = :share, code = NULL, reason = NULL
    WHERE number = :number AND token = :token AND state = 'claimed'
"""

_ANSWERS_OF_CHUNK = "SELECT answers FROM chunks WHERE id = ?"

_SET_ANSWERS_OF_CHUNK = "UPDATE chunks SET answers = ? WHERE id = ?"

_FAIL = """
    UPDATE requests
    SET state = 'failed', lease_ends_at = NULL, finished_at = :now, attempts = attempts + 1, code = :code,
        reason = :reason
    WHERE number = :number AND token = :token AND state = 'claimed'
"""

# The last isolation step is "alone": a chunk that fails then has only this item to blame.
_RELEASE = """
    UPDATE requests
    SET lease_ends_at = NULL, code = :code, reason = :reason, due_at = :due_at,
        isolation = CASE WHEN :blame = 'chunk' THEN min(isolation + 1, :alone) ELSE isolation END,
        attempts = attempts + (:blame = 'item' OR (:blame = 'chunk' AND isolation >= :alone)),
        state = CASE WHEN attempts + (:blame = 'item' OR (:blame = 'chunk' AND isolation >= :alone))
                          >= :max_attempts THEN 'failed' ELSE 'queued' END,
        finished_at = CASE WHEN attempts + (:blame = 'item' OR (:blame = 'chunk' AND isolation >= :alone))
                                >= :max_attempts THEN :now ELSE NULL END
    WHERE state = 'claimed' AND {which}
"""
_RELEASE_ONE = _RELEASE.format(which="number = :number AND token = :token")
_RELEASE_EXPIRED = _RELEASE.format(which="lease_ends_at <= :now")

_CANCEL = "UPDATE requests SET state = 'cancelled', finished_at = :now WHERE id = :id AND state = 'queued' RETURNING *"

_RETRY = """
    UPDATE requests
    SET state = 'queued', attempts = 0, finished_at = NULL, due_at = :now,
        code = CASE WHEN code = 'expired' THEN NULL ELSE code END,
        reason = CASE WHEN code = 'expired' THEN NULL ELSE reason END,
        deadline_at = CASE WHEN deadline_at <= :now THEN NULL ELSE deadline_at END
    WHERE id = :id AND state IN ('failed', 'cancelled') AND image_deleted_at IS NULL
    RETURNING *
"""

_COST_OF_CHUNK = "SELECT cost, answers, is_cost_final FROM chunks WHERE id = ?"


def request_with_cost(row: Any, connection: sqlite3.Connection, costs: dict[str, Any]) -> RequestRecord:
    """Build a request record with its share of its chunk's cost.

    :param costs: cache of the chunks read so far, shared by the requests of a list.
    """
    share, chunk_id = row["share"], row["chunk_id"]
    if share is None:
        return RequestRecord.from_row(row)
    if chunk_id not in costs:
        costs[chunk_id] = connection.execute(_COST_OF_CHUNK, (chunk_id,)).fetchone()
    cost, answers, is_final = costs[chunk_id] or (None, 0, 0)
    if cost is None:
        return RequestRecord.from_row(row)
    return RequestRecord.from_row(row, cost=equal_share(Decimal(cost), answers, share), is_cost_final=bool(is_final))


def request_row(new: NewRequest, staged: StagedImage) -> dict[str, Any]:
    """Return the columns of a request that is about to be added."""
    return {
        "id": new.id,
        "service": new.service,
        "model": new.model,
        "params": json.dumps(new.params, sort_keys=True, separators=(",", ":")),
        "name": new.name,
        "image_sha256": staged.sha256,
        "image_bytes": staged.size,
        "state": str(RequestState.QUEUED),
        "is_fresh": new.is_fresh,
        "is_cached": False,
        "created_at": to_text(new.created_at),
        "finished_at": None,
        "chunk_id": None,
        "provider": None,
        "digest": None,
        "seconds": None,
        "output": None,
        "batch_id": new.batch_id,
        "client_id": new.client_id,
        "labels": json.dumps(dict(new.labels), sort_keys=True, ensure_ascii=False),
        "key_id": new.key_id,
        "keep_seconds": new.keep_seconds,
        "deadline_at": None if new.deadline_at is None else to_text(new.deadline_at),
        "webhook": new.webhook,
    }


def insert_request(
    transaction: Transaction, images: ImageStore, new: NewRequest, staged: StagedImage, row: dict[str, Any]
) -> RequestRecord:
    """Publish the image and insert the row; call it inside a write. Reuses an earlier answer for an equal image."""
    values = row
    if new.digest is not None and not new.is_fresh:
        earlier = transaction.execute(_FIND_ANSWER, {**row, "digest": new.digest}).fetchone()
        if earlier is not None:
            values = {
                **row,
                **dict(earlier),
                "state": str(RequestState.DONE),
                "is_cached": True,
                "finished_at": row["created_at"],
            }
    try:
        images.publish(staged)
        transaction.published.append(staged.sha256)
        transaction.folders_to_sync.add(images.published_folder)
    except OSError as error:
        raise as_store_error(error, images.folder) from error
    # Fetch all rows: an open statement would prevent the release of the savepoint.
    (added,) = transaction.execute(_ADD, values).fetchall()
    return RequestRecord.from_row(added)


class Requests:
    """The table `requests` and the images it refers to."""

    images: ImageStore
    _writer: Writer
    _readers: ReaderPool

    def add(self, new: NewRequest, staged: StagedImage) -> RequestRecord:
        """Add a request and publish its image; return when both are durable.

        When the same artefact has answered an equal image before, and the request is not fresh, it is done at once
        with that answer and `is_cached`. After an error neither the row nor the image is left behind.

        :raises StoreBusy: locked for too long.
        :raises StoreUnavailable: read-only or gone.
        :raises DiskFull:
        :raises QuotaReached: the quota of its key, which is counted in the same commit; see `keys.py`.
        """
        row = request_row(new, staged)

        def write(transaction: Transaction) -> RequestRecord:
            if new.key_id is not None:
                count_images(transaction, new.key_id, 1, now=row["created_at"])
            return insert_request(transaction, self.images, new, staged, row)

        try:
            return self._writer.run(write, has_savepoint=new.key_id is not None)
        except BaseException:
            self.images.discard(staged)
            raise

    def get(self, id: str) -> RequestRecord:
        """Read one request. :raises UnknownRequest:"""
        with self._readers.connection() as connection:
            row = connection.execute(_GET, (id,)).fetchone()
            if row is None:
                raise UnknownRequest()
            return request_with_cost(row, connection, {})

    def claim(
        self,
        *,
        models: Collection[str],
        limit: int,
        now: datetime,
        lease_ends_at: datetime,
        oldest_before: datetime | None,
    ) -> list[Claim]:
        """Claim up to `limit` queued requests of these models that are due, oldest first within a model.

        Models share the limit in turns, a full chunk each, the longest waiting first.

        :param oldest_before: a model is due when a full chunk of it is queued, or its oldest request was accepted
            before this time; with None every model is.
        """
        full = ISOLATION_STEPS[0]
        times = {"now": to_text(now), "lease_ends_at": to_text(lease_ends_at)}
        requested_models = frozenset(models)

        def write(transaction: Transaction) -> list[Claim]:
            #: model -> how many of it may be claimed: all when it is due by age, else full chunks only.
            claimable: dict[str, int] = {}
            oldest_created_at: dict[str, str] = {}
            for (model,) in transaction.execute(_QUEUED_MODELS).fetchall():
                if model not in requested_models:
                    continue
                which = {"model": model, "now": times["now"], "limit": limit}
                oldest = transaction.execute(_OLDEST_DUE, which).fetchone()
                if oldest is None:
                    continue
                oldest_created_at[model] = oldest[0]
                due = transaction.execute(_COUNT_DUE, which).fetchone()[0]
                is_due_by_age = (
                    oldest_before is None
                    or oldest[0] <= to_text(oldest_before)
                    or transaction.execute(_HAS_REQUEUED, which).fetchone()[0]
                )
                claimable[model] = due if is_due_by_age else due - due % full
            claims: list[Claim] = []
            turns = sorted((model for model in claimable if claimable[model]), key=oldest_created_at.__getitem__)
            while turns and len(claims) < limit:
                for model in list(turns):
                    count = min(full, claimable[model], limit - len(claims))
                    if count == 0:
                        turns.remove(model)
                        continue
                    rows = transaction.execute(_CLAIM, {**times, "model": model, "count": count}).fetchall()
                    claims += sorted(map(Claim.from_row, rows), key=lambda claim: claim.number)
                    claimable[model] -= count
            return claims

        # Reading needs no write lock, and most calls find nothing.
        with self._readers.connection() as connection:
            if connection.execute(_QUEUED_MODELS).fetchone() is None:
                return []
        return self._writer.run(write)

    def renew(self, claims: Iterable[Claim], *, lease_ends_at: datetime) -> set[int]:
        """Extend the leases. :return: the numbers of the claims that are still valid."""
        claim_list = list(claims)

        def write(transaction: Transaction) -> set[int]:
            return {
                claim.number
                for claim in claim_list
                if transaction.execute(
                    _RENEW,
                    {"lease_ends_at": to_text(lease_ends_at), "number": claim.number, "token": claim.token},
                ).rowcount
            }

        return self._writer.run(write) if claim_list else set()

    def finish(self, answers: Sequence[Answer], *, now: datetime) -> int:
        """Record answers, all or none, in one commit. :return: how many claims were still valid."""
        rows: list[dict[str, Any]] = [
            {
                "number": answer.claim.number,
                "token": answer.claim.token,
                "now": to_text(now),
                "chunk_id": answer.chunk_id,
                "provider": answer.provider,
                "digest": answer.digest,
                "seconds": answer.seconds,
                "output": json.dumps(answer.output, separators=(",", ":")),
            }
            for answer in answers
        ]

        def write(transaction: Transaction) -> int:
            #: chunk -> how many requests it has answered; a chunk whose start was not recorded has no row and no cost.
            counts: dict[str, int] = {}
            for chunk_id in {answer.chunk_id for answer in answers}:
                known = transaction.execute(_ANSWERS_OF_CHUNK, (chunk_id,)).fetchone()
                if known is not None:
                    counts[chunk_id] = known[0]
            recorded = 0
            for row in rows:
                share = counts.get(row["chunk_id"])
                if transaction.execute(_FINISH, {**row, "share": share}).rowcount:
                    recorded += 1
                    if share is not None:
                        counts[row["chunk_id"]] = share + 1
            for chunk_id, count in counts.items():
                transaction.execute(_SET_ANSWERS_OF_CHUNK, (count, chunk_id))
            return recorded

        return self._writer.run(write) if rows else 0

    def fail(self, claims: Iterable[Claim], *, code: str, reason: str, now: datetime) -> int:
        """Fail requests that cannot be answered, for good. :return: how many claims were still valid."""
        rows = [
            {"number": claim.number, "token": claim.token, "now": to_text(now), "code": code, "reason": reason}
            for claim in claims
        ]
        return self._write_each(_FAIL, rows)

    def release(
        self,
        claims: Iterable[Claim],
        *,
        blame: Blame,
        code: str,
        reason: str,
        now: datetime,
        due_at: datetime | None = None,
    ) -> int:
        """Return claims to the queue, or fail them when their attempts are used up.

        :param due_at: not claimed again before this time; None is now.
        :return: how many claims were still valid.
        """
        shared = self._release_parameters(blame=blame, code=code, reason=reason, now=now, due_at=due_at or now)
        return self._write_each(
            _RELEASE_ONE, [{**shared, "number": claim.number, "token": claim.token} for claim in claims]
        )

    def release_expired(self, now: datetime) -> int:
        """Release every claim whose lease has ended, blaming the chunk. :return: how many."""
        with self._readers.connection() as connection:
            ended = connection.execute(
                "SELECT 1 FROM requests WHERE state = 'claimed' AND lease_ends_at <= ? LIMIT 1", (to_text(now),)
            ).fetchone()
        if ended is None:
            return 0
        return self._write_each(
            _RELEASE_EXPIRED,
            [
                self._release_parameters(
                    blame=Blame.CHUNK,
                    code="lease_ended",
                    reason="The batcher that worked on it stopped.",
                    now=now,
                    due_at=now,
                )
            ],
        )

    @staticmethod
    def _release_parameters(*, blame: Blame, code: str, reason: str, now: datetime, due_at: datetime) -> dict[str, Any]:
        return {
            "blame": blame.value,
            "code": code,
            "reason": reason,
            "now": to_text(now),
            "due_at": to_text(due_at),
            "alone": len(ISOLATION_STEPS) - 1,
            "max_attempts": MAX_ATTEMPTS,
        }

    def cancel(self, id: str, *, now: datetime) -> RequestRecord:
        """Cancel a queued request.

        :raises UnknownRequest:
        :raises NotCancellable:
        """
        return self._change_one(_CANCEL, id, now, NotCancellable)

    def retry(self, id: str, *, now: datetime) -> RequestRecord:
        """Queue a failed or cancelled request again, its attempts reset.

        :raises UnknownRequest:
        :raises NotRetryable:
        """
        return self._change_one(_RETRY, id, now, NotRetryable)

    def list(
        self,
        *,
        state: RequestState | None = None,
        model: str | None = None,
        before: int | None = None,
        limit: int = 50,
    ) -> builtins.list[RequestRecord]:
        """List requests, newest first. :param before: only lower numbers."""
        # The state is in the text, not a parameter: only then can SQLite use the partial indexes.
        conditions = [f"state = '{RequestState(state)}'"] if state is not None else []
        conditions += ["model = :model"] if model is not None else []
        conditions += ["number < :before"] if before is not None else []
        where = " AND ".join(conditions) or "1"
        with self._readers.connection() as connection:
            rows = connection.execute(
                f"SELECT * FROM requests WHERE {where} ORDER BY number DESC LIMIT :limit",
                {"model": model, "before": before, "limit": limit},
            ).fetchall()
            costs: dict[str, Any] = {}
            return [request_with_cost(row, connection, costs) for row in rows]

    def remove(self, id: str) -> None:
        """Delete a request that has ended, and its image unless another request needs it.

        :raises UnknownRequest:
        :raises NotRemovable:
        """

        def write(transaction: Transaction) -> None:
            removed = transaction.execute(
                "DELETE FROM requests WHERE id = ? AND finished_at IS NOT NULL RETURNING image_sha256", (id,)
            ).fetchall()
            if not removed:
                if transaction.execute("SELECT 1 FROM requests WHERE id = ?", (id,)).fetchone() is None:
                    raise UnknownRequest()
                raise NotRemovable()
            delete_unneeded_images(transaction, self.images, [removed[0][0]])

        self._writer.run(write)

    def _write_each(self, sql: str, rows: Sequence[dict[str, Any]]) -> int:
        """Run a statement once for each row in one commit. :return: how many rows of the table changed."""
        if not rows:
            return 0
        return self._writer.run(lambda transaction: sum(transaction.execute(sql, row).rowcount for row in rows))

    def _change_one(
        self, sql: str, id: str, now: datetime, error_type: type[NotCancellable] | type[NotRetryable]
    ) -> RequestRecord:
        def write(transaction: Transaction) -> RequestRecord:
            changed = transaction.execute(sql, {"id": id, "now": to_text(now)}).fetchall()
            if changed:
                return RequestRecord.from_row(changed[0])
            if transaction.execute("SELECT 1 FROM requests WHERE id = ?", (id,)).fetchone() is None:
                raise UnknownRequest()
            raise error_type()

        return self._writer.run(write)

"""The store on SQLite (WAL, synchronous=FULL) with pictures in files: the implementation there is.

Made by `commands.py`, used by the server and the batcher. Every statement that depends on a request's state is named
SQL text in this file; the journal's tables are in `sqlite_journal.py`, the money's in `sqlite_ledger.py` and
`sqlite_providers.py`, deleting what is old in `sqlite_retention.py`.
Long because each statement and the method that runs it stand in one place.

Weaknesses: one machine only, and one writer at a time for all processes. Good for thousands of requests a second on
one disk; beyond that the same protocol wants a database server.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import Any

import sqlite_utils

from store.database import ReaderPool, Transaction, Writer, connect
from store.database import as_store_error as database_error
from store.errors import NotCancellable, NotRetryable, StoreUnavailable, UnknownRequest
from store.images import ImageStore, StagedImage, as_store_error, sync_folder
from store.migrations import migrate
from store.records import ISOLATION_STEPS, Answer, Blame, Claim, NewRequest, RequestRecord, RequestState, to_text
from store.retention import IS_REFERENCED, SqliteRetention
from store.settings import HomeSettings
from store.sqlite_batches import SqliteBatches
from store.sqlite_changes import SqliteChangeFeed
from store.sqlite_chunks import SqliteChunks
from store.sqlite_controls import SqliteControls
from store.sqlite_costs import request_with_cost
from store.sqlite_idempotency import SqliteIdempotency
from store.sqlite_keys import SqliteKeys, count_images
from store.sqlite_ledger import SqliteLedger
from store.sqlite_providers import SqliteProviders
from store.sqlite_search import SqliteSearch
from store.sqlite_stats import SqliteStats
from store.sqlite_webhooks import SqliteWebhooks

#: A request fails after this many failures of its own.
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

# The queue's index is named: without statistics SQLite may take another one that begins with the model, and then reads
# every answered request of the model as well.
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
                          WHERE state = 'queued' AND model = :model AND due_at <= :now LIMIT :most)
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
        state = CASE WHEN attempts + (:blame = 'item' OR (:blame = 'chunk' AND isolation >= :alone)) >= :most
                     THEN 'failed' ELSE 'queued' END,
        finished_at = CASE WHEN attempts + (:blame = 'item' OR (:blame = 'chunk' AND isolation >= :alone)) >= :most
                           THEN :now ELSE NULL END
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


def _params_text(params: Any) -> str:
    return json.dumps(params, sort_keys=True, separators=(",", ":"))


class SqliteStore(
    SqliteBatches,
    SqliteControls,
    SqliteChangeFeed,
    SqliteStats,
    SqliteIdempotency,
    SqliteChunks,
    SqliteKeys,
    SqliteLedger,
    SqliteSearch,
    SqliteProviders,
    SqliteRetention,
    SqliteWebhooks,
):
    """Store, Journal, Ledger and Providers in one SQLite file.

    May be used from any thread, and by several processes at once.
    """

    def __init__(self, settings: HomeSettings) -> None:
        self._home = settings.home
        self._database = settings.database
        self._busy_seconds = settings.busy_seconds
        self.images = ImageStore(settings.images)
        self._readers = ReaderPool(self._database, busy_seconds=settings.busy_seconds)
        self._writer = Writer(
            self._database,
            busy_seconds=settings.busy_seconds,
            before_commit=self._sync_folders,
            undo=self._unpublish,
        )

    # Start and end

    def migrate(self) -> list[str]:
        """Make the home if need be and bring the database to the present schema.

        :return: the names of the steps applied now.
        :raises StoreUnavailable: the home cannot be written. :raises ConfigError: made by a newer mlg.
        """
        try:
            self._home.mkdir(parents=True, exist_ok=True, mode=0o750)
        except OSError as error:
            raise as_store_error(error, self._home) from error
        self.images.create()
        connection = connect(self._database, busy_seconds=max(self._busy_seconds, 30.0))
        try:
            self._switch_to_wal(connection)
            connection.execute("BEGIN IMMEDIATE")
            applied = migrate(sqlite_utils.Database(connection))
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise database_error(error, self._database) from error
        finally:
            connection.close()
        return applied

    @staticmethod
    def _switch_to_wal(connection: sqlite3.Connection) -> None:
        # The switch asks for the file alone and does not honour the busy timeout, so several starters take turns here.
        deadline = time.monotonic() + 30.0
        while True:
            try:
                mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
                break
            except sqlite3.OperationalError as error:
                if (error.sqlite_errorcode & 0xFF) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        if mode != "wal":
            raise StoreUnavailable(
                f"SQLite cannot use a write-ahead log here (journal mode {mode}). Put the home on a local disk."
            )

    def check(self) -> None:
        """Prove that the store can be written. :raises StoreError:"""
        self._writer.run(lambda transaction: transaction.execute("UPDATE batchers SET seen_at = seen_at WHERE 0"))
        if not self.images.folder.is_dir():
            raise StoreUnavailable(f"The folder {self.images.folder} is gone.")

    def close(self) -> None:
        """Commit what waits and close every connection."""
        self._writer.close()
        self._readers.close()

    # Requests

    def add(self, new: NewRequest, staged: StagedImage) -> RequestRecord:
        """See Store.add."""
        row = self._row_of(new, staged)

        def write(transaction: Transaction) -> RequestRecord:
            if new.key_id is not None:
                count_images(transaction, new.key_id, 1, now=row["created_at"])
            return self._insert(transaction, new, staged, row)

        try:
            request: RequestRecord = self._writer.run(write, has_savepoint=new.key_id is not None)
        except BaseException:
            self.images.discard(staged)
            raise
        return request

    @staticmethod
    def _row_of(new: NewRequest, staged: StagedImage) -> dict[str, Any]:
        return {
            "id": new.id,
            "service": new.service,
            "model": new.model,
            "params": _params_text(new.params),
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

    def _insert(
        self, transaction: Transaction, new: NewRequest, staged: StagedImage, row: dict[str, Any]
    ) -> RequestRecord:
        """Publish the picture and insert the row, inside a write; answered at once if an equal picture was."""
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
            self.images.publish(staged)
            transaction.published.append(staged.sha256)
            transaction.folders_to_sync.add(self.images.published_folder)
        except OSError as error:
            raise as_store_error(error, self.images.folder) from error
        # All rows are fetched, else the statement stays open and the savepoint cannot be released.
        (added,) = transaction.execute(_ADD, values).fetchall()
        return RequestRecord.from_row(added)

    def get(self, id: str) -> RequestRecord:
        """See Store.get."""
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
        """See Store.claim."""
        full = ISOLATION_STEPS[0]
        times = {"now": to_text(now), "lease_ends_at": to_text(lease_ends_at)}
        requested_models = frozenset(models)

        def write(transaction: Transaction) -> list[Claim]:
            #: model -> how many of it may be taken: everything when it is due by age, else full chunks only.
            claimable: dict[str, int] = {}
            oldest_created_at: dict[str, str] = {}
            for (model,) in transaction.execute(_QUEUED_MODELS).fetchall():
                if model not in requested_models:
                    continue
                which = {"model": model, "now": times["now"], "most": limit}
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

        # Looking costs no write lock; most looks find nothing.
        with self._readers.connection() as connection:
            if connection.execute(_QUEUED_MODELS).fetchone() is None:
                return []
        result: list[Claim] = self._writer.run(write)
        return result

    def renew(self, claims: Iterable[Claim], *, lease_ends_at: datetime) -> set[int]:
        """See Store.renew."""
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

        result: set[int] = self._writer.run(write) if claim_list else set()
        return result

    def finish(self, answers: Sequence[Answer], *, now: datetime) -> int:
        """See Store.finish."""
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
            #: chunk -> how many requests it has answered; those whose start could not be noted have no row and no cost.
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

        result: int = self._writer.run(write) if rows else 0
        return result

    def fail(self, claims: Iterable[Claim], *, code: str, reason: str, now: datetime) -> int:
        """See Store.fail."""
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
        """See Store.release."""
        shared = self._release_parameters(blame=blame, code=code, reason=reason, now=now, due_at=due_at or now)
        return self._write_each(
            _RELEASE_ONE, [{**shared, "number": claim.number, "token": claim.token} for claim in claims]
        )

    def release_expired(self, now: datetime) -> int:
        """See Store.release_expired."""
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
                    reason="The batcher that was working on it went away.",
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
            "most": MAX_ATTEMPTS,
        }

    def cancel(self, id: str, *, now: datetime) -> RequestRecord:
        """See Store.cancel."""
        return self._change_one(_CANCEL, id, now, NotCancellable)

    def retry(self, id: str, *, now: datetime) -> RequestRecord:
        """See Store.retry."""
        return self._change_one(_RETRY, id, now, NotRetryable)

    # What they are made of

    def _sync_folders(self, transaction: Transaction) -> None:
        try:
            for folder in transaction.folders_to_sync:
                sync_folder(folder)
        except OSError as error:
            raise as_store_error(error, self.images.folder) from error

    def _unpublish(self, transaction: Transaction) -> None:
        for sha256 in transaction.published:
            if not transaction.execute(IS_REFERENCED, (sha256,)).fetchone()[0]:
                self.images.delete(sha256)

    def _write_each(self, sql: str, rows: Sequence[dict[str, Any]]) -> int:
        """Run one statement for each row in one commit. :return: how many rows of the table it changed."""
        if not rows:
            return 0
        changed: int = self._writer.run(lambda transaction: sum(transaction.execute(sql, row).rowcount for row in rows))
        return changed

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

        result: RequestRecord = self._writer.run(write)
        return result

    def __repr__(self) -> str:
        return f"SqliteStore({str(self._database)!r})"

    def list(
        self,
        *,
        state: RequestState | None = None,
        model: str | None = None,
        before: int | None = None,
        limit: int = 50,
    ) -> list[RequestRecord]:
        """See Store.list."""
        # The state stands in the text, not in a parameter: only then can SQLite use the partial indexes.
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

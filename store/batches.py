"""Batches: the tables `batches` and `batch_refusals`, the requests that belong to a batch, and deadlines.

The server adds, reads, cancels and retries; the batcher lets requests expire. An item that a batch refused (a file that
is no image) is kept beside it, so that a client that sent ten thousand finds the three that were refused.

Guarantees beside those in `store/__init__.py`: a batch is added whole or not at all. A large one is added in slices, so
that the write lock is never held for long. Its requests are hidden until one row of `batches` shows them all; earlier
answers are given after that, before the rest is claimed. What a killed process left hidden is deleted by
`finish_interrupted`. Requests that ended are numbered in the order of the commits (see `transition.py`), so a client
that has read the results up to a number and asks again later misses nothing and reads nothing twice; a request that is
retried ends again, under a new number. A batch that does earlier requests again is visible while it grows, and claimed
when it has all of them; what a killed process has added of it stays. Cancelling, retrying and deleting a large batch
takes several commits; a process that is killed in between has done a part of it, and doing it again does the rest.

Long because it has the records, the statements and the rules of one noun.
"""

from __future__ import annotations

import builtins
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, TypeVar

from provider_image.errors import MlgError
from store.amounts import equal_share, total
from store.clients.usage import ClientKind, Sender, count_accepted
from store.database import Database, Transaction, WriteFunction
from store.errors import QuotaReached, StoreError, StoreUnavailable, UnknownRequest
from store.images import ImageStore, StagedImage
from store.pipelines.definition import PIPELINE
from store.requests import (
    FORGET,
    RESET,
    ROWS_PER_COMMIT,
    NewItem,
    NewRequest,
    RequestRecord,
    SubmissionFacts,
    answer_known,
    delete_requests,
    find_answer,
    input_bytes,
    insert_requests,
    read_requests,
    replacing_items,
    request_row,
    settle_children,
)
from store.rows import from_row, from_text, insert_sql, mapping_to_text, to_row, to_text
from store.states import EXPIRED, RequestState
from store.transition import end_empty_batch, transition

log = logging.getLogger(__name__)

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

_SOME_ENDED_ITEMS = """
    number IN (SELECT number FROM requests INDEXED BY requests_batch
               WHERE batch_id = :id AND finished_at IS NOT NULL LIMIT :rows_per_commit)
"""

# Of a batch that is hidden; nothing of it was ever claimed.
_SOME_HIDDEN_ITEMS = """
    number IN (SELECT number FROM requests INDEXED BY requests_batch WHERE batch_id = :id LIMIT :rows_per_commit)
"""

_DELETE_REFUSALS = """
    DELETE FROM batch_refusals WHERE batch_id = :id AND position IN (
        SELECT position FROM batch_refusals WHERE batch_id = :id LIMIT :rows_per_commit)
"""

#: Values of `batches.arrival`; 0 is one that has arrived. HIDDEN while its requests are added, VISIBLE while it gets
#: its earlier answers, before the rest is claimed, ABANDONED while what was added is deleted.
_HIDDEN, _VISIBLE, _ABANDONED = 1, 2, 3

#: Requests to pipelines that are read together with their steps.
_PIPELINES_PER_READ = 10

#: A batch that gets no slice for so long was left by a process that was killed.
ARRIVAL_SECONDS = 600.0

_IS_SHOWN = f"arrival IN (0, {_VISIBLE})"

_GET = f"SELECT * FROM batches WHERE id = ? AND {_IS_SHOWN}"

_ADD_SLICE = f"""
    UPDATE batches SET arrived = arrived + :count, arrival_ends_at = :arrival_ends_at
    WHERE id = :id AND arrival = {_HIDDEN}
"""

_SHOW = f"""
    UPDATE batches SET arrival = {_VISIBLE}, arrival_ends_at = :arrival_ends_at WHERE id = :id AND arrival = {_HIDDEN}
    RETURNING *
"""

# Not once its requests may be claimed: it would end before it has all of them.
_GROW = f"""
    UPDATE batches SET total = total + :count, arrival_ends_at = :arrival_ends_at
    WHERE id = :id AND arrival = {_VISIBLE} AND arrival_ends_at > :now AND cancelled_at IS NULL
"""

_ARRIVE = f"UPDATE batches SET arrival = 0, arrival_ends_at = NULL WHERE id = ? AND arrival = {_VISIBLE}"

_INTERRUPTED = f"""
    SELECT id, arrival FROM batches WHERE arrival > 0 AND (arrival = {_ABANDONED} OR arrival_ends_at <= ?)
"""

# A slow process that still adds to it notices that.
_ABANDON = f"""
    UPDATE batches SET arrival = {_ABANDONED} WHERE id = :id AND arrival = {_HIDDEN} AND arrival_ends_at <= :now
"""

_IS_ABANDONED = f"SELECT 1 FROM batches WHERE id = :id AND arrival = {_ABANDONED}"

_SOME_TO_CHANGE = """
    number IN (SELECT number FROM requests INDEXED BY requests_batch
               WHERE batch_id = :id AND number > :after AND {which} ORDER BY number LIMIT :rows_per_commit)
"""

_DELETE_EMPTY = """
    DELETE FROM batches WHERE id = :id AND NOT EXISTS (SELECT 1 FROM requests WHERE batch_id = :id)
"""


class UnknownBatch(UnknownRequest):
    """There is no batch with this id. It was never accepted here, or its retention time is over."""


class BatchInProgress(MlgError):
    """Requests of the batch are still queued or in progress. Cancel it, or wait until it has ended."""

    code = "batch_under_way"
    permanent = True


class BatchStopped(MlgError):
    """The batch was cancelled while requests were added to it, or that took too long. Repeat the call for the rest."""

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


_Result = TypeVar("_Result")


def _in_parts(write: Callable[[slice, Transaction], _Result], count: int) -> list[WriteFunction[_Result]]:
    """Return a write for each slice of so many items."""
    starts = range(0, count, ROWS_PER_COMMIT)
    return [functools.partial(write, slice(start, start + ROWS_PER_COMMIT)) for start in starts]


def _batch_row(batch: BatchRecord, **others: Any) -> dict[str, Any]:
    """Return the columns of a batch that is about to be added."""
    row = to_row(batch, labels=mapping_to_text(batch.labels, sort_keys=True, ensure_ascii=False), **others)
    del row["number"]
    return row


def _sender(batch: BatchRecord, key_id: str | None, client: ClientKind) -> Sender:
    return Sender(key_id=key_id, client=client, model=batch.model, at=to_text(batch.created_at))


def _make_lease(batch: BatchRecord) -> Callable[[], dict[str, Any]]:
    """Return what makes the parameters of a slice: until when the batch has time for the next one, from now on."""
    started = time.monotonic()

    def lease() -> dict[str, Any]:
        now = batch.created_at + timedelta(seconds=time.monotonic() - started)
        ends_at = now + timedelta(seconds=ARRIVAL_SECONDS)
        return {"id": batch.id, "now": to_text(now), "arrival_ends_at": to_text(ends_at)}

    return lease


class Batches:
    """The batches, their requests and their refused items."""

    def __init__(self, database: Database, images: ImageStore) -> None:
        self._database = database
        self._images = images

    def add(
        self,
        batch: BatchRecord,
        items: Sequence[tuple[NewRequest, StagedImage]],
        refused_items: Sequence[RefusedItem],
        *,
        shared: Mapping[str, StagedImage] = {},
        client: ClientKind = ClientKind.OTHER,
    ) -> list[RequestRecord]:
        """Add a batch, its requests in this order, and its refused items; return when all are durable.

        :param shared: inputs that every request has beside its own, by name; stored once.
        :param client: the program that sends it.
        :raises StoreError: nothing is left behind, the staged images included.
        :raises QuotaReached: likewise.
        """
        values = _batch_row(batch, total=len(items), refused=len(refused_items), arrival=_HIDDEN)
        rows: list[NewItem] = []
        to_publish: list[StagedImage] = []
        for new, staged in items:
            whole = replace(staged, others={**staged.others, **shared})
            # What is shared is published with the first request, and needed by all that follow.
            to_publish.append(staged if to_publish else whole)
            rows.append((new, to_publish[-1], request_row(new, whole)))
        lease = _make_lease(batch)
        sender = _sender(batch, batch.key_id, client)
        usage: int | None = None

        def begin(transaction: Transaction) -> None:
            nonlocal usage
            usage = count_accepted(transaction, sender)
            row = {**values, "arrival_ends_at": lease()["arrival_ends_at"]}
            transaction.execute(f"INSERT INTO {insert_sql('batches', row)}", row)

        def refuse(part: slice, transaction: Transaction) -> None:
            refused = [to_row(one, batch_id=batch.id) for one in refused_items[part]]
            transaction.execute_many(_ADD_REFUSAL, refused)

        def insert(part: slice, transaction: Transaction) -> list[RequestRecord]:
            if not transaction.execute(_ADD_SLICE, {**lease(), "count": len(rows[part])}).rowcount:
                raise StoreUnavailable("Adding the batch took too long. Send it again, in smaller parts.")
            return insert_requests(transaction, rows[part], usage=usage)

        def show(transaction: Transaction) -> None:
            # Only now, as nothing of a batch that is given up counts.
            count_accepted(
                transaction, sender, accepted=len(items), refused=len(refused_items), size_bytes=input_bytes(rows)
            )
            row = transaction.execute(_SHOW, lease()).fetchone()
            if row is None:
                raise StoreUnavailable("Adding the batch took too long. Send it again, in smaller parts.")
            if not items:
                end_empty_batch(transaction, row, now=batch.created_at)

        inserts = _in_parts(insert, len(items))
        before: list[WriteFunction[list[RequestRecord] | None]]
        before = [begin, *_in_parts(refuse, len(refused_items)), *inserts, show]

        def write_whole(transaction: Transaction) -> list[RequestRecord]:
            added = [record for step in before for record in step(transaction) or ()]
            numbered = zip((record.number for record in added), rows, strict=True)
            answered = {one.number: one for one in answer_known(transaction, numbered, now=batch.created_at)}
            transaction.execute(_ARRIVE, (batch.id,))
            return [answered.get(record.number, record) for record in added]

        added: list[RequestRecord] = []
        is_begun = False
        try:
            if len(items) + len(refused_items) <= ROWS_PER_COMMIT:
                return self._database.write(write_whole)
            for found in self._database.write_each(before):
                is_begun = True
                added += found or ()
        except BaseException:
            if is_begun:
                self._abandon_after_error(batch.id)
            for staged in to_publish:
                self._images.discard(staged)
            raise
        finally:
            for staged in shared.values():  # published by now, if there is a request that has it
                self._images.discard(staged)
        answered = self._arrive(batch, [(record.number, item) for record, item in zip(added, rows, strict=True)])
        return [answered.get(record.number, record) for record in added]

    def add_replacements(
        self,
        batch: BatchRecord,
        new: Sequence[NewRequest],
        *,
        charged_key_id: str | None,
        client: ClientKind = ClientKind.OTHER,
    ) -> tuple[int, MlgError | None]:
        """Add a batch of requests that do earlier ones again, with the inputs of these and without their webhooks.

        An earlier request that has one of this model already, or no inputs any more, is left out, so doing it again
        adds what is missing. It stops early where the quota ends, and when the batch is cancelled meanwhile.

        :param new: in the order of the queue.
        :param charged_key_id: the key whose quota and usage count them.
        :param client: the program that asks for it.
        :return: how many were added, and why it stopped early. Without any there is no batch.
        :raises StoreError: what was added before stays.
        """
        lease = _make_lease(batch)
        row = _batch_row(batch, total=0, refused=0, arrival=_VISIBLE, arrival_ends_at=lease()["arrival_ends_at"])
        added: list[tuple[int, NewItem]] = []
        sender = _sender(batch, charged_key_id, client)

        def insert(part: slice, transaction: Transaction) -> list[tuple[int, NewItem]]:
            items = replacing_items(transaction, new[part])
            if not items:
                return []
            usage = count_accepted(transaction, sender, accepted=len(items), size_bytes=input_bytes(items))
            values = lease()
            transaction.execute(f"INSERT INTO {insert_sql('batches', row)} ON CONFLICT (id) DO NOTHING", row)
            if not transaction.execute(_GROW, {**values, "count": len(items)}).rowcount:
                raise BatchStopped()
            inserted = insert_requests(transaction, items, usage=usage)
            return list(zip((one.number for one in inserted), items, strict=True))

        stopped_by: MlgError | None = None
        try:
            for some in self._database.write_each(_in_parts(insert, len(new))):
                added += some
        except (QuotaReached, BatchStopped) as error:
            stopped_by = error
        finally:
            if added:
                self._arrive(batch, added)
        return len(added), stopped_by

    def _arrive(self, batch: BatchRecord, added: Sequence[tuple[int, NewItem]]) -> dict[int, RequestRecord]:
        """Give the requests of a visible batch their earlier answers, then let the others be claimed.

        :return: those that were answered, by number.
        """
        answered: dict[int, RequestRecord] = {}
        try:
            # Reading needs no write lock, and most batches have no earlier answers.
            with self._database.read() as connection:
                known = [(number, item) for number, item in added if find_answer(connection, item) is not None]

            def answer(part: slice, transaction: Transaction) -> list[RequestRecord]:
                return answer_known(transaction, known[part], now=batch.created_at)

            for found in self._database.write_each(_in_parts(answer, len(known))):
                answered |= {record.number: record for record in found}
            self._database.execute(_ARRIVE, (batch.id,))
        except StoreError as error:
            # It is accepted; what has no earlier answer yet is claimed after a while.
            log.warning("cannot answer a batch with earlier answers: %s", error, extra={"batch": batch.id})
        return answered

    def _abandon_after_error(self, id: str) -> None:
        try:
            self._delete_abandoned(id, "9999")
        except StoreError as error:
            log.warning("cannot delete what was added of a batch, the next purge will: %s", error, extra={"batch": id})

    def _delete_abandoned(self, id: str, now: str) -> None:
        """Delete what was added of a hidden batch whose lease has ended by a time, as text."""
        values = {"id": id, "now": now}
        self._database.execute(_ABANDON, values)

        def write(transaction: Transaction, rows: int) -> int:
            if transaction.execute(_IS_ABANDONED, values).fetchone() is None:
                return 0
            removed = len(delete_requests(transaction, _SOME_HIDDEN_ITEMS, {"id": id, "rows_per_commit": rows}))
            transaction.execute("UPDATE batches SET arrived = arrived - ? WHERE id = ?", (removed, id))
            return removed

        if self._database.row(_IS_ABANDONED, values) is not None:
            self._database.write_in_steps(write, rows_per_commit=ROWS_PER_COMMIT)
            self.delete_empty(id)

    def finish_interrupted(self, *, now: datetime) -> None:
        """Delete the hidden batches that killed processes left, and release visible ones."""
        for row in self._database.rows(_INTERRUPTED, (to_text(now),)):
            if row["arrival"] == _VISIBLE:
                self._database.execute(_ARRIVE, (row["id"],))
            else:
                self._delete_abandoned(row["id"], to_text(now))

    def delete_empty(self, id: str) -> None:
        """Delete a batch that has no requests any more, its refused items, and what webhooks say of it."""
        self._database.execute_in_steps(_DELETE_REFUSALS, {"id": id}, rows_per_commit=ROWS_PER_COMMIT)

        def write(transaction: Transaction) -> None:
            if transaction.execute(_DELETE_EMPTY, {"id": id}).rowcount:
                for statement in FORGET:
                    transaction.execute(statement, (id,))

        self._database.write(write)

    def get(self, id: str) -> BatchRecord:
        """Read one batch. :raises UnknownBatch:"""
        row = self._database.row(_GET, (id,))
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
                amount, shares = Decimal(row["cost"]), row["shares"].split(",")
                if len(shares) == row["answers"]:
                    costs.append(amount)
                else:
                    costs += [equal_share(amount, row["answers"], int(share)) for share in shares]
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
        :param limit: of pipelines never more than ten, as each has all of its steps.
        :return: (number of the end, request).
        """
        with self._database.read() as connection:
            rows = connection.execute(_RESULTS, {"id": id, "after": after, "limit": limit}).fetchall()
            if rows and rows[0]["service"] == PIPELINE:
                rows = rows[:_PIPELINES_PER_READ]
            return list(zip((row["ended_number"] for row in rows), read_requests(connection, rows), strict=True))

    def items(self, id: str, *, after: int = 0, limit: int = 200, with_steps: bool = False) -> list[RequestRecord]:
        """List the requests of a batch in the order in which they were sent.

        :param after: only higher numbers.
        :param with_steps: those to pipelines have their steps, which may be more than a thousand for each.
        """
        with self._database.read() as connection:
            rows = connection.execute(_ITEMS, {"id": id, "after": after, "limit": limit}).fetchall()
            return read_requests(connection, rows, with_steps=with_steps)

    def last_unfinished(self, id: str, progress: BatchProgress) -> RequestRecord | None:
        """Read the last request of a batch that is queued, else the last that is claimed; None when all have ended."""
        if progress.last_number is None:
            return None
        found = self.items(id, after=progress.last_number - 1, limit=1, with_steps=True)
        return found[0] if found else None

    def cancel(self, id: str, *, now: datetime) -> int:
        """Cancel the queued requests of a batch. :return: how many. :raises UnknownBatch:"""
        return self._change_items(
            id,
            "coalesce(cancelled_at, :now)",
            RequestState.CANCELLED,
            which="state = 'queued'",
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
            "NULL",
            RequestState.QUEUED,
            which="state = 'failed' AND image_deleted_at IS NULL",
            columns=RESET,
            now=now,
        )

    def _change_items(
        self, id: str, cancelled_at: str, to: RequestState, *, which: str, columns: str, now: datetime
    ) -> int:
        change_batch = f"UPDATE batches SET cancelled_at = {cancelled_at} WHERE id = :id AND {_IS_SHOWN}"
        where = _SOME_TO_CHANGE.format(which=which)
        values = {"id": id, "now": to_text(now), "after": 0}
        runs: builtins.list[str] = []

        def write(transaction: Transaction, rows: int) -> int:
            values["rows_per_commit"] = rows
            if not transaction.execute(change_batch, values).rowcount:
                raise UnknownBatch()
            changed = transition(transaction, to, where, [values], columns=columns, now=now)
            values["after"] = max((row["number"] for row in changed), default=0)
            runs.extend(row["id"] for row in changed if row["service"] == PIPELINE)
            return len(changed)

        count = self._database.write_in_steps(write, rows_per_commit=ROWS_PER_COMMIT)
        settle_children(self._database, runs, now=now)
        return count

    def remove(self, id: str) -> int:
        """Delete a batch with its requests and images.

        :return: how many requests.
        :raises UnknownBatch:
        :raises BatchInProgress: nothing was deleted, unless some were queued again meanwhile.
        """

        #: Id and end of requests to pipelines.
        runs: builtins.list[tuple[str, str]] = []

        def write(transaction: Transaction, rows: int) -> int:
            batch = transaction.execute(_GET, (id,)).fetchone()
            if batch is None:
                raise UnknownBatch()
            if batch["arrival"] or transaction.execute(_IS_IN_PROGRESS, {"id": id}).fetchone()[0]:
                raise BatchInProgress()
            some = delete_requests(transaction, _SOME_ENDED_ITEMS, {"id": id, "rows_per_commit": rows})
            runs.extend((row["id"], row["finished_at"]) for row in some if row["service"] == PIPELINE)
            return len(some)

        removed = self._database.write_in_steps(write, rows_per_commit=ROWS_PER_COMMIT)
        self.delete_empty(id)
        if runs:
            last = max(finished_at for _, finished_at in runs)
            settle_children(self._database, [id for id, _ in runs], now=from_text(last))
        return removed

    def list(
        self, *, key_id: str | None = None, before: int | None = None, limit: int = 50
    ) -> builtins.list[BatchRecord]:
        """List batches, newest first.

        :param key_id: only those of this key.
        :param before: only lower numbers.
        """
        conditions = [_IS_SHOWN, *(["key_id = :key_id"] if key_id is not None else [])]
        conditions += ["number < :before"] if before is not None else []
        return self._database.records(
            BatchRecord,
            f"SELECT * FROM batches WHERE {' AND '.join(conditions)} ORDER BY number DESC LIMIT :limit",
            {"key_id": key_id, "before": before, "limit": limit},
        )

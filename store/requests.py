"""Requests: adding, claiming, answering, failing, releasing, cancelling, retrying, reading and deleting one.

Every statement that depends on a request's state is named SQL text in this file, save those about whole batches
(`batches.py`) and those that delete old requests (`retention.py`). The server adds and reads; the batcher claims,
renews, finishes, fails and releases. `store/__init__.py` draws the states and lists the guarantees.
"""

from __future__ import annotations

import builtins
import enum
import json
import sqlite3
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

from store.cost_split import equal_share
from store.database import Database, Transaction
from store.errors import NotCancellable, NotRemovable, NotRetryable, UnknownRequest
from store.files import NewFile, StoredFile, digests_of_files, files_from_text, files_to_text
from store.images import ImageStore, StagedImage, delete_unneeded_images
from store.keys import count_images
from store.rows import from_optional_text, from_text, to_text
from store.states import EXPIRED, RequestState

#: Maximum number of items in a chunk, by how often an item was in a chunk that failed as a whole. The last is alone.
ISOLATION_STEPS = (16, 4, 1)
#: Requests that one commit deletes or lets expire.
ROWS_PER_COMMIT = 500

#: A request fails after this many failures that it is to blame for.
MAX_ATTEMPTS = 3

_FIND_ANSWER = """
    SELECT output, files, digest, provider, seconds, chunk_id FROM requests
    WHERE image_sha256 = :image_sha256 AND model = :model AND service = :service AND params = :params
      AND inputs = :inputs AND digest = :digest AND state = 'done'
    LIMIT 1
"""

_ADD = """
    INSERT INTO requests (id, service, model, params, name, image_sha256, image_bytes, state, is_fresh, is_cached,
                          created_at, due_at, finished_at, chunk_id, provider, digest, seconds, output, inputs, files,
                          batch_id, client_id, labels, key_id, keep_seconds, deadline_at, webhook)
    VALUES (:id, :service, :model, :params, :name, :image_sha256, :image_bytes, :state, :is_fresh, :is_cached,
            :created_at, :created_at, :finished_at, :chunk_id, :provider, :digest, :seconds, :output, :inputs, :files,
            :batch_id, :client_id, :labels, :key_id, :keep_seconds, :deadline_at, :webhook)
    RETURNING *
"""

_ADD_FILE = "INSERT OR IGNORE INTO request_files (number, is_input, sha256) VALUES (?, ?, ?)"

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
    RETURNING number, id, token, service, model, params, image_sha256, image_bytes, inputs, attempts, isolation,
              created_at
"""

_RENEW = """
    UPDATE requests SET lease_ends_at = :lease_ends_at WHERE number = :number AND token = :token AND state = 'claimed'
"""

_FINISH = """
    UPDATE requests
    SET state = 'done', lease_ends_at = NULL, finished_at = :now, chunk_id = :chunk_id, provider = :provider,
        digest = :digest, seconds = :seconds, output = :output, files = :files, share = :share,
        code = NULL, reason = NULL
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

_HAS_EXPIRED = "SELECT 1 FROM requests WHERE state = 'claimed' AND lease_ends_at <= ? LIMIT 1"

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

_IS_OVERDUE = "SELECT 1 FROM requests WHERE state = 'queued' AND deadline_at IS NOT NULL AND deadline_at <= ? LIMIT 1"

_EXPIRE = f"""
    UPDATE requests
    SET state = 'cancelled', finished_at = :now, code = '{EXPIRED}',
        reason = 'Its deadline passed before it was claimed.'
    WHERE number IN (SELECT number FROM requests
                     WHERE state = 'queued' AND deadline_at IS NOT NULL AND deadline_at <= :now LIMIT :rows_per_commit)
"""

_BACKLOG = """
    SELECT model, min(service) AS service, count(*) AS waiting, 0 AS claimed, min(number) AS oldest_number
    FROM requests INDEXED BY requests_queued WHERE state = 'queued' GROUP BY model
    UNION ALL
    SELECT model, min(service), 0, count(*), NULL
    FROM requests INDEXED BY requests_claimed WHERE state = 'claimed' GROUP BY model
"""

_COST_OF_CHUNK = "SELECT cost, answers, is_cost_final FROM chunks WHERE id = ?"


class Blame(enum.Enum):
    """Who is to blame for a claim that ended without an answer."""

    #: Nobody: the batcher is stopping, the executor refused. Nothing is counted.
    NOBODY = "nobody"
    #: The chunk: it failed as a whole, so each item is suspected and is sent in a smaller chunk next time.
    CHUNK = "chunk"
    #: The item: counted as an attempt; after the last one the request fails.
    ITEM = "item"


@dataclass(frozen=True, kw_only=True)
class NewRequest:
    """A request that is about to be added."""

    #: Unguessable and unique; see `store.new_id`.
    id: str
    #: The kind of service, for example "classification".
    service: str
    #: The model's canonical name.
    model: str
    #: Options of the service, already checked by it.
    params: Mapping[str, Any] = field(default_factory=dict)
    #: The client's own file name, cleaned; only shown, never used as a path.
    name: str | None = None
    #: Digest of the installed artefact. An earlier answer of the same artefact for the same bytes is reused.
    digest: str | None = None
    #: True when the client wants a new answer even if there is an earlier one.
    is_fresh: bool = False
    #: The batch it belongs to.
    batch_id: str | None = None
    #: The client's own id, unique in its batch.
    client_id: str | None = None
    #: The client's labels.
    labels: Mapping[str, str] = field(default_factory=dict)
    #: The API key it was sent with; None where none is required.
    key_id: str | None = None
    #: Seconds that it is kept after its end; None leaves that to the operator.
    keep_seconds: float | None = None
    #: If it is still queued then, it expires.
    deadline_at: datetime | None = None
    #: URL that is notified when the request is done.
    webhook: str | None = None
    #: When it was accepted.
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """One request as it is stored."""

    #: Counts up in the order of arrival; the queue's order.
    number: int
    #: The id that the client knows.
    id: str
    #: The kind of service.
    service: str
    #: The model's canonical name.
    model: str
    #: Options of the service.
    params: Mapping[str, Any]
    #: The client's file name; only shown.
    name: str | None
    #: Sha256 of the image's bytes, lower-case hex.
    image_sha256: str
    #: Size of the image.
    image_bytes: int
    #: Its state.
    state: RequestState
    #: Failures so far that the item itself was blamed for.
    attempts: int
    #: Index into ISOLATION_STEPS.
    isolation: int
    #: When it was accepted.
    created_at: datetime
    #: Not claimed before this time.
    due_at: datetime
    #: When the current or last claim was made.
    claimed_at: datetime | None
    #: When the current claim ends unless it is renewed.
    lease_ends_at: datetime | None
    #: When it reached a final state.
    finished_at: datetime | None
    #: The chunk that answered it.
    chunk_id: str | None
    #: The service's answer.
    output: Any
    #: Digest of the artefact that answered.
    digest: str | None
    #: The worker or provider that answered.
    provider: str | None
    #: Seconds that the model spent on it.
    seconds: float | None
    #: True when the answer was taken from an earlier equal request.
    is_cached: bool
    #: Code of its failure, or of the last attempt's.
    code: str | None
    #: Message of that failure.
    reason: str | None
    #: When retention deleted the inputs; None while they are kept.
    image_deleted_at: datetime | None
    #: Its inputs beside the image, and the files of its answer, by name.
    inputs: Mapping[str, StoredFile] = field(default_factory=dict)
    files: Mapping[str, StoredFile] = field(default_factory=dict)
    #: The batch it belongs to.
    batch_id: str | None = None
    #: The client's own id, unique in its batch.
    client_id: str | None = None
    #: The client's labels.
    labels: Mapping[str, str] = field(default_factory=dict)
    #: The API key it was sent with; None where none is required.
    key_id: str | None = None
    #: Seconds that it is kept after its end; None leaves that to the operator.
    keep_seconds: float | None = None
    #: If it is still queued then, it expires.
    deadline_at: datetime | None = None
    #: Its share of its chunk's cost, in GLM; None where nothing is paid, and for a reused answer.
    cost: Decimal | None = None
    #: False while the cost is an estimate.
    is_cost_final: bool = False

    @property
    def status(self) -> str:
        """The state as clients see it: "expired" where the deadline ended the request."""
        return "expired" if self.state is RequestState.CANCELLED and self.code == "expired" else str(self.state)

    @classmethod
    def from_row(
        cls, row: Mapping[str, Any], *, cost: Decimal | None = None, is_cost_final: bool = False
    ) -> RequestRecord:
        """Build the record from a row of the table `requests` and its share of its chunk's cost."""
        return cls(
            number=row["number"],
            id=row["id"],
            service=row["service"],
            model=row["model"],
            params=json.loads(row["params"]),
            name=row["name"],
            image_sha256=row["image_sha256"],
            image_bytes=row["image_bytes"],
            state=RequestState(row["state"]),
            attempts=row["attempts"],
            isolation=row["isolation"],
            created_at=from_text(row["created_at"]),
            due_at=from_text(row["due_at"]),
            claimed_at=from_optional_text(row["claimed_at"]),
            lease_ends_at=from_optional_text(row["lease_ends_at"]),
            finished_at=from_optional_text(row["finished_at"]),
            chunk_id=row["chunk_id"],
            output=None if row["output"] is None else json.loads(row["output"]),
            digest=row["digest"],
            provider=row["provider"],
            seconds=row["seconds"],
            is_cached=bool(row["is_cached"]),
            code=row["code"],
            reason=row["reason"],
            image_deleted_at=from_optional_text(row["image_deleted_at"]),
            inputs=files_from_text(row["inputs"]),
            files=files_from_text(row["files"]),
            batch_id=row["batch_id"],
            client_id=row["client_id"],
            labels=json.loads(row["labels"]),
            key_id=row["key_id"],
            keep_seconds=row["keep_seconds"],
            deadline_at=from_optional_text(row["deadline_at"]),
            cost=cost,
            is_cost_final=is_cost_final,
        )


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A batcher's claim on one request: what it needs to dispatch it, and the token that proves the claim."""

    #: The request's number, its position in the queue.
    number: int
    #: The request's id; never sent to a provider.
    id: str
    #: Fencing token: counts up with every claim of this request; results under an older one are dropped.
    token: int
    #: The kind of service.
    service: str
    #: The model's canonical name.
    model: str
    #: Options of the service.
    params: Mapping[str, Any]
    #: Sha256 of the image.
    image_sha256: str
    #: Size of the image.
    image_bytes: int
    #: Failures so far that the item itself was blamed for.
    attempts: int
    #: Index into ISOLATION_STEPS.
    isolation: int
    #: When it was accepted.
    created_at: datetime
    #: Its inputs beside the image, by name.
    inputs: Mapping[str, StoredFile] = field(default_factory=dict)

    @property
    def input_bytes(self) -> int:
        """Size of all inputs."""
        return self.image_bytes + sum(one.size_bytes for one in self.inputs.values())

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Claim:
        """Build the record from a row returned by the claiming statement."""
        return cls(
            number=row["number"],
            id=row["id"],
            token=row["token"],
            service=row["service"],
            model=row["model"],
            params=json.loads(row["params"]),
            image_sha256=row["image_sha256"],
            image_bytes=row["image_bytes"],
            attempts=row["attempts"],
            isolation=row["isolation"],
            created_at=from_text(row["created_at"]),
            inputs=files_from_text(row["inputs"]),
        )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A checked result for one claim."""

    #: The claim under which the answer was made.
    claim: Claim
    #: The service's output, JSON.
    output: Any
    #: Digest of the artefact that made it.
    digest: str
    #: The chunk.
    chunk_id: str
    #: The worker or provider that made it.
    provider: str
    #: Seconds that the model spent.
    seconds: float
    #: The files of the answer, by name.
    files: Mapping[str, NewFile] = field(default_factory=dict)


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


def _created_at(connection: sqlite3.Connection, number: int | None) -> datetime | None:
    row = connection.execute("SELECT created_at FROM requests WHERE number = ?", (number,)).fetchone()
    return None if row is None else from_text(row[0])


def read_requests(connection: sqlite3.Connection, rows: Iterable[Any]) -> list[RequestRecord]:
    """Build request records, each with its share of its chunk's cost."""
    chunks: dict[str, Any] = {}
    requests = []
    for row in rows:
        share, chunk_id = row["share"], row["chunk_id"]
        if share is not None and chunk_id not in chunks:
            chunks[chunk_id] = connection.execute(_COST_OF_CHUNK, (chunk_id,)).fetchone()
        cost, answers, is_final = chunks.get(chunk_id) or (None, 0, 0)
        if share is None or cost is None:
            requests.append(RequestRecord.from_row(row))
        else:
            own_cost = equal_share(Decimal(cost), answers, share)
            requests.append(RequestRecord.from_row(row, cost=own_cost, is_cost_final=bool(is_final)))
    return requests


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
        "inputs": files_to_text(
            {
                name: StoredFile(sha256=one.sha256, size_bytes=one.size, media_type=one.media_type)
                for name, one in staged.others.items()
            }
        ),
        "files": "{}",
        "batch_id": new.batch_id,
        "client_id": new.client_id,
        "labels": json.dumps(dict(new.labels), sort_keys=True, ensure_ascii=False),
        "key_id": new.key_id,
        "keep_seconds": new.keep_seconds,
        "deadline_at": None if new.deadline_at is None else to_text(new.deadline_at),
        "webhook": new.webhook,
    }


def insert_request(
    transaction: Transaction, new: NewRequest, staged: StagedImage, row: dict[str, Any]
) -> RequestRecord:
    """Publish the inputs and insert the row; call it inside a write. Reuses an earlier answer for equal inputs."""
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
    transaction.publish(staged)
    # Fetch all rows: an open statement would prevent the release of the savepoint.
    (added,) = transaction.execute(_ADD, values).fetchall()
    request = RequestRecord.from_row(added)
    _refer_to_files(transaction, request.number, request.inputs, is_input=True)
    _refer_to_files(transaction, request.number, request.files, is_input=False)
    return request


def _refer_to_files(transaction: Transaction, number: int, files: Mapping[str, StoredFile], *, is_input: bool) -> None:
    """Record that a request refers to files, which are kept as long as its row."""
    for one in files.values():
        transaction.execute(_ADD_FILE, (number, is_input, one.sha256))


class Requests:
    """The table `requests` and the images it refers to."""

    def __init__(self, database: Database, images: ImageStore) -> None:
        self._database = database
        self._images = images

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
            return insert_request(transaction, new, staged, row)

        try:
            return self._database.write(write, has_savepoint=new.key_id is not None)
        except BaseException:
            self._images.discard(staged)
            raise

    def get(self, id: str) -> RequestRecord:
        """Read one request. :raises UnknownRequest:"""
        with self._database.read() as connection:
            found = read_requests(connection, connection.execute(_GET, (id,)).fetchall())
        if not found:
            raise UnknownRequest()
        return found[0]

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
        if self._database.row(_QUEUED_MODELS) is None:
            return []
        return self._database.write(write)

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

        return self._database.write(write) if claim_list else set()

    def finish(self, answers: Sequence[Answer], *, now: datetime) -> int:
        """Record answers and their files, all or none, in one commit. :return: how many claims were still valid."""
        staged: dict[NewFile, StagedImage] = {}
        try:
            for one in {one for answer in answers for one in answer.files.values()}:
                staged[one] = self._images.stage(one.data)
            return self._record(answers, staged, now)
        finally:
            for each in staged.values():
                self._images.discard(each)

    def _record(self, answers: Sequence[Answer], staged: Mapping[NewFile, StagedImage], now: datetime) -> int:
        files = [
            {
                name: StoredFile(sha256=staged[one].sha256, size_bytes=len(one.data), media_type=one.media_type)
                for name, one in answer.files.items()
            }
            for answer in answers
        ]
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
                "files": files_to_text(stored),
            }
            for answer, stored in zip(answers, files, strict=True)
        ]

        def write(transaction: Transaction) -> int:
            #: chunk -> how many requests it has answered; a chunk whose start was not recorded has no row and no cost.
            counts: dict[str, int] = {}
            for chunk_id in {answer.chunk_id for answer in answers}:
                known = transaction.execute(_ANSWERS_OF_CHUNK, (chunk_id,)).fetchone()
                if known is not None:
                    counts[chunk_id] = known[0]
            recorded = 0
            published: set[NewFile] = set()
            for row, answer, stored in zip(rows, answers, files, strict=True):
                share = counts.get(row["chunk_id"])
                if transaction.execute(_FINISH, {**row, "share": share}).rowcount:
                    recorded += 1
                    for one in set(answer.files.values()) - published:
                        transaction.publish(staged[one])
                        published.add(one)
                    _refer_to_files(transaction, row["number"], stored, is_input=False)
                    if share is not None:
                        counts[row["chunk_id"]] = share + 1
            for chunk_id, count in counts.items():
                transaction.execute(_SET_ANSWERS_OF_CHUNK, (count, chunk_id))
            return recorded

        return self._database.write(write) if rows else 0

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
        if self._database.row(_HAS_EXPIRED, (to_text(now),)) is None:
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

    def remove(self, id: str) -> None:
        """Delete a request that has ended, and those of its files that no other request needs.

        :raises UnknownRequest:
        :raises NotRemovable:
        """

        def write(transaction: Transaction) -> None:
            removed = transaction.execute(
                "DELETE FROM requests WHERE id = ? AND finished_at IS NOT NULL RETURNING image_sha256, inputs, files",
                (id,),
            ).fetchall()
            if not removed:
                if transaction.execute("SELECT 1 FROM requests WHERE id = ?", (id,)).fetchone() is None:
                    raise UnknownRequest()
                raise NotRemovable()
            delete_unneeded_images(transaction.connection, self._images, digests_of_files(removed[0]))

        self._database.write(write)

    def expire(self, now: datetime) -> int:
        """Cancel every queued request whose deadline has passed; claimed ones are finished. :return: how many."""
        moment = to_text(now)
        # Reading needs no write lock, and most calls find nothing.
        if self._database.row(_IS_OVERDUE, (moment,)) is None:
            return 0
        return self._database.execute_in_steps(_EXPIRE, {"now": moment}, rows_per_commit=ROWS_PER_COMMIT)

    def backlog(self) -> list[ModelBacklog]:
        """Count the queued and the claimed requests by model."""
        with self._database.read() as connection:
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
        with self._database.read() as connection:
            rows = connection.execute(
                f"SELECT * FROM requests WHERE {where} ORDER BY number DESC LIMIT :limit",
                {"model": model, "before": before, "limit": limit},
            ).fetchall()
            return read_requests(connection, rows)

    def _write_each(self, sql: str, rows: Sequence[dict[str, Any]]) -> int:
        """Run a statement once for each row in one commit. :return: how many rows of the table changed."""
        if not rows:
            return 0
        return self._database.write(lambda transaction: sum(transaction.execute(sql, row).rowcount for row in rows))

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

        return self._database.write(write)

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
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from provider_image.errors import MlgError
from store.amounts import equal_share
from store.clients.usage import ClientKind, Sender, add_shares, count_accepted
from store.collections.members import NewMember, add_members, remove_members_of
from store.database import Database, Transaction
from store.errors import NotCancellable, NotRemovable, NotRetryable, UnknownRequest
from store.files import NewFile, StoredFile, digests_of_files, files_from_text, files_to_text
from store.images import ImageStore, StagedImage
from store.pipelines.definition import PIPELINE
from store.pipelines.runs import CHILDREN, REMOVE_ALL, REMOVE_OTHERS, PipelineRun, add_runs, build_runs, note_removals
from store.processes.progress import ProgressRecord, read_progress
from store.rows import from_row, from_text, insert_sql, mapping_to_text, to_row, to_text
from store.states import EXPIRED, RequestState
from store.transition import correct_open, count_open, count_pipelines, transition

#: Maximum number of items in a chunk, by how often an item was in a chunk that failed as a whole. The last is alone.
ISOLATION_STEPS = (16, 4, 1)
#: Requests that one commit of many adds, changes or deletes: each changes a page of every index.
ROWS_PER_COMMIT = 50
#: Requests to pipelines whose steps are settled together: each may have some hundreds.
_PARENTS_AT_ONCE = 20

#: No lease is as long as this, also for who read the clock a minute before it was made.
MAX_LEASE_SECONDS = 120.0
#: A request fails after this many failures that it is to blame for.
MAX_ATTEMPTS = 3

#: Batches whose requests nobody sees yet, see `batches.py`. The first condition selects the index.
HIDDEN_BATCHES = "SELECT id FROM batches WHERE arrival > 0 AND arrival != 2"
IS_VISIBLE = f"coalesce(batch_id, '') NOT IN ({HIDDEN_BATCHES})"

# Of a visible batch the earlier answers are given before the rest is claimed. A request to a pipeline is never claimed,
# also if a model of the same name is installed later.
_IS_CLAIMABLE = f"""
    state = 'queued' AND model = :model AND due_at <= :now AND service != '{PIPELINE}'
    AND coalesce(batch_id, '') NOT IN (
        SELECT id FROM batches WHERE arrival > 0 AND (arrival != 2 OR arrival_ends_at > :now))
"""

_FIND_ANSWER = """
    SELECT output, files, digest, provider, seconds, chunk_id FROM requests INDEXED BY requests_answer
    WHERE image_sha256 = :image_sha256 AND model = :model AND service = :service AND params = :params
      AND inputs = :inputs AND digest = :digest AND state = 'done'
"""

_FIND_OWN_ANSWER = f"{_FIND_ANSWER} AND key_id IS :key_id"

_ADDED = "SELECT * FROM requests WHERE number BETWEEN ? AND ? ORDER BY number"

#: What is kept elsewhere of a request or a batch that is deleted: a webhook that is sent again then says only that it
#: has ended, and its idempotency key is free.
FORGET = (
    "UPDATE webhook_deliveries SET payload = NULL WHERE subject = ? AND payload IS NOT NULL",
    "DELETE FROM idempotency WHERE subject = ?",
)

_ADD_FILE = "INSERT OR IGNORE INTO request_files (number, is_input, sha256) VALUES (?, ?, ?)"

_ADD_LABELS = """
    INSERT INTO request_labels (name, value, number, key_id) SELECT key, value, ?, ? FROM json_each(?)
"""

_REMOVE_LABELS = """
    DELETE FROM request_labels WHERE (name, value, number) IN (SELECT key, value, ? FROM json_each(?))
"""

_GET = "SELECT * FROM requests WHERE id = ?"

_FIRST_QUEUED = "SELECT min(model) FROM requests WHERE state = 'queued'"

# A skip scan: one step of the index per model, however many requests wait.
_QUEUED = f"""
    WITH RECURSIVE queued (model) AS (
        {_FIRST_QUEUED}
        UNION ALL
        SELECT ({_FIRST_QUEUED} AND model > queued.model)
        FROM queued WHERE queued.model IS NOT NULL
    )
"""

# INDEXED BY: without statistics SQLite may choose another index that begins with the model, and then reads every
# answered request of the model too. A step of a pipeline is due by the age of the pipeline's request.
_OLDEST_DUE = f"""
    {_QUEUED}
    SELECT model, (
        SELECT min(created_at, due_at) FROM requests WHERE number = (
            SELECT number FROM requests INDEXED BY requests_queued
            WHERE {_IS_CLAIMABLE.replace(":model", "queued.model")} ORDER BY number LIMIT 1)
    ) AS oldest FROM queued WHERE model IN (SELECT value FROM json_each(:models))
"""

_HAS_REQUEUED = """
    SELECT EXISTS (SELECT 1 FROM requests
                   WHERE state = 'queued' AND claimed_at IS NOT NULL AND model = :model AND due_at <= :now)
"""

_COUNT_DUE = f"""
    SELECT count(*) FROM (SELECT 1 FROM requests INDEXED BY requests_queued WHERE {_IS_CLAIMABLE} LIMIT :limit)
"""

_NEXT_DUE = f"""
    number IN (SELECT number FROM requests INDEXED BY requests_queued
               WHERE {_IS_CLAIMABLE} ORDER BY number LIMIT :count)
"""

# The first IN finds the rows, the second compares the tokens.
_ARE_VALID = """
    number IN (SELECT json_extract(value, '$[0]') FROM json_each(:claims))
    AND (number, token) IN (SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]') FROM json_each(:claims))
    AND state = 'claimed'
"""

_VALID = f"SELECT number FROM requests WHERE {_ARE_VALID}"

_RENEW = f"UPDATE requests SET lease_ends_at = :lease_ends_at WHERE {_ARE_VALID} RETURNING number"

_ANSWER = """
    chunk_id = :chunk_id, provider = :provider, digest = :digest, seconds = :seconds, output = :output, files = :files,
    share = :share, code = NULL, reason = NULL
"""

_KNOWN_ANSWER = """
    output = :output, files = :files, digest = :digest, provider = :provider, seconds = :seconds, chunk_id = :chunk_id,
    is_cached = 1
"""

_ANSWERS_OF_CHUNK = "SELECT answers FROM chunks WHERE id = ?"

_SET_ANSWERS_OF_CHUNK = "UPDATE chunks SET answers = ? WHERE id = ?"

# The last isolation step is "alone": a chunk that fails then has only this item to blame.
_IS_TO_BLAME = "(:blame = 'item' OR (:blame = 'chunk' AND isolation >= :alone))"

_COUNT_FAILURE = f"""
    code = :code, reason = :reason, due_at = :due_at, attempts = attempts + {_IS_TO_BLAME},
    isolation = CASE WHEN :blame = 'chunk' THEN min(isolation + 1, :alone) ELSE isolation END
"""

# No lease is longer than the second bound, unless the clock of leases has lost time since.
_HAS_LEASE_ENDED = """
    number IN (SELECT number FROM requests WHERE state = 'claimed' AND lease_ends_at <= :lease_now
               UNION ALL
               SELECT number FROM requests WHERE state = 'claimed' AND lease_ends_at > :longest_lease
               LIMIT :rows_per_commit)
"""

#: Of a request that is retried.
RESET = """
    attempts = 0, due_at = :now, deadline_at = CASE WHEN deadline_at <= :now THEN NULL ELSE deadline_at END
"""

_RESET_ONE = f"""
    {RESET}, code = CASE WHEN code = '{EXPIRED}' THEN NULL ELSE code END,
    reason = CASE WHEN code = '{EXPIRED}' THEN NULL ELSE reason END
"""

# A request to a pipeline of which a step is answered or under way ends with what it has, when its steps have expired.
_IS_OVERDUE = f"""
    state = 'queued' AND deadline_at IS NOT NULL AND deadline_at <= :now AND {IS_VISIBLE}
    AND NOT (service = '{PIPELINE}' AND EXISTS (
        SELECT 1 FROM requests AS steps INDEXED BY requests_parent
        WHERE steps.parent = requests.id AND steps.state IN ('claimed', 'done')))
"""

# Claimed requests are as many as the batchers have taken, and those of hidden batches are subtracted; so nothing here
# looks at each request that is queued.
_BACKLOG = """
    WITH claimed AS (
        SELECT model, min(service) AS service, count(*) AS count, count(parent) AS steps
        FROM requests INDEXED BY requests_claimed WHERE state = 'claimed' GROUP BY model
    ), hidden AS (
        SELECT model, sum(arrived) AS count FROM batches WHERE arrival > 0 AND arrival != 2 GROUP BY model
    )
    SELECT * FROM (
        SELECT open_requests.model AS model, coalesce(oldest.service, claimed.service) AS service,
               open_requests.count - coalesce(claimed.count, 0) - coalesce(hidden.count, 0) AS waiting,
               open_requests.steps - coalesce(claimed.steps, 0) AS waiting_steps,
               coalesce(claimed.count, 0) AS claimed, oldest.number AS oldest_number, oldest.created_at AS oldest_at
        FROM open_requests
        LEFT JOIN claimed ON claimed.model = open_requests.model
        LEFT JOIN hidden ON hidden.model = open_requests.model
        LEFT JOIN requests AS oldest ON oldest.number = (
            SELECT min(number) FROM requests INDEXED BY requests_queued
            WHERE state = 'queued' AND model = open_requests.model)
        WHERE open_requests.count > 0
    ) WHERE waiting > 0 OR claimed > 0 ORDER BY model
"""

_REPLACEMENTS = """
    SELECT number, replaces, id, model FROM requests INDEXED BY requests_replaces
    WHERE replaces IN (SELECT value FROM json_each(?)) AND state = 'done'
"""

_REPLACED_BY_MODEL = """
    SELECT replaces FROM requests INDEXED BY requests_replaces
    WHERE replaces IN (SELECT value FROM json_each(:ids)) AND model = :model
"""

# The others would break a unique index.
_REPLACEABLE = f"""
    SELECT id, image_sha256, image_bytes, inputs FROM requests
    WHERE id IN (SELECT value FROM json_each(:ids)) AND state = 'done' AND image_deleted_at IS NULL
      AND id NOT IN ({_REPLACED_BY_MODEL})
"""

# Their parents have ended or were deleted.
_ENDED_RUNS = """
    SELECT id, changed FROM pipeline_runs
    WHERE id IN (SELECT value FROM json_each(:parents)) AND removed >= :least
      AND NOT EXISTS (SELECT 1 FROM requests WHERE requests.id = pipeline_runs.id AND state = 'queued')
"""

_SOME_CHILDREN = """
    number IN (SELECT number FROM requests INDEXED BY requests_parent
               WHERE parent = :parent AND {which} LIMIT :rows_per_commit)
"""

_SOME_ENDED_CHILDREN = f"""
    number IN (SELECT number FROM requests INDEXED BY requests_parent
               WHERE parent IN ({_ENDED_RUNS.replace("id, changed", "id")}) AND {{which}} LIMIT :rows_per_commit)
"""

_DELETE_RUNS = """
    DELETE FROM pipeline_runs WHERE id IN (SELECT value FROM json_each(:parents)) AND removed > 0
      AND NOT EXISTS (SELECT 1 FROM requests WHERE parent = pipeline_runs.id)
"""

_SET_SETTLED = """
    UPDATE pipeline_runs SET advanced = :changed
    WHERE id = :parent AND NOT EXISTS (SELECT 1 FROM requests WHERE id = :parent AND state = 'queued')
"""

_DELETED = "id, number, service, model, parent, finished_at, keep_seconds, labels, image_sha256, inputs, files"

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
class SubmissionFacts:
    """What a client says of a request, or of all requests of a batch; it does not change."""

    #: Unguessable and unique; see `store.new_id`.
    id: str
    #: The kind of service, for example "classification".
    service: str
    #: The model's canonical name.
    model: str
    #: Options of the service, already checked by it.
    params: Mapping[str, Any] = field(default_factory=dict)
    #: The client's own name of the file or the batch, cleaned; only shown, never used as a path.
    name: str | None = None
    #: The client's labels.
    labels: Mapping[str, str] = field(default_factory=dict)
    #: The API key it was sent with; None where none is required.
    key_id: str | None = None
    #: Seconds that it is kept after its end; None leaves that to the operator.
    keep_seconds: float | None = None
    #: If it is still queued then, it expires.
    deadline_at: datetime | None = None
    #: When it was accepted.
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class RequestFacts(SubmissionFacts):
    """What a client says of one request."""

    #: The batch it belongs to.
    batch_id: str | None = None
    #: The client's own id, unique in its batch.
    client_id: str | None = None
    #: Id of the request that it does again with another model. That one may have been deleted since.
    replaces: str | None = None
    #: Of a step of a pipeline: id of the request to the pipeline, name of the step, and the place of its item in the
    #: list, 0 without a list.
    parent: str | None = None
    step: str | None = None
    position: int | None = None


@dataclass(frozen=True, kw_only=True)
class NewRequest(RequestFacts):
    """A request that is about to be added."""

    #: Digest of the installed artefact. An earlier answer of the same artefact for the same bytes and the same key is
    #: reused.
    digest: str | None = None
    #: True when the client wants a new answer even if there is an earlier one.
    is_fresh: bool = False
    #: True when an earlier answer to a request of another key may be reused too.
    shares_answers: bool = False
    #: URL that is notified when the request is done.
    webhook: str | None = None
    #: Number of the collection whose member its image becomes.
    collection: int | None = None
    #: Of a request to a pipeline: the pipeline as text, see `Pipeline.to_text`.
    pipeline: str | None = None
    #: The program that sends it.
    client: ClientKind = ClientKind.OTHER


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """A request that has answered an earlier one again."""

    id: str
    model: str


@dataclass(frozen=True, kw_only=True)
class RequestRecord(RequestFacts):
    """One request as it is stored."""

    #: Counts up in the order of arrival; the queue's order.
    number: int
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
    #: Not claimed before this time.
    due_at: datetime
    #: When the current or last claim was made.
    claimed_at: datetime | None
    #: When the current claim ends unless it is renewed, on the clock of leases.
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
    #: Its share of its chunk's cost, in GLM; None where nothing is paid, and for a reused answer.
    cost: Decimal | None = None
    #: False while the cost is an estimate.
    is_cost_final: bool = False
    #: The latest request that has answered it again; None while there is none.
    replaced_by: Replacement | None = None
    #: What its worker reported last; None if it is not claimed, or nothing was reported.
    progress: ProgressRecord | None = None
    #: Of a request to a pipeline: its steps as far as they are.
    run: PipelineRun | None = None

    @property
    def status(self) -> str:
        """The state as clients see it: "expired" where the deadline ended the request."""
        return "expired" if self.state is RequestState.CANCELLED and self.code == "expired" else str(self.state)


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
    #: Those of them that are steps of pipelines.
    waiting_steps: int
    #: Requests claimed.
    claimed: int
    #: The oldest queued request's number; None if none is queued.
    oldest_number: int | None
    #: When that request was accepted.
    oldest_at: datetime | None

    @property
    def waiting_sent(self) -> int:
        """Requests queued that clients have sent, which limits count. The steps of pipelines are the server's work."""
        return self.waiting - self.waiting_steps


def _take_turns(claimable: Mapping[str, int], limit: int) -> list[str]:
    """Return the model of each claim: a full chunk of every model in turn, in the order of the mapping."""
    left, turns = dict(claimable), list[str]()
    while len(turns) < limit and any(left.values()):
        for model in left:
            count = min(ISOLATION_STEPS[0], left[model], limit - len(turns))
            turns += [model] * count
            left[model] -= count
    return turns


def _refusal(error_type: type[MlgError], rows: Sequence[Any]) -> MlgError:
    """Build the error for a change that a request does not allow. :param rows: of the request, if there is one."""
    if not rows:
        return UnknownRequest()
    parent = rows[0]["parent"]
    return error_type() if parent is None else error_type(f"It is a step of the request {parent}. Change that one.")


def _to_json(claims: Iterable[Claim]) -> str:
    return json.dumps([(claim.number, claim.token) for claim in claims])


def _to_record(row: Any, **others: Any) -> RequestRecord:
    output = row["output"]
    return from_row(RequestRecord, row, output=None if output is None else json.loads(output), **others)


def read_requests(
    connection: sqlite3.Connection, rows: Sequence[Any], *, with_steps: bool = True
) -> list[RequestRecord]:
    """Build request records, each with its share of its chunk's cost, and what has answered it again, and its progress.

    A request to a pipeline has its steps, and costs what they cost.

    :param with_steps: False for lists: steps may be more than a thousand for each.
    """
    chunks: dict[str, Any] = {}
    requests = []
    found = connection.execute(_REPLACEMENTS, (json.dumps([row["id"] for row in rows]),)).fetchall()
    # The latest of each comes last.
    replacements = {
        one["replaces"]: Replacement(id=one["id"], model=one["model"])
        for one in sorted(found, key=lambda one: int(one["number"]))
    }
    progress = read_progress(connection, [row["number"] for row in rows if row["state"] == RequestState.CLAIMED])
    runs = _read_runs(connection, [row["id"] for row in rows if row["service"] == PIPELINE], with_steps=with_steps)
    for row in rows:
        share, chunk_id = row["share"], row["chunk_id"]
        others = {"replaced_by": replacements.get(row["id"]), "progress": progress.get(row["number"])}
        if share is not None and chunk_id not in chunks:
            chunks[chunk_id] = connection.execute(_COST_OF_CHUNK, (chunk_id,)).fetchone()
        cost, answers, is_final = chunks.get(chunk_id) or (None, 0, 0)
        if row["id"] in runs:
            run = runs[row["id"]]
            costs = [(one.cost, one.is_cost_final) for one in run.children.values() if one.cost is not None]
            own_cost = sum((paid for paid, _ in costs), Decimal()) if costs else None
            is_final = bool(costs) and all(is_final for _, is_final in costs)
            requests.append(_to_record(row, run=run, cost=own_cost, is_cost_final=is_final, **others))
        elif share is None or cost is None:
            requests.append(_to_record(row, **others))
        else:
            own_cost = equal_share(Decimal(cost), answers, share)
            requests.append(_to_record(row, cost=own_cost, is_cost_final=bool(is_final), **others))
    return requests


def _read_runs(connection: sqlite3.Connection, parents: Sequence[str], *, with_steps: bool) -> dict[str, PipelineRun]:
    if not parents:
        return {}
    if not with_steps:
        return build_runs(connection, parents, None)
    children = read_requests(connection, connection.execute(CHILDREN, (json.dumps(parents),)).fetchall())
    return build_runs(connection, parents, children)


def request_row(new: NewRequest, staged: StagedImage) -> dict[str, Any]:
    """Return the columns of a request that is about to be added."""
    inputs = {
        name: StoredFile(sha256=one.sha256, size_bytes=one.size, media_type=one.media_type)
        for name, one in staged.others.items()
    }
    return request_row_of(
        new, {"image_sha256": staged.sha256, "image_bytes": staged.size, "inputs": files_to_text(inputs)}
    )


def request_row_of(new: NewRequest, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a request whose inputs are stored. :param inputs: their columns."""
    row = to_row(
        new,
        params=mapping_to_text(new.params, sort_keys=True, separators=(",", ":")),
        labels=mapping_to_text(new.labels, sort_keys=True, ensure_ascii=False),
        **inputs,
        state=str(RequestState.QUEUED),
        digest=None,  # of the answer
    )
    del row["shares_answers"], row["collection"], row["pipeline"], row["client"]  # not stored here
    return {**row, "due_at": row["created_at"]}


#: A request that is about to be added, its image, None if that is stored already, and its columns.
NewItem = tuple[NewRequest, StagedImage | None, dict[str, Any]]


def replacing_items(transaction: Transaction, new: Sequence[NewRequest]) -> list[NewItem]:
    """Return those new requests, all of one model, whose earlier request can still be done again, with its inputs.

    Call it inside the write that inserts them. Then the files stay: nobody deletes what a request refers to.
    """
    values = {"ids": json.dumps([one.replaces for one in new]), "model": new[0].model}
    found = {row["id"]: row for row in transaction.execute(_REPLACEABLE, values).fetchall()}
    items: list[NewItem] = []
    for one in new:
        if one.replaces in found:
            _, *inputs = found[one.replaces]
            columns = dict(zip(("image_sha256", "image_bytes", "inputs"), inputs, strict=True))
            items.append((one, None, request_row_of(one, columns)))
    return items


def input_bytes(items: Iterable[NewItem]) -> int:
    """Add up the sizes of all inputs of new requests."""
    return sum(
        row["image_bytes"] + sum(one.size_bytes for one in files_from_text(row["inputs"]).values())
        for _, _, row in items
    )


def insert_requests(
    transaction: Transaction, items: Sequence[NewItem], *, usage: int | None
) -> builtins.list[RequestRecord]:
    """Publish new inputs and insert their requests as queued; call it inside a write, and then `answer_known`.

    :param items: the columns are those that `request_row` returns.
    :param usage: number of the row that counts them, see `clients/usage.py`; None if none does.
    """
    numbers: list[int] = []
    labels: list[tuple[int, str | None, str]] = []
    files: dict[int, Mapping[str, StoredFile]] = {}
    members: list[NewMember] = []
    for new, staged, row in items:
        if staged is not None:
            transaction.publish(staged)
        columns = {**row, "usage": usage}
        number = transaction.execute(f"INSERT INTO {insert_sql('requests', columns)}", columns).lastrowid
        assert number is not None
        numbers.append(number)
        if row["labels"] != "{}":
            labels.append((number, row["key_id"], row["labels"]))
        files[number] = files_from_text(row["inputs"])
        if new.collection is not None:
            members.append(NewMember(new.collection, number, row["image_sha256"], new.labels))
    count_open(transaction, [row for _, _, row in items])
    transaction.execute_many(_ADD_LABELS, labels)
    add_members(transaction, members)
    pipelines = [(new, number) for (new, _, _), number in zip(items, numbers, strict=True) if new.pipeline is not None]
    add_runs(transaction, [(new.id, number, new.batch_id, str(new.pipeline)) for new, number in pipelines])
    count_pipelines(transaction, (new.model for new, _ in pipelines))
    _refer_to_files(transaction, files, is_input=True)
    # Nobody else writes meanwhile, so the numbers have no gaps.
    return [_to_record(row) for row in transaction.execute(_ADDED, (numbers[0], numbers[-1]))]


def find_answer(connection: sqlite3.Connection, item: NewItem) -> Any:
    """Read an earlier answer of the same artefact to equal inputs; None if there is none, or none may be reused."""
    new, _, row = item
    if new.digest is None or new.is_fresh:
        return None
    find = _FIND_ANSWER if new.shares_answers else _FIND_OWN_ANSWER
    return connection.execute(f"{find} LIMIT 1", {**row, "digest": new.digest}).fetchone()


def answer_known(
    transaction: Transaction, items: Iterable[tuple[int, NewItem]], *, now: datetime
) -> builtins.list[RequestRecord]:
    """Answer those new requests for which there is an earlier answer. :return: these.

    :param items: number of the request, and what was added.
    """
    found = [(number, find_answer(transaction.connection, item)) for number, item in items]
    known = [{**dict(earlier), "number": number} for number, earlier in found if earlier is not None]
    if not known:  # as nearly always
        return []
    changed = transition(transaction, RequestState.DONE, "number = :number", known, columns=_KNOWN_ANSWER, now=now)
    done = {row["number"] for row in changed}
    files = {each["number"]: files_from_text(each["files"]) for each in known if each["number"] in done}
    _refer_to_files(transaction, files, is_input=False)
    return [
        _to_record(row) for number in sorted(done) for row in transaction.execute(_ADDED, (number, number)).fetchall()
    ]


def _refer_to_files(transaction: Transaction, files: Mapping[int, Mapping[str, StoredFile]], *, is_input: bool) -> None:
    """Record that requests, by number, refer to files, which are kept as long as their rows."""
    rows = [(number, is_input, one.sha256) for number, named in files.items() for one in named.values()]
    transaction.execute_many(_ADD_FILE, rows)


def delete_requests(transaction: Transaction, which: str, values: Any, *, keeps_members: bool = False) -> list[Any]:
    """Delete requests, their labels and vectors, what webhooks say of them, and later files that no other needs.

    :param which: SQL condition; must exclude requests that have not ended, except those of a hidden batch.
    :param keeps_members: the steps of a pipeline that have given a collection a vector stay, as requests of their own,
        unless its request has a retention time of its own.
    :return: their rows.
    """
    sql = f"DELETE FROM requests WHERE {which} RETURNING {_DELETED}"
    deleted = transaction.execute(sql, values).fetchall()
    count_open(transaction, [row for row in deleted if row["finished_at"] is None], sign=-1)
    labels = [(row["number"], row["labels"]) for row in deleted if row["labels"] != "{}"]
    transaction.execute_many(_REMOVE_LABELS, labels)
    remove_members_of(transaction, [row["number"] for row in deleted])
    note_removals(transaction, deleted, keeps_members=keeps_members)
    for statement in FORGET:
        transaction.execute_many(statement, [(row["id"],) for row in deleted])
    transaction.delete_files(set().union(*map(digests_of_files, deleted)))
    return deleted


def settle_children(database: Database, parents: Sequence[str], *, now: datetime) -> None:
    """Cancel the queued steps of requests to pipelines that have ended; delete those of requests that were deleted.

    What a worker has yet ends first: that makes the run ready, and the batcher calls this again. A request that is
    queued, perhaps because it was retried meanwhile, is left alone.
    """
    for start in range(0, len(parents), _PARENTS_AT_ONCE):
        ids = json.dumps(parents[start : start + _PARENTS_AT_ONCE])
        runs = [(row["id"], row["changed"]) for row in database.rows(_ENDED_RUNS, {"parents": ids, "least": 0})]
        if runs:
            _settle_some(database, ids, runs, now)


def _settle_some(database: Database, parents: str, runs: Sequence[tuple[str, int]], now: datetime) -> None:
    """See `settle_children`. :param parents: ids, JSON. :param runs: each parent's id, and its run's count."""
    values = {"parents": parents, "rows_per_commit": 0}

    def cancel(transaction: Transaction, rows: int) -> int:
        which = _SOME_ENDED_CHILDREN.format(which="state = 'queued'")
        parameters = [{**values, "least": 0, "rows_per_commit": rows}]
        return len(transition(transaction, RequestState.CANCELLED, which, parameters, now=now))

    def release(transaction: Transaction, rows: int) -> int:
        which = _SOME_ENDED_CHILDREN.format(which="collections > 0 AND finished_at IS NOT NULL")
        return transaction.execute(
            f"UPDATE requests SET parent = NULL, step = NULL, position = NULL WHERE {which}",
            {**values, "least": REMOVE_OTHERS, "rows_per_commit": rows},
        ).rowcount

    def delete(transaction: Transaction, rows: int) -> int:
        which = _SOME_ENDED_CHILDREN.format(which="finished_at IS NOT NULL")
        return len(delete_requests(transaction, which, {**values, "least": REMOVE_ALL, "rows_per_commit": rows}))

    for step in (cancel, release, delete):
        database.write_in_steps(step, rows_per_commit=ROWS_PER_COMMIT)

    def end(transaction: Transaction) -> None:
        transaction.execute(_DELETE_RUNS, {"parents": parents})
        transaction.execute_many(_SET_SETTLED, [{"parent": id, "changed": changed} for id, changed in runs])

    database.write(end)


class Requests:
    """The table `requests` and the images it refers to."""

    def __init__(self, database: Database, images: ImageStore) -> None:
        self._database = database
        self._images = images

    def add(self, new: NewRequest, staged: StagedImage) -> RequestRecord:
        """Add a request and publish its image; return when both are durable.

        When the same artefact has answered an equal image of the same key before, and the request is not fresh, it is
        done at once with that answer and `is_cached`. After an error neither the row nor the image is left behind.

        :raises StoreBusy: locked for too long.
        :raises StoreUnavailable: read-only or gone.
        :raises DiskFull:
        :raises QuotaReached: the quota of its key, which is counted in the same commit; see `clients/usage.py`.
        """
        row = request_row(new, staged)

        def write(transaction: Transaction) -> RequestRecord:
            item = new, staged, row
            sender = Sender(key_id=new.key_id, client=new.client, model=new.model, at=row["created_at"])
            usage = count_accepted(transaction, sender, accepted=1, size_bytes=input_bytes([item]))
            (added,) = insert_requests(transaction, [item], usage=usage)
            answered = answer_known(transaction, [(added.number, item)], now=new.created_at)
            return answered[0] if answered else added

        try:
            return self._database.write(write)
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

    def list_replaced(self, ids: Iterable[str], model: str) -> set[str]:
        """Tell which of these requests are done again with a model, whatever became of that."""
        rows = self._database.rows(_REPLACED_BY_MODEL, {"ids": json.dumps(list(ids)), "model": model})
        return {id for (id,) in rows}

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

        :param lease_ends_at: on the clock of leases.
        :param oldest_before: a model is due when a full chunk of it is queued, or its oldest request was accepted
            before this time; with None every model is.
        """
        full = ISOLATION_STEPS[0]
        wanted_models = json.dumps(sorted(models))

        def write(transaction: Transaction) -> list[Claim]:
            #: model -> how many of it may be claimed: all when it is due by age, else full chunks only.
            claimable: dict[str, int] = {}
            first_turn = 0
            found = transaction.execute(_OLDEST_DUE, {"now": to_text(now), "models": wanted_models}).fetchall()
            oldest = [(at, model) for model, at in found if at is not None]
            for oldest_created_at, model in sorted(oldest):
                which = {"model": model, "now": to_text(now), "limit": limit}
                due = transaction.execute(_COUNT_DUE, which).fetchone()[0]
                is_due_by_age = (
                    oldest_before is None
                    or oldest_created_at <= to_text(oldest_before)
                    or transaction.execute(_HAS_REQUEUED, which).fetchone()[0]
                )
                claimable[model] = due if is_due_by_age else due - due % full
                first_turn += min(claimable[model], full)
                if first_turn >= limit:
                    break  # there may be a thousand others
            turns = _take_turns(claimable, limit)
            lease = to_text(lease_ends_at)
            wanted = [{"model": model, "count": n, "lease_ends_at": lease} for model, n in Counter(turns).items()]
            rows = transition(
                transaction, RequestState.CLAIMED, _NEXT_DUE, wanted, columns="token = token + 1", now=now
            )
            claims: dict[str, deque[Claim]] = defaultdict(deque)
            for row in sorted(rows, key=lambda row: row["number"]):
                claims[row["model"]].append(from_row(Claim, row))
            return [claims[model].popleft() for model in turns]

        # Reading needs no write lock, and most calls find nothing.
        if self._database.row(_FIRST_QUEUED)[0] is None:
            return []
        return self._database.write(write)

    def renew(self, claims: Iterable[Claim], *, lease_ends_at: datetime) -> set[int]:
        """Extend the leases to a time on their clock. :return: the numbers of the claims that are still valid."""
        values = {"claims": _to_json(claims), "lease_ends_at": to_text(lease_ends_at)}
        rows = self._database.write(lambda transaction: transaction.execute(_RENEW, values).fetchall())
        return {number for (number,) in rows}

    def finish(self, answers: Sequence[Answer], *, now: datetime) -> int:
        """Record answers and their files, all or none, in one commit. :return: how many claims were still valid."""
        staged: dict[NewFile, StagedImage] = {}
        try:
            for one in {one for answer in answers for one in answer.files.values()}:
                staged[one] = self._images.stage(one.data)
            return self._record(answers, staged, now) if answers else 0
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
                "chunk_id": answer.chunk_id,
                "provider": answer.provider,
                "digest": answer.digest,
                "seconds": answer.seconds,
                "output": json.dumps(answer.output, separators=(",", ":")),
                "files": files_to_text(stored),
            }
            for answer, stored in zip(answers, files, strict=True)
        ]
        claims = {"claims": _to_json(answer.claim for answer in answers)}

        def write(transaction: Transaction) -> int:
            #: chunk -> how many requests it has answered; a chunk whose start was not recorded has no row and no cost.
            counts: dict[str, int] = {}
            for chunk_id in {answer.chunk_id for answer in answers}:
                known = transaction.execute(_ANSWERS_OF_CHUNK, (chunk_id,)).fetchone()
                if known is not None:
                    counts[chunk_id] = known[0]
            valid = {number for (number,) in transaction.execute(_VALID, claims).fetchall()}
            recorded: list[dict[str, Any]] = []
            new_files: set[NewFile] = set()
            references: dict[int, Mapping[str, StoredFile]] = {}
            for row, answer, stored in zip(rows, answers, files, strict=True):
                if row["number"] in valid:
                    new_files.update(answer.files.values())
                    references[row["number"]] = stored
                    valid.remove(row["number"])
                    share = counts.get(row["chunk_id"])
                    recorded.append({**row, "share": share})
                    if share is not None:
                        counts[row["chunk_id"]] = share + 1
            for one in new_files:
                transaction.publish(staged[one])
            done = transition(transaction, RequestState.DONE, "number = :number", recorded, columns=_ANSWER, now=now)
            _refer_to_files(transaction, references, is_input=False)
            for chunk_id, count in counts.items():
                transaction.execute(_SET_ANSWERS_OF_CHUNK, (count, chunk_id))
            usages = {row["number"]: row["usage"] for row in done}
            shares: dict[tuple[str, int], builtins.list[int]] = defaultdict(builtins.list)
            for row in recorded:
                if row["share"] is not None and usages[row["number"]] is not None:
                    shares[row["chunk_id"], usages[row["number"]]].append(row["share"])
            add_shares(transaction, shares)
            return len(recorded)

        return self._database.write(write)

    def fail(self, claims: Iterable[Claim], *, code: str, reason: str, now: datetime) -> int:
        """Fail requests that cannot be answered, for good. :return: how many claims were still valid."""
        values = {"claims": _to_json(claims), "code": code, "reason": reason}
        columns = "attempts = attempts + 1, code = :code, reason = :reason"
        return self._database.write(
            lambda transaction: len(
                transition(transaction, RequestState.FAILED, _ARE_VALID, [values], columns=columns, now=now)
            )
        )

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
        values = {"claims": _to_json(claims), "code": code, "reason": reason, "due_at": to_text(due_at or now)}
        return self._database.write(self._release(_ARE_VALID, values, blame, now))

    def release_expired(self, now: datetime, *, lease_now: datetime | None = None) -> int:
        """Release every claim whose lease has ended. Its batcher died, for which no item is to blame.

        :param lease_now: the time on the clock of leases; None if `now` is that.
        :return: how many.
        """
        lease_now = lease_now or now
        longest_lease = lease_now + timedelta(seconds=MAX_LEASE_SECONDS)
        times = {"lease_now": to_text(lease_now), "longest_lease": to_text(longest_lease)}
        if not self._has_any(_HAS_LEASE_ENDED, {**times, "rows_per_commit": 1}):
            return 0
        reason = "The batcher that worked on it stopped."
        values = {**times, "code": "lease_ended", "reason": reason, "due_at": to_text(now)}
        return self._database.write_in_steps(
            lambda transaction, rows: self._release(
                _HAS_LEASE_ENDED, {**values, "rows_per_commit": rows}, Blame.NOBODY, now
            )(transaction),
            rows_per_commit=ROWS_PER_COMMIT,
        )

    def _release(
        self, where: str, values: Mapping[str, Any], blame: Blame, now: datetime
    ) -> Callable[[Transaction], int]:
        limits = {"blame": blame.value, "alone": len(ISOLATION_STEPS) - 1, "max_attempts": MAX_ATTEMPTS}
        parameters = [{**values, **limits}]
        used_up = f"{where} AND attempts + {_IS_TO_BLAME} >= :max_attempts"

        def write(transaction: Transaction) -> int:
            failed = transition(transaction, RequestState.FAILED, used_up, parameters, columns=_COUNT_FAILURE, now=now)
            queued = transition(transaction, RequestState.QUEUED, where, parameters, columns=_COUNT_FAILURE, now=now)
            return len(failed) + len(queued)

        return write

    def cancel(self, id: str, *, now: datetime) -> RequestRecord:
        """Cancel a queued request.

        :raises UnknownRequest:
        :raises NotCancellable:
        """
        cancelled = self._change_one(id, RequestState.CANCELLED, "id = :id", now=now, error_type=NotCancellable)
        if cancelled.service != PIPELINE:
            return cancelled
        self.settle_children([id], now=now)
        return self.get(id)

    def retry(self, id: str, *, now: datetime) -> RequestRecord:
        """Queue a failed or cancelled request again, its attempts reset.

        :raises UnknownRequest:
        :raises NotRetryable:
        """
        where = "id = :id AND state IN ('failed', 'cancelled') AND image_deleted_at IS NULL AND parent IS NULL"
        return self._change_one(id, RequestState.QUEUED, where, _RESET_ONE, now=now, error_type=NotRetryable)

    def _change_one(
        self,
        id: str,
        to: RequestState,
        where: str,
        columns: str = "",
        *,
        now: datetime,
        error_type: type[NotCancellable] | type[NotRetryable],
    ) -> RequestRecord:
        def write(transaction: Transaction) -> RequestRecord:
            changed = transition(transaction, to, where, [{"id": id}], columns=columns, now=now)
            rows = transaction.execute(_GET, (id,)).fetchall()
            if changed:
                return _to_record(rows[0])
            raise _refusal(error_type, rows)

        changed = self._database.write(write)
        return self.get(id) if changed.service == PIPELINE else changed

    def remove(self, id: str) -> None:
        """Delete a request that has ended, and those of its files that no other request needs.

        The steps of a pipeline go with the request to it; one that a worker has yet goes when it has ended.

        :raises UnknownRequest:
        :raises NotRemovable:
        """

        def write(transaction: Transaction) -> Any:
            row = transaction.execute(_GET, (id,)).fetchone()
            which = "id = :id AND finished_at IS NOT NULL AND parent IS NULL"
            if not delete_requests(transaction, which, {"id": id}):
                raise _refusal(NotRemovable, [] if row is None else [row])
            return row

        removed = self._database.write(write)
        if removed["service"] == PIPELINE:
            self.settle_children([id], now=from_text(removed["finished_at"]))

    def settle_children(self, parents: Sequence[str], *, now: datetime) -> None:
        """See the function."""
        settle_children(self._database, parents, now=now)

    def retry_children(self, parent: str, *, now: datetime) -> None:
        """Queue the steps of a request to a pipeline again that did not succeed; those without a request are open."""

        def write(transaction: Transaction, rows: int) -> int:
            which = _SOME_CHILDREN.format(which="state IN ('failed', 'cancelled') AND image_deleted_at IS NULL")
            values = [{"parent": parent, "rows_per_commit": rows}]
            return len(transition(transaction, RequestState.QUEUED, which, values, columns=_RESET_ONE, now=now))

        def end(transaction: Transaction) -> None:
            transaction.execute("DELETE FROM pipeline_outcomes WHERE parent = ?", (parent,))
            transaction.execute("UPDATE pipeline_runs SET is_retried = 0 WHERE id = ?", (parent,))

        self._database.write_in_steps(write, rows_per_commit=ROWS_PER_COMMIT)
        self._database.write(end)

    def expire(self, now: datetime) -> int:
        """Cancel every queued request whose deadline has passed; claimed ones are finished.

        One to a pipeline that has got answers, or may get one from a step under way, goes on without its queued steps.

        :return: how many.
        """
        if not self._has_any(_IS_OVERDUE, {"now": to_text(now)}):
            return 0

        def write(transaction: Transaction, rows: int) -> int:
            where = f"number IN (SELECT number FROM requests WHERE {_IS_OVERDUE} LIMIT :rows_per_commit)"
            limit = {"rows_per_commit": rows}
            columns = f"code = '{EXPIRED}', reason = 'Its deadline passed before it was claimed.'"
            return len(transition(transaction, RequestState.CANCELLED, where, [limit], columns=columns, now=now))

        return self._database.write_in_steps(write, rows_per_commit=ROWS_PER_COMMIT)

    def _has_any(self, where: str, values: Mapping[str, Any]) -> bool:
        """Tell whether a write would find anything: reading needs no write lock, and most calls find nothing."""
        return self._database.row(f"SELECT 1 FROM requests WHERE {where} LIMIT 1", values) is not None

    def correct_open(self) -> None:
        """See `store.transition.correct_open`."""
        correct_open(self._database)

    def backlog(self) -> list[ModelBacklog]:
        """Count the queued and the claimed requests by model."""
        return self._database.records(ModelBacklog, _BACKLOG)

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
        conditions = [IS_VISIBLE]
        conditions += [f"state = '{RequestState(state)}'"] if state is not None else []
        conditions += ["model = :model"] if model is not None else []
        conditions += ["number < :before"] if before is not None else []
        with self._database.read() as connection:
            rows = connection.execute(
                f"SELECT * FROM requests WHERE {' AND '.join(conditions)} ORDER BY number DESC LIMIT :limit",
                {"model": model, "before": before, "limit": limit},
            ).fetchall()
            return read_requests(connection, rows, with_steps=False)

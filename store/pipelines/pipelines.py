"""Pipelines in the store: which runs can go on, and what the batcher decided about them.

Used by `batcher/pipelines.py`. A run goes on in commits of some rows each; a child is added once for its step and
position, whoever adds it and however often, so a batcher that is killed between two commits, and another one that does
the same work, change nothing. A run is ready until what has happened to its children was looked at.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from store.clients.usage import ClientKind, Sender, count_accepted
from store.database import Database, Transaction
from store.errors import QuotaReached
from store.files import StoredFile, files_to_text
from store.images import StagedImage
from store.pipelines.definition import PIPELINE
from store.pipelines.runs import PipelineRun, StepOutcome, note_growth
from store.requests import (
    ROWS_PER_COMMIT,
    NewItem,
    NewRequest,
    RequestRecord,
    Requests,
    answer_known,
    input_bytes,
    insert_requests,
    request_row_of,
)
from store.rows import to_text
from store.states import RequestState
from store.transition import transition

#: Runs of a hidden or arriving batch are not ready, as its requests are not claimed. The first condition selects the
#: index.
_READY = """
    SELECT pipeline_runs.id AS id, pipeline_runs.removed AS removed, is_retried, state
    FROM pipeline_runs INDEXED BY pipeline_runs_ready
    LEFT JOIN requests ON requests.number = pipeline_runs.number
    WHERE changed != advanced AND is_ended = :is_ended AND coalesce(pipeline_runs.batch_id, '') NOT IN (
        SELECT id FROM batches WHERE arrival > 0 AND (arrival != 2 OR arrival_ends_at > :now))
    ORDER BY pipeline_runs.number LIMIT :limit
"""

_PARENT = """
    SELECT state, is_fresh, (SELECT client FROM usage WHERE usage.number = requests.usage) AS client
    FROM requests WHERE requests.number = ?
"""

_PLACES = "SELECT step, position FROM requests WHERE parent = ?"

_ADD_OUTCOME = """
    INSERT OR IGNORE INTO pipeline_outcomes (parent, step, position, status, code, reason) VALUES (?, ?, ?, ?, ?, ?)
"""

_SET_ADVANCED = "UPDATE pipeline_runs SET advanced = ? WHERE id = ?"

# Nothing has happened to its children since they were looked at.
_IS_UNCHANGED = "number = :number AND (SELECT changed FROM pipeline_runs WHERE id = :id) = :changed"

_DONE = "output = :output, digest = :digest, code = NULL, reason = NULL"

_FAILED = "code = :code, reason = :reason"

# Without the index SQLite reads all requests up to the number.
_WAITING_MODELS = f"""
    SELECT model, count(*) FROM requests INDEXED BY requests_parent
    WHERE parent IN (
        SELECT id FROM requests WHERE number IN (
            SELECT number FROM requests INDEXED BY requests_queued
            WHERE state = 'queued' AND model IN (SELECT value FROM json_each(?)) AND service = '{PIPELINE}'
              AND number <= ?))
      AND state = 'queued' GROUP BY model
"""


@dataclass(frozen=True, kw_only=True)
class ReadyRun:
    """A run for which there is something to do."""

    #: Of the parent.
    id: str
    #: True if the parent has ended or was deleted.
    is_ended: bool
    #: True if the parent is tried again.
    is_retried: bool


@dataclass(frozen=True, kw_only=True)
class NewChild:
    """A child that is about to be added."""

    new: NewRequest
    #: By name, in the order of the service's; each is stored or among `staged`.
    inputs: Mapping[str, StoredFile]
    staged: Sequence[StagedImage] = ()


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a request to a pipeline fails as a whole."""

    code: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Advance:
    """What follows for a run from what was read of it."""

    parent: RequestRecord
    run: PipelineRun
    new: Sequence[NewChild] = ()
    outcomes: Sequence[StepOutcome] = ()
    #: True if more follows from the outcomes.
    goes_on: bool = False
    #: True if every step has ended.
    is_finished: bool = False
    #: None if it is done then.
    failure: Failure | None = None


#: A part of an advance: its children, its outcomes, and whether it is the last.
_Piece = tuple[Advance, Sequence[NewChild], Sequence[StepOutcome], bool]


class Pipelines:
    """The runs of pipelines."""

    def __init__(self, database: Database, requests: Requests) -> None:
        self._database = database
        self._requests = requests

    def list_ready(self, *, now: datetime, limit: int) -> list[ReadyRun]:
        """List runs for which there is something to do, oldest first: those that go on, then those that have ended.

        :param limit: of each kind, so that neither waits for all of the other.
        """
        values = {"now": to_text(now), "limit": limit}
        rows = [row for ended in (0, 1) for row in self._database.rows(_READY, {**values, "is_ended": ended})]
        return [
            ReadyRun(
                id=row["id"],
                is_ended=row["removed"] > 0 or row["state"] != RequestState.QUEUED,
                is_retried=bool(row["is_retried"]),
            )
            for row in rows
        ]

    def waiting_models(self, pipelines: Iterable[str], newest_number: int) -> dict[str, int]:
        """Count the queued children of the parents up to a number: model -> requests. :param pipelines: names."""
        return dict(self._database.rows(_WAITING_MODELS, (json.dumps(list(pipelines)), newest_number)))

    def advance(self, advances: Sequence[Advance], *, now: datetime) -> None:
        """Write what follows for some runs, in commits of at most ROWS_PER_COMMIT rows.

        The children's further inputs are published; the caller discards those that were not.
        """
        writes = [functools.partial(_write, pieces, now) for pieces in _in_commits(advances)]
        for _ in self._database.write_each(writes):
            pass


def _in_commits(advances: Sequence[Advance]) -> Iterator[list[_Piece]]:
    """Divide advances into pieces, and put pieces into commits."""
    pieces: list[_Piece] = []
    rows = 0
    for one in advances:
        starts = range(0, max(len(one.new), len(one.outcomes), 1), ROWS_PER_COMMIT)
        for start in starts:
            part = slice(start, start + ROWS_PER_COMMIT)
            piece = (one, one.new[part], one.outcomes[part], start == starts[-1])
            size = len(piece[1]) + len(piece[2]) + 1
            if pieces and rows + size > ROWS_PER_COMMIT:
                yield pieces
                pieces, rows = [], 0
            pieces.append(piece)
            rows += size
    if pieces:
        yield pieces


def _write(pieces: Sequence[_Piece], now: datetime, transaction: Transaction) -> None:
    for advance, new, outcomes, is_last in pieces:
        parent = advance.parent
        row = transaction.execute(_PARENT, (parent.number,)).fetchone()
        if row is None or row["state"] != RequestState.QUEUED:
            continue  # it was ended meanwhile, which makes the run ready again
        client = ClientKind(row["client"] or ClientKind.OTHER)
        refused = _add_children(transaction, parent, new, client, is_fresh=bool(row["is_fresh"]), now=now)
        found = [*outcomes, *refused]
        transaction.execute_many(
            _ADD_OUTCOME, [(parent.id, one.step, one.position, one.status, one.code, one.reason) for one in found]
        )
        if found:
            note_growth(transaction, [parent.id], to_text(now))
        if is_last:
            if advance.is_finished:
                _end(transaction, advance, now)
            # What was refused now is looked at again, and the open steps of a request that failed are cancelled.
            is_ready = bool(refused) or advance.goes_on or advance.failure is not None
            transaction.execute(_SET_ADVANCED, (advance.run.changed - is_ready, parent.id))


def _add_children(
    transaction: Transaction,
    parent: RequestRecord,
    new: Sequence[NewChild],
    client: ClientKind,
    *,
    is_fresh: bool,
    now: datetime,
) -> list[StepOutcome]:
    """Add the children that are not there yet. :return: those that the quota of the key refuses."""
    if not new:
        return []
    there = {tuple(row) for row in transaction.execute(_PLACES, (parent.id,)).fetchall()}
    #: By the row of the usage that counts them.
    items: dict[int, list[NewItem]] = defaultdict(list)
    refused: list[StepOutcome] = []
    for child in new:
        step, position = str(child.new.step), int(child.new.position or 0)
        if (step, position) in there:
            continue
        request = replace(child.new, is_fresh=is_fresh)
        (_, first), *others = child.inputs.items()
        columns = {"image_sha256": first.sha256, "image_bytes": first.size_bytes, "inputs": files_to_text(dict(others))}
        # It is due when its parent is: chunks are waited for once, not once for each step.
        item = request, None, {**request_row_of(request, columns), "due_at": to_text(parent.created_at)}
        sender = Sender(key_id=parent.key_id, client=client, model=request.model, at=to_text(now))
        try:
            usage = count_accepted(transaction, sender, accepted=1, size_bytes=input_bytes([item]))
        except QuotaReached as error:
            refused.append(
                StepOutcome(step=step, position=position, status="failed", code=error.code, reason=error.reason)
            )
            continue
        for staged in child.staged:
            transaction.publish(staged)
        items[usage].append(item)
    for usage, some in items.items():
        added = insert_requests(transaction, some, usage=usage)
        numbered = zip((record.number for record in added), some, strict=True)
        answer_known(transaction, numbered, now=now)
    return refused


def _end(transaction: Transaction, advance: Advance, now: datetime) -> None:
    parent, run = advance.parent, advance.run
    which = {"number": parent.number, "id": parent.id, "changed": run.changed}
    if advance.failure is not None:
        values = {**which, "code": advance.failure.code, "reason": advance.failure.reason}
        transition(transaction, RequestState.FAILED, _IS_UNCHANGED, [values], columns=_FAILED, now=now)
        return
    outcomes = {(one.step, one.position): one for one in advance.outcomes}
    counts = replace(run, outcomes={**run.outcomes, **outcomes}).count()
    values = {**which, "output": json.dumps(counts), "digest": run.digest}
    transition(transaction, RequestState.DONE, _IS_UNCHANGED, [values], columns=_DONE, now=now)

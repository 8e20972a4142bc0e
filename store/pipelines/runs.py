"""Runs of pipelines: the statements about them inside of a transaction.

A run belongs to a request to a pipeline, the parent. Its steps are requests of their own, the children, each with
`parent`, `step` and `position`: the place of its item in the list, 0 without a list. A step for which there is no
request has an outcome instead. `requests.py` adds a run with its request; `transition.py` notes here that a child has
ended, in the same transaction, so that the batcher (`batcher/pipelines.py`) finds every run that can go on.

    pipeline_runs         one for each parent; ready while `changed` differs from `advanced`. `is_ended` keeps those
                          whose parents have ended apart in the index, and `earlier` is how many were added before
    pipeline_outcomes     steps that were skipped, or failed before there was a request
    pipeline_definitions  each pipeline as it was when the first of its requests came
"""

from __future__ import annotations

import functools
import hashlib
import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from store.database import Transaction
from store.pipelines.definition import PIPELINE, Pipeline
from store.states import RequestState

if TYPE_CHECKING:
    from store.requests import RequestRecord

#: Values of `pipeline_runs.removed`, once the parent was deleted: its children are deleted too, all of them or those
#: that have given no collection a vector.
REMOVE_ALL, REMOVE_OTHERS = 1, 2

_ADD_DEFINITION = "INSERT OR IGNORE INTO pipeline_definitions (digest, definition) VALUES (?, ?)"

_ADD_RUN = """
    INSERT INTO pipeline_runs (id, number, batch_id, definition, changed, advanced, earlier)
    VALUES (?, ?, ?, ?, 1, 0, ?)
"""

#: How many requests to pipelines were ever added.
COUNT_ADDED = f"SELECT coalesce(sum(count), 0) FROM totals WHERE outcome = '{PIPELINE}'"

_NOTE = "UPDATE pipeline_runs SET changed = changed + 1 WHERE id = ?"

_NOTE_RETRY = "UPDATE pipeline_runs SET changed = changed + 1, is_retried = 1, is_ended = 0 WHERE id = ?"

_NOTE_END = "UPDATE pipeline_runs SET is_ended = 1, changed = changed + ? WHERE id = ?"

_NOTE_REMOVAL = "UPDATE pipeline_runs SET changed = changed + 1, removed = ?, is_ended = 1 WHERE id = ?"

_NOTE_GROWTH = """
    INSERT INTO changes (number, batch_id, state, at)
    SELECT number, batch_id, state, ? FROM requests WHERE id = ? AND state = 'queued'
"""

_READ = """
    SELECT pipeline_runs.id AS id, changed, pipeline_runs.definition AS digest, pipeline_definitions.definition AS text
    FROM pipeline_runs JOIN pipeline_definitions ON digest = pipeline_runs.definition
    WHERE pipeline_runs.id IN (SELECT value FROM json_each(?))
"""

_OUTCOMES = "SELECT * FROM pipeline_outcomes WHERE parent IN (SELECT value FROM json_each(?))"

CHILDREN = "SELECT * FROM requests WHERE parent IN (SELECT value FROM json_each(?))"

#: A step, and the place of its item in the list.
Place = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What became of a step for which there is no request."""

    step: str
    position: int
    #: skipped or failed.
    status: str
    code: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class PipelineRun:
    """The steps of a request to a pipeline, as far as they are."""

    pipeline: Pipeline
    #: Digest of the pipeline.
    digest: str
    #: Counts what happened to its children.
    changed: int
    children: Mapping[Place, RequestRecord]
    outcomes: Mapping[Place, StepOutcome]
    #: False in lists, where the steps are not read.
    has_steps: bool

    def count(self) -> dict[str, int]:
        """Count the steps by status."""
        return dict(
            Counter(
                [str(one.status) for one in self.children.values()] + [one.status for one in self.outcomes.values()]
            )
        )


def add_runs(transaction: Transaction, new: Sequence[tuple[str, int, str | None, str]]) -> None:
    """Add runs; then count them. :param new: id, number and batch of the parent, and the pipeline as text."""
    if not new:
        return
    (earlier,) = transaction.execute(COUNT_ADDED).fetchone()
    for position, (id, number, batch_id, text) in enumerate(new):
        digest = hashlib.sha256(text.encode()).hexdigest()
        transaction.execute(_ADD_DEFINITION, (digest, text))
        transaction.execute(_ADD_RUN, (id, number, batch_id, digest, earlier + position))


def note_changes(transaction: Transaction, to: RequestState, changed: Sequence[Any], at: str) -> None:
    """Note for their runs that children have ended or are queued again, and that parents were cancelled or retried.

    :param changed: rows of the requests in their new state.
    """
    parents = {row["parent"] for row in changed if row["parent"] is not None}
    if to is not RequestState.CLAIMED:
        # One that is queued again is cancelled if its parent has ended meanwhile.
        transaction.execute_many(_NOTE, [(id,) for id in parents])
    if to.is_final:
        note_growth(transaction, parents, at)
    runs = [row["id"] for row in changed if row["service"] == PIPELINE]
    if to is RequestState.QUEUED:
        transaction.execute_many(_NOTE_RETRY, [(id,) for id in runs])
    elif to.is_final:
        transaction.execute_many(_NOTE_END, [(to is RequestState.CANCELLED, id) for id in runs])


def note_growth(transaction: Transaction, parents: Iterable[str], at: str) -> None:
    """Write a change of each of these requests that has not ended: its answer has grown."""
    transaction.execute_many(_NOTE_GROWTH, [(at, id) for id in parents])


def note_removals(transaction: Transaction, deleted: Sequence[Any], *, keeps_members: bool) -> None:
    """Note that the children of deleted requests are to be deleted.

    :param deleted: rows.
    :param keeps_members: not those that have given a collection a vector, unless the client chose how long it is kept.
    """
    runs = [
        (REMOVE_OTHERS if keeps_members and row["keep_seconds"] is None else REMOVE_ALL, row["id"])
        for row in deleted
        if row["service"] == PIPELINE
    ]
    transaction.execute_many(_NOTE_REMOVAL, runs)


def build_runs(
    connection: sqlite3.Connection, parents: Sequence[str], children: Iterable[RequestRecord] | None
) -> dict[str, PipelineRun]:
    """Read runs, by the ids of their parents. :param children: all of theirs; None leaves the steps out."""
    ids = json.dumps(parents)
    outcomes: dict[str, dict[Place, StepOutcome]] = defaultdict(dict)
    for row in () if children is None else connection.execute(_OUTCOMES, (ids,)).fetchall():
        values = {name: row[name] for name in ("step", "position", "status", "code", "reason")}
        outcomes[row["parent"]][row["step"], row["position"]] = StepOutcome(**values)
    requests: dict[str, dict[Place, RequestRecord]] = defaultdict(dict)
    for child in children or ():
        requests[str(child.parent)][str(child.step), int(child.position or 0)] = child
    return {
        row["id"]: PipelineRun(
            pipeline=_parse(row["text"]),
            digest=row["digest"],
            changed=row["changed"],
            children=requests[row["id"]],
            outcomes=outcomes[row["id"]],
            has_steps=children is not None,
        )
        for row in connection.execute(_READ, (ids,)).fetchall()
    }


@functools.lru_cache(maxsize=64)
def _parse(text: str) -> Pipeline:
    return Pipeline.from_text(text)

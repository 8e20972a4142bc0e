"""`transition`: the one function that changes the state of requests, and writes what follows from it.

Called by `requests.py` and `batches.py` inside their transactions, so that a state and everything that follows from it
are committed together or not at all:

- the change feed (`changes`), one row for each change;
- the number of requests that have not ended (`open_requests`), by model;
- the totals (`totals`), counted by outcome, for each request that ended;
- the usage of API keys (`clients/usage.py`), likewise, and less what is retried;
- the progress of batches (`batches.ended`, `requests.ended_number`), for each request of a batch that ended;
- the members of collections, for each request that was answered (`collections/members.py`);
- no progress any more (`processes/progress.py`), for each request that is not claimed any more;
- the runs of pipelines (`pipelines/runs.py`), for each step that ended, whose request's answer grows by it;
- the webhook queue (`webhook_deliveries`), for each request that ended, and for each batch whose last request ended.

Each of these is written for all changed requests together, because one call may change ten thousand.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from store.clients.usage import count_outcomes
from store.clients.webhooks import host_of
from store.collections.members import complete_members, label_members
from store.database import Database, Transaction
from store.pipelines.definition import PIPELINE
from store.pipelines.runs import note_changes
from store.processes.progress import forget_progress
from store.rows import from_text, to_text
from store.states import EXPIRED, RequestState

#: Upper bounds, in seconds, of the histogram of the time from a request's arrival to its end. Stored with the counts.
DURATION_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 3600, 14400, 86400, float("inf"))

#: The states from which a state is reached.
_FROM = {
    RequestState.QUEUED: "state IN ('claimed', 'failed', 'cancelled')",
    RequestState.CLAIMED: "state = 'queued'",
    RequestState.DONE: "state IN ('queued', 'claimed')",
    RequestState.FAILED: "state IN ('queued', 'claimed')",
    RequestState.CANCELLED: "state = 'queued'",
}

#: The times that a state has, beside `due_at`; the table checks it too.
_TIMES = {
    RequestState.QUEUED: "lease_ends_at = NULL, finished_at = NULL",
    RequestState.CLAIMED: "lease_ends_at = :lease_ends_at, claimed_at = :now",
    RequestState.DONE: "lease_ends_at = NULL, finished_at = :now",
    RequestState.FAILED: "lease_ends_at = NULL, finished_at = :now",
    RequestState.CANCELLED: "finished_at = :now",
}

#: What follows from these columns; a claim has some more.
_COLUMNS = """
    number, id, service, model, created_at, finished_at, code, is_cached, batch_id, key_id, webhook, parent, usage,
    seconds
"""
_COLUMNS_OF_CLAIM = f"{_COLUMNS}, token, params, image_sha256, image_bytes, inputs, attempts, isolation"

#: Of requests that are retried, before they are.
_RETRIED = """
    SELECT model, parent, usage, state, code, is_cached, seconds FROM requests
    WHERE {where} AND state IN ('failed', 'cancelled')
"""

_COUNT_OPEN = """
    INSERT INTO open_requests (model, count, steps) VALUES (?, ?, ?)
    ON CONFLICT (model) DO UPDATE SET count = count + excluded.count, steps = steps + excluded.steps
"""

_NOT_ENDED = """
    SELECT model, sum(count) AS count, sum(steps) AS steps FROM (
        SELECT model, count(*) AS count, 0 AS steps
        FROM requests INDEXED BY requests_queued WHERE state = 'queued' GROUP BY model
        UNION ALL
        SELECT model, count(*), 0 FROM requests INDEXED BY requests_claimed WHERE state = 'claimed' GROUP BY model
        UNION ALL
        SELECT model, 0, count(*) FROM requests INDEXED BY requests_open_steps
        WHERE parent IS NOT NULL AND state IN ('queued', 'claimed') GROUP BY model
    ) GROUP BY model
"""

_WRONG_COUNTS = f"""
    WITH found AS ({_NOT_ENDED})
    SELECT model, found.count - coalesce(open_requests.count, 0) AS missing,
           found.steps - coalesce(open_requests.steps, 0) AS missing_steps,
           coalesce(open_requests.corrections, 0) AS corrections
    FROM found LEFT JOIN open_requests USING (model)
    WHERE missing != 0 OR missing_steps != 0
    UNION ALL
    SELECT model, -count, -steps, corrections FROM open_requests
    WHERE (count != 0 OR steps != 0) AND model NOT IN (SELECT model FROM found)
"""

#: Not if another process has corrected it meanwhile.
_CORRECT_COUNT = """
    INSERT INTO open_requests (model, count, steps, corrections) VALUES (:model, :missing, :missing_steps, 1)
    ON CONFLICT (model) DO UPDATE
    SET count = count + excluded.count, steps = steps + excluded.steps, corrections = corrections + 1
    WHERE corrections = :corrections
"""

_ADD_CHANGE = "INSERT INTO changes (number, batch_id, state, at) VALUES (?, ?, ?, ?)"

_ADD_TO_TOTALS = """
    INSERT INTO totals (model, outcome, code, up_to, count, seconds) VALUES (?, ?, ?, ?, ?, ?)
    ON CONFLICT (model, outcome, code, up_to)
    DO UPDATE SET count = count + excluded.count, seconds = seconds + excluded.seconds
"""

_COUNT_ENDED = "UPDATE batches SET ended = ended + ? WHERE id = ? RETURNING id, ended, total, key_id, webhook"

_SET_ENDED_NUMBER = "UPDATE requests SET ended_number = ? WHERE number = ?"

_IS_WAITING = "SELECT 1 FROM requests WHERE batch_id = ? AND state IN ('queued', 'claimed') LIMIT 1"

_ENDPOINTS = "SELECT id, url, events FROM webhook_endpoints WHERE disabled_at IS NULL"

_ADD_DELIVERY = """
    INSERT INTO webhook_deliveries (id, endpoint_id, owner, host, url, event, subject, state, created_at, next_at)
    VALUES (:id, :endpoint_id, :owner, :host, :url, :event, :subject, :state, :at, :at)
"""


def transition(
    transaction: Transaction,
    to: RequestState,
    where: str,
    parameters: Iterable[Mapping[str, Any]],
    *,
    now: datetime,
    columns: str = "",
) -> list[Any]:
    """Change the state of requests and write what follows.

    :param where: which requests, as SQL; those that cannot reach the state do not change.
    :param parameters: one mapping for each time that the statement runs; `:now` is added.
    :param columns: further assignments of the UPDATE, as SQL.
    :return: rows of the changed requests; when they are claimed, with the columns of a claim.
    """
    assignments = ", ".join(filter(None, (f"state = '{to}'", _TIMES[to], columns)))
    columns_returned = _COLUMNS_OF_CLAIM if to is RequestState.CLAIMED else _COLUMNS
    sql = f"UPDATE requests SET {assignments} WHERE {where} AND {_FROM[to]} RETURNING {columns_returned}"
    values = {"now": to_text(now)}
    changed: list[Any] = []
    for each in parameters:
        if to is RequestState.QUEUED:
            retried = transaction.execute(_RETRIED.format(where=where), {**each, **values}).fetchall()
            count_outcomes(transaction, [(row, _outcome(row["state"], row)) for row in retried], sign=-1)
            count_open(transaction, retried)
        changed += transaction.execute(sql, {**each, **values}).fetchall()
    write_what_follows(transaction, to, changed, now=now)
    return changed


def write_what_follows(transaction: Transaction, to: RequestState, changed: Sequence[Any], *, now: datetime) -> None:
    """Write what follows from a change of state; apart from `transition` only for a benchmark's requests.

    :param changed: rows of the requests in their new state.
    """
    if not changed:
        return
    at = to_text(now)
    note_changes(transaction, to, changed, at)
    transaction.execute_many(_ADD_CHANGE, [(row["number"], row["batch_id"], str(to), at) for row in changed])
    if to is not RequestState.CLAIMED:
        forget_progress(transaction, changed)
    if to is RequestState.DONE:
        complete_members(transaction, [row["number"] for row in changed])
        label_members(transaction, [row["number"] for row in changed])
    if to.is_final:
        count_open(transaction, changed, sign=-1)
        _add_to_totals(transaction, to, changed)
        count_outcomes(transaction, [(row, _outcome(to, row)) for row in changed])
        ended_batches = _number_ends(transaction, changed)
        # A step of a pipeline is a part of another request's answer.
        whole = [row for row in changed if row["parent"] is None]
        events = [("request.done", row["id"], str(to), row["key_id"], row["webhook"]) for row in whole]
        _queue_webhooks(transaction, [*events, *map(_batch_done, ended_batches)], at)


def count_open(transaction: Transaction, rows: Sequence[Any], *, sign: int = 1) -> None:
    """Count requests that are queued or claimed from now on; claiming them changes nothing.

    Also called where they are added, and deleted before they have ended. The queue may hold millions of requests, so
    it is not counted one by one.

    :param rows: of the requests, with model and parent.
    :param sign: -1 for those that have ended.
    """
    counts = Counter(row["model"] for row in rows)
    steps = Counter(row["model"] for row in rows if row["parent"] is not None)
    transaction.execute_many(_COUNT_OPEN, [(model, sign * counts[model], sign * steps[model]) for model in counts])


def correct_open(database: Database) -> None:
    """Correct `open_requests` where a process of an earlier version, which does not count, has changed requests.

    Counting needs no write lock: what is missing stays the same while processes of this version go on.
    """
    wrong = [dict(row) for row in database.rows(_WRONG_COUNTS)]
    if wrong:
        database.write(lambda transaction: transaction.execute_many(_CORRECT_COUNT, wrong))


def end_empty_batch(transaction: Transaction, batch: Any, *, now: datetime) -> None:
    """Write what follows from the end of a batch that has no requests. :param batch: its row."""
    _queue_webhooks(transaction, [_batch_done(batch)], to_text(now))


def _outcome(state: str, row: Any) -> str:
    """Return how a request has ended, as it is counted; see `clients/usage.py`."""
    if state == RequestState.DONE and row["is_cached"]:
        return "cached"
    return EXPIRED if state == RequestState.CANCELLED and row["code"] == EXPIRED else str(state)


def _add_to_totals(transaction: Transaction, to: RequestState, ended: Sequence[Any]) -> None:
    totals: dict[tuple[str, str, str, float], list[float]] = defaultdict(list)
    for row in ended:
        if row["service"] == PIPELINE:  # its steps are counted
            continue
        outcome, code = _outcome(to, row), row["code"]
        seconds = max(0.0, (from_text(row["finished_at"]) - from_text(row["created_at"])).total_seconds())
        up_to = next(bound for bound in DURATION_BUCKETS if seconds <= bound)
        reason = (code or "unknown") if to is RequestState.FAILED else ""
        totals[row["model"], outcome, reason, up_to].append(seconds)
    transaction.execute_many(_ADD_TO_TOTALS, [(*key, len(seconds), sum(seconds)) for key, seconds in totals.items()])


def count_pipelines(transaction: Transaction, models: Iterable[str]) -> None:
    """Count requests to pipelines that were added; see `stats.py`."""
    transaction.execute_many(_ADD_TO_TOTALS, [(model, PIPELINE, "", math.inf, 1, 0.0) for model in models])


def _number_ends(transaction: Transaction, ended: Sequence[Any]) -> list[Any]:
    """Number the requests that ended within their batches. :return: rows of batches that have ended now."""
    numbers: dict[str, list[int]] = defaultdict(list)
    for row in ended:
        if row["batch_id"] is not None:
            numbers[row["batch_id"]].append(row["number"])
    ended_batches = []
    for batch_id, members in numbers.items():
        for batch in transaction.execute(_COUNT_ENDED, (len(members), batch_id)).fetchall():
            first = batch["ended"] - len(members) + 1
            transaction.execute_many(_SET_ENDED_NUMBER, list(enumerate(members, first)))
            # `ended` counts every end, also one after a retry.
            is_counted = batch["ended"] >= batch["total"]
            if is_counted and transaction.execute(_IS_WAITING, (batch_id,)).fetchone() is None:
                ended_batches.append(batch)
    return ended_batches


#: A message: event, id of the request or batch, its state, its key, and its own webhook.
_Event = tuple[str, str, str, str | None, str | None]


def _batch_done(batch: Any) -> _Event:
    return "batch.done", batch["id"], str(RequestState.DONE), batch["key_id"], batch["webhook"]


def _queue_webhooks(transaction: Transaction, events: Sequence[_Event], at: str) -> None:
    endpoints = transaction.execute(_ENDPOINTS).fetchall()
    deliveries = [
        {
            "id": f"msg_{secrets.token_hex(16)}",
            "endpoint_id": endpoint_id,
            "owner": endpoint_id or key_id or "",
            "host": host_of(url),
            "url": url,
            "event": event,
            "subject": subject,
            "state": state,
            "at": at,
        }
        for event, subject, state, key_id, webhook in events
        for endpoint_id, url in (
            *((endpoint["id"], endpoint["url"]) for endpoint in endpoints if event in endpoint["events"].split(",")),
            *([] if webhook is None else [(None, webhook)]),
        )
    ]
    transaction.execute_many(_ADD_DELIVERY, deliveries)

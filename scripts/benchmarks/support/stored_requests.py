"""Homes whose store has requests: some real ones, or a day's worth without images."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from store import new_id
from store.database import Transaction
from store.pipelines.definition import PIPELINE, Pipeline, PipelineStep
from store.requests import NewRequest
from store.rows import to_text
from store.settings import HomeSettings
from store.states import RequestState
from store.store import Store
from store.transition import write_what_follows

MODELS = ("efficientnet_lite0", "resnet50", "vgg16", "densenet121", "nasnet_mobile", "xception")
OUTPUT = json.dumps([[f"n{n:08d}", f"label_{n}", round((20 - n) / 210, 6)] for n in range(20)], separators=(",", ":"))
#: Numbers of claimed, failed and cancelled requests per thousand; those that are not queued either are done.
CLAIMED, FAILED, CANCELLED = 1, 15, 4
ITEMS = 16
#: One in this many chunks failed as a whole.
FAILED_CHUNKS = 200
CODES = ("broken_image", "timeout", "worker_died", "inference_failed")
PROVIDERS, AGREEMENTS = 200, 2000

_REQUEST = """
    INSERT INTO requests (id, service, model, image_sha256, image_bytes, state, token, created_at, due_at, claimed_at,
                          lease_ends_at, finished_at, chunk_id, provider, digest, seconds, output, code, reason)
    VALUES (?, 'classification', ?, ?, ?, ?, 1, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_ENDED = """
    SELECT number, id, service, model, created_at, finished_at, code, is_cached, batch_id, key_id, webhook, parent,
           usage, seconds
    FROM requests WHERE state = ? AND number BETWEEN ? AND ?
"""
_CHUNK = """
    INSERT INTO chunks (id, batcher_id, executor, provider, service, model, items, bytes_sent, bytes_received,
                        dispatched_at, finished_at, seconds, done, failed, cost, code, reason, agreement_id,
                        provider_id, answers, is_cost_final)
    VALUES (?, 'b', 'golem', ?, 'classification', ?, ?, 900000, 9000, ?, ?, 2.5, ?, ?, '0.0001', ?, ?, ?, ?, ?, ?)
"""
_PROVIDER = """
    INSERT INTO providers (id, name, first_seen_at, seen_at, start_price, price_per_cpu_second, price_per_second, done,
                           failed, images, score)
    VALUES (?, ?, ?, ?, '0.001', '0.00001', '0.00001', 300, 3, 4800, 0.9)
"""
_AGREEMENT = """
    INSERT INTO agreements (id, allocation_id, provider_id, provider_name, model, start_price, price_per_cpu_second,
                            price_per_second, created_at, ended_at, reason)
    VALUES (?, 'al', ?, ?, ?, '0.001', '0.00001', '0.00001', ?, ?, 'idle')
"""
_INVOICE = "INSERT INTO invoices VALUES (?, ?, '0.0123', 'accepted', ?, ?, NULL)"
#: Rows that one statement adds.
_SLICE = 200_000

# The numbers go on from those that the table has.
_COUNTER = f"""
    WITH RECURSIVE counter (n) AS (
        SELECT coalesce(max(number), 0) + 1 FROM requests
        UNION ALL SELECT n + 1 FROM counter LIMIT :count)
    INSERT INTO requests (id, service, model, image_sha256, image_bytes, created_at, due_at, state, token, claimed_at,
                          lease_ends_at, finished_at, chunk_id, provider, digest, seconds, output)
    SELECT printf('%032x', n), 'classification', 'model_' || (n / {ITEMS} % :models), printf('%064x', n), 100000, :now,
           :now
"""
_ADD_ROWS = {
    RequestState.QUEUED: f"""
        {_COUNTER}, iif(n <= :claims, 'claimed', 'queued'), 1, iif(n <= :claims, :now, NULL),
        iif(n <= :claims, :lease, NULL), NULL, NULL, NULL, NULL, NULL, NULL FROM counter
    """,
    RequestState.DONE: f"""
        {_COUNTER}, 'done', 1, :now, NULL, :now, 'c' || (n / {ITEMS}), 'provider', printf('%064x', 0), 0.02, :output
        FROM counter
    """,
}
_COUNT_OPEN = """
    INSERT OR REPLACE INTO open_requests (model, count, steps)
    SELECT model, count(*), count(parent) FROM requests WHERE state IN ('queued', 'claimed') GROUP BY model
"""
#: The model of the step, of which a request to PIPELINE_NAME has one. Of ten requests one has not begun, one waits for
#: its step, and the others are done.
STEP_MODEL = "crop"
PIPELINE_NAME = "cut"
_PIPELINES = f"""
    WITH RECURSIVE counter (n) AS (SELECT :first UNION ALL SELECT n + 1 FROM counter LIMIT :count),
    -- The request, and its step.
    part (n, parent) AS (SELECT n, 0 FROM counter UNION ALL SELECT n, 1 FROM counter WHERE n % 10 != 0)
    INSERT INTO requests (number, id, service, model, image_sha256, image_bytes, created_at, due_at, state, token,
                          claimed_at, finished_at, chunk_id, provider, digest, seconds, output, parent, step, position)
    SELECT 2 * n + parent, printf('%032x', 2 * n + parent), iif(parent, '{STEP_MODEL}', '{PIPELINE}'),
           iif(parent, '{STEP_MODEL}', '{PIPELINE_NAME}'), printf('%064x', n), 100000, :now, :now,
           iif(n % 10 < 2, 'queued', 'done'), 1, iif(n % 10 < 2, NULL, :now), iif(n % 10 < 2, NULL, :now),
           iif(n % 10 < 2, NULL, 'c' || n), iif(n % 10 < 2, NULL, 'provider'),
           iif(n % 10 < 2, NULL, printf('%064x', 0)), iif(n % 10 < 2, NULL, 0.02), iif(n % 10 < 2, NULL, '[]'),
           iif(parent, printf('%032x', 2 * n), NULL), iif(parent, 'cut', NULL), iif(parent, 0, NULL)
    FROM part
"""
_RUNS = """
    WITH RECURSIVE counter (n) AS (SELECT :first UNION ALL SELECT n + 1 FROM counter LIMIT :count)
    INSERT INTO pipeline_runs (id, number, definition, changed, advanced, is_ended, earlier)
    SELECT printf('%032x', 2 * n), 2 * n, :definition, 1, n % 10 != 0, n % 10 > 1, n - 1 FROM counter
"""
_COUNT_PIPELINES = f"""
    INSERT OR REPLACE INTO totals (model, outcome, code, up_to, count, seconds)
    SELECT model, '{PIPELINE}', '', 9e999, count(*), 0.0 FROM requests WHERE service = '{PIPELINE}' GROUP BY model
"""


@contextlib.contextmanager
def opened(home: Path) -> Iterator[Store]:
    """Open the store of a home, which is made if there is none."""
    store = Store(HomeSettings(home=home, busy_seconds=5))
    store.migrate()
    try:
        yield store
    finally:
        store.close()


def add_images(home: Path, jpegs: list[bytes], model: str = MODELS[0]) -> None:
    """Add requests for images, as a server would."""
    with opened(home) as store:
        for jpeg in jpegs:
            new = NewRequest(
                id=new_id(), service="classification", model=model, is_fresh=True, created_at=datetime.now(UTC)
            )
            store.requests.add(new, store.images.stage(jpeg))


def add_day(home: Path, count: int, *, queued: int) -> None:
    """Add the requests, chunks and invoices of one day.

    :param queued: how many of a thousand requests are queued, the newest ones.
    """
    with opened(home):
        begin = datetime.now(UTC) - timedelta(hours=24)

    def at(n: int, later: float = 0.0) -> str:
        return to_text(begin + timedelta(seconds=min(86400.0, 86400.0 * n / count + later)))

    def requests() -> Iterator[tuple[Any, ...]]:
        claimed_from = max(0, count - count * (queued + CLAIMED) // 1000)
        queued_from = count - count * queued // 1000
        for n in range(count):
            came, taken, ended = at(n), at(n, 5 + n % 40), at(n, 8 + n % 60)
            first = (f"{n:032x}", MODELS[n // ITEMS % len(MODELS)], f"{n:064x}", 20_000 + n * 7919 % 400_000)
            chunk = (f"c{n // ITEMS}", "provider")
            kind = n % 1000
            if n >= queued_from:
                yield (*first, "queued", came, came, *(None,) * 10)
            elif n >= claimed_from:
                yield (*first, "claimed", came, came, taken, at(count, 30), *(None,) * 8)
            elif kind < FAILED:
                failed = (None, None, None, CODES[kind % len(CODES)], "The image is cut short or damaged.")
                yield (*first, "failed", came, came, taken, None, ended, *chunk, *failed)
            elif kind < FAILED + CANCELLED:
                yield (*first, "cancelled", came, came, None, None, ended, *(None,) * 7)
            else:
                seconds = 0.02 + n * 104729 % 1000 / 20000
                yield (*first, "done", came, came, taken, None, ended, *chunk, "d" * 64, seconds, OUTPUT, None, None)

    def chunks() -> Iterator[tuple[Any, ...]]:
        for n in range(count * (1000 - queued) // 1000 // ITEMS):
            is_failed = n % FAILED_CHUNKS == 0
            ends = (0, ITEMS, "timeout", "It took too long.") if is_failed else (ITEMS, 0, None, None)
            bill = (f"a{n % AGREEMENTS}", f"0x{n % PROVIDERS:040x}", ends[0], 1)
            times = (at(n * ITEMS, 6), at(n * ITEMS, 9))
            yield (f"c{n}", f"provider-{n % PROVIDERS}", MODELS[n % len(MODELS)], ITEMS, *times, *ends, *bill)

    noon = at(count // 2)
    providers = [(f"0x{n:040x}", f"provider-{n}") for n in range(PROVIDERS)]
    agreements = [(f"a{n}", *providers[n % PROVIDERS], MODELS[n % len(MODELS)]) for n in range(AGREEMENTS)]
    with contextlib.closing(sqlite3.connect(home / "mlg.db", isolation_level=None)) as connection:
        # Durability is not needed.
        connection.executescript("PRAGMA synchronous = OFF; PRAGMA cache_size = -400000; BEGIN IMMEDIATE")
        connection.executemany(_REQUEST, requests())
        connection.execute(
            "INSERT INTO open_requests (model, count) SELECT model, count(*) FROM requests GROUP BY model"
        )
        connection.executemany(_CHUNK, chunks())
        connection.executemany(_PROVIDER, [(*provider, noon, noon) for provider in providers])
        connection.executemany(_AGREEMENT, [(*agreement, noon, noon) for agreement in agreements])
        connection.executemany(_INVOICE, [(f"i{n}", f"a{n}", noon, noon) for n in range(AGREEMENTS)])
        connection.commit()
    _write_what_follows(home, count)


def add_rows(home: Path, count: int, *, models: int, state: RequestState, claims: int = 0) -> None:
    """Add requests without images and without what follows from them, a million in some twenty seconds.

    :param models: among how many models, `model_0` and so on, they are divided in runs of ITEMS.
    :param state: queued or done; a part of those that are queued is claimed.
    :param claims: how many.
    """
    with opened(home):
        now = datetime.now(UTC)
    values = {
        "claims": claims,
        "models": models,
        "now": to_text(now),
        "lease": to_text(now + timedelta(seconds=60)),
        "output": OUTPUT,
    }
    with contextlib.closing(sqlite3.connect(home / "mlg.db", isolation_level=None)) as connection:
        connection.executescript("PRAGMA synchronous = OFF; PRAGMA cache_size = -400000")
        # Each slice is a commit of its own, so that the log stays short.
        for first in range(0, count, _SLICE):
            connection.execute(_ADD_ROWS[state], {**values, "count": min(_SLICE, count - first)})
        if not state.is_final:
            connection.execute(_COUNT_OPEN)


def add_pipelines(home: Path, count: int) -> None:
    """Add requests to a pipeline without images, and their steps, to a home that has none."""
    step = PipelineStep(name="cut", model=STEP_MODEL, service=STEP_MODEL, inputs={"image": "request.image"})
    definition = Pipeline(name=PIPELINE_NAME, title="Cut", steps=(step,)).to_text()
    digest = hashlib.sha256(definition.encode()).hexdigest()
    with opened(home):
        values = {"now": to_text(datetime.now(UTC)), "definition": digest}
    with contextlib.closing(sqlite3.connect(home / "mlg.db", isolation_level=None)) as connection:
        connection.executescript("PRAGMA synchronous = OFF; PRAGMA cache_size = -400000")
        connection.execute("INSERT OR IGNORE INTO pipeline_definitions VALUES (?, ?)", (digest, definition))
        for first in range(0, count, _SLICE):
            some = {**values, "first": first + 1, "count": min(_SLICE, count - first)}
            connection.execute(_PIPELINES, some)
            connection.execute(_RUNS, some)
        connection.execute(_COUNT_OPEN)
        connection.execute(_COUNT_PIPELINES)


def _write_what_follows(home: Path, count: int, slice_size: int = 10_000) -> None:
    """Write the changes and the totals of the requests that ended."""
    with opened(home) as store:
        for first in range(1, count + 1, slice_size):

            def write(transaction: Transaction, first: int = first) -> None:
                for state in filter(lambda each: each.is_final, RequestState):
                    rows = transaction.execute(_ENDED, (str(state), first, first + slice_size - 1)).fetchall()
                    write_what_follows(transaction, state, rows, now=datetime.now(UTC))

            store.database.write(write)

"""Usage on SQLite: what it costs an upload, how it is read, and how a home of an earlier version gets it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
import sqlite_utils

from store import migrations, new_id
from store.requests import NewRequest
from store.settings import HomeSettings
from store.store import Store
from store.transition import _CORRECT_COUNT, _WRONG_COUNTS
from tests.stores import make_earlier_home, open_store

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def add(store: Store, key_id: str | None = None) -> None:
    new = NewRequest(id=new_id(), service="classification", model="vgg16", key_id=key_id, created_at=NOW)
    store.requests.add(new, store.images.stage(b"image"))


def test_an_upload_runs_one_statement_for_usage_and_quota_and_one_for_the_queue(home: Path) -> None:
    seen: list[str] = []
    with closing(open_store(HomeSettings(home=home))) as store:
        add(store)
        store.database.write(lambda transaction: transaction.connection.set_trace_callback(seen.append))

        add(store, key_id="k")

    texts = [" ".join(text.split()) for text in seen if not text.startswith("--")]
    upload = texts[texts.index("BEGIN IMMEDIATE") :]
    # One more makes every upload slower.
    heads = (
        "BEGIN IMMEDIATE",
        "SAVEPOINT",
        "INSERT INTO usage",
        "INSERT INTO requests",
        "INSERT INTO open_requests",
        "SELECT * FROM requests",
        "RELEASE",
        "COMMIT",
    )
    assert len(upload) == len(heads), upload
    assert all(text.startswith(head) for text, head in zip(upload, heads, strict=True)), upload


def test_usage_is_added_up_by_its_indexes(home: Path) -> None:
    reads: list[str] = []
    with closing(open_store(HomeSettings(home=home))) as store:
        add(store, key_id="k")
        with store.database.read() as connection:
            connection.set_trace_callback(reads.append)
        for key_id in (None, "k"):
            store.usage.list(since=date(2026, 11, 20), until=date(2026, 11, 20), by=["model"], key_id=key_id)
        store.keys.images_used("k", now=NOW)

    with closing(sqlite3.connect(home / "mlg.db")) as connection:
        plans = [
            [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}")] for sql in reads if "FROM usage" in sql
        ]
    assert len(plans) == 3
    assert plans[0][0] == "SEARCH usage USING INDEX usage_day (day>? AND day<?)"
    assert plans[1][0] == "SEARCH usage USING INDEX usage_key (key_id=? AND day>? AND day<?)"
    assert plans[2][0] == "SEARCH usage USING INDEX usage_key (key_id=? AND day=?)"
    assert not [line for plan in plans for line in plan if line.startswith("SCAN usage")]


def test_a_home_of_an_earlier_version_keeps_the_images_of_its_keys(home: Path) -> None:
    make_earlier_home(HomeSettings(home=home), migrations.m025_usage)
    with closing(sqlite3.connect(home / "mlg.db")) as connection:
        db = sqlite_utils.Database(connection)
        db["key_usage"].insert_all([{"key_id": "k", "day": f"2026-11-{day}", "pictures": day} for day in (19, 20)])
        connection.commit()

    with closing(open_store(HomeSettings(home=home))) as store:
        used = store.keys.images_used("k", now=NOW)
        add(store, key_id="k")
        rows = store.usage.list(since=date(2026, 11, 1), until=date(2026, 11, 30), by=["day", "model"], key_id="k")

    assert used == 20
    assert [(row.day, row.model, row.accepted) for row in rows] == [
        ("2026-11-20", "", 20),
        ("2026-11-20", "vgg16", 1),
        ("2026-11-19", "", 19),
    ]


def test_a_request_of_an_earlier_version_ends_without_being_counted(home: Path) -> None:
    with closing(open_store(HomeSettings(home=home))) as store:
        add(store)
        store.database.execute("UPDATE requests SET usage = NULL")
        (request,) = store.requests.list()

        store.requests.cancel(request.id, now=NOW)
        store.requests.retry(request.id, now=NOW)

        (total,) = store.usage.list(since=NOW.date(), until=NOW.date())
    assert (total.accepted, total.cancelled) == (1, 0)


def test_numbers_that_an_earlier_version_left_wrong_are_corrected(home: Path) -> None:
    with closing(open_store(HomeSettings(home=home))) as store:
        add(store)
        add(store)
        right = store.requests.backlog()
        for wrong in ("DELETE FROM open_requests", "UPDATE open_requests SET count = count - 5"):
            store.database.execute(wrong)
            assert store.requests.backlog() != right
            found = [dict(row) for row in store.database.rows(_WRONG_COUNTS)]

            store.requests.correct_open()

            assert store.requests.backlog() == right
            # Another process found the same, and is later.
            store.database.write(lambda transaction, found=found: transaction.execute_many(_CORRECT_COUNT, found))
            assert store.requests.backlog() == right
        store.requests.correct_open()
        assert store.database.row("SELECT sum(count) FROM open_requests")[0] == 2

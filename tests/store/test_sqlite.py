"""The SQLite store: several processes, locks, full disks, damaged files, and the checks of the schema."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from provider_image.errors import ConfigError
from store import migrations, new_id
from store.errors import DiskFull, StoreBusy, StoreError, StoreUnavailable
from store.migrations import STEPS
from store.requests import Claim, NewRequest, RequestRecord
from store.rows import from_row
from store.settings import HomeSettings
from store.store import Store
from tests.stores import make_earlier_home
from tests.timing import DEADLINE_SECONDS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def settings(settings: HomeSettings) -> HomeSettings:
    """A store that soon gives up waiting for another writer."""
    return replace(settings, busy_seconds=0.2)


def add(store: Store, data: bytes = b"image") -> RequestRecord:
    new = NewRequest(id=new_id(), service="classification", model="resnet50", created_at=datetime.now(UTC))
    return store.requests.add(new, store.images.stage(data))


def files(store: Store) -> list[str]:
    return sorted(str(path) for path in store.images.folder.rglob("*") if path.is_file())


def test_three_processes_may_migrate_an_empty_home_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from store.settings import HomeSettings;"
        "from store.store import Store; sys.stdin.read();"
        "print(len(Store(HomeSettings(home=Path(sys.argv[1]))).migrate()))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "home")],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]

    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    printed = [process.communicate(timeout=DEADLINE_SECONDS)[0].strip() for process in processes]

    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(printed) == ["0", "0", str(len(STEPS))]


def test_other_users_cannot_read_a_home_that_was_open_before(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    umask = os.umask(0o022)
    try:
        store = Store(HomeSettings(home=tmp_path, busy_seconds=5.0))
        store.migrate()
        add(store)
    finally:
        os.umask(umask)

    open_to_all = [path for path in tmp_path.iterdir() if path.stat().st_mode & 0o007]
    assert (tmp_path / "mlg.db-wal").exists()
    assert [path.name for path in open_to_all if path.is_file()] == []
    assert [path.name for path in store.images.folder.iterdir() if path.stat().st_mode & 0o007] == []


def test_a_database_of_a_newer_mlg_is_refused(store: Store, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "home" / "mlg.db") as connection:
        connection.execute("INSERT INTO migrations VALUES ('m999_from_the_future', 'x')")
    connection.close()

    with pytest.raises(ConfigError, match="newer mlg"):
        store.migrate()


def test_a_locked_database_is_busy_and_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:
    holder = sqlite3.connect(tmp_path / "home" / "mlg.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")

    with pytest.raises(StoreBusy):
        add(store)

    assert files(store) == []
    holder.execute("ROLLBACK")
    holder.close()
    assert store.requests.get(add(store).id).image_bytes == 5


def test_a_full_disk_of_the_images_is_an_error_and_leaves_nothing_behind(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def half_then_full(handle: int, data: memoryview) -> int:
        if len(data) > 100:
            return real(handle, data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", half_then_full)

    with pytest.raises(DiskFull):
        store.images.stage(b"x" * 150)

    assert files(store) == []


def test_a_full_disk_of_the_database_is_an_error_and_leaves_nothing_behind(store: Store) -> None:
    add(store)
    before = files(store)

    def fill(transaction: object) -> None:
        pages = transaction.execute("PRAGMA page_count").fetchone()[0]  # type: ignore[attr-defined]
        transaction.execute(f"PRAGMA max_page_count = {pages}")  # type: ignore[attr-defined]

    store.database.write(fill)

    with pytest.raises(DiskFull):
        for n in range(2000):
            add(store, b"%d" % n)
            before = files(store)

    assert files(store) == before
    assert len(store.requests.list(limit=5000)) == len(before)


def test_a_failed_commit_deletes_its_images(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("store.images.sync_folder", broken)

    with pytest.raises(StoreUnavailable, match="Input/output error"):
        add(store)

    assert files(store) == []
    assert store.requests.list() == []
    monkeypatch.undo()
    assert store.requests.get(add(store).id) is not None


def test_a_damaged_database_is_an_error(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "mlg.db").write_bytes(b"this is not a database at all" * 100)
    store = Store(HomeSettings(home=home))

    with pytest.raises(StoreUnavailable, match="damaged"):
        store.migrate()

    store.close()


def test_a_home_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    store = Store(HomeSettings(home=tmp_path / "home"))

    with pytest.raises(StoreError, match="home"):
        store.migrate()

    store.close()


def test_check_fails_when_the_store_cannot_be_written(store: Store, tmp_path: Path) -> None:
    store.check()
    holder = sqlite3.connect(tmp_path / "home" / "mlg.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")

    with pytest.raises(StoreBusy):
        store.check()

    holder.execute("ROLLBACK")
    holder.close()


@pytest.mark.parametrize(
    "change",
    [
        "state = 'thinking'",
        "state = 'claimed'",
        "state = 'done', finished_at = 'now'",
        "state = 'failed', finished_at = 'now'",
        "lease_ends_at = 'now'",
    ],
)
def test_the_table_itself_refuses_an_impossible_state(store: Store, tmp_path: Path, change: str) -> None:
    add(store)
    connection = sqlite3.connect(tmp_path / "home" / "mlg.db")

    with pytest.raises(sqlite3.IntegrityError):
        connection.execute(f"UPDATE requests SET {change}")

    connection.close()


def test_writers_of_one_process_share_commits(store: Store, tmp_path: Path) -> None:
    commits = 0

    def count_commit(statement: str) -> None:
        nonlocal commits
        commits += statement == "COMMIT"

    store.database.write(lambda transaction: transaction.connection.set_trace_callback(count_commit))
    threads = [
        threading.Thread(target=lambda part=part: [add(store, b"%d-%d" % (part, n)) for n in range(25)])
        for part in range(8)
    ]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(store.requests.list(limit=1000)) == 200
    assert 0 < commits < 150


def test_two_processes_add_to_one_home_without_losing_anything(tmp_path: Path) -> None:
    Store(HomeSettings(home=tmp_path / "home")).migrate()
    code = (
        "import sys; sys.path.insert(0, 'tests/store'); from pathlib import Path;"
        "from test_sqlite import add; from store.settings import HomeSettings;"
        "from store.store import Store;"
        "store = Store(HomeSettings(home=Path(sys.argv[1])));"
        "[print(add(store, f'{sys.argv[2]}-{n % 40}'.encode()).id) for n in range(80)]; store.close()"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "home"), part], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for part in "ab"
    ]

    acknowledged = [id for process in processes for id in process.communicate(timeout=DEADLINE_SECONDS)[0].split()]

    store = Store(HomeSettings(home=tmp_path / "home"))
    assert sorted(request.id for request in store.requests.list(limit=1000)) == sorted(acknowledged)
    assert len(acknowledged) == 160
    assert len(files(store)) == 80
    store.close()


def test_frequent_queries_use_an_index(store: Store, tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "home" / "mlg.db")
    plans = {
        "SELECT created_at FROM requests WHERE state = 'queued' AND model = 'x' AND due_at <= 'y' "
        "ORDER BY number LIMIT 1": "requests_queued",
        "SELECT 1 FROM requests WHERE state = 'claimed' AND (lease_ends_at <= 'x' OR lease_ends_at > 'y')": (
            "requests_claimed"
        ),
        "SELECT * FROM requests WHERE state = 'failed' AND number < 5 ORDER BY number DESC": "requests_failed",
        "SELECT * FROM requests WHERE id = 'x'": "sqlite_autoindex_requests_1",
    }

    for sql, index in plans.items():
        plan = " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}"))

        assert index in plan, plan
        assert "TEMP B-TREE" not in plan

    connection.close()


def test_the_labels_of_an_earlier_version_belong_to_the_keys_of_their_requests(settings: HomeSettings) -> None:
    make_earlier_home(settings, migrations.m016_leaks)
    with sqlite3.connect(settings.database) as connection:
        for number, key_id in ((1, "alice"), (2, "bob"), (3, None)):
            connection.execute(
                "INSERT INTO requests (number, id, service, model, image_sha256, image_bytes, state, created_at,"
                " due_at, labels, key_id) VALUES (?, ?, 'classification', 'm', ?, 1, 'queued', 'x', 'x', ?, ?)",
                (number, f"r{number}", "0" * 64, '{"a": "b"}', key_id),
            )
            connection.execute("INSERT INTO request_labels (name, value, number) VALUES ('a', 'b', ?)", (number,))
    connection.close()
    store = Store(settings)

    store.migrate()

    rows = store.database.rows("SELECT number, key_id FROM request_labels ORDER BY number")
    assert [tuple(row) for row in rows] == [(1, "alice"), (2, "bob"), (3, None)]
    store.close()


def test_styles_of_an_earlier_version_that_ended_early_are_no_answers_to_later_requests(settings: HomeSettings) -> None:
    make_earlier_home(settings, migrations.m032_cut_short)
    rows = [
        ("style_transfer", '{"complete": false}'),
        ("style_transfer", '{"complete": true}'),
        ("classification", "[]"),
    ]
    with sqlite3.connect(settings.database) as connection:
        connection.executemany(
            "INSERT INTO requests (id, service, model, image_sha256, image_bytes, state, created_at, due_at,"
            " finished_at, digest, output) VALUES (?, ?, 'm', ?, 1, 'done', 'x', 'x', 'x', 'd', ?)",
            [(f"r{number}", service, "0" * 64, output) for number, (service, output) in enumerate(rows)],
        )
    connection.close()
    store = Store(settings)

    store.migrate()

    found = store.database.rows("SELECT digest FROM requests ORDER BY number")
    assert [row["digest"] for row in found] == ["d-cut", "d", "d"]
    store.close()


def test_counts_of_open_requests_of_an_earlier_version_can_be_corrected(settings: HomeSettings) -> None:
    make_earlier_home(settings, migrations.m030_open_steps)
    with contextlib.closing(Store(settings)) as store:
        store.migrate()
        add(store)
        store.database.execute("UPDATE open_requests SET count = 7")

        store.requests.correct_open()

        assert [(one.model, one.waiting) for one in store.requests.backlog()] == [("resnet50", 1)]


def test_a_record_is_read_from_a_row_with_its_defaults() -> None:
    cells = {"number": 1, "id": "x", "token": 2, "service": "s", "model": "m", "params": "{}", "image_sha256": "0"}
    cells |= {"image_bytes": 3, "attempts": 0, "isolation": 0, "created_at": "2026-11-28T07:00:00.250Z"}

    def select(*names: str) -> sqlite3.Row:
        columns = ", ".join(f":{name} AS {name}" for name in names)
        with contextlib.closing(sqlite3.connect(":memory:")) as connection:
            connection.row_factory = sqlite3.Row
            row: sqlite3.Row = connection.execute(f"SELECT {columns}", cells).fetchone()
        return row

    claim, other = from_row(Claim, select(*cells)), from_row(Claim, select(*cells), model="n")

    assert (claim.inputs, claim.created_at.microsecond, claim.model, other.model) == ({}, 250_000, "m", "n")
    assert claim == Claim(**vars(claim))
    assert claim.inputs is not other.inputs
    with pytest.raises(TypeError, match="token"):
        from_row(Claim, select("number", "id"), **{name: cells[name] for name in cells if name != "token"})

"""How long the write lock is held: small commits, statements that use indexes, and batches that arrive in slices."""

from __future__ import annotations

import functools
import itertools
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from store.batches import ARRIVAL_SECONDS, BatchRecord, RefusedItem, UnknownBatch
from store.clients.keys import KeyRecord, Scope
from store.clients.webhooks import EndpointRecord
from store.database import STEP_SECONDS, Transaction, _next_rows
from store.errors import QuotaReached, StoreBusy, StoreError
from store.files import StoredFile
from store.images import ImageStore
from store.pipelines.definition import Pipeline, PipelineStep
from store.pipelines.pipelines import Advance, Failure, NewChild
from store.pipelines.runs import StepOutcome
from store.processes.process_lock import is_held
from store.requests import ROWS_PER_COMMIT, Answer, Blame, Claim, NewRequest
from store.search import Query
from store.settings import HomeSettings
from store.states import RequestState
from store.store import Store
from tests.contracts.deliveries import claim_due, finish
from tests.contracts.history import DIGEST, read_facts
from tests.stores import open_store
from tests.timing import DEADLINE_SECONDS, wait_until

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
MODEL = "resnet50"
LABELS = {f"name of a label {number}": f"value of a label {number}" for number in range(16)}
#: More than one commit holds.
MANY = 3 * ROWS_PER_COMMIT + 1


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    with opened(home) as made:
        yield made


@contextmanager
def opened(home: Path) -> Iterator[Store]:
    made = open_store(HomeSettings(home=home, busy_seconds=5))
    yield made
    made.close()


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def add_batch(store: Store, count: int, *, id: str = "b", refused: int = 0, **facts: Any) -> BatchRecord:
    batch_facts = {name: facts.pop(name) for name in ("webhook",) if name in facts}
    key_id = facts.get("key_id")
    batch = BatchRecord(
        id=id, service="classification", model=MODEL, created_at=NOW, key_id=key_id, name="secret name", **batch_facts
    )
    items = [
        (
            NewRequest(
                id=f"{id}-{number}", service="classification", model=MODEL, created_at=NOW, batch_id=id, **facts
            ),
            store.images.stage(b"%d" % number),
        )
        for number in range(count)
    ]
    refusals = [RefusedItem(position=count + n, client_id=f"r{n}", code="c", reason="r") for n in range(refused)]
    store.batches.add(batch, items, refusals)
    return batch


def claim(store: Store, limit: int = 1000, at: datetime = NOW) -> list[Claim]:
    return store.requests.claim(
        models=[MODEL], limit=limit, now=at, lease_ends_at=at + timedelta(seconds=30), oldest_before=None
    )


def answer_all(store: Store, at: datetime = NOW) -> None:
    for one in claim(store, at=at):
        answer = Answer(claim=one, output=["x"], digest=DIGEST, chunk_id="c", provider="p", seconds=0.1)
        store.requests.finish([answer], now=at)


def fail_all(store: Store) -> None:
    for one in claim(store):
        store.requests.fail([one], code="broken_image", reason="It is broken.", now=NOW)


def add_endpoint(store: Store, id: str = "we_1") -> None:
    events = ("request.done", "batch.done")
    url = "https://example.org/hook"
    store.webhooks.add_endpoint(EndpointRecord(id=id, url=url, events=events, secret="s", created_at=NOW))


def files(store: Store) -> list[str]:
    return sorted(path.name for path in store.images.folder.rglob("*") if path.is_file())


# Small commits


def prepare_answered(store: Store) -> None:
    add_batch(store, MANY, labels=LABELS)
    answer_all(store)


def prepare_failed(store: Store) -> None:
    add_batch(store, MANY)
    fail_all(store)


def prepare_claimed(store: Store) -> None:
    add_batch(store, MANY, labels=LABELS)
    for _ in range(MANY // 16 + 1):
        claim(store, 16)


def prepare_delivered(store: Store) -> None:
    add_endpoint(store)
    prepare_answered(store)
    now = datetime.now(UTC)
    for _ in range(MANY):
        for each in claim_due(store, now=now, lease_ends_at=now, limit=8, per_owner=8):
            finish(store, each, now=NOW)


def prepare_pending(store: Store) -> None:
    add_endpoint(store)
    prepare_answered(store)


def purge(store: Store, *, images: float, results: float, at: float) -> object:
    return store.retention.purge(images_before=after(images), results_before=after(results), now=after(at))


STEP = PipelineStep(name="a", model=MODEL, service="classification", inputs={"image": "request.image"})


def add_run(store: Store, id: str = "p1") -> None:
    new = NewRequest(
        id=id,
        service="pipeline",
        model="p",
        created_at=NOW,
        pipeline=Pipeline(name="p", title="P", steps=(STEP,)).to_text(),
    )
    store.requests.add(new, store.images.stage(id.encode()))


def advance(store: Store, id: str, **facts: Any) -> None:
    parent = store.requests.get(id)
    assert parent.run is not None
    store.pipelines.advance([Advance(parent=parent, run=parent.run, **facts)], now=NOW)


def add_steps(store: Store, count: int, id: str = "p1") -> None:
    parent = store.requests.get(id)
    image = StoredFile(sha256=parent.image_sha256, size_bytes=parent.image_bytes, media_type="")
    facts: dict[str, Any] = {
        "service": STEP.service,
        "model": MODEL,
        "created_at": NOW,
        "parent": id,
        "step": "a",
    }
    new = [NewRequest(id=f"{id}-{number}", position=number, **facts) for number in range(count)]
    advance(store, id, new=[NewChild(new=one, inputs={"image": image}) for one in new])


def end_run(store: Store, id: str = "p1") -> None:
    outcome = StepOutcome(step="b", position=0, status="skipped", code="c", reason="r")
    advance(store, id, outcomes=[outcome], is_finished=True)


def prepare_steps(store: Store) -> None:
    add_run(store)
    add_steps(store, MANY)


def prepare_run(store: Store) -> None:
    prepare_steps(store)
    answer_all(store)
    end_run(store)


def prepare_failed_run(store: Store) -> None:
    prepare_steps(store)
    fail_all(store)
    advance(store, "p1", is_finished=True, failure=Failure(code="c", reason="r"))
    store.requests.retry("p1", now=NOW)


#: What changes many rows -> what is done before, and what is done.
WORK: dict[str, tuple[Callable[[Store], object], Callable[[Store], object]]] = {
    "add a batch": (add_endpoint, lambda store: add_batch(store, MANY, labels=LABELS, refused=MANY)),
    "add a batch of known images": (
        prepare_pending,
        lambda store: add_batch(store, MANY, id="again", labels=LABELS, digest=DIGEST),
    ),
    "cancel a batch": (lambda store: add_batch(store, MANY), lambda store: store.batches.cancel("b", now=NOW)),
    "retry a batch": (prepare_failed, lambda store: store.batches.retry("b", now=NOW)),
    "delete a batch": (prepare_answered, lambda store: store.batches.remove("b")),
    "add the steps of a pipeline": (add_run, lambda store: add_steps(store, MANY)),
    "cancel the steps of a pipeline": (prepare_steps, lambda store: store.requests.cancel("p1", now=NOW)),
    "retry the steps of a pipeline": (
        prepare_failed_run,
        lambda store: store.requests.retry_children("p1", now=NOW),
    ),
    "delete the steps of a pipeline": (prepare_run, lambda store: store.requests.remove("p1")),
    "release": (prepare_claimed, lambda store: store.requests.release_expired(after(60))),
    "expire": (
        lambda store: add_batch(store, MANY, deadline_at=after(1)),
        lambda store: store.requests.expire(after(2)),
    ),
    "delete images": (prepare_answered, lambda store: purge(store, images=1, results=-9, at=1)),
    "delete requests": (prepare_answered, lambda store: purge(store, images=-9, results=1, at=1)),
    "delete deliveries": (prepare_delivered, lambda store: store.webhooks.purge(before=after(1))),
    "disable an endpoint": (
        prepare_pending,
        lambda store: store.webhooks.disable_endpoint("we_1", reason="x", now=NOW),
    ),
    "remove an endpoint": (prepare_pending, lambda store: store.webhooks.remove_endpoint("we_1")),
}


@pytest.mark.parametrize("name", WORK)
def test_no_commit_changes_many_rows(store: Store, name: str) -> None:
    prepare, work = WORK[name]
    prepare(store)
    rows: list[int] = []

    def begin(transaction: Transaction) -> None:
        connection = transaction.connection
        before = connection.total_changes

        def count(statement: str) -> None:
            nonlocal before
            if statement == "COMMIT":
                rows.append(connection.total_changes - before)
                before = connection.total_changes

        connection.set_trace_callback(count)

    store.database.write(begin)
    work(store)
    store.database.write(lambda transaction: transaction.connection.set_trace_callback(None))

    # A request has 16 labels, a change, a delivery, the number of its end, and the total that counts it.
    assert sum(rows) >= MANY
    assert max(rows) <= ROWS_PER_COMMIT * (1 + len(LABELS) + 4) + 10


def test_others_write_between_the_steps(store: Store) -> None:
    order: list[str] = []

    for _ in store.database.write_each([lambda transaction: order.append("step")] * 3):
        store.database.write(lambda transaction: order.append("other"))

    assert order == ["step", "other"] * 3


def test_steps_do_not_pause_while_nobody_waits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("store.database.time.sleep", pauses.append)

    for _ in store.database.write_each([lambda transaction: None] * 3):
        pass

    assert pauses == []


def test_steps_in_the_background_pause_three_times_as_long_as_they_took(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(store.database._background_ends, "wait", pauses.append)

    for _ in store.database.write_each([lambda transaction: time.sleep(0.01)] * 3, is_background=True):
        pass

    assert len(pauses) == 3
    assert pauses[0] == 0
    assert min(pauses[1:]) >= 0.03


def test_steps_in_the_background_end_when_they_shall(store: Store) -> None:
    allowed: list[int] = []

    def write(transaction: Transaction, rows: int) -> int:
        allowed.append(rows)
        store.retention.stop()
        return rows

    changed = store.database.write_in_steps(write, rows_per_commit=20, is_background=True)
    later = store.database.write_in_steps(write, rows_per_commit=20, is_background=True)

    assert (allowed, changed, later) == ([20], 20, 0)


def test_all_steps_of_a_purge_are_in_the_background(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_each, found = store.database.write_each, []

    def note(writes: Any, *, is_background: bool = False) -> Any:
        found.append(is_background)
        return write_each(writes, is_background=is_background)

    monkeypatch.setattr(store.database, "write_each", note)

    purge(store, images=1, results=1, at=1)

    # Requests twice, images, changes, deliveries, kept responses, providers.
    assert len(found) >= 7
    assert all(found)


def test_the_next_step_changes_as_many_rows_as_its_time_allows() -> None:
    assert [_next_rows(10, 0.0, 50), _next_rows(40, STEP_SECONDS / 3, 50)] == [20, 50]
    assert [_next_rows(50, 2 * STEP_SECONDS, 50), _next_rows(40, STEP_SECONDS, 50)] == [25, 40]
    assert [_next_rows(50, 1.0, 50), _next_rows(10, 1.0, 50), _next_rows(3, 1.0, 3)] == [10, 10, 3]


def test_slow_steps_get_smaller(store: Store) -> None:
    allowed: list[int] = []

    def write(transaction: Transaction, rows: int) -> int:
        allowed.append(rows)
        time.sleep(rows * STEP_SECONDS / 5)
        return rows if len(allowed) < 3 else 0

    changed = store.database.write_in_steps(write, rows_per_commit=50)

    assert (allowed, changed) == ([50, 10, 10], 60)


def test_steps_leave_the_lock_to_a_process_that_waits(store: Store, home: Path) -> None:
    done = threading.Event()

    def write_elsewhere() -> None:
        with opened(home) as other:
            other.database.write(lambda transaction: None)
        done.set()

    elsewhere = threading.Thread(target=write_elsewhere)
    for number, _ in enumerate(store.database.write_each(itertools.repeat(lambda transaction: time.sleep(0.005)))):
        if not number:
            elsewhere.start()
        if done.is_set():
            break

    elsewhere.join()


def test_steps_notice_threads_and_processes_that_wait(store: Store, home: Path) -> None:
    database, entered, leave = store.database, threading.Event(), threading.Event()
    found: list[bool] = []

    def hold(transaction: Transaction) -> None:
        entered.set()
        assert leave.wait(DEADLINE_SECONDS)

    with opened(home) as other:
        holder = threading.Thread(target=other.database.write, args=(hold,))
        waiter = threading.Thread(target=database.write, args=(lambda transaction: None,))
        found.append(other.database._is_awaited())
        holder.start()
        assert entered.wait(DEADLINE_SECONDS)
        found.append(database._is_awaited())
        waiter.start()
        # A process that waits, here its other threads.
        wait_until(lambda: is_held(home / "mlg.db-waiting"))
        found += [database._is_awaited(), other.database._is_awaited()]
        leave.set()
        holder.join()
        waiter.join()
        found += [database._is_awaited(), other.database._is_awaited()]

    assert found == [False, False, True, True, False, False]


# Statements


def record_statements(store: Store, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return a mapping that gets each statement of the store, with its last parameters."""
    seen: dict[str, Any] = {}

    class Recording(sqlite3.Connection):
        def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
            seen[sql] = parameters
            return super().execute(sql, parameters)

    monkeypatch.setattr("store.database.sqlite3.connect", functools.partial(sqlite3.connect, factory=Recording))
    return seen


def run_pipelines(store: Store) -> None:
    """Send two requests to a pipeline; one is answered and deleted, one cancelled and retried."""
    for id in ("p1", "p2"):
        add_run(store, id)
        add_steps(store, 1, id)
    store.pipelines.list_ready(now=NOW, limit=9)
    store.pipelines.waiting_models(["dots"], 99)
    store.requests.cancel("p2", now=NOW)
    store.requests.settle_children(["p2"], now=NOW)
    store.requests.retry("p2", now=NOW)
    store.requests.retry_children("p2", now=NOW)
    answer_all(store)
    end_run(store)
    store.requests.remove("p1")


#: Lists, claims and what else is done with the lock held or for each page.
READS: dict[str, Callable[[Store], object]] = {
    "claim": lambda store: claim(store),
    "claim deliveries": lambda store: claim_due(store, now=after(99), limit=9, per_owner=4),
    "list requests": lambda store: [
        store.requests.list(state=state, before=before)
        for state in (None, RequestState.FAILED, RequestState.CANCELLED)
        for before in (None, 9)
    ],
    "list batches": lambda store: [store.batches.list(key_id=key, before=9) for key in (None, "k")],
    "read a batch": lambda store: (
        store.batches.get("b"),
        store.batches.progress("b"),
        store.batches.results("b"),
        store.batches.items("b"),
        store.batches.refused_items("b"),
    ),
    "list deliveries": lambda store: [
        store.webhooks.list_deliveries(status=status) for status in (None, "pending", "delivered", "dead")
    ],
    "search": lambda store: [
        store.search.find(Query(status=status, key_id=key, model=model, labels=labels), before=before)
        for status in (None, "queued", "claimed", "done", "failed", "cancelled", "expired")
        for key in (None, "k")
        for model in (None, MODEL)
        for labels in ((), (("a", "b"),))
        for before in (None, 9)
    ],
    "lists of operators": lambda store: (
        store.stats.list_answered(limit=9),
        store.stats.list_failures(limit=9),
        store.stats.list_failed_chunks(limit=9),
        store.stats.list_unfinished_chunks(limit=9),
        store.chunks.list(),
        store.chunks.throughput(MODEL),
    ),
    "usage": lambda store: [
        store.usage.list(since=NOW.date(), until=NOW.date(), by=by, key_id=key)
        for by in ((), ("day",), ("day", "key", "model", "client"))
        for key in (None, "k")
    ],
    "purge usage": lambda store: store.usage.purge(before=after(9e7)),
    "feed": lambda store: (store.changes.list(0), store.changes.latest(), store.changes.snapshot(ids=["b-1"])),
    "add": lambda store: add_batch(store, 2, id="again", digest=DIGEST, key_id="k"),
    "cancel and retry": lambda store: (store.batches.cancel("b", now=NOW), store.batches.retry("b", now=NOW)),
    "finish": answer_all,
    "fail and release": lambda store: (
        fail_all(store),
        store.requests.release([], blame=Blame.NOBODY, code="c", reason="r", now=NOW),
        store.requests.release_expired(after(999)),
        store.requests.expire(after(999)),
        store.requests.renew([], lease_ends_at=NOW),
    ),
    "purge": lambda store: purge(store, images=999, results=999, at=999),
    "purge deliveries": lambda store: store.webhooks.purge(before=after(999)),
    "interrupted batches": lambda store: store.batches.finish_interrupted(now=after(999)),
    "pipelines": lambda store: run_pipelines(store),
    "endpoints": lambda store: (
        store.webhooks.disable_endpoint("we_1", reason="x", now=NOW),
        store.webhooks.remove_endpoint("we_1"),
    ),
}
#: Tables with few rows, and rows that other parts of a statement have found.
WALKED = (
    "json_each",
    "pipeline_runs_ready",
    "totals_pipelines",
    "CONSTANT ROW",
    "endpoints",
    "found",
    "queued",
    "backlog",
    "counted",
    "sqlite_seq",
    "(subquery",
)
#: These walk down a table from its end, or walk over it without the lock.
UNFILTERED = ("list requests", "list batches", "list deliveries", "search", "lists of operators", "feed", "purge")


@pytest.mark.parametrize("name", READS)
def test_every_list_and_claim_uses_an_index(
    store: Store, home: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_endpoint(store)
    add_batch(store, 3, webhook="https://example.net/x", deadline_at=after(99))
    seen = record_statements(store, monkeypatch)

    with opened(home) as recorded:
        seen.clear()
        READS[name](recorded)
    monkeypatch.undo()

    plans: dict[str, list[str]] = {}
    with sqlite3.connect(home / "mlg.db") as connection:
        for sql, parameters in seen.items():
            if sql.split(None, 1)[0] in ("SELECT", "UPDATE", "DELETE", "WITH"):
                plans[sql] = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", parameters)]
    connection.close()
    assert plans
    for sql, plan in plans.items():
        # Requests that may not be claimed yet are passed over in the index.
        assert not [line for line in plan if "USING INDEX requests_queued" in line], (sql, plan)
        scans = [line for line in plan if line.startswith("SCAN") and not any(word in line for word in WALKED)]
        if name not in UNFILTERED:
            assert scans == [], (sql, plan)
        if name not in (
            "feed",
            "lists of operators",
            "purge",
            "read a batch",
            "fail and release",
            "finish",
            "pipelines",
            "usage",
        ):
            sorts = [line for line in plan if "TEMP B-TREE" in line and "GROUP BY" not in line]
            assert sorts == [], (sql, plan)


def test_providers_that_only_made_offers_are_forgotten_after_a_month(store: Store) -> None:
    prices = dict.fromkeys(("start_price", "price_per_cpu_second", "price_per_second"), Decimal(1))
    for number in range(MANY):
        store.providers.record_offer(f"0x{number}", name="p", now=NOW, **prices)
    store.providers.record_offer("0x0", name="p", now=NOW + timedelta(days=1), **prices)
    work = {"model": MODEL, "images": 1, "seconds": 1.0, "now": NOW}
    store.providers.record_work("0x1", is_failure=False, **work)
    store.providers.record_work("0x2", is_failure=True, **work)
    store.providers.ban("0x3", until=None, reason="r", by_operator=True)

    for days in (30, 30.5):
        count = len(store.providers.list())
        long_ago = NOW - timedelta(days=99)
        store.retention.purge(images_before=long_ago, results_before=long_ago, now=NOW + timedelta(days=days))

    assert count == MANY
    assert {each.id for each in store.providers.list()} == {"0x0", "0x1", "0x2", "0x3"}
    assert store.providers.scores().keys() == {"0x1", "0x2"}


def count_steps(home: Path, work: Callable[[Store], object]) -> int:
    """Count what SQLite does for some reads and writes, in hundreds of its instructions."""
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    class Counting(sqlite3.Connection):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.set_progress_handler(count, 100)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("store.database.sqlite3.connect", functools.partial(sqlite3.connect, factory=Counting))
        with opened(home) as counted:
            steps = 0
            work(counted)
    return steps


@pytest.mark.parametrize("name", ["claim deliveries", "one failed of a key", "images to delete", "dead deliveries"])
def test_work_does_not_grow_with_the_rows_that_are_passed_over(tmp_path: Path, name: str) -> None:
    def history(home: Path, count: int) -> None:
        with opened(home) as store:
            add_endpoint(store)
            add_batch(store, 1, id="failed", key_id="k")
            fail_all(store)
            add_batch(store, count, key_id="k")
            answer_all(store)
            purge(store, images=1, results=-9, at=1)
            store.changes.purge(before=after(999))

    work: dict[str, Callable[[Store], object]] = {
        "claim deliveries": lambda store: claim_due(store, now=after(9), limit=4, per_owner=4),
        "one failed of a key": lambda store: store.search.find(Query(key_id="k", status="failed")),
        "images to delete": lambda store: purge(store, images=2, results=-9, at=-9),
        "dead deliveries": lambda store: store.webhooks.list_deliveries(status="dead"),
    }
    history(tmp_path / "small", 20)
    history(tmp_path / "large", 400)

    small, large = (count_steps(tmp_path / size, work[name]) for size in ("small", "large"))

    assert small > 0
    # A search in a larger index takes a step more; passing over 380 rows takes thousands.
    assert large < small + 15


def test_equal_images_do_not_slow_each_other_down(tmp_path: Path) -> None:
    def add(store: Store, first: int, count: int) -> None:
        for number in range(first, first + count):
            new = NewRequest(id=f"r{number}", service="s", model=MODEL, created_at=NOW, digest=DIGEST, is_fresh=False)
            store.requests.add(new, store.images.stage(b"x"))

    with opened(tmp_path / "home") as store:
        add(store, 0, 20)
    few = count_steps(tmp_path / "home", lambda store: add(store, 20, 1))
    with opened(tmp_path / "home") as store:
        add(store, 21, 400)

    assert count_steps(tmp_path / "home", lambda store: add(store, 421, 1)) < few + 10


# Batches in slices


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_before_commit(store: Store, position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this commit of a store fail, and all that follow: the process is dead then."""
    real, left = store.database.write, position

    def write(function: Callable[[Transaction], Any]) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return real(function)

    monkeypatch.setattr(store.database, "write", write)


def is_visible(store: Store) -> bool:
    """Tell whether anything shows a batch and its requests; all that could must agree."""
    found = {
        "list": bool(store.requests.list()),
        "search": bool(store.search.find(Query(labels=tuple(LABELS.items())[:1])).requests),
        "search by key": bool(store.search.find(Query(key_id="k")).requests),
        "batches": bool(store.batches.list()),
        "backlog": bool(sum(each.waiting for each in store.requests.backlog())),
    }
    assert len(set(found.values())) == 1, found
    return found["list"]


def killed_at_each_commit(
    prepared: Path, homes: Path, add: Callable[[Store], object], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    """Add a batch on copies of a home, in a process that dies before its first, second, ... commit; the last does not.

    Each store is opened again by another process.
    """
    monkeypatch.setattr("store.batches.ROWS_PER_COMMIT", 2)
    for position in range(100):
        home = homes / str(position)
        shutil.copytree(prepared, home)
        with opened(home) as store:
            kill_before_commit(store, position, monkeypatch)
            try:
                add(store)
                is_killed = False
            except Killed:
                is_killed = True
        with opened(home) as store:
            yield store
        if not is_killed:
            return


def test_a_large_batch_is_there_whole_or_not_at_all_wherever_its_process_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path / "prepared"):
        pass
    add = functools.partial(add_batch, count=5, labels=LABELS, refused=3, key_id="k", deadline_at=after(5))
    shown = []
    for store in killed_at_each_commit(tmp_path / "prepared", tmp_path / "homes", add, monkeypatch):
        shown.append(is_visible(store))
        claimed = claim(store, limit=1, at=after(1))
        if not shown[-1]:
            assert (claimed, store.requests.expire(after(9))) == ([], 0)
            with pytest.raises(UnknownBatch):
                store.batches.get("b")
            with pytest.raises(UnknownBatch):
                store.batches.cancel("b", now=NOW)

        purge(store, images=-9, results=-9, at=2 * ARRIVAL_SECONDS)

        assert is_visible(store) == shown[-1]
        rows = [len(store.database.rows(f"SELECT * FROM {table}")) for table in ("batch_refusals", "request_labels")]
        assert [*rows, len(store.requests.list()), len(list(store.images.list_digests()))] == (
            [3, 5 * len(LABELS), 5, 5] if shown[-1] else [0, 0, 0, 0]
        )
        assert len(claimed) + len(claim(store)) == 5 * shown[-1]

    # Three slices of requests, two of refused items, the batch itself and showing it come before it is visible, and the
    # end of its arrival after that.
    assert shown == [False] * 7 + [True] * 2


def test_what_follows_from_a_large_batch_of_known_images_follows_once_wherever_its_process_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path / "prepared") as store:
        add_batch(store, 4)
        answer_all(store)
        add_endpoint(store)
    before = None
    add = functools.partial(add_batch, count=5, id="again", digest=DIGEST, webhook="https://example.net/batch")
    cached, claimed = [], []
    for store in killed_at_each_commit(tmp_path / "prepared", tmp_path / "homes", add, monkeypatch):
        is_shown = len(store.batches.list()) == 2
        before = before or read_facts(store)
        # Not before it has its earlier answers.
        claimed.append(len(claim(store, at=after(1))))
        cached.append(sum(request.is_cached for request in store.requests.list()))

        store.requests.release_expired(after(2 * ARRIVAL_SECONDS))
        answer_all(store, after(2 * ARRIVAL_SECONDS))

        facts = read_facts(store)
        ended = [key for key in (facts.deliveries - before.deliveries).elements() if key[2] == "batch.done"]
        if is_shown:
            assert sorted(key[1] for key in ended) == ["https://example.net/batch", "https://example.org/hook"]
            assert [number for number, _ in store.batches.results("again")] == [1, 2, 3, 4, 5]
        else:
            assert (ended, facts.changes) == ([], before.changes)

    assert sorted(set(cached)) == [0, 2, 4]
    assert cached == sorted(cached)
    assert claimed == [0] * (len(claimed) - 1) + [1]


def test_a_batch_that_was_refused_as_a_whole_reports_its_end(store: Store) -> None:
    add_endpoint(store)

    add_batch(store, 0, refused=2, webhook="https://example.net/own")

    due = claim_due(store, now=after(1))
    assert sorted((one.event, one.subject, one.url) for one in due) == [
        ("batch.done", "b", "https://example.net/own"),
        ("batch.done", "b", "https://example.org/hook"),
    ]


def test_a_large_batch_over_the_quota_leaves_nothing_and_is_not_counted(store: Store) -> None:
    scopes = frozenset({Scope.SUBMIT})
    key = KeyRecord(id="k" * 12, name="k", sha256="0" * 64, scopes=scopes, images_per_day=MANY, created_at=NOW)
    store.keys.add(key)

    with pytest.raises(QuotaReached):
        add_batch(store, MANY + 1, labels=LABELS, key_id=key.id, refused=MANY)
    used = store.keys.images_used(key.id, now=NOW)
    left = [store.database.rows(f"SELECT * FROM {table}") for table in ("requests", "batches", "batch_refusals")]
    add_batch(store, MANY - 9, key_id=key.id, refused=9)

    assert (used, left) == (0, [[], [], []])
    assert store.keys.images_used(key.id, now=NOW) == MANY
    assert len(files(store)) == MANY - 9


def test_a_process_that_adds_too_slowly_does_not_add_to_a_batch_that_was_given_up(store: Store, home: Path) -> None:
    real, count = store.database.write, 0

    def write(function: Callable[[Transaction], Any]) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            with opened(home) as other:
                purge(other, images=-9, results=-9, at=2 * ARRIVAL_SECONDS)
        return real(function)

    store.database.write = write  # type: ignore[method-assign,assignment]

    with pytest.raises(StoreError, match="too long"):
        add_batch(store, MANY)

    assert (store.database.rows("SELECT * FROM requests"), files(store)) == ([], [])


# Files


def test_files_are_deleted_only_after_the_commit(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    add_batch(store, 2)
    answer_all(store)

    def fail(transaction: Transaction) -> None:
        raise OSError("the power is cut before the commit")

    with monkeypatch.context() as patch:
        patch.setattr(Transaction, "sync_published", fail)
        for delete in (
            lambda: store.requests.remove("b-0"),
            lambda: store.batches.remove("b"),
            lambda: purge(store, images=1, results=-9, at=1),
            lambda: purge(store, images=1, results=1, at=1),
        ):
            with pytest.raises(OSError, match="power"):
                delete()
            assert len(files(store)) == len(store.requests.list()) == 2


@pytest.mark.parametrize("results", [-9, 1])
def test_a_purge_finds_files_that_a_crash_after_the_commit_left(
    store: Store, monkeypatch: pytest.MonkeyPatch, results: float
) -> None:
    add_batch(store, 2)
    answer_all(store)

    def fail(images: ImageStore, sha256: str) -> bool:
        raise OSError("the power is cut after the commit")

    with monkeypatch.context() as patch:
        patch.setattr(ImageStore, "delete", fail)
        store.retention.purge(images_before=after(1), results_before=after(results), now=NOW)
        left = files(store)
    report = store.retention.purge(images_before=after(1), results_before=after(results), now=NOW)

    assert (len(left), files(store), report.leftovers) == (2, [], 2)


def test_a_file_that_is_needed_again_meanwhile_is_kept(store: Store) -> None:
    add_batch(store, 1)
    answer_all(store)
    store.database.write(lambda transaction: transaction.delete_files(store.images.list_digests()))

    assert len(files(store)) == 1


# What webhooks say of what was deleted


@pytest.mark.parametrize("delete", ["request", "batch", "purge"])
def test_what_a_webhook_said_goes_with_the_request(store: Store, delete: str) -> None:
    add_endpoint(store)
    add_batch(store, 1, refused=1)
    answer_all(store)
    now = datetime.now(UTC)
    due = claim_due(store, now=now, payload="what the client sent")
    assert [one.payload for one in due] == ["what the client sent"] * 2
    for one in due:
        finish(store, one, now=NOW)

    if delete == "request":
        store.requests.remove("b-0")
        purge(store, images=9, results=9, at=9)
    elif delete == "batch":
        store.batches.remove("b")
    else:
        purge(store, images=9, results=9, at=9)

    assert [one.payload for one in store.webhooks.list_deliveries()] == [None, None]
    # A sender that had built it before is too late.
    store.webhooks.redeliver(due[0].id, now=NOW)
    assert [one.payload for one in claim_due(store, now=now, payload="what the client sent")] == [None]


# Progress


def test_a_busy_database_does_not_lose_an_accepted_batch(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    add_batch(store, 4)
    answer_all(store)
    monkeypatch.setattr("store.batches.ROWS_PER_COMMIT", 2)
    real, count = store.database.write, 0

    def write(function: Callable[[Transaction], Any]) -> Any:
        nonlocal count
        count += 1
        if count > 5:
            raise StoreBusy
        return real(function)

    monkeypatch.setattr(store.database, "write", write)
    batch = BatchRecord(id="again", service="classification", model=MODEL, created_at=NOW)
    new = [
        NewRequest(id=f"a{n}", service="classification", model=MODEL, created_at=NOW, batch_id="again", digest=DIGEST)
        for n in range(4)
    ]

    added = store.batches.add(batch, [(each, store.images.stage(b"%d" % n)) for n, each in enumerate(new)], [])

    assert [request.id for request in added] == ["a0", "a1", "a2", "a3"]
    assert [request.state for request in added] == ["done", "done", "queued", "queued"]

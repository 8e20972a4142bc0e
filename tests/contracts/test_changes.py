"""Contract of the change feed: a reader that resumes at any time gets each change exactly once, in order."""

from __future__ import annotations

import random
import tempfile
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.auth.cursors import Cursors
from server.live.changes import ChangeDispatcher, Listener
from server.live.sse import stream_requests
from store import new_id
from store.database import Transaction
from store.requests import Answer, Blame, Claim, NewRequest
from store.states import RequestState
from store.store import Store
from store.transition import transition
from tests.contracts.conftest import OpenStore

MODEL = "m"
NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def add(store: Store, **changes: object) -> str:
    new = NewRequest(id=new_id(), service="s", model=MODEL, created_at=NOW, **changes)  # type: ignore[arg-type]
    return store.requests.add(new, store.images.stage(new.id.encode())).id


def claim(store: Store, limit: int = 100) -> list[Claim]:
    return store.requests.claim(
        models=[MODEL], limit=limit, now=NOW, lease_ends_at=NOW + timedelta(seconds=30), oldest_before=None
    )


def answer_of(claimed: Claim) -> Answer:
    return Answer(claim=claimed, output=[1], digest="d" * 64, chunk_id="c", provider="p", seconds=0.1)


def test_being_added_is_no_change_and_every_other_transition_is_one(store: Store) -> None:
    id = add(store)
    number = store.requests.get(id).number
    before = store.changes.latest()

    (claimed,) = claim(store)
    store.requests.release([claimed], blame=Blame.NOBODY, code="x", reason="y", now=NOW)
    store.requests.cancel(id, now=NOW)
    store.requests.retry(id, now=NOW)
    store.requests.finish([answer_of(one) for one in claim(store)], now=NOW)

    changes = store.changes.list(0)
    assert before == 0
    assert [change.state for change in changes] == [
        RequestState.CLAIMED,
        RequestState.QUEUED,
        RequestState.CANCELLED,
        RequestState.QUEUED,
        RequestState.CLAIMED,
        RequestState.DONE,
    ]
    assert {change.number for change in changes} == {number}
    assert store.changes.latest() == changes[-1].seq
    assert store.changes.count(changes[2].seq) == (
        changes[-1].seq,
        {RequestState.QUEUED: 1, RequestState.CLAIMED: 1, RequestState.DONE: 1},
    )


def test_a_reused_answer_is_a_change(store: Store) -> None:
    new = NewRequest(id=new_id(), service="s", model=MODEL, digest="d" * 64, created_at=NOW)
    store.requests.add(new, store.images.stage(b"x"))
    store.requests.finish([answer_of(one) for one in claim(store)], now=NOW)
    last = store.changes.latest()

    again = NewRequest(id=new_id(), service="s", model=MODEL, digest="d" * 64, created_at=NOW)
    added = store.requests.add(again, store.images.stage(b"x"))

    assert [(change.number, change.state) for change in store.changes.list(last)] == [(added.number, RequestState.DONE)]


def test_a_write_that_is_rolled_back_is_no_change(store: Store) -> None:
    add(store)

    def fail(transaction: Transaction) -> None:
        assert transition(transaction, RequestState.CANCELLED, "true", [{}], now=NOW)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.database.write(fail)

    assert store.changes.list(0) == []


def test_the_position_of_a_request_is_its_last_change(store: Store) -> None:
    ids = [add(store) for _ in range(3)]
    store.requests.cancel(ids[1], now=NOW)
    store.requests.cancel(ids[0], now=NOW)

    snapshot = store.changes.snapshot(ids=[*ids, "unknown"])
    read = store.changes.read_changed([number for (_, number), _ in snapshot.requests] + [99])

    assert (snapshot.latest, snapshot.floor) == (2, 0)
    assert snapshot.requests == (
        ((0, 3), RequestState.QUEUED),
        ((1, 2), RequestState.CANCELLED),
        ((2, 1), RequestState.CANCELLED),
    )
    found = [(position, request.id) for position, request in read]
    assert found == [((0, 3), ids[2]), ((1, 2), ids[1]), ((2, 1), ids[0])]


def test_old_changes_are_deleted_except_the_last(store: Store) -> None:
    ids = [add(store) for _ in range(3)]
    for id in ids:
        store.requests.cancel(id, now=NOW)

    assert store.changes.purge(before=datetime(2000, 1, 1, tzinfo=UTC)) == 0
    assert store.changes.purge(before=datetime.now(UTC) + timedelta(days=1)) == 2
    snapshot = store.changes.snapshot(ids=ids)
    assert (snapshot.floor, snapshot.latest) == (2, 3)
    assert [position for position, _ in snapshot.requests] == [(2, 1), (2, 2), (3, 3)]


@settings(max_examples=10, deadline=None)
@given(writes=st.lists(st.sampled_from("carf"), max_size=25), seed=st.integers(0, 2**32))
def test_a_reader_that_resumes_anywhere_misses_nothing_and_gets_nothing_twice(
    open_store: OpenStore, writes: list[str], seed: int
) -> None:
    """Two stores write while a reader reads pages of any size and resumes from where it stopped."""
    with tempfile.TemporaryDirectory() as folder:
        stores = [open_store(Path(folder)) for _ in range(2)]
        ids = [add(stores[0]) for _ in range(12)]
        choose = random.Random(seed)

        def write(place: int) -> None:
            store, held = stores[place], []
            for kind in writes:
                if kind == "c":
                    held += claim(store, limit=3)
                elif kind == "a":
                    store.requests.finish([answer_of(one) for one in held[:2]], now=NOW)
                    held = held[2:]
                elif kind == "r":
                    store.requests.release(held, blame=Blame.NOBODY, code="x", reason="y", now=NOW)
                    held = []
                else:
                    store.requests.fail(held[:1], code="x", reason="y", now=NOW)
                    held = held[1:]

        threads = [threading.Thread(target=write, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        cursor, seen = 0, []
        is_last_round = False
        while not is_last_round:
            is_last_round = not any(thread.is_alive() for thread in threads)
            reader = stores[choose.randint(0, 1)]
            while page := reader.changes.list(cursor, limit=choose.randint(1, 7)):
                seen += page
                cursor = page[-1].seq

        assert [change.seq for change in seen] == sorted({change.seq for change in seen})
        assert seen == stores[0].changes.list(0, limit=10_000)
        last = {change.number: change.state for change in seen}
        for id in ids:
            request = stores[0].requests.get(id)
            assert request.state is last.get(request.number, RequestState.QUEUED)
        for store in stores:
            store.close()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_stream_that_is_cut_anywhere_sends_every_last_state_once(open_store: OpenStore, seed: int) -> None:
    choose = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(Path(folder))
        ids = [add(store) for _ in range(10)]
        numbers = [store.requests.get(id).number for id in ids]
        events = ChangeDispatcher(store.changes, store.progress, capacity=1)
        cursors = Cursors(Path(folder)).codec("events", None)

        def work() -> None:
            for size in (3, 2, 4, 10):
                store.requests.finish([answer_of(one) for one in claim(store, limit=size)], now=NOW)

        worker = threading.Thread(target=work)
        received: list[tuple[str, str]] = []
        last_id: str | None = None
        is_over = False
        worker.start()
        while not is_over:
            listener = Listener(numbers=numbers, is_allowed=lambda: True)
            pieces = stream_requests(
                events,
                store.changes,
                listener,
                ids=ids,
                cursors=cursors,
                last_id=last_id,
                serialize=lambda request: {"id": request.id, "state": request.state},
            )
            for _ in range(choose.randint(1, 8)):
                text = next(pieces, b"event: end").decode()
                if "event: request" in text:
                    last_id = text.split("id: ", 1)[1].split("\n", 1)[0]
                    received.append((text.split('"id":"', 1)[1][:32], text.split('"state":"', 1)[1].split('"', 1)[0]))
                is_over = is_over or "event: end" in text
            pieces.close()
        worker.join()

        done = Counter(id for id, state in received if state == "done")
        assert done == Counter(ids)
        assert max(Counter(received).values()) == 1
        last = cursors.read(last_id or "")
        assert last is not None and last[0] == store.changes.latest()
        store.close()

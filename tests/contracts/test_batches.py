"""What every Batches, Listing and Idempotency must do. A new implementation adds a parameter to `store`, not tests."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store import new_id
from store.batches import BatchInProgress, BatchRecord, BatchStopped, RefusedItem, UnknownBatch
from store.chunks import ChunkRecord
from store.clients.idempotency import MIN_BYTES, EarlierRequest, Idempotency, KeyReservation, SavedResponse
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.clients.webhooks import EndpointRecord
from store.errors import NotRemovable, QuotaReached, StoreUnavailable, UnknownRequest
from store.images import StagedImage
from store.requests import ROWS_PER_COMMIT, Answer, Claim, NewRequest, Replacement, RequestRecord
from store.search import Query
from store.states import RequestState
from store.store import Store
from tests.conftest import ROOT
from tests.contracts.conftest import OpenStore
from tests.process_tree import ends_with_tests
from tests.timing import DEADLINE_SECONDS

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
MODEL = "resnet50"
OUTPUT = [["n02123159", "tiger_cat", 0.408]]
DIGEST = "d" * 64


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def new_request(**changes: object) -> NewRequest:
    facts = {"id": new_id(), "service": "classification", "model": MODEL, "created_at": NOW, **changes}
    return NewRequest(**facts)  # type: ignore[arg-type]


def add(store: Store, data: bytes = b"image", **changes: object) -> RequestRecord:
    return store.requests.add(new_request(**changes), store.images.stage(data))


def batch_of(store: Store, count: int, **changes: object) -> tuple[BatchRecord, list[RequestRecord]]:
    batch = BatchRecord(id=new_id(), service="classification", model=MODEL, created_at=NOW)
    items: list[tuple[NewRequest, StagedImage]] = [
        (new_request(batch_id=batch.id, client_id=f"item {n}", **changes), store.images.stage(b"%d" % n))
        for n in range(count)
    ]
    return batch, store.batches.add(batch, items, [RefusedItem(position=count, client_id="bad", code="c", reason="r")])


def claim(store: Store, limit: int = 1000, at: datetime = NOW) -> list[Claim]:
    return store.requests.claim(
        models={MODEL}, limit=limit, now=at, lease_ends_at=at + timedelta(seconds=30), oldest_before=None
    )


def answer(one: Claim, chunk_id: str = "c1") -> Answer:
    return Answer(claim=one, output=OUTPUT, digest=DIGEST, chunk_id=chunk_id, provider="local", seconds=0.01)


# Batches


def test_a_batch_is_read_back_with_its_requests_in_order_and_its_refused_items(store: Store) -> None:
    batch, added = batch_of(store, 3)

    found = store.batches.get(batch.id)

    assert (found.total, found.refused, found.number) == (3, 1, 1)
    assert [request.client_id for request in store.batches.items(batch.id)] == ["item 0", "item 1", "item 2"]
    assert [request.id for request in added] == [request.id for request in store.batches.items(batch.id)]
    assert store.batches.refused_items(batch.id) == [RefusedItem(position=3, client_id="bad", code="c", reason="r")]
    assert store.batches.list() == [found]


def test_an_unknown_batch_is_an_error(store: Store) -> None:
    for call in (store.batches.get, store.batches.remove):
        with pytest.raises(UnknownBatch):
            call("nope")
    with pytest.raises(UnknownBatch):
        store.batches.cancel("nope", now=NOW)


def test_a_batch_that_cannot_be_added_leaves_nothing(store: Store) -> None:
    batch = BatchRecord(id=new_id(), service="classification", model=MODEL, created_at=NOW)
    good, bad = store.images.stage(b"good"), store.images.stage(b"bad")
    bad.path.unlink()

    with pytest.raises(StoreUnavailable):
        store.batches.add(batch, [(new_request(batch_id=batch.id), good), (new_request(batch_id=batch.id), bad)], [])

    assert (store.requests.list(), store.batches.list()) == ([], [])
    assert [path for path in store.images.folder.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("count", [3, 120])
def test_what_the_requests_of_a_batch_share_is_stored_once_and_leaves_nothing_after_a_failure(
    store: Store, count: int
) -> None:
    batch = BatchRecord(id=new_id(), service="classification", model=MODEL, created_at=NOW)
    items = [(new_request(batch_id=batch.id), store.images.stage(b"%d" % number)) for number in range(count)]
    broken = [(new_request(batch_id="other"), store.images.stage(b"other %d" % number)) for number in range(count)]
    broken[-1][1].path.unlink()

    added = store.batches.add(batch, items, [], shared={"style": store.images.stage(b"style")})
    with pytest.raises(StoreUnavailable):
        other = replace(batch, id="other")
        store.batches.add(other, broken, [], shared={"style": store.images.stage(b"another style")})

    assert {store.images.read(one.inputs["style"].sha256) for one in added} == {b"style"}
    assert [one.number for one in store.requests.list(limit=1000)] == [one.number for one in reversed(added)]
    assert sum(path.is_file() for path in store.images.folder.rglob("*")) == count + 1


def test_progress_counts_requests_by_state(store: Store) -> None:
    batch, _ = batch_of(store, 8)
    claims = claim(store, 4)
    store.requests.finish([answer(claims[0])], now=after(1))
    store.requests.fail([claims[1]], code="broken_image", reason="It is broken.", now=after(1))

    progress = store.batches.progress(batch.id)

    counts = (progress.queued, progress.claimed, progress.done, progress.failed, progress.cancelled, progress.expired)
    assert counts == (4, 2, 1, 1, 0, 0)
    assert (progress.waiting, progress.ended, progress.failures) == (6, 2, {"broken_image": 1})
    assert progress.last_number == 8
    assert progress.cost is None


def test_the_cost_of_a_batch_is_the_exact_sum_of_its_shares(store: Store) -> None:
    batch, _ = batch_of(store, 7)
    store.chunks.start(
        ChunkRecord(
            id="c1",
            batcher_id="b",
            executor="golem",
            provider=None,
            service="classification",
            model=MODEL,
            items=7,
            bytes_sent=1,
            bytes_received=None,
            dispatched_at=NOW,
            finished_at=None,
            seconds=None,
            done=0,
            failed=0,
            cost=None,
            code=None,
            reason=None,
        )
    )
    store.requests.finish([answer(one) for one in claim(store)], now=after(1))
    store.chunks.finish(
        "c1",
        provider="p",
        bytes_received=1,
        seconds=1.0,
        done=7,
        failed=0,
        cost="0.1",
        code=None,
        reason=None,
        now=after(1),
    )

    progress = store.batches.progress(batch.id)

    assert progress.cost == Decimal("0.1")
    assert progress.cost == sum(request.cost or 0 for request in store.batches.items(batch.id))
    assert not progress.is_cost_final


def test_batches_that_share_a_chunk_share_its_cost(store: Store) -> None:
    batches = [batch_of(store, count)[0] for count in (3, 4)]
    chunk = {"id": "c1", "batcher_id": "b", "executor": "golem", "service": "classification", "model": MODEL}
    store.chunks.start(ChunkRecord(**chunk, items=7, bytes_sent=1, dispatched_at=NOW))  # type: ignore[arg-type]
    store.requests.finish([answer(one) for one in claim(store)], now=after(1))
    ended = {"bytes_received": 1, "seconds": 1.0, "done": 7, "failed": 0, "code": None, "reason": None}
    store.chunks.finish("c1", provider="p", cost="0.1", now=after(1), **ended)  # type: ignore[arg-type]
    store.requests.remove(store.batches.items(batches[0].id)[0].id)

    costs = [store.batches.progress(batch.id).cost for batch in batches]

    assert costs == [sum(one.cost or 0 for one in store.batches.items(batch.id)) for batch in batches]
    # Ten to the seventeenth divided by seven is 14285714285714285 and 5 left over, one each for the first five.
    assert costs == [Decimal("0.028571428571428572"), Decimal("0.057142857142857142")]


def test_results_are_in_the_order_in_which_they_ended_and_none_is_missed(store: Store) -> None:
    batch, _ = batch_of(store, 6)
    claims = claim(store)
    seen: list[str | None] = []
    mark = 0

    for one in reversed(claims):
        # The times are not in the order of the commits.
        store.requests.finish([answer(one)], now=after(100 - one.number))
        for number, request in store.batches.results(batch.id, after=mark):
            mark = number
            seen.append(request.client_id)

    assert seen == [f"item {n}" for n in reversed(range(6))]


def test_a_reused_answer_is_a_result_at_once(store: Store) -> None:
    add(store, b"0")
    store.requests.finish([answer(one) for one in claim(store)], now=after(1))

    batch, added = batch_of(store, 2, digest=DIGEST)

    assert [request.state for request in added] == [RequestState.DONE, RequestState.QUEUED]
    assert [request.client_id for _, request in store.batches.results(batch.id)] == ["item 0"]


def test_cancelling_a_batch_cancels_only_queued_requests(store: Store) -> None:
    batch, _ = batch_of(store, 20)
    claimed = claim(store, 16)

    assert store.batches.cancel(batch.id, now=after(1)) == 4

    assert store.requests.finish([answer(one) for one in claimed], now=after(2)) == 16
    progress = store.batches.progress(batch.id)
    assert (progress.done, progress.cancelled, progress.waiting) == (16, 4, 0)
    assert store.batches.get(batch.id).cancelled_at == after(1)


def test_retrying_a_batch_queues_only_failed_requests_and_they_end_again(store: Store) -> None:
    batch, _ = batch_of(store, 3)
    claims = claim(store)
    store.requests.fail(claims[:2], code="c", reason="r", now=after(1))
    store.requests.finish([answer(claims[2])], now=after(1))
    mark = store.batches.results(batch.id)[-1][0]

    assert store.batches.retry(batch.id, now=after(2)) == 2

    assert len(store.batches.results(batch.id)) == 1
    store.requests.finish([answer(one) for one in claim(store, at=after(2))], now=after(3))
    assert [request.client_id for _, request in store.batches.results(batch.id, after=mark)] == ["item 0", "item 1"]


def test_a_batch_in_progress_is_not_removed(store: Store) -> None:
    batch, _ = batch_of(store, 2)

    with pytest.raises(BatchInProgress):
        store.batches.remove(batch.id)

    store.batches.cancel(batch.id, now=after(1))
    assert store.batches.remove(batch.id) == 2
    assert (store.requests.list(), store.batches.list(), store.batches.refused_items(batch.id)) == ([], [], [])
    assert list(store.images.list_digests()) == []


# Batches that do earlier requests again


def again(store: Store, earlier: list[RequestRecord], **changes: Any) -> tuple[BatchRecord, list[NewRequest]]:
    """What does requests again with another model."""
    batch = BatchRecord(id=new_id(), service="classification", model="vgg16", created_at=after(9), **changes)
    requests = [
        new_request(model="vgg16", created_at=after(9), batch_id=batch.id, replaces=one.id, client_id=one.client_id)
        for one in earlier
    ]
    return batch, requests


def answer_all(store: Store, model: str, at: datetime = NOW) -> None:
    claims = store.requests.claim(
        models={model}, limit=1000, now=at, lease_ends_at=at + timedelta(seconds=30), oldest_before=None
    )
    store.requests.finish([answer(one) for one in claims], now=at)


def test_a_request_is_done_again_once_with_the_stored_inputs(store: Store) -> None:
    _, earlier = batch_of(store, 3)
    answer_all(store, MODEL)
    batch, requests = again(store, earlier)

    added = store.batches.add_replacements(batch, requests, charged_key_id=None)
    repeated = store.batches.add_replacements(*again(store, earlier), charged_key_id=None)

    assert (added, repeated) == ((3, None), (0, None))
    assert (store.batches.get(batch.id).total, len(store.batches.list())) == (3, 2)
    later = store.batches.items(batch.id)
    assert [(one.image_sha256, one.image_bytes, one.replaces, one.client_id) for one in later] == [
        (one.image_sha256, one.image_bytes, one.id, one.client_id) for one in earlier
    ]
    assert store.requests.get(earlier[0].id).replaced_by is None
    answer_all(store, "vgg16", after(10))
    found = store.requests.get(earlier[0].id)
    assert (found.output, found.replaced_by) == (OUTPUT, Replacement(id=later[0].id, model="vgg16"))
    assert store.batches.progress(batch.id).done == 3
    store.requests.remove(earlier[0].id)
    assert store.images.read(later[0].image_sha256) == b"0"


def test_a_request_without_inputs_is_not_done_again(store: Store) -> None:
    _, earlier = batch_of(store, 2)
    answer_all(store, MODEL)
    store.retention.purge(images_before=after(5), results_before=after(-5), now=after(5))
    batch, requests = again(store, earlier)

    assert store.batches.add_replacements(batch, requests, charged_key_id=None) == (0, None)
    with pytest.raises(UnknownBatch):
        store.batches.get(batch.id)


def test_doing_requests_again_ends_with_the_quota_and_goes_on_later(store: Store) -> None:
    id, key = make_key()
    scopes = frozenset({Scope.SUBMIT})
    store.keys.add(
        KeyRecord(id=id, name="a", sha256=hash_key(key), scopes=scopes, images_per_day=ROWS_PER_COMMIT, created_at=NOW)
    )
    _, earlier = batch_of(store, ROWS_PER_COMMIT + 10)
    answer_all(store, MODEL)

    batch, requests = again(store, earlier)
    added, stopped_by = store.batches.add_replacements(batch, requests, charged_key_id=id)
    rest, more = again(store, earlier)
    later = store.batches.add_replacements(rest, more, charged_key_id=None)

    assert (added, type(stopped_by), store.batches.get(batch.id).total) == (ROWS_PER_COMMIT, QuotaReached, added)
    assert (later, store.batches.get(rest.id).total) == ((10, None), 10)
    assert store.keys.images_used(id, now=NOW) == ROWS_PER_COMMIT
    ids = [one.replaces for one in (*store.batches.items(batch.id), *store.batches.items(rest.id))]
    assert ids == [one.id for one in earlier]


def test_what_does_requests_again_is_claimed_when_all_is_added_and_stops_when_it_is_cancelled(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.webhooks.add_endpoint(
        EndpointRecord(id="e", url="https://a.example/", secret="s", events=("batch.done",), created_at=NOW)
    )
    _, earlier = batch_of(store, ROWS_PER_COMMIT + 10)
    answer_all(store, MODEL)
    batch, requests = again(store, earlier)
    claimed: list[Claim] = []
    write_each = store.database.write_each

    def interrupt(writes: Any) -> Any:
        for number, found in enumerate(write_each(writes)):
            yield found
            if number == 0:
                claimed.extend(
                    store.requests.claim(
                        models={"vgg16"}, limit=9, now=after(9), lease_ends_at=after(30), oldest_before=None
                    )
                )
                monkeypatch.undo()
                store.batches.cancel(batch.id, now=after(9))

    monkeypatch.setattr(store.database, "write_each", interrupt)

    added, stopped_by = store.batches.add_replacements(batch, requests, charged_key_id=None)

    assert (claimed, added, type(stopped_by)) == ([], ROWS_PER_COMMIT, BatchStopped)
    assert store.batches.progress(batch.id).cancelled == ROWS_PER_COMMIT
    ends = [one.subject for one in store.webhooks.list_deliveries()]
    assert ends.count(batch.id) == 1


# Deadlines and retention


def test_queued_requests_expire_at_their_deadline_and_claimed_ones_are_finished(store: Store) -> None:
    late = add(store, b"1", deadline_at=after(10))
    held = claim(store)
    early, never = add(store, b"2", deadline_at=after(10)), add(store, b"3")

    assert store.requests.expire(after(9.9)) == 0
    assert store.requests.expire(after(10)) == 1

    expired = store.requests.get(early.id)
    assert (expired.state, expired.status, expired.code) == (RequestState.CANCELLED, "expired", "expired")
    assert store.requests.get(never.id).state is RequestState.QUEUED
    assert store.requests.finish([answer(one) for one in held], now=after(11)) == 1
    assert store.requests.get(late.id).state is RequestState.DONE


def test_an_expired_request_that_is_retried_has_no_deadline(store: Store) -> None:
    request = add(store, deadline_at=after(10))
    store.requests.expire(after(10))

    again = store.requests.retry(request.id, now=after(20))

    assert (again.status, again.code, again.reason, again.deadline_at) == ("queued", None, None, None)
    assert store.requests.expire(after(30)) == 0


def test_a_shorter_retention_time_of_a_request_applies(store: Store) -> None:
    short, usual = add(store, b"1", keep_seconds=60), add(store, b"2")
    store.requests.finish([answer(one) for one in claim(store)], now=NOW)
    long_ago = NOW - timedelta(days=30)

    for seconds, left in ((59.9, 2), (60.1, 1)):
        store.retention.purge(images_before=long_ago, results_before=long_ago, now=after(seconds))
        assert len(store.requests.list()) == left

    assert store.requests.get(usual.id).state is RequestState.DONE
    assert not store.images.path(short.image_sha256).exists()


def test_a_batch_is_deleted_with_its_last_request(store: Store) -> None:
    batch, _ = batch_of(store, 2)
    store.requests.finish([answer(one) for one in claim(store)], now=NOW)

    store.retention.purge(images_before=after(1), results_before=after(1), now=after(1))

    assert store.batches.list() == []
    assert store.batches.refused_items(batch.id) == []


# Search


def test_each_filter_narrows_a_search(store: Store) -> None:
    batch, items = batch_of(store, 2)
    named = add(store, b"a", name="Summer_100%.JPG", model="vgg16", created_at=after(10))
    labelled = add(store, b"b", labels={"place": "attic", "year": "1999"}, key_id="k", created_at=after(20))
    gone = add(store, b"c", deadline_at=after(25), created_at=after(20))
    store.requests.expire(after(25))
    stopped = add(store, b"d", created_at=after(30))
    store.requests.cancel(stopped.id, now=after(30))

    def found(**query: object) -> list[str]:
        return [request.id for request in store.search.find(Query(**query)).requests]  # type: ignore[arg-type]

    assert found() == [stopped.id, gone.id, labelled.id, named.id, items[1].id, items[0].id]
    assert found(batch_id=batch.id) == [items[1].id, items[0].id]
    assert found(model="vgg16", status="queued") == [named.id]
    assert found(labels=(("place", "attic"),)) == [labelled.id]
    assert found(labels=(("place", "attic"), ("year", "1999"))) == [labelled.id]
    assert found(labels=(("place", "attic"), ("year", "2000"))) == []
    assert found(key_id="k", status="queued") == [labelled.id]
    assert found(text="summer_100%") == [named.id]
    assert found(text="summerX100%") == []
    assert found(status="expired") == [gone.id]
    assert found(status="cancelled") == [stopped.id]
    assert found(since=after(10), until=after(20)) == [named.id]
    assert found(since=after(31)) == []
    assert found(status="claimed") == []


def test_labels_are_deleted_with_their_request(store: Store) -> None:
    request = add(store, labels={"a": "b"})
    store.requests.cancel(request.id, now=NOW)

    store.requests.remove(request.id)

    assert store.search.find(Query(labels=(("a", "b"),))).requests == []


@settings(max_examples=12, deadline=None)
@given(
    before=st.integers(0, 12),
    steps=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=12),
    most=st.sampled_from((2, 5000)),
    query=st.sampled_from((Query(), Query(model=MODEL), Query(text="b"), Query(labels=(("n", "0"),)))),
)
def test_pages_visit_each_row_once_while_rows_are_added(
    open_store: OpenStore, before: int, steps: list[tuple[int, int]], most: int, query: Query
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("store.search.MAX_ROWS_SCANNED", most)
        patch.setattr("store.search.MAX_NAMES_SCANNED", most)
        store = open_store(Path(folder) / "home")

        def put(count: int) -> list[RequestRecord]:
            return [
                add(store, name="abc"[n % 3] + ".jpg", labels={"n": str(n % 2)}, model=(MODEL, "vgg16")[n % 2])
                for n in range(count)
            ]

        there = put(before)
        fitting = {
            request.id
            for request in there
            if query.model in (None, request.model)
            and (query.text or "") in (request.name or "")
            and all(request.labels[name] == value for name, value in query.labels)
        }
        seen: list[str] = []
        mark: int | None = None
        for limit, more in [*steps, *[(3, 0)] * 30]:
            page = store.search.find(query, before=mark, limit=limit)
            seen += [request.id for request in page.requests]
            mark = page.next_before
            put(more)
            if mark is None:
                break
        store.close()

    assert mark is None
    assert len(seen) == len(set(seen))
    assert set(seen) == fitting


def test_only_ended_requests_are_removed_and_an_image_stays_while_another_request_needs_it(store: Store) -> None:
    first, second = add(store, b"same"), add(store, b"same")
    with pytest.raises(NotRemovable):
        store.requests.remove(first.id)
    with pytest.raises(UnknownRequest):
        store.requests.remove("nope")
    store.requests.cancel(first.id, now=NOW)

    store.requests.remove(first.id)

    assert store.images.read(second.image_sha256) == b"same"
    store.requests.cancel(second.id, now=NOW)
    store.requests.remove(second.id)
    assert list(store.images.list_digests()) == []


# Idempotency keys


#: Reserves a key; another process, forked from it, outlives it.
DIES_WITH_A_KEY = """
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from store.settings import HomeSettings
from store.store import Store

now = datetime.now(UTC)
store = Store(HomeSettings(home=Path(sys.argv[1])))
store.idempotency.reserve("", "key", "print", now=now, expires_at=now + timedelta(days=1))
if not os.fork():
    print("reserved", flush=True)  # by the child, which has left the lock to its parent by then
sys.stdin.read()
"""


def reserve(store: Store, *, key: str = "key", owner: str = "", at: datetime = NOW) -> KeyReservation | EarlierRequest:
    return store.idempotency.reserve(owner, key, "print", now=at, expires_at=at + timedelta(days=1))


def reserved(store: Store, **arguments: Any) -> KeyReservation:
    found = reserve(store, **arguments)
    assert isinstance(found, KeyReservation)
    return found


def test_of_many_simultaneous_reservations_of_a_key_one_succeeds(store: Store) -> None:
    results: list[object] = []
    threads = [threading.Thread(target=lambda: results.append(reserve(store))) for _ in range(8)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)

    assert sum(isinstance(found, KeyReservation) for found in results) == 1
    assert len(results) == 8


def test_a_response_is_kept_for_its_owner_until_it_expires(store: Store) -> None:
    kept = SavedResponse(status=202, headers={"Location": "/x"}, body=b"{}" * 100)

    assert store.idempotency.save_response(reserved(store), kept)

    found = EarlierRequest(fingerprint="print", response=kept)
    assert reserve(store, at=after(3600)) == found == store.idempotency.find("", "key", now=after(3600))
    reserved(store, owner="another")
    assert store.idempotency.find("", "key", now=after(86_401)) is None
    reserved(store, at=after(86_401))


def test_a_released_key_is_free_and_its_reservation_no_longer_counts(store: Store) -> None:
    first = reserved(store)
    assert store.idempotency.release(first)

    second = reserved(store)

    assert not store.idempotency.save_response(first, SavedResponse(status=200))
    assert not store.idempotency.release(first)
    assert store.idempotency.save_response(second, SavedResponse(status=200))


def test_a_key_is_reserved_as_long_as_the_process_runs_that_works_on_it(store: Store) -> None:
    home = store.database.path.parent
    with subprocess.Popen(
        ends_with_tests(sys.executable, "-c", DIES_WITH_A_KEY, str(home)),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"reserved\n"
        now = datetime.now(UTC)

        # However long it takes, and whatever the clock does.
        assert isinstance(reserve(store, at=now + timedelta(hours=23)), EarlierRequest)
        other.kill()
        other.wait(DEADLINE_SECONDS)

        reserved(store, at=now)
    assert len(list((home / "locks").iterdir())) == 1  # that of this process


def test_the_responses_of_one_owner_are_limited_and_the_oldest_make_room(store: Store) -> None:
    idempotency = Idempotency(store.database, max_bytes_per_owner=10 * MIN_BYTES)
    expires_at = after(86_400)
    for owner, count in (("a", 15), ("b", 3)):
        for number in range(count):
            found = idempotency.reserve(owner, f"k{number}", "print", now=NOW, expires_at=expires_at)
            assert isinstance(found, KeyReservation)
            idempotency.save_response(found, SavedResponse(status=200, body=b"{}"))
    kept = {owner: [n for n in range(15) if idempotency.find(owner, f"k{n}", now=NOW)] for owner in "ab"}
    idempotency.close()

    assert kept == {"a": list(range(5, 15)), "b": [0, 1, 2]}


def test_a_large_response_takes_the_room_of_many(store: Store) -> None:
    idempotency = Idempotency(store.database, max_bytes_per_owner=10 * MIN_BYTES)
    for number, size in enumerate((2, 2, 2, 9 * MIN_BYTES)):
        found = idempotency.reserve("", f"k{number}", "print", now=NOW, expires_at=after(86_400))
        assert isinstance(found, KeyReservation)
        idempotency.save_response(found, SavedResponse(status=200, body=random.Random(1).randbytes(size)))
    kept = [n for n in range(4) if idempotency.find("", f"k{n}", now=NOW)]
    idempotency.close()

    assert kept == [2, 3]


def test_expired_idempotency_keys_are_purged(store: Store) -> None:
    found = reserved(store)
    long_ago = NOW - timedelta(days=30)

    store.retention.purge(images_before=long_ago, results_before=long_ago, now=after(90_000))

    assert not store.idempotency.release(found)

"""Contract of requests, chunks and batchers. A new backend adds a parameter to `store`, not tests."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from batcher.settings import BatcherSettings
from store import new_id
from store.chunks import ChunkRecord
from store.errors import NotCancellable, NotRetryable, UnknownRequest
from store.processes.batchers import BatcherRecord
from store.requests import MAX_ATTEMPTS, Answer, Blame, Claim, NewRequest, RequestRecord
from store.states import RequestState
from store.store import Store
from tests.contracts.conftest import OpenStore

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
OUTPUT = [["n02123159", "tiger_cat", 0.408]]
DIGEST = "d" * 64


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def add(
    store: Store,
    data: bytes = b"image",
    *,
    model: str = "resnet50",
    at: datetime = NOW,
    digest: str | None = None,
    **facts: Any,
) -> RequestRecord:
    new = NewRequest(id=new_id(), service="classification", model=model, digest=digest, created_at=at, **facts)
    return store.requests.add(new, store.images.stage(data))


def claim_all(store: Store, *, at: datetime = NOW, limit: int = 1000) -> list[Claim]:
    return store.requests.claim(
        models={"resnet50", "vgg16"}, limit=limit, now=at, lease_ends_at=at + timedelta(seconds=30), oldest_before=None
    )


def answer(claim: Claim) -> Answer:
    return Answer(claim=claim, output=OUTPUT, digest=DIGEST, chunk_id="c1", provider="local/test", seconds=0.01)


def test_a_request_is_read_back_as_it_was_added(store: Store) -> None:
    added = add(store, b"bytes of an image")

    found = store.requests.get(added.id)

    assert found == added
    assert (found.state, found.attempts, found.output) == (RequestState.QUEUED, 0, None)
    assert store.images.read(found.image_sha256) == b"bytes of an image"


def test_an_unknown_id_is_an_error(store: Store) -> None:
    for id in ("", "nope", 'x" union select 1 --', "é" * 5000):
        with pytest.raises(UnknownRequest):
            store.requests.get(id)


def test_equal_images_are_stored_once(store: Store) -> None:
    add(store, b"same")
    add(store, b"same")

    assert len(list(store.images.list_digests())) == 1


def test_an_answer_is_reused_for_the_same_bytes_and_the_same_artefact(store: Store) -> None:
    first = add(store, b"same")
    store.requests.finish([answer(claim) for claim in claim_all(store)], now=after(1))

    again = add(store, b"same", digest=DIGEST, at=after(2))

    assert (again.state, again.is_cached, again.output) == (RequestState.DONE, True, OUTPUT)
    assert again.finished_at == after(2)
    assert again.chunk_id == store.requests.get(first.id).chunk_id


@pytest.mark.parametrize(
    "difference",
    [
        {"data": b"other"},
        {"model": "vgg16"},
        {"digest": "e" * 64},
        {"digest": None},
        {"is_fresh": True},
    ],
    ids=lambda difference: next(iter(difference)),
)
def test_an_answer_is_not_reused_when_anything_differs(store: Store, difference: dict[str, object]) -> None:
    add(store, b"same")
    store.requests.finish([answer(claim) for claim in claim_all(store)], now=after(1))

    again = add(store, **{"data": b"same", "digest": DIGEST, **difference})  # type: ignore[arg-type]

    assert (again.state, again.is_cached) == (RequestState.QUEUED, False)


@pytest.mark.parametrize("by", ["alice", None])
@pytest.mark.parametrize("to", ["alice", "bob", None])
@pytest.mark.parametrize("shares_answers", [False, True])
def test_an_answer_is_reused_for_its_own_key_unless_answers_are_shared(
    store: Store, by: str | None, to: str | None, shares_answers: bool
) -> None:
    add(store, b"same", key_id=by)
    store.requests.finish([answer(claim) for claim in claim_all(store)], now=after(1))

    again = add(store, b"same", digest=DIGEST, key_id=to, shares_answers=shares_answers)

    assert again.is_cached is (by == to or shares_answers)


def test_claim_takes_the_oldest_first(store: Store) -> None:
    ids = [add(store, bytes([n])).id for n in range(1, 6)]

    claims = claim_all(store, limit=3)

    assert [claim.id for claim in claims] == ids[:3]


def test_claim_skips_a_live_lease(store: Store) -> None:
    add(store)
    claim_all(store)

    assert claim_all(store, at=after(29)) == []


def test_claim_takes_only_the_requested_models(store: Store) -> None:
    add(store, model="vgg16")

    claims = store.requests.claim(models={"resnet50"}, limit=10, now=NOW, lease_ends_at=after(30), oldest_before=None)

    assert claims == []


def test_a_model_is_due_when_a_full_chunk_waits_and_the_rest_stays_queued(store: Store) -> None:
    for n in range(20):
        add(store, bytes([n]))

    claims = store.requests.claim(
        models={"resnet50"}, limit=100, now=after(1), lease_ends_at=after(31), oldest_before=after(-600)
    )

    assert len(claims) == 16
    assert store.requests.backlog()[0].waiting == 4


def test_a_model_is_due_when_its_oldest_request_has_waited_long_enough(store: Store) -> None:
    for n in range(3):
        add(store, bytes([n]), at=after(n))

    early = store.requests.claim(
        models={"resnet50"}, limit=100, now=after(9), lease_ends_at=after(40), oldest_before=after(-1)
    )
    late = store.requests.claim(
        models={"resnet50"}, limit=100, now=after(10), lease_ends_at=after(40), oldest_before=NOW
    )

    assert early == []
    assert len(late) == 3


def test_a_released_request_is_due_without_waiting_for_a_full_chunk(store: Store) -> None:
    add(store)
    store.requests.release(
        claim_all(store), blame=Blame.ITEM, code="x", reason="it failed", now=after(1), due_at=after(3)
    )
    which = {"models": {"resnet50"}, "limit": 10, "oldest_before": after(-600)}

    early = store.requests.claim(now=after(2), lease_ends_at=after(32), **which)
    late = store.requests.claim(now=after(3), lease_ends_at=after(33), **which)

    assert early == []
    assert len(late) == 1


def test_models_share_the_limit_in_turns(store: Store) -> None:
    for n in range(64):
        add(store, n.to_bytes(2), model="resnet50")
    add(store, b"later", model="vgg16", at=after(1))

    claims = claim_all(store, limit=32, at=after(2))

    assert [claim.model for claim in claims] == ["resnet50"] * 16 + ["vgg16"] + ["resnet50"] * 15


def test_finish_records_an_answer_once(store: Store) -> None:
    request = add(store)
    (claim,) = claim_all(store)

    recorded = [
        store.requests.finish([answer(claim)], now=after(1)),
        store.requests.finish([answer(claim)], now=after(2)),
    ]

    assert recorded == [1, 0]
    found = store.requests.get(request.id)
    assert (found.state, found.output, found.finished_at) == (RequestState.DONE, OUTPUT, after(1))
    assert (found.digest, found.provider, found.seconds) == (DIGEST, "local/test", 0.01)


def test_a_late_answer_with_a_stale_token_is_dropped(store: Store) -> None:
    request = add(store)
    (late,) = claim_all(store)
    store.requests.release_expired(after(31))
    (newer,) = claim_all(store, at=after(32))

    assert store.requests.finish([answer(late)], now=after(33)) == 0
    assert store.requests.fail([late], code="x", reason="y", now=after(33)) == 0
    assert store.requests.release([late], blame=Blame.ITEM, code="x", reason="y", now=after(33)) == 0
    assert store.requests.renew([late], lease_ends_at=after(99)) == set()
    assert store.requests.finish([answer(newer)], now=after(34)) == 1
    assert store.requests.get(request.id).state is RequestState.DONE


def test_renew_keeps_a_claim(store: Store) -> None:
    add(store)
    claims = claim_all(store)

    held = store.requests.renew(claims, lease_ends_at=after(60))

    assert held == {claims[0].number}
    assert store.requests.release_expired(after(59)) == 0
    assert store.requests.release_expired(after(60)) == 1


def test_a_release_that_blames_nobody_counts_nothing(store: Store) -> None:
    request = add(store)
    for _ in range(10):
        store.requests.release(claim_all(store), blame=Blame.NOBODY, code="stopping", reason="stopping", now=NOW)

    found = store.requests.get(request.id)
    assert (found.state, found.attempts, found.isolation) == (RequestState.QUEUED, 0, 0)


def test_a_request_fails_with_the_last_reason_after_it_was_blamed_three_times(store: Store) -> None:
    request = add(store)
    for attempt in range(MAX_ATTEMPTS):
        assert store.requests.get(request.id).state is RequestState.QUEUED
        store.requests.release(
            claim_all(store), blame=Blame.ITEM, code="inference_failed", reason=f"try {attempt}", now=NOW
        )

    found = store.requests.get(request.id)
    assert (found.state, found.attempts, found.reason) == (RequestState.FAILED, 3, "try 2")
    assert found.finished_at == NOW


def test_an_item_of_failing_chunks_is_isolated_before_it_is_blamed(store: Store) -> None:
    request = add(store)
    seen = []
    while store.requests.get(request.id).state is RequestState.QUEUED:
        (claim,) = claim_all(store)
        seen.append((claim.isolation, claim.attempts))
        store.requests.release([claim], blame=Blame.CHUNK, code="worker_died", reason="the worker died", now=NOW)

    assert seen == [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2)]
    assert store.requests.get(request.id).code == "worker_died"


def test_an_item_is_not_charged_for_batchers_that_die(store: Store) -> None:
    request = add(store)
    for kill in range(9):
        claim_all(store, at=after(kill * 100))

        assert store.requests.release_expired(after(kill * 100 + 30)) == 1

    found = store.requests.get(request.id)
    assert (found.state, found.attempts, found.isolation) == (RequestState.QUEUED, 0, 0)
    assert found.code == "lease_ended"


def test_the_end_of_a_lease_is_judged_by_the_clock_of_leases(store: Store) -> None:
    add(store)
    claim_all(store)

    assert store.requests.release_expired(after(99_999), lease_now=after(29)) == 0
    assert store.requests.release_expired(after(-99_999), lease_now=after(30)) == 1


def test_a_lease_longer_than_any_is_from_a_clock_that_has_lost_time_and_has_ended(store: Store) -> None:
    add(store)
    claim_all(store)

    assert store.requests.release_expired(after(0), lease_now=after(-90)) == 0
    assert store.requests.release_expired(after(0), lease_now=after(-91)) == 1


def test_the_longest_lease_is_not_ended_by_a_batcher_that_read_the_clock_before_it_was_made(store: Store) -> None:
    add(store)
    longest = BatcherSettings.from_env({"MLG_LEASE_SECONDS": "59"}).lease_seconds
    claims = store.requests.claim(
        models={"resnet50"}, limit=1, now=NOW, lease_ends_at=after(longest), oldest_before=None
    )

    assert store.requests.release_expired(after(0), lease_now=after(-20)) == 0
    assert store.requests.renew(claims, lease_ends_at=after(longest)) == {claims[0].number}


def test_fail_is_final_at_once(store: Store) -> None:
    request = add(store)

    store.requests.fail(claim_all(store), code="broken_image", reason="It is cut short.", now=after(1))

    found = store.requests.get(request.id)
    assert (found.state, found.code, found.reason) == (RequestState.FAILED, "broken_image", "It is cut short.")


def test_only_queued_requests_can_be_cancelled(store: Store) -> None:
    queued, claimed = add(store, b"1"), add(store, b"2")
    cancelled = store.requests.cancel(queued.id, now=after(1))
    claim_all(store)

    assert cancelled.state is RequestState.CANCELLED
    for id in (queued.id, claimed.id):
        with pytest.raises(NotCancellable):
            store.requests.cancel(id, now=after(2))
    with pytest.raises(UnknownRequest):
        store.requests.cancel("nope", now=after(2))


def test_retry_queues_a_failed_request_with_its_attempts_reset(store: Store) -> None:
    request = add(store)
    store.requests.fail(claim_all(store), code="x", reason="y", now=after(1))

    again = store.requests.retry(request.id, now=after(2))

    assert (again.state, again.attempts, again.finished_at) == (RequestState.QUEUED, 0, None)
    with pytest.raises(NotRetryable):
        store.requests.retry(request.id, now=after(3))
    with pytest.raises(UnknownRequest):
        store.requests.retry("nope", now=after(3))


def test_list_pages_from_the_newest(store: Store) -> None:
    ids = [add(store, bytes([n]), model="vgg16" if n % 2 else "resnet50").id for n in range(6)]

    first = store.requests.list(limit=4)
    second = store.requests.list(limit=4, before=first[-1].number)

    assert [request.id for request in [*first, *second]] == ids[::-1]
    assert [request.id for request in store.requests.list(model="vgg16")] == ids[5::-2]
    assert store.requests.list(state=RequestState.FAILED) == []
    assert len(store.requests.list(state=RequestState.QUEUED)) == 6


def test_purge_deletes_images_first_and_results_later_and_no_queued_request(store: Store) -> None:
    waiting, finished = add(store, b"waits"), add(store, b"done")
    claims = [claim for claim in claim_all(store) if claim.id == finished.id]
    store.requests.finish([answer(claims[0])], now=after(1))

    kept = store.retention.purge(images_before=after(1), results_before=after(1), now=after(2))
    images = store.retention.purge(images_before=after(2), results_before=after(1), now=after(3))

    assert (kept.images, kept.results) == (0, 0)
    assert (images.images, images.results) == (1, 0)
    assert store.requests.get(finished.id).image_deleted_at == after(3)
    assert list(store.images.list_digests()) == [waiting.image_sha256]
    assert store.retention.purge(images_before=after(2), results_before=after(2), now=after(4)).results == 1
    with pytest.raises(UnknownRequest):
        store.requests.get(finished.id)
    assert store.requests.get(waiting.id).image_sha256 == waiting.image_sha256


def test_purge_keeps_an_image_that_another_request_still_needs(store: Store) -> None:
    add(store, b"same")
    store.requests.finish([answer(claim) for claim in claim_all(store)], now=after(1))
    waiting = add(store, b"same", at=after(5))

    store.retention.purge(images_before=after(4), results_before=after(4), now=after(6))

    assert store.images.read(waiting.image_sha256) == b"same"


def test_purge_deletes_files_that_a_killed_process_left(store: Store) -> None:
    orphan = store.images.stage(b"its row was never committed")
    store.images.publish(orphan)
    unnamed = store.images.stage(b"never published")
    later = datetime.now(UTC) + timedelta(hours=2)

    swept = store.retention.purge(images_before=NOW, results_before=NOW, now=later)

    assert swept.leftovers == 2
    assert list(store.images.list_digests()) == []
    assert not unnamed.path.exists()


def test_a_request_without_its_image_cannot_be_retried(store: Store) -> None:
    request = add(store)
    store.requests.fail(claim_all(store), code="x", reason="y", now=after(1))
    store.retention.purge(images_before=after(2), results_before=NOW, now=after(3))

    with pytest.raises(NotRetryable):
        store.requests.retry(request.id, now=after(4))


def test_many_threads_add_and_claim_without_losing_or_duplicating_requests(store: Store) -> None:
    ids: list[str] = []
    claims: list[Claim] = []
    adding = threading.Event()

    def adder(part: int) -> None:
        for n in range(50):
            ids.append(add(store, b"%d-%d" % (part, n)).id)

    def claimer() -> None:
        while True:
            was_adding = not adding.is_set()
            found = claim_all(store, limit=16)
            claims.extend(found)
            if not found and not was_adding:
                return

    adders = [threading.Thread(target=adder, args=(part,)) for part in range(4)]
    claimers = [threading.Thread(target=claimer) for _ in range(3)]
    for thread in adders + claimers:
        thread.start()
    for thread in adders:
        thread.join()
    adding.set()
    for thread in claimers:
        thread.join()

    assert sorted(claim.id for claim in claims) == sorted(ids)
    assert len(set(ids)) == 200


def test_a_failed_write_leaves_other_requests_unchanged(store: Store) -> None:
    request = add(store, b"first")
    staged = store.images.stage(b"second")
    same_id = NewRequest(id=request.id, service="classification", model="resnet50", created_at=NOW)

    with pytest.raises(Exception, match="UNIQUE"):
        store.requests.add(same_id, staged)

    assert list(store.images.list_digests()) == [request.image_sha256]
    assert not staged.path.exists()
    assert store.requests.get(request.id) == request


def test_chunks_give_the_throughput_and_requests_the_backlog(store: Store) -> None:
    chunk = ChunkRecord(
        id="c1", batcher_id="b1", executor="local", provider=None, service="classification", model="resnet50",
        items=16, bytes_sent=1000, bytes_received=None, dispatched_at=NOW, finished_at=None, seconds=None,
        done=None, failed=None, cost=None, code=None, reason=None,
    )  # fmt: skip
    for n in range(3):
        add(store, bytes([n]), at=after(n))
    claim_all(store, limit=1, at=after(5))

    store.chunks.start(chunk)
    assert store.chunks.throughput("resnet50") is None
    store.chunks.finish(
        "c1", provider="local/test", bytes_received=10, seconds=2.0, done=16, failed=0, cost=None, code=None,
        reason=None, now=after(2),
    )  # fmt: skip

    throughput = store.chunks.throughput("resnet50")
    assert throughput is not None
    assert (throughput.items, throughput.chunk_seconds, throughput.items_per_second) == (16, 2.0, 8.0)
    (listed,) = store.chunks.list()
    assert (listed.provider, listed.finished_at, listed.done) == ("local/test", after(2), 16)
    (backlog,) = store.requests.backlog()
    assert (backlog.waiting, backlog.claimed, backlog.oldest_number, backlog.oldest_at) == (2, 1, 2, after(1))


def test_a_batcher_is_listed_while_its_heartbeat_is_recent(store: Store) -> None:
    batcher = BatcherRecord(
        id="b1", host="here", pid=1, executor="local", every_seconds=600, max_wait_seconds=600, capacity=4,
        started_at=NOW, seen_at=NOW,
    )  # fmt: skip

    store.batchers.heartbeat(batcher)
    store.batchers.heartbeat(BatcherRecord(**{**vars(batcher), "seen_at": after(2)}))

    assert store.batchers.list(seen_since=after(3)) == []
    (listed,) = store.batchers.list(seen_since=after(2))
    assert listed.seen_at == after(2)
    store.batchers.deregister("b1")
    assert store.batchers.list(seen_since=NOW) == []


class AnyHistory(RuleBasedStateMachine):
    """Any mix of calls: nothing is lost, nothing is answered twice, final states stay."""

    claims = Bundle("claims")

    def __init__(self, open_store: OpenStore) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.store = open_store(Path(self.folder.name))
        self.ids: list[str] = []
        self.answered: dict[int, int] = {}
        self.final: dict[str, RequestState] = {}
        self.clock = 0.0

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    @property
    def now(self) -> datetime:
        return after(self.clock)

    @rule(data=st.binary(min_size=1, max_size=1), model=st.sampled_from(["resnet50", "vgg16"]))
    def add(self, data: bytes, model: str) -> None:
        self.ids.append(add(self.store, data, model=model, at=self.now).id)

    @rule(target=claims, limit=st.integers(1, 5))
    def claim(self, limit: int) -> list[Claim]:
        return claim_all(self.store, at=self.now, limit=limit)

    @rule(held=claims)
    def finish(self, held: list[Claim]) -> None:
        for claim in held:
            recorded = self.store.requests.finish([answer(claim)], now=self.now)
            self.answered[claim.number] = self.answered.get(claim.number, 0) + recorded

    @rule(held=claims, blame=st.sampled_from(Blame))
    def release(self, held: list[Claim], blame: Blame) -> None:
        self.store.requests.release(held, blame=blame, code="x", reason="y", now=self.now)

    @rule(held=claims)
    def fail(self, held: list[Claim]) -> None:
        self.store.requests.fail(held, code="x", reason="y", now=self.now)

    @rule(held=claims)
    def renew(self, held: list[Claim]) -> None:
        self.store.requests.renew(held, lease_ends_at=self.now + timedelta(seconds=30))

    @rule(seconds=st.floats(0, 60))
    def time_passes(self, seconds: float) -> None:
        self.clock += seconds
        self.store.requests.release_expired(self.now)

    @rule(pick=st.integers(0, 1000))
    def cancel(self, pick: int) -> None:
        if self.ids:
            id = self.ids[pick % len(self.ids)]
            if self.store.requests.get(id).state is RequestState.QUEUED:
                self.store.requests.cancel(id, now=self.now)
            else:
                with pytest.raises(NotCancellable):
                    self.store.requests.cancel(id, now=self.now)

    @invariant()
    def nothing_is_lost_or_answered_twice_or_changed_when_final(self) -> None:
        found = {request.id: request for request in self.store.requests.list(limit=10_000)}
        assert set(found) == set(self.ids)
        assert all(count <= 1 for count in self.answered.values())
        for id, state in self.final.items():
            assert found[id].state is state
        self.final = {id: request.state for id, request in found.items() if request.state.is_final}
        for request in found.values():
            assert request.attempts <= MAX_ATTEMPTS
            assert (request.state is RequestState.DONE) == bool(self.answered.get(request.number))


def test_in_any_history_nothing_is_lost_or_answered_twice(open_store: OpenStore) -> None:
    run_state_machine_as_test(
        lambda: AnyHistory(open_store),
        settings=settings(
            max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )

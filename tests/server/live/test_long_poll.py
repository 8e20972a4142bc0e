"""Estimates of why a request waits and how long, and held reads."""

from __future__ import annotations

import io
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import flask.testing
import pytest
from PIL import Image

from server.app import create_app, get_context
from server.auth.guard import get_guard
from server.auth.key_cache import KeyCache
from server.errors import KeyRefused
from server.live.changes import ChangeDispatcher
from server.live.long_poll import LongPoller
from server.settings import ServerSettings
from server.status.eta import EtaInputs, estimate, format_duration
from server.status.queue_stats import FRESH_SECONDS, QueueStats
from store.chunks import Throughput
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.errors import UnknownRequest
from store.processes.batchers import BatcherRecord
from store.processes.progress import ProgressRecord
from store.requests import ModelBacklog, RequestRecord
from store.states import RequestState
from store.store import Store
from tests.conftest import MODEL
from tests.timing import DEADLINE_SECONDS, slowness, wait_until

URL = "/requestPrediction/efficientnet_lite0"
NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
THROUGHPUT = Throughput(items=320, chunk_seconds=2.0, items_per_second=8.0)


def seconds(count: float) -> timedelta:
    return timedelta(seconds=count)


def request(number: int = 1, **changes: object) -> RequestRecord:
    base = RequestRecord(
        number=number,
        id=f"r{number}",
        service="classification",
        model="m",
        params={},
        name=None,
        image_sha256="0" * 64,
        image_bytes=1,
        state=RequestState.QUEUED,
        attempts=0,
        isolation=0,
        created_at=NOW,
        due_at=NOW,
        claimed_at=None,
        lease_ends_at=None,
        finished_at=None,
        chunk_id=None,
        output=None,
        digest=None,
        provider=None,
        seconds=None,
        is_cached=False,
        code=None,
        reason=None,
        image_deleted_at=None,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def batcher(
    *,
    every: float = 600,
    max_wait: float = 600,
    capacity: int = 2,
    age: float = 0,
    notices: dict[str, str] | None = None,
) -> BatcherRecord:
    return BatcherRecord(
        id="b",
        host="h",
        pid=1,
        executor="local",
        every_seconds=every,
        max_wait_seconds=max_wait,
        capacity=capacity,
        started_at=NOW - seconds(age),
        seen_at=NOW,
        notices=notices or {},
    )


def backlog(waiting: int, *, model: str = "m", claimed: int = 0, oldest: int = 1, age: float = 0) -> ModelBacklog:
    return ModelBacklog(
        service="classification",
        model=model,
        waiting=waiting,
        waiting_steps=0,
        claimed=claimed,
        oldest_number=oldest if waiting else None,
        oldest_at=NOW - seconds(age) if waiting else None,
    )


def outlook(*counts: ModelBacklog, batchers: list[BatcherRecord] | None = None, **rest: object) -> EtaInputs:
    return EtaInputs(
        batchers=[batcher()] if batchers is None else batchers,
        backlog=counts,
        **{"throughput": THROUGHPUT, **rest},  # type: ignore[arg-type]
    )


def test_without_a_batcher_there_is_no_estimate() -> None:
    wait = estimate(request(), outlook(backlog(1), batchers=[]), NOW)

    assert wait is not None
    assert wait.eta_seconds is None
    assert "mlg batch" in wait.waiting_for
    assert "mlg up" in wait.waiting_for


def test_an_unavailable_reason_comes_first() -> None:
    wait = estimate(request(), outlook(backlog(1), unavailable_reason="The model m is not installed any more."), NOW)

    assert wait is not None
    assert (wait.waiting_for, wait.eta_seconds) == ("The model m is not installed any more.", None)


def test_a_lone_request_waits_for_the_timer_or_a_full_chunk() -> None:
    # The timer began 300 s ago and goes every 600 s; the chunk itself takes 2 s.
    wait = estimate(request(), outlook(backlog(1), batchers=[batcher(age=300)]), NOW)

    assert wait is not None
    assert "at the latest in 5 min." in wait.waiting_for
    assert "16 images for m" in wait.waiting_for
    assert wait.eta_seconds == pytest.approx(302)
    assert wait.ahead == 0


def test_the_longest_wait_of_the_oldest_counts_when_it_ends_before_the_timer() -> None:
    wait = estimate(request(2), outlook(backlog(2, age=40), batchers=[batcher(max_wait=60)]), NOW)

    assert wait is not None
    assert "at the latest in 20 s. 1 request is ahead of it." in wait.waiting_for


def test_in_a_full_chunk_only_the_work_before_counts() -> None:
    first = estimate(request(1), outlook(backlog(16)), NOW)
    later = estimate(request(65), outlook(backlog(80)), NOW)

    assert first is not None
    assert later is not None
    assert first.waiting_for == "It is next: the first free worker takes it."
    # 64 items ahead at 8 a second on each of two workers, and 2 s for its own chunk.
    assert (later.ahead, later.eta_seconds) == (64, pytest.approx(6))
    assert "64 requests are ahead of it" in later.waiting_for


def test_the_rest_of_the_last_chunk_waits_for_the_timer() -> None:
    wait = estimate(request(17), outlook(backlog(17)), NOW)

    assert wait is not None
    assert "at the latest in" in wait.waiting_for


def test_other_models_and_claimed_requests_count() -> None:
    alone = estimate(request(1), outlook(backlog(16)), NOW)
    crowded = estimate(request(1), outlook(backlog(16, claimed=32), backlog(500, model="n", oldest=3)), NOW)

    assert alone is not None
    assert crowded is not None
    # 32 under way and one chunk of the other model, models taking turns: 48 items at 16 a second.
    assert crowded.eta_seconds == pytest.approx((alone.eta_seconds or 0) + 3)


def test_a_position_is_never_beyond_those_that_wait() -> None:
    wait = estimate(request(1_000_000), outlook(backlog(3, oldest=5)), NOW)

    assert wait is not None
    assert wait.ahead == 2


def test_the_progress_of_a_claimed_request_tells_how_long_it_takes() -> None:
    progress = ProgressRecord(seq=1, number=1, id="r", batch_id=None, fraction=0.25, previews=0)
    claimed = request(
        state=RequestState.CLAIMED, claimed_at=NOW - seconds(10), lease_ends_at=NOW + seconds(30), progress=progress
    )

    wait = estimate(claimed, outlook(), NOW)

    assert wait is not None
    assert wait.eta_seconds == pytest.approx(30)


def test_a_claimed_request_tells_since_when() -> None:
    under_way = request(state=RequestState.CLAIMED, claimed_at=NOW - seconds(1.4), lease_ends_at=NOW + seconds(30))

    wait = estimate(under_way, outlook(backlog(0, claimed=1)), NOW)

    assert wait is not None
    assert "started 1 s ago" in wait.waiting_for
    assert wait.eta_seconds == pytest.approx(0.6)
    assert wait.ahead is None


def test_a_failed_attempt_tells_why_and_when_it_is_retried() -> None:
    later = request(attempts=1, reason="The worker died.", code="worker_died", due_at=NOW + seconds(30))
    now = replace(later, due_at=NOW)

    waits = [estimate(each, outlook(backlog(1)), NOW) for each in (later, now)]

    assert waits[0] is not None
    assert waits[1] is not None
    assert waits[0].waiting_for == "The last attempt failed (The worker died). It will be retried in 30 s."
    assert waits[0].eta_seconds == pytest.approx(32)
    assert "with the next chunk" in waits[1].waiting_for


def test_a_released_request_did_not_fail() -> None:
    later = request(reason="No provider offers it for that price", code="x", due_at=NOW + seconds(20))
    in_a_bad_chunk = replace(later, isolation=1)

    waits = [estimate(each, outlook(backlog(1)), NOW) for each in (later, in_a_bad_chunk)]

    assert waits[0] is not None
    assert waits[1] is not None
    assert waits[0].waiting_for == "No provider offers it for that price. It will be retried in 20 s."
    assert "The last attempt failed" in waits[1].waiting_for


@pytest.mark.parametrize("state", [RequestState.QUEUED, RequestState.CLAIMED])
def test_a_notice_counts_when_every_batcher_has_one(state: RequestState) -> None:
    waiting = request(state=state, claimed_at=NOW)
    refusing = batcher(notices={"m": "The budget is used up."})
    also = batcher(notices={"m": "No provider is there.", "other": "x"})
    working = batcher(notices={"other": "The budget is used up."})

    alone, both, one_works = (
        estimate(waiting, outlook(backlog(1), batchers=batchers), NOW)
        for batchers in ([refusing], [refusing, also], [refusing, working])
    )

    assert alone is not None
    assert both is not None
    assert one_works is not None
    assert (alone.waiting_for, alone.eta_seconds) == ("The budget is used up.", None)
    assert alone.ahead == (0 if state is RequestState.QUEUED else None)
    assert both.waiting_for == "The budget is used up."
    assert one_works.eta_seconds is not None


def test_without_a_throughput_there_is_still_an_estimate() -> None:
    wait = estimate(request(1), outlook(backlog(16), throughput=None), NOW)

    assert wait is not None
    assert wait.eta_seconds == pytest.approx(5)


@pytest.mark.parametrize("state", [RequestState.DONE, RequestState.FAILED, RequestState.CANCELLED])
def test_a_final_request_waits_for_nothing(state: RequestState) -> None:
    assert estimate(request(state=state), outlook(), NOW) is None


@pytest.mark.parametrize(
    ("length", "text"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min"), (312, "5 min 12 s"), (7200, "2 h"), (7500, "2 h 5 min")],
)
def test_durations_are_formatted(length: float, text: str) -> None:
    assert format_duration(length) == text


# Held reads


def make_image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "olive").save(file, "PNG")
    return file.getvalue()


def post(client: flask.testing.FlaskClient) -> str:
    id: str = client.post(URL, data=make_image(), content_type="image/png").json["req_id"]
    return id


def always() -> bool:
    return True


def notifier_threads() -> int:
    return sum(thread.name == "events" for thread in threading.enumerate())


def test_a_held_read_ends_when_the_answer_is_there(
    client: flask.testing.FlaskClient, answer: Callable[..., list[str]]
) -> None:
    id = post(client)
    began = time.monotonic()
    threading.Timer(0.3, answer).start()

    read = client.get(f"/readPrediction/{id}?wait=30").json

    assert read["status"] == "done"
    assert 0.2 < time.monotonic() - began < 10 * slowness()


def test_a_held_read_ends_with_its_time(client: flask.testing.FlaskClient) -> None:
    id = post(client)
    began = time.monotonic()

    read = client.get(f"/readPrediction/{id}?wait=0.2").json

    assert read["status"] == "queued"
    assert 0.15 < time.monotonic() - began < 5 * slowness()


def test_the_longest_hold_is_the_servers(settings: ServerSettings, store: Store) -> None:
    client = create_app(replace(settings, max_hold_seconds=0.1), store).test_client()
    id = post(client)
    began = time.monotonic()

    client.get(f"/readPrediction/{id}?wait=3600")

    assert time.monotonic() - began < 5 * slowness()


def test_a_read_without_a_free_slot_is_answered_at_once(client: flask.testing.FlaskClient, store: Store) -> None:
    queued = store.requests.get(post(client))
    change_dispatcher = ChangeDispatcher(store.changes, store.progress, capacity=1)
    long_poller = LongPoller(change_dispatcher, store.requests, capacity=1)
    holder = threading.Thread(target=lambda: long_poller.wait_until_final(queued, 30, is_allowed=always))
    holder.start()
    wait_until(notifier_threads)
    began = time.monotonic()

    request = long_poller.wait_until_final(queued, 30, is_allowed=always)

    assert request.state is RequestState.QUEUED
    assert time.monotonic() - began < 5 * slowness()
    change_dispatcher.stop()
    holder.join()


def wait_for_no_notifier() -> None:
    wait_until(lambda: notifier_threads() == 0)


def test_nothing_polls_without_a_held_read(client: flask.testing.FlaskClient, answer: Callable[..., list[str]]) -> None:
    wait_for_no_notifier()
    id = post(client)

    client.get(f"/readPrediction/{id}?wait=0.1")
    wait_for_no_notifier()
    answer()
    read = client.get(f"/readPrediction/{id}?wait=10").json

    assert read["status"] == "done"
    assert notifier_threads() == 0


def test_stopping_answers_held_reads(client: flask.testing.FlaskClient, store: Store) -> None:
    queued = store.requests.get(post(client))
    change_dispatcher = ChangeDispatcher(store.changes, store.progress, capacity=1)
    long_poller = LongPoller(change_dispatcher, store.requests, capacity=4)
    threading.Timer(0.2, change_dispatcher.stop).start()
    began = time.monotonic()

    request = long_poller.wait_until_final(queued, 30, is_allowed=always)

    assert request.state is RequestState.QUEUED
    assert time.monotonic() - began < 10 * slowness()
    assert long_poller.wait_until_final(queued, 30, is_allowed=always) is queued


def test_a_request_that_is_deleted_during_a_held_read_is_unknown(
    client: flask.testing.FlaskClient, store: Store
) -> None:
    queued = store.requests.get(post(client))
    gone = replace(queued, id="gone")

    with pytest.raises(UnknownRequest):
        LongPoller(
            ChangeDispatcher(store.changes, store.progress, capacity=1), store.requests, capacity=1
        ).wait_until_final(gone, 30, is_allowed=always)


def test_a_held_read_ends_with_its_key(client: flask.testing.FlaskClient, store: Store) -> None:
    queued = store.requests.get(post(client))
    change_dispatcher = ChangeDispatcher(store.changes, store.progress, capacity=1, check_seconds=0.0)
    long_poller = LongPoller(change_dispatcher, store.requests, capacity=1, check_seconds=3600)
    answers = iter([True, True, True, True, False])

    with pytest.raises(KeyRefused):
        long_poller.wait_until_final(queued, 3600, is_allowed=lambda: next(answers, False))


@pytest.mark.parametrize("path", ["/readPrediction/{id}", "/batches/{batch}"])
def test_a_revoked_key_gets_no_answer_to_what_it_waits_for(
    client: flask.testing.FlaskClient, store: Store, path: str
) -> None:
    guard = get_guard(client.application)
    get_context(client.application).change_dispatcher.check_seconds = 0.0
    id, key = make_key()
    now = datetime.now(UTC)
    scopes = frozenset({Scope.SUBMIT, Scope.READ})
    store.keys.add(KeyRecord(id=id, name="mine", sha256=hash_key(key), scopes=scopes, created_at=now))
    headers = {"X-API-Key": key}
    image = (io.BytesIO(make_image()), "olive.png")
    sent = client.post(f"/requestPredictions/{MODEL}", data={"image": [image]}, headers=headers).json
    guard.key_cache = KeyCache(store.keys, monotonic=itertools.count(step=60).__next__)
    url = path.format(id=sent["items"][0]["req_id"], batch=sent["batch_id"])

    def revoke() -> None:
        wait_until(notifier_threads)
        store.keys.revoke(id, now=now)

    thread = threading.Thread(target=revoke)
    thread.start()
    response = client.get(f"{url}?wait=60", headers=headers)
    thread.join()

    assert (response.status_code, response.json["code"]) == (401, "key_refused")


def test_a_deletion_during_a_held_read_is_noticed_without_a_change(
    client: flask.testing.FlaskClient, store: Store
) -> None:
    queued = store.requests.get(post(client))
    change_dispatcher = ChangeDispatcher(store.changes, store.progress, capacity=1)
    long_poller = LongPoller(change_dispatcher, store.requests, capacity=1, check_seconds=0.1)
    found: list[type[BaseException]] = []

    def hold() -> None:
        try:
            long_poller.wait_until_final(queued, 60, is_allowed=always)
        except UnknownRequest as error:
            found.append(type(error))

    thread = threading.Thread(target=hold)
    thread.start()
    wait_until(notifier_threads)
    store.database.execute("DELETE FROM requests")
    thread.join(30)

    assert found == [UnknownRequest]


# From the store to the sentence


def test_a_live_batcher_is_in_the_response(client: flask.testing.FlaskClient, store: Store) -> None:
    now = datetime.now(UTC)
    store.batchers.heartbeat(replace(batcher(max_wait=100), started_at=now, seen_at=now))
    id = post(client)

    read = client.get(f"/readPrediction/{id}").json

    assert "at the latest in 1 min" in read["waiting_for"]
    assert 90 < read["eta_seconds"] < 110
    assert read["ahead"] == 0
    assert client.get("/readyz").json["batchers"] == 1


def test_a_batcher_without_heartbeats_does_not_count(client: flask.testing.FlaskClient, store: Store) -> None:
    long_ago = datetime.now(UTC) - timedelta(minutes=5)
    store.batchers.heartbeat(replace(batcher(), started_at=long_ago, seen_at=long_ago))

    read = client.get(f"/readPrediction/{post(client)}").json

    assert "no batcher is running" in read["waiting_for"]


def test_the_queue_is_counted_once_a_second_by_one_thread(store: Store) -> None:
    counted = []
    requests = store.requests

    class Counting:
        def backlog(self) -> list[ModelBacklog]:
            counted.append(threading.get_ident())
            time.sleep(0.05)
            return requests.backlog()

    store.requests = Counting()  # type: ignore[assignment]
    queue_stats = QueueStats(store)
    together = threading.Barrier(8)
    threads = [threading.Thread(target=lambda: (together.wait(), queue_stats.waiting_sent())) for _ in range(8)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(counted) == 1


def test_readers_use_the_old_counts_while_new_ones_are_loaded(store: Store) -> None:
    may_count = threading.Event()
    may_count.set()
    counted = []
    requests = store.requests

    class Slow:
        def backlog(self) -> list[ModelBacklog]:
            assert may_count.wait(DEADLINE_SECONDS)
            counted.append(threading.current_thread().name)
            return requests.backlog()

    store.requests = Slow()  # type: ignore[assignment]
    queue_stats = QueueStats(store)
    queue_stats.waiting_sent()
    may_count.clear()
    time.sleep(FRESH_SECONDS)

    # Would never return if it waited for the count.
    assert queue_stats.waiting_sent() == 0

    may_count.set()
    wait_until(lambda: len(counted) == 2)
    assert counted == [threading.current_thread().name, "refresh"]

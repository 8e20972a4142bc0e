"""Live events: what a listener gets, what it gets after a reconnect, and streams through a real server."""

from __future__ import annotations

import io
import itertools
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import flask.testing
import httpx
import pytest
from PIL import Image

from server.app import create_app, get_context
from server.auth.guard import get_guard
from server.auth.key_cache import FRESH_SECONDS, KeyCache
from server.live.changes import ChangeDispatcher, Listener
from server.settings import ServerSettings
from store.clients import keys
from store.clients.keys import Scope
from store.requests import Answer
from store.states import RequestState
from store.store import Store
from tests.conftest import MODEL, OUTPUT, RunningServer
from tests.timing import DEADLINE_SECONDS, slowness, wait_until

URL = f"/requestPrediction/{MODEL}"


def make_image(color: str = "olive") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(file, "PNG")
    return file.getvalue()


def post(client: flask.testing.FlaskClient, *, fresh: bool = True) -> str:
    id: str = client.post(f"{URL}?fresh={int(fresh)}", data=make_image(), content_type="image/png").json["req_id"]
    return id


def parse(text: str) -> list[dict[str, Any]]:
    """Split a stream into events; comments and the retry hint are left out."""
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line and not line.startswith(":"))
        if "event" in fields:
            events.append({**fields, "data": json.loads(fields["data"])})
    return events


def read(client: flask.testing.FlaskClient, path: str, last_id: str | None = None) -> list[dict[str, Any]]:
    """Read a stream to its end."""
    response = client.get(path, headers={} if last_id is None else {"Last-Event-ID": last_id})
    assert response.status_code == 200, response.text
    assert response.mimetype == "text/event-stream"
    return parse(response.text)


def states_of(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(event["data"]["req_id"], event["data"]["status"]) for event in events if event["event"] == "request"]


def test_a_stream_sends_the_current_states_and_ends_when_all_are_final(
    client: flask.testing.FlaskClient, answer: Callable[..., list[str]]
) -> None:
    ids = [post(client) for _ in range(3)]
    answer()

    events = read(client, f"/events?ids={','.join(ids)}")

    assert states_of(events) == [(id, "done") for id in ids]
    assert events[0]["data"]["preds"][0][1] == "label_0"
    assert events[-1]["event"] == "end"
    assert events[-1]["data"]["done"] == 3


def test_a_stream_sends_an_answer_while_it_is_open(
    client: flask.testing.FlaskClient, answer: Callable[..., list[str]]
) -> None:
    id = post(client)
    threading.Timer(0.2, answer).start()

    events = read(client, f"/events?ids={id}")

    assert states_of(events)[0] == (id, "queued")
    assert states_of(events)[-1] == (id, "done")
    assert sum(status == "done" for _, status in states_of(events)) == 1


def test_a_reconnecting_client_gets_what_it_missed_and_nothing_twice(
    client: flask.testing.FlaskClient, answer: Callable[..., list[str]]
) -> None:
    ids = []
    for _ in range(4):
        ids.append(post(client))
        answer()
    first = read(client, f"/events?ids={','.join(ids)}")

    again = read(client, f"/events?ids={','.join(ids)}", last_id=first[1]["id"])

    assert states_of(again) == [(id, "done") for id in ids[2:]]


def test_a_client_that_reconnects_after_the_end_gets_204(
    client: flask.testing.FlaskClient, answer: Callable[..., list[str]]
) -> None:
    id = post(client)
    answer()
    end = read(client, f"/events?ids={id}")[-1]

    response = client.get(f"/events?ids={id}", headers={"Last-Event-ID": end["id"]})

    assert response.status_code == 204


def test_a_client_that_reconnects_after_hours_gets_everything_again(
    client: flask.testing.FlaskClient, store: Store, answer: Callable[..., list[str]]
) -> None:
    id = post(client)
    answer()
    last = read(client, f"/events?ids={id}")[0]["id"]
    post(client)
    answer()
    store.changes.purge(before=datetime.now(UTC) + timedelta(hours=1))

    again = read(client, f"/events?ids={id}", last_id=last)

    assert states_of(again) == [(id, "done")]


def test_a_retried_request_keeps_its_stream_open(
    client: flask.testing.FlaskClient, store: Store, answer: Callable[..., list[str]]
) -> None:
    failed = post(client)
    answer(fail_with="It is torn.")
    waiting = post(client)
    stream = client.get(f"/events?ids={failed},{waiting}")
    pieces = stream.iter_encoded()
    text = ""
    while '"failed"' not in text:
        text += next(pieces).decode()

    store.requests.retry(failed, now=datetime.now(UTC))
    answer()
    text += "".join(piece.decode() for piece in pieces)
    stream.close()

    assert states_of(parse(text))[:2] == [(waiting, "queued"), (failed, "failed")]
    assert {(failed, "done"), (waiting, "done")} <= set(states_of(parse(text)))


@pytest.mark.parametrize("query", ["", "?ids=", "?ids=a&all=1", "?all=2", "?ids=a&x=1", "?ids=" + "a," * 1001 + "b"])
def test_a_stream_of_nothing_or_of_too_much_is_refused(client: flask.testing.FlaskClient, query: str) -> None:
    if query.count(",") > 1000:
        query = "?ids=" + ",".join(f"{number:x}" for number in range(1001))

    response = client.get(f"/events{query}")

    assert response.status_code == 400
    assert response.json["code"] == "invalid_params"


def test_an_unknown_request_has_no_stream(client: flask.testing.FlaskClient) -> None:
    response = client.get(f"/events?ids={post(client)},nobody")

    assert response.status_code == 404
    assert "nobody" in response.json["reason"]


def test_a_listener_without_a_free_slot_gets_retry_after(settings: ServerSettings, store: Store) -> None:
    client = create_app(replace(settings, max_streams=1), store).test_client()
    id = post(client)
    first = client.get(f"/events?ids={id}")

    refused = client.get(f"/events?ids={id}")
    first.close()
    later = client.get(f"/events?ids={id}")

    assert (refused.status_code, refused.json["code"]) == (503, "streams_full")
    assert refused.headers["Retry-After"] == "5"
    assert later.status_code == 200
    later.close()


def test_an_operator_gets_how_many_changed_to_which_state(
    client: flask.testing.FlaskClient, answer: Callable[..., list[str]]
) -> None:
    stream = client.get("/events?all=1")
    pieces = stream.iter_encoded()
    next(pieces)
    for _ in range(3):
        post(client)
    threading.Timer(0.1, answer).start()

    counts: dict[str, int] = {}
    while not counts.get("done"):
        for event in parse(next(pieces).decode()):
            assert event["event"] == "changes"
            for state, count in event["data"]["changes"].items():
                counts[state] = counts.get(state, 0) + count

    assert counts == {"claimed": 3, "done": 3}
    stream.close()


def test_a_batch_streams_its_progress_and_each_of_its_requests(
    client: flask.testing.FlaskClient, answer: Callable[..., list[str]]
) -> None:
    files = [(io.BytesIO(make_image(color)), f"{color}.png") for color in ("red", "green", "blue")]
    batch = client.post(f"/requestPredictions/{MODEL}?fresh=1", data={"image": files}).json
    ids = {item["req_id"] for item in batch["items"]}
    post(client)
    stream = client.get(f"/batches/{batch['batch_id']}/events")
    pieces = stream.iter_encoded()
    text = next(pieces).decode() + next(pieces).decode()

    answer()
    text += "".join(piece.decode() for piece in pieces)
    stream.close()

    events = parse(text)
    progress = [event["data"] for event in events if event["event"] == "batch"]
    assert (progress[0]["items"], progress[0]["queued"], progress[0]["done"]) == (3, 3, 0)
    assert (progress[-1]["queued"], progress[-1]["done"]) == (0, 3)
    assert {id for id, status in states_of(events) if status == "done"} == ids
    assert events[-1]["event"] == "end"
    # A client that connects late gets what has ended, in the same order.
    late = read(client, f"/batches/{batch['batch_id']}/events")
    assert states_of(late) == [one for one in states_of(events) if one[1] == "done"]


def test_an_unknown_batch_has_no_stream(client: flask.testing.FlaskClient) -> None:
    assert client.get("/batches/nobody/events").status_code == 404


def make_key(store: Store, name: str, *scopes: Scope) -> dict[str, str]:
    id, key = keys.make_key()
    now = datetime.now(UTC)
    store.keys.add(
        keys.KeyRecord(id=id, name=name, sha256=keys.hash_key(key), scopes=frozenset(scopes), created_at=now)
    )
    return {"Authorization": f"Bearer {key}"}


def test_nobody_streams_requests_of_another_key(client: flask.testing.FlaskClient, store: Store) -> None:
    mine = make_key(store, "mine", Scope.SUBMIT, Scope.READ)
    other = make_key(store, "other", Scope.SUBMIT, Scope.READ)
    operator = make_key(store, "operator", Scope.OPERATE)
    id = client.post(URL, data=make_image(), content_type="image/png", headers=mine).json["req_id"]
    batch = client.post(
        f"/requestPredictions/{MODEL}", data={"image": [(io.BytesIO(make_image()), "k.png")]}, headers=mine
    ).json["batch_id"]

    def status(path: str, headers: dict[str, str]) -> int:
        with client.get(path, headers=headers) as response:
            return response.status_code

    for path in (f"/events?ids={id}", f"/batches/{batch}/events"):
        assert [status(path, who) for who in (mine, other, operator, {})] == [200, 404, 200, 401]
    assert [status("/events?all=1", who) for who in (mine, operator)] == [403, 200]


@pytest.fixture
def watchful(client: flask.testing.FlaskClient, store: Store) -> flask.testing.FlaskClient:
    """The application; each look at a key reads it from the store, and open streams are checked without a pause."""
    guard, events = get_guard(client.application), get_context(client.application).change_dispatcher
    assert FRESH_SECONDS + events.check_seconds < 5
    guard.key_cache = KeyCache(store.keys, monotonic=itertools.count(step=60).__next__)
    events.check_seconds = 0.0
    return client


@pytest.mark.parametrize("path", ["/events?ids={id}", "/batches/{batch}/events", "/events?all=1"])
def test_a_stream_ends_with_its_key(watchful: flask.testing.FlaskClient, store: Store, path: str) -> None:
    mine, others = make_key(store, "mine", Scope.OPERATE), make_key(store, "other", Scope.READ)
    sent = watchful.post(
        f"/requestPredictions/{MODEL}", data={"image": [(io.BytesIO(make_image()), "k.png")]}, headers=mine
    ).json
    stream = watchful.get(path.format(id=sent["items"][0]["req_id"], batch=sent["batch_id"]), headers=mine)
    pieces = stream.iter_encoded()
    next(pieces)

    store.keys.revoke("other", now=datetime.now(UTC))
    reader = threading.Thread(target=list, args=(pieces,))
    reader.start()
    reader.join(0.2)
    was_open = reader.is_alive()
    store.keys.revoke("mine", now=datetime.now(UTC))
    reader.join(DEADLINE_SECONDS)

    assert was_open
    assert not reader.is_alive()
    stream.close()
    assert watchful.get("/events?all=1", headers=others).status_code == 401


def test_a_slow_reader_gets_nothing_after_the_end_of_its_key(watchful: flask.testing.FlaskClient, store: Store) -> None:
    mine = make_key(store, "mine", Scope.SUBMIT, Scope.READ)
    ids = [
        watchful.post(f"{URL}?fresh=1", data=make_image(), content_type="image/png", headers=mine).json["req_id"]
        for _ in range(3)
    ]
    stream = watchful.get(f"/events?ids={','.join(ids)}", headers=mine)
    pieces = stream.iter_encoded()
    first = [next(pieces), next(pieces)]

    store.keys.revoke("mine", now=datetime.now(UTC))
    (listener,) = get_context(watchful.application).change_dispatcher._listeners
    wait_until(lambda: listener.is_ended)

    assert b"event: request" in first[1]
    assert list(pieces) == []
    stream.close()


def test_the_streams_of_an_open_server_end_with_the_first_key(
    watchful: flask.testing.FlaskClient, store: Store
) -> None:
    stream = watchful.get(f"/events?ids={post(watchful)}")
    reader = threading.Thread(target=lambda: list(stream.iter_encoded()))
    reader.start()

    make_key(store, "first", Scope.OPERATE)
    reader.join(DEADLINE_SECONDS)

    assert not reader.is_alive()
    stream.close()


def test_a_stream_ends_with_the_session_of_its_browser(watchful: flask.testing.FlaskClient, store: Store) -> None:
    key = make_key(store, "mine", Scope.OPERATE)["Authorization"].removeprefix("Bearer ")
    watchful.post("/login", data={"key": key}, headers={"Origin": "http://localhost"})
    stream = watchful.get("/events?all=1")
    reader = threading.Thread(target=lambda: list(stream.iter_encoded()))
    reader.start()
    reader.join(0.2)
    was_open = reader.is_alive()

    get_guard(watchful.application).sessions._max_age_seconds = -1
    reader.join(DEADLINE_SECONDS)

    assert stream.status_code == 200
    assert was_open
    assert not reader.is_alive()
    stream.close()


def test_an_idle_stream_sends_heartbeats(client: flask.testing.FlaskClient) -> None:
    get_context(client.application).change_dispatcher.heartbeat_seconds = 0.05
    for path in (f"/events?ids={post(client)}", "/events?all=1"):
        stream = client.get(path)

        assert any(piece == b": alive\n\n" for piece in itertools.islice(stream.iter_encoded(), 5))
        stream.close()


def test_a_head_request_takes_no_slot(settings: ServerSettings, store: Store) -> None:
    client = create_app(replace(settings, max_streams=1), store).test_client()
    id = post(client)

    for _ in range(3):
        with client.head(f"/events?ids={id}") as response:
            assert response.status_code == 200


def test_a_slow_listener_reads_from_the_feed_again(
    client: flask.testing.FlaskClient, answer: Callable[..., list[str]]
) -> None:
    get_context(client.application).change_dispatcher.max_pending = 2
    ids = [post(client) for _ in range(8)]
    stream = client.get(f"/events?ids={','.join(ids)}")
    pieces = stream.iter_encoded()
    text = "".join(next(pieces).decode() for _ in range(9))

    answer()
    text += "".join(piece.decode() for piece in pieces)
    stream.close()

    done = [id for id, status in states_of(parse(text)) if status == "done"]
    assert sorted(done) == sorted(ids)


def has_event_thread() -> bool:
    return any(thread.name == "events" for thread in threading.enumerate())


def test_nothing_polls_without_a_listener(client: flask.testing.FlaskClient, answer: Callable[..., list[str]]) -> None:
    id = post(client)
    answer()
    read(client, f"/events?ids={id}")

    wait_until(lambda: not has_event_thread())


def test_stopping_ends_the_streams(settings: ServerSettings, store: Store) -> None:
    app = create_app(settings, store)
    client, events = app.test_client(), get_context(app).change_dispatcher
    id = post(client)
    threading.Thread(target=lambda: (wait_until(has_event_thread), events.stop())).start()

    stream = read(client, f"/events?ids={id}")

    assert states_of(stream) == [(id, "queued")]
    assert client.get(f"/events?ids={id}").status_code == 503


@pytest.mark.parametrize("last_id", ["", "x", "7", "7-end", ".end", "A" * 43, "é", "A" * 5000])
def test_an_id_that_is_none_of_the_stream_is_its_start(
    client: flask.testing.FlaskClient, answer: Callable[..., list[str]], last_id: str
) -> None:
    id = post(client)
    answer()

    response = client.get(f"/events?ids={id}", headers={"Last-Event-ID": last_id})

    assert response.status_code == (204 if last_id == ".end" else 200)
    assert states_of(parse(response.text)) == ([] if last_id == ".end" else [(id, "done")])


def test_the_ids_of_events_tell_nothing_of_other_keys(
    client: flask.testing.FlaskClient, store: Store, answer: Callable[..., list[str]]
) -> None:
    mine, other = (make_key(store, name, Scope.SUBMIT, Scope.READ) for name in ("mine", "other"))
    id, theirs = (
        client.post(URL, data=make_image(), content_type="image/png", headers=headers).json["req_id"]
        for headers in (mine, other)
    )
    answer()

    events, events_of_other = (
        parse(client.get(f"/events?ids={one}", headers=headers).text) for one, headers in ((id, mine), (theirs, other))
    )
    again = client.get(f"/events?ids={theirs}", headers={**other, "Last-Event-ID": events[0]["id"]})

    codecs = get_context(client.application).cursors
    record = store.requests.get(id)
    (position, _), *_ = store.changes.read_changed([record.number])
    assert codecs.codec("events", record.key_id).read(events[0]["id"]) == (position[0], 2**62)
    assert not {event["id"] for event in events} & {event["id"] for event in events_of_other}
    # An id of another key is none of this one's.
    assert states_of(parse(again.text)) == [(theirs, "done")]


def test_a_dispatcher_that_cannot_read_polls_again(store: Store, client: flask.testing.FlaskClient) -> None:
    failures = iter([RuntimeError("once"), None])

    class Failing:
        def list(self, after: int, *, limit: int) -> Any:
            if (failure := next(failures, None)) is not None:
                raise failure
            return store.changes.list(after, limit=limit)

        def __getattr__(self, name: str) -> Any:
            return getattr(store.changes, name)

    events = ChangeDispatcher(Failing(), store.progress, capacity=1)
    number = store.requests.get(post(client)).number
    listener = Listener(numbers=[number], is_allowed=lambda: True)

    with events.listening(listener):
        store.requests.cancel(store.requests.list()[0].id, now=datetime.now(UTC))
        found = listener.wait(DEADLINE_SECONDS)

    assert found is not None
    assert [one.request.state for one in found] == [RequestState.CANCELLED]


def test_a_listener_is_notified_after_no_thread_could_be_started(
    client: flask.testing.FlaskClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = ChangeDispatcher(store.changes, store.progress, capacity=1)
    number = store.requests.get(post(client)).number
    listener = Listener(numbers=[number], is_allowed=lambda: True)

    def no_thread(*arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as without_threads, pytest.raises(RuntimeError):
        without_threads.setattr(threading.Thread, "start", no_thread)
        with events.listening(Listener(numbers=[number], is_allowed=lambda: True)):
            pass
    with events.listening(listener):
        store.requests.cancel(store.requests.list()[0].id, now=datetime.now(UTC))

        assert listener.wait(DEADLINE_SECONDS)


# Through a real server


@pytest.fixture
def server_variables() -> dict[str, str]:
    return {"MLG_MAX_STREAMS": "210"}


def store_of(running: RunningServer) -> Iterator[Store]:
    store = Store(ServerSettings(home=running.home))
    yield store
    store.close()


def finish_all(store: Store) -> float:
    """Answer everything that is queued; returns when it was recorded."""
    now = datetime.now(UTC)
    claims = store.requests.claim(
        models=[MODEL], limit=1000, now=now, lease_ends_at=now + timedelta(seconds=30), oldest_before=None
    )
    answers = [
        Answer(claim=claim, output=OUTPUT, digest="d" * 64, chunk_id="c1", provider="local", seconds=0.01)
        for claim in claims
    ]
    store.requests.finish(answers, now=now)
    return time.monotonic()


def open_stream(running: RunningServer, path: str) -> socket.socket:
    address = urlsplit(running.base)
    connection = socket.create_connection((address.hostname, address.port), timeout=DEADLINE_SECONDS)
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
    return connection


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    text = b""
    while mark not in text:
        piece = connection.recv(65536)
        assert piece, text
        text += piece
    return text


def send(running: RunningServer, count: int) -> list[str]:
    with httpx.Client(base_url=running.base, timeout=DEADLINE_SECONDS) as client:
        return [
            client.post(f"{URL}?fresh=1", content=make_image(), headers={"Content-Type": "image/png"}).json()["req_id"]
            for _ in range(count)
        ]


def test_two_hundred_streams_leave_threads_for_uploads_and_a_quick_stop(server: RunningServer) -> None:
    (id,) = send(server, 1)
    streams = [open_stream(server, f"/events?ids={id}") for _ in range(200)]
    for stream in streams:
        assert b"event: request" in read_until(stream, b'"queued"')

    began = time.monotonic()
    send(server, 20)
    uploads_seconds = time.monotonic() - began
    for store in store_of(server):
        recorded_at = finish_all(store)
    for stream in streams:
        read_until(stream, b"event: end")
    told_seconds = time.monotonic() - recorded_at
    others = [open_stream(server, f"/events?ids={send(server, 1)[0]}") for _ in range(3)]
    for stream in others:
        read_until(stream, b'"queued"')
    began = time.monotonic()

    status = server.stop()
    stop_seconds = time.monotonic() - began

    assert uploads_seconds < 10 * slowness()
    # One listener is told within 0.2 s (next test); two hundred on a machine that is busy with other tests take longer.
    assert told_seconds < 5 * slowness()
    assert status == 0
    assert stop_seconds < 5 * slowness()
    for stream in (*streams, *others):
        stream.close()


def test_an_answer_reaches_a_listener_at_once(server: RunningServer) -> None:
    seconds = []
    for store in store_of(server):
        for _ in range(5):
            (id,) = send(server, 1)
            stream = open_stream(server, f"/events?ids={id}")
            read_until(stream, b'"queued"')
            recorded_at = finish_all(store)
            read_until(stream, b'"done"')
            seconds.append(time.monotonic() - recorded_at)
            stream.close()

    assert min(seconds) < 0.2 * slowness(), seconds


def test_a_disconnected_client_frees_its_slot(start_server: Callable[..., RunningServer]) -> None:
    server = start_server(MLG_MAX_STREAMS="1")
    ids = send(server, 2)
    gone = open_stream(server, f"/events?ids={ids[0]}")
    read_until(gone, b'"queued"')
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    gone.close()

    # Its thread finds out with the next thing that it writes, a heartbeat or an event.
    deadline = time.monotonic() + DEADLINE_SECONDS
    with httpx.Client(base_url=server.base, timeout=DEADLINE_SECONDS) as client:
        while True:
            for store in store_of(server):
                finish_all(store)
                store_states = [store.requests.get(id).state for id in ids]
            with client.stream("GET", f"/events?ids={ids[1]}") as response:
                if response.status_code == 200:
                    break
            assert time.monotonic() < deadline, store_states
            time.sleep(0.05)


def test_a_stream_that_was_cut_off_resumes_at_another_server(start_server: Callable[..., RunningServer]) -> None:
    first = start_server()
    ids = send(first, 3)
    stream = open_stream(first, f"/events?ids={','.join(ids)}")
    seen = parse(read_until(stream, ids[2].encode()).decode())
    first.stop(signal.SIGKILL)
    stream.close()
    second = start_server()
    for store in store_of(second):
        finish_all(store)

    with httpx.Client(base_url=second.base, timeout=DEADLINE_SECONDS) as client:
        text = client.get(f"/events?ids={','.join(ids)}", headers={"Last-Event-ID": seen[-1]["id"]}).text

    assert states_of(parse(text)) == [(id, "done") for id in ids]

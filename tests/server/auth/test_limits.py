"""What one client may take of a server process: slots to read bodies, to hold reads, and for event streams."""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from urllib.parse import urlsplit

import flask.testing
import pytest

from server.app import create_app
from server.auth.limits import FairSlots, network_of
from server.live.changes import ChangeDispatcher
from server.live.long_poll import LongPoller
from server.settings import ServerSettings
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.store import Store
from tests.conftest import RunningServer
from tests.timing import DEADLINE_SECONDS, slowness, wait_until

URL = "/requestPrediction/efficientnet_lite0"
SCOPES = frozenset({Scope.SUBMIT, Scope.READ})


def add_key(store: Store) -> dict[str, str]:
    id, key = make_key()
    store.keys.add(KeyRecord(id=id, name=id, sha256=hash_key(key), scopes=SCOPES, created_at=datetime.now(UTC)))
    return {"X-API-Key": key}


def take_all(slots: FairSlots, client: str | None) -> int:
    count = 0
    while slots.acquire(client):
        count += 1
    return count


def test_a_client_takes_at_most_half_of_the_slots_and_always_leaves_some() -> None:
    slots = FairSlots(16)

    assert [take_all(slots, client) for client in "abcdef"] == [8, 4, 2, 1, 1, 0]

    for _ in range(8):
        slots.release("a")
    assert (take_all(slots, "f"), take_all(slots, "a")) == (4, 2)


def test_where_all_callers_are_one_client_it_takes_all_slots() -> None:
    assert take_all(FairSlots(16), None) == 16


def test_one_slot_is_for_whoever_comes_first() -> None:
    slots = FairSlots(1)

    assert (slots.acquire("a"), slots.acquire("b")) == (True, False)
    slots.release("a")
    assert slots.acquire("b")


def test_twenty_reads_of_one_key_are_held_by_default() -> None:
    assert take_all(FairSlots(ServerSettings.from_env({}).max_held_reads), "a") >= 20


def test_reads_that_one_key_holds_leave_slots_to_others(settings: ServerSettings, store: Store, photo: bytes) -> None:
    client = create_app(settings, store).test_client()
    id = client.post(URL, data=photo, content_type="image/jpeg").get_json()["req_id"]
    queued = store.requests.get(id)
    dispatcher = ChangeDispatcher(store.changes, store.progress, capacity=1)
    poller = LongPoller(dispatcher, store.requests, capacity=4)
    ended: list[str] = []

    def hold(key: str) -> threading.Thread:
        def wait() -> None:
            poller.wait_until_final(queued, 600, client=key, is_allowed=lambda: True)
            ended.append(key)

        thread = threading.Thread(target=wait)
        thread.start()
        return thread

    threads = [hold("a") for _ in range(3)]
    wait_until(lambda: ended == ["a"])  # the third was not held
    threads.append(hold("b"))
    wait_until(lambda: poller.count_held() == 3)

    assert ended == ["a"]
    dispatcher.stop()
    for thread in threads:
        thread.join(120)


def test_streams_of_one_key_leave_slots_to_others(settings: ServerSettings, store: Store, photo: bytes) -> None:
    client = create_app(replace(settings, max_streams=4), store).test_client()
    keys = {name: add_key(store) for name in ("alice", "bob")}

    def open_stream(name: str) -> int:
        posted = client.post(URL, data=photo, content_type="image/jpeg", headers=keys[name]).get_json()
        opened = client.get(f"/events?ids={posted['req_id']}", headers=keys[name])
        streams.callback(opened.close)
        return opened.status_code

    with contextlib.ExitStack() as streams:
        assert [open_stream("alice") for _ in range(3)] == [200, 200, 503]
        assert open_stream("bob") == 200
    assert [open_stream("alice") for _ in range(2)] == [200, 200]


class StalledBody(io.BytesIO):
    """A body that does not come before the test lets it."""

    def __init__(self, data: bytes, entered: threading.Semaphore, leave: threading.Event) -> None:
        super().__init__(data)
        self._entered, self._leave = entered, leave

    def read(self, size: int | None = -1) -> bytes:
        self._entered.release()
        assert self._leave.wait(DEADLINE_SECONDS)
        return super().read(size)


def test_bodies_that_one_key_sends_slowly_leave_threads_to_others(
    settings: ServerSettings, store: Store, photo: bytes
) -> None:
    app = create_app(replace(settings, server_threads=2), store)
    alice, bob = add_key(store), add_key(store)
    entered, leave, statuses = threading.Semaphore(0), threading.Event(), list[int]()

    def post(headers: dict[str, str], body: io.BytesIO) -> flask.testing.TestResponse:
        return app.test_client().post(URL, input_stream=body, content_type="image/jpeg", headers=headers)

    def stall() -> None:
        statuses.append(post(alice, StalledBody(photo, entered, leave)).status_code)

    threads = [threading.Thread(target=stall) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert entered.acquire(timeout=DEADLINE_SECONDS)
    refused, accepted = post(alice, io.BytesIO(photo)), post(bob, io.BytesIO(photo))
    leave.set()
    for thread in threads:
        thread.join(120)

    assert (refused.status_code, refused.get_json()["code"]) == (503, "too_many_uploads")
    assert refused.headers["Retry-After"] == "1"
    assert accepted.status_code == 202
    assert statuses == [202] * 8


def test_batches_of_one_key_leave_threads_that_work_to_others(
    settings: ServerSettings, store: Store, photo: bytes
) -> None:
    app = create_app(replace(settings, server_threads=8), store)
    alice, bob = add_key(store), add_key(store)
    entered, leave, statuses = threading.Semaphore(0), threading.Event(), list[int]()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jpg", photo)

    def post(headers: dict[str, str], body: io.BytesIO) -> flask.testing.TestResponse:
        url = URL.replace("Prediction", "Predictions")
        return app.test_client().post(url, input_stream=body, content_type="application/zip", headers=headers)

    def stall() -> None:
        statuses.append(post(alice, StalledBody(file.getvalue(), entered, leave)).status_code)

    threads = [threading.Thread(target=stall) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert entered.acquire(timeout=DEADLINE_SECONDS)
    refused, accepted = post(alice, io.BytesIO(file.getvalue())), post(bob, io.BytesIO(file.getvalue()))
    leave.set()
    for thread in threads:
        thread.join(120)

    assert (refused.status_code, refused.get_json()["code"]) == (503, "too_many_uploads")
    assert (accepted.status_code, statuses) == (202, [202, 202])


@pytest.fixture
def photo(photos: dict[str, bytes]) -> bytes:
    return photos["rocket"]


#: What somebody without a key sends, and then nothing more.
UNFINISHED = {
    "headers": b"POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ",
    "a login": (
        b"POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    ),
    "a login in chunks": (
        b"POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n4\r\n{"
    ),
    "a logout under an idempotency key": (
        b"POST /logout HTTP/1.1\r\nHost: 127.0.0.1\r\nIdempotency-Key: a\r\nContent-Length: 2000000000\r\n\r\nx"
    ),
    "an upload": b"POST /requestPrediction/x HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2000000000\r\n\r\nx",
}


def test_slow_clients_without_a_key_stop_nobody(
    store: Store, start_server: Callable[..., RunningServer], photo: bytes
) -> None:
    key = add_key(store)
    # More connections than threads: 16 that read, 8 held reads, a stream, 2 more.
    server = start_server(MLG_SERVER_THREADS="2", MLG_MAX_STREAMS="1")
    address = urlsplit(server.base)
    bound = 1.0 * slowness()
    with contextlib.ExitStack() as stack:
        for number in range(100):
            slow = stack.enter_context(
                socket.create_connection((address.hostname, address.port), timeout=DEADLINE_SECONDS)
            )
            with contextlib.suppress(ConnectionError):  # it may have been answered already
                slow.sendall(list(UNFINISHED.values())[number % len(UNFINISHED)])

        for method, path, body in (("GET", "/healthz", None), ("POST", URL, photo)) * 3:
            connection = http.client.HTTPConnection(address.netloc, timeout=bound)
            connection.request(method, path, body, {"Content-Type": "image/jpeg", **key})
            status = connection.getresponse().status
            connection.close()

            assert status == (200 if method == "GET" else 202)


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:db8:1:2::1", "2001:db8:1:2::"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("", ""),
    ],
)
def test_all_addresses_that_one_client_may_own_are_one_client(address: str, network: str) -> None:
    assert network_of(address) == network

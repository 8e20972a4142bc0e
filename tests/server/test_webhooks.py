"""Webhooks: signatures, retries, several senders, and the commands."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import click
import flask.testing
import httpx
import pytest
from click.testing import CliRunner
from PIL import Image

from cli.webhooks import webhooks
from provider_image.errors import ConfigError, InvalidParams
from server.app import create_app
from server.errors import DeliveryFailed
from server.http_client import HttpClient
from server.settings import ServerSettings
from server.webhooks import (
    GROUP_SIZE,
    JITTER,
    LEASE_SECONDS,
    RETRY_SECONDS,
    SEND_PAUSE_SECONDS,
    Deliverer,
    check_webhook,
    send,
    sign,
)
from store.clients.keys import KeyRecord, Scope, UnknownKey, hash_key, make_key
from store.clients.webhooks import MAX_DELIVERIES_PER_HOST, EndpointRecord, UnknownWebhook, new_secret
from store.errors import StoreBusy
from store.requests import Answer
from store.store import Store
from tests.conftest import MODEL, OUTPUT, RunningServer
from tests.timing import DEADLINE_SECONDS, wait_until

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
#: Sends also to this machine.
PRIVATE = HttpClient(allows_private=True)
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


@dataclass
class Receiver:
    """A small HTTP server that keeps what it gets."""

    url: str
    #: Statuses to answer with, the last one from then on.
    statuses: list[int] = field(default_factory=lambda: [200])
    headers: dict[str, str] = field(default_factory=dict)
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    may_answer: threading.Event = field(default_factory=threading.Event)

    def messages(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.got]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            made.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
            made.may_answer.wait(DEADLINE_SECONDS)
            status = made.statuses.pop(0) if len(made.statuses) > 1 else made.statuses[0]
            with contextlib.suppress(OSError):
                self.send_response(status)
                for name, value in made.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made = Receiver(url=f"http://127.0.0.1:{server.server_address[1]}/hook?x=1")
    made.may_answer.set()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.may_answer.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def private(settings: ServerSettings) -> ServerSettings:
    return replace(settings, allows_private_webhooks=True)


@pytest.fixture
def client(private: ServerSettings, store: Store) -> flask.testing.FlaskClient:
    return create_app(private, store).test_client()


def make_image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "olive").save(file, "PNG")
    return file.getvalue()


def post(
    client: flask.testing.FlaskClient, webhook: str | None = None, headers: Mapping[str, str] | None = None
) -> str:
    fields = {"image": (io.BytesIO(make_image()), "k.png"), "fresh": "1", **({"webhook": webhook} if webhook else {})}
    response = client.post(f"/requestPrediction/{MODEL}", data=fields, headers=headers)
    assert response.status_code == 202, response.text
    id: str = response.json["req_id"]
    return id


class Clock:
    """The real time, and what is added to it."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def deliverer(store: Store, clock: Clock) -> Deliverer:
    return Deliverer(store, http_client=PRIVATE, clock=clock)


def send_due(deliverer: Deliverer) -> None:
    for thread in deliverer.send_due():
        thread.join()
    deliverer.record()


# The signature


def test_a_signature_is_the_hmac_of_id_time_and_body() -> None:
    body = b'{"type":"request.done"}'
    # From: printf 'msg_1.1674087231.{"type":"request.done"}' |
    #   openssl dgst -sha256 -mac HMAC -macopt hexkey:000102...1f -binary | base64
    expected = "HCLUl/klrE5w+Oyl2LQFA49KgED/S0fIOnWcFjLUV/4="

    assert sign(SECRET, "msg_1", 1674087231, body) == f"v1,{expected}"
    assert sign(SECRET, "msg_2", 1674087231, body) != f"v1,{expected}"


def test_an_invalid_secret_signs_nothing() -> None:
    with pytest.raises(ValueError, match="base64"):
        sign("whsec_???", "msg_1", 1, b"")


def test_a_new_secret_has_256_bits() -> None:
    assert len(base64.b64decode(new_secret().removeprefix("whsec_"))) == 32
    assert new_secret() != new_secret()


def test_a_message_carries_what_a_receiver_checks(receiver: Receiver) -> None:
    status, _ = send(receiver.url, id="msg_1", body=b"{}", secret=SECRET, http_client=PRIVATE, now=NOW)

    ((headers, body),) = receiver.got
    assert (status, body) == (200, b"{}")
    assert headers["webhook-id"] == "msg_1"
    assert headers["webhook-timestamp"] == str(int(NOW.timestamp()))
    assert headers["webhook-signature"] == sign(SECRET, "msg_1", int(NOW.timestamp()), b"{}")
    assert headers["content-type"] == "application/json"


# Addresses


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/hook",
        "https://127.0.0.1/hook",
        "https://localhost/hook",
        "https://user:secret@example.org/",
        "https://example.org:8443/",
        "https://exämple.org/",
        "ftp://example.org/",
        "hook",
        "",
    ],
)
def test_only_public_https_urls_are_accepted(url: str) -> None:
    with pytest.raises(InvalidParams, match="webhook"):
        check_webhook(url, allows_private=False)


@pytest.mark.parametrize("url", ["http://", "https://a:b@c/", "ftp://x/", "http://x:0/", "http://a b/", "http://[::1/"])
def test_an_invalid_url_is_refused_even_where_private_ones_are_accepted(url: str) -> None:
    with pytest.raises(InvalidParams, match="webhook"):
        check_webhook(url, allows_private=True)


def test_accepted_urls() -> None:
    assert check_webhook(None, allows_private=False) is None
    assert check_webhook("https://example.org/x?y", allows_private=False) == "https://example.org/x?y"
    assert check_webhook("http://10.0.0.5:8080/x", allows_private=True) == "http://10.0.0.5:8080/x"


def test_a_private_address_is_not_connected_to(receiver: Receiver) -> None:
    public = HttpClient(resolve=lambda host, seconds: ["127.0.0.1"])

    with pytest.raises(DeliveryFailed, match="not public"):
        send("https://example.org/", id="m", body=b"", secret=SECRET, http_client=public, now=NOW)
    with pytest.raises(DeliveryFailed):
        send(receiver.url, id="m", body=b"", secret=SECRET, http_client=public, now=NOW)

    assert receiver.got == []


def test_a_receiver_that_does_not_answer_is_given_up(receiver: Receiver) -> None:
    receiver.may_answer.clear()

    with pytest.raises(DeliveryFailed, match=r"did not answer within 0.3 s"):
        send(receiver.url, id="m", body=b"", secret=SECRET, http_client=PRIVATE, now=NOW, seconds=0.3)


def test_a_request_with_a_bad_webhook_is_refused(client: flask.testing.FlaskClient, store: Store) -> None:
    response = client.post(f"/requestPrediction/{MODEL}?webhook=ftp://x/", data=make_image(), content_type="image/png")

    assert (response.status_code, response.json["code"]) == (400, "invalid_params")
    assert store.requests.list() == []


# Delivering


def test_a_request_notifies_its_own_webhook(
    client: flask.testing.FlaskClient,
    store: Store,
    receiver: Receiver,
    deliverer: Deliverer,
    answer: Callable[..., list[str]],
) -> None:
    id = post(client, receiver.url)
    post(client)
    answer()

    send_due(deliverer)
    send_due(deliverer)

    ((headers, body),) = receiver.got
    (message,) = receiver.messages()
    assert message["type"] == "request.done"
    assert message["data"]["req_id"] == id
    assert message["data"]["status"] == "done"
    assert message["data"]["preds"][0][1] == "label_0"
    secret, timestamp = store.webhooks.secret(None), int(headers["webhook-timestamp"])
    assert headers["webhook-signature"] == sign(secret, headers["webhook-id"], timestamp, body)
    (delivery,) = store.webhooks.list_deliveries()
    assert (delivery.status, delivery.last_status, delivery.attempts) == ("delivered", 200, 1)


def test_a_failed_delivery_is_retried_with_the_same_message(
    client: flask.testing.FlaskClient,
    store: Store,
    receiver: Receiver,
    deliverer: Deliverer,
    clock: Clock,
    answer: Callable[..., list[str]],
) -> None:
    receiver.statuses = [500, 302, 204]
    post(client, receiver.url)
    answer()

    send_due(deliverer)
    send_due(deliverer)  # not due yet
    assert len(receiver.got) == 1
    for wait in RETRY_SECONDS[:2]:
        clock.ahead += timedelta(seconds=wait * (1 + JITTER) + 1)
        send_due(deliverer)

    assert len(receiver.got) == 3
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert len({body for _, body in receiver.got}) == 1
    assert len({headers["webhook-timestamp"] for headers, _ in receiver.got}) == 3
    assert store.webhooks.list_deliveries()[0].status == "delivered"


def test_a_message_is_dead_after_the_last_attempt_and_can_be_sent_again(
    client: flask.testing.FlaskClient,
    store: Store,
    receiver: Receiver,
    deliverer: Deliverer,
    clock: Clock,
    answer: Callable[..., list[str]],
) -> None:
    receiver.statuses = [500]
    post(client, receiver.url)
    answer()
    for _ in range(len(RETRY_SECONDS) + 3):
        send_due(deliverer)
        clock.ahead += timedelta(days=2)

    dead = client.get("/webhooks/deliveries?state=dead").json["deliveries"]
    receiver.statuses = [200]
    again = client.post(f"/webhooks/deliveries/{dead[0]['id']}/redeliver").json
    send_due(deliverer)

    assert len(receiver.got) == 1 + len(RETRY_SECONDS) + 1
    assert len(RETRY_SECONDS) >= 8
    assert (dead[0]["state"], dead[0]["last_status"], dead[0]["attempts"]) == ("dead", 500, 9)
    assert again["delivery"]["state"] == "pending"
    assert client.get("/webhooks/deliveries?state=dead").json["deliveries"] == []
    assert client.get("/webhooks/deliveries").json["deliveries"][0]["state"] == "delivered"


def test_a_receiver_may_ask_for_a_longer_delay(
    client: flask.testing.FlaskClient,
    store: Store,
    receiver: Receiver,
    deliverer: Deliverer,
    clock: Clock,
    answer: Callable[..., list[str]],
) -> None:
    receiver.statuses, receiver.headers = [429], {"Retry-After": "1000"}
    post(client, receiver.url)
    answer()

    send_due(deliverer)

    next_at = store.webhooks.list_deliveries()[0].next_at
    assert next_at is not None
    assert timedelta(seconds=900) < next_at - clock() <= timedelta(seconds=1000)


def test_status_410_disables_an_endpoint(
    client: flask.testing.FlaskClient,
    store: Store,
    receiver: Receiver,
    deliverer: Deliverer,
    answer: Callable[..., list[str]],
) -> None:
    store.webhooks.add_endpoint(
        EndpointRecord(id="we_1", url=receiver.url, events=("request.done",), secret=SECRET, created_at=NOW)
    )
    receiver.statuses = [410]
    post(client)
    answer()

    send_due(deliverer)
    post(client)
    answer()
    send_due(deliverer)

    assert len(receiver.got) == 1
    assert store.webhooks.list_endpoints()[0].disabled_reason == "It answered with status 410."
    assert [one.status for one in store.webhooks.list_deliveries()] == ["dead"]


def test_a_request_that_was_retried_sends_no_message(
    client: flask.testing.FlaskClient,
    store: Store,
    receiver: Receiver,
    deliverer: Deliverer,
    answer: Callable[..., list[str]],
) -> None:
    id = post(client, receiver.url)
    answer(fail_with="It is torn.")
    store.requests.retry(id, now=datetime.now(UTC))

    send_due(deliverer)
    answer()
    send_due(deliverer)

    assert [message["data"]["status"] for message in receiver.messages()] == ["done"]


def test_a_deleted_request_still_sends_its_message(
    client: flask.testing.FlaskClient,
    store: Store,
    receiver: Receiver,
    deliverer: Deliverer,
    answer: Callable[..., list[str]],
) -> None:
    id = post(client, receiver.url)
    answer()
    later = datetime.now(UTC) + timedelta(days=1)
    store.retention.purge(images_before=later, results_before=later, now=datetime.now(UTC))

    send_due(deliverer)

    assert [message["data"] for message in receiver.messages()] == [{"req_id": id, "status": "done"}]


def test_a_slow_receiver_delays_only_itself(
    client: flask.testing.FlaskClient,
    store: Store,
    receiver: Receiver,
    deliverer: Deliverer,
    answer: Callable[..., list[str]],
) -> None:
    receiver.may_answer.clear()
    for number in range(6):
        post(client, f"{receiver.url}&slow")
        post(client, receiver.url.replace("127.0.0.1", "127.0.0.2") + f"&{number}")  # nobody listens there
    answer()

    threads = deliverer.send_due()
    deadline = time.monotonic() + DEADLINE_SECONDS
    while (
        sum(one.last_error is not None for one in store.webhooks.list_deliveries()) < 4 and time.monotonic() < deadline
    ):
        threads += deliverer.send_due()
        time.sleep(0.01)
    slow = len(receiver.got)
    receiver.may_answer.set()
    for thread in threads:
        thread.join()
    deliverer.record()

    assert slow == 4
    assert sum(one.last_error is not None for one in store.webhooks.list_deliveries()) >= 4


@pytest.mark.parametrize("hours", [1, -1])
def test_a_system_time_that_is_set_while_messages_are_sent_loses_none(
    client: flask.testing.FlaskClient,
    answer: Callable[..., list[str]],
    deliverer: Deliverer,
    store: Store,
    receiver: Receiver,
    clock: Clock,
    hours: int,
) -> None:
    receiver.may_answer.clear()
    first = post(client, receiver.url)
    answer()
    senders = deliverer.send_due()
    wait_until(lambda: receiver.got)

    clock.ahead = timedelta(hours=hours)
    again = deliverer.send_due()
    receiver.may_answer.set()
    for sender in [*senders, *again]:
        sender.join(DEADLINE_SECONDS)
    clock.ahead += timedelta(hours=2)  # what has ended is recorded before anything is claimed
    send_due(deliverer)

    # A message whose lease seems to have ended is sent again, under the same id.
    assert [len(senders), len(again)] == [1, int(hours > 0)]
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert len(receiver.got) == 1 + len(again)
    assert [message["data"]["req_id"] for message in receiver.messages()] == [first] * len(receiver.got)
    assert [one.status for one in store.webhooks.list_deliveries()] == ["delivered"]
    assert deliverer._sending == {}


def test_a_group_is_claimed_saved_and_recorded_with_one_commit_for_each_group(
    client: flask.testing.FlaskClient,
    store: Store,
    receiver: Receiver,
    deliverer: Deliverer,
    answer: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for id in ("we_1", "we_2"):
        events = ("request.done",)
        store.webhooks.add_endpoint(
            EndpointRecord(id=id, url=receiver.url, events=events, secret=SECRET, created_at=NOW)
        )
    for _ in range(2 * GROUP_SIZE // 2):
        post(client)
    answer()
    writes: list[object] = []
    write = store.database.write
    monkeypatch.setattr(store.database, "write", lambda function: (writes.append(function), write(function))[1])
    pauses: list[float] = []
    monkeypatch.setattr(deliverer._stopping, "wait", pauses.append)

    groups = []
    for _ in range(2):
        groups.append(deliverer.send_due())
        for thread in groups[-1]:
            thread.join()
    deliverer.record()
    deliverer.record()
    deliverer.send_due()

    assert [len(group) for group in groups] == [GROUP_SIZE, GROUP_SIZE]
    assert pauses == [SEND_PAUSE_SECONDS] * 2 * GROUP_SIZE
    assert len(writes) == 3
    assert [one.status for one in store.webhooks.list_deliveries()] == ["delivered"] * 2 * GROUP_SIZE


def test_a_message_is_saved_before_it_is_sent(
    client: flask.testing.FlaskClient,
    store: Store,
    receiver: Receiver,
    deliverer: Deliverer,
    answer: Callable[..., list[str]],
) -> None:
    receiver.may_answer.clear()
    post(client, receiver.url)
    answer()

    threads = deliverer.send_due()
    wait_until(lambda: receiver.got)
    saved = [one.payload for one in store.webhooks.list_deliveries()]
    receiver.may_answer.set()
    for thread in threads:
        thread.join()

    assert saved == [body.decode() for _, body in receiver.got]


def test_a_message_that_cannot_be_built_does_not_hold_up_others(
    client: flask.testing.FlaskClient,
    store: Store,
    receiver: Receiver,
    deliverer: Deliverer,
    clock: Clock,
    answer: Callable[..., list[str]],
) -> None:
    ids = [post(client, receiver.url) for _ in range(2)]
    answer()
    output = json.dumps([["n", "\ud800", 0.5]])  # no text in UTF-8
    store.database.execute("UPDATE requests SET output = ? WHERE id = ?", (output, ids[0]))

    send_due(deliverer)
    send_due(deliverer)
    sent = [message["data"]["req_id"] for message in receiver.messages()]
    store.database.execute("UPDATE requests SET output = '[]' WHERE id = ?", (ids[0],))
    clock.ahead += timedelta(seconds=LEASE_SECONDS + 1)
    send_due(deliverer)

    assert sent == [ids[1]]
    assert [message["data"]["req_id"] for message in receiver.messages()] == [ids[1], ids[0]]


def test_a_result_that_cannot_be_recorded_now_is_recorded_later(
    client: flask.testing.FlaskClient,
    store: Store,
    receiver: Receiver,
    deliverer: Deliverer,
    answer: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    post(client, receiver.url)
    answer()
    for thread in deliverer.send_due():
        thread.join()

    def fail(function: object) -> None:
        raise StoreBusy

    with monkeypatch.context() as patch:
        patch.setattr(store.database, "write", fail)
        with pytest.raises(StoreBusy):
            deliverer.send_due()
    pending = [one.status for one in store.webhooks.list_deliveries()]
    send_due(deliverer)

    assert pending == ["pending"]
    assert [one.status for one in store.webhooks.list_deliveries()] == ["delivered"]
    assert len(receiver.got) == 1


def test_a_stop_records_what_has_ended_and_what_ends_then(
    client: flask.testing.FlaskClient,
    store: Store,
    receiver: Receiver,
    deliverer: Deliverer,
    answer: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Only the stop can record.
    calls = iter([deliverer.send_due])
    monkeypatch.setattr(deliverer, "send_due", lambda: next(calls, deliverer._stopping.wait)())
    receiver.may_answer.clear()
    post(client, receiver.url)
    post(client, receiver.url.replace("127.0.0.1", "127.0.0.2"))  # nobody listens there
    answer()

    deliverer.start()
    wait_until(lambda: receiver.got and deliverer._results)
    deliverer.stop()
    at_the_stop = sum(one.last_error is not None for one in store.webhooks.list_deliveries())
    receiver.may_answer.set()

    wait_until(lambda: store.webhooks.list_deliveries(status="delivered"))
    assert at_the_stop == 1


def test_a_result_is_recorded_while_others_of_its_group_hang(
    client: flask.testing.FlaskClient,
    store: Store,
    receiver: Receiver,
    deliverer: Deliverer,
    answer: Callable[..., list[str]],
) -> None:
    receiver.may_answer.clear()
    post(client, receiver.url)
    post(client, receiver.url.replace("127.0.0.1", "127.0.0.2"))  # nobody listens there
    answer()

    deliverer.start()
    wait_until(lambda: any(one.last_error is not None for one in store.webhooks.list_deliveries()))
    deliverer.stop()

    assert store.webhooks.list_deliveries(status="delivered") == []
    receiver.may_answer.set()
    wait_until(lambda: store.webhooks.list_deliveries(status="delivered"))


def test_a_client_whose_receivers_hang_does_not_delay_the_messages_of_others(
    client: flask.testing.FlaskClient,
    store: Store,
    receiver: Receiver,
    deliverer: Deliverer,
    answer: Callable[..., list[str]],
) -> None:
    headers = []
    for name in ("slow", "other"):
        key_id, key = make_key()
        scopes = frozenset({Scope.SUBMIT})
        store.keys.add(KeyRecord(id=key_id, name=name, sha256=hash_key(key), scopes=scopes, created_at=NOW))
        headers.append({"Authorization": f"Bearer {key}"})
    receiver.may_answer.clear()
    for number in range(16):
        post(client, f"{receiver.url}&{number}", headers=headers[0])
    other = post(client, receiver.url, headers=headers[1])
    answer()

    threads = [thread for _ in range(5) for thread in deliverer.send_due()]
    wait_until(lambda: len(receiver.got) == MAX_DELIVERIES_PER_HOST + 1)
    receiver.may_answer.set()
    for thread in threads:
        thread.join()

    assert other in [message["data"]["req_id"] for message in receiver.messages()]
    assert len(threads) == MAX_DELIVERIES_PER_HOST + 1


def test_each_key_has_a_secret_of_its_own_that_it_can_replace(
    client: flask.testing.FlaskClient,
    store: Store,
    receiver: Receiver,
    deliverer: Deliverer,
    answer: Callable[..., list[str]],
) -> None:
    key_id, key = make_key()
    scopes = frozenset({Scope.SUBMIT})
    store.keys.add(KeyRecord(id=key_id, name="a", sha256=hash_key(key), scopes=scopes, created_at=NOW))
    headers = {"Authorization": f"Bearer {key}"}
    secrets = [client.post("/webhooks/secret", headers=headers).json["secret"] for _ in range(2)]
    post(client, receiver.url, headers=headers)
    answer()

    send_due(deliverer)

    ((got, body),) = receiver.got
    signatures = [sign(secret, got["webhook-id"], int(got["webhook-timestamp"]), body) for secret in secrets]
    assert got["webhook-signature"] == signatures[1] != signatures[0]
    assert store.webhooks.secret(None) not in secrets
    assert store.webhooks.secret(None, "another key") not in secrets


def test_several_servers_deliver_once_and_a_batch_sends_its_end(
    start_server: Callable[..., RunningServer], receiver: Receiver
) -> None:
    running = [start_server(MLG_WEBHOOKS_PRIVATE="1", MLG_SERVER_PROCESSES="2") for _ in range(2)]
    store = Store(ServerSettings(home=running[0].home))
    ids = []
    with httpx.Client(timeout=DEADLINE_SECONDS) as http_client:
        for number in range(12):
            made = http_client.post(
                f"{running[number % 2].base}/requestPrediction/{MODEL}",
                params={"webhook": receiver.url, "fresh": "1"},
                content=make_image(),
                headers={"Content-Type": "image/png"},
            )
            ids.append(made.json()["req_id"])
        files = [("image", (f"{number}.png", make_image())) for number in range(3)]
        batch = http_client.post(
            f"{running[0].base}/requestPredictions/{MODEL}?webhook={receiver.url}&fresh=1", files=files
        ).json()
    now = datetime.now(UTC)
    claims = store.requests.claim(
        models=[MODEL], limit=99, now=now, lease_ends_at=now + timedelta(seconds=30), oldest_before=None
    )
    store.requests.finish(
        [
            Answer(claim=one, output=OUTPUT, digest="d" * 64, chunk_id="c", provider="local", seconds=0.1)
            for one in claims
        ],
        now=now,
    )

    deadline = time.monotonic() + DEADLINE_SECONDS
    while store.webhooks.list_deliveries(status="pending") and time.monotonic() < deadline:
        time.sleep(0.02)
    store.close()

    messages = receiver.messages()
    assert sorted(one["data"]["req_id"] for one in messages if one["type"] == "request.done") == sorted(ids)
    (end,) = [one["data"] for one in messages if one["type"] == "batch.done"]
    assert (end["batch_id"], end["total"], end["done"]) == (batch["batch_id"], 3, 3)


# Views and commands


@pytest.mark.parametrize("query", ["?state=lost", "?limit=0", "?limit=x", "?x=1"])
def test_a_list_of_deliveries_refuses_unknown_parameters(client: flask.testing.FlaskClient, query: str) -> None:
    assert client.get(f"/webhooks/deliveries{query}").status_code == 400


def test_an_unknown_message_cannot_be_sent_again(client: flask.testing.FlaskClient) -> None:
    response = client.post("/webhooks/deliveries/msg_9/redeliver")

    assert (response.status_code, response.json["code"]) == (404, "unknown_webhook")


@pytest.fixture
def run(settings: ServerSettings, store: Store, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command on the home. Errors of mlg come through; `mlg.py` turns them into one line."""
    monkeypatch.setenv("MLG_HOME", str(settings.home))
    monkeypatch.setenv("MLG_WEBHOOKS_PRIVATE", "1")

    def type_in(*arguments: str) -> str:
        command: click.Command = webhooks
        result = CliRunner().invoke(command, list(arguments))
        if result.exception is not None:
            raise result.exception
        return result.output

    return type_in


def test_an_endpoint_is_added_listed_tested_and_removed(
    run: Callable[..., str], receiver: Receiver, store: Store
) -> None:
    id, secret = run("add", receiver.url, "--events", "request.done").split()

    listed = run("list", "--json")
    tested = run("test", id)
    removed = run("remove", id)

    assert json.loads(listed)["events"] == ["request.done"]
    assert secret not in listed + run("list")
    assert "200" in tested
    (headers, body) = receiver.got[0]
    assert json.loads(body)["type"] == "webhook.test"
    assert headers["webhook-signature"] == sign(secret, headers["webhook-id"], int(headers["webhook-timestamp"]), body)
    assert removed == ""
    assert store.webhooks.list_endpoints() == []


def test_a_secret_is_printed_once_and_replaced_by_a_command(run: Callable[..., str], store: Store) -> None:
    added = json.loads(run("add", "http://10.0.0.5/x", "--json"))
    key_id, _ = make_key()
    store.keys.add(KeyRecord(id=key_id, name="alice", sha256="0" * 64, scopes=frozenset({Scope.READ}), created_at=NOW))
    shared = store.webhooks.secret(None)

    of_webhook, of_key, of_nobody = run("rotate", added["id"]), run("rotate", "alice"), run("rotate")

    assert "secret" not in run("list", "--json")
    assert len({added["secret"], shared, of_webhook.strip(), of_key.strip(), of_nobody.strip()}) == 5
    assert store.webhooks.secret(added["id"]) == of_webhook.strip()
    assert store.webhooks.secret(None, key_id) == of_key.strip()
    assert store.webhooks.secret(None) == of_nobody.strip()
    with pytest.raises(UnknownWebhook):
        run("rotate", "we_9")
    with pytest.raises(UnknownKey):
        run("rotate", "nobody")


def test_the_commands_report_errors(run: Callable[..., str], receiver: Receiver) -> None:
    with pytest.raises(ConfigError, match=r"request\.done and batch.done"):
        run("add", receiver.url, "--events", "all")
    with pytest.raises(InvalidParams):
        run("add", "ftp://x/")
    with pytest.raises(UnknownWebhook):
        run("test", "we_9")
    receiver.statuses = [500]
    id = run("add", receiver.url).split()[0]
    with pytest.raises(DeliveryFailed, match="500"):
        run("test", id)


def test_dead_messages_are_listed_and_sent_again_by_a_command(
    run: Callable[..., str],
    client: flask.testing.FlaskClient,
    store: Store,
    receiver: Receiver,
    answer: Callable[..., list[str]],
) -> None:
    receiver.statuses = [500]
    post(client, receiver.url)
    answer()
    send_due(Deliverer(store, http_client=PRIVATE, retry_seconds=()))

    (dead,) = [json.loads(line) for line in run("dead", "--json").splitlines()]
    table = run("dead")
    again = run("redeliver", dead["id"])
    receiver.statuses = [200]
    send_due(Deliverer(store, http_client=PRIVATE))

    assert (dead["state"], dead["last_status"]) == ("dead", 500)
    assert dead["id"] in table
    assert again.startswith(dead["id"])
    assert dead["id"] in run("deliveries", "--state", "delivered")
    assert run("dead", "--json") == ""

"""The Python client's calls: against the application, against a real server, and against scripted responses."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import flask.testing
import httpx
import pytest
from PIL import Image

import mlg_client
from mlg_client import AsyncClient, Client, Refused, Request, StillWaiting, Unavailable, Unreachable
from mlg_client.uploads import load, split
from server.settings import ServerSettings
from store.requests import Answer
from store.store import Store
from tests.conftest import MODEL, OUTPUT, ROOT, RunningServer

URL = "http://127.0.0.1:5000"


def image(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 24), (number % 256, number // 256, 9)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def calls(client: flask.testing.FlaskClient) -> Iterator[Client]:
    """A client of the application, without a network."""
    with Client(URL, transport=httpx.WSGITransport(app=client.application), retry_timeout_seconds=1) as calls:
        calls.hold_seconds = 0.2
        yield calls


def scripted(*answers: httpx.Response | Exception) -> tuple[httpx.MockTransport, list[httpx.Request]]:
    """A transport with these responses, used one after the other, and the requests that it received."""
    left, received = list(answers), []

    def handle(request: httpx.Request) -> httpx.Response:
        received.append(request)
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return httpx.MockTransport(handle), received


def accepted(**more: Any) -> httpx.Response:
    return httpx.Response(202, json={"success": True, "req_id": "r1", "status": "queued", "model": "m", **more})


def refused(status: int, code: str, **headers: str) -> httpx.Response:
    answer = {"success": False, "reason": "No.", "code": code}
    return httpx.Response(status, json=answer, headers=headers)


# Against the application


def test_an_image_is_sent_and_its_result_is_returned(
    calls: Client, photos: dict[str, bytes], answer: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "coffee.jpg").write_bytes(photos["coffee"])

    sent = calls.submit(tmp_path / "coffee.jpg", MODEL)
    answer()
    done = calls.wait(sent)

    assert (sent.status, sent.name, sent.is_final) == ("queued", "coffee.jpg", False)
    assert (done.status, done.name, done.is_read) == ("done", "coffee.jpg", True)
    assert done.best == ("label_0", pytest.approx(0.095238))
    assert len(calls.read(sent.id, top=3).preds or []) == 3


@pytest.mark.parametrize("kind", ["bytes", "text", "path", "file"])
def test_an_image_may_be_bytes_a_path_or_a_file(calls: Client, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "dot.png"
    path.write_bytes(image(1))

    with path.open("rb") as file:
        given: Any = {"bytes": image(1), "text": str(path), "path": path, "file": file}[kind]
        sent = calls.submit(given, MODEL)

    assert sent.name == ("image" if kind == "bytes" else "dot.png")


def test_cancelled_requests_can_be_queued_again(calls: Client) -> None:
    sent = calls.submit(image(1), MODEL)

    assert calls.cancel(sent).status == "cancelled"
    assert calls.retry(sent.id).status == "queued"


def test_a_server_tells_that_it_is_alive(calls: Client) -> None:
    assert calls.health()["status"] == "alive"


def test_models_tell_whether_they_are_installed(calls: Client) -> None:
    models = {model.name: model for model in calls.models()}

    assert models[MODEL].is_installed
    assert not models["vgg16"].is_installed


def test_refused_has_code_reason_and_status(calls: Client) -> None:
    with pytest.raises(Refused) as not_an_image:
        calls.submit(b"Dear kitten", MODEL)
    with pytest.raises(Refused) as unknown:
        calls.read("nothing")

    assert (not_an_image.value.code, not_an_image.value.status) == ("not_an_image", 400)
    assert "JPEG" in not_an_image.value.reason
    assert (unknown.value.code, unknown.value.status) == ("unknown_request", 404)


def test_a_model_that_is_not_installed_is_not_retried(calls: Client) -> None:
    with pytest.raises(Unavailable, match="mlg models compile vgg16") as error:
        calls.submit(image(1), "vgg16")

    assert (error.value.code, error.value.status) == ("not_installed", 503)


def test_waiting_ends_after_the_timeout(calls: Client) -> None:
    sent = calls.submit(image(1), MODEL)

    with pytest.raises(StillWaiting) as error:
        calls.wait(sent, timeout=0.3)

    assert error.value.code == "still_waiting"


def test_a_folder_is_sent_in_order_and_files_that_are_no_images_are_listed(
    calls: Client, tmp_path: Path, answer: Callable[..., list[str]]
) -> None:
    (tmp_path / "more").mkdir()
    for number, name in enumerate(["b.png", "a.png", "more/c.PNG"]):
        (tmp_path / name).write_bytes(image(number))
    (tmp_path / "letter.jpg").write_text("Dear kitten")
    (tmp_path / "notes.txt").write_text("no image")

    batch = calls.submit_dir(tmp_path, MODEL)
    answer()
    results = list(calls.results(batch))

    assert [request.name for request in batch.requests] == ["a.png", "b.png", "c.PNG"]
    assert [name for name, _ in batch.refused] == ["letter.jpg"]
    assert [one["client_id"] for one in batch.raw[0]["items"]] == ["a.png", "b.png", "letter.jpg", "more/c.PNG"]
    assert calls.batch(batch.ids[0])["counts"]["refused"] == 1
    assert [(one.id, one.status) for one in results] == [(one.id, "done") for one in batch.requests]
    with pytest.raises(FileNotFoundError, match="No image files"):
        calls.submit_dir(tmp_path / "nowhere", MODEL)


def test_many_images_are_sent_once_under_one_key_and_each_has_an_outcome(calls: Client) -> None:
    images, names = [image(1), b"Dear kitten", image(2)], ["a.png", "letter.jpg", "a.png"]

    batch = calls.submit_many(images, MODEL, names=names, idempotency_key="mine")
    again = calls.submit_many(images, MODEL, names=names, idempotency_key="mine")

    sent, refused, last = batch.outcomes
    assert isinstance(refused, Refused) and refused.code == "not_an_image"
    assert batch.requests == (sent, last) and [request.name for request in batch.requests] == ["a.png", "a.png"]
    assert batch.refused == (("letter.jpg", refused.reason),)
    assert again.requests == batch.requests
    assert calls.batch(batch.ids[0])["total"] == 2
    with pytest.raises(ValueError, match="shorter"):
        calls.submit_many(images, MODEL, names=["a.png"])


def test_each_image_has_an_id_of_its_own_whatever_its_name(calls: Client) -> None:
    long = "n" * 201
    names = [
        "2:image",
        "image",
        "image",
        "a.png",
        " a.png",
        "a\u200b.png",
        "3:a.png",
        "3:a.png",
        long,
        f"{long}x",
        long,
    ]
    names += [" " * 300, "\t", "11", "12", "x" * 100 + " " * 150 + "y" * 199, "y" * 199]

    batch = calls.submit_many([image(number) for number in range(len(names))], MODEL, names=names)

    assert len(batch.requests) == len(names)
    assert len(batch.ids) == 1
    found = [calls.read(request.id).raw["client_id"] for request in batch.requests]
    assert len(set(found)) == len(names)
    assert found[:4] == ["2:image", "image", "3:image", "a.png"]
    assert max(map(len, found)) == 200


def test_images_after_a_file_whose_name_looks_like_an_id_are_all_sent() -> None:
    uploads = [load(b"1", name="2:image"), load(b"2"), load(b"3")]

    (batch,) = split(uploads)

    assert [upload.data for upload in batch] == [b"1", b"2", b"3"]


def test_many_requests_are_read_and_unknown_ones_are_none(calls: Client, answer: Callable[..., list[str]]) -> None:
    batch = calls.submit_many([image(number) for number in range(10)], MODEL)
    answer()

    found = calls.read_many(["nothing", *(request.id for request in batch.requests)], top=2)

    assert found[0] is None
    assert [one and (one.id, len(one.preds or [])) for one in found[1:]] == [(one.id, 2) for one in batch.requests]


# Against a real server


@pytest.fixture
def batcher(start_server: Callable[..., RunningServer]) -> Iterator[tuple[RunningServer, Callable[[], None]]]:
    """A real server, and a thread that answers its requests one by one once it is started."""
    server = start_server()
    store = Store(ServerSettings(home=server.home))
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(0.05):
            now = datetime.now(UTC)
            lease = now + timedelta(seconds=30)
            claims = store.requests.claim(models=[MODEL], limit=1, now=now, lease_ends_at=lease, oldest_before=None)
            store.requests.finish(
                [
                    Answer(claim=claim, output=OUTPUT, digest="d" * 64, chunk_id="c", provider="p", seconds=0.01)
                    for claim in claims
                ],
                now=now,
            )

    thread = threading.Thread(target=loop)
    yield server, thread.start
    stop.set()
    if thread.is_alive():
        thread.join()
    store.close()


def test_requests_are_yielded_as_they_end(batcher: tuple[RunningServer, Callable[[], None]]) -> None:
    server, start = batcher
    with Client(server.base) as calls:
        batch = calls.submit_many([image(number) for number in range(6)], MODEL)
        start()

        ended = list(calls.as_completed(batch.requests, timeout=30))

    assert {request.id for request in ended} == {request.id for request in batch.requests}
    assert len(ended) == 6
    assert all(request.is_read and request.best for request in ended)


def test_async_code_makes_the_same_calls(batcher: tuple[RunningServer, Callable[[], None]]) -> None:
    server, start = batcher

    async def make_calls() -> tuple[int, list[Request], list[Request], Request]:
        async with AsyncClient(server.base) as calls:
            batch = await calls.submit_many([image(number) for number in range(4)], MODEL)
            start()
            ended = [request async for request in calls.as_completed(batch.requests, timeout=30)]
            results = [request async for request in calls.results(batch)]
            one = await calls.wait(await calls.submit(image(99), MODEL), timeout=30)
            with pytest.raises(Refused, match="no request"):
                await calls.read("nothing")
            return len(await calls.models()), ended, results, one

    models, ended, results, one = asyncio.run(make_calls())

    assert models > 10
    assert {request.id for request in ended} == {request.id for request in results}
    assert [request.status for request in results] == ["done"] * 4
    assert one.status == "done"


# Against scripted responses


@pytest.mark.parametrize("status", [429, 502, 503, 504, 507])
def test_a_busy_server_is_retried_with_the_same_key_and_bytes(status: int) -> None:
    paused: list[float] = []
    transport, received = scripted(
        refused(status, "store_busy", **{"Retry-After": "3"}), httpx.ConnectError("no"), accepted()
    )

    with Client(URL, transport=transport, pause=paused.append) as calls:
        sent = calls.submit(image(1), "m", labels={"shelf": "7"}, params={"top": 3, "fresh": True})

    assert sent.id == "r1"
    assert len({request.headers["Idempotency-Key"] for request in received}) == 1
    assert len({request.content for request in received}) == 1
    assert image(1) in received[0].content
    assert received[0].url.params.multi_items() == [("top", "3"), ("fresh", "1"), ("label", "shelf:7")]
    assert paused[0] >= 3.0
    assert 0 < paused[1] < 1.0


def test_pauses_grow_until_the_retry_timeout() -> None:
    paused: list[float] = []
    transport, received = scripted(*[httpx.ConnectError("no")] * 50)

    calls = Client(URL, transport=transport, retry_timeout_seconds=8, pause=paused.append)
    with calls, pytest.raises(Unreachable, match="does not answer") as error:
        calls.models()

    assert error.value.status is None
    assert paused[3] > paused[0]
    assert max(paused) <= 8
    assert len(received) == len(paused) + 1


def test_each_post_has_another_key_unless_it_is_given() -> None:
    transport, received = scripted(accepted(), accepted(), accepted())

    with Client(URL, transport=transport) as calls:
        for key in (None, None, "mine"):
            calls.submit(b"x", "m", idempotency_key=key)

    keys = [request.headers["Idempotency-Key"] for request in received]
    assert len(set(keys)) == 3
    assert keys[2] == "mine"


def test_the_key_and_the_address_come_from_the_environment_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLG_API_KEY", "from-there")
    monkeypatch.setenv("MLG_URL", "http://there.example/")
    transport, received = scripted(*[httpx.Response(200, json={"success": True, "models": []})] * 2)

    with Client(transport=transport) as calls, Client("http://here.example", "given", transport=transport) as others:
        calls.models()
        others.models()

    assert [str(request.url) for request in received] == ["http://there.example/models", "http://here.example/models"]
    assert [request.headers["Authorization"] for request in received] == ["Bearer from-there", "Bearer given"]


@pytest.mark.parametrize("body", ["<html>", "[]", '{"success": 1}'])
def test_a_response_that_is_not_from_mlg_is_an_error(body: str) -> None:
    transport, _ = scripted(httpx.Response(200, text=body))

    with Client(URL, transport=transport) as calls, pytest.raises(Refused) as error:
        calls.models()

    assert error.value.code == "http_200"


@pytest.mark.parametrize("url", ["ftp://example.com", "http://host:port", "no address"])
def test_an_invalid_address_fails_at_once(url: str) -> None:
    with pytest.raises(Unreachable, match="not a server's address"), Client(url) as calls:
        calls.models()


def test_a_broken_event_stream_is_resumed_at_its_position() -> None:
    def event(id: str, number: int) -> str:
        data = {"req_id": f"r{number}", "status": "done", "model": "m", "preds": [["n1", "cat", 0.5]]}
        return f"id: {id}\nevent: request\ndata: {json.dumps(data)}\n\n"

    def stream(*events: str) -> httpx.Response:
        text = "retry: 2000\n\n: alive\n\n" + "".join(events)
        return httpx.Response(200, text=text, headers={"Content-Type": "text/event-stream"})

    transport, received = scripted(
        stream(event("5", 2)), httpx.ReadError("gone"), refused(503, "streams_full"), stream(event("7", 1))
    )
    waiting = [Request(id=f"r{number}", status="queued", model="m") for number in (1, 2)]

    with Client(URL, transport=transport, pause=lambda _: None) as calls:
        ended = [request.id for request in calls.as_completed(waiting)]

    assert ended == ["r2", "r1"]
    assert [request.headers.get("Last-Event-ID") for request in received] == [None, "5", "5", "5"]
    assert [request.url.params["ids"] for request in received] == ["r1,r2", "r1", "r1", "r1"]


def test_the_requested_number_of_labels_comes_from_the_event_or_a_read() -> None:
    preds = [["n1", "cat", 0.5], ["n2", "dog", 0.2]]
    done = {"success": True, "req_id": "r1", "status": "done", "model": "m", "preds": preds}
    event = httpx.Response(200, text=f"data: {json.dumps(done)}\n\n", headers={"Content-Type": "text/event-stream"})
    more = httpx.Response(200, json={**done, "preds": [*preds, ["n3", "cow", 0.1]]})
    transport, received = scripted(event, event, more)
    waiting = [Request(id="r1", status="queued", model="m")]

    with Client(URL, transport=transport) as calls:
        found = [list(calls.as_completed(waiting, top=top)) for top in (1, 3)]

    assert [len(request.preds or []) for (request,) in found] == [1, 3]
    assert [request.url.path for request in received] == ["/events", "/events", "/readPrediction/r1"]


@pytest.mark.parametrize("output", [{"species": "setosa"}, 0.5])
def test_an_output_that_is_not_a_list_of_labels_is_yielded_as_it_is(output: Any) -> None:
    done = {"success": True, "req_id": "r1", "status": "done", "model": "m", "preds": output}
    event = httpx.Response(200, text=f"data: {json.dumps(done)}\n\n", headers={"Content-Type": "text/event-stream"})
    transport, _ = scripted(event)

    with Client(URL, transport=transport) as calls:
        (ended,) = calls.as_completed([Request(id="r1", status="queued", model="m")], top=3)

    assert ended.preds == output


def test_leaving_the_loop_early_closes_the_stream_also_while_an_event_loop_runs() -> None:
    class Events(httpx.SyncByteStream):
        is_closed = False

        def __iter__(self) -> Iterator[bytes]:
            yield b'data: {"req_id": "r1", "status": "failed", "model": "m"}\n\n'
            raise AssertionError("more is read than was asked for")

        def close(self) -> None:
            self.is_closed = True

    events = Events()
    transport, _ = scripted(httpx.Response(200, stream=events, headers={"Content-Type": "text/event-stream"}))
    waiting = [Request(id=f"r{number}", status="queued", model="m") for number in (1, 2)]

    async def read_one() -> Request:
        with Client(URL, transport=transport) as calls, contextlib.closing(calls.as_completed(waiting)) as ended:
            return next(ended)

    first = asyncio.run(read_one())

    assert first.id == "r1"
    assert events.is_closed


def test_a_deleted_request_is_yielded_as_failed() -> None:
    transport, _ = scripted(refused(404, "unknown_request"), refused(404, "unknown_request"))

    with Client(URL, transport=transport) as calls:
        (ended,) = calls.as_completed([Request(id="r1", status="queued", model="m")])

    assert (ended.id, ended.status, ended.code) == ("r1", "failed", "unknown_request")


def test_without_events_reads_are_held() -> None:
    done = {"success": True, "req_id": "r1", "status": "done", "model": "m", "preds": [["n1", "cat", 0.5]]}
    transport, received = scripted(
        refused(404, "not_found"),
        httpx.Response(200, json={**done, "status": "claimed"}),
        httpx.Response(200, json=done),
    )

    with Client(URL, transport=transport, pause=lambda _: None) as calls:
        (ended,) = calls.as_completed([Request(id="r1", status="queued", model="m")])

    assert ended.best == ("cat", 0.5)
    assert [request.url.path for request in received] == ["/events", "/readPrediction/r1", "/readPrediction/r1"]
    assert float(received[1].url.params["wait"]) > 1


def test_a_result_that_is_known_is_not_requested() -> None:
    transport, received = scripted()
    done = Request(id="r1", status="done", model="m", preds=[["n1", "cat", 0.5]])

    with Client(URL, transport=transport) as calls:
        assert list(calls.as_completed([done])) == [done]

    assert received == []


def test_proxies_are_not_used_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    transports = {}
    for url in (URL, "http://localhost:1", "http://example.com"):
        with Client(url) as calls:
            transports[url] = calls._http._mounts

    assert [bool(mounts) for mounts in transports.values()] == [False, False, True]


# Tables


def test_a_table_has_a_row_for_each_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=list))
    results = [
        Request(id="r1", status="done", model="m", name="a.jpg", preds=[["n1", "cat", 0.5], ["n2", "dog", 0.2]]),
        Request(id="r2", status="failed", model="m", name="b.jpg", reason="It is damaged."),
    ]

    best, both = mlg_client.to_dataframe(results), mlg_client.to_dataframe(results, top=2)

    assert [(row["name"], row["label"], row["probability"]) for row in best] == [
        ("a.jpg", "cat", 0.5),
        ("b.jpg", None, None),
    ]
    assert [row["rank"] for row in both] == [1, 2, None]
    assert best[1]["reason"] == "It is damaged."


def test_the_error_without_pandas_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)

    with pytest.raises(ImportError, match="pip install pandas"):
        mlg_client.to_dataframe([])


# The package itself


def test_the_client_imports_no_other_package_and_has_docstrings() -> None:
    command = [sys.executable, "-c", "import mlg_client, sys; print(*{name.split('.')[0] for name in sys.modules})"]
    loaded = set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())

    assert not loaded & {"server", "provider_image", "batcher", "cli", "flask", "numpy", "pandas"}
    for name in ("submit", "submit_many", "submit_dir", "read", "read_many", "wait", "cancel", "retry", "batch"):
        assert getattr(Client, name).__doc__ == getattr(AsyncClient, name).__doc__ != None  # noqa: E711

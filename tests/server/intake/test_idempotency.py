"""`Idempotency-Key`: a request that is sent again under the same key gets the first response, and is done once."""

from __future__ import annotations

import io
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import flask.testing
import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.app import create_app
from server.intake.uploads import BodyDigest
from server.settings import ServerSettings
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.errors import DiskFull, StoreUnavailable
from store.rows import to_text
from store.store import Store
from tests.timing import DEADLINE_SECONDS, cpu_slowness

URL = "/requestPrediction/efficientnet_lite0"
BATCH_URL = "/requestPredictions/efficientnet_lite0"
#: The environment of a request without a length.
IN_CHUNKS: dict[str, Any] = {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}
KEY = {"Idempotency-Key": "k-1"}


def add_key(store: Store, **limits: int) -> str:
    id, key = make_key()
    store.keys.add(
        KeyRecord(
            id=id,
            name=id,
            sha256=hash_key(key),
            scopes=frozenset({Scope.SUBMIT, Scope.READ}),
            created_at=datetime.now(UTC),
            **limits,
        )
    )
    return key


def post(
    client: flask.testing.FlaskClient, data: bytes, *, query: str = "", key: str = "k-1", boundary: str = "x"
) -> Any:
    body = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'.encode()
        + data
        + f"\r\n--{boundary}--\r\n".encode()
    )
    kind = f"multipart/form-data; boundary={boundary}"
    return client.post(URL + query, data=body, content_type=kind, headers={"Idempotency-Key": key})


def test_a_repetition_gets_the_first_response_and_creates_nothing(
    client: flask.testing.FlaskClient, photos: dict[str, bytes], stored_state: Callable[[], tuple[list[str], int]]
) -> None:
    first = post(client, photos["rocket"], boundary="first")

    again = post(client, photos["rocket"], boundary="another-one")

    assert (again.status_code, again.get_json()) == (202, first.get_json())
    assert again.headers["Location"] == first.headers["Location"]
    assert again.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers
    assert stored_state()[1] == 1


def test_without_a_key_or_under_another_a_request_is_done_again(
    client: flask.testing.FlaskClient, photos: dict[str, bytes], stored_state: Callable[[], tuple[list[str], int]]
) -> None:
    post(client, photos["rocket"])
    post(client, photos["rocket"], key="k-2")
    client.post(URL, data={"image": (io.BytesIO(photos["rocket"]), "a.jpg")})

    assert stored_state()[1] == 3


@pytest.mark.parametrize("query", ["", "?fresh=1"])
def test_the_same_key_with_another_request_is_refused(
    client: flask.testing.FlaskClient, photos: dict[str, bytes], query: str
) -> None:
    post(client, photos["rocket"])

    reply = post(client, photos["coffee" if not query else "rocket"], query=query)

    assert (reply.status_code, reply.get_json()["code"]) == (422, "key_reused")


def test_a_running_request_is_a_conflict_with_retry_after(
    settings: ServerSettings, store: Store, photos: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, entered, leave = create_app(settings, store).test_client(), threading.Event(), threading.Event()
    real = store.requests.add

    def slow(*arguments: Any) -> Any:
        entered.set()
        assert leave.wait(DEADLINE_SECONDS)
        return real(*arguments)

    monkeypatch.setattr(store.requests, "add", slow)
    replies: list[Any] = []
    first = threading.Thread(target=lambda: replies.append(post(client, photos["rocket"])))
    first.start()
    assert entered.wait(DEADLINE_SECONDS)

    meanwhile = post(create_app(settings, store).test_client(), photos["rocket"])
    leave.set()
    first.join(120)

    assert (meanwhile.status_code, meanwhile.get_json()["code"]) == (409, "key_under_way")
    assert int(meanwhile.headers["Retry-After"]) >= 1
    assert replies[0].status_code == 202
    assert post(client, photos["rocket"]).headers["Idempotent-Replayed"] == "true"


def test_an_error_leaves_nothing_under_the_key(
    client: flask.testing.FlaskClient, store: Store, photos: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Any:
        raise StoreUnavailable()

    monkeypatch.setattr(store.requests, "add", broken)
    assert post(client, photos["rocket"]).status_code == 503
    monkeypatch.undo()
    assert post(client, b"not an image").status_code == 400
    assert post(client, photos["rocket"], query="?deadline=yesterday").status_code == 400

    reply = post(client, photos["rocket"])

    assert reply.status_code == 202
    assert "Idempotent-Replayed" not in reply.headers


CUT_SHORT = {
    "a form with a length": (b"", "multipart/form-data; boundary=x", True),
    "a form in chunks": (b"", "multipart/form-data; boundary=x", False),
    "an image with a length": (b"", "image/jpeg", True),
    "an image in chunks": (b"", "image/jpeg", False),
    "a zip in chunks": (b"s", "application/zip", False),
    "a batch's form in chunks": (b"s", "multipart/form-data; boundary=x", False),
}


@pytest.mark.parametrize("name", CUT_SHORT)
def test_a_body_that_was_cut_short_leaves_nothing_under_its_key(
    client: flask.testing.FlaskClient,
    photos: dict[str, bytes],
    stored_state: Callable[[], tuple[list[str], int]],
    name: str,
) -> None:
    plural, kind, has_length = CUT_SHORT[name]
    url = URL.replace("Prediction", f"Prediction{plural.decode()}")
    data = photos["rocket"]
    if "multipart" in kind:
        head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
        data = head + data + b"\r\n--x--\r\n"
    elif "zip" in kind:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.jpg", data)
        data = file.getvalue()
    # As granian does: the end of the connection looks like the end of the body.
    environ = {"CONTENT_LENGTH": str(len(data))} if has_length else IN_CHUNKS
    sent = {"content_type": kind, "headers": KEY}

    cut = client.post(url, input_stream=io.BytesIO(data[:-100]), environ_overrides=environ, **sent)
    again = client.post(url, data=data, **sent)

    assert (cut.status_code, again.status_code) == (400, 202)
    assert "Idempotent-Replayed" not in again.headers
    assert stored_state()[1] == 1


def test_json_lines_without_a_length_are_refused(
    settings: ServerSettings, store: Store, photos: dict[str, bytes]
) -> None:
    client = create_app(replace(settings, fetches_urls=True), store).test_client()
    lines = io.BytesIO(b'{"url": "https://example.org/a.jpg"}\n')

    reply = client.post(
        BATCH_URL,
        input_stream=lines,
        content_type="application/jsonl",
        environ_overrides=IN_CHUNKS,
    )

    assert (reply.status_code, reply.get_json()["code"]) == (411, "length_missing")


def test_fields_without_a_length_are_refused(client: flask.testing.FlaskClient) -> None:
    reply = client.post(
        "/operator/pause",
        input_stream=io.BytesIO(b"reason=up"),
        content_type="application/x-www-form-urlencoded",
        environ_overrides=IN_CHUNKS,
    )

    assert (reply.status_code, reply.get_json()["code"]) == (411, "length_missing")


def test_a_killed_servers_key_is_free_at_once(
    client: flask.testing.FlaskClient, settings: ServerSettings, store: Store, photos: dict[str, bytes]
) -> None:
    now = datetime.now(UTC)
    fingerprint = "of the request that was killed"
    token = "0123456789abcdef-of a killed server"
    store.database.execute(
        "INSERT INTO idempotency (owner, key, fingerprint, token, expires_at) VALUES ('', 'k-1', ?, ?, ?)",
        (fingerprint, token, to_text(now + timedelta(days=1))),
    )

    reply = post(client, photos["rocket"])

    assert (reply.status_code, "Idempotent-Replayed" in reply.headers) == (202, False)


def test_a_response_is_kept_for_a_day(settings: ServerSettings, store: Store, photos: dict[str, bytes]) -> None:
    now = datetime.now(UTC)

    def client_at(seconds: float) -> flask.testing.FlaskClient:
        return create_app(settings, store, clock=lambda: now + timedelta(seconds=seconds)).test_client()

    first = post(client_at(0), photos["rocket"])

    assert post(client_at(80_000), photos["rocket"]).get_json() == first.get_json()
    assert "Idempotent-Replayed" not in post(client_at(90_000), photos["rocket"]).headers


def test_a_response_that_cannot_be_stored_is_stored_by_the_next_request(
    client: flask.testing.FlaskClient,
    store: Store,
    photos: dict[str, bytes],
    stored_state: Callable[[], tuple[list[str], int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, is_full = store.idempotency.save_response, True

    def save(*arguments: Any) -> Any:
        if is_full:
            raise DiskFull()
        return real(*arguments)

    monkeypatch.setattr(store.idempotency, "save_response", save)
    first = post(client, photos["rocket"])
    is_full = False

    again = post(client, photos["rocket"])

    assert (first.status_code, again.headers.get("Idempotent-Replayed")) == (202, "true")
    assert again.get_json() == first.get_json()
    assert stored_state()[1] == 1


def digest(body: bytes, sizes: list[int], boundary: str) -> str:
    found = BodyDigest("multipart/form-data", boundary)
    start = 0
    for size in sizes:
        found.update(body[start : start + size])
        start += size
    found.update(body[start:])
    return found.hexdigest()


def test_the_digest_of_a_body_does_not_depend_on_how_it_is_read() -> None:
    @hypothesis.settings(max_examples=200, deadline=None)
    @given(
        st.lists(st.sampled_from([b"\r\n--ab", b"--ab", b"ab", b"\r\n", b"--", b"a", b"b", b"\r"]), max_size=12).map(
            b"".join
        ),
        st.lists(st.integers(1, 5), max_size=12),
    )
    def check(body: bytes, sizes: list[int]) -> None:
        assert digest(body, sizes, "ab") == digest(body, [], "ab")

    check()


@pytest.mark.parametrize("boundary", ["a", "aa", "a" * 200, "\r" * 200])
@pytest.mark.parametrize("part", ["a", "\r\n--a", "\r\n--" + "a" * 199 + "b", "\r"])
def test_the_digest_of_a_form_takes_linear_time(boundary: str, part: str) -> None:
    def seconds(size: int) -> float:
        body = part.encode() * (size // len(part))
        started = time.thread_time()
        for start in range(0, size, 65_536):
            found.update(body[start : start + 65_536])
        return time.thread_time() - started

    found = BodyDigest("multipart/form-data", boundary)

    # Some milliseconds; quadratic time would be minutes.
    assert seconds(8_000_000) < 1.0 * cpu_slowness()


@pytest.mark.parametrize("path", ["/logout", "/login", "/ui/send", "/readPrediction/x"])
def test_views_that_are_open_or_only_read_keep_nothing_and_read_no_body(
    settings: ServerSettings, store: Store, path: str
) -> None:
    add_key(store)
    client, body = create_app(settings, store).test_client(), CountingBody(b"a" * 2**20)

    client.post(
        f"{path}?{'x' * 1000}",
        input_stream=body,
        headers=KEY,
        content_type="multipart/form-data; boundary=a",
        environ_overrides={"CONTENT_LENGTH": str(2**31)},
    )

    assert body.size == 0
    assert store.database.rows("SELECT * FROM idempotency") == []


class CountingBody(io.BytesIO):
    """A body that counts what was read."""

    size = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.size += len(data)
        return data


def test_a_long_query_is_not_kept(client: flask.testing.FlaskClient, store: Store, photos: dict[str, bytes]) -> None:
    post(client, photos["rocket"], query="?" + "&".join(f"label=a{n}:{'x' * 200}" for n in range(16)))

    (row,) = store.database.rows("SELECT * FROM idempotency")
    assert sum(len(str(cell)) for cell in row) < 1000


def test_a_repetition_is_answered_when_the_quota_is_used_up(
    settings: ServerSettings, store: Store, photos: dict[str, bytes]
) -> None:
    key = add_key(store, images_per_day=1)
    client = create_app(settings, store).test_client()
    headers = {"X-API-Key": key, **KEY}
    sent = {"data": photos["rocket"], "content_type": "image/jpeg"}
    first = client.post(URL, headers=headers, **sent)

    again = client.post(URL, headers=headers, **sent)
    another = client.post(URL, headers={"X-API-Key": key, "Idempotency-Key": "k-2"}, **sent)

    assert (first.status_code, again.status_code, another.status_code) == (202, 202, 429)
    assert again.get_json() == first.get_json()


@pytest.mark.parametrize("what", ["cancel", "batch"])
def test_every_post_that_changes_something_may_be_repeated(
    client: flask.testing.FlaskClient, photos: dict[str, bytes], what: str
) -> None:
    made = client.post(
        "/requestPredictions/efficientnet_lite0", data={"image": (io.BytesIO(photos["rocket"]), "a.jpg")}, headers=KEY
    )
    if what == "batch":
        again = client.post(
            "/requestPredictions/efficientnet_lite0",
            data={"image": (io.BytesIO(photos["rocket"]), "a.jpg")},
            headers=KEY,
        )
    else:
        url = f"{made.get_json()['status_url']}/cancel"
        made = client.post(url, headers={"Idempotency-Key": "k-2"})
        again = client.post(url, headers={"Idempotency-Key": "k-2"})

    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.get_json() == made.get_json()


def test_a_read_is_never_stored(
    client: flask.testing.FlaskClient, photos: dict[str, bytes], answer: Callable[..., list[str]]
) -> None:
    id = post(client, photos["rocket"]).get_json()["req_id"]
    client.post(f"/readPrediction/{id}", headers=KEY)
    answer()

    assert client.post(f"/readPrediction/{id}", headers=KEY).get_json()["status"] == "done"


def test_a_key_that_is_too_long_is_refused(client: flask.testing.FlaskClient, photos: dict[str, bytes]) -> None:
    assert post(client, photos["rocket"], key="k" * 256).status_code == 400


def test_a_repetition_over_the_batch_limit_is_not_read(
    settings: ServerSettings, store: Store, photos: dict[str, bytes]
) -> None:
    client = create_app(replace(settings, max_batch_bytes=300_000), store).test_client()
    post(client, photos["rocket"])

    assert post(client, b"x" * 2_000_000).status_code == 422


def test_the_response_for_what_is_deleted_is_deleted_too(
    client: flask.testing.FlaskClient, store: Store, photos: dict[str, bytes]
) -> None:
    kept = post(client, photos["coffee"], key="kept").get_json()["req_id"]
    id = post(client, photos["rocket"], key="sent").get_json()["req_id"]
    client.delete(f"/requests/{id}")  # cancels it
    client.post(f"/requests/{id}/retry", headers={"Idempotency-Key": "retried"})
    client.delete(f"/requests/{id}")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jpg", photos["rocket"])
    body = file.getvalue()
    options: dict[str, Any] = {"content_type": "application/zip", "headers": {"Idempotency-Key": "batch"}}
    batch = client.post(BATCH_URL, data=body, **options).get_json()["batch_id"]
    client.post(f"/batches/{batch}/cancel")

    deleted = [client.post(f"/requests/{id}/delete").status_code, client.delete(f"/batches/{batch}").status_code]

    assert deleted == [200, 200]
    rows = store.database.rows("SELECT key, subject FROM idempotency")
    assert [tuple(row) for row in rows] == [("kept", kept)]
    again = post(client, photos["rocket"], key="sent")
    assert again.status_code == 202 and again.get_json()["req_id"] != id

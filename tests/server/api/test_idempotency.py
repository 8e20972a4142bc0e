"""`Idempotency-Key`: a request that is sent again under the same key gets the first response, and is done once."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import flask.testing
import pytest

from server.app import create_app
from server.settings import ServerSettings
from store.errors import StoreUnavailable
from store.store import Store

URL = "/requestPrediction/efficientnet_lite0"
KEY = {"Idempotency-Key": "k-1"}


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
        assert leave.wait(120)
        return real(*arguments)

    monkeypatch.setattr(store.requests, "add", slow)
    replies: list[Any] = []
    first = threading.Thread(target=lambda: replies.append(post(client, photos["rocket"])))
    first.start()
    assert entered.wait(120)

    meanwhile = post(create_app(settings, store).test_client(), photos["rocket"])
    leave.set()
    first.join(120)

    assert (meanwhile.status_code, meanwhile.get_json()["code"]) == (409, "key_under_way")
    assert int(meanwhile.headers["Retry-After"]) >= 1
    assert replies[0].status_code == 202
    assert post(client, photos["rocket"]).headers["Idempotent-Replayed"] == "true"


def test_a_server_error_is_not_stored_and_a_client_error_is(
    client: flask.testing.FlaskClient, store: Store, photos: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Any:
        raise StoreUnavailable()

    monkeypatch.setattr(store.requests, "add", broken)
    assert post(client, photos["rocket"]).status_code == 503
    monkeypatch.undo()

    assert post(client, photos["rocket"]).status_code == 202
    assert post(client, b"not an image", key="bad").status_code == 400
    again = post(client, b"not an image", key="bad")
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (400, "true")


def test_a_body_that_was_cut_short_may_be_sent_again_under_its_key(
    client: flask.testing.FlaskClient, photos: dict[str, bytes], stored_state: Callable[[], tuple[list[str], int]]
) -> None:
    data = photos["rocket"]
    sent = {"content_type": "image/jpeg", "headers": KEY}

    cut = client.post(
        URL, input_stream=io.BytesIO(data[:1000]), environ_overrides={"CONTENT_LENGTH": str(len(data))}, **sent
    )
    again = client.post(URL, data=data, **sent)

    assert (cut.status_code, again.status_code) == (400, 202)
    assert stored_state()[1] == 1


def test_a_killed_servers_reservation_expires_and_responses_after_a_day(
    settings: ServerSettings, store: Store, photos: dict[str, bytes]
) -> None:
    now = datetime.now(UTC)
    store.idempotency.reserve(
        "",
        "k-1",
        operation=f"POST {URL}?",
        token="of a killed server",
        now=now,
        lease_ends_at=now + timedelta(seconds=600),
        expires_at=now + timedelta(days=1),
    )

    def client_at(seconds: float) -> flask.testing.FlaskClient:
        return create_app(settings, store, clock=lambda: now + timedelta(seconds=seconds)).test_client()

    assert post(client_at(599), photos["rocket"]).status_code == 409
    first = post(client_at(601), photos["rocket"])
    assert first.status_code == 202
    assert post(client_at(80_000), photos["rocket"]).get_json() == first.get_json()
    assert "Idempotent-Replayed" not in post(client_at(90_000), photos["rocket"]).headers


def test_the_fingerprint_does_not_depend_on_how_the_body_is_read(photos: dict[str, bytes]) -> None:
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from server.api.idempotency import _HashingBody

    app = flask.Flask("test")

    def fingerprint(body: bytes, sizes: list[int]) -> str:
        with app.test_request_context("/", method="POST", data=body, content_type="multipart/form-data; boundary=abab"):
            made = _HashingBody(flask.request._get_current_object())  # type: ignore[attr-defined]
            for size in sizes:
                made.read(size)
            assert made.read_rest(10_000)
            return made.fingerprint()

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(st.sampled_from([b"ab", b"a", b"b", b"abab", b"x"]), max_size=12).map(b"".join),
        st.lists(st.integers(1, 5), max_size=12),
    )
    def check(body: bytes, sizes: list[int]) -> None:
        assert fingerprint(body, sizes) == fingerprint(body, [])

    check()


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

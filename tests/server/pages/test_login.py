"""Signing in to the pages with an API key: the cookie and what it permits."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from pathlib import Path

import flask.testing
import pytest
from PIL import Image

from server.app import create_app
from server.auth.sessions import COOKIE, SESSION_SECONDS, Sessions
from server.settings import ServerSettings
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.store import Store

URL = "/requestPrediction/efficientnet_lite0"
OWN = {"Sec-Fetch-Site": "same-origin"}
BROWSER = {**OWN, "Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


@pytest.fixture
def key(store: Store) -> str:
    id, key = make_key()
    store.keys.add(
        KeyRecord(
            id=id,
            name="alice",
            sha256=hash_key(key),
            scopes=frozenset({Scope.SUBMIT, Scope.READ}),
            created_at=datetime.now(UTC),
        )
    )
    return key


@pytest.fixture
def image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 24), "navy").save(file, "PNG")
    return file.getvalue()


def log_in(client: flask.testing.FlaskClient, key: str) -> None:
    assert client.post("/login", json={"key": key}, headers=OWN).status_code == 200


def test_a_key_is_exchanged_for_a_cookie_that_scripts_and_other_sites_do_not_get(
    client: flask.testing.FlaskClient, key: str
) -> None:
    response = client.post("/login", data={"key": f" {key} ", "next": "/ui/requests"}, headers=BROWSER)

    cookie = response.headers["Set-Cookie"]
    assert (response.status_code, response.headers["Location"]) == (303, "/ui/requests")
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert f"Max-Age={SESSION_SECONDS}" in cookie
    assert "Secure" not in cookie
    assert key[17:] not in cookie


def test_behind_a_proxy_that_ends_tls_the_cookie_is_secure(client: flask.testing.FlaskClient, key: str) -> None:
    response = client.post("/login", json={"key": key}, headers={"X-Forwarded-Proto": "https"})

    assert "Secure" in response.headers["Set-Cookie"]


def test_the_cookie_permits_reading_and_sending(client: flask.testing.FlaskClient, key: str, image: bytes) -> None:
    before = client.get("/readPrediction/x").status_code

    log_in(client, key)
    sent = client.post(URL, data=image, content_type="image/png", headers=OWN)

    assert (before, sent.status_code) == (401, 202)
    assert client.get(sent.json["status_url"]).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "none"}, {"Origin": "https://evil.example"}],
)
def test_with_the_cookie_only_pages_of_this_server_may_change_something(
    client: flask.testing.FlaskClient, store: Store, key: str, image: bytes, headers: dict[str, str]
) -> None:
    log_in(client, key)

    response = client.post(URL, data=image, content_type="image/png", headers=headers)

    assert (response.status_code, response.json["code"]) == (403, "cross_site")
    assert not store.requests.list()


def test_browsers_that_send_only_the_origin_are_accepted(
    client: flask.testing.FlaskClient, key: str, image: bytes
) -> None:
    log_in(client, key)

    response = client.post(URL, data=image, content_type="image/png", headers={"Origin": "https://localhost"})

    assert response.status_code == 202


def test_a_key_in_a_header_may_come_from_another_origin(
    client: flask.testing.FlaskClient, key: str, image: bytes
) -> None:
    log_in(client, key)
    headers = {"X-API-Key": key, "Origin": "https://elsewhere.example"}

    assert client.post(URL, data=image, content_type="image/png", headers=headers).status_code == 202


def test_a_wrong_key_is_refused_with_json_or_a_page(client: flask.testing.FlaskClient, key: str) -> None:
    for_program = client.post("/login", json={"key": "wrong"})
    for_browser = client.post("/login", data={"key": "wrong", "next": "/ui/requests"}, headers=BROWSER)

    assert (for_program.status_code, for_program.json["code"]) == (401, "key_refused")
    assert (for_browser.status_code, for_browser.mimetype) == (401, "text/html")
    assert 'value="/ui/requests"' in for_browser.text
    assert "wrong" not in for_browser.text
    assert "Set-Cookie" not in for_browser.headers


def test_a_key_in_the_url_is_refused(client: flask.testing.FlaskClient, key: str) -> None:
    response = client.post(f"/login?key={key}")

    assert response.status_code == 400
    assert key not in response.text


@pytest.mark.parametrize(
    "next_page",
    ["https://evil.example", "//evil.example", "/\\evil.example", "", "/a\nb", "/ui//evil.example", "/models"],
)
def test_signing_in_redirects_to_pages_of_this_server_only(
    client: flask.testing.FlaskClient, key: str, next_page: str
) -> None:
    response = client.post("/login", data={"key": key, "next": next_page}, headers=BROWSER)

    assert response.headers["Location"] == "/"


def test_another_site_cannot_sign_a_browser_in(client: flask.testing.FlaskClient, key: str) -> None:
    response = client.post("/login", data={"key": key}, headers={"Sec-Fetch-Site": "cross-site"})

    assert (response.status_code, "Set-Cookie" in response.headers) == (403, False)


def test_signing_out_deletes_the_cookie(client: flask.testing.FlaskClient, key: str) -> None:
    log_in(client, key)

    response = client.post("/logout", headers=BROWSER)

    assert (response.status_code, response.headers["Location"]) == (303, "/ui/login")
    assert client.get("/readPrediction/x").status_code == 401


def test_a_session_ends_with_its_key(
    settings: ServerSettings, store: Store, client: flask.testing.FlaskClient, key: str
) -> None:
    log_in(client, key)
    cookie = client.get_cookie(COOKIE)
    assert cookie is not None
    store.keys.revoke("alice", now=datetime.now(UTC))

    # A new process has the key not cached yet; others see the revocation within seconds.
    other = create_app(settings, store).test_client()
    other.set_cookie(COOKIE, cookie.value)

    assert other.get("/readPrediction/x").status_code == 401


def test_a_session_expires(settings: ServerSettings, client: flask.testing.FlaskClient, key: str) -> None:
    log_in(client, key)
    cookie = client.get_cookie(COOKIE)
    assert cookie is not None

    assert Sessions(settings.home).key_id(cookie.value) == key[4:16]
    assert Sessions(settings.home, max_age_seconds=-1).key_id(cookie.value) is None


def test_a_cookie_of_another_home_or_a_modified_one_is_rejected(
    client: flask.testing.FlaskClient, key: str, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    response = flask.Response()
    with flask.Flask("x").test_request_context("/"):
        Sessions(tmp_path / "other").start(response, key[4:16])
    foreign = response.headers["Set-Cookie"].partition("=")[2].partition(";")[0]
    log_in(client, key)
    own = client.get_cookie(COOKIE)
    assert own is not None

    for value in (foreign, own.value[1:], "nonsense", ""):
        client.set_cookie(COOKIE, value)
        assert client.get("/readPrediction/x").status_code == 401


def test_all_processes_share_one_secret_that_only_its_owner_can_read(
    settings: ServerSettings, store: Store, key: str
) -> None:
    first, second = create_app(settings, store).test_client(), create_app(settings, store).test_client()
    log_in(first, key)
    cookie = first.get_cookie(COOKIE)
    assert cookie is not None
    second.set_cookie(COOKIE, cookie.value)
    log_in(second, key)

    assert second.get("/readPrediction/x").status_code == 404
    assert first.get("/readPrediction/x").status_code == 404
    assert [path.name for path in settings.home.glob("session*")] == ["session.secret"]
    assert (settings.home / "session.secret").stat().st_mode & 0o777 == 0o600


def test_a_server_without_sessions_creates_no_secret(
    client: flask.testing.FlaskClient, settings: ServerSettings
) -> None:
    client.set_cookie(COOKIE, "nonsense")

    client.get("/readPrediction/x")

    assert not list(settings.home.glob("session*"))


def test_a_public_page_knows_who_is_signed_in(client: flask.testing.FlaskClient, key: str) -> None:
    log_in(client, key)

    with client:
        client.get("/", headers={"Accept": "application/json"})

        assert flask.g.key.name == "alice"


@pytest.mark.parametrize("body", [rb'{"key": "\ud800"}', rb'{"key": "a", "next": "\udfff"}', rb'{"\ud800": "a"}'])
def test_half_of_a_character_is_refused(client: flask.testing.FlaskClient, body: bytes) -> None:
    reply = client.post("/login", data=body, content_type="application/json")

    assert reply.status_code in (400, 401)

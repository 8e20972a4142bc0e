"""Logging in to the pages with a key: the cookie, and what may be done with it."""

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
from store.keys import KeyRecord, Scope, hash_key, make_key
from store.sqlite import SqliteStore

URL = "/requestPrediction/efficientnet_lite0"
OWN = {"Sec-Fetch-Site": "same-origin"}
BROWSER = {**OWN, "Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


@pytest.fixture
def key(store: SqliteStore) -> str:
    id, key = make_key()
    store.add_key(
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
def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 24), "navy").save(file, "PNG")
    return file.getvalue()


def log_in(client: flask.testing.FlaskClient, key: str) -> None:
    assert client.post("/login", json={"key": key}, headers=OWN).status_code == 200


def test_a_key_is_exchanged_for_a_cookie_that_scripts_and_other_sites_do_not_get(
    client: flask.testing.FlaskClient, key: str
) -> None:
    answer = client.post("/login", data={"key": f" {key} ", "next": "/ui/requests"}, headers=BROWSER)

    cookie = answer.headers["Set-Cookie"]
    assert (answer.status_code, answer.headers["Location"]) == (303, "/ui/requests")
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert f"Max-Age={SESSION_SECONDS}" in cookie
    assert "Secure" not in cookie
    assert key[17:] not in cookie


def test_behind_a_proxy_that_ends_tls_the_cookie_is_secure(client: flask.testing.FlaskClient, key: str) -> None:
    answer = client.post("/login", json={"key": key}, headers={"X-Forwarded-Proto": "https"})

    assert "Secure" in answer.headers["Set-Cookie"]


def test_with_the_cookie_one_reads_and_sends(client: flask.testing.FlaskClient, key: str, picture: bytes) -> None:
    before = client.get("/readPrediction/x").status_code

    log_in(client, key)
    sent = client.post(URL, data=picture, content_type="image/png", headers=OWN)

    assert (before, sent.status_code) == (401, 202)
    assert client.get(sent.json["status_url"]).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "none"}, {"Origin": "https://evil.example"}],
)
def test_with_the_cookie_only_own_pages_change_something(
    client: flask.testing.FlaskClient, store: SqliteStore, key: str, picture: bytes, headers: dict[str, str]
) -> None:
    log_in(client, key)

    answer = client.post(URL, data=picture, content_type="image/png", headers=headers)

    assert (answer.status_code, answer.json["code"]) == (403, "cross_site")
    assert not store.list()


def test_browsers_that_say_only_the_origin_are_taken_too(
    client: flask.testing.FlaskClient, key: str, picture: bytes
) -> None:
    log_in(client, key)

    answer = client.post(URL, data=picture, content_type="image/png", headers={"Origin": "https://localhost"})

    assert answer.status_code == 202


def test_a_key_in_a_header_needs_no_own_page(client: flask.testing.FlaskClient, key: str, picture: bytes) -> None:
    log_in(client, key)
    headers = {"X-API-Key": key, "Origin": "https://elsewhere.example"}

    assert client.post(URL, data=picture, content_type="image/png", headers=headers).status_code == 202


def test_a_wrong_key_is_refused_with_json_or_a_page(client: flask.testing.FlaskClient, key: str) -> None:
    for_programs = client.post("/login", json={"key": "wrong"})
    for_people = client.post("/login", data={"key": "wrong", "next": "/ui/requests"}, headers=BROWSER)

    assert (for_programs.status_code, for_programs.json["code"]) == (401, "key_refused")
    assert (for_people.status_code, for_people.mimetype) == (401, "text/html")
    assert 'value="/ui/requests"' in for_people.text
    assert "wrong" not in for_people.text
    assert "Set-Cookie" not in for_people.headers


def test_a_key_in_the_url_is_refused(client: flask.testing.FlaskClient, key: str) -> None:
    answer = client.post(f"/login?key={key}")

    assert answer.status_code == 400
    assert key not in answer.text


@pytest.mark.parametrize("next_page", ["https://evil.example", "//evil.example", "/\\evil.example", "", "/a\nb"])
def test_after_logging_in_nobody_is_sent_elsewhere(client: flask.testing.FlaskClient, key: str, next_page: str) -> None:
    answer = client.post("/login", data={"key": key, "next": next_page}, headers=BROWSER)

    assert answer.headers["Location"] == "/"


def test_another_site_cannot_log_anybody_in(client: flask.testing.FlaskClient, key: str) -> None:
    answer = client.post("/login", data={"key": key}, headers={"Sec-Fetch-Site": "cross-site"})

    assert (answer.status_code, "Set-Cookie" in answer.headers) == (403, False)


def test_logging_out_forgets_the_cookie(client: flask.testing.FlaskClient, key: str) -> None:
    log_in(client, key)

    answer = client.post("/logout", headers=BROWSER)

    assert (answer.status_code, answer.headers["Location"]) == (303, "/ui/login")
    assert client.get("/readPrediction/x").status_code == 401


def test_a_session_ends_with_its_key(
    settings: ServerSettings, store: SqliteStore, client: flask.testing.FlaskClient, key: str
) -> None:
    log_in(client, key)
    cookie = client.get_cookie(COOKIE)
    assert cookie is not None
    store.revoke_key("alice", now=datetime.now(UTC))

    # A process that has not looked the key up before; one that has does so again within seconds.
    other = create_app(settings, store).test_client()
    other.set_cookie(COOKIE, cookie.value)

    assert other.get("/readPrediction/x").status_code == 401


def test_a_session_ends_after_its_time(
    client: flask.testing.FlaskClient, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(client, key)
    monkeypatch.setattr("server.auth.sessions.SESSION_SECONDS", -1)

    assert client.get("/readPrediction/x").status_code == 401


def test_a_cookie_of_another_home_or_a_changed_one_is_refused(
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


def test_the_secret_is_made_once_for_all_processes_and_for_its_owner_only(
    settings: ServerSettings, store: SqliteStore, key: str
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


def test_a_server_without_logins_makes_no_secret(client: flask.testing.FlaskClient, settings: ServerSettings) -> None:
    client.set_cookie(COOKIE, "nonsense")

    client.get("/readPrediction/x")

    assert not list(settings.home.glob("session*"))


def test_a_page_open_to_everybody_knows_who_logged_in(client: flask.testing.FlaskClient, key: str) -> None:
    log_in(client, key)

    with client:
        client.get("/", headers={"Accept": "application/json"})

        assert flask.g.key.name == "alice"

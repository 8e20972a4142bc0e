"""Authentication and authorisation: keys, scopes, owners, limits, and the checks of an open server."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import flask.testing
import pytest
from PIL import Image

from provider_image.errors import ConfigError
from server.app import create_app
from server.auth.guard import check_exposure
from server.auth.key_cache import FRESH_SECONDS, KeyCache
from server.auth.limits import Limits
from server.endpoint import get_operation
from server.errors import RateLimited
from server.settings import ServerSettings
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.errors import StoreBusy
from store.store import Store

MODEL = "efficientnet_lite0"
URL = f"/requestPrediction/{MODEL}"
NOW = datetime(2026, 11, 20, 12, 0, 15, tzinfo=UTC)
Make = Callable[..., str]


class Clock:
    """A time that tests move."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(store: Store) -> Make:
    """Make a key and return it."""

    def make_one(name: str = "alice", *scopes: Scope, **facts: Any) -> str:
        id, key = make_key()
        store.keys.add(
            KeyRecord(
                id=id,
                name=name,
                sha256=hash_key(key),
                scopes=frozenset(scopes or (Scope.SUBMIT, Scope.READ)),
                created_at=NOW - timedelta(days=1),
                **facts,
            )
        )
        return key

    return make_one


@pytest.fixture
def client(settings: ServerSettings, store: Store, clock: Clock) -> flask.testing.FlaskClient:
    return create_app(settings, store, clock=clock).test_client()


@pytest.fixture
def image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 24), "navy").save(file, "PNG")
    return file.getvalue()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def send(client: flask.testing.FlaskClient, image: bytes, key: str | None = None, **headers: str) -> Any:
    known = {} if key is None else bearer(key)
    return client.post(URL, data=image, content_type="image/png", headers={**known, **headers})


# Keys


def test_without_any_key_in_the_store_everybody_may_do_everything(
    client: flask.testing.FlaskClient, image: bytes
) -> None:
    sent = send(client, image)

    assert sent.status_code == 202
    assert client.get(sent.json["status_url"]).status_code == 200


def test_from_the_first_key_on_a_key_is_required(client: flask.testing.FlaskClient, make: Make, image: bytes) -> None:
    key = make()

    refused, accepted = send(client, image), send(client, image, key)

    assert (refused.status_code, refused.json["code"]) == (401, "key_missing")
    assert refused.headers["WWW-Authenticate"] == 'Bearer realm="mlg"'
    assert "mlg keys create" in refused.json["reason"]
    assert accepted.status_code == 202


def test_revoking_the_last_key_does_not_open_the_server(
    client: flask.testing.FlaskClient, store: Store, make: Make, image: bytes
) -> None:
    make("alice")
    store.keys.revoke("alice", now=NOW)

    assert send(client, image).status_code == 401


def test_a_key_may_be_in_either_header(client: flask.testing.FlaskClient, make: Make, image: bytes) -> None:
    key = make()

    answers = [
        client.post(URL, data=image, content_type="image/png", headers=headers)
        for headers in (
            {"Authorization": f"bearer {key}"},
            {"X-API-Key": key},
            # A proxy's own scheme is no business of ours.
            {"X-API-Key": key, "Authorization": "Basic YTpi"},
        )
    ]

    assert [answer.status_code for answer in answers] == [202, 202, 202]


def test_a_wrong_key_is_refused_and_appears_nowhere(
    client: flask.testing.FlaskClient, make: Make, image: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key = make()
    wrong = [key[:-1] + ("x" if key[-1] != "x" else "y"), make_key()[1], "nonsense", "", key + "é"]

    for given in wrong:
        answer = client.get("/readPrediction/x", headers={"X-API-Key": given.encode().decode("latin-1")})

        assert (answer.status_code, answer.json["code"]) == (401, "key_refused")
        assert not given or given not in answer.text
    assert key[17:40] not in caplog.text


def test_an_expired_key_is_refused(client: flask.testing.FlaskClient, make: Make, clock: Clock) -> None:
    key = make(expires_at=NOW + timedelta(minutes=1))

    before = client.get("/readPrediction/x", headers=bearer(key)).status_code
    clock.now += timedelta(minutes=1)

    assert (before, client.get("/readPrediction/x", headers=bearer(key)).status_code) == (404, 401)


def test_a_revoked_key_stops_working_within_seconds(store: Store, make: Make) -> None:
    monotonic = [0.0]
    key_cache = KeyCache(store.keys, monotonic=lambda: monotonic[0])
    key = make("alice")
    assert key_cache.find(key, NOW) is not None
    store.keys.revoke("alice", now=NOW)

    monotonic[0] = FRESH_SECONDS + 0.1

    assert FRESH_SECONDS < 5
    assert key_cache.find(key, NOW) is None


def test_an_open_server_closes_within_seconds_of_the_first_key(store: Store, make: Make) -> None:
    monotonic = [0.0]
    key_cache = KeyCache(store.keys, monotonic=lambda: monotonic[0])
    assert not key_cache.has_keys()
    make()

    monotonic[0] = FRESH_SECONDS + 0.1

    assert key_cache.has_keys()


def test_the_use_of_a_key_is_written_to_the_store(client: flask.testing.FlaskClient, store: Store, make: Make) -> None:
    client.get("/readPrediction/x", headers=bearer(make()))

    assert [key.last_used_at for key in store.keys.list()] == [NOW]


def test_a_failure_to_write_the_use_of_a_key_refuses_nobody(
    client: flask.testing.FlaskClient, store: Store, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StoreBusy()

    monkeypatch.setattr(store.keys, "touch", fail)

    assert client.get("/readPrediction/x", headers=bearer(make())).status_code == 404


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/"])
def test_health_and_the_first_page_are_open_to_everybody(
    client: flask.testing.FlaskClient, make: Make, path: str
) -> None:
    make()

    assert client.get(path).status_code == 200
    assert client.get(path, headers=bearer("nonsense")).status_code == 200


# Scopes


@pytest.mark.parametrize(
    ("scope", "sends", "reads", "cancels", "measures"),
    [
        (Scope.SUBMIT, 202, 403, 200, 403),
        (Scope.READ, 403, 404, 403, 403),
        (Scope.METRICS, 403, 403, 403, 200),
        (Scope.OPERATE, 202, 200, 200, 200),
    ],
)
def test_a_key_is_limited_to_its_scopes(
    client: flask.testing.FlaskClient,
    make: Make,
    image: bytes,
    scope: Scope,
    sends: int,
    reads: int,
    cancels: int,
    measures: int,
) -> None:
    key = make("one", scope)
    sent = send(client, image, key)
    id = sent.json.get("req_id", "x")

    read = client.get(f"/readPrediction/{id}", headers=bearer(key))
    cancelled = client.delete(f"/requests/{id}", headers=bearer(key))

    measured = client.get("/metrics", headers=bearer(key))

    answers = (sent, read, cancelled, measured)
    assert tuple(answer.status_code for answer in answers) == (sends, reads, cancels, measures)
    for answer in answers:
        assert answer.status_code != 403 or answer.json["code"] == "scope_missing"


def test_a_view_without_an_operation_is_for_operators(settings: ServerSettings, store: Store, make: Make) -> None:
    app = create_app(settings, store)
    app.add_url_rule("/quiet", "quiet", lambda: "something")
    alice, operator = make("alice"), make("operator", Scope.OPERATE)

    statuses = [app.test_client().get("/quiet", headers=bearer(key)).status_code for key in (alice, operator)]

    assert statuses == [403, 200]


# Owners


def test_a_request_is_visible_to_its_own_key_and_to_operators(
    client: flask.testing.FlaskClient, store: Store, make: Make, image: bytes
) -> None:
    alice, bob, operator = make("alice"), make("bob"), make("operator", Scope.OPERATE)
    id = send(client, image, alice).json["req_id"]

    def ask(key: str) -> list[int]:
        return [
            client.get(f"/readPrediction/{id}", headers=bearer(key)).status_code,
            client.post(f"/requests/{id}/retry", headers=bearer(key)).status_code,
            client.delete(f"/requests/{id}", headers=bearer(key)).status_code,
        ]

    bobs = ask(bob)
    stayed = store.requests.get(id).state
    alices = ask(alice)

    assert bobs == [404, 404, 404]
    assert str(stayed) == "queued"
    assert alices == [200, 409, 200]
    assert ask(operator)[0] == 200
    assert store.requests.get(id).key_id == next(key.id for key in store.keys.list() if key.name == "alice")


def test_requests_from_before_the_first_key_are_for_operators(
    settings: ServerSettings, store: Store, make: Make, image: bytes
) -> None:
    id = send(create_app(settings, store).test_client(), image).json["req_id"]
    client = create_app(settings, store).test_client()
    alice, operator = make("alice"), make("operator", Scope.OPERATE)

    statuses = [client.get(f"/readPrediction/{id}", headers=bearer(key)).status_code for key in (alice, operator)]

    assert statuses == [404, 200]


def test_what_another_key_sent_looks_like_something_unknown_in_every_view(
    client: flask.testing.FlaskClient, make: Make, image: bytes
) -> None:
    alice, bob = make("alice"), make("bob")
    form = {"image": (io.BytesIO(image), "a.png")}
    batch = client.post(f"/requestPredictions/{MODEL}", data=form, headers=bearer(alice)).json
    ids = {"request": batch["items"][0]["req_id"], "batch": batch["batch_id"], "absent": "0" * 32}
    calls = {("/events?ids=<id>", "GET"), ("/requests?batch=<id>", "GET")}
    for rule in client.application.url_map.iter_rules():
        described = get_operation(client.application.view_functions[rule.endpoint])
        if described is not None and described.scope in (Scope.READ, Scope.SUBMIT) and "<id>" in rule.rule:
            calls |= {(rule.rule, method) for method in described.methods}
    last_id = {"Last-Event-ID": ".end"}

    for path, method in calls:
        answers = set()
        for id in ids.values():
            url = path.replace("<id>", id).replace("<name>", "x.png")
            response = client.open(url, method=method, headers={**bearer(bob), **last_id})
            answers.add((response.status_code, response.text.replace(id, "ID")))
        assert {status for status, _ in answers} == {200 if path.startswith("/requests?") else 404}, path
        assert len(answers) == 1, (path, answers)
    assert len(calls) > 15


# Limits


def test_a_quota_is_in_every_response_and_ends_with_429(
    client: flask.testing.FlaskClient, make: Make, image: bytes, clock: Clock
) -> None:
    key = make(images_per_day=2)

    answers = [send(client, image, key) for _ in range(3)]
    read = client.get("/readPrediction/x", headers=bearer(key))
    clock.now += timedelta(hours=12)
    tomorrow = send(client, image, key)

    assert [answer.status_code for answer in answers] == [202, 202, 429]
    assert answers[2].json["code"] == "quota_reached"
    # Noon and 15 seconds: midnight is 43185 seconds away.
    assert answers[2].headers["Retry-After"] == "43185"
    assert answers[0].headers["RateLimit-Policy"] == '"pictures-per-day";q=2;w=86400'
    assert [answer.headers["RateLimit"] for answer in (*answers, read)] == [
        '"pictures-per-day";r=1;t=43185',
        '"pictures-per-day";r=0;t=43185',
        '"pictures-per-day";r=0;t=43185',
        '"pictures-per-day";r=0;t=43185',
    ]
    assert tomorrow.status_code == 202


def test_a_quota_refuses_before_the_image_is_read(client: flask.testing.FlaskClient, make: Make, image: bytes) -> None:
    key = make(images_per_day=1)
    send(client, image, key)

    answer = client.post(URL, data=b"x" * 100_000_000, content_type="image/png", headers=bearer(key))

    assert answer.status_code == 429


def test_a_rate_is_in_every_response_and_ends_with_429(
    client: flask.testing.FlaskClient, make: Make, clock: Clock
) -> None:
    key = make(requests_per_minute=3)

    answers = [client.get("/readPrediction/x", headers=bearer(key)) for _ in range(4)]
    clock.now += timedelta(seconds=45)
    next_minute = client.get("/readPrediction/x", headers=bearer(key))

    assert [answer.status_code for answer in answers] == [404, 404, 404, 429]
    assert answers[3].json["code"] == "rate_limited"
    assert answers[3].headers["Retry-After"] == "45"
    assert answers[3].headers["RateLimit-Policy"] == '"requests-per-minute";q=3;w=60'
    assert [answer.headers["RateLimit"] for answer in answers] == [
        f'"requests-per-minute";r={left};t=45' for left in (2, 1, 0, 0)
    ]
    assert next_minute.status_code == 404


def test_both_limits_are_in_one_header(client: flask.testing.FlaskClient, make: Make) -> None:
    answer = client.get("/readPrediction/x", headers=bearer(make(requests_per_minute=10, images_per_day=5)))

    assert answer.headers["RateLimit-Policy"] == '"requests-per-minute";q=10;w=60, "pictures-per-day";q=5;w=86400'
    assert answer.headers["RateLimit"] == '"requests-per-minute";r=9;t=45, "pictures-per-day";r=5;t=43185'


def test_a_key_without_limits_gets_no_headers(client: flask.testing.FlaskClient, make: Make) -> None:
    answer = client.get("/readPrediction/x", headers=bearer(make()))

    assert not [name for name, _ in answer.headers if name.startswith("RateLimit")]


@pytest.mark.parametrize("per_minute", [1, 7, 100])
def test_several_processes_together_keep_the_limit(store: Store, make: Make, per_minute: int) -> None:
    make(requests_per_minute=per_minute)
    (key,) = store.keys.list()
    processes = [Limits(store.keys) for _ in range(3)]
    answered = 0

    for turn in range(6 * per_minute):
        try:
            processes[turn % 3].count_request(key, NOW)
            answered += 1
        except RateLimited:
            continue

    assert answered == per_minute


def test_a_process_asks_the_store_ten_times_a_minute_at_most(
    store: Store, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(requests_per_minute=200)
    (key,) = store.keys.list()
    asked = []
    real = store.keys.grant_requests
    monkeypatch.setattr(store.keys, "grant_requests", lambda *a, **k: (asked.append(1), real(*a, **k))[1])
    limits = Limits(store.keys)

    for _ in range(200):
        limits.count_request(key, NOW)

    assert len(asked) == 10


# An open server and browsers


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:5000", "127.0.0.1:5000", "127.0.0.2", "[::1]:5000", "LOCALHOST", "photos.lan:80"]
)
def test_an_open_server_accepts_the_names_of_this_machine(settings: ServerSettings, store: Store, host: str) -> None:
    app = create_app(replace(settings, allowed_hosts=frozenset({"photos.lan"})), store)

    assert app.test_client().get("/readPrediction/x", headers={"Host": host}).status_code == 404


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:5000", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "[::2]"],
)
def test_a_rebound_host_name_is_refused(client: flask.testing.FlaskClient, host: str) -> None:
    answer = client.get("/readPrediction/x", headers={"Host": host})

    assert (answer.status_code, answer.json["code"]) == (421, "wrong_host")


def test_with_keys_any_host_name_is_accepted(client: flask.testing.FlaskClient, make: Make) -> None:
    assert client.get("/readPrediction/x", headers={**bearer(make()), "Host": "mlg.example"}).status_code == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:9999"},
    ],
)
def test_a_page_of_another_site_changes_nothing_on_an_open_server(
    client: flask.testing.FlaskClient, store: Store, image: bytes, headers: dict[str, str]
) -> None:
    answer = send(client, image, **headers)

    assert (answer.status_code, answer.json["code"]) == (403, "cross_site")
    assert not store.requests.list()


@pytest.mark.parametrize(
    "headers", [{"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}, {"Origin": "http://localhost"}, {}]
)
def test_own_pages_and_programs_may_send_to_an_open_server(
    client: flask.testing.FlaskClient, image: bytes, headers: dict[str, str]
) -> None:
    assert send(client, image, **headers).status_code == 202


# Other machines


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "mlg.example"])
def test_a_server_for_other_machines_needs_keys_or_a_setting(
    settings: ServerSettings, store: Store, make: Make, host: str
) -> None:
    exposed = replace(settings, host=host)
    with pytest.raises(ConfigError, match="mlg keys create"):
        check_exposure(exposed, store.keys)

    check_exposure(replace(exposed, is_open=True), store.keys)
    make()
    check_exposure(exposed, store.keys)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_a_server_for_this_machine_needs_no_keys(settings: ServerSettings, store: Store, host: str) -> None:
    check_exposure(replace(settings, host=host), store.keys)


@pytest.mark.parametrize(("is_open", "status"), [(False, 401), (True, 404)])
def test_on_another_address_a_server_without_keys_is_open_only_by_setting(
    settings: ServerSettings, store: Store, is_open: bool, status: int
) -> None:
    app = create_app(replace(settings, host="0.0.0.0", is_open=is_open), store)

    assert app.test_client().get("/readPrediction/x", headers={"Host": "mlg.example"}).status_code == status


def test_keys_are_required_even_if_the_server_is_set_to_be_open(
    settings: ServerSettings, store: Store, make: Make
) -> None:
    make()

    assert create_app(replace(settings, is_open=True), store).test_client().get("/readPrediction/x").status_code == 401


@pytest.mark.parametrize("hosts", ["http://a.example", "a.example:80", "a b"])
def test_a_bad_host_name_in_the_settings_names_its_variable(tmp_path: Path, hosts: str) -> None:
    with pytest.raises(ConfigError, match="MLG_ALLOWED_HOSTS"):
        ServerSettings.from_env({"MLG_HOME": str(tmp_path), "MLG_ALLOWED_HOSTS": hosts})


def test_host_names_are_read_with_commas_between() -> None:
    settings = ServerSettings.from_env({"MLG_ALLOWED_HOSTS": " Photos.LAN, [fd00::1] ,"})

    assert settings.allowed_hosts == {"photos.lan", "[fd00::1]"}


# Every view


def test_every_view_requires_a_key_unless_it_is_open_to_everybody(
    settings: ServerSettings, store: Store, make: Make
) -> None:
    app = create_app(settings, store)
    make()
    client = app.test_client()

    for rule in app.url_map.iter_rules():
        described = get_operation(app.view_functions[rule.endpoint])
        assert described is not None, rule
        path = re.sub("<.*?>", "x", rule.rule)
        for method in sorted((rule.methods or set()) - {"OPTIONS"}):
            status = client.open(path, method=method).status_code

            assert (status == 401) is (described.scope is not None or path == "/login"), f"{method} {path}: {status}"


def test_a_program_without_a_host_header_is_accepted(client: flask.testing.FlaskClient) -> None:
    assert client.get("/readPrediction/x", environ_overrides={"HTTP_HOST": ""}).status_code == 404

"""Usage over HTTP and on its page, and which kind of program a request counts for."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import flask.testing
import pytest

from server.intake.client_kind import client_kind
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.clients.usage import MAX_ROWS, ClientKind
from store.store import Store
from tests.conftest import MODEL

NOW = datetime.now(UTC)
TODAY = NOW.date().isoformat()
Client = flask.testing.FlaskClient
#: Of the header User-Agent of real programs.
AGENTS = {
    "curl/8.5.0": ClientKind.CURL,
    "mlg_client": ClientKind.OWN_CLIENT,
    "mlg_telegram (mlg_client)": ClientKind.TELEGRAM,
    "TelegramBot (like TwitterBot)": ClientKind.TELEGRAM,
    "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0": ClientKind.BROWSER,
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 Chrome/140.0.0.0 Safari/537.36": ClientKind.BROWSER,
    "Mozilla/5.0 (iPhone; CPU iPhone OS 18_0 like Mac OS X) AppleWebKit/605.1.15 Mobile/15E148": ClientKind.MOBILE,
    "Mozilla/5.0 (Linux; Android 15; Pixel 9) AppleWebKit/537.36 Chrome/140.0 Mobile Safari/537.36": ClientKind.MOBILE,
    "okhttp/4.12.0": ClientKind.MOBILE,
    "python-requests/2.32": ClientKind.OTHER,
    "not curl/8": ClientKind.OTHER,
    "": ClientKind.OTHER,
    "x" * 100_000 + "telegram": ClientKind.OTHER,
}


@pytest.fixture
def add_key(store: Store) -> Callable[..., tuple[str, dict[str, str]]]:
    """Add an API key; returns its id and the header with it."""

    def add(name: str, *scopes: Scope, **facts: Any) -> tuple[str, dict[str, str]]:
        id, key = make_key()
        given = frozenset(scopes or (Scope.SUBMIT, Scope.READ))
        store.keys.add(KeyRecord(id=id, name=name, sha256=hash_key(key), scopes=given, created_at=NOW, **facts))
        return id, {"X-API-Key": key}

    return add


def send(client: Client, photo: bytes, headers: dict[str, str] | None = None, *, agent: str = "curl/8.5.0") -> None:
    data = {"image": (io.BytesIO(photo), "a.jpg")}
    reply = client.post(f"/requestPrediction/{MODEL}", data=data, headers={"User-Agent": agent, **(headers or {})})
    assert reply.status_code in (200, 202), reply.text


@pytest.mark.parametrize(("agent", "kind"), AGENTS.items(), ids=[agent[:30] for agent in AGENTS])
def test_the_kind_of_a_program_follows_from_its_name(agent: str, kind: ClientKind) -> None:
    assert client_kind(agent) is kind


def test_usage_has_rows_totals_and_nothing_of_quotas_without_keys(
    client: Client, photos: dict[str, bytes], answer: Callable[..., list[str]]
) -> None:
    send(client, photos["rocket"])
    send(client, photos["coffee"], agent="Mozilla/5.0 (X11)")
    answer()

    found = client.get("/usage").get_json()
    by_client = client.get("/usage?by=client,model").get_json()

    size = len(photos["rocket"]) + len(photos["coffee"])
    counts = {"accepted": 2, "refused": 0, "done": 2, "cached": 0, "failed": 0, "cancelled": 0, "expired": 0}
    money = {"bytes": size, "seconds": 0.02, "cost": "0", "cost_is_final": True}
    assert found == {
        "success": True,
        "since": (NOW.date() - timedelta(days=29)).isoformat(),
        "until": TODAY,
        "by": ["day"],
        "usage": [{"day": TODAY, **counts, **money}],
        "total": {**counts, **money},
        "quotas": [],
    }
    assert [(row["client"], row["model"], row["done"]) for row in by_client["usage"]] == [
        ("browser", MODEL, 1),
        ("curl", MODEL, 1),
    ]


def test_a_key_sees_its_own_usage_and_an_operator_that_of_all(
    client: Client, photos: dict[str, bytes], add_key: Callable[..., tuple[str, dict[str, str]]]
) -> None:
    alice_id, alice = add_key("alice", images_per_day=5, requests_per_minute=60)
    bob_id, bob = add_key("bob")
    _, operator = add_key("chief", Scope.OPERATE)
    send(client, photos["rocket"], alice)
    send(client, photos["coffee"], alice)
    send(client, photos["rocket"], bob)

    def read(headers: dict[str, str], query: str = "?by=key") -> Any:
        return client.get(f"/usage{query}", headers=headers).get_json()

    own, foreign, everything = read(bob), read(bob, "?key=alice"), read(operator)
    named, by_id, unknown = (read(operator, f"?by=key&key={key}") for key in ("alice", alice_id, "nobody"))

    assert [(row["key"], row["accepted"]) for row in own["usage"]] == [(bob_id, 1)]
    assert (own["total"]["accepted"], own["quotas"]) == (1, [])
    assert (foreign["code"], unknown["code"]) == ("scope_missing", "unknown_key")
    assert read(bob, "?by=key&key=bob")["usage"] == own["usage"]
    assert [(row["key_name"], row["accepted"]) for row in everything["usage"]] == [("alice", 2), ("bob", 1)]
    assert named["usage"] == by_id["usage"] == everything["usage"][:1]
    assert everything["quotas"] == [
        {
            "key": alice_id,
            "key_name": "alice",
            "images_per_day": 5,
            "requests_per_minute": 60,
            "images_today": 2,
            "images_left": 3,
        }
    ]
    assert client.get("/usage").status_code == 401
    page = client.get("/ui/usage", headers={**bob, "Accept": "text/html"}).get_data(as_text=True)
    assert "alice" not in page
    page = client.get("/ui/usage?by=key", headers={**operator, "Accept": "text/html"}).get_data(as_text=True)
    assert f'&amp;by=model&amp;key={alice_id}">alice</a>' in page


def test_usage_as_csv_has_the_same_rows_and_no_formulas(
    client: Client, photos: dict[str, bytes], add_key: Callable[..., tuple[str, dict[str, str]]]
) -> None:
    id, key = add_key("=cmd()")
    send(client, photos["rocket"], key)

    reply = client.get("/usage.csv?by=day,key", headers=key)

    assert reply.content_type == "text/csv; charset=utf-8"
    (row,) = csv.DictReader(io.StringIO(reply.get_data(as_text=True)))
    assert (row["day"], row["key"], row["key_name"], row["accepted"]) == (TODAY, id, "'=cmd()", "1")


@pytest.mark.parametrize(
    "query",
    [
        "since=yesterday",
        "since=2026-13-01",
        "until=2026-1-1",
        "since=2026-11-20&until=2026-11-19",
        "since=2020-01-01&until=2026-01-01",
        "by=colour",
        "by=day,",
        "days=3",
    ],
)
@pytest.mark.parametrize("path", ["/usage", "/usage.csv"])
def test_a_period_that_cannot_be_is_refused(client: Client, path: str, query: str) -> None:
    reply = client.get(f"{path}?{query}")

    assert (reply.status_code, reply.get_json()["code"]) == (400, "invalid_params")


def test_the_first_days_of_the_calendar_are_no_error(client: Client) -> None:
    assert client.get("/usage?until=0001-01-01").get_json()["since"] == "0001-01-01"


def test_more_rows_than_can_be_shown_are_refused(client: Client, store: Store) -> None:
    rows = [(TODAY, "", f"m{number}", "other") for number in range(MAX_ROWS + 1)]
    sql = "INSERT INTO usage (day, key_id, model, client, accepted) VALUES (?, ?, ?, ?, 1)"
    store.database.write(lambda transaction: transaction.execute_many(sql, rows))

    assert client.get("/usage?by=model").get_json()["code"] == "invalid_params"
    assert client.get("/usage").get_json()["total"]["accepted"] == MAX_ROWS + 1


def test_the_page_shows_days_rows_and_a_download(
    client: Client, photos: dict[str, bytes], answer: Callable[..., list[str]]
) -> None:
    send(client, photos["rocket"])
    answer(fail_with="broken")
    send(client, photos["coffee"])
    answer()

    text = client.get("/ui/usage?by=model").get_data(as_text=True)
    empty = client.get("/ui/usage?since=2020-01-01&until=2020-01-01")

    assert f"<title>{TODAY}: 1 answered</title>" in text
    assert f"<title>{TODAY}: 1 not answered</title>" in text
    assert f"<td>{MODEL}</td>" in text
    assert 'href="/usage.csv?since=' in text
    assert '<option value="model" selected>' in text
    assert (empty.status_code, "Nothing was sent in this time." in empty.get_data(as_text=True)) == (200, True)
    assert client.get("/ui/usage?by=nonsense").status_code == 400

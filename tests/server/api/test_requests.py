"""Requests through the API: filters, pages, details, the image, delete."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import flask.testing
import pytest

from provider_image.models.artefact import installed_digest
from server.app import create_app
from server.settings import ServerSettings
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.requests import Answer
from store.search import Query, _SearchSql
from store.store import Store
from tests.conftest import OUTPUT
from tests.timing import slowness

URL = "/requestPrediction/efficientnet_lite0"


def send(client: flask.testing.FlaskClient, data: bytes, name: str = "a.jpg", query: str = "") -> str:
    reply = client.post(URL + query, data={"image": (io.BytesIO(data), name)})
    assert reply.status_code == 202, reply.get_json()
    return str(reply.get_json()["req_id"])


def test_a_list_is_read_page_by_page(client: flask.testing.FlaskClient, photos: dict[str, bytes]) -> None:
    ids = [send(client, photos["rocket"]) for _ in range(5)]

    seen: list[str] = []
    query = "limit=2"
    while query:
        page = client.get(f"/requests?{query}").get_json()
        seen += [request["req_id"] for request in page["requests"]]
        query = f"limit=2&cursor={page['next']}" if page["next"] else ""

    assert seen == ids[::-1]


def test_a_single_request_has_labels_and_is_found_by_them(
    client: flask.testing.FlaskClient, photos: dict[str, bytes]
) -> None:
    id = send(client, photos["rocket"], query="?label=place:attic&label=year:1999&keep_seconds=5")
    send(client, photos["rocket"])

    found = client.get("/requests?label=year:1999&label=place:attic").get_json()["requests"]

    assert [request["req_id"] for request in found] == [id]
    assert found[0]["labels"] == {"place": "attic", "year": "1999"}
    assert client.get("/requests?state=queued&model=EfficientNet_Lite0&q=A.J").get_json()["requests"][1]["req_id"] == id
    assert client.get("/requests?state=done").get_json()["requests"] == []


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=201",
        "limit=x",
        "cursor=x",
        "cursor=",
        "cursor=%ff",
        "state=gone",
        "since=soon",
        "more=1",
        "q=a&q=b",
    ],
)
def test_a_query_that_cannot_be_read_is_refused(client: flask.testing.FlaskClient, query: str) -> None:
    assert client.get(f"/requests?{query}").status_code == 400


def test_the_details_of_a_request_have_its_timeline(
    client: flask.testing.FlaskClient, photos: dict[str, bytes], answer: Callable[..., list[str]]
) -> None:
    id = send(client, photos["rocket"], query="?deadline=2999-01-01T00:00:00Z")
    queued = client.get(f"/requests/{id}").get_json()

    answer()
    done = client.get(f"/requests/{id}").get_json()

    assert [event["event"] for event in queued["timeline"]] == ["received", "queued"]
    assert [event["event"] for event in done["timeline"]] == ["received", "queued", "claimed", "answered"]
    assert (done["timeline"][-1]["by"], done["deadline_at"]) == ("local", "2999-01-01T00:00:00.000Z")
    assert done["picture_url"] == f"/requests/{id}/picture"
    assert client.get("/requests/nope").status_code == 404


def test_an_image_is_returned_as_sent_and_as_a_thumbnail(
    client: flask.testing.FlaskClient, photos: dict[str, bytes]
) -> None:
    from PIL import Image

    id = send(client, photos["chelsea"])

    whole, small = client.get(f"/requests/{id}/picture"), client.get(f"/requests/{id}/picture?size=100")

    assert (whole.content_type, whole.get_data()) == ("image/jpeg", photos["chelsea"])
    assert Image.open(io.BytesIO(small.get_data())).size == (100, 67)
    etag = {"If-None-Match": small.headers["ETag"]}
    assert client.get(f"/requests/{id}/picture?size=100", headers=etag).status_code == 304
    assert client.get(f"/requests/{id}/picture?size=9999").status_code == 400


def test_a_deleted_image_is_gone(client: flask.testing.FlaskClient, photos: dict[str, bytes], store: Store) -> None:
    id = send(client, photos["rocket"])
    store.images.delete(store.requests.get(id).image_sha256)

    reply = client.get(f"/requests/{id}/picture")

    assert (reply.status_code, reply.get_json()["code"]) == (410, "picture_gone")


@pytest.mark.parametrize("kind", ["transparent", "palette", "sixteen", "cut"])
def test_a_thumbnail_is_made_of_any_image_or_fails_with_a_reason(kind: str) -> None:
    from PIL import Image

    from provider_image.errors import BrokenImage
    from provider_image.images.thumbnails import thumbnail

    modes = {"transparent": "RGBA", "palette": "P", "sixteen": "I;16", "cut": "RGB"}
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert(modes[kind]).save(buffer, "PNG")
    data = buffer.getvalue()
    if kind == "cut":
        data = data[:300] + b"\0" * 50 + data[350:]
        with pytest.raises(BrokenImage):
            thumbnail(data, 16)
    else:
        assert Image.open(io.BytesIO(thumbnail(data, 16))).size == (16, 16)


def test_a_request_that_has_ended_can_be_deleted(
    client: flask.testing.FlaskClient,
    photos: dict[str, bytes],
    answer: Callable[..., list[str]],
    stored_state: Callable[[], tuple[list[str], int]],
) -> None:
    id = send(client, photos["rocket"])
    assert client.post(f"/requests/{id}/delete").get_json()["code"] == "not_removable"
    answer()

    assert client.post(f"/requests/{id}/delete").get_json()["status"] == "deleted"

    assert stored_state() == ([], 0)


# Many requests


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store of sixty thousand requests, written straight into the table."""
    store = Store(ServerSettings(home=Path(tmp_path_factory.mktemp("crowded")) / "home"))
    store.migrate()
    row = """
        INSERT INTO requests (id, service, model, name, image_sha256, image_bytes, state, created_at, due_at,
                              finished_at, digest, output, reason, code, labels, key_id, batch_id,
                              lease_ends_at)
        SELECT printf('%032x', value), 'classification', 'm' || (value % 3), 'picture ' || value,
               printf('%064x', value), 1,
               CASE WHEN value % 100 = 7 THEN 'failed' WHEN value % 5 = 0 THEN 'queued'
                    WHEN value % 10 = 3 THEN 'claimed' ELSE 'done' END,
               strftime('%Y-%m-%dT%H:%M:%fZ', 1700000000 + value, 'unixepoch'), '2026-11-20T12:00:00.000Z',
               CASE WHEN value % 5 = 0 OR value % 10 = 3 THEN NULL ELSE '2026-11-20T12:00:00.000Z' END, 'd',
               CASE WHEN value % 100 = 7 OR value % 5 = 0 OR value % 10 = 3 THEN NULL ELSE '[]' END, 'r', 'c',
               CASE WHEN value % 1000 = 1 THEN '{"rare": "yes"}' WHEN value % 10 = 2 THEN '{"common": "yes"}'
                    ELSE '{}' END,
               'k' || (value % 7), CASE WHEN value % 10 = 9 THEN 'big' END,
               CASE WHEN value % 10 = 3 THEN '2026-11-20T12:00:00.000Z' END
        FROM generate
    """
    numbers = (
        "WITH RECURSIVE generate (value) AS (SELECT 1 UNION ALL SELECT value + 1 FROM generate WHERE value < 60000)"
    )

    def write(transaction: Any) -> None:
        transaction.execute(row.replace("INSERT INTO requests", f"{numbers} INSERT INTO requests", 1))
        transaction.execute(
            "INSERT INTO request_labels (name, value, number, key_id)"
            " SELECT key, value, number, key_id FROM requests, json_each(labels)"
        )
        transaction.execute(
            "INSERT INTO batches (id, service, model, params, labels, key_id, created_at, total, refused)"
            " VALUES ('big', 's', 'm', '{}', '{}', 'k1', '2026-11-20T12:00:00.000Z', 6000, 0)"
        )

    store.database.write(write)
    yield store
    store.close()


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        (Query(), None),
        (Query(status="queued"), "requests_status"),
        (Query(status="failed"), "requests_status"),
        (Query(status="done"), "requests_status"),
        (Query(status="expired"), "requests_status"),
        (Query(model="m1"), "requests_model"),
        (Query(status="queued", model="m1"), "requests_queued"),
        (Query(status="done", model="m1"), "requests_model"),
        (Query(batch_id="b"), "requests_batch"),
        (Query(key_id="k1"), "requests_key"),
        (Query(key_id="k1", labels=(("rare", "yes"),)), "request_labels_key"),
        (Query(key_id="k1", batch_id="big"), "requests_batch"),
        (Query(key_id="k1", status="failed"), "requests_key_status"),
        (Query(key_id="k1", status="claimed"), "requests_key_status"),
        (Query(text="no such name"), "requests_name"),
    ],
)
@pytest.mark.parametrize("before", [None, 20_000])
def test_a_page_uses_one_index_and_sorts_nothing(
    crowded: Store, wanted: Query, index: str | None, before: int | None
) -> None:
    page = _SearchSql(wanted, before, 50)
    plan = [row["detail"] for row in crowded.database.rows(f"EXPLAIN QUERY PLAN {page.page_sql}", page.values)]

    assert any(index in step for step in plan) if index else True
    assert not any("TEMP B-TREE" in step for step in plan)
    started_at = time.perf_counter()
    crowded.search.find(wanted, before=before, limit=50)
    # Some milliseconds.
    assert time.perf_counter() - started_at < 1 * slowness()


def test_a_page_takes_as_many_statements_however_long_it_is(crowded: Store) -> None:
    seen: list[str] = []

    def count(limit: int) -> int:
        seen.clear()
        assert len(crowded.search.find(Query(), before=30_000, limit=limit).requests) == limit
        return len(seen)

    with crowded.database.read() as connection:  # which the pages use again
        connection.set_trace_callback(seen.append)
    counts = [count(20), count(200)]
    with crowded.database.read() as connection:
        connection.set_trace_callback(None)

    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    "filters",
    [
        {"labels": (("common", "yes"),)},
        {"labels": (("common", "yes"), ("rare", "yes"))},
        {"labels": (("common", "yes"),), "model": "m1", "text": "9"},
        {"batch_id": "big"},
        {"batch_id": "big", "status": "failed"},
        {"batch_id": "big", "labels": (("common", "yes"),)},
        {"model": "m1"},
        {"model": "m1", "status": "queued"},
        {"text": "picture"},
        {},
        *({"status": status} for status in ("queued", "claimed", "done", "failed", "cancelled", "expired")),
    ],
)
def test_a_search_tells_nothing_of_the_requests_of_other_keys(crowded: Store, filters: dict[str, Any]) -> None:
    everybody, nobody = (crowded.search.find(Query(key_id=key_id, **filters), limit=1) for key_id in (None, "another"))

    assert everybody.next_before is not None or filters.get("status") in ("cancelled", "expired")
    assert (nobody.requests, nobody.next_before) == ([], None)


def test_a_key_finds_its_own_by_label_in_one_read(crowded: Store) -> None:
    found = crowded.search.find(Query(key_id="k1", labels=(("rare", "yes"),)), limit=200)

    # One of a thousand numbers is labelled, and every seventh is this key's.
    assert [row.number for row in found.requests] == [n for n in range(60_000, 0, -1) if n % 1000 == 1 and n % 7 == 1]
    assert found.next_before is None


def make_headers(store: Store, name: str) -> dict[str, str]:
    """Create an API key; return the headers that send it."""
    id, key = make_key()
    scopes = frozenset({Scope.SUBMIT, Scope.READ})
    store.keys.add(KeyRecord(id=id, name=name, sha256=hash_key(key), scopes=scopes, created_at=datetime.now(UTC)))
    return {"X-API-Key": key}


@pytest.mark.parametrize("shares_answers", [False, True])
def test_an_image_of_another_key_is_known_only_where_answers_are_shared(
    settings: ServerSettings, store: Store, photos: dict[str, bytes], shares_answers: bool
) -> None:
    client = create_app(replace(settings, shares_answers=shares_answers), store).test_client()
    alice, bob = make_headers(store, "alice"), make_headers(store, "bob")

    def send_with(headers: dict[str, str]) -> tuple[bool, str]:
        sent = client.post(URL, data=photos["rocket"], content_type="image/jpeg", headers=headers).json
        image = (io.BytesIO(photos["rocket"]), "a.jpg")
        batch = client.post(URL.replace("Prediction", "Predictions"), data={"image": [image]}, headers=headers).json
        return sent["cached"], batch["items"][0]["status"]

    before = send_with(alice)
    digest = installed_digest(settings.models, "efficientnet_lite0")
    now = datetime.now(UTC)
    claims = store.requests.claim(
        models=["efficientnet_lite0"], limit=9, now=now, lease_ends_at=now + timedelta(hours=1), oldest_before=None
    )
    answers = [
        Answer(claim=claim, output=OUTPUT, digest=str(digest), chunk_id="c", provider="p", seconds=0.1)
        for claim in claims
    ]
    store.requests.finish(answers, now=now)

    assert before == (False, "queued")
    assert send_with(alice) == (True, "done")
    assert send_with(bob) == ((True, "done") if shares_answers else (False, "queued"))


def test_a_cursor_of_another_key_is_refused(
    client: flask.testing.FlaskClient, store: Store, photos: dict[str, bytes]
) -> None:
    headers = [make_headers(store, name) for name in ("alice", "bob")]
    for _ in range(2):
        client.post(URL, data=photos["rocket"], content_type="image/jpeg", headers=headers[0])

    following = client.get("/requests?limit=1", headers=headers[0]).json["next"]
    statuses = [client.get(f"/requests?cursor={following}", headers=one).status_code for one in headers]

    assert statuses == [200, 400]
    assert client.get(f"/batches?cursor={following}", headers=headers[0]).status_code == 400


def test_labels_and_times_use_an_index(crowded: Store) -> None:
    rare = crowded.search.find(Query(labels=(("rare", "yes"),)), limit=200)
    early = datetime.fromtimestamp(1_700_000_100, UTC)

    assert (len(rare.requests), rare.next_before) == (60, None)
    assert [row.number for row in crowded.search.find(Query(until=early), limit=200).requests] == list(range(99, 0, -1))


def test_a_list_may_begin_and_end_at_any_time(client: flask.testing.FlaskClient, photos: dict[str, bytes]) -> None:
    id = send(client, photos["rocket"])
    moments = ("0001-01-01", "0999-01-01", "2000-01-01", "9998-01-01", "9999-12-31")
    for moment, name, zone in itertools.product(moments, ("since", "until"), ("", "Z", "+14:00", "-14:00")):
        reply = client.get("/requests", query_string={name: f"{moment}T12:00:00.999999{zone}"})

        if (moment[:4], zone) in (("0001", "+14:00"), ("9999", "-14:00")):  # in UTC in no year that there is
            assert (reply.status_code, reply.get_json()["code"]) == (400, "invalid_params")
            continue
        shown = [request["req_id"] for request in reply.get_json()["requests"]]
        assert shown == ([id] if (moment < "2020") == (name == "since") else []), (moment, name, zone)


@pytest.mark.parametrize("deadline", ["9999-12-31T23:59:59.999Z", "3.2e9"])
def test_a_deadline_may_be_far_away(
    client: flask.testing.FlaskClient, photos: dict[str, bytes], answer: Callable[..., list[str]], deadline: str
) -> None:
    id = send(client, photos["rocket"], query=f"?deadline={deadline}&keep_seconds=3.2e9")

    assert client.get(f"/readPrediction/{id}").get_json()["status"] == "queued"
    assert answer() == [id]
    assert client.get(f"/requests/{id}").get_json()["status"] == "done"

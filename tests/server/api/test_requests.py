"""Requests through the API: filters, pages, details, the image, delete."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flask.testing
import pytest

from server.settings import ServerSettings
from store.search import Query, _SearchSql
from store.store import Store
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
    ["limit=0", "limit=201", "limit=x", "cursor=x", "cursor=%ff", "state=gone", "since=soon", "more=1", "q=a&q=b"],
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
                              finished_at, digest, output, reason, code, labels, key_id)
        SELECT printf('%032x', value), 'classification', 'm' || (value % 3), 'picture ' || value,
               printf('%064x', value), 1,
               CASE WHEN value % 100 = 7 THEN 'failed' WHEN value % 5 = 0 THEN 'queued' ELSE 'done' END,
               strftime('%Y-%m-%dT%H:%M:%fZ', 1700000000 + value, 'unixepoch'), '2026-11-20T12:00:00.000Z',
               CASE WHEN value % 5 = 0 AND value % 100 != 7 THEN NULL ELSE '2026-11-20T12:00:00.000Z' END, 'd',
               CASE WHEN value % 100 = 7 OR value % 5 = 0 THEN NULL ELSE '[]' END, 'r', 'c',
               CASE WHEN value % 1000 = 1 THEN '{"rare": "yes"}' ELSE '{}' END, 'k' || (value % 7)
        FROM generate
    """
    numbers = (
        "WITH RECURSIVE generate (value) AS (SELECT 1 UNION ALL SELECT value + 1 FROM generate WHERE value < 60000)"
    )

    def write(transaction: Any) -> None:
        transaction.execute(row.replace("INSERT INTO requests", f"{numbers} INSERT INTO requests", 1))
        transaction.execute(
            "INSERT INTO request_labels (name, value, number) SELECT 'rare', 'yes', number FROM requests"
            " WHERE labels != '{}'"
        )

    store.database.write(write)
    yield store
    store.close()


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        (Query(), None),
        (Query(status="queued"), "requests_waiting"),
        (Query(status="failed"), "requests_failed"),
        (Query(status="done"), "requests_done"),
        (Query(status="expired"), "requests_cancelled"),
        (Query(model="m1"), "requests_model"),
        (Query(status="queued", model="m1"), "requests_queued"),
        (Query(status="done", model="m1"), "requests_model"),
        (Query(batch_id="b"), "requests_batch"),
        (Query(key_id="k1"), "requests_key"),
        (Query(key_id="k1", status="failed"), "requests_key"),
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


def test_labels_and_times_use_an_index(crowded: Store) -> None:
    from datetime import UTC, datetime

    rare = crowded.search.find(Query(labels=(("rare", "yes"),)), limit=200)
    early = datetime.fromtimestamp(1_700_000_100, UTC)

    assert (len(rare.requests), rare.next_before) == (60, None)
    assert [row.number for row in crowded.search.find(Query(until=early), limit=200).requests] == list(range(99, 0, -1))

"""The pages of collections as HTML: what they show, and their forms without JavaScript."""

from __future__ import annotations

import functools
import io
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import flask.testing
import pytest

from server.settings import ServerSettings
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.store import Store
from tests.embeddings import answer_embeddings, make_image
from tests.server.pages.test_pages import TagCollector, get_page
from tests.timing import wait_until

Client = flask.testing.FlaskClient
HOLIDAY = "/ui/collections/holiday"


@pytest.fixture
def settings(tmp_path: Path, embedding_models_folder: Path) -> ServerSettings:
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(embedding_models_folder)
    return ServerSettings(home=home, server_threads=4, max_hold_seconds=5)


@pytest.fixture
def embed(store: Store, settings: ServerSettings) -> Callable[[], int]:
    """Answer everything that is queued."""
    return functools.partial(answer_embeddings, store, settings.models)


@pytest.fixture
def holiday(client: Client, embed: Callable[[], int]) -> dict[str, str]:
    """A collection with the shades 0, 10, ... 50 and 51: name of the file -> id of the request."""
    client.post("/ui/collections", data={"name": "holiday"})
    images = [(io.BytesIO(make_image(shade)), f"{shade}.png") for shade in (*range(0, 60, 10), 51)]
    sent = client.post("/collections/holiday/images?label=place:Rome", data={"image": images}).json
    embed()
    return {item["client_id"]: item["req_id"] for item in sent["items"]}


def image_names(page: str) -> list[str]:
    return re.findall(r'<span class="name">([^<]+)</span>', page)


def upload(shade: int, name: str = "query.png") -> dict[str, Any]:
    return {"image": (io.BytesIO(make_image(shade)), name)}


def classify(client: Client, shade: int) -> str:
    id: str = client.post("/requestPrediction/efficientnet_lite0", data=upload(shade)).json["req_id"]
    return id


def test_collection_is_created_filled_and_deleted_without_scripts(client: Client, embed: Callable[[], int]) -> None:
    empty = get_page(client, "/ui/collections")
    created = client.post("/ui/collections", data={"name": "holiday"})
    images = [(io.BytesIO(make_image(shade)), f"{shade}.png") for shade in (1, 2)]
    added = client.post(f"{HOLIDAY}/images", data={"image": images})
    waiting = get_page(client, HOLIDAY)
    embed()
    shown, listed = get_page(client, HOLIDAY), get_page(client, "/ui/collections")
    deleted = client.post(f"{HOLIDAY}/delete")

    assert "No collections yet" in empty
    assert (created.status_code, created.location, added.location) == (303, HOLIDAY, HOLIDAY)
    assert "data-live" in waiting
    assert "waiting for one" in waiting
    assert "data-live" not in shown
    assert image_names(shown) == ["2.png", "1.png"]
    assert "2 images" in listed
    assert deleted.location == "/ui/collections"
    get_page(client, HOLIDAY, 404)


@pytest.mark.parametrize(("name", "reason"), [("holiday", "already"), ("a b", "letters"), ("", "letters")])
def test_name_that_cannot_be_used_is_explained_and_kept(
    client: Client, holiday: dict[str, str], name: str, reason: str
) -> None:
    response = client.post("/ui/collections", data={"name": name})

    assert response.status_code in (400, 409)
    assert reason in response.text
    assert [field["value"] for field in TagCollector(response.text).all("input") if field.get("id") == "name"] == [name]


def test_image_that_is_refused_is_explained(client: Client, holiday: dict[str, str]) -> None:
    images = [(io.BytesIO(make_image(70)), "70.png"), (io.BytesIO(b"Dear kitten"), "letter.png")]

    batch = client.post(f"{HOLIDAY}/images", data={"image": images}).location

    assert "letter.png" in get_page(client, batch)


def test_images_of_a_batch_are_added(client: Client, holiday: dict[str, str], embed: Callable[[], int]) -> None:
    images = [(io.BytesIO(make_image(shade)), f"{shade}.png") for shade in (201, 202)]
    sent = client.post("/requestPredictions/efficientnet_lite0?name=Lake", data={"image": images}).json
    assert "Lake, 2 images" in get_page(client, HOLIDAY)

    added = client.post(f"{HOLIDAY}/batch", data={"batch": sent["batch_id"]})
    unknown = client.post(f"{HOLIDAY}/batch", data={"batch": "none"})
    embed()

    assert added.status_code == 303
    assert image_names(get_page(client, HOLIDAY))[:2] == ["202.png", "201.png"]
    assert unknown.status_code == 404
    assert 'role="alert"' in unknown.text


def test_images_are_shown_page_by_page(
    client: Client, holiday: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.pages.collections._IMAGES_PER_PAGE", 4)

    first = get_page(client, HOLIDAY)
    more = next(link["href"] for link in TagCollector(first).all("a") if link.get("rel") == "next")
    second = get_page(client, more or "")

    assert image_names(first) + image_names(second) == [*reversed(holiday)]


def test_search_by_an_uploaded_image_shows_the_most_similar_ones_with_scores(
    client: Client, holiday: dict[str, str], embed: Callable[[], int]
) -> None:
    thread = threading.Thread(target=lambda: wait_until(embed))
    thread.start()
    found = client.post(f"{HOLIDAY}/search", data=upload(12))
    thread.join()

    assert found.status_code == 303
    page = get_page(client, found.location)
    assert image_names(page)[:3] == ["10.png", "20.png", "0.png"]
    assert "1.000" in page
    assert "0.997" in page
    assert image_names(get_page(client, f"{found.location}&threshold=0.9990")) == ["10.png"]
    assert image_names(get_page(client, f"{found.location}&k=2")) == ["10.png", "20.png"]
    assert len(image_names(get_page(client, f"{found.location}&label=place:Rome"))) == len(holiday)
    assert "No image matches the filter" in get_page(client, f"{found.location}&label=Oslo")
    for field in ("threshold=2", "threshold=x", "k=0"):
        assert 'role="alert"' in get_page(client, f"{found.location}&{field}", 400)


def test_search_whose_vector_takes_longer_waits_on_its_page(
    client: Client,
    settings: ServerSettings,
    holiday: dict[str, str],
    embed: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.pages.collections._WAIT_SECONDS", 0)

    location = client.post(f"{HOLIDAY}/search", data=upload(12)).location
    waiting = get_page(client, location)
    embed()

    assert 'data-live="/events?ids=' in waiting
    assert image_names(get_page(client, location))[0] == "10.png"


def test_search_whose_image_gets_no_vector_says_why(
    client: Client, store: Store, holiday: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.pages.collections._WAIT_SECONDS", 0)
    location = client.post(f"{HOLIDAY}/search", data=upload(12)).location
    store.requests.cancel(location.rpartition("=")[2], now=datetime.now(UTC))

    page = get_page(client, location)

    assert "There is no vector of the image" in page
    assert "data-live" not in page


def test_more_like_this_searches_in_the_newest_collection(
    client: Client, holiday: dict[str, str], embed: Callable[[], int]
) -> None:
    classified = classify(client, 21)
    embed()
    target = f"/ui/requests/{classified}/similar"
    for page in ("/ui/requests", f"/ui/requests/{classified}"):
        assert f'href="{target}"' in get_page(client, page)

    location = client.get(target).location
    asked = get_page(client, location)
    thread = threading.Thread(target=lambda: wait_until(embed))
    thread.start()
    found = client.post(f"{HOLIDAY}/search", data={"image": classified}).location
    thread.join()
    member = client.get(f"/ui/requests/{holiday['20.png']}/similar").location
    client.post("/ui/collections", data={"name": "newer"})
    newer = client.get(target).location

    assert location == f"{HOLIDAY}/search?image={classified}"
    assert "data-find" in asked
    assert image_names(get_page(client, found))[0] == "20.png"
    assert sorted(image_names(get_page(client, member))[:2]) == ["10.png", "30.png"]
    assert newer == f"/ui/collections/newer/search?image={classified}"
    assert f'href="{location}"' in get_page(client, newer)


def test_more_like_this_without_a_collection_offers_to_create_one_with_the_image(
    client: Client, embed: Callable[[], int]
) -> None:
    id = classify(client, 5)
    embed()

    offered = get_page(client, f"/ui/requests/{id}/similar")
    created = client.post("/ui/collections", data={"name": "mine", "image": id})
    embed()

    assert [one["value"] for one in TagCollector(offered).all("input") if one.get("name") == "image"] == [id]
    assert image_names(get_page(client, created.location)) == ["query.png"]


def test_near_duplicates_are_shown_and_one_is_removed(client: Client, holiday: dict[str, str]) -> None:
    shown = get_page(client, f"{HOLIDAY}/duplicates?threshold=0.9999")
    form = next(form for form in TagCollector(shown).all("form") if holiday["51.png"] in (form.get("action") or ""))
    back = next(one["value"] for one in TagCollector(shown).all("input") if one.get("name") == "next")
    removed = client.post(form["action"] or "", data={"next": back})
    again = client.post(form["action"] or "", data={"next": back})
    elsewhere = client.post(f"{HOLIDAY}/images/{holiday['0.png']}/remove", data={"next": "//example.org/"})

    assert image_names(shown) == ["50.png", "51.png"]
    assert removed.location == again.location == f"{HOLIDAY}/duplicates?threshold=0.9999"
    assert "No two images" in get_page(client, removed.location)
    assert elsewhere.location == HOLIDAY
    assert len(image_names(get_page(client, HOLIDAY))) == len(holiday) - 2
    get_page(client, f"/ui/requests/{holiday['51.png']}")  # the request stays


def test_groups_are_looked_through(client: Client, holiday: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.pages.collections._SHOWN_IMAGES", 2)
    monkeypatch.setattr("server.pages.collections._IMAGES_PER_PAGE", 2)

    overview = get_page(client, f"{HOLIDAY}/groups?count=2")
    link = next(one["href"] for one in TagCollector(overview).all("a") if "group=" in (one.get("href") or ""))
    seen: list[str] = []
    while link:
        page = get_page(client, link)
        seen += image_names(page)
        link = next((one["href"] for one in TagCollector(page).all("a") if one.get("rel") == "next"), None)

    assert overview.count('<section class="group"') == 2
    assert len(seen) == len(set(seen)) > 2
    for query in ("count=0", "group=99", "first=x"):
        assert 'role="alert"' in get_page(client, f"{HOLIDAY}/groups?{query}", 400)


def test_empty_collection_says_what_to_do(client: Client) -> None:
    client.post("/ui/collections", data={"name": "holiday"})

    assert "No images yet" in get_page(client, HOLIDAY)
    for name in ("groups", "duplicates"):
        assert "no image with a vector" in get_page(client, f"{HOLIDAY}/{name}")


def test_collections_are_shown_to_their_key_only(
    client: Client, store: Store, settings: ServerSettings, embed: Callable[[], int]
) -> None:
    keys: dict[str, str] = {}
    for name, scopes in (
        ("ann", (Scope.SUBMIT, Scope.READ)),
        ("ben", (Scope.SUBMIT, Scope.READ)),
        ("reader", (Scope.READ,)),
        ("boss", (Scope.OPERATE,)),
    ):
        id, keys[name] = make_key()
        sha256, now = hash_key(keys[name]), datetime.now(UTC)
        store.keys.add(KeyRecord(id=id, name=name, sha256=sha256, scopes=frozenset(scopes), created_at=now))

    def call(who: str, path: str, **data: Any) -> Any:
        headers = {"Authorization": f"Bearer {keys[who]}", "Accept": "text/html"}
        return client.post(path, headers=headers, data=data) if data else client.get(path, headers=headers)

    assert call("ann", "/ui/collections", name="holiday").status_code == 303
    id = store.collections.list()[0].id

    assert call("ann", HOLIDAY).status_code == 200
    for path in (HOLIDAY, f"/ui/collections/{id}", f"{HOLIDAY}/search", f"{HOLIDAY}/groups", f"{HOLIDAY}/duplicates"):
        assert call("ben", path).status_code == 404
    for path in ("delete", "batch", "search", "images/x/remove"):
        assert call("ben", f"/ui/collections/{id}/{path}", image="x", batch="x").status_code == 404
    assert "holiday" not in TagCollector(call("ben", "/ui/collections").text).all("a")
    assert f'href="/ui/collections/{id}"' in call("boss", "/ui/collections").text
    assert "data-add" not in call("boss", f"/ui/collections/{id}").text
    assert call("boss", f"/ui/collections/{id}/batch", batch="x").status_code == 403
    assert "<form class" not in call("reader", "/ui/collections").text
    assert call("reader", "/ui/collections", name="mine").status_code == 403

"""Collections through the API: create, add, search, near-duplicates, groups, remove; of one's own key only."""

from __future__ import annotations

import functools
import io
import json
import threading
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import flask.testing
import numpy as np
import pytest

from server import similarity
from server.app import create_app, get_context
from server.settings import ServerSettings
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.store import Store
from tests.embeddings import DIMENSIONS, MODEL, answer_embeddings, make_image, vector_of
from tests.server.api.test_openapi import check
from tests.timing import wait_until

Client = flask.testing.FlaskClient


@pytest.fixture
def settings(tmp_path: Path, embedding_models_folder: Path) -> ServerSettings:
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(embedding_models_folder)
    return ServerSettings(home=home, server_threads=4)


@pytest.fixture
def embed(store: Store, settings: ServerSettings) -> Callable[..., int]:
    """Answer everything that is queued, as a batcher would; the vector of an image follows from its pixel."""
    return functools.partial(answer_embeddings, store, settings.models)


def add(client: Client, *shades: int, name: str = "holiday", query: str = "", **more: Any) -> Any:
    images = [(io.BytesIO(make_image(shade)), f"{shade}.png") for shade in shades]
    return client.post(f"/collections/{name}/images{query}", data={"image": images}, **more)


@pytest.fixture
def holiday(client: Client, embed: Callable[..., int]) -> dict[str, str]:
    """A collection with the shades 0, 10, 20, ... 90: name of the file -> id of the request."""
    client.post("/collections", json={"name": "holiday"})
    sent = add(client, *range(0, 100, 10), query="?label=place:Rome").json
    embed()
    return {item["client_id"]: item["req_id"] for item in sent["items"]}


def names(found: Any) -> list[str]:
    return [match["name"] for match in found.json["matches"]]


def search(client: Client, query: str = "", **body: Any) -> Any:
    return client.post(f"/collections/holiday/search{query}", **body)


def form(shade: int) -> dict[str, Any]:
    return {"image": (io.BytesIO(make_image(shade)), "query.png")}


def test_collection_is_created_filled_and_shown(client: Client, embed: Callable[..., int]) -> None:
    created = client.post("/collections", json={"name": "holiday", "model": MODEL.upper()})
    empty = search(client, "?wait=0", data=form(3))
    embed()
    sent = add(client, 1, 2, query="?label=place:Rome")
    waiting = client.get("/collections/holiday").json
    embed()
    shown = client.get("/collections/holiday").json
    listed = client.get("/collections").json
    images = client.get("/collections/holiday/images?limit=1").json
    more = client.get(f"/collections/holiday/images?cursor={images['next']}").json

    assert (created.status_code, created.headers["Location"]) == (201, "/collections/holiday")
    assert (sent.status_code, sent.json["accepted"]) == (202, 2)
    assert empty.status_code == 202
    assert waiting["counts"] == {"ready": 0, "pending": 2, "failed": 0}
    assert shown["counts"] == {"ready": 2, "pending": 0, "failed": 0}
    assert (shown["dimensions"], shown["model"], shown["recall"]) == (DIMENSIONS, MODEL, None)
    assert [image["name"] for page in (images, more) for image in page["images"]] == ["2.png", "1.png"]
    assert images["images"][0]["labels"] == {"place": "Rome"}
    for answer, schema in (
        (created.json, "Collection"),
        (shown, "Collection"),
        (listed, "Collections"),
        (sent.json, "CollectionAdded"),
        (images, "Members"),
        (empty.json, "Submitted"),
    ):
        check(answer, schema)


def test_zip_adds_images_and_refuses_what_is_none(client: Client, holiday: dict[str, str]) -> None:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        archive.writestr("a.png", make_image(500))
        archive.writestr("letter.txt", "Dear kitten")

    sent = client.post("/collections/holiday/images", data=body.getvalue(), content_type="application/zip").json

    assert (sent["accepted"], sent["refused"]) == (1, 1)
    assert client.get("/collections/holiday").json["counts"]["pending"] == 1


def test_search_by_image_waits_for_its_vector_in_the_queue(
    client: Client, holiday: dict[str, str], embed: Callable[..., int]
) -> None:
    thread = threading.Thread(target=lambda: wait_until(embed))
    thread.start()

    found = search(client, "?k=3", data=form(33))
    thread.join()
    at_once = search(client, "?k=3&wait=0", data=form(33))

    assert found.status_code == 200
    assert names(found) == names(at_once) == ["30.png", "40.png", "20.png"]
    assert found.json["matches"][0]["score"] == pytest.approx(np.cos(0.03), abs=1e-5)
    check(found.json, "Matches")


def test_search_that_is_not_ready_in_time_goes_on_by_its_id(
    client: Client, holiday: dict[str, str], embed: Callable[..., int]
) -> None:
    early = search(client, "?wait=0", data=form(77))
    still = search(client, "?wait=0", json={"req_id": early.json["req_id"]})
    embed()
    later = search(client, "?k=1", json={"req_id": early.json["req_id"]})

    assert (early.status_code, early.json["status"], still.status_code) == (202, "queued", 202)
    assert early.json["status_url"] == early.headers["Location"] == f"/readPrediction/{early.json['req_id']}"
    assert names(later) == ["80.png"]


def test_search_by_a_member_leaves_it_out(client: Client, holiday: dict[str, str]) -> None:
    found = search(client, "?k=2", json={"req_id": holiday["50.png"]})

    assert sorted(names(found)) == ["40.png", "60.png"]
    assert len(names(search(client, "?k=100", json={"req_id": holiday["50.png"]}))) == 9


def test_search_by_a_request_for_another_model_computes_its_vector(
    client: Client, holiday: dict[str, str], embed: Callable[..., int]
) -> None:
    other = client.post("/requestPrediction/efficientnet_lite0", data=form(44)).json["req_id"]
    waiting = search(client, "?wait=0", json={"req_id": other})
    embed()

    found = search(client, "?k=1", json={"req_id": other})

    assert (waiting.status_code, waiting.json["model"]) == (202, MODEL)
    assert names(found) == ["40.png"]


def test_search_by_a_vector_in_json_or_bytes(client: Client, holiday: dict[str, str]) -> None:
    vector = 5 * vector_of(21)

    by_json = search(client, "?k=2", json={"vector": vector.tolist()})
    by_bytes = search(client, "?k=2", data=vector.tobytes(), content_type="application/octet-stream")

    assert names(by_json) == names(by_bytes) == ["20.png", "30.png"]
    assert by_json.json["req_id"] is None


def test_threshold_and_labels_limit_what_is_found(
    client: Client, holiday: dict[str, str], embed: Callable[..., int]
) -> None:
    add(client, 55, query="?label=place:Oslo")
    client.post("/requestPrediction/efficientnet_lite0", data=form(60))
    embed()
    vector = {"vector": vector_of(55).tolist()}

    assert set(names(search(client, "?threshold=0.995", json=vector))) == {"50.png", "55.png", "60.png"}
    assert names(search(client, "?label=place:Oslo", json=vector)) == ["55.png"]
    assert names(search(client, "?label=Oslo", json=vector)) == ["55.png"]
    assert names(search(client, "?" + "label=Oslo&" * 4, json=vector)) == ["55.png"]
    assert search(client, "?" + "label=Oslo&" * 5, json=vector).status_code == 400
    assert names(search(client, "?label=shade_60", json=vector)) == ["60.png"]
    assert names(search(client, "?label=shade_60&label=place:Rome", json=vector)) == ["60.png"]
    assert names(search(client, "?label=shade_60&label=place:Oslo", json=vector)) == []


#: Searches that cannot be used: query, body and the code of the error.
UNUSABLE_SEARCHES: list[tuple[str, dict[str, Any], str]] = [
    ("?k=0", {"json": {"vector": [1.0] * DIMENSIONS}}, "invalid_params"),
    ("?k=1001", {"json": {"vector": [1.0] * DIMENSIONS}}, "invalid_params"),
    ("?threshold=nan", {"json": {"vector": [1.0] * DIMENSIONS}}, "invalid_params"),
    ("?top=3", {"json": {"vector": [1.0] * DIMENSIONS}}, "invalid_params"),
    (f"?{'label=a&' * 17}k=1", {"json": {"vector": [1.0] * DIMENSIONS}}, "invalid_params"),
    ("", {"json": {"vector": [1.0]}}, "malformed_request"),
    ("", {"json": {"vector": [0.0] * DIMENSIONS}}, "malformed_request"),
    ("", {"json": {"vector": ["1"] * DIMENSIONS}}, "malformed_request"),
    ("", {"json": {"vector": [10**400] * DIMENSIONS}}, "malformed_request"),
    ("", {"json": {"vector": [1e300] * DIMENSIONS}}, "malformed_request"),
    ("", {"data": b'{"vector": [NaN]}', "content_type": "application/json"}, "malformed_request"),
    ("", {"json": {"vector": [1.0] * DIMENSIONS, "req_id": "x"}}, "malformed_request"),
    ("", {"json": {}}, "malformed_request"),
    ("", {"json": []}, "malformed_request"),
    ("", {"json": {"req_id": "unknown"}}, "unknown_request"),
    ("", {"data": b"abc", "content_type": "application/octet-stream"}, "malformed_request"),
    ("", {"data": b"Dear kitten", "content_type": "image/jpeg"}, "not_an_image"),
    ("", {"data": b"Dear kitten", "content_type": "text/plain"}, "unsupported_media_type"),
]


def test_search_that_cannot_be_used_says_why(client: Client, holiday: dict[str, str]) -> None:
    for query, body, code in UNUSABLE_SEARCHES:
        reply = search(client, query, **body)

        assert reply.json["code"] == code, (query, body, reply.json)
        check(reply.json, "Error")


def test_search_in_an_empty_collection_by_a_vector_says_that_it_is_empty(client: Client) -> None:
    client.post("/collections", json={"name": "holiday"})

    assert search(client, json={"vector": [1.0]}).json["code"] == "not_embedded"
    assert client.get("/collections/holiday/duplicates").json["groups"] == []
    assert client.get("/collections/holiday/groups").json["groups"] == []


def test_image_that_has_no_vector_and_a_model_that_changed_are_told(
    client: Client, store: Store, holiday: dict[str, str], embed: Callable[..., int]
) -> None:
    id = search(client, "?wait=0", data=form(3)).json["req_id"]
    client.delete(f"/requests/{id}")
    changed = search(client, "?wait=0", data=form(4)).json["req_id"]
    embed(digest="e" * 64)

    assert search(client, json={"req_id": id}).json["code"] == "not_embedded"
    reply = search(client, json={"req_id": changed})
    assert (reply.status_code, reply.json["code"]) == (409, "model_changed")


def test_requests_that_are_there_are_added(
    client: Client, store: Store, holiday: dict[str, str], embed: Callable[..., int]
) -> None:
    classified = client.post("/requestPrediction/efficientnet_lite0", data=form(201)).json["req_id"]
    embedded = client.post(f"/requestPrediction/{MODEL}", data=form(202)).json["req_id"]
    gone = client.post("/requestPrediction/efficientnet_lite0", data=form(203)).json["req_id"]
    embed()
    store.database.execute("UPDATE requests SET image_deleted_at = created_at WHERE id = ?", (gone,))

    sent = client.post(
        "/collections/holiday/images?label=place:Oslo",
        json={"req_ids": [classified, embedded, "unknown", gone, classified, holiday["0.png"]]},
    ).json
    embed()

    assert [item["status"] for item in sent["items"]] == ["queued", "done", "refused", "refused", "done"]
    assert [item["position"] for item in sent["items"]] == [0, 1, 2, 3, 4]
    assert (sent["accepted"], sent["refused"]) == (3, 2)
    found = search(client, "?k=2", json={"vector": vector_of(201).tolist()})
    assert [(match["score"] > 0.999, match["labels"]["place"]) for match in found.json["matches"]] == [
        (True, "Oslo"),
        (True, "Oslo"),
    ]
    check(sent, "CollectionAdded")


def test_batch_that_is_there_is_added(client: Client, holiday: dict[str, str], embed: Callable[..., int]) -> None:
    images = [(io.BytesIO(make_image(shade)), f"{shade}.png") for shade in (301, 302)]
    batch = client.post(f"/requestPredictions/{MODEL}", data={"image": images}).json["batch_id"]

    sent = client.post("/collections/holiday/images", json={"batch_id": batch}).json
    embed()

    assert (sent["accepted"], sent["batch_id"]) == (2, None)
    assert client.get("/collections/holiday").json["counts"]["ready"] == 12


def test_ids_that_are_none_are_refused(client: Client, holiday: dict[str, str]) -> None:
    bodies: list[Any] = [{}, {"req_ids": []}, {"req_ids": "x"}, {"req_ids": [1]}, {"batch_id": 1}]
    for body in [*bodies, {"req_ids": ["a"], "batch_id": "b"}]:
        reply = client.post("/collections/holiday/images", json=body)

        assert (reply.status_code, reply.json["code"]) == (400, "malformed_request"), body


def test_member_request_and_collection_are_removed(client: Client, holiday: dict[str, str]) -> None:
    removed = client.delete(f"/collections/holiday/images/{holiday['0.png']}")
    again = client.delete(f"/collections/holiday/images/{holiday['0.png']}")
    client.post(f"/requests/{holiday['10.png']}/delete")
    left = names(search(client, "?k=100", json={"vector": vector_of(0).tolist()}))
    deleted = client.delete("/collections/holiday")

    assert (removed.status_code, again.status_code, again.json["code"]) == (200, 404, "unknown_member")
    assert left == [f"{shade}.png" for shade in range(20, 100, 10)]
    assert deleted.status_code == 200
    assert client.get("/collections/holiday").json["code"] == "unknown_collection"
    assert client.get(f"/readPrediction/{holiday['20.png']}").json["status"] == "done"


def test_near_duplicates_and_groups(client: Client, holiday: dict[str, str], embed: Callable[..., int]) -> None:
    add(client, 1, 2, 51)
    embed()

    duplicates = client.get("/collections/holiday/duplicates?threshold=0.9998").json
    chained = client.get("/collections/holiday/duplicates?threshold=0.99&images=2").json
    groups = client.get("/collections/holiday/groups?count=3").json

    shown = [[image["name"] for image in group["images"]] for group in duplicates["groups"]]
    assert shown == [["0.png", "1.png", "2.png"], ["50.png", "51.png"]]
    assert [(group["size"], len(group["images"]), group["label"]) for group in chained["groups"]] == [(13, 2, "Rome")]
    assert sum(group["size"] for group in groups["groups"]) == 13
    assert (groups["total"], len(groups["groups"])) == (3, 3)
    for answer in (duplicates, chained, groups):
        check(answer, "Groups")


def test_parameters_of_groups_are_checked(client: Client, holiday: dict[str, str]) -> None:
    for query in ("duplicates?threshold=2", "duplicates?count=1", "groups?count=0", "groups?images=x"):
        assert client.get(f"/collections/holiday/{query}").json["code"] == "invalid_params", query


def test_collection_that_cannot_be_created_says_why(client: Client) -> None:
    client.post("/collections", json={"name": "holiday"})
    cases: list[tuple[Any, int, str]] = [
        ({"name": "a/b"}, 400, "invalid_params"),
        ({"name": 3}, 400, "invalid_params"),
        ({}, 400, "invalid_params"),
        ({"name": "x", "colour": "red"}, 400, "invalid_params"),
        ({"name": "x", "model": "efficientnet_lite0"}, 400, "invalid_params"),
        ({"name": "x", "model": "unknown"}, 404, "unknown_model"),
        ({"name": "holiday"}, 409, "collection_exists"),
    ]

    for body, status, code in cases:
        reply = client.post("/collections", json=body)

        assert (reply.status_code, reply.json["code"]) == (status, code), body


def test_one_key_sees_nothing_of_another(settings: ServerSettings, store: Store, embed: Callable[..., int]) -> None:
    headers = {}
    for name, scopes in (("alice", None), ("bob", None), ("admin", frozenset({Scope.OPERATE}))):
        id, key = make_key()
        scopes = scopes or frozenset({Scope.SUBMIT, Scope.READ})
        store.keys.add(KeyRecord(id=id, name=name, sha256=hash_key(key), scopes=scopes, created_at=datetime.now(UTC)))
        headers[name] = {"Authorization": f"Bearer {key}"}
    client = create_app(settings, store).test_client()
    alice, bob, admin = (headers[name] for name in ("alice", "bob", "admin"))
    created = client.post("/collections", json={"name": "holiday"}, headers=alice).json
    sent = add(client, 1, headers=alice).json
    embed()
    id = sent["items"][0]["req_id"]

    for path in ("holiday", created["id"]):
        calls: list[tuple[str, str, dict[str, Any]]] = [
            ("GET", "", {}),
            ("DELETE", "", {}),
            ("GET", "/images", {}),
            ("POST", "/images", {"json": {"req_ids": [id]}}),
            ("DELETE", f"/images/{id}", {}),
            ("POST", "/search", {"json": {"vector": [1.0] * DIMENSIONS}}),
            ("GET", "/duplicates", {}),
            ("GET", "/groups", {}),
        ]
        for method, more, body in calls:
            reply = client.open(f"/collections/{path}{more}", method=method, headers=bob, **body)
            assert (reply.status_code, reply.json["code"]) == (404, "unknown_collection"), (method, more)
    assert client.get("/collections", headers=bob).json["collections"] == []
    client.post("/collections", json={"name": "holiday"}, headers=bob)
    stolen = client.post("/collections/holiday/images", json={"req_ids": [id]}, headers=bob).json
    assert [item["code"] for item in stolen["items"]] == ["unknown_request"]
    assert client.post("/collections/holiday/search", json={"req_id": id}, headers=bob).status_code == 404
    shown = client.get(f"/collections/{created['id']}", headers=admin).json
    assert shown["counts"]["ready"] == 1
    foreign = client.post(f"/collections/{created['id']}/images", json={"req_ids": [id]}, headers=admin)
    assert foreign.status_code == 403
    assert len(client.get("/collections", headers=admin).json["collections"]) == 2


def test_repeated_call_with_an_idempotency_key_is_done_once(client: Client, holiday: dict[str, str]) -> None:
    key = {"Idempotency-Key": "one"}

    first = client.post("/collections", json={"name": "other"}, headers=key)
    second = client.post("/collections", json={"name": "other"}, headers=key)
    other = client.post("/collections/holiday/images", json={"batch_id": "x"}, headers=key)

    assert (first.status_code, second.status_code, first.json) == (201, 201, second.json)
    assert (other.status_code, other.json["code"]) == (422, "key_reused")


def test_what_a_search_finds_is_not_kept_under_its_idempotency_key(
    client: Client, store: Store, holiday: dict[str, str], embed: Callable[..., int]
) -> None:
    key = {"Idempotency-Key": "one"}
    search(client, "?wait=0", data=form(33))
    embed()

    found = client.post("/collections/holiday/search?k=1", data=form(33), headers=key)
    again = client.post("/collections/holiday/search?k=1", data=form(33), headers=key)
    by_vector = search(client, json={"vector": vector_of(21).tolist()}, headers={"Idempotency-Key": "two"})
    later = search(client, "?k=1", json={"req_id": again.json["req_id"]})
    client.post(f"/requests/{found.json['req_id']}/delete")

    assert names(found) == ["30.png"]
    assert (again.status_code, again.json["req_id"]) == (202, found.json["req_id"])
    assert names(later) == ["30.png"]
    assert len(by_vector.json["matches"]) == 10
    assert store.database.rows("SELECT * FROM idempotency") == []


def test_collection_that_is_far_behind_is_made_ready_in_the_background(
    client: Client, holiday: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "_MAX_BEHIND", 3)
    vector = {"vector": vector_of(0).tolist()}

    early = search(client, json=vector)

    assert (early.status_code, early.json["code"], early.headers["Retry-After"]) == (503, "index_behind", "3")
    assert len(names(wait_until(lambda: (reply := search(client, json=vector)).status_code == 200 and reply))) == 10


def test_searches_at_once_are_limited(client: Client, holiday: dict[str, str]) -> None:
    context = get_context(client.application)
    slots = context.similarity._slots
    while slots.acquire("others"):
        pass
    while slots.acquire(None):
        pass

    reply = search(client, json={"vector": vector_of(0).tolist()})

    assert (reply.status_code, reply.json["code"]) == (503, "search_busy")


def test_body_of_ids_is_limited(client: Client, holiday: dict[str, str]) -> None:
    body = json.dumps({"req_ids": ["x" * 32] * 40_000})

    reply = client.post("/collections/holiday/images", data=body, content_type="application/json")

    assert reply.status_code == 413

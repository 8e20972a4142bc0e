"""Trainings through the API: what is accepted, what is refused, whose they are, files, versions."""

from __future__ import annotations

import functools
import io
import struct
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import flask.testing
import pytest

from server.settings import ServerSettings
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.files import NewFile
from store.requests import Answer
from store.store import Store
from store.trainings.files import INPUT
from store.trainings.records import TrainingRecord
from tests.provider_image.compiler.test_versions import install_version
from tests.server.api.test_batch_views import make_image

EMBEDDING = "efficientnet_lite0_embedding"


def zipped(*entries: tuple[str, bytes], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


def two_classes(*more: tuple[str, bytes], count: int = 5) -> bytes:
    """A zip with a folder for each of two classes."""
    images = [(f"{label}/{n}.png", make_image(100 * i + n)) for i, label in enumerate("ab") for n in range(count)]
    return zipped(*images, *more)


def send(client: flask.testing.FlaskClient, body: bytes, url: str = "/train/pets", **options: Any) -> Any:
    return client.post(url, data=body, content_type="application/zip", **options)


@pytest.fixture
def new_key(store: Store) -> Callable[..., dict[str, str]]:
    """Make a key and return the header with it."""

    def new(name: str, *scopes: Scope) -> dict[str, str]:
        id, key = make_key()
        scopes = scopes or (Scope.TRAIN, Scope.READ)
        record = KeyRecord(
            id=id, name=name, sha256=hash_key(key), scopes=frozenset(scopes), created_at=datetime.now(UTC)
        )
        store.keys.add(record)
        return {"Authorization": f"Bearer {key}"}

    return new


def finish(store: Store, id: str, files: dict[str, tuple[str, bytes]] | None = None) -> TrainingRecord:
    """End a training as the trainer does."""
    now = datetime.now(UTC)
    batch_id = store.trainings.get(id).batch_id
    assert batch_id is not None
    store.batches.cancel(batch_id, now=now)
    claimed = store.trainings.claim(id, now=now)
    assert claimed is not None
    for name, (_, data) in (files or {}).items():
        store.trainings.files.write(id, name, data)
    kinds = {name: kind for name, (kind, _) in (files or {}).items()}
    figures = {"kind": "classification", "count": 2, "accuracy": 0.5, "accuracy_low": 0.1, "accuracy_high": 0.9}
    assert store.trainings.finish(claimed, digest="d" * 64, figures={**figures, "mistakes": []}, files=kinds, now=now)
    return store.trainings.get(id)


def test_a_zip_becomes_requests_for_features_and_a_training(client: flask.testing.FlaskClient, store: Store) -> None:
    reply = send(client, two_classes(("a/broken.png", b"no image"), ("readme.txt", b"hello")), "/train/pets?seed=7")

    body = reply.get_json()
    assert (reply.status_code, body["accepted"], body["refused"]) == (202, 10, 2)
    assert {item["client_id"] for item in body["items"]} == {"a/broken.png", "readme.txt"}
    assert reply.headers["Location"] == body["status_url"] == f"/trainings/{body['training_id']}"
    batch = store.batches.get(body["batch_id"])
    assert (batch.model, batch.total, batch.name) == (EMBEDDING, 10, "Training of pets")
    examples = store.trainings.examples(body["training_id"])
    assert [(one.name, one.label) for one in examples] == [(f"{c}/{n}.png", c) for c in "ab" for n in range(5)]
    assert [one.request_id for one in examples] == [request.id for request in store.batches.items(batch.id)]
    shown = client.get(body["status_url"]).get_json()
    assert (shown["name"], shown["state"], shown["seed"]) == ("pets", "waiting_for_features", 7)
    assert (shown["features"]["queued"], shown["examples"]) == (10, 10)
    assert "no batcher is running" in shown["waiting_for"]
    listed = client.get("/trainings").get_json()
    assert [one["training_id"] for one in listed["trainings"]] == [body["training_id"]]


def test_a_form_has_the_zip_as_a_file(client: flask.testing.FlaskClient) -> None:
    reply = client.post("/train/pets", data={"archive": (io.BytesIO(two_classes()), "pets.zip")})
    other = client.post("/train/pets", data={"image": (io.BytesIO(two_classes()), "pets.zip")})

    assert (reply.status_code, reply.get_json()["accepted"]) == (202, 10)
    assert (other.status_code, other.get_json()["code"]) == (400, "malformed_request")


def test_numbers_come_from_a_table_in_the_zip(client: flask.testing.FlaskClient, store: Store) -> None:
    images = [(f"{n}.png", make_image(n)) for n in range(10)]
    table = "image,score\n" + "".join(f"{n}.png,{n / 2}\n" for n in range(10))

    reply = send(client, zipped(("scores.csv", table.encode()), *images), "/train/beauty?target=score")

    assert reply.status_code == 202, reply.get_json()
    examples = store.trainings.examples(reply.get_json()["training_id"])
    assert [(one.name, one.target, one.label) for one in examples] == [(f"{n}.png", n / 2, None) for n in range(10)]
    assert client.get(reply.get_json()["status_url"]).get_json()["target"] == "score"


@pytest.mark.parametrize(
    ("url", "status", "word"),
    [
        ("/train/densenet121", 409, "catalogue"),
        ("/train/Pets", 400, "letters a to z"),
        ("/train/a.b", 400, "letters a to z"),
        ("/train/pets_embedding", 400, "_embedding"),
        ("/train/pets?seed=-1", 400, "seed takes"),
        ("/train/pets?seed=99999999999", 400, "seed takes"),
        ("/train/pets?target=a&label=b", 400, "either"),
        ("/train/pets?target=%00", 400, "column"),
        ("/train/pets?colour=red", 400, "colour"),
        ("/train/pets?backbone=nothing", 404, "nothing_embedding"),
    ],
)
def test_a_name_or_an_option_that_cannot_be_used_is_refused(
    client: flask.testing.FlaskClient,
    stored_state: Callable[[], tuple[list[str], int]],
    url: str,
    status: int,
    word: str,
) -> None:
    before = stored_state()

    reply = send(client, two_classes(), url)

    assert (reply.status_code, word in reply.get_json()["reason"]) == (status, True), reply.get_json()
    assert stored_state() == before


@functools.cache
def many_entries() -> bytes:
    """A zip with more entries than are read."""
    return zipped(*((f"a/{n}", b"") for n in range(20_500)))


def says_three_entries(body: bytes) -> bytes:
    changed = bytearray(body)
    struct.pack_into("<HH", changed, changed.rfind(b"PK\x05\x06") + 8, 3, 3)
    return bytes(changed)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "no zip": lambda: b"not a zip at all",
    "cut short": lambda: two_classes()[:-30],
    "one class": lambda: zipped(*((f"a/{n}.png", make_image(n)) for n in range(5))),
    "too few": lambda: two_classes(count=4),
    "names that lead out": lambda: zipped(*((f"../{c}/{n}.png", make_image(n)) for c in "ab" for n in range(5))),
    "absolute names": lambda: zipped(*((f"/{c}/{n}.png", make_image(n)) for c in "ab" for n in range(5))),
    "no images": lambda: zipped(*((f"{c}/{n}.png", b"x") for c in "ab" for n in range(5))),
    "too many entries": many_entries,
    "more entries than it says": lambda: says_three_entries(many_entries()),
    "zeros": lambda: zipped(("a/0.png", bytes(40 * 2**20)), compression=zipfile.ZIP_DEFLATED),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_or_useless_zip_is_refused_and_leaves_nothing(
    client: flask.testing.FlaskClient,
    settings: ServerSettings,
    stored_state: Callable[[], tuple[list[str], int]],
    what: str,
) -> None:
    before = stored_state()

    reply = send(client, HOSTILE[what]())

    assert reply.status_code in (400, 413), reply.get_json()
    assert reply.get_json()["code"] in ("malformed_request", "unusable_examples", "too_many_items")
    assert stored_state() == before
    assert list((settings.home / "trainings").glob("*")) == []
    assert client.get("/trainings").get_json()["trainings"] == []


TABLE = b"colour,size,kind\n" + b"".join(b"red,%d,a\nblue,%d,b\n" % (n, n) for n in range(10))


def send_table(client: flask.testing.FlaskClient, query: str, body: bytes = TABLE) -> Any:
    return client.post(f"/train/fruit?{query}", data=body, content_type="text/csv")


def test_a_table_and_texts_are_kept_for_the_trainer(client: flask.testing.FlaskClient, store: Store) -> None:
    table, texts = send_table(client, "target=kind&seed=3"), send_table(client, "target=kind&text=colour")

    for reply, kind, options in ((table, "table", {}), (texts, "text", {"text": "colour"})):
        body = reply.get_json()
        assert (reply.status_code, body["accepted"], body["batch_id"]) == (202, 20, None)
        shown = client.get(body["status_url"]).get_json()
        assert (shown["kind"], shown["target"], shown.get("options", {})) == (kind, "kind", options)
        assert store.trainings.files.read(body["training_id"], INPUT) == TABLE
    assert store.trainings.find_ready() == table.get_json()["training_id"]


@pytest.mark.parametrize(
    ("query", "body", "word"),
    [
        ("", TABLE, "target"),
        ("target=shape", TABLE, "shape"),
        ("target=kind&text=shape", TABLE, "shape"),
        ("target=kind&segmenter=jieba", TABLE, "segmenter"),
        ("target=kind", b"a,kind\n1,2,3\n", "Line 2"),
        ("target=kind", b"a,kind\n\xff\xfe,3\n", "UTF-8"),
        ("target=kind", b"", "no body"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_and_leaves_nothing(
    client: flask.testing.FlaskClient, settings: ServerSettings, query: str, body: bytes, word: str
) -> None:
    reply = send_table(client, query, body)

    assert (reply.status_code, word in reply.get_json()["reason"]) == (400, True), reply.get_json()
    assert list((settings.home / "trainings").glob("*")) == []
    assert client.get("/trainings").get_json()["trainings"] == []


def test_a_training_is_its_keys_own(
    client: flask.testing.FlaskClient, new_key: Callable[..., dict[str, str]], store: Store
) -> None:
    alice, bob, operator = new_key("alice"), new_key("bob"), new_key("operator", Scope.OPERATE)
    sent = send(client, two_classes(), headers=alice).get_json()
    url = sent["status_url"]
    finish(store, sent["training_id"], {"answers.csv": ("text/csv", b"name\n")})

    refused = send(client, two_classes(), headers=bob)

    assert (refused.status_code, refused.get_json()["code"]) == (409, "name_taken")
    for method, path in (
        ("GET", url),
        ("GET", f"{url}/files/answers.csv"),
        ("POST", f"{url}/cancel"),
        ("DELETE", url),
        ("POST", "/models/pets/versions/1/use"),
    ):
        assert client.open(path, method=method, headers=bob).status_code == 404, path
    assert client.get("/trainings", headers=bob).get_json()["trainings"] == []
    assert client.get("/models/pets/versions", headers=bob).get_json()["versions"] == []
    assert [one["version"] for one in client.get("/models/pets/versions", headers=alice).get_json()["versions"]] == [1]
    assert client.get(url, headers=operator).status_code == 200
    assert send(client, two_classes(), headers=alice).status_code == 202


def test_training_needs_its_scope(client: flask.testing.FlaskClient, new_key: Callable[..., dict[str, str]]) -> None:
    reply = send(client, two_classes(), headers=new_key("carol", Scope.SUBMIT, Scope.READ))

    assert (reply.status_code, reply.get_json()["code"]) == (403, "scope_missing")


def test_cancelling_a_training_cancels_the_requests_for_its_features(client: flask.testing.FlaskClient) -> None:
    sent = send(client, two_classes()).get_json()

    early = client.delete(sent["status_url"])
    cancelled = client.post(f"{sent['status_url']}/cancel")
    again = client.post(f"{sent['status_url']}/cancel")
    removed = client.delete(sent["status_url"])

    assert (early.status_code, early.get_json()["code"]) == (409, "training_in_progress")
    body = cancelled.get_json()
    assert (body["state"], body["features"]["cancelled"]) == ("cancelled", 10)
    assert (again.status_code, again.get_json()["code"]) == (409, "training_ended")
    assert removed.status_code == 200
    assert client.get(sent["status_url"]).get_json()["code"] == "unknown_training"


def test_a_training_that_is_sent_twice_under_a_key_begins_once(client: flask.testing.FlaskClient) -> None:
    headers = {"Idempotency-Key": "first"}

    replies = [send(client, two_classes(), headers=headers) for _ in range(2)]

    assert replies[0].get_json()["training_id"] == replies[1].get_json()["training_id"]
    assert len(client.get("/trainings").get_json()["trainings"]) == 1


def test_the_files_of_a_training_are_safe_to_open(client: flask.testing.FlaskClient, store: Store) -> None:
    sent = send(client, two_classes()).get_json()
    files = {"answers.csv": ("text/csv", b"name,true\n=1+1,a\n"), "confusion.png": ("image/png", make_image(1))}
    finish(store, sent["training_id"], files)

    table, image = (client.get(f"{sent['status_url']}/files/{name}") for name in files)
    unknown = client.get(f"{sent['status_url']}/files/input.csv")

    assert (table.mimetype, table.data) == ("text/csv", b"name,true\n'=1+1,a\n")
    assert (image.mimetype, image.data) == ("image/png", make_image(1))
    assert (unknown.status_code, unknown.get_json()["code"]) == (404, "unknown_file")


def test_a_model_that_was_not_trained_is_not_replaced(
    client: flask.testing.FlaskClient, settings: ServerSettings
) -> None:
    models = settings.models.resolve()
    (models / "my_own").mkdir(exist_ok=True)
    try:
        reply = send(client, two_classes(), "/train/my_own")
    finally:
        (models / "my_own").rmdir()

    assert (reply.status_code, reply.get_json()["code"]) == (409, "name_taken")


def test_a_version_that_is_not_kept_cannot_be_used(client: flask.testing.FlaskClient, store: Store) -> None:
    sent = send(client, two_classes()).get_json()
    finish(store, sent["training_id"])

    for version in ("1", "2", "x"):
        reply = client.post(f"/models/pets/versions/{version}/use")
        assert (reply.status_code, reply.get_json()["code"]) == (404, "unknown_version")


def test_deleting_the_last_training_of_a_name_deletes_the_model(
    client: flask.testing.FlaskClient, store: Store, settings: ServerSettings
) -> None:
    models = settings.models
    settings.models.unlink()  # of all tests
    models.mkdir()
    urls = []
    for content in (b"first", b"second"):
        url = send_table(client, "target=kind").get_json()["status_url"]
        digest = install_version(models, content, name="fruit").digest
        claimed = store.trainings.claim(url.rpartition("/")[2], now=datetime.now(UTC))
        assert claimed is not None
        assert store.trainings.finish(claimed, digest=digest, figures={}, files={}, now=datetime.now(UTC))
        urls.append(url)

    used = client.delete(urls[1])
    earlier = client.delete(urls[0])
    still_there = (models / "fruit").is_dir()
    last = client.delete(urls[1])

    assert (used.status_code, used.get_json()["code"]) == (409, "version_in_use")
    assert (earlier.status_code, still_there, last.status_code) == (200, True, 200)
    assert not (models / "fruit").exists() and not (models / ".versions" / "fruit").exists()
    assert client.get("/trainings").get_json()["trainings"] == []


def add_collection(client: flask.testing.FlaskClient, store: Store) -> None:
    """A collection of five images in each of two places, and one without a label, with vectors."""
    assert client.post("/collections", json={"name": "holiday"}).status_code in (200, 201)
    for place, query in enumerate(("?label=place:Rome", "?label=place:Oslo", "")):
        images = [(io.BytesIO(make_image(100 * place + n)), f"{n}.png") for n in range(5 if query else 1)]
        assert client.post(f"/collections/holiday/images{query}", data={"image": images}).status_code == 202
    now = datetime.now(UTC)
    claims = store.requests.claim(
        models=[EMBEDDING], limit=100, now=now, lease_ends_at=now + timedelta(seconds=30), oldest_before=None
    )
    answers = []
    for number, claim in enumerate(claims):
        vector = NewFile(
            data=struct.pack("<16f", *(float(place == number) for place in range(16))),
            media_type="application/octet-stream",
        )
        facts = {"digest": "d" * 64, "chunk_id": "c", "provider": "local", "seconds": 0.01}
        answers.append(Answer(claim=claim, output={"dimensions": 16}, files={"vector": vector}, **facts))
    store.requests.finish(answers, now=now)


def test_the_images_of_a_collection_are_examples_by_their_label(
    client: flask.testing.FlaskClient, store: Store
) -> None:
    add_collection(client, store)

    reply = client.post("/train/places?collection=holiday&label=place", headers={"Idempotency-Key": "one"})
    again = client.post("/train/places?collection=holiday&label=place", headers={"Idempotency-Key": "one"})
    both = send(client, two_classes(), "/train/other?collection=holiday")
    unlabelled = client.post("/train/other?collection=holiday&label=colour")
    unknown = client.post("/train/other?collection=nothing")

    assert (reply.status_code, reply.get_json()["accepted"]) == (202, 10), reply.get_json()
    assert again.get_json()["training_id"] == reply.get_json()["training_id"]
    examples = store.trainings.examples(reply.get_json()["training_id"])
    assert sorted(one.label or "" for one in examples) == ["Oslo"] * 5 + ["Rome"] * 5
    assert all(store.requests.get(one.request_id).files["vector"].size_bytes == 64 for one in examples)
    assert store.trainings.find_ready() == reply.get_json()["training_id"]
    shown = client.get(reply.get_json()["status_url"]).get_json()
    assert (shown["backbone"], shown["options"]) == ("efficientnet_lite0", {"collection": "holiday"})
    assert (both.status_code, unlabelled.status_code, unknown.status_code) == (400, 400, 404)
    assert "no class with an image" in unlabelled.get_json()["reason"]


def test_the_collection_of_another_key_is_unknown(
    client: flask.testing.FlaskClient, new_key: Callable[..., dict[str, str]], store: Store
) -> None:
    alice, bob = (new_key(name, Scope.TRAIN, Scope.SUBMIT, Scope.READ) for name in ("alice", "bob"))
    made = client.post("/collections", json={"name": "holiday"}, headers=alice).get_json()

    for name in ("holiday", made["id"]):
        assert client.post(f"/train/places?collection={name}", headers=bob).status_code == 404
    assert client.post("/train/places?collection=holiday", headers=alice).status_code == 400  # it has no images

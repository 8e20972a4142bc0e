"""Answers that are images: how they are read, what they look like meanwhile, and one style for many photos."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import flask.testing
import pytest
from PIL import Image

from server.app import create_app
from server.settings import ServerSettings
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.requests import Answer, Blame
from store.store import Store
from tests.blend import MODEL, claim, finish, image, report


@pytest.fixture
def settings(extension_settings: ServerSettings) -> ServerSettings:
    return extension_settings


@pytest.fixture
def client(settings: ServerSettings, store: Store) -> Iterator[flask.testing.FlaskClient]:
    with create_app(settings, store).test_client() as client:
        yield client


def file(color: str, name: str = "a.png") -> tuple[io.BytesIO, str]:
    return io.BytesIO(image(color)), name


def submit(client: flask.testing.FlaskClient, **more: Any) -> str:
    """Send a photo and a style. :return: the request's id."""
    data = {"image": file("red", "my photo.jpg"), "style": file("blue")}
    response = client.post(f"/requestPrediction/{MODEL}?fresh=1", data=data, **more)
    assert response.status_code == 202, response.text
    id: str = response.json["req_id"]
    return id


def stored(settings: ServerSettings) -> set[str]:
    return {path.name for path in settings.images.rglob("*") if path.is_file()}


# One answer


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_the_image_that_answers_a_request_is_read_with_its_own_type(
    client: flask.testing.FlaskClient, store: Store, format: str
) -> None:
    id = submit(client)
    finish(store, claim(store), format=format)

    shown = client.get(f"/readPrediction/{id}").json
    response = client.get(shown["image_url"])

    kind = format.lower()
    assert shown["image_url"] == f"/requests/{id}/image"
    assert (response.status_code, response.data) == (200, image("green", format))
    assert response.content_type == f"image/{kind}"
    assert response.headers["Content-Disposition"] == f'inline; filename="my photo-{MODEL}.{kind}"'
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    again = client.get(shown["image_url"], headers={"If-None-Match": response.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")
    assert client.get(f"/requests/{id}/files/image").data == response.data


def test_a_thumbnail_of_the_answer_is_another_image_than_one_of_the_input(
    client: flask.testing.FlaskClient, store: Store
) -> None:
    id = submit(client)
    finish(store, claim(store))

    answer = client.get(f"/requests/{id}/image?size=16")
    sent = client.get(f"/requests/{id}/picture?size=16")

    sizes = {Image.open(io.BytesIO(each.data)).size for each in (answer, sent)}
    assert sizes == {(16, 11)}
    assert answer.data != sent.data
    assert answer.headers["ETag"] != sent.headers["ETag"]
    assert client.get(f"/requests/{id}/image?size=0").status_code == 400


def test_without_an_image_the_reason_says_what_the_request_is(client: flask.testing.FlaskClient, store: Store) -> None:
    waiting = submit(client)
    posted = client.post("/requestPrediction/sepia", data=image("red"), content_type="image/png").json["req_id"]
    now = datetime.now(UTC)
    lease_ends_at = now + timedelta(seconds=60)
    (other,) = store.requests.claim(models=["sepia"], limit=1, now=now, lease_ends_at=lease_ends_at, oldest_before=None)
    store.requests.finish([Answer(claim=other, output=1, digest="d", chunk_id="c", provider="p", seconds=0.1)], now=now)

    for id, words in ((waiting, "it is queued"), (posted, "its answer is not an image"), ("nobody", "no request")):
        response = client.get(f"/requests/{id}/image")
        assert response.status_code == 404
        assert words in response.json["reason"]
    assert "image_url" not in client.get(f"/readPrediction/{waiting}").json


def test_an_image_answer_is_deleted_with_its_request_and_when_that_is_old(
    client: flask.testing.FlaskClient, store: Store, settings: ServerSettings
) -> None:
    first, second = submit(client), submit(client)
    finish(store, claim(store))
    client.get(f"/requests/{first}/image?size=160")
    kept = stored(settings)

    deleted = client.post(f"/requests/{first}/delete").status_code
    after_delete = stored(settings)
    later = datetime.now(UTC) + timedelta(seconds=1)
    store.retention.purge(images_before=later, results_before=later, now=later)

    assert len(kept) == 4, "photo, style, answer and thumbnail"
    assert deleted == 200
    assert after_delete == kept, "the other request has the same"
    assert client.get(f"/requests/{first}/image").status_code == 404
    assert client.get(f"/requests/{second}/image").status_code == 404
    assert stored(settings) == set()


def test_the_style_is_read_until_it_is_deleted_and_only_by_its_name(
    client: flask.testing.FlaskClient, store: Store
) -> None:
    id = submit(client)
    finish(store, claim(store))

    shown = client.get(f"/requests/{id}").json["inputs"]["style"]
    style, thumbnail = client.get(shown["url"]), client.get(f"{shown['url']}?size=16")
    unknown = client.get(f"/requests/{id}/inputs/image")
    later = datetime.now(UTC) + timedelta(seconds=1)
    store.retention.purge(images_before=later, results_before=later - timedelta(days=1), now=later)
    gone = client.get(shown["url"])

    assert shown == {"url": f"/requests/{id}/inputs/style", "media_type": "image/png", "bytes": len(image("blue"))}
    assert (style.status_code, style.content_type, style.data) == (200, "image/png", image("blue"))
    assert Image.open(io.BytesIO(thumbnail.data)).size == (16, 11)
    assert unknown.status_code == 404 and "style" in unknown.json["reason"]
    assert (gone.status_code, client.get(f"/requests/{id}").json["inputs"]["style"]["url"]) == (410, None)
    assert client.get(f"/requests/{id}/image").status_code == 200, "answers are kept longer"


# While it is worked on


def test_progress_and_preview_are_shown_until_the_request_ends(client: flask.testing.FlaskClient, store: Store) -> None:
    id = submit(client)
    before = client.get(f"/readPrediction/{id}").json
    claims = claim(store)
    started = client.get(f"/readPrediction/{id}").json
    report(store, claims, 0.25)
    without_preview = client.get(f"/readPrediction/{id}").json
    report(store, claims, 0.5, image("olive", "JPEG"))

    shown = client.get(f"/readPrediction/{id}").json
    preview = client.get(shown["preview_url"])
    again = client.get(shown["preview_url"], headers={"If-None-Match": preview.headers["ETag"]})
    finish(store, claims)
    done = client.get(f"/readPrediction/{id}").json

    assert all("progress" not in each for each in (before, started, done))
    assert (without_preview["progress"], without_preview["preview_url"]) == (0.25, None)
    assert (shown["progress"], shown["preview_url"]) == (0.5, f"/requests/{id}/preview?number=1")
    assert (preview.status_code, preview.content_type, preview.data) == (200, "image/jpeg", image("olive", "JPEG"))
    assert preview.headers["Cache-Control"] == "private, no-cache"
    assert preview.headers["X-Content-Type-Options"] == "nosniff"
    assert again.status_code == 304
    gone = client.get(f"/requests/{id}/preview")
    assert gone.status_code == 404 and "it is done" in gone.json["reason"]


def test_nothing_is_left_of_a_worker_that_was_killed(client: flask.testing.FlaskClient, store: Store) -> None:
    id = submit(client)
    claims = claim(store)
    report(store, claims, 0.9, image("olive", "JPEG"))

    store.requests.release(claims, blame=Blame.CHUNK, code="worker_died", reason="It died.", now=datetime.now(UTC))
    shown = client.get(f"/readPrediction/{id}").json

    assert shown["status"] == "queued" and "progress" not in shown
    assert client.get(f"/requests/{id}/preview").status_code == 404


def test_image_and_preview_are_read_only_with_the_key_of_their_request(
    client: flask.testing.FlaskClient, store: Store
) -> None:
    scopes, now = frozenset({Scope.SUBMIT, Scope.READ}), datetime.now(UTC)
    (owner_id, owner), (other_id, other) = make_key(), make_key()
    for id, key in ((owner_id, owner), (other_id, other)):
        store.keys.add(KeyRecord(id=id, name=id, sha256=hash_key(key), scopes=scopes, created_at=now))
    own, strange = ({"Authorization": f"Bearer {key}"} for key in (owner, other))
    id = submit(client, headers=own)
    claims = claim(store)
    report(store, claims, 0.5, image("olive", "JPEG"))

    statuses = [client.get(f"/requests/{id}/preview", headers=headers).status_code for headers in (own, strange, {})]
    finish(store, claims)
    statuses += [client.get(f"/requests/{id}/image", headers=headers).status_code for headers in (own, strange, {})]

    assert statuses == [200, 404, 401] * 2


def test_events_bring_progress_until_the_end_and_only_for_the_requests_of_the_stream(
    client: flask.testing.FlaskClient, store: Store
) -> None:
    id, other = submit(client), submit(client)
    claims = claim(store)
    stream = client.get(f"/events?ids={id}")
    pieces = stream.iter_encoded()
    text = ""
    while '"claimed"' not in text:
        text += next(pieces).decode()

    report(store, claims, 0.25)
    while "event: progress" not in text:
        text += next(pieces).decode()
    report(store, claims, 0.5, image("olive", "JPEG"))
    while text.count("event: progress") < 2:
        text += next(pieces).decode()
    finish(store, claims)
    text += "".join(piece.decode() for piece in pieces)
    stream.close()

    blocks = [block for block in text.split("\n\n") if "event: progress" in block]
    data = [json.loads(block.partition("data: ")[2]) for block in blocks]
    assert data == [
        {"req_id": id, "progress": 0.25, "preview_url": None},
        {"req_id": id, "progress": 0.5, "preview_url": f"/requests/{id}/preview?number=1"},
    ]
    assert not any(line.startswith("id:") for block in blocks for line in block.splitlines())
    assert other not in text
    assert text.rindex("event: progress") < text.rindex('"status":"done"') < text.rindex("event: end")


# One style for many photos


def post_batch(client: flask.testing.FlaskClient, **fields: Any) -> Any:
    return client.post(f"/requestPredictions/{MODEL}", data=fields)


def test_a_batch_has_one_style_for_many_photos_which_is_stored_once(
    client: flask.testing.FlaskClient, store: Store, settings: ServerSettings
) -> None:
    colors = ("red", "green", "white")

    response = post_batch(client, image=[file(each, f"{each}.png") for each in colors], style=file("blue"))

    assert response.status_code == 202, response.text
    assert response.json["accepted"] == 3
    claims = claim(store)
    assert [store.images.read(one.image_sha256) for one in claims] == [image(each) for each in colors]
    assert {store.images.read(one.inputs["style"].sha256) for one in claims} == {image("blue")}
    assert {one.inputs["style"].media_type for one in claims} == {"image/png"}
    assert len(stored(settings)) == 4


def test_the_style_of_a_large_batch_is_kept_until_its_last_request_is_deleted(
    client: flask.testing.FlaskClient, store: Store, settings: ServerSettings
) -> None:
    photos = [(io.BytesIO(image(f"#0000{number:02x}")), f"{number}.png") for number in range(120)]
    assert post_batch(client, image=photos, style=file("red")).status_code == 202
    claims = [*claim(store), *claim(store)]
    style = claims[0].inputs["style"].sha256
    finish(store, claims)

    for each in claims[:-1]:
        assert client.post(f"/requests/{each.id}/delete").status_code == 200
    is_kept = style in stored(settings)
    client.post(f"/requests/{claims[-1].id}/delete")

    assert len(claims) == 120
    assert is_kept
    assert stored(settings) == set()


def test_a_zip_of_photos_may_come_with_a_style(client: flask.testing.FlaskClient, store: Store) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as photos:
        for color in ("red", "green"):
            photos.writestr(f"{color}.png", image(color))
    archive.seek(0)

    response = post_batch(client, style=file("blue"), archive=(archive, "photos.zip"))

    assert response.status_code == 202, response.text
    assert [sorted(one.inputs) for one in claim(store)] == [["style"]] * 2


def test_a_photo_that_cannot_be_used_is_refused_alone(client: flask.testing.FlaskClient, store: Store) -> None:
    response = post_batch(client, image=[(io.BytesIO(b"text"), "bad.png"), file("red")], style=file("blue"))

    assert [item["code"] for item in response.json["items"]] == ["not_an_image", None]
    assert len(claim(store)) == 1


def test_a_style_of_which_no_photo_can_be_used_is_not_kept(
    client: flask.testing.FlaskClient, settings: ServerSettings
) -> None:
    response = post_batch(client, image=[(io.BytesIO(b"text"), "bad.png")], style=file("blue"))

    assert (response.status_code, response.json["accepted"]) == (202, 0)
    assert stored(settings) == set()


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"style": [(b"text", "a.png")]}, "not_an_image", "field `style`"),
        ({"style": [(b"", "a.png")]}, "empty_image", "field `style`"),
        ({}, "malformed_request", "lacks `style`"),
        ({"style": [(image("blue"), "a.png"), (image("blue"), "b.png")]}, "malformed_request", "twice"),
        ({"style": [(image("blue"), "a.png")], "other": [(b"x", "a")]}, "malformed_request", "image, style, client_id"),
    ],
    ids=["no image", "empty", "missing", "twice", "unknown field"],
)
def test_a_batch_whose_style_cannot_be_used_is_refused_and_nothing_is_kept(
    client: flask.testing.FlaskClient,
    settings: ServerSettings,
    store: Store,
    fields: dict[str, Any],
    code: str,
    words: str,
) -> None:
    files = {name: [(io.BytesIO(data), each) for data, each in given] for name, given in fields.items()}

    response = post_batch(client, image=[file("red"), file("green", "b.png")], **files)

    assert 400 <= response.status_code < 500
    assert response.json["code"] == code
    assert words in response.json["reason"]
    assert stored(settings) == set()
    assert store.requests.list() == []


@pytest.mark.parametrize("kind", ["application/zip", "application/jsonl"])
def test_a_body_that_cannot_have_a_style_is_refused_with_the_way_that_can(
    client: flask.testing.FlaskClient, kind: str
) -> None:
    response = client.post(f"/requestPredictions/{MODEL}", data=b"PK", content_type=kind)

    assert response.status_code == 400
    assert "`archive`" in response.json["reason"] and "`style`" in response.json["reason"]

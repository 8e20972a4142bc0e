"""Batches through the API: forms, zips, JSON lines; partial failure, progress, results, cancel, retry, delete."""

from __future__ import annotations

import csv
import io
import json
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import flask.testing
import pytest

from provider_image.services import load_service
from server.app import create_app
from server.intake.batch_parser import SharedInputs, parse_items
from server.settings import ServerSettings
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.store import Store

URL = "/requestPredictions/efficientnet_lite0"
Post = Callable[..., Any]
IMAGE = load_service("classification").inputs["image"]


def zipped(*entries: tuple[str, bytes], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


def form(*images: tuple[str, bytes], **fields: Any) -> dict[str, Any]:
    return {"image": [(io.BytesIO(data), name) for name, data in images], **fields}


def make_image(shade: int) -> bytes:
    """A PNG of one pixel."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (1, 1), (shade % 256, shade // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def send(client: flask.testing.FlaskClient, body: bytes, kind: str = "application/zip", query: str = "") -> Any:
    return client.post(URL + query, data=body, content_type=kind)


def test_a_form_of_images_is_one_batch_with_an_id_for_each(
    client: flask.testing.FlaskClient, photos: dict[str, bytes]
) -> None:
    reply = client.post(URL, data=form(("a.jpg", photos["chelsea"]), ("b.jpg", photos["coffee"])))

    body = reply.get_json()
    assert (reply.status_code, body["accepted"], body["refused"]) == (202, 2, 0)
    assert [item["client_id"] for item in body["items"]] == ["a.jpg", "b.jpg"]
    assert reply.headers["Location"] == body["status_url"] == f"/batches/{body['batch_id']}"
    shown = client.get(f"/readPrediction/{body['items'][1]['req_id']}").get_json()
    assert (shown["batch_id"], shown["client_id"], shown["name"]) == (body["batch_id"], "b.jpg", "b.jpg")


def test_a_client_id_in_a_form_names_the_image_after_it(client: flask.testing.FlaskClient) -> None:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="client_id"\r\n\r\nfirst\r\n'
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + make_image(1) + b"\r\n"
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="b.png"\r\n\r\n'
        + make_image(2)
        + b"\r\n--x--\r\n"
    )

    reply = send(client, body, "multipart/form-data; boundary=x")

    assert [item["client_id"] for item in reply.get_json()["items"]] == ["first", "b.png"]


def test_bad_items_are_refused_and_the_others_accepted(
    client: flask.testing.FlaskClient, settings: ServerSettings
) -> None:
    body = zipped(
        ("good.png", make_image(1)),
        ("note.txt", b"not an image"),
        ("large.png", b"\0" * (settings.max_image_bytes + 1)),
        ("cut.png", make_image(2)[:-8]),
        ("more/good.png", make_image(3)),
        ("__MACOSX/._good.png", b"x"),
    )

    reply = send(client, body).get_json()

    found = [(item["client_id"], item["req_id"] is not None, item["code"]) for item in reply["items"]]
    assert found == [
        ("good.png", True, None),
        ("note.txt", False, "not_an_image"),
        ("large.png", False, "too_large"),
        ("cut.png", False, "broken_image"),
        ("more/good.png", True, None),
    ]
    shown = client.get(reply["status_url"]).get_json()
    assert [one["client_id"] for one in shown["refused"]] == ["note.txt", "large.png", "cut.png"]
    assert (shown["total"], shown["counts"]["refused"], shown["counts"]["queued"]) == (2, 3, 2)


def test_a_long_file_name_refuses_nothing_and_a_long_client_id_the_batch(client: flask.testing.FlaskClient) -> None:
    long = "n" * 250 + ".png"
    files = [(io.BytesIO(make_image(number)), name) for number, name in enumerate([long, "short.png"])]

    form = client.post(URL, data={"image": files}).get_json()
    archive = send(client, zipped((long, make_image(1)), ("short.png", make_image(2)))).get_json()
    given = client.post(URL, data={"client_id": "i" * 201, "image": (io.BytesIO(make_image(3)), "a.png")})

    for reply in (form, archive):
        assert [item["client_id"] for item in reply["items"]] == [long[-200:], "short.png"]
    assert (given.status_code, given.get_json()["code"]) == (400, "malformed_request")


def test_an_archive_may_be_sent_in_a_form(client: flask.testing.FlaskClient) -> None:
    archive = (io.BytesIO(zipped(("a.png", make_image(1)))), "all.zip")

    reply = client.post(URL, data={"archive": archive})

    assert reply.get_json()["items"][0]["client_id"] == "a.png"


def test_what_follows_a_form_is_not_kept_in_memory(tmp_path: Path) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nbytes\r\n--b--\r\n'
    file = io.BytesIO(head + bytes(10_000_000))
    tracemalloc.start()
    try:
        items = list(
            parse_items(
                file,
                "form",
                "b",
                "image",
                IMAGE,
                shared=SharedInputs(inputs={}),
                folder=tmp_path,
                max_image_bytes=1_000_000,
                max_bytes=100_000_000,
            )
        )
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert [item.data for item in items] == [b"bytes"]
    assert peak_bytes < 2_000_000


@pytest.mark.parametrize("position", [1, 25])
def test_duplicate_client_ids_are_refused_and_nothing_is_kept(
    client: flask.testing.FlaskClient, stored_state: Callable[[], tuple[list[str], int]], position: int
) -> None:
    images = [(f"{n}.png", make_image(n)) for n in range(position)]

    reply = client.post(URL, data=form(*images, ("0.png", make_image(99))))

    assert (reply.status_code, reply.get_json()["code"]) == (409, "duplicate_client_id")
    assert "'0.png'" in reply.get_json()["reason"]
    assert stored_state() == ([], 0)


def _bomb(size: int) -> bytes:
    return zipped(*((f"{n}", b"\0" * 1_000_000) for n in range(size)), compression=zipfile.ZIP_DEFLATED)


def _huge_directory() -> bytes:
    return b"PK\x05\x06" + struct.pack("<HHHHLLH", 0, 0, 1, 1, 2**31, 0, 0)


def _many_folders() -> bytes:
    """A zip that states one entry and has more than a batch may."""
    entry = zipped(("a/", b""))
    entry = entry[entry.index(b"PK\x01\x02") : entry.index(b"PK\x05\x06")]
    directory = entry * 20_001
    return directory + b"PK\x05\x06" + struct.pack("<HHHHLLH", 0, 0, 1, 1, len(directory), 0, 0)


def _zip64_locator() -> bytes:
    return b"PK\x06\x07" + b"\0" * 16 + b"PK\x05\x06" + b"\0" * 18


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"", "application/zip", 400, "malformed_request"),
        (b"no zip at all", "application/zip", 400, "malformed_request"),
        (zipped(), "application/zip", 400, "malformed_request"),
        (zipped(("a", b"1"))[:-30], "application/zip", 400, "malformed_request"),
        (_bomb(12), "application/zip", 413, "too_large"),
        (_huge_directory(), "application/zip", 413, "too_many_items"),
        (_many_folders(), "application/zip", 413, "too_many_items"),
        (_zip64_locator(), "application/zip", 400, "malformed_request"),
        (b"x" * 10_000_001, "application/zip", 413, "too_large"),
        (b"--x\r\n" + b"h: " + b"y" * 200_000, "multipart/form-data; boundary=x", 400, "malformed_request"),
        (b"--x\r\n\r\n\r\n--x--\r\n", "multipart/form-data; boundary=x", 400, "malformed_request"),
        (b"nothing", "multipart/form-data; boundary=x", 400, "malformed_request"),
        (b"nothing", "multipart/form-data", 400, "malformed_request"),
        (b"x", "image/png", 415, "unsupported_media_type"),
        (b'{"url": "https://example.org/a.jpg"}', "application/jsonl", 403, "fetching_is_off"),
    ],
    ids=[
        "empty-zip", "not-a-zip", "zip-without-members", "cut-zip", "zip-bomb", "huge-zip-directory", "zip-of-folders",
        "zip64-locator", "too-large", "endless-headers", "form-without-images", "form-without-parts",
        "form-without-boundary", "one-image", "urls-while-off",
    ],
)  # fmt: skip
def test_a_body_that_cannot_be_read_is_refused_as_a_whole(
    settings: ServerSettings,
    store: Store,
    stored_state: Callable[[], tuple[list[str], int]],
    body: bytes,
    kind: str,
    status: int,
    code: str,
) -> None:
    client = create_app(replace(settings, max_batch_bytes=10_000_000), store).test_client()

    reply = send(client, body, kind)

    assert (reply.status_code, reply.get_json()["code"]) == (status, code)
    assert stored_state() == ([], 0)


def test_an_entry_with_a_false_size_fails_alone(client: flask.testing.FlaskClient) -> None:
    good = zipped(("a.png", make_image(1)), ("b.png", make_image(2)))
    lying = bytearray(good)
    place = lying.index(b"PK\x01\x02")
    lying[place + 16 : place + 20] = b"\1\2\3\4"  # the checksum in the directory

    reply = send(client, bytes(lying)).get_json()

    assert [item["code"] for item in reply["items"]] == ["broken_image", None]


def test_lines_of_urls_are_fetched_and_each_fails_alone(
    settings: ServerSettings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.errors import FetchFailed

    def fetch(url: str, *, max_image_bytes: int, seconds: float) -> bytes:
        if url.endswith("gone"):
            raise FetchFailed("404")
        return make_image(len(url))

    monkeypatch.setattr("server.intake.staging.fetch", fetch)
    client = create_app(replace(settings, fetches_urls=True), store).test_client()
    lines = (
        b'{"client_id": "a", "url": "https://h/a"}\n\n{"url": "https://h/gone"}\n{"client_id": 7, "url": "https://h/c"}'
    )

    reply = send(client, lines, "application/x-ndjson").get_json()

    assert [(item["client_id"], item["code"]) for item in reply["items"]] == [
        ("a", None),
        ("1", "fetch_failed"),
        ("7", None),
    ]
    for bad in (b"[]", b"{", b'{"url": 1}', b'{"url": "u", "more": 1}', b'{"url": "' + b"x" * 20_000):
        assert send(client, bad, "application/jsonl").status_code == 400


def test_a_batch_shows_its_progress_and_then_its_end(
    client: flask.testing.FlaskClient, answer: Callable[..., list[str]]
) -> None:
    reply = send(
        client, zipped(*((f"{n}.png", make_image(n)) for n in range(3))), query="?name=holiday&label=year:1999"
    )
    url = reply.get_json()["status_url"]
    before = client.get(url).get_json()

    answer()
    ended = client.get(url + "?wait=5").get_json()

    assert (before["status"], before["progress"], before["counts"]["queued"]) == ("queued", 0.0, 3)
    assert "no batcher is running" in before["waiting_for"]
    assert (ended["status"], ended["progress"], ended["counts"]["done"], ended["eta_seconds"]) == ("ended", 1.0, 3, 0.0)
    assert (ended["name"], ended["labels"], ended["cost"]) == ("holiday", {"year": "1999"}, None)
    assert [row["batch_id"] for row in client.get("/batches").get_json()["batches"]] == [ended["batch_id"]]


def test_results_are_lines_and_rows_that_can_be_resumed_from_a_cursor(
    client: flask.testing.FlaskClient, answer: Callable[..., list[str]]
) -> None:
    reply = send(client, zipped(*((f"{n}.png", make_image(n)) for n in range(3)))).get_json()
    url = f"/batches/{reply['batch_id']}"
    assert client.get(f"{url}/results.jsonl").get_data() == b""

    answer()
    lines = [json.loads(line) for line in client.get(f"{url}/results.jsonl?top=2").get_data(as_text=True).splitlines()]
    rest = client.get(f"{url}/results.jsonl?after={lines[0]['cursor']}").get_data(as_text=True).splitlines()
    rows = list(csv.DictReader(io.StringIO(client.get(f"{url}/results.csv").get_data(as_text=True))))

    assert [line["client_id"] for line in lines] == ["0.png", "1.png", "2.png"]
    assert [len(line["preds"]) for line in lines] == [2, 2, 2]
    assert [json.loads(line)["client_id"] for line in rest] == ["1.png", "2.png"]
    assert [(row["client_id"], row["status"], row["label"]) for row in rows] == [
        (f"{n}.png", "done", "label_0") for n in range(3)
    ]
    assert client.get(f"{url}/results.jsonl?after=x").status_code == 400


def test_no_cell_of_a_csv_file_is_a_formula(
    client: flask.testing.FlaskClient, answer: Callable[..., list[str]]
) -> None:
    names = ['=HYPERLINK("http://x","y")', "+1", "-1", "@SUM(A1)", "\uff1d1", "a=1"]
    url = send(client, zipped(*((name, make_image(n)) for n, name in enumerate(names)))).get_json()["status_url"]
    answer(fail_with="=1+1")

    rows = list(csv.DictReader(io.StringIO(client.get(f"{url}/results.csv").get_data(as_text=True))))

    assert [row["client_id"] for row in rows] == [*(f"'{name}" for name in names[:-1]), "a=1"]
    assert [row["reason"] for row in rows] == ["'=1+1"] * len(names)


def add_key(store: Store, images_per_day: int) -> dict[str, str]:
    id, key = make_key()
    store.keys.add(
        KeyRecord(
            id=id,
            name=id,
            sha256=hash_key(key),
            scopes=frozenset({Scope.SUBMIT}),
            images_per_day=images_per_day,
            created_at=datetime.now(UTC),
        )
    )
    return {"X-API-Key": key}


@pytest.mark.parametrize("limit", ["quota", "backlog"])
def test_a_batch_over_a_limit_is_staged_only_a_little_beyond_it(
    settings: ServerSettings,
    store: Store,
    stored_state: Callable[[], tuple[list[str], int]],
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
) -> None:
    client = create_app(replace(settings, max_backlog=1 if limit == "backlog" else 1000), store).test_client()
    headers = add_key(store, 1 if limit == "quota" else 1000)
    staged, real = [0], store.images.stage

    def count(data: bytes) -> Any:
        staged[0] += 1
        return real(data)

    monkeypatch.setattr(store.images, "stage", count)
    body = zipped(*((f"{n}.png", make_image(n)) for n in range(60)))

    reply = client.post(URL, data=body, content_type="application/zip", headers=headers)

    assert (reply.status_code, reply.get_json()["code"]) == (
        (429, "quota_reached") if limit == "quota" else (503, "backlog_full")
    )
    assert staged[0] < 30
    assert stored_state() == ([], 0)


def test_images_that_a_batch_refuses_count_like_the_others(settings: ServerSettings, store: Store) -> None:
    client = create_app(settings, store).test_client()
    body = zipped(*((f"{n}.png", b"broken") for n in range(40)), ("good.png", make_image(1)))
    few, many = add_key(store, 40), add_key(store, 41)

    replies = [client.post(URL, data=body, content_type="application/zip", headers=key) for key in (few, many, many)]

    assert [reply.status_code for reply in replies] == [429, 202, 429]
    assert [reply.get_json().get("code") for reply in replies] == ["quota_reached", None, "quota_reached"]
    assert len(store.database.rows("SELECT * FROM batch_refusals")) == 40


def test_a_body_that_is_larger_than_the_quota_has_room_for_is_not_read(settings: ServerSettings, store: Store) -> None:
    client = create_app(settings, store).test_client()
    # More than one image and what a form adds to it, which is less than an image here.
    body = io.BytesIO(bytes(2 * settings.max_image_bytes))

    reply = client.post(URL, input_stream=body, content_type="application/zip", headers=add_key(store, 1))

    assert (reply.status_code, reply.get_json()["code"], body.tell()) == (429, "quota_reached", 0)


def test_a_batch_is_cancelled_retried_and_deleted(
    client: flask.testing.FlaskClient, answer: Callable[..., list[str]], store: Store
) -> None:
    first = send(client, zipped(("a.png", make_image(1)))).get_json()["status_url"]
    assert client.delete(first).get_json()["code"] == "batch_under_way"
    answer(fail_with="It is broken.")

    again = client.post(f"{first}/retry").get_json()
    cancelled = client.post(f"{first}/cancel").get_json()

    assert (again["changed"], again["counts"]["queued"]) == (1, 1)
    assert (cancelled["changed"], cancelled["counts"]["cancelled"], cancelled["status"]) == (1, 1, "ended")
    assert client.delete(first).get_json() == {"success": True, "deleted": 1}
    assert client.get(first).get_json()["code"] == "unknown_batch"


def test_a_contact_sheet_shows_the_images_with_their_labels(
    client: flask.testing.FlaskClient, photos: dict[str, bytes], answer: Callable[..., list[str]]
) -> None:
    from PIL import Image

    url = send(client, zipped(("a.jpg", photos["chelsea"]), ("b.png", make_image(1)))).get_json()["status_url"]
    answer()

    reply = client.get(f"{url}/contact-sheet.png")

    sheet = Image.open(io.BytesIO(reply.get_data()))
    assert (reply.content_type, sheet.format, sheet.size) == ("image/png", "PNG", (272, 164))
    assert len(sheet.getcolors(100_000) or ()) > 500


def test_a_deadline_and_keep_seconds_are_accepted_and_bad_ones_refused(
    client: flask.testing.FlaskClient, store: Store
) -> None:
    reply = send(client, zipped(("a.png", make_image(1))), query="?deadline=30&keep_seconds=60").get_json()

    (item,) = store.batches.items(reply["batch_id"])
    assert item.deadline_at is not None and item.keep_seconds == 60
    assert timedelta(seconds=25) < item.deadline_at - datetime.now(UTC) <= timedelta(seconds=30)
    store.requests.expire(datetime.now(UTC) + timedelta(seconds=31))
    shown = client.get(f"/readPrediction/{item.id}").get_json()
    assert (shown["status"], shown["code"]) == ("expired", "expired")
    assert client.get(reply["status_url"]).get_json()["counts"]["expired"] == 1
    for query in (
        "deadline=soon",
        "deadline=2001-01-01",
        "deadline=-1",
        "keep_seconds=nan",
        "label=x",
        "label=a:b&label=a:c",
    ):
        assert send(client, zipped(("a.png", make_image(1))), query=f"?{query}").status_code == 400, query


def test_a_batch_leaves_no_file_beside_its_images(client: flask.testing.FlaskClient, settings: ServerSettings) -> None:
    send(client, zipped(("a.png", make_image(1)), ("b.txt", b"no")))

    files = [path for path in settings.home.rglob("*") if path.is_file() and Path("models") not in path.parents]
    assert len([path for path in files if "blobs" in path.parts]) == 1
    assert {path.name.partition(".db")[0] for path in files if "blobs" not in path.parts} <= {"mlg"} | {
        path.name.partition(".db")[0] for path in settings.models.rglob("*")
    }


def test_a_batch_of_another_key_is_not_found(settings: ServerSettings, store: Store) -> None:
    client = create_app(settings, store).test_client()
    keys = {}
    for name in ("alice", "bob"):
        id, key = make_key()
        scopes = frozenset({Scope.SUBMIT, Scope.READ})
        record = KeyRecord(id=id, name=name, sha256=hash_key(key), scopes=scopes, created_at=datetime.now(UTC))
        store.keys.add(record)
        keys[name] = {"Authorization": f"Bearer {key}", "Idempotency-Key": "the-same"}
    body = zipped(("a.png", make_image(1)))

    made = {
        name: client.post(URL, data=body, content_type="application/zip", headers=headers).get_json()
        for name, headers in keys.items()
    }

    assert made["alice"]["batch_id"] != made["bob"]["batch_id"]
    (item,) = made["alice"]["items"]
    for path in ("", "/results.jsonl", "/results.csv", "/contact-sheet.png"):
        assert client.get(made["alice"]["status_url"] + path, headers=keys["bob"]).status_code == 404
    for path in ("", "/picture"):
        assert client.get(f"/requests/{item['req_id']}{path}", headers=keys["bob"]).status_code == 404
        assert client.get(f"/requests/{item['req_id']}{path}", headers=keys["alice"]).status_code == 200
    assert client.delete(made["alice"]["status_url"], headers=keys["bob"]).status_code == 404
    for name, headers in keys.items():
        batches = client.get("/batches", headers=headers).get_json()["batches"]
        requests = client.get("/requests", headers=headers).get_json()["requests"]
        assert [batch["batch_id"] for batch in batches] == [made[name]["batch_id"]]
        assert [request["batch_id"] for request in requests] == [made[name]["batch_id"]]

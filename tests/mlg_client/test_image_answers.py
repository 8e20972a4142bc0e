"""Image answers through the Python client and `mlg submit`: one style for many photos, and a folder of new images."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from cli.submission.submit import Extras, submit
from mlg_client import AsyncClient, Client, Refused, Request
from mlg_client.image_files import name_images
from provider_image.errors import ConfigError
from server.app import create_app
from server.settings import ServerSettings
from store.store import Store
from tests.blend import MODEL, claim, finish, image, report
from tests.timing import wait_until

URL = "http://127.0.0.1:5000"


@pytest.fixture
def settings(extension_settings: ServerSettings) -> ServerSettings:
    return extension_settings


@pytest.fixture
def transport(settings: ServerSettings, store: Store) -> httpx.WSGITransport:
    """A way to an application with the model, without a network."""
    return httpx.WSGITransport(app=create_app(settings, store))


@pytest.fixture
def calls(transport: httpx.WSGITransport) -> Iterator[Client]:
    with Client(URL, transport=transport, retry_timeout_seconds=1) as calls:
        calls.hold_seconds = 0.2
        yield calls


@pytest.fixture
def photos_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name, color in (("a.png", "red"), ("b.png", "white"), ("more/a.png", "black")):
        (folder / name).write_bytes(image(color))
    (tmp_path / "style.png").write_bytes(image("blue"))
    return folder


def test_a_folder_is_sent_with_one_style_and_its_images_are_saved(
    calls: Client, store: Store, photos_folder: Path, tmp_path: Path
) -> None:
    batch = calls.submit_dir(photos_folder, MODEL, inputs={"style": tmp_path / "style.png"}, params={"share": 0.25})
    claims = claim(store)
    finish(store, claims, "green")
    done = list(calls.as_completed(batch.requests))

    files = calls.save_images(done, tmp_path / "new" / "images")

    assert len(claims) == 3
    assert {one.inputs["style"].sha256 for one in claims} == {claims[0].inputs["style"].sha256}
    assert {one.params["share"] for one in claims} == {0.25}
    assert sorted(file.name for file in files if file) == [
        f"a-{MODEL}-2.jpg",
        f"a-{MODEL}.jpg",
        f"b-{MODEL}.jpg",
    ]
    assert {file.read_bytes() for file in files if file} == {image("green", "JPEG")}
    assert calls.image(done[0]) == image("green", "JPEG")


def test_one_photo_is_sent_with_its_style_too(calls: Client, store: Store) -> None:
    batch = calls.submit_many([image("red")], MODEL, inputs={"style": image("blue")})

    (found,) = claim(store)
    assert [request.id for request in batch.requests] == [found.id]
    assert store.images.read(found.inputs["style"].sha256) == image("blue")


def test_a_style_that_is_no_image_refuses_each_photo_with_the_reason(calls: Client, store: Store) -> None:
    batch = calls.submit_many([image("red"), image("green")], MODEL, inputs={"style": b"text"})

    assert [one.code for one in batch.outcomes if isinstance(one, Refused)] == ["not_an_image"] * 2
    assert store.requests.list() == []


def test_a_preview_is_read_while_there_is_one(transport: httpx.WSGITransport, calls: Client, store: Store) -> None:
    (request,) = calls.submit_many([image("red")], MODEL, inputs={"style": image("blue")}).requests
    claims = claim(store)
    before = calls.preview(request)
    report(store, claims, 0.5, image("olive", "JPEG"))

    now = calls.read(request.id)
    preview = calls.preview(now)
    finish(store, claims)

    assert before is None
    assert now.raw["progress"] == 0.5
    assert preview == image("olive", "JPEG")
    assert calls.preview(request) is None
    with pytest.raises(Refused, match="no request"):
        calls.preview("nobody")


def test_the_asynchronous_client_has_the_same_calls(tmp_path: Path) -> None:
    answers = {
        "/requests/r1/image": httpx.Response(200, content=b"image"),
        "/requests/r1/preview": httpx.Response(404, json={"success": False, "reason": "No.", "code": "unknown_file"}),
    }

    async def main() -> list[Any]:
        transport = httpx.MockTransport(lambda request: answers[request.url.path])
        async with AsyncClient(URL, transport=transport) as calls:
            request = Request(id="r1", status="done", model="m", name="x.jpg", files={"image": "image/webp"})
            return [
                await calls.image(request),
                await calls.preview(request),
                await calls.save_images([request], tmp_path),
            ]

    assert asyncio.run(main()) == [b"image", None, [tmp_path / "x-m.webp"]]
    assert (tmp_path / "x-m.webp").read_bytes() == b"image"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("../../etc/passwd.png", "passwd-m.png"),
        ("..\\..\\boot.ini", "boot-m.png"),
        (".bashrc", "bashrc-m.png"),
        ("..", "image-m.png"),
        ("/", "image-m.png"),
        (None, "image-m.png"),
        ("a\0b.png", "ab-m.png"),
        ("ö" * 300, "ö" * 50 + "-m.png"),
    ],
)
def test_no_name_of_a_server_leads_to_another_folder(tmp_path: Path, name: str | None, expected: str) -> None:
    request = Request(id="r", status="done", model="../m", name=name, files={"image": "image/png"})

    assert name_images([request], tmp_path) == [tmp_path / expected]


def test_a_request_without_an_image_has_no_file(tmp_path: Path) -> None:
    request = Request(id="r", status="done", model="m", files={"vector": "application/octet-stream"})

    assert name_images([request], tmp_path) == [None]


# mlg submit


@pytest.mark.parametrize(
    ("inputs", "params", "words"),
    [
        (["style"], [], "--input takes NAME=FILE"),
        (["=x"], [], "--input takes NAME=FILE"),
        (["style=/nowhere/a.png"], [], "cannot be read"),
        ([], ["share"], "--param takes NAME=VALUE"),
        ([], ["share=1", "share=2"], "each name once"),
    ],
)
def test_inputs_and_params_that_cannot_be_used_are_refused(inputs: list[str], params: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Extras.parse(inputs, params)


def test_other_inputs_or_params_are_other_requests(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"one")
    (tmp_path / "b.png").write_bytes(b"two")
    given = [([], []), ([f"style={tmp_path}/a.png"], []), ([f"style={tmp_path}/b.png"], []), ([], ["share=1"])]

    keys = [Extras.parse(inputs, params).key("Blend") for inputs, params in given]

    assert keys[0] == "blend", "as before there were any"
    assert len(set(keys)) == 4
    (tmp_path / "b.png").write_bytes(b"one")
    assert Extras.parse([f"style={tmp_path}/b.png"], []).key("blend") == keys[1], "the name of the file does not count"


def test_submit_writes_a_folder_of_new_images_and_sends_nothing_twice(
    transport: httpx.WSGITransport, store: Store, photos_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mlg_client.Client", lambda url, **options: Client(URL, transport=transport, retry_timeout_seconds=1)
    )
    monkeypatch.setattr("cli.submission.submit._handle_interrupt", lambda: None)
    options = ["--model", MODEL, "--home", str(tmp_path / "client"), "--input", f"style={tmp_path / 'style.png'}"]
    options += ["--images", str(tmp_path / "new"), "--out", str(tmp_path / "rows.jsonl"), str(photos_folder)]

    def work() -> None:
        claims = wait_until(lambda: claim(store))
        finish(store, claims, "green", "PNG")

    worker = threading.Thread(target=work)
    worker.start()
    first = CliRunner().invoke(submit, options)
    worker.join()
    again = CliRunner().invoke(submit, options)

    assert (first.exit_code, again.exit_code) == (0, 0), (first.output, again.output)
    assert "3 images are in" in first.output
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        f"a-{MODEL}-2.png",
        f"a-{MODEL}.png",
        f"b-{MODEL}.png",
    ]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {Path(row["image"]).read_bytes() for row in rows} == {image("green", "PNG")}
    assert len(store.requests.list()) == 3

"""Thumbnails are made once, kept with their image, and never hold up anything else."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import flask.testing
import pytest
from PIL import Image

from provider_image.errors import BrokenImage, ConfigError, DecodingUnavailable
from server.app import get_context
from server.settings import ServerSettings
from server.thumbnails import Thumbnails
from store.errors import ImageGone
from store.images import THUMBNAIL_SIDES
from store.store import Store
from tests.provider_image.conftest import encode_image

IMAGE = encode_image(Image.linear_gradient("L").resize((400, 200)), "PNG")


@pytest.fixture
def thumbnails(store: Store) -> Thumbnails:
    return Thumbnails(store.images, max_waiting=2)


@pytest.fixture
def add(store: Store) -> Callable[[bytes], str]:
    """Store an image as an upload does."""

    def publish(data: bytes) -> str:
        staged = store.images.stage(data)
        store.images.publish(staged)
        return staged.sha256

    return publish


def kept(store: Store) -> list[str]:
    return sorted(path.name for path in (store.images.folder / "thumbnails").iterdir())


def test_a_thumbnail_is_kept_and_deleted_with_its_image(
    thumbnails: Thumbnails, store: Store, add: Callable[[bytes], str]
) -> None:
    sha256 = add(IMAGE)
    first = thumbnails.get(sha256, 160)
    store.images.thumbnail_path(sha256, 640).write_bytes(b"made before")

    assert Image.open(io.BytesIO(first)).size == (160, 80)
    assert thumbnails.get(sha256, 640) == b"made before"
    assert kept(store) == [f"{sha256}-160", f"{sha256}-640"]
    assert store.images.delete(sha256)
    assert kept(store) == []
    with pytest.raises(ImageGone):
        thumbnails.get(sha256, 160)
    assert kept(store) == []


def test_only_the_sizes_of_the_pages_are_kept(
    thumbnails: Thumbnails, store: Store, add: Callable[[bytes], str]
) -> None:
    sha256 = add(IMAGE)

    assert 100 not in THUMBNAIL_SIDES
    assert Image.open(io.BytesIO(thumbnails.get(sha256, 100))).size == (100, 50)
    assert kept(store) == []


def test_the_pages_ask_for_sizes_that_are_kept() -> None:
    import re

    templates = Path(__file__).parents[2] / "server" / "pages" / "templates"
    text = "".join(path.read_text() for path in templates.glob("*.html"))
    sizes = {int(size) for size in re.findall(r"[?(, ]size=(\d+)", text)}

    assert {160, 640} <= sizes <= set(THUMBNAIL_SIDES)


def test_a_broken_image_is_decoded_once(thumbnails: Thumbnails, store: Store, add: Callable[[bytes], str]) -> None:
    sha256 = add(IMAGE[:60] + bytes(40) + IMAGE[100:])

    for _ in range(2):
        with pytest.raises(BrokenImage):
            thumbnails.get(sha256, 160)

    assert store.images.thumbnail_path(sha256, 160).read_bytes() == b""


def test_a_thumbnail_whose_image_is_deleted_meanwhile_is_not_kept(store: Store, add: Callable[[bytes], str]) -> None:
    sha256 = add(IMAGE)
    store.images.path(sha256).unlink()  # as `delete` begins

    store.images.keep_thumbnail(sha256, 160, b"late")

    assert kept(store) == []


def test_a_sheet_has_grey_squares_for_what_cannot_be_shown(
    thumbnails: Thumbnails, store: Store, add: Callable[[bytes], str]
) -> None:
    white, broken = add(encode_image(Image.new("RGB", (50, 50), "red"), "PNG")), add(IMAGE[:60] + bytes(40))

    sheet = thumbnails.sheet([(white, ["x" * 1000, "b"]), (broken, []), (None, ["deleted"]), ("0" * 64, [])])

    with Image.open(io.BytesIO(sheet)) as image:
        assert image.size == (4 * 136, 164)
        colours = [image.getpixel((136 * number + 68, 68)) for number in range(4)]
    assert colours[1:] == [(221, 221, 221)] * 3
    assert colours[0][0] > 240 and max(colours[0][1:]) < 15
    assert f"{white}-128" in kept(store)


def test_threads_that_wait_for_thumbnails_are_limited_and_uploads_go_on(
    client: flask.testing.FlaskClient, photos: dict[str, bytes]
) -> None:
    sent = client.post("/requestPrediction/efficientnet_lite0", data=IMAGE, content_type="image/png").get_json()
    slots = get_context(client.application).thumbnails._slots
    taken = 0
    while slots.acquire(None):
        taken += 1

    thumbnail = client.get(f"/requests/{sent['req_id']}/picture?size=160")
    other = client.post("/requestPrediction/efficientnet_lite0", data=photos["rocket"], content_type="image/jpeg")

    assert 0 < taken < 4  # the threads that work
    assert (thumbnail.status_code, thumbnail.get_json()["code"]) == (503, "decoding_unavailable")
    assert thumbnail.headers["Retry-After"] == "2"
    assert other.status_code == 202


def test_one_client_takes_only_half_of_what_may_wait(thumbnails: Thumbnails, add: Callable[[bytes], str]) -> None:
    sha256 = add(IMAGE)

    with thumbnails._slot("a"):
        with pytest.raises(DecodingUnavailable):
            thumbnails.get(sha256, 160, client="a")
        assert thumbnails.get(sha256, 160, client="b")


def test_processes_end_with_their_owner(store: Store, add: Callable[[bytes], str]) -> None:
    thumbnails = Thumbnails(store.images, max_waiting=2)
    thumbnails.get(add(IMAGE), 160)
    pool = thumbnails._pool
    assert len(pool.pids()) == 1

    del thumbnails

    assert pool.pids() == []
    with pytest.raises(DecodingUnavailable):
        pool.run({"do": "thumbnail", "options": {"side": 16}, "inputs": {}})


def test_no_more_pixels_are_accepted_than_are_decoded() -> None:
    assert ServerSettings.from_env({"MLG_MAX_PIXELS": "36000000"}).max_pixels == 36_000_000
    with pytest.raises(ConfigError, match="MLG_MAX_PIXELS"):
        ServerSettings.from_env({"MLG_MAX_PIXELS": "170000000"})

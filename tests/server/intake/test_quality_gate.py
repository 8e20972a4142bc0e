"""Uploads with limits of quality: what is refused and why, and that it holds up nobody else."""

from __future__ import annotations

import io
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flask.testing
import numpy as np
import pytest
from PIL import Image, ImageFilter

from provider_image.errors import BrokenImage, DecodingUnavailable, InvalidParams, WorkerDied
from provider_image.images.quality import measure_image
from provider_image.services import load_service
from server.app import create_app, get_context
from server.errors import NotMeasured, PoorQuality
from server.intake.quality_gate import LIMITS, QualityGate, _read, check_measures, take_limits
from server.settings import ServerSettings
from store.store import Store
from tests.provider_image.conftest import encode_image
from tests.timing import DEADLINE_SECONDS, wait_until

URL, BATCH_URL = "/requestPrediction/efficientnet_lite0", "/requestPredictions/efficientnet_lite0"
MEASURES: dict[str, Any] = {
    "width": 640,
    "height": 480,
    "sharpness": 300.0,
    "brightness": 0.5,
    "contrast": 0.4,
    "dark": 0.1,
    "bright": 0.1,
    "noise": 2.0,
    "tilt": -3.0,
    "uniformity": 0.2,
}
Traces = Callable[[], tuple[list[str], int]]


@pytest.fixture(scope="module")
def sharp(photos: dict[str, bytes]) -> bytes:
    return photos["coffee"]


@pytest.fixture(scope="module")
def blurred(sharp: bytes) -> bytes:
    return encode_image(Image.open(io.BytesIO(sharp)).filter(ImageFilter.GaussianBlur(4)), "JPEG")


@pytest.fixture(scope="module")
def damaged() -> bytes:
    """A PNG whose header and end are right, and whose pixels are not."""
    data = encode_image(Image.linear_gradient("L"), "PNG")
    return data[:100] + bytes(60) + data[160:]


@pytest.fixture(scope="module")
def gate() -> Iterator[QualityGate]:
    found = QualityGate()
    yield found
    found._pool.close()


def post(client: flask.testing.FlaskClient, query: str, data: bytes, **fields: str) -> Any:
    return client.post(f"{URL}{query}", data={**fields, "image": (io.BytesIO(data), "a.jpg")})


def test_blurred_image_is_refused_with_the_measured_value_and_leaves_nothing(
    client: flask.testing.FlaskClient, stored_state: Traces, sharp: bytes, blurred: bytes
) -> None:
    refused = post(client, "?min_sharpness=100", blurred)
    measured = measure_image(blurred)["sharpness"]

    assert (refused.status_code, refused.get_json()["code"]) == (422, "poor_quality")
    assert f"its sharpness is {measured:g}, and min_sharpness requires at least 100" in refused.get_json()["reason"]
    assert stored_state() == ([], 0)
    assert post(client, "?min_sharpness=100", sharp).status_code == 202
    assert post(client, "", blurred).status_code == 202
    assert stored_state()[1] == 2


def test_tilted_image_is_refused_and_a_level_one_is_not(client: flask.testing.FlaskClient) -> None:
    pixels = np.full((400, 500), 200, np.uint8)
    pixels[:, ::50] = pixels[:, 1::50] = 30
    level = Image.fromarray(pixels)
    tilted = level.rotate(6, Image.Resampling.BICUBIC, fillcolor=200)

    codes = [post(client, "?max_tilt=2", encode_image(image, "PNG")).status_code for image in (level, tilted)]

    assert codes == [202, 422]


def test_limit_may_be_a_field_of_the_form_and_empty_there(client: flask.testing.FlaskClient, blurred: bytes) -> None:
    assert post(client, "", blurred, min_sharpness="100").status_code == 422
    assert post(client, "", blurred, min_sharpness="").status_code == 202


def test_form_of_the_page_sets_limits_too(client: flask.testing.FlaskClient, blurred: bytes) -> None:
    fields = {"model": "efficientnet_lite0", "min_sharpness": "100"}

    refused = client.post("/ui/send", data={**fields, "image": (io.BytesIO(blurred), "a.jpg")})

    assert refused.status_code == 422
    assert 'name="min_sharpness"' in client.get("/", headers={"Accept": "text/html"}).text


def test_image_of_a_batch_is_refused_and_the_others_are_accepted(
    client: flask.testing.FlaskClient, stored_state: Traces, sharp: bytes, blurred: bytes, damaged: bytes
) -> None:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for name, data in {"sharp.jpg": sharp, "blurred.jpg": blurred, "damaged.png": damaged}.items():
            archive.writestr(name, data)

    answer = client.post(
        f"{BATCH_URL}?min_sharpness=100", data=body.getvalue(), content_type="application/zip"
    ).get_json()

    assert (answer["accepted"], answer["refused"]) == (1, 2)
    codes = {item["client_id"]: item.get("code") for item in answer["items"]}
    assert codes == {"sharp.jpg": None, "blurred.jpg": "poor_quality", "damaged.png": "broken_image"}
    files, rows = stored_state()
    assert (len(files), rows) == (1, 1)


def test_image_that_cannot_be_decoded_is_broken(
    client: flask.testing.FlaskClient, stored_state: Traces, damaged: bytes
) -> None:
    refused = post(client, "?min_width=1", damaged)

    assert (refused.status_code, refused.get_json()["code"]) == (400, "broken_image")
    assert stored_state() == ([], 0)


@pytest.mark.parametrize("text", ["x", "-1", "nan", "inf", "1e9", "1,5"])
@pytest.mark.parametrize("name", LIMITS)
def test_limit_outside_its_range_is_refused_and_names_the_range(name: str, text: str) -> None:
    with pytest.raises(InvalidParams, match=rf"{name} takes a number from \S+ to "):
        take_limits({name: text})


def test_limits_are_taken_out_of_the_fields() -> None:
    fields = {"top": "3", "min_sharpness": "100", "max_tilt": " 2.5 ", "min_width": ""}

    assert take_limits(fields) == {"min_sharpness": 100, "max_tilt": 2.5}
    assert fields == {"top": "3"}


@pytest.mark.parametrize(
    ("name", "met", "missed"),
    [
        ("min_sharpness", 300, 301),
        ("min_brightness", 0.5, 0.6),
        ("max_brightness", 0.5, 0.4),
        ("min_contrast", 0.4, 0.5),
        ("max_noise", 2, 1.5),
        ("max_tilt", 3, 2.5),
        ("max_uniformity", 0.2, 0.1),
        ("min_width", 640, 641),
        ("min_height", 480, 481),
    ],
)
def test_limit_is_met_up_to_its_value(name: str, met: float, missed: float) -> None:
    check_measures(MEASURES, {name: met})

    with pytest.raises(PoorQuality, match=rf"and {name} requires at (least|most) {missed:g}"):
        check_measures(MEASURES, {name: missed})


def test_every_limit_is_tried_above() -> None:
    assert len(LIMITS) == 9


def test_image_without_lines_meets_every_limit_of_tilt() -> None:
    check_measures({**MEASURES, "tilt": None}, {"max_tilt": 0})


def test_all_limits_that_are_missed_are_named() -> None:
    with pytest.raises(PoorQuality) as caught:
        check_measures(MEASURES, {"min_sharpness": 400, "max_noise": 3, "min_width": 1000})

    assert "sharpness is 300" in caught.value.reason and "width is 640" in caught.value.reason
    assert "noise" not in caught.value.reason


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"width": "x"}', b"[" * 100_000])
def test_answer_of_a_process_that_an_image_controls_is_not_trusted(data: bytes) -> None:
    with pytest.raises(NotMeasured):
        _read(data)


def test_limits_are_for_images(client: flask.testing.FlaskClient) -> None:
    intake = get_context(client.application).intake
    with client.application.test_request_context(), pytest.raises(InvalidParams, match="takes none"):
        intake._check_fields(load_service("text"), {"min_sharpness": "100"})


class BlockingGate:
    """Stands for processes that take long."""

    def __init__(self) -> None:
        self.count = 0
        self.is_open = threading.Event()

    def check(self, *arguments: Any, **options: Any) -> None:
        self.count += 1
        assert self.is_open.wait(DEADLINE_SECONDS)


def test_images_that_are_measured_hold_up_no_other_upload(settings: ServerSettings, store: Store, sharp: bytes) -> None:
    app = create_app(settings, store)
    gate = get_context(app).intake._quality_gate = BlockingGate()

    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(post, app.test_client(), "?min_sharpness=1", sharp) for _ in range(2)]
        wait_until(lambda: gate.count == 2)
        others = [post(app.test_client(), "", sharp) for _ in range(4)]
        too_many = post(app.test_client(), "?min_sharpness=1", sharp)
        gate.is_open.set()

        assert [other.status_code for other in others] == [202] * 4
        assert (too_many.status_code, too_many.headers["Retry-After"]) == (503, "30")
        assert [each.result().status_code for each in waiting] == [202] * 2


def test_batch_whose_images_take_too_long_to_measure_refuses_the_rest(
    client: flask.testing.FlaskClient, sharp: bytes
) -> None:
    get_context(client.application).intake._quality_gate = QualityGate(batch_seconds=0)

    body = {"image": [(io.BytesIO(sharp), "a.jpg"), (io.BytesIO(sharp), "b.jpg")]}
    answer = client.post(f"{BATCH_URL}?min_sharpness=1", data=body).get_json()

    assert (answer["accepted"], answer["refused"]) == (0, 2)
    assert {item["code"] for item in answer["items"]} == {"not_measured"}


def test_image_of_a_batch_that_waits_for_a_process_until_the_time_is_over_is_refused_alone(
    store: Store, sharp: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, waited, staged = QualityGate(batch_seconds=0.5), list[float](), store.images.stage(sharp)

    def wait(job: object, *, wait_seconds: float) -> None:
        waited.append(wait_seconds)
        time.sleep(wait_seconds)
        raise DecodingUnavailable()

    monkeypatch.setattr(busy._pool, "run", wait)
    check = busy.batch_check({"min_sharpness": 1})

    with pytest.raises(NotMeasured, match="Send the rest as another batch"):
        check(staged)
    assert 0 < waited[0] <= 0.5


def test_image_that_kills_its_process_is_broken_and_none_that_finds_no_process_is(
    gate: QualityGate, store: Store, sharp: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = store.images.stage(sharp)
    monkeypatch.setattr(gate._pool, "run", lambda *arguments, **options: WorkerDied("It died."))
    with pytest.raises(BrokenImage, match="It died"):
        gate.check(staged, {"min_sharpness": 1})

    monkeypatch.undo()
    gate._pool.close()
    with pytest.raises(DecodingUnavailable):
        gate.check(staged, {"min_sharpness": 1})

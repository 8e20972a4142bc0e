"""The service `style_transfer`: what it takes and gives, what it refuses of a provider, and what a check says."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from provider_image.__main__ import main
from provider_image.backends import Device
from provider_image.check import check_model
from provider_image.errors import BadInput, BrokenArtefact, MalformedResults
from provider_image.images.outputs import encode_image
from provider_image.models.artefact import Artefact, compute_digest, read_artefact
from provider_image.precision import TOLERANCE
from provider_image.progress import MAX_PREVIEW_BYTES, ProgressBoard, reporting
from provider_image.service import Output, check_params
from provider_image.services import chunk_items, load_service
from tests.style_models import QUICK_PARAMS, install_quick_texture

SERVICE = load_service("style_transfer")


@pytest.fixture(scope="module")
def artefact(tmp_path_factory) -> Artefact:
    return install_quick_texture(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def net(artefact):
    return SERVICE.load(artefact, Device(threads=1))


def image(width: int, height: int, seed: int = 1, format: str = "png") -> bytes:
    return encode_image(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8), format)


def transfer(net, content: bytes, style: bytes, **params) -> Output:
    checked = check_params(SERVICE.params, {**QUICK_PARAMS, **params})
    item = SERVICE.prepare(net.artefact, {"image": content, "style": style}, checked)
    (output,) = SERVICE.run(net, [item], [checked])
    SERVICE.check_output(net.artefact, checked, output)
    return output


def opened(output: Output) -> Image.Image:
    return Image.open(io.BytesIO(output.files["image"]))


@pytest.mark.parametrize(
    ("size", "asked", "expected"),
    [((300, 200), 96, (96, 64)), ((60, 40), 96, (60, 40)), ((2000, 1000), 1024, (181, 90)), ((40, 400), 96, None)],
)
def test_answer_fits_into_what_was_asked_and_into_what_the_model_allows(net, size, asked, expected) -> None:
    if expected is None:
        with pytest.raises(BadInput, match="at least 16 on each side"):
            transfer(net, image(*size), image(50, 50), size=asked)
        return

    output = transfer(net, image(*size), image(50, 50), size=asked)

    assert opened(output).size == expected == (output.data["width"], output.data["height"])


@pytest.mark.parametrize("format", ["jpeg", "png"])
def test_answer_has_the_format_that_was_asked_for(net, format) -> None:
    output = transfer(net, image(50, 40), image(40, 30, seed=2), format=format)

    assert opened(output).format == format.upper()


def test_iterations_are_the_models_own_unless_a_request_says_otherwise(net) -> None:
    found = [transfer(net, image(40, 40), image(40, 40, seed=2), iterations=count).data for count in (0, 1, 5)]

    assert [(each["iterations"], each["complete"]) for each in found] == [(3, True), (1, True), (5, True)]


def test_answer_after_the_time_is_over_says_so(net) -> None:
    output = transfer(net, image(128, 128), image(128, 128, seed=2), size=128, iterations=500, seconds=0.1)

    assert 0 < output.data["iterations"] < 500 and output.data["complete"] is False


def test_message_says_which_image_cannot_be_used(net) -> None:
    with pytest.raises(BadInput, match=r"^The style: "):
        transfer(net, image(50, 50), b"no image")


def test_how_far_it_is_is_reported_with_a_small_image(net) -> None:
    board = ProgressBoard()

    with reporting(board, [7]):
        transfer(net, image(1000, 800), image(40, 40, seed=2), size=1024)

    (report,) = board.take()
    assert report.item == 7 and 0 < report.fraction <= 1
    assert len(report.preview) <= MAX_PREVIEW_BYTES
    assert max(Image.open(io.BytesIO(report.preview)).size) <= 256


def test_worker_computes_products_of_matrices_in_one_thread(monkeypatch, capsys) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "gone after the test")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")

    main(["check", "/nowhere/texture"])

    assert os.environ["OPENBLAS_NUM_THREADS"] == "1"


def test_chunk_has_one_item() -> None:
    assert (chunk_items("style_transfer"), chunk_items("classification"), chunk_items("gone")) == (1, 16, 16)


@pytest.fixture(scope="module")
def answer(net) -> Output:
    return transfer(net, image(90, 60), image(50, 50, seed=2))


@pytest.mark.parametrize(
    "forge",
    [
        lambda data, files: data.pop("width"),
        lambda data, files: data.update(more=1),
        lambda data, files: data.update(width=91),
        lambda data, files: data.update(width=90.0),
        lambda data, files: data.update(height=True),
        lambda data, files: data.update(complete=1),
        lambda data, files: data.update(complete=False),
        lambda data, files: data.update(iterations=13),
        lambda data, files: data.update(iterations=-1),
        lambda data, files: data.update(iterations=11),
        lambda data, files: files.update(image=image(90, 60, format="jpeg")),
        lambda data, files: files.update(image=image(60, 90)),
        lambda data, files: (data.update(width=120, height=80), files.update(image=image(120, 80))),
    ],
)
def test_forged_answer_is_refused(artefact, answer, forge) -> None:
    params = check_params(SERVICE.params, QUICK_PARAMS)
    forged = Output(data=dict(answer.data), files=dict(answer.files))
    SERVICE.check_output(artefact, params, forged)
    forge(forged.data, forged.files)

    with pytest.raises((MalformedResults, BadInput)):
        SERVICE.check_output(artefact, params, forged)


def changed(output: Output, change) -> Output:
    pixels = np.asarray(opened(output), np.int16)
    return Output(
        data=output.data, files={"image": encode_image(np.clip(change(pixels), 0, 255).astype(np.uint8), "png")}
    )


def test_answer_of_another_processor_is_the_same_and_that_of_a_liar_is_not(net) -> None:
    content, style = encode_image(np.full((60, 90, 3), 120, np.uint8), "png"), image(50, 50)
    answer = transfer(net, content, style, iterations=50)
    random = np.random.default_rng(9)

    slightly = changed(answer, lambda pixels: pixels + random.integers(-3, 4, pixels.shape, np.int16))
    untouched = changed(answer, lambda pixels: np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), np.int16))
    smaller = Output(data={**answer.data, "iterations": 49}, files=answer.files)

    assert SERVICE.compare(answer, slightly, TOLERANCE).largest == 0
    assert SERVICE.compare(answer, untouched, TOLERANCE).largest > 0.05
    assert SERVICE.compare(answer, smaller, TOLERANCE).largest == 1
    assert SERVICE.compare(answer, Output(data=answer.data, files={"image": b"x"}), TOLERANCE).largest == 1
    assert SERVICE.compare(Output(data=answer.data), answer, TOLERANCE).largest == 0


def test_model_is_checked_like_any_other(artefact) -> None:
    report = check_model(artefact.folder, Device(threads=1), seconds=0.01)

    assert report.problem is None
    assert artefact.samples[0].inputs.keys() == {"style"}


@pytest.mark.parametrize("kind", ["inputs", "files"])
def test_check_notices_a_changed_file_of_the_self_test(artefact, tmp_path, kind) -> None:
    folder = shutil.copytree(artefact.folder, tmp_path / "texture")
    ((file, _),) = getattr(artefact.samples[0], kind).values()
    (folder / file).write_bytes(b"another")

    assert "cannot be used" in check_model(folder, Device(threads=1), seconds=0.01).problem


def test_check_notices_another_answer(artefact, tmp_path) -> None:
    folder = shutil.copytree(artefact.folder, tmp_path / "texture")
    facts = json.loads((folder / "model.json").read_text())
    # The content in place of the answer.
    sample = facts["samples"][0]
    original = Image.open(folder / sample["file"]).convert("RGB")
    original.save(folder / sample["files"]["image"][0], "PNG")
    sample["files"]["image"][1] = hashlib.sha256((folder / sample["files"]["image"][0]).read_bytes()).hexdigest()
    (folder / "model.json").write_text(json.dumps(facts))

    assert "other results than recorded" in check_model(folder, Device(threads=1), seconds=0.01).problem


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "magic", "iterations": 3, "max_pixels": 1000},
        {"method": "texture", "iterations": 0, "max_pixels": 1000},
        {"method": "texture", "iterations": 10**9, "max_pixels": 1000},
        {"method": "texture", "iterations": 3.5, "max_pixels": 1000},
        {"method": "texture", "iterations": 3, "max_pixels": 10**12},
        {"method": "texture", "iterations": 3},
        {"method": "gradient", "iterations": 3, "max_pixels": 1000},
        [],
    ],
)
def test_artefact_with_impossible_settings_is_broken(artefact, tmp_path, settings) -> None:
    folder = shutil.copytree(artefact.folder, tmp_path / "texture")
    content = json.dumps(settings).encode()
    (folder / "style.json").write_bytes(content)
    facts = json.loads((folder / "model.json").read_text())
    facts["files"]["style.json"] = [len(content), hashlib.sha256(content).hexdigest()]
    (folder / "model.json").write_text(json.dumps(facts))
    facts["digest"] = compute_digest(read_artefact(folder))
    (folder / "model.json").write_text(json.dumps(facts))

    with pytest.raises(BrokenArtefact, match=r"cannot be read|has no model\.xml"):
        SERVICE.load(read_artefact(folder), Device(threads=1))

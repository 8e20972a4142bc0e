"""Every Keras model of the catalogue, compiled, answers as Keras itself does.

The weights are seeded: `tests.seeded_weights` makes a network that tells photos apart, its file goes the whole way that
a published one goes, and the artefact's answers are compared with that network's own, on photos of many sizes and
modes.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from provider_image.compiler import keras_applications, keras_graph
from provider_image.compiler.keras_weights import WeightsFile, WeightsSources, find_weights
from provider_image.errors import CompilationFailed, WeightsMismatch
from provider_image.models.artefact import find_artefact
from provider_image.models.catalogue import CATALOGUE, ModelRow
from provider_image.precision import TOLERANCE
from provider_image.services import load_service
from provider_image.services.classification import top_labels
from tests.seeded_weights import seeded_network, write_weights

ROWS = [row for row in CATALOGUE.values() if row.source == "keras"]
SMALL = CATALOGUE["mobilenet_v2"]
#: Name of the photo's file in scikit-image, mode, size and format: larger and smaller than the input, very wide, grey,
#: transparent, for print, with a palette, and lying on its side.
PICTURES = (
    ("chelsea.png", "RGB", (500, 375), "JPEG"),
    ("coffee.png", "RGB", (1600, 1200), "JPEG"),
    ("rocket.jpg", "RGB", (120, 90), "PNG"),
    ("astronaut.png", "RGB", (300, 700), "WEBP"),
    ("camera.png", "L", (512, 512), "JPEG"),
    ("chelsea.png", "RGBA", (451, 300), "PNG"),
    ("coffee.png", "CMYK", (600, 400), "JPEG"),
    ("rocket.jpg", "P", (640, 427), "GIF"),
    ("motorcycle_left.png", "SIDEWAYS", (741, 500), "JPEG"),
)


def picture(file: str, mode: str, size: tuple[int, int], format: str) -> tuple[bytes, Image.Image]:
    """Make a picture file and, by Pillow alone, what a person sees of it in RGB."""
    import skimage

    image = Image.open(Path(skimage.__file__).parent / "data" / file).convert("RGB").resize(size)
    options = {"lossless": True} if format == "WEBP" else {"quality": 95} if format == "JPEG" else {}
    stored = image
    if mode == "RGBA":
        stored = image.convert("RGBA")
        stored.putalpha(Image.linear_gradient("L").resize(size))
    elif mode == "SIDEWAYS":
        stored = image.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif
    elif mode != "RGB":
        stored = image.convert(mode)
    file_ = io.BytesIO()
    stored.save(file_, format, **options)
    seen = Image.open(io.BytesIO(file_.getvalue()))
    if mode == "SIDEWAYS":
        seen = seen.transpose(Image.Transpose.ROTATE_270)
    if mode == "RGBA":
        seen = Image.alpha_composite(Image.new("RGBA", size, "white"), seen)
    return file_.getvalue(), seen.convert("RGB")


def keras_says(row: ModelRow, network, images: list[Image.Image]) -> np.ndarray:
    """Answer as anybody would with Keras: bicubic to the input's size, the module's preprocess_input, predict."""
    module = importlib.import_module(getattr(importlib.import_module("keras").applications, row.keras_class).__module__)
    side = (row.width, row.height)
    arrays = [np.asarray(image.resize(side, Image.Resampling.BICUBIC), np.float32) for image in images]
    return np.concatenate(
        [np.asarray(network(module.preprocess_input(array[None]), training=False)) for array in arrays]
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_compiled_model_answers_as_keras_does(row, tmp_path):
    pictures = [picture(*each) for each in PICTURES]
    network = seeded_network(row)
    expected = keras_says(row, network, [image for _, image in pictures])
    path = tmp_path / row.weights.file
    write_weights(network, path)
    del network

    artefact = keras_applications.build(tmp_path / "models", row, find_weights(row, sources(tmp_path)))

    path.unlink()
    service = load_service(artefact.service)
    net = service.load(artefact, 2, "f32")
    found = [net.infer(service.prepare(artefact, {"image": data})) for data, _ in pictures]
    shutil.rmtree(tmp_path / "models")
    for right, answer in zip(expected, found, strict=True):
        # Neither flat (0.001) nor certain, or the comparison would say little.
        assert 0.005 < right.max() < 0.9
        assert np.abs(answer - right).max() <= TOLERANCE
        assert np.abs(np.log(answer) - np.log(right)).max() <= 0.01
        pair = [top_labels(artefact.labels, each) for each in (right, answer)]
        assert service.compare(*pair, 2e-6).is_same_order
    assert len({top_labels(artefact.labels, right)[0][0] for right in expected}) >= 3, "it sees no difference"
    assert np.abs(answer.sum() - 1) < 1e-4


def sources(folder: Path) -> WeightsSources:
    return WeightsSources(given=folder, cache=folder / "nowhere")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> WeightsFile:
    """Seeded weights of a small model."""
    folder = tmp_path_factory.mktemp("weights")
    write_weights(seeded_network(SMALL), folder / SMALL.weights.file)
    return find_weights(SMALL, sources(folder))


@pytest.fixture(scope="module")
def models(tmp_path_factory, weights) -> Path:
    """A models folder with the small model."""
    folder = tmp_path_factory.mktemp("models")
    keras_applications.build(folder, SMALL, weights)
    return folder


def test_compiling_twice_gives_the_same_digest_and_the_same_files(tmp_path, models, weights):
    first = find_artefact(models, SMALL.name)

    second = keras_applications.build(tmp_path, SMALL, weights)

    assert second.digest == first.digest
    assert second.files["model.bin"] == first.files["model.bin"]


def test_other_weights_give_another_digest(tmp_path, models):
    write_weights(seeded_network(SMALL, seed=8), tmp_path / SMALL.weights.file)

    other = keras_applications.build(tmp_path / "models", SMALL, find_weights(SMALL, sources(tmp_path)))

    assert other.digest != find_artefact(models, SMALL.name).digest


def test_same_weights_are_not_compiled_again(models, weights):
    steps = []

    again = keras_applications.build(models, SMALL, weights, on_step=steps.append)

    assert again == find_artefact(models, SMALL.name)
    assert not steps


def test_f16_is_kept_when_it_costs_no_more_than_allowed_and_is_told_apart(tmp_path, models, weights):
    exact = find_artefact(models, SMALL.name)

    half = keras_applications.build(tmp_path, SMALL, weights, f16_within=1.0)

    assert (exact.storage.kept, half.storage.kept) == ("f32", "f16")
    assert half.storage.largest_difference == exact.storage.largest_difference > TOLERANCE
    assert half.size_bytes == half.storage.f16_bytes < 0.6 * exact.size_bytes
    assert half.digest != exact.digest


def test_artefact_records_what_keras_answered(models):
    artefact = find_artefact(models, SMALL.name)
    net = load_service("classification").load(artefact, 1, "f32")

    assert artefact.reference.startswith("keras 3")
    assert artefact.source == "own"
    for sample in artefact.samples:
        picture = {"image": (artefact.folder / sample.file).read_bytes()}
        output = net.infer(load_service("classification").prepare(artefact, picture))
        difference = load_service("classification").compare(sample.output, top_labels(artefact.labels, output), 1e-4)
        assert difference.largest <= TOLERANCE and difference.is_same_order


def test_keras_settings_of_the_machine_change_nothing(tmp_path, models, weights):
    keras = importlib.import_module("keras")
    keras.config.set_image_data_format("channels_first")
    keras.config.set_dtype_policy("mixed_bfloat16")

    artefact = keras_applications.build(tmp_path, SMALL, weights)

    assert keras.config.image_data_format() == "channels_last"
    assert artefact.files["model.bin"] == find_artefact(models, SMALL.name).files["model.bin"]


@pytest.mark.parametrize("content", [b"", b"not HDF5 at all", None])
def test_file_that_holds_no_such_weights_is_refused(tmp_path, weights, content):
    path = tmp_path / "weights.h5"
    path.write_bytes(weights.path.read_bytes()[:100_000] if content is None else content)

    with pytest.raises(WeightsMismatch, match=r"weights\.h5 does not contain the weights of MobileNetV2"):
        keras_applications.build(
            tmp_path / "models", SMALL, find_weights(SMALL, WeightsSources(given=path, cache=tmp_path))
        )

    assert not (tmp_path / "models" / SMALL.name).exists()


def test_weights_of_another_model_are_refused(tmp_path, weights):
    with pytest.raises(WeightsMismatch, match="does not contain the weights of ResNet50V2"):
        keras_applications.build(tmp_path, CATALOGUE["resnet50v2"], weights)


@pytest.mark.parametrize("wrong", ["caffe", "torch", "unit", "none"])
def test_graph_with_another_preprocessing_than_keras_is_not_installed(tmp_path, weights, wrong):
    # The original fed three models the preprocessing of others. Compiling finds it, whatever the catalogue says.
    row = dataclasses.replace(SMALL, preprocessing=wrong)

    with pytest.raises(CompilationFailed, match="gives other results than keras"):
        keras_applications.build(tmp_path, row, weights)

    assert list(tmp_path.glob("[!.]*")) == []


def test_missing_tensorflow_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)

    with pytest.raises(keras_graph.CompilerMissing, match=r"pip install \"mlg\[compile\]\""):
        keras_graph.import_keras()


def test_recorded_facts_are_readable_json(models):
    facts = json.loads((models / SMALL.name / "model.json").read_text())

    assert set(facts["storage"]) == {"kept", "f32_bytes", "f16_bytes", "largest_difference", "is_same_top_five"}
    assert len(facts["self_test"]["samples"]) >= 4

"""Every Keras model of the catalogue, compiled, answers as Keras itself does: `scripts/test -m every_model`.

Without that option, the larger ones of an architecture are left out.

The weights are seeded: `tests.seeded_weights` makes a network that tells photos apart, its file is compiled as a
published one is, and the artefact's answers are compared with that network's own, on photos of many sizes and modes.
What holds for every model alike is tested on a small network.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import importlib
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from provider_image.backends import Device
from provider_image.backends.openvino import import_openvino
from provider_image.check import check_model
from provider_image.compiler import embedding, keras_applications, keras_graph
from provider_image.compiler.keras_weights import KERAS_WEIGHTS_URL, WeightsFile, WeightsSources, find_weights
from provider_image.errors import CompilationFailed, WeightsMismatch
from provider_image.models.artefact import Artefact, find_artefact
from provider_image.models.catalogue import CATALOGUE, ModelRow
from provider_image.precision import TOLERANCE
from provider_image.service import Output
from provider_image.services import load_service
from provider_image.services.classification import top_labels
from tests.seeded_weights import call, seeded_network, write_weights

ROWS = [row for row in CATALOGUE.values() if row.source == "keras" and row.service == "classification"]
SMALL = CATALOGUE["mobilenet_v2"]
#: Models that differ from others only in depth and width, or are made of their blocks.
LARGER = {
    "inception_resnet_v2",
    "xception",
    "densenet169",
    "densenet201",
    "resnet101",
    "resnet152",
    "resnet101v2",
    "resnet152v2",
    "vgg19",
    "nasnet_large",
}
#: A row of the small network that `small_network` registers with Keras.
TINY = dataclasses.replace(SMALL, keras_class="TinyNet")
#: Name of the photo's file in scikit-image, mode, size and format: larger and smaller than the input, very wide, grey,
#: transparent, for print, with a palette, and lying on its side.
PHOTOS = (
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
#: Largest length of the difference of two vectors, where it is more than for the labels of the same model.
VECTOR_TOLERANCES = {"convnext_tiny": 2e-3}
#: How many of them each model answers; the smallest one answers all.
PHOTOS_EACH = 5


@functools.cache
def photo(file: str, mode: str, size: tuple[int, int], format: str) -> tuple[bytes, Image.Image]:
    """Make an image file and, by Pillow alone, what a person sees of it in RGB."""
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


def photos_for(row: ModelRow) -> list[tuple[bytes, Image.Image]]:
    """Return the photos that a model answers: not the same for every model, so that each is answered by many."""
    first = ROWS.index(row)
    count = len(PHOTOS) if row is SMALL else PHOTOS_EACH
    return [photo(*PHOTOS[(first + number) % len(PHOTOS)]) for number in range(count)]


def keras_answers(row: ModelRow, network, images: list[Image.Image]) -> Any:
    """Answer as anybody would with Keras: bicubic to the input's size, the module's preprocess_input, a call."""
    module = importlib.import_module(getattr(importlib.import_module("keras").applications, row.keras_class).__module__)
    side = (row.width, row.height)
    arrays = [np.asarray(image.resize(side, Image.Resampling.BICUBIC), np.float32) for image in images]
    return call(network, module.preprocess_input(np.stack(arrays)))


def keras_vectors(row: ModelRow, network, images: list[Image.Image]) -> list[np.ndarray]:
    """What a sub-model of Keras returns before the last layer, with the length 1."""
    keras = importlib.import_module("keras")
    return unit_length(np.asarray(keras_answers(row, keras.Model(network.input, network.layers[-1].input), images)))


def unit_length(vectors: np.ndarray) -> list[np.ndarray]:
    wide = vectors.astype(np.float64)
    return list(wide / np.linalg.norm(wide, axis=1, keepdims=True))


def embed(artefact: Artefact, images: list[np.ndarray]) -> list[np.ndarray]:
    """What the graph of an installed classifier returns after it was cut."""
    core = import_openvino().Core()
    graph = embedding.cut(core.read_model(artefact.folder / "model.xml"), artefact.name)
    compiled = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [compiled(image[None])[0][0].copy() for image in images]


@dataclasses.dataclass
class KerasModel:
    """What Keras does for a user who names a model: a network, and a call of its downloader."""

    row: ModelRow
    #: None once a test has used it up.
    network: Any
    #: (file, address, hash) that the downloader was asked for.
    asked: tuple[str, str, str | None]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(row, marks=[pytest.mark.every_model] if row.name in LARGER else [], id=row.name) for row in ROWS
    ],
)
def keras_model(request: pytest.FixtureRequest) -> Iterator[KerasModel]:
    """Each model by Keras' own loading code, with its downloader replaced by one that downloads nothing."""
    row = request.param
    keras = keras_graph.import_keras()
    module = importlib.import_module(getattr(keras.applications, row.keras_class).__module__)
    module = getattr(module, "resnet", module)  # resnet_v2 leaves loading to resnet
    keras.utils.set_random_seed(7)
    with (
        mock.patch.object(module.file_utils, "get_file", return_value="downloaded.h5") as get_file,
        mock.patch.object(keras.Model, "load_weights") as load_weights,
    ):
        network = getattr(keras.applications, row.keras_class)()
    load_weights.assert_called_once_with("downloaded.h5")
    (call,) = get_file.call_args_list
    file, url = (*call.args, call.kwargs.get("origin"))[:2]
    yield KerasModel(row, network, (file, url, call.kwargs.get("file_hash")))
    # Keras remembers every network, and the allocator keeps what is freed.
    keras.backend.clear_session()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@pytest.mark.slow
def test_row_names_the_file_that_keras_itself_asks_for(keras_model):
    weights = keras_model.row.weights

    assert keras_model.asked == (weights.file, KERAS_WEIGHTS_URL + weights.address, weights.hash)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_model_answers_as_keras_does(keras_model, tmp_path):
    row, photos = keras_model.row, photos_for(keras_model.row)
    network, keras_model.network = seeded_network(row, make=lambda: keras_model.network), None
    keras = importlib.import_module("keras")
    both = keras.Model(network.input, [network.layers[-1].input, network.output])
    vectors, expected = (np.asarray(each) for each in keras_answers(row, both, [seen for _, seen in photos]))
    vectors = unit_length(vectors)
    path = tmp_path / row.weights.file
    write_weights(network, path)
    del network, both

    artefact = keras_applications.build(tmp_path / "models", row, find_weights(row, sources(tmp_path)))

    path.unlink()
    service = load_service(artefact.service)
    net = service.load(artefact, Device(threads=2))
    images = [service.prepare(artefact, {"image": data}, {}) for data, _ in photos]
    found = net.infer(images)
    for right, vector in zip(vectors, embed(artefact, images), strict=True):
        # Two unit vectors of which the difference is as short as the tolerance have the cosine 1 - 5e-9.
        assert vector.shape == (CATALOGUE[f"{row.name}_embedding"].dimensions,)
        assert np.linalg.norm(vector - right) <= VECTOR_TOLERANCES.get(row.name, TOLERANCE)
    shutil.rmtree(tmp_path / "models")
    for right, answer in zip(expected, found, strict=True):
        # Neither flat (0.001) nor certain, or the comparison would say little.
        assert 0.005 < right.max() < 0.9
        assert np.abs(answer - right).max() <= TOLERANCE
        assert np.abs(np.log(answer) - np.log(right)).max() <= 0.01
        assert np.abs(answer.sum() - 1) < 1e-4
        # Labels that are nearer together than two answers within the tolerance may change places.
        pair = [Output(data=top_labels(artefact.labels, each)) for each in (right, answer)]
        assert service.compare(*pair, 2 * TOLERANCE).is_same_order
    assert len({top_labels(artefact.labels, right)[0][0] for right in expected}) >= 3, "the photos get the same labels"


def small_network(weights: None = None) -> Any:
    """Make a classifier of a few layers that takes what MobileNetV2 takes."""
    keras = keras_graph.import_keras()
    image = keras.Input((SMALL.height, SMALL.width, 3))
    network = keras.layers.Conv2D(16, 7, strides=4, name="first")(image)
    network = keras.layers.BatchNormalization(name="first_bn")(network)
    network = keras.layers.ReLU(name="first_relu")(network)
    network = keras.layers.Conv2D(64, 5, strides=4, name="second")(network)
    network = keras.layers.GlobalMaxPooling2D(name="pool")(network)
    return keras.Model(image, keras.layers.Dense(1000, activation="softmax", name="predictions")(network))


def sources(folder: Path) -> WeightsSources:
    return WeightsSources(given=folder, cache=folder / "nowhere")


@pytest.fixture(scope="module", autouse=True)
def registered_network() -> Iterator[None]:
    """The small network among those that Keras has, with the preprocessing of MobileNetV2."""
    keras = keras_graph.import_keras()
    small_network.__module__ = importlib.import_module("keras.applications.mobilenet_v2").preprocess_input.__module__
    with mock.patch.object(keras.applications, TINY.keras_class, small_network, create=True):
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory, registered_network) -> WeightsFile:
    """Seeded weights of the small network."""
    folder = tmp_path_factory.mktemp("weights")
    write_weights(seeded_network(TINY), folder / TINY.weights.file)
    return find_weights(TINY, sources(folder))


@pytest.fixture(scope="module")
def models(tmp_path_factory, weights) -> Path:
    """A models folder with the small network."""
    folder = tmp_path_factory.mktemp("models")
    keras_applications.build(folder, TINY, weights)
    return folder


def test_compiling_twice_gives_the_same_digest_and_the_same_files(tmp_path, models, weights):
    first = find_artefact(models, TINY.name)

    second = keras_applications.build(tmp_path, TINY, weights)

    assert second.digest == first.digest
    assert second.files["model.bin"] == first.files["model.bin"]


def test_other_weights_give_another_digest(tmp_path, models):
    write_weights(seeded_network(TINY, seed=8), tmp_path / TINY.weights.file)

    other = keras_applications.build(tmp_path / "models", TINY, find_weights(TINY, sources(tmp_path)))

    assert other.digest != find_artefact(models, TINY.name).digest


def test_same_weights_are_not_compiled_again(models, weights):
    steps = []

    again = keras_applications.build(models, TINY, weights, on_step=steps.append)

    assert again == find_artefact(models, TINY.name)
    assert not steps


def test_f16_is_kept_when_it_costs_no_more_than_allowed_and_has_another_digest(tmp_path, models, weights):
    exact = find_artefact(models, TINY.name)

    half = keras_applications.build(tmp_path, TINY, weights, f16_within=1.0)

    assert (exact.precision, half.precision) == ("f32", "f16")
    assert half.storage.largest_difference == exact.storage.largest_difference > TOLERANCE
    assert half.size_bytes == half.storage.f16_bytes < 0.6 * exact.size_bytes
    assert half.digest != exact.digest


def test_artefact_records_what_keras_answered(models):
    artefact = find_artefact(models, TINY.name)
    net = load_service("classification").load(artefact, Device(threads=1))

    assert artefact.reference.startswith("keras 3")
    assert artefact.source == "own"
    for sample in artefact.samples:
        image = {"image": (artefact.folder / sample.file).read_bytes()}
        service = load_service("classification")
        (output,) = service.run(net, [service.prepare(artefact, image, {})], [{}])
        difference = service.compare(Output(data=sample.output), output, 1e-4)
        assert difference.largest <= TOLERANCE and difference.is_same_order


def test_embedding_of_an_installed_model_is_what_keras_computes_before_the_last_layer(tmp_path, models):
    network = seeded_network(TINY)
    (tmp_path / TINY.name).symlink_to(models / TINY.name)

    artefact = embedding.build(tmp_path, TINY.name)

    assert (artefact.name, artefact.service, artefact.dimensions) == ("mobilenet_v2_embedding", "embedding", 64)
    assert artefact.reference == find_artefact(models, TINY.name).reference
    assert len(artefact.samples) >= 4
    for sample in artefact.samples:
        image = Image.open(artefact.folder / sample.file).convert("RGB")
        (right,) = keras_vectors(TINY, network, [image])
        recorded = np.fromfile(artefact.folder / sample.files["vector"][0], "<f4")
        assert np.linalg.norm(recorded - right) <= TOLERANCE
    assert check_model(artefact.folder, Device(threads=1), seconds=0.01).is_ok


def test_embedding_of_a_model_with_f16_weights_keeps_them(tmp_path, weights):
    classifier = keras_applications.build(tmp_path, TINY, weights, f16_within=1.0)

    artefact = embedding.build(tmp_path, TINY.name)

    assert (classifier.precision, artefact.precision, artefact.storage) == ("f16", "f16", None)
    assert check_model(artefact.folder, Device(threads=1), seconds=0.01).is_ok


def test_embedding_of_a_model_that_gives_other_labels_than_it_recorded_is_refused(tmp_path, models):
    folder = shutil.copytree(models / TINY.name, tmp_path / TINY.name)
    facts = json.loads((folder / "model.json").read_text())
    facts["samples"][1]["output"][0][2] += 0.05
    (folder / "model.json").write_text(json.dumps(facts))

    with pytest.raises(CompilationFailed, match="gives other labels than it recorded"):
        embedding.build(tmp_path, TINY.name)

    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == [TINY.name]


def test_keras_settings_of_the_machine_change_nothing(tmp_path, models, weights):
    keras = importlib.import_module("keras")
    keras.config.set_image_data_format("channels_first")
    keras.config.set_dtype_policy("mixed_bfloat16")

    artefact = keras_applications.build(tmp_path, TINY, weights)

    assert keras.config.image_data_format() == "channels_last"
    assert artefact.files["model.bin"] == find_artefact(models, TINY.name).files["model.bin"]


@pytest.mark.parametrize("content", [b"", b"not HDF5 at all", None])
def test_file_that_holds_no_such_weights_is_refused(tmp_path, weights, content):
    path = tmp_path / "weights.h5"
    path.write_bytes(weights.path.read_bytes()[:100_000] if content is None else content)

    with pytest.raises(WeightsMismatch, match=r"weights\.h5 does not contain the weights of MobileNetV2"):
        keras_applications.build(
            tmp_path / "models", TINY, find_weights(TINY, WeightsSources(given=path, cache=tmp_path))
        )

    assert not (tmp_path / "models" / TINY.name).exists()


def test_weights_that_are_stored_in_another_file_are_refused(tmp_path, weights):
    import h5py

    path, secret = tmp_path / "weights.h5", tmp_path / "id_rsa"
    shutil.copyfile(weights.path, path)
    found: list[Any] = []
    with h5py.File(path, "r+") as file:
        file.visititems(lambda name, entry: found.append(entry) if isinstance(entry, h5py.Dataset) else None)
        name, shape, size = found[0].name, found[0].shape, found[0].nbytes
        secret.write_bytes(bytes(size))
        del file[name]
        file.create_dataset(name, shape, "f4", external=[(str(secret), 0, size)])

    with pytest.raises(WeightsMismatch, match="from another file"):
        keras_applications.build(
            tmp_path / "models", TINY, find_weights(TINY, WeightsSources(given=path, cache=tmp_path))
        )


def test_weights_of_another_model_are_refused(tmp_path, weights):
    with pytest.raises(WeightsMismatch, match="does not contain the weights of MobileNetV2"):
        keras_applications.build(tmp_path, SMALL, weights)


@pytest.mark.parametrize("wrong", ["caffe", "torch", "unit", "none"])
def test_graph_with_another_preprocessing_than_keras_is_not_installed(tmp_path, weights, wrong):
    # A catalogue that names the preprocessing of another model is noticed.
    row = dataclasses.replace(TINY, preprocessing=wrong)

    with pytest.raises(CompilationFailed, match="gives other results than keras"):
        keras_applications.build(tmp_path, row, weights)

    assert list(tmp_path.glob("[!.]*")) == []


def test_missing_tensorflow_names_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)

    with pytest.raises(keras_graph.CompilerMissing, match=r"pip install \"mlg\[compile\]\""):
        keras_graph.import_keras()


def test_recorded_facts_are_readable_json(models):
    facts = json.loads((models / TINY.name / "model.json").read_text())

    assert set(facts["storage"]) == {"f32_bytes", "f16_bytes", "largest_difference", "is_same_top_five"}
    assert len(facts["samples"]) >= 4

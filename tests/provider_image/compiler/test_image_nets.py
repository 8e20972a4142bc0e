"""Nets that take an image and return one: an image in parts equals what the saved net gives for the whole of it."""

from __future__ import annotations

import functools
import io
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from provider_image.backends import Device
from provider_image.check import check_model
from provider_image.compiler.custom import CustomModel
from provider_image.compiler.image_nets.builder import build_keras, build_onnx
from provider_image.compiler.image_nets.facts import find_margin
from provider_image.errors import (
    BrokenArtefact,
    ConfigError,
    ImageTooLarge,
    MalformedResults,
    ModelError,
    UnsuitableModel,
)
from provider_image.images.headers import read_header
from provider_image.images.outputs import MAX_OUTPUT_PIXELS
from provider_image.models.artefact import Artefact, compute_digest, read_artefact
from provider_image.service import Output, check_params
from provider_image.services import load_service
from tests.cli.run_mlg import mlg
from tests.image_nets import image_net
from tests.onnx_models import run, write
from tests.provider_image.conftest import encode_image

SERVICE = load_service("image_to_image")


def install_into(
    folder: Path, model: Any, on_step: Callable[[str], None] = lambda step: None, **facts: Any
) -> Artefact:
    """Save a net and install it in parts of 64 x 64."""
    file = write(model, folder / "net.onnx")
    known = {"preprocessing": "unit", "size": (64, 64), **facts}
    custom = CustomModel(name="net", kind="onnx", file=file, labels=None, service="image_to_image", **known)
    return build_onnx(folder / "models", custom, f16_within=0, on_step=on_step)


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., Artefact]:
    """Save a net and install it; returns the artefact."""
    return functools.partial(install_into, tmp_path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """A net that returns images of the same size. Must not be changed."""
    return install_into(tmp_path_factory.mktemp("plain"), image_net())


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """A net that returns images of eight times the size. Must not be changed."""
    return install_into(tmp_path_factory.mktemp("large"), image_net(scale=8))


def answer(artefact: Artefact, data: bytes, **params: Any) -> Output:
    """Answer an image as a worker does, and check the answer as a batcher does."""
    checked = check_params(SERVICE.params, params)
    item = SERVICE.prepare(artefact, {"image": data}, checked)
    (output,) = SERVICE.run(SERVICE.load(artefact, Device(threads=1)), [item], [checked])
    SERVICE.check_output(artefact, checked, output)
    return output


def pixels_of(output: Output) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(output.files["image"]))).astype(int)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    import skimage.data

    return Image.fromarray(skimage.data.astronaut()).crop((100, 0, 324, 192))


@pytest.mark.parametrize(
    ("how", "formula"),
    [
        ({}, lambda values: values * 255),
        ({"scale": 2}, lambda values: values * 255),
        ({"scale": 3, "layout": "nhwc"}, lambda values: values * 255),
        ({"ending": "Tanh"}, lambda values: (values + 1) * 127.5),
    ],
    ids=["same size", "twice", "channels last", "tanh"],
)
def test_image_in_parts_equals_what_the_net_gives_for_the_whole(
    install: Callable[..., Artefact],
    photo: Image.Image,
    tmp_path: Path,
    how: Mapping[str, Any],
    formula: Callable[[np.ndarray], np.ndarray],
) -> None:
    is_tanh = "ending" in how
    artefact = install(image_net(**how), preprocessing="tf" if is_tanh else "unit")

    output = answer(artefact, encode_image(photo, "PNG"))

    pixels = np.asarray(photo).astype(np.float32)
    pixels = pixels / 127.5 - 1 if is_tanh else pixels / 255
    is_last = how.get("layout") == "nhwc"
    (whole,) = run(tmp_path / "net.onnx", (pixels if is_last else pixels.transpose(2, 0, 1))[None])
    whole = np.rint(np.clip(formula(whole if is_last else whole.transpose(1, 2, 0)), 0, 255))
    scale = how.get("scale", 1)
    assert (artefact.scale, artefact.margin, artefact.tile) == (scale, 8, (64, 64))
    assert output.data == {"width": 224 * scale, "height": 192 * scale, "format": "png"}
    assert np.abs(pixels_of(output) - whole).max() <= 1
    assert 20 < whole.std() < 110  # or any net would do


def test_bgr_net_gets_and_returns_bgr(install: Callable[..., Artefact], photo: Image.Image, tmp_path: Path) -> None:
    artefact = install(image_net(), channels="bgr")

    found = pixels_of(answer(artefact, encode_image(photo, "PNG")))

    (whole,) = run(
        tmp_path / "net.onnx", np.asarray(photo)[..., ::-1].astype(np.float32).transpose(2, 0, 1)[None] / 255
    )
    assert np.abs(found - np.clip(whole[::-1].transpose(1, 2, 0) * 255, 0, 255)).max() <= 1


def test_net_that_looks_everywhere_is_found_out_and_the_user_is_told(install: Callable[..., Artefact]) -> None:
    steps: list[str] = []

    install(image_net(looks_everywhere=True), steps.append)

    assert any("depend on all of a part" in step for step in steps)


@pytest.mark.parametrize("reach", [0, 7, 15])
def test_margin_is_how_far_a_net_looks(reach: int) -> None:
    def shift(part: np.ndarray) -> np.ndarray:
        values = np.zeros(part.shape, np.float32)
        values[reach:, reach:] = part[: len(part) - reach, : len(part) - reach]
        return values

    assert find_margin(shift, (256, 256), 1) == (8 if reach <= 8 else 16, True)


def test_self_test_has_whole_images_and_passes(plain: Artefact) -> None:
    report = check_model(plain.folder, Device(threads=1), seconds=0.01)

    assert report.problem is None and len(report.pictures) == len(plain.samples) > 3
    header = read_header((plain.folder / plain.samples[0].files["image"][0]).read_bytes(), 10**6)
    assert max(header.width, header.height) > 64


def test_self_test_of_a_net_that_enlarges_is_as_small(plain: Artefact, large: Artefact) -> None:
    def recorded_bytes(artefact: Artefact) -> int:
        return sum((artefact.folder / sample.files["image"][0]).stat().st_size for sample in artefact.samples)

    assert recorded_bytes(large) < 2 * recorded_bytes(plain) < 5_000_000


def test_self_test_finds_a_changed_answer(plain: Artefact, tmp_path: Path) -> None:
    folder = shutil.copytree(plain.folder, tmp_path / "net")
    (folder / plain.samples[0].files["image"][0]).write_bytes(encode_image(Image.new("RGB", (9, 9)), "PNG"))

    assert "cannot be used" in str(check_model(folder, Device(threads=1), seconds=0.01).problem)


def test_amount_mixes_the_answer_with_the_image(plain: Artefact, large: Artefact, photo: Image.Image) -> None:
    data, small = encode_image(photo, "PNG"), photo.crop((0, 0, 20, 10))

    none, half, full = (pixels_of(answer(plain, data, amount=share)) for share in (0, 0.5, 1))
    enlarged = pixels_of(answer(large, encode_image(small, "PNG"), amount=0))

    assert np.array_equal(none, np.asarray(photo))
    assert np.abs(half - (none + full) / 2).max() <= 1
    assert np.array_equal(enlarged, np.asarray(small.resize((160, 80), Image.Resampling.BICUBIC)))


def test_answer_may_be_a_jpeg(plain: Artefact, photo: Image.Image) -> None:
    data = encode_image(photo, "PNG")

    png, jpeg = answer(plain, data), answer(plain, data, format="jpeg")

    assert (jpeg.data["format"], jpeg.files["image"][:3]) == ("jpeg", b"\xff\xd8\xff")
    assert np.abs(pixels_of(png) - pixels_of(jpeg)).mean() < 8


def test_image_whose_answer_would_be_too_large_is_refused_before_it_is_decoded(large: Artefact) -> None:
    side = int(MAX_OUTPUT_PIXELS**0.5) // 8

    SERVICE.prepare(large, {"image": encode_image(Image.new("L", (side, side)), "PNG")}, {})
    with pytest.raises(ImageTooLarge, match=f"would have {8 * side + 8} x"):
        SERVICE.prepare(large, {"image": encode_image(Image.new("L", (side + 1, side + 1)), "PNG")}, {})


@pytest.mark.parametrize(
    ("model", "facts", "words"),
    [
        (lambda: image_net(channels=1), {}, "must return an RGB image"),
        (lambda: image_net(sides=(80, 80)), {}, "fixed at 80 x 80"),
        (lambda: image_net(), {"size": (32, 64)}, "64 to 2048 on a side"),
        (lambda: image_net(), {"preprocessing": "caffe"}, "caffe is for classifiers"),
        (lambda: image_net(), {"returns": "logits"}, "no output 'logits'"),
    ],
    ids=["grey", "fixed", "small", "caffe", "logits"],
)
def test_what_is_no_such_net_is_refused(
    install: Callable[..., Artefact], model: Callable[[], Any], facts: Mapping[str, Any], words: str
) -> None:
    with pytest.raises((UnsuitableModel, ConfigError), match=words):
        install(model(), **facts)


def test_net_with_a_fixed_size_is_used_with_that(install: Callable[..., Artefact], photo: Image.Image) -> None:
    artefact = install(image_net(sides=(96, 64)), size=None)

    assert artefact.tile == (96, 64)
    assert answer(artefact, encode_image(photo, "PNG")).data["width"] == 224


def test_digest_covers_how_an_image_is_cut(plain: Artefact) -> None:
    digests = {compute_digest(plain)}
    for changes in ({"tile": (96, 96)}, {"margin": 16}, {"scale": 2}):
        digests.add(compute_digest(replace(plain, **changes)))

    assert len(digests) == 4 and plain.digest in digests


def test_impossible_tiles_are_a_broken_artefact(plain: Artefact) -> None:
    with pytest.raises(BrokenArtefact, match="cannot be cut"):
        SERVICE.load(replace(plain, margin=40), Device(threads=1))


def test_net_that_openvino_does_not_have_runs_on_onnxruntime(
    install: Callable[..., Artefact], photo: Image.Image
) -> None:
    model = image_net()
    end = model.graph.output[0].name
    make = onnx.helper.make_node
    # A determinant times zero, which OpenVINO does not have.
    square = onnx.numpy_helper.from_array(np.eye(2, dtype=np.float32))
    model.graph.node.extend(
        [
            make("Constant", [], ["square"], value=square),
            make("ReduceMean", [end], ["mean"], keepdims=0),
            make("Mul", ["square", "mean"], ["scaled"]),
            make("Det", ["scaled"], ["det"]),
            make("Sub", ["det", "det"], ["zero"]),
            make("Add", [end, "zero"], ["sum"]),
        ]
    )
    model.graph.output[0].name = "sum"

    artefact = install(model)

    assert artefact.backend == "onnxruntime"
    assert answer(artefact, encode_image(photo, "PNG")).data["format"] == "png"


def test_keras_net_answers_as_in_keras(tmp_path: Path, photo: Image.Image) -> None:
    from provider_image.compiler.keras_graph import import_keras
    from tests.custom_models import save

    keras = import_keras()
    keras.utils.set_random_seed(4)
    layers = keras.layers
    pixels = keras.Input((None, None, 3))
    change = layers.Conv2D(3, 3, padding="same")(layers.Conv2D(8, 3, padding="same", activation="relu")(pixels))
    network = keras.Model(pixels, layers.Add()([pixels, layers.Rescaling(0.1)(change)]))
    custom = CustomModel(
        name="net",
        file=save(network, tmp_path / "net.keras"),
        labels=None,
        service="image_to_image",
        preprocessing="unit",
        size=(64, 64),
    )

    artefact = build_keras(tmp_path / "models", custom, f16_within=0)

    found = pixels_of(answer(artefact, encode_image(photo, "PNG")))
    whole = np.asarray(network(np.asarray(photo)[None].astype(np.float32) / 255))[0]
    assert (artefact.scale, artefact.margin) == (1, 8)
    assert np.abs(found - np.rint(np.clip(whole * 255, 0, 255))).max() <= 1


def test_net_is_installed_by_a_command(tmp_path: Path) -> None:
    file = write(image_net(), tmp_path / "soft.onnx")
    options = ("--onnx", str(file), "--service", "image_to_image", "--preprocessing", "unit", "--size", "64x64")

    done = mlg("models", "compile", "soft", *options, home=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "depend on at most 8 pixels around" in done.stderr
    assert read_artefact(tmp_path / "models" / "soft").service == "image_to_image"
    refused = mlg("models", "compile", "soft", *options, "--labels", str(file), home=tmp_path)
    assert refused.returncode == 2 and "--labels FILE is for classifiers" in refused.stderr


@pytest.mark.parametrize("format", ["png", "jpeg"])
@pytest.mark.parametrize(
    "forge",
    [
        lambda data, files: data.update(width=data["width"] + 1),
        lambda data, files: data.update(height=0),
        lambda data, files: data.update(width=True),
        lambda data, files: data.update(format="gif"),
        lambda data, files: data.pop("format"),
        lambda data, files: files.update(image=encode_image(Image.new("RGB", (10, 10)), "PNG")),
        lambda data, files: files.update(image=b"\x89PNG\r\n\x1a\n"),
    ],
)
def test_forged_answer_is_refused(
    format: str, forge: Callable[[dict[str, Any], dict[str, bytes]], object], plain: Artefact
) -> None:
    output = answer(plain, encode_image(Image.linear_gradient("L").resize((30, 20)), "PNG"), format=format)
    data, files = dict(output.data), dict(output.files)
    forge(data, files)

    with pytest.raises(MalformedResults):
        SERVICE.check_output(plain, check_params(SERVICE.params, {"format": format}), Output(data=data, files=files))


def test_model_error_is_raised_for_a_net_that_returns_no_numbers(install: Callable[..., Artefact]) -> None:
    model = image_net(ending=None)
    for tensor in model.graph.initializer:
        if tensor.name == "bias":
            tensor.raw_data = np.full(3, np.nan, np.float32).tobytes()

    with pytest.raises(ModelError, match="not finite"):
        install(model)

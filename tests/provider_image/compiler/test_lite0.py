"""The starter model: right answers on real photos, the same digest on every build, a safe weights reader."""

import collections
import hashlib
import pickle
import time
from dataclasses import replace

import numpy as np
import pytest

from provider_image.backends import Device
from provider_image.backends.openvino import import_openvino, load_net
from provider_image.compiler import build, embedding, ensure_installed, lite0
from provider_image.compiler.torch_file import read_tensors
from provider_image.errors import ConfigError, WeightsMismatch
from provider_image.images.decoding import decode
from provider_image.models.artefact import compute_digest
from provider_image.models.catalogue import CATALOGUE
from provider_image.services import load_service
from tests.provider_image.conftest import encode_image
from tests.timing import slowness


@pytest.mark.parametrize(
    ("photo", "expected"),
    [  # percentages of the reference implementation in torch
        ("chelsea", {"tiger_cat": 40.8, "Egyptian_cat": 34.0, "tabby": 16.7, "lynx": 1.5, "window_screen": 0.1}),
        ("coffee", {"espresso": 95.1, "cup": 1.5, "consomme": 0.8, "chocolate_sauce": 0.4, "coffee_mug": 0.3}),
        (
            "rocket",
            {"missile": 24.0, "projectile": 16.2, "drilling_platform": 11.7, "space_shuttle": 5.7, "mosque": 2.1},
        ),
    ],
)
def test_answers_agree_with_the_reference_to_a_tenth_of_a_percent(models_folder, photo, expected):
    import skimage.data
    from PIL import Image

    service = load_service("classification")
    artefact = ensure_installed(models_folder, "efficientnet_lite0")
    net = service.load(artefact, Device(threads=1))
    image = encode_image(Image.fromarray(getattr(skimage.data, photo)()), "PNG")

    (output,) = service.run(net, [service.prepare(artefact, {"image": image}, {})], [{}])

    shown = {name: round(100 * probability, 1) for _, name, probability in output.data[:5]}
    assert shown == expected
    assert list(shown) == list(expected)


def test_digest_of_format_2_is_the_one_that_version_0_1_0_gave(models_folder):
    artefact = replace(ensure_installed(models_folder, "efficientnet_lite0"), format=2)

    # Both from the model.json files that the code of mlg 0.1.0 writes, of format 2.
    assert compute_digest(artefact) == "ee9e000329261f0cdcdc475633a098d74bd31f7fc52835f0fe557a8566eb8c76"
    assert (
        compute_digest(replace(artefact, precision="f16"))
        == "03f3b51b53d7da1e6dd28e317a9c27e6582c80a9814f3be4b6f48890b0b06115"
    )


def test_two_builds_have_the_same_digest(tmp_path, models_folder):
    started = time.perf_counter()

    again = build(tmp_path, CATALOGUE["efficientnet_lite0"], again=True)

    assert time.perf_counter() - started < 10 * slowness()  # about 0.4 on a machine that does nothing else
    assert again.digest == ensure_installed(models_folder, "efficientnet_lite0").digest


def test_building_again_replaces_an_intact_artefact(tmp_path):
    row = CATALOGUE["efficientnet_lite0"]
    first = build(tmp_path, row).folder.stat().st_ino

    kept = build(tmp_path, row).folder.stat().st_ino
    replaced = build(tmp_path, row, again=True).folder.stat().st_ino

    assert first == kept != replaced


def test_graph_is_computed_in_bf16_only_on_request(models_folder):
    net = load_net(ensure_installed(models_folder, "efficientnet_lite0"), Device(threads=1))
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)

    first, second = net.infer([noise, noise])

    assert first.dtype == np.float32
    assert np.array_equal(first, second)
    assert abs(first.sum() - 1) < 1e-5


def test_embedding_is_what_an_independent_computation_finds(embedding_models_folder):
    artefact = ensure_installed(embedding_models_folder, "efficientnet_lite0_embedding")
    net = load_net(artefact, Device(threads=1))
    pixels = decode((artefact.folder / "selftest-0.jpg").read_bytes(), 224, 224, artefact.crop)

    (vector,) = net.infer([pixels])

    expected = features_by_numpy(pixels)
    assert (artefact.service, artefact.dimensions, artefact.labels) == ("embedding", 1280, ())
    assert np.abs(vector - expected / np.linalg.norm(expected)).max() < 1e-5
    assert artefact.size_bytes == pytest.approx(artefact.storage.f32_bytes) == pytest.approx(13.6e6, rel=0.02)


def features_by_numpy(pixels):
    """The 1280 values before the last layer, in float64 and without folding normalisations into convolutions."""
    tensors = read_tensors(lite0._weights())

    def convolve(x, name, stride):
        kernel = tensors[f"{name}.weight"].astype(np.float64)
        size, side = kernel.shape[-1], x.shape[-1]
        out = -(-side // stride)
        missing = max((out - 1) * stride + size - side, 0)
        x = np.pad(x, ((0, 0), *[(missing // 2, missing - missing // 2)] * 2))
        total = 0.0
        for row, column in np.ndindex(size, size):
            part = x[:, row : row + stride * (out - 1) + 1 : stride, column : column + stride * (out - 1) + 1 : stride]
            weights = kernel[:, :, row, column]
            is_depthwise = weights.shape[1] == 1
            total = total + (weights[:, :, None] * part if is_depthwise else np.tensordot(weights, part, 1))
        return total

    def normalise(x, name):
        mean, variance, scale, shift = (
            tensors[f"{name}.{each}"].astype(np.float64)[:, None, None]
            for each in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / np.sqrt(variance + 1e-3) * scale + shift

    def relu6(x):
        return np.clip(x, 0, 6)

    x = ((pixels.astype(np.float64) - 127) / 128).transpose(2, 0, 1)
    x = relu6(normalise(convolve(x, "_conv_stem", 2), "_bn0"))
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    for number, stride in enumerate(strides):
        name, entry = f"_blocks.{number}.", x
        if number:
            x = relu6(normalise(convolve(x, f"{name}_expand_conv", 1), f"{name}_bn0"))
        x = relu6(normalise(convolve(x, f"{name}_depthwise_conv", stride), f"{name}_bn1"))
        x = normalise(convolve(x, f"{name}_project_conv", 1), f"{name}_bn2")
        if x.shape == entry.shape:
            x = x + entry
    return relu6(normalise(convolve(x, "_conv_head", 1), "_bn1")).mean(axis=(1, 2))


def test_embedding_has_the_same_digest_from_the_wheel_and_from_the_installed_classifier(
    tmp_path, embedding_models_folder, models_folder
):
    (tmp_path / "efficientnet_lite0").symlink_to(models_folder / "efficientnet_lite0")

    found = embedding.build(tmp_path, "efficientnet_lite0")

    expected = ensure_installed(embedding_models_folder, "efficientnet_lite0_embedding")
    assert (found.digest, found.files) == (expected.digest, expected.files)


def test_precision_that_does_not_exist_is_refused(models_folder):
    with pytest.raises(ConfigError, match="f64"):
        load_net(ensure_installed(models_folder, "efficientnet_lite0"), Device(threads=1, precision="f64"))


def test_openvino_is_imported_without_telemetry():
    import subprocess
    import sys

    code = (
        "import sys; from provider_image.backends.openvino import import_openvino; import_openvino(); "
        "print([name for name in sys.modules if 'telemetry' in name or name.startswith('openvino.tools')])"
    )

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    assert found == "[]"
    assert import_openvino() is import_openvino()


def test_wrong_weights_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(lite0, "WEIGHTS_SHA256", hashlib.sha256(b"other").hexdigest())

    with pytest.raises(WeightsMismatch, match="sha256"):
        lite0.build(tmp_path, CATALOGUE["efficientnet_lite0"])
    assert [path.name for path in tmp_path.iterdir()] == [".efficientnet_lite0.lock"]


def test_tensors_are_read_through_their_strides():
    tensors = read_tensors(lite0._weights())

    assert len(tensors) == 296
    assert tensors["_conv_stem.weight"].shape == (32, 3, 3, 3)
    assert tensors["_fc.weight"].flags.c_contiguous
    assert tensors["_bn0.num_batches_tracked"].shape == ()


class _Evil:
    def __reduce__(self):
        return (print, ("pwned",))


def _legacy(state: object) -> bytes:
    parts = (0x1950A86A20F9469CFC6C, 1001, {}, state, [])
    return b"".join(pickle.dumps(part, protocol=2) for part in parts)


def test_weights_file_that_names_a_function_is_refused(capsys):
    with pytest.raises(WeightsMismatch, match="print"):
        read_tensors(_legacy({"weight": _Evil()}))

    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04 a zip",
        pickle.dumps("something else", protocol=2),
        _legacy(collections.OrderedDict())[:-10],
        _legacy(collections.OrderedDict()) + b"more",
    ],
)
def test_file_that_is_no_weights_file_is_refused(data):
    with pytest.raises(WeightsMismatch):
        read_tensors(data)

"""`style_vgg19`, compiled from seeded weights: its gradient is that of tensorflow's GradientTape in f64."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from provider_image.backends import Device, load_net
from provider_image.backends.openvino import GRAPH_FILES, import_openvino
from provider_image.backends.style import SETTINGS_FILE
from provider_image.check import check_model
from provider_image.compiler.installing import with_files
from provider_image.compiler.keras_graph import import_keras
from provider_image.compiler.keras_weights import WeightsFile, WeightsSources, find_weights
from provider_image.compiler.style import vgg19
from provider_image.errors import BrokenArtefact
from provider_image.models.artefact import Artefact
from provider_image.models.catalogue import CATALOGUE
from provider_image.style.gradient import CONTENT, STYLES, WEIGHTS, GradientGraph
from tests.seeded_weights import write_weights

ROW = CATALOGUE["style_vgg19"]
SIZE = (48, 64)


def seeded_vgg19(seed: int = 3) -> Any:
    """Keras' network with weights whose features neither vanish nor grow from layer to layer."""
    keras = import_keras()
    network = keras.applications.VGG19(weights=None, include_top=False)
    random = np.random.default_rng(seed)
    for layer in network.layers:
        if layer.weights:
            kernel, bias = layer.kernel.shape, layer.bias.shape
            deviation = np.sqrt(2 / (9 * kernel[2])) / (100 if kernel[2] == 3 else 1)
            layer.set_weights([random.normal(0, deviation, kernel), random.normal(0, 0.1, bias)])
    return network


@pytest.fixture(scope="module")
def network() -> Any:
    return seeded_vgg19()


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory) -> WeightsFile:
    folder = tmp_path_factory.mktemp("weights")
    write_weights(network, folder / ROW.weights.file)
    return find_weights(ROW, WeightsSources(given=folder, cache=folder / "nowhere"))


@pytest.fixture(scope="module")
def artefact(weights, tmp_path_factory) -> Artefact:
    settings = replace(vgg19.SETTINGS, iterations=2)
    return vgg19.build(tmp_path_factory.mktemp("models"), ROW, weights, settings=settings)


def random_image(seed: int, height: int, width: int) -> np.ndarray:
    """RGB, 0 to 255, smooth enough to look like a photo to the network: f32, shape (1, 3, height, width)."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (3, height // 4, width // 4))
    return np.repeat(np.repeat(coarse, 4, 1), 4, 2)[None].astype(np.float32)


def loss_in_f64(network: Any, wanted: dict[str, np.ndarray], image: Any) -> Any:
    """Compute the loss by tensorflow. :param image: a tensor (1, height, width, 3)."""
    tensorflow, keras = importlib.import_module("tensorflow"), import_keras()
    total = 0.0
    for name, features in vgg19.keras_features(keras, network, image).items():
        weight = float(wanted[WEIGHTS][0 if name == CONTENT else 1 + STYLES.index(name)])
        if name == CONTENT:
            goal = tensorflow.constant(wanted[name].transpose(0, 2, 3, 1), "float64")
            total += 0.5 * weight * tensorflow.reduce_mean(tensorflow.square(features - goal))
        else:
            rows = tensorflow.reshape(features, (-1, features.shape[-1]))
            gram = tensorflow.matmul(rows, rows, transpose_a=True) / rows.shape[0]
            total += weight * tensorflow.reduce_mean(
                tensorflow.square(gram - tensorflow.constant(wanted[name], "float64"))
            )
    return total


def test_gradient_is_that_of_tensorflow_in_f64(artefact, network) -> None:
    tensorflow = importlib.import_module("tensorflow")
    graph = GradientGraph(artefact.folder / GRAPH_FILES[0], 1, "f32")
    image = random_image(1, *SIZE)
    wanted = graph.describe(random_image(2, *SIZE), [CONTENT]) | graph.describe(random_image(3, 64, 80), STYLES)
    now = graph.describe(image, [CONTENT, *STYLES])
    # Every part of the loss counts.
    parts = [1 / np.square(now[name] - wanted[name]).mean() for name in (CONTENT, *STYLES)]
    wanted[WEIGHTS] = np.array(parts, np.float32)
    variable = tensorflow.Variable(image.transpose(0, 2, 3, 1), dtype="float64")
    with tensorflow.GradientTape() as tape:
        right_loss = loss_in_f64(network, wanted, variable)
    right = np.asarray(tape.gradient(right_loss, variable)).transpose(0, 3, 1, 2)

    loss, gradient = graph.objective(wanted, image.shape)(image)

    assert loss == pytest.approx(float(right_loss), rel=1e-4)
    assert np.linalg.norm(gradient - right) <= 1e-4 * np.linalg.norm(right)


def test_artefact_is_checked_like_any_other(artefact) -> None:
    report = check_model(artefact.folder, Device(threads=1), seconds=0.01)

    assert report.problem is None
    assert artefact.reference.startswith("keras 3") and artefact.source == "own"


def test_same_weights_are_not_compiled_again(artefact, weights) -> None:
    steps: list[str] = []

    assert vgg19.build(artefact.folder.parent, ROW, weights, on_step=steps.append) == artefact
    assert not steps


def test_artefact_with_a_graph_that_has_no_gradient_is_broken(artefact, tmp_path: Path) -> None:
    openvino = import_openvino()
    image = openvino.opset13.parameter([1, 3, 16, 16], openvino.Type.f32)
    for file in SETTINGS_FILE, GRAPH_FILES[0]:
        shutil.copyfile(artefact.folder / file, tmp_path / file)
    openvino.save_model(openvino.Model([openvino.opset13.add(image, image)], [image]), str(tmp_path / GRAPH_FILES[0]))
    forged = with_files(replace(artefact, folder=tmp_path), list(artefact.files))

    with pytest.raises(BrokenArtefact, match="cannot load"):
        load_net(forged, Device(threads=1))

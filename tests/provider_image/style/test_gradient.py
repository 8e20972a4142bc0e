"""The compiled gradient of a small network, against differences of the loss that numpy computes in f64.

Against tensorflow, see `test_vgg19.py`. Both notice if the convolutions of forward and backward pass share a constant
with ConvolutionBackpropData, which gives gradients that are wrong by half and more, without an error.
"""

from __future__ import annotations

import numpy as np
import pytest

from provider_image.backends.openvino import GRAPH_FILES, import_openvino
from provider_image.compiler.style.network import Layer, build
from provider_image.style.gradient import CONTENT, STYLES, WEIGHTS, GradientGraph, transfer
from provider_image.style.optimising import TransferOptions

#: Channels of each layer, whether it is halved then, and what it is compared with. With a shared constant the gradient
#: is wrong where a layer has as many channels as the one before, seen with 64.
LAYERS = (
    (64, False, "style1"),
    (64, True, "style2"),
    (64, False, None),
    (64, True, "style3"),
    (128, False, "style4"),
    (128, True, CONTENT),
    (128, False, "style5"),
)
MEAN = (120.0, 110.0, 100.0)
SHAPE = (1, 3, 48, 32)


def make_layers(seed: int = 1) -> list[Layer]:
    random, channels, layers = np.random.default_rng(seed), 3, []
    for count, is_pooled, compared_as in LAYERS:
        kernel = random.normal(0, np.sqrt(2 / (9 * channels)), (3, 3, channels, count)).astype(np.float32)
        bias = random.normal(0, 0.5, count).astype(np.float32)
        layers.append(Layer(kernel=kernel, bias=bias, is_pooled=is_pooled, compared_as=compared_as))
        channels = count
    return layers


def describe(layers: list[Layer], image: np.ndarray) -> dict[str, np.ndarray]:
    """Compute in f64 what the loss compares: features, and Gram matrices."""
    x, found = image[0].astype(np.float64) - np.reshape(MEAN, (3, 1, 1)), {}
    for layer in layers:
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
        x = np.einsum("chwij,ijco->ohw", windows, layer.kernel.astype(np.float64), optimize=True)
        x = np.maximum(x + layer.bias[:, None, None], 0)
        rows = x.reshape(len(x), -1)
        if layer.compared_as == CONTENT:
            found[CONTENT] = x[None]
        elif layer.compared_as is not None:
            found[layer.compared_as] = rows @ rows.T / rows.shape[1]
        if layer.is_pooled:
            x = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2).mean((2, 4))
    return found


def loss_of(layers: list[Layer], wanted: dict[str, np.ndarray], image: np.ndarray) -> float:
    seen = describe(layers, image)
    terms = [0.5 * np.square(seen[CONTENT] - wanted[CONTENT]).mean()]
    terms += [np.square(seen[name] - wanted[name]).mean() for name in STYLES]
    return float(np.dot(wanted[WEIGHTS], terms))


@pytest.fixture(scope="module")
def layers() -> list[Layer]:
    return make_layers()


@pytest.fixture(scope="module")
def graph(layers: list[Layer], tmp_path_factory: pytest.TempPathFactory) -> GradientGraph:
    path = tmp_path_factory.mktemp("graph") / GRAPH_FILES[0]
    import_openvino().save_model(build(layers, MEAN), str(path), compress_to_fp16=False)
    return GradientGraph(path, 1, "f32")


def random_image(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 255, shape).astype(np.float32)


def make_wanted(layers: list[Layer]) -> dict[str, np.ndarray]:
    content, style = describe(layers, random_image(1)), describe(layers, random_image(2, (1, 3, 32, 64)))
    wanted = {name: (content if name == CONTENT else style)[name].astype(np.float32) for name in (CONTENT, *STYLES)}
    # Every part of the loss counts.
    own = describe(layers, random_image(3))
    parts = [1 / np.square(own[name] - wanted[name]).mean() for name in (CONTENT, *STYLES)]
    return {**wanted, WEIGHTS: np.array(parts, np.float32)}


def test_graph_describes_an_image_as_numpy_does(graph, layers) -> None:
    image = random_image(3)

    found = graph.describe(image, [CONTENT, *STYLES])

    for name, right in describe(layers, image).items():
        np.testing.assert_allclose(found[name], right, rtol=1e-3, atol=1e-4 * np.abs(right).max())


def test_gradient_is_that_of_the_loss(graph, layers) -> None:
    wanted, image = make_wanted(layers), random_image(3)
    objective = graph.objective(wanted, SHAPE)

    loss, gradient = objective(image)

    assert loss == pytest.approx(loss_of(layers, wanted, image), rel=1e-4)
    random, step = np.random.default_rng(5), 1e-6
    exact = image.astype(np.float64)
    for _ in range(6):
        direction = random.normal(size=SHAPE)
        ahead, behind = (loss_of(layers, wanted, exact + sign * step * direction) for sign in (1, -1))
        slope = (ahead - behind) / (2 * step)
        # A random direction may be nearly level, so the length of the gradient is the measure.
        assert float(np.sum(gradient * direction)) == pytest.approx(slope, abs=1e-3 * float(np.linalg.norm(gradient)))


@pytest.mark.parametrize("part", range(1 + len(STYLES)))
def test_each_part_of_the_loss_has_its_gradient(graph, layers, part) -> None:
    wanted, image = make_wanted(layers), random_image(3)
    wanted[WEIGHTS] = wanted[WEIGHTS] * (np.arange(1 + len(STYLES)) == part).astype(np.float32)
    objective = graph.objective(wanted, SHAPE)

    _, gradient = objective(image)

    direction, step = gradient.astype(np.float64) / np.linalg.norm(gradient), 1e-3
    ahead, behind = (loss_of(layers, wanted, image.astype(np.float64) + sign * step * direction) for sign in (1, -1))
    assert (ahead - behind) / (2 * step) == pytest.approx(float(np.linalg.norm(gradient)), rel=1e-3)


def test_transfer_brings_the_features_closer_to_those_of_the_style(graph, layers) -> None:
    content, style = (
        np.ascontiguousarray(random_image(seed)[0].transpose(1, 2, 0)).astype(np.uint8) for seed in (1, 2)
    )
    style //= 4
    options = TransferOptions(strength=1.0, keeps_colours=False, iterations=20, seconds=600)

    image, done = transfer(graph, content, style, options)

    def distance(pixels: np.ndarray) -> float:
        both = [describe(layers, each.transpose(2, 0, 1)[None]) for each in (pixels, style)]
        return sum(float(np.square(both[0][name] - both[1][name]).mean()) for name in STYLES)

    assert (image.shape, image.dtype, done) == (content.shape, np.uint8, 20)
    assert distance(image) < 0.5 * distance(content)


def test_image_of_any_size_keeps_its_size(graph) -> None:
    content, style = (np.random.default_rng(1).integers(0, 256, size, np.uint8) for size in ((37, 50, 3), (21, 90, 3)))
    options = TransferOptions(strength=0.5, keeps_colours=True, iterations=2, seconds=600)

    image, done = transfer(graph, content, style, options)

    assert (image.shape, done) == (content.shape, 2)


def test_transfer_stops_when_its_time_is_over(graph) -> None:
    content = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    fractions: list[float] = []
    options = TransferOptions(
        strength=0.5,
        keeps_colours=True,
        iterations=10**9,
        seconds=0.2,
        on_step=lambda fraction, image: fractions.append(fraction),
    )

    _, done = transfer(graph, content, content[::-1], options)

    assert 0 < done < 10**9 and len(fractions) == done and fractions == sorted(fractions)

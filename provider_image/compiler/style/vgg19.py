"""The builder of `style_vgg19` from Keras' weights of VGG19 without its last layers.

Called by `mlg models compile style_vgg19`. tensorflow (the extra `compile`) reads the weights; the graph of forward and
backward pass is `network.py`. Its features are compared with those of Keras before it is installed. Averages take the
place of maxima where VGG19 halves the image, as in the method's paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from provider_image.backends.openvino import GRAPH_FILES, import_openvino
from provider_image.backends.style import GRADIENT, SETTINGS_FILE, StyleSettings
from provider_image.compiler.installing import begin_artefact, build_folder, find_same
from provider_image.compiler.keras_applications import load_network
from provider_image.compiler.keras_graph import keras_session
from provider_image.compiler.keras_weights import WeightsFile
from provider_image.compiler.style.network import Layer
from provider_image.compiler.style.network import build as build_graph
from provider_image.compiler.style.samples import install_style
from provider_image.errors import CompilationFailed
from provider_image.models.artefact import Artefact
from provider_image.models.catalogue import ModelRow
from provider_image.precision import TOLERANCE
from provider_image.style.gradient import CONTENT, STYLES

#: Part of the digest. Change it whenever the results change.
RECIPE = "style-vgg19-2"
#: A pixel takes some 3 kB while the gradient is computed, so this takes 800 MB.
SETTINGS = StyleSettings(method=GRADIENT, iterations=100, max_pixels=512 * 512)
#: Convolutions of each block, and which of them are compared, by the paper.
_BLOCKS = (2, 2, 4, 4, 1)
_COMPARED = {
    "block4_conv2": CONTENT,
    **{f"block{number}_conv1": name for number, name in enumerate(STYLES, start=1)},
}
#: What the preprocessing `caffe` subtracts from red, green and blue.
_MEAN = (123.68, 116.779, 103.939)


def build(
    models: Path,
    row: ModelRow,
    weights: WeightsFile,
    *,
    again: bool = False,
    f16_within: float = TOLERANCE,
    on_step: Callable[[str], None] = lambda step: None,
    settings: StyleSettings = SETTINGS,
) -> Artefact:
    """Build the artefact in the models folder, unless the same one is installed.

    :param again: build even then.
    :param f16_within: has no effect: the weights are stored as f32, because their gradients are small.
    :param on_step: called with the name of each step.
    :raises ModelError: it cannot be built.
    :raises NotInstalled: the models folder cannot be written.
    """
    with build_folder(models, row.name) as folder:
        draft = begin_artefact(
            row, backend="style", weights_sha256=weights.sha256, recipe=RECIPE, reference=row.keras_class
        )
        if not again and (installed := find_same(models, draft)) is not None:
            return installed
        on_step("starting Keras")
        with keras_session() as keras:
            source = row.source if weights.is_published else "own"
            draft = replace(draft, source=source, reference=f"keras {keras.__version__}")
            on_step("reading weights")
            network = load_network(keras, row, weights, include_top=False)
            on_step("writing the gradient")
            graph = build_graph(layers_of(network), _MEAN)
            import_openvino().save_model(graph, str(folder / GRAPH_FILES[0]), compress_to_fp16=False)
            settings.write(folder)
            on_step("comparing")
            _compare_with_keras(keras, network, folder)
        on_step("running the self-test")
        return install_style(draft, folder, models, [*GRAPH_FILES, SETTINGS_FILE])


def layers_of(network: Any) -> list[Layer]:
    """Return the layers of the graph from Keras' network."""
    layers: list[Layer] = []
    for block, convolutions in enumerate(_BLOCKS, start=1):
        for number in range(1, convolutions + 1):
            name = f"block{block}_conv{number}"
            kernel, bias = network.get_layer(name).get_weights()
            if not layers:
                kernel = kernel[:, :, ::-1]  # Keras' network takes blue, green and red
            is_pooled = number == convolutions and block < len(_BLOCKS)
            layers.append(Layer(kernel=kernel, bias=bias, is_pooled=is_pooled, compared_as=_COMPARED.get(name)))
    return layers


def keras_features(keras: Any, network: Any, image: Any) -> dict[str, Any]:
    """Compute by Keras what the graph compares: the features of the content, and those of each style.

    :param image: RGB, 0 to 255, shape (1, height, width, 3).
    :return: tensors by the name of the graph's input, shape (1, height, width, channels).
    """
    x = image[..., ::-1] - keras.ops.convert_to_tensor(_MEAN[::-1], image.dtype)
    found = {}
    for layer in network.layers[1:]:
        if "pool" in layer.name:
            x = keras.ops.average_pool(x, 2, 2)
            continue
        kernel, bias = (keras.ops.cast(each, x.dtype) for each in (layer.kernel, layer.bias))
        x = keras.ops.relu(keras.ops.conv(x, kernel, 1, "same") + bias)
        if layer.name in _COMPARED:
            found[_COMPARED[layer.name]] = x
        if len(found) == len(_COMPARED):
            break
    return found


def _compare_with_keras(keras: Any, network: Any, folder: Path) -> None:
    """Compare the features of an image. :raises CompilationFailed: they differ."""
    import numpy as np

    from provider_image.compiler.self_test import self_test_images
    from provider_image.style.gradient import GradientGraph
    from provider_image.style.pixels import load_pixels

    pixels = load_pixels(next(iter(self_test_images().values())), 128, 128**2).astype(np.float32)
    pixels = pixels[: pixels.shape[0] // 16 * 16, : pixels.shape[1] // 16 * 16]
    found = GradientGraph(folder / GRAPH_FILES[0], 1, "f32").describe(
        np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]), [CONTENT, *STYLES]
    )
    for name, tensor in keras_features(keras, network, keras.ops.convert_to_tensor(pixels[None])).items():
        right = np.asarray(tensor, np.float64)
        if name == CONTENT:
            right = right.transpose(0, 3, 1, 2)
        else:
            rows = right.reshape(-1, right.shape[-1])
            right = rows.T @ rows / len(rows)
        difference = float(np.abs(found[name] - right).max() / max(np.abs(right).max(), 1e-30))
        if not difference <= TOLERANCE:
            raise CompilationFailed(
                f"The compiled graph of style_vgg19 has other features than Keras: {name} differs by {difference:.2g} "
                "of the largest. It was not installed. Please report this with both versions."
            )

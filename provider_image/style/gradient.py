"""Style transfer by the features of a network, with its compiled gradient. Called by the backend `style`.

The method is that of Gatys, Ecker and Bethge, "Image Style Transfer Using Convolutional Neural Networks", 2016: the
image is changed until the network sees the content of one image in it, by its features, and the style of another, by
how its features occur together. The graph (`provider_image/compiler/style/network.py`) has forward and backward pass,
so that nothing but OpenVINO is needed. It takes images of any size whose sides are multiples of STRIDE; a size is
compiled when it is needed, in about a second. Memory grows with the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.backends.openvino import CompiledGraph, compile_part
from provider_image.errors import InferenceFailed
from provider_image.style.optimising import Adam, Budget, TransferOptions
from provider_image.style.pixels import luminance, to_floats, to_pixels, with_luminance

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: Sides of an image must be multiples of this: the network halves it four times.
STRIDE = 16
#: The inputs and outputs of the graph. f32; what has a size of its own is in brackets.
#: - image: RGB, 0 to 255, [1, 3, height, width]
#: - content: the features that are wanted, [1, channels, height / 8, width / 8]
#: - styleN: how the features of layer N should occur together, [channels, channels]
#: - weights: of the content, and of each style, [1 + styles]
IMAGE, CONTENT, WEIGHTS = "image", "content", "weights"
#: - gradient: of the loss by the image, [1, 3, height, width]
#: - loss: []
#: - content_now and styleN_now: the same of the image itself
GRADIENT, LOSS, NOW = "gradient", "loss", "_now"
#: The layers of the style, from the first to the last.
STYLES = tuple(f"style{number}" for number in range(1, 6))
#: Length of the first step, in values of 0 to 255.
_RATE = 6.0
#: Weight of each style, and of the content at strength 0 and at strength 1. At 1/2 their ratio is that of the paper,
#: where losses are sums: 1/1000 for an image of 512 x 384.
_STYLE_WEIGHT, _CONTENT_WEIGHTS = 0.05, (160_000.0, 16.0)


class GradientGraph:
    """The graph of an artefact. A size is compiled when it is needed and not kept: its buffers take most of the memory.

    :param path: its model.xml.
    """

    def __init__(self, path: Path, threads: int, precision: str) -> None:
        self._path, self._threads, self._precision = path, threads, precision

    def check(self) -> None:
        """Run it for the smallest image. :raises RuntimeError, ValueError, OSError: that is not possible."""
        import numpy as np

        self.describe(np.zeros((1, 3, STRIDE, STRIDE), np.float32), [CONTENT, *STYLES])

    def describe(self, image: Array, names: Sequence[str]) -> dict[str, Array]:
        """Return the features of an image that the loss compares, by the name of the input that they are for.

        :param image: see IMAGE.
        """
        part = compile_part(
            self._path, {IMAGE: image.shape}, [f"{name}{NOW}" for name in names], self._threads, self._precision
        )
        found = part.graph.create_infer_request().infer({IMAGE: image}, share_inputs=True)
        return {name: found[f"{name}{NOW}"].copy() for name in names}

    def objective(self, wanted: Mapping[str, Array], shape: tuple[int, ...]) -> Objective:
        """Return the loss and its gradient for images of a shape.

        :param wanted: the other inputs of the graph.
        """
        shapes = {IMAGE: shape, **{name: each.shape for name, each in wanted.items()}}
        return Objective(compile_part(self._path, shapes, [GRADIENT, LOSS], self._threads, self._precision), wanted)


class Objective:
    """The loss of images of one size, and its gradient."""

    def __init__(self, compiled: CompiledGraph, wanted: Mapping[str, Array]) -> None:
        self._compiled = compiled  # has the weights
        self._request = compiled.graph.create_infer_request()
        self._wanted = wanted

    def __call__(self, image: Array) -> tuple[float, Array]:
        """Return the loss of an image, see IMAGE, and the gradient, which the next call overwrites."""
        found = self._request.infer({IMAGE: image, **self._wanted}, share_inputs=True, share_outputs=True)
        return float(found[LOSS]), found[GRADIENT]


def transfer(graph: GradientGraph, content: Array, style: Array, options: TransferOptions) -> tuple[Array, int]:
    """Give an image the style of another.

    :param content, style: uint8 RGB, shape (height, width, 3), each side at least STRIDE.
    :return: uint8 RGB of the size of the content, and how many iterations were made.
    :raises InferenceFailed: the network cannot compare these images.
    """
    import numpy as np

    height, width, _ = content.shape
    original = to_floats(content)
    budget = Budget(options=options)
    image = _to_input(content)
    wanted = graph.describe(image, [CONTENT]) | graph.describe(_to_input(style), STYLES)
    low, high = _CONTENT_WEIGHTS
    content_weight = low * (high / low) ** options.strength
    wanted[WEIGHTS] = np.array([content_weight, *[_STYLE_WEIGHT] * len(STYLES)], np.float32)
    objective, adam = graph.objective(wanted, image.shape), Adam(_RATE, options.iterations)

    def result() -> Array:
        found = np.ascontiguousarray(image[0].transpose(1, 2, 0)[:height, :width]) / np.float32(255)
        return to_pixels(with_luminance(original, luminance(found)) if options.keeps_colours else found)

    while budget.is_left:
        loss, gradient = objective(image)
        if not np.isfinite(loss):
            raise InferenceFailed("The loss of the image is no finite number.")
        image = np.clip(image + adam.step(gradient), 0, 255)
        budget.count(result)
    return result(), budget.done


def _to_input(pixels: Array) -> Array:
    """Return the graph's input for an image, mirrored beyond its edges up to the next multiple of STRIDE."""
    import numpy as np

    height, width, _ = pixels.shape
    padded = np.pad(pixels, ((0, -height % STRIDE), (0, -width % STRIDE), (0, 0)), "reflect")
    return np.ascontiguousarray(padded.transpose(2, 0, 1)[None], np.float32)

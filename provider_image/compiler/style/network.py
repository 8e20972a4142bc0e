"""The graph of a style transfer: a network's features, the loss that compares them, and the gradient of that loss.

Called by `vgg19.py`. Forward and backward pass are written in OpenVINO's operations, because no provider has a library
that derives gradients. The inputs and outputs are described in `provider_image/style/gradient.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from provider_image.backends.openvino import import_openvino
from provider_image.style.gradient import CONTENT, GRADIENT, IMAGE, LOSS, NOW, STYLES, WEIGHTS

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution of 3 x 3 with padding and ReLU."""

    #: f32, shape (3, 3, channels in, channels out), as Keras has it, and (channels out,).
    kernel: Array
    bias: Array
    #: True if its results are averaged two by two for the next layer.
    is_pooled: bool = False
    #: The input of the graph that its features are compared with: CONTENT, one of STYLES, or none.
    compared_as: str | None = None


@dataclass(kw_only=True)
class _Comparison:
    """What the loss has of a layer."""

    #: Its part of the loss, its gradient by the layer's features, and what it compares.
    loss: Any
    gradient: Any
    now: Any


@dataclass(kw_only=True)
class _Graph:
    op: Any
    openvino: Any
    parameters: list[Any] = field(default_factory=list)

    def constant(self, value: Any, kind: str = "float32") -> Any:
        import numpy as np

        return self.op.constant(np.array(value, kind))

    def parameter(self, name: str, shape: Sequence[int]) -> Any:
        made = self.op.parameter(list(shape), self.openvino.Type.f32, name=name)
        made.output(0).get_tensor().set_names({name})
        self.parameters.append(made)
        return made

    def convolve(self, x: Any, kernel: Array) -> Any:
        """Convolve with a kernel (channels out, channels in, 3, 3) of a constant of its own.

        The backward pass is such a convolution too. On the processor ConvolutionBackpropData gives wrong results
        without an error where it shares its weights with the convolution of the forward pass, and constants that are
        equal may become one.
        """
        import numpy as np

        weights = self.op.constant(np.ascontiguousarray(kernel, np.float32))
        return self.op.convolution(x, weights, [1, 1], [1, 1], [1, 1], [1, 1])

    def weight(self, position: int) -> Any:
        """Return one of the weights of the loss, a scalar."""
        weights = next(each for each in self.parameters if each.get_friendly_name() == WEIGHTS)
        return self.op.gather(weights, self.constant(position, "int64"), self.constant(0, "int64"))

    def count(self, x: Any, axes: Sequence[int]) -> Any:
        """Return the product of some sides of x, an f32 scalar."""
        op = self.op
        sides = op.gather(op.shape_of(x), self.constant(axes, "int64"), self.constant(0, "int64"))
        return op.convert(op.reduce_prod(sides, self.constant([0], "int64"), False), "f32")

    def mean_square(self, x: Any) -> Any:
        op = self.op
        axes = self.constant(range(len(x.get_output_partial_shape(0))), "int64")
        return op.reduce_mean(op.multiply(x, x), axes, False)

    def compare_content(self, features: Any, channels: int) -> _Comparison:
        """Half the mean square of the difference from the features that are wanted."""
        op, weight = self.op, self.weight(0)
        difference = op.subtract(features, self.parameter(CONTENT, [1, channels, -1, -1]))
        return _Comparison(
            loss=op.multiply(op.multiply(weight, self.constant(0.5)), self.mean_square(difference)),
            gradient=op.multiply(difference, op.divide(weight, self.count(features, [0, 1, 2, 3]))),
            now=features,
        )

    def compare_style(self, features: Any, channels: int, name: str) -> _Comparison:
        """The mean square of the difference from the wanted Gram matrix, which is a mean over the pixels."""
        op, weight = self.op, self.weight(1 + STYLES.index(name))
        # Channels last, as features are kept for convolutions with AVX-512, so that nothing is copied there.
        last = op.transpose(features, self.constant([0, 2, 3, 1], "int64"))
        rows = op.reshape(last, self.constant([-1, channels], "int64"), False)
        pixels = self.count(features, [2, 3])
        gram = op.divide(op.matmul(rows, rows, True, False), pixels)
        difference = op.subtract(gram, self.parameter(name, [channels, channels]))
        factor = op.divide(op.multiply(weight, self.constant(4.0 / channels**2)), pixels)
        gradient = op.matmul(rows, op.multiply(difference, factor), False, False)
        gradient = op.reshape(gradient, op.shape_of(last), False)
        return _Comparison(
            loss=op.multiply(weight, self.mean_square(difference)),
            gradient=op.transpose(gradient, self.constant([0, 3, 1, 2], "int64")),
            now=gram,
        )

    def enlarge(self, x: Any) -> Any:
        """Return the gradient of averages of two by two pixels by the pixels: a quarter of it for each."""
        op = self.op
        quarter = op.multiply(x, self.constant(0.25))
        scales, axes = self.constant([2.0, 2.0]), self.constant([2, 3], "int64")
        return op.interpolate(
            quarter, scales, "nearest", "scales", [0, 0, 0, 0], [0, 0, 0, 0], "asymmetric", "floor", axes=axes
        )


def build(layers: Sequence[Layer], mean: Sequence[float]) -> Any:
    """Build the graph for layers one after the other; those after the last that is compared are left out.

    :param layers: the last is compared, CONTENT and each of STYLES with one layer.
    :param mean: what is subtracted from red, green and blue.
    :return: OpenVINO's Model.
    """
    import numpy as np

    openvino = import_openvino()
    graph = _Graph(op=openvino.opset13, openvino=openvino)
    op = graph.op
    image = graph.parameter(IMAGE, [1, 3, -1, -1])
    graph.parameter(WEIGHTS, [1 + len(STYLES)])
    x = op.subtract(image, graph.constant(np.array(mean).reshape(1, 3, 1, 1)))
    features, compared = [], {}
    for layer in layers:
        channels = len(layer.bias)
        x = graph.convolve(x, layer.kernel.transpose(3, 2, 0, 1))
        x = op.relu(op.add(x, graph.constant(layer.bias.reshape(1, -1, 1, 1))))
        features.append(x)
        if layer.compared_as == CONTENT:
            compared[CONTENT] = graph.compare_content(x, channels)
        elif layer.compared_as is not None:
            compared[layer.compared_as] = graph.compare_style(x, channels, layer.compared_as)
        if layer.is_pooled:
            x = op.avg_pool(x, [2, 2], [0, 0], [0, 0], [2, 2], False)
    gradient: Any = None
    for layer, seen in zip(reversed(layers), reversed(features), strict=True):
        if gradient is not None and layer.is_pooled:
            gradient = graph.enlarge(gradient)
        if layer.compared_as is not None:
            own = compared[layer.compared_as].gradient
            gradient = own if gradient is None else op.add(gradient, own)
        is_active = op.greater(seen, graph.constant(0.0))
        gradient = op.select(is_active, gradient, graph.constant(0.0))
        gradient = graph.convolve(gradient, layer.kernel[::-1, ::-1].transpose(2, 3, 0, 1))
    loss: Any = None
    for each in compared.values():
        loss = each.loss if loss is None else op.add(loss, each.loss)
    outputs = {GRADIENT: gradient, LOSS: loss, **{f"{name}{NOW}": each.now for name, each in compared.items()}}
    results = []
    for name, value in outputs.items():
        value.output(0).get_tensor().add_names({name})
        results.append(op.result(value))
    return openvino.Model(results, graph.parameters, "style")

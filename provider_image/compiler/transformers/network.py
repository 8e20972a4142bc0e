"""The network of vision transformers, described once, in operations of which there are two kinds.

Those of OpenVINO give the graph, those of numpy in double precision the answers that it is compared with. Called by
`builder.py`.

Sources: Dosovitskiy et al., "An Image is Worth 16x16 Words"; Touvron et al., "Training data-efficient image
transformers"; Bao et al., "BEiT: BERT Pre-Training of Image Transformers".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from provider_image.compiler.keras_graph import preprocess
from provider_image.compiler.transformers.folder import Description
from provider_image.compiler.transformers.safetensors_file import Weights
from provider_image.models.catalogue import ModelFacts

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]
    Arrays = Sequence[Array]


class _TensorOperations(Protocol):
    """Operations on tensors of shape (n, tokens, values)."""

    def patches(self, image: Any, weight: Array) -> Any:
        """Return a token for each square of an image, row by row.

        :param image: shape (n, height, width, 3).
        :param weight: shape (values, 3, side of a square, side of a square).
        """

    def linear(self, x: Any, weight: Array) -> Any:
        """Multiply each token by a matrix. :param weight: shape (values out, values in)."""

    def normalise(self, x: Any, epsilon: float) -> Any:
        """Give each token mean 0 and variance 1."""

    def attention(self, query: Any, key: Any, value: Any, heads: int, bias: Array | None) -> Any:
        """Attend with several heads. :param bias: added to the scores, shape (1, heads, tokens, tokens)."""

    def gelu(self, x: Any) -> Any:
        """Apply GELU by the error function."""

    def add(self, x: Any, y: Any) -> Any:
        """Add a tensor, or an array of a number for each value."""

    def scale(self, x: Any, factors: Array) -> Any:
        """Multiply each value."""

    def prepend(self, token: Array, x: Any) -> Any:
        """Put a constant token in front. :param token: shape (1, 1, values)."""

    def first_tokens(self, x: Any, count: int) -> Any:
        """Return the first tokens, one behind the other, shape (n, count * values)."""

    def mean_after(self, x: Any, count: int) -> Any:
        """Return the mean of the tokens after the first ones, shape (n, values)."""

    def softmax(self, x: Any) -> Any:
        """Return probabilities. :param x: shape (n, classes)."""


def to_graph(openvino: Any, weights: Weights, network: Description, facts: ModelFacts) -> Any:
    """Assemble the graph: uint8 RGB (1, height, width, 3) in, probabilities (1, classes) out.

    :param facts: name, size and preprocessing.
    :raises WeightsMismatch: the weights are not those of the network.
    """
    op = openvino.opset13
    image = op.parameter([1, facts.height, facts.width, 3], openvino.Type.u8, name="image")
    operations = _GraphOperations(op)
    output = _probabilities(operations, weights, network, facts.preprocessing, op.convert(image, "f32"))
    return openvino.Model([output], [image], facts.name)


def numpy_probabilities(weights: Weights, network: Description, preprocessing: str, images: Arrays) -> Arrays:
    """Answer for decoded images, in double precision.

    :param images: uint8 RGB, shape (height, width, 3).
    :return: probabilities of each, shape (classes,), as f32.
    """
    import numpy as np

    stacked = np.stack(images).astype(np.float64)
    found = _probabilities(_NumpyOperations(), weights, network, preprocessing, stacked)
    return list(found.astype(np.float32))


def count_features(weights: Weights, network: Description) -> int:
    """Return the number of values that the last layer takes: those of one token, or of two if there is a teacher's."""
    return network.hidden_size * (2 if _has_two_heads(weights) else 1)


def _has_two_heads(weights: Weights) -> bool:
    return "distillation_classifier.weight" in weights


def _probabilities(
    op: _TensorOperations, weights: Weights, network: Description, preprocessing: str, image: Any
) -> Any:
    """Build the network. :param image: shape (n, height, width, 3), 0-255. :return: shape (n, classes)."""
    kind, size, is_beit = network.model_type, network.hidden_size, network.model_type == "beit"

    def linear(x: Any, name: str, values_out: int, values_in: int, *, has_bias: bool = True) -> Any:
        x = op.linear(x, weights.get(f"{name}.weight", values_out, values_in))
        return op.add(x, weights.get(f"{name}.bias", values_out)) if has_bias else x

    def normalise(x: Any, name: str) -> Any:
        x = op.scale(op.normalise(x, network.layer_norm_eps), weights.get(f"{name}.weight", size))
        return op.add(x, weights.get(f"{name}.bias", size))

    def add_back(entry: Any, x: Any, factors: str) -> Any:
        return op.add(op.scale(x, weights.get(factors, size)) if is_beit else x, entry)

    x = _preprocessed(op, image, preprocessing)
    patch, name = network.patch_size, f"{kind}.embeddings.patch_embeddings.projection"
    x = op.patches(x, weights.get(f"{name}.weight", size, 3, patch, patch))
    x = op.add(x, weights.get(f"{name}.bias", size))
    front = [f"{kind}.embeddings.cls_token", f"{kind}.embeddings.distillation_token"]
    front = front[: 1 + (front[1] in weights)]
    for name in reversed(front):
        x = op.prepend(weights.get(name, 1, 1, size), x)
    if not is_beit:
        x = op.add(x, weights.get(f"{kind}.embeddings.position_embeddings", 1, network.side**2 + len(front), size))
    for number in range(network.num_hidden_layers):
        layer = f"{kind}.encoder.layer.{number}"
        attention = f"{layer}.attention.attention"
        entry, x = x, normalise(x, f"{layer}.layernorm_before")
        query = linear(x, f"{attention}.query", size, size)
        key = linear(x, f"{attention}.key", size, size, has_bias=not is_beit)
        value = linear(x, f"{attention}.value", size, size)
        bias = _position_bias(weights, network, attention) if is_beit else None
        x = op.attention(query, key, value, network.num_attention_heads, bias)
        x = linear(x, f"{layer}.attention.output.dense", size, size)
        x = add_back(entry, x, f"{layer}.lambda_1")
        entry, x = x, normalise(x, f"{layer}.layernorm_after")
        x = op.gelu(linear(x, f"{layer}.intermediate.dense", network.intermediate_size, size))
        x = linear(x, f"{layer}.output.dense", size, network.intermediate_size)
        x = add_back(entry, x, f"{layer}.lambda_2")
    if is_beit:
        x = normalise(op.mean_after(x, 1), f"{kind}.pooler.layernorm")
    else:
        x = normalise(x, f"{kind}.layernorm")
        x = op.first_tokens(x, 2 if _has_two_heads(weights) else 1)
    weight, bias = _last_layer(weights, network)
    return op.softmax(op.add(op.linear(x, weight), bias))


def _preprocessed(op: _TensorOperations, image: Any, preprocessing: str) -> Any:
    """Apply a preprocessing of `keras_graph.preprocess` that treats each channel alone, as a factor and a sum."""
    import numpy as np

    black = np.asarray(preprocess(np.zeros(3), preprocessing))
    white = np.asarray(preprocess(np.full(3, 255.0), preprocessing))
    return op.add(op.scale(image, (white - black) / 255), black)


def _last_layer(weights: Weights, network: Description) -> tuple[Array, Array]:
    """Return weights and bias of the last layer. Two, whose mean is taken, are one layer that takes two tokens."""
    import numpy as np

    names = ["cls_classifier", "distillation_classifier"] if _has_two_heads(weights) else ["classifier"]
    classes = len(network.names)
    matrices = [weights.get(f"{name}.weight", classes, network.hidden_size) for name in names]
    biases = [weights.get(f"{name}.bias", classes) for name in names]
    return np.concatenate(matrices, 1) / len(names), np.mean(biases, 0)


def _position_bias(weights: Weights, network: Description, attention: str) -> Array:
    """Return what BEiT adds to the scores of two tokens, by their distance. :return: (1, heads, tokens, tokens)."""
    import numpy as np

    side, span = network.side, 2 * network.side - 1
    name = f"{attention}.relative_position_bias.relative_position_bias_table"
    table = weights.get(name, span**2 + 3, network.num_attention_heads)
    rows, columns = np.divmod(np.arange(side**2), side)
    index = np.empty((side**2 + 1, side**2 + 1), np.int64)
    index[1:, 1:] = (rows[:, None] - rows + side - 1) * span + columns[:, None] - columns + side - 1
    # From the class token to a patch, from a patch to it, and to itself.
    index[0, :], index[:, 0], index[0, 0] = span**2, span**2 + 1, span**2 + 2
    return np.ascontiguousarray(table[index].transpose(2, 0, 1)[None])


class _GraphOperations:
    """OpenVINO's operations; see `_TensorOperations`."""

    def __init__(self, op: Any) -> None:
        self._op = op

    def _constant(self, array: Any, kind: str = "f4") -> Any:
        import numpy as np

        return self._op.constant(np.asarray(array, kind))

    def _whole(self, *numbers: int) -> Any:
        return self._constant(numbers, "i8")

    def patches(self, image: Any, weight: Array) -> Any:
        op, side = self._op, weight.shape[-1]
        x = op.transpose(image, self._whole(0, 3, 1, 2))
        x = op.convolution(x, self._constant(weight), [side, side], [0, 0], [0, 0], [1, 1])
        return op.transpose(op.reshape(x, self._whole(1, len(weight), -1), False), self._whole(0, 2, 1))

    def linear(self, x: Any, weight: Array) -> Any:
        return self._op.matmul(x, self._constant(weight), False, True)

    def normalise(self, x: Any, epsilon: float) -> Any:
        return self._op.mvn(x, self._whole(-1), True, epsilon, "inside_sqrt")

    def attention(self, query: Any, key: Any, value: Any, heads: int, bias: Array | None) -> Any:
        op = self._op
        split = [
            op.transpose(op.reshape(each, self._whole(0, 0, heads, -1), True), self._whole(0, 2, 1, 3))
            for each in (query, key, value)
        ]
        more = {} if bias is None else {"attention_mask": self._constant(bias)}
        x = op.scaled_dot_product_attention(*split, **more, causal=False)
        return op.reshape(op.transpose(x, self._whole(0, 2, 1, 3)), self._whole(0, 0, -1), True)

    def gelu(self, x: Any) -> Any:
        return self._op.gelu(x, "erf")

    def add(self, x: Any, y: Any) -> Any:
        import numpy as np

        return self._op.add(x, self._constant(y) if isinstance(y, np.ndarray) else y)

    def scale(self, x: Any, factors: Array) -> Any:
        return self._op.multiply(x, self._constant(factors))

    def prepend(self, token: Array, x: Any) -> Any:
        return self._op.concat([self._constant(token), x], 1)

    def first_tokens(self, x: Any, count: int) -> Any:
        op, one = self._op, self._whole(1)
        return op.reshape(op.slice(x, self._whole(0), self._whole(count), one, one), self._whole(0, -1), True)

    def mean_after(self, x: Any, count: int) -> Any:
        op, one = self._op, self._whole(1)
        rest = op.slice(x, self._whole(count), self._whole(2**31), one, one)
        return op.reduce_mean(rest, one, False)

    def softmax(self, x: Any) -> Any:
        return self._op.softmax(x, 1)


class _NumpyOperations:
    """The same in double precision; see `_TensorOperations`."""

    def patches(self, image: Any, weight: Array) -> Any:
        side = weight.shape[-1]
        number, rows, columns = len(image), image.shape[1] // side, image.shape[2] // side
        squares = image[:, : rows * side, : columns * side].reshape(number, rows, side, columns, side, 3)
        squares = squares.transpose(0, 1, 3, 5, 2, 4).reshape(number, rows * columns, -1)
        return self.linear(squares, weight.reshape(len(weight), -1))

    def linear(self, x: Any, weight: Array) -> Any:
        return x @ weight.T.astype(x.dtype)

    def normalise(self, x: Any, epsilon: float) -> Any:
        import numpy as np

        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)

    def attention(self, query: Any, key: Any, value: Any, heads: int, bias: Array | None) -> Any:
        split = [each.reshape(*each.shape[:2], heads, -1).transpose(0, 2, 1, 3) for each in (query, key, value)]
        scores = split[0] @ split[1].swapaxes(2, 3) / math.sqrt(split[0].shape[-1])
        shares = self.softmax(scores if bias is None else scores + bias)
        return (shares @ split[2]).transpose(0, 2, 1, 3).reshape(query.shape)

    def gelu(self, x: Any) -> Any:
        import numpy as np

        for image in x:  # numpy has no error function; one image at a time, for the sake of memory
            scaled = (image / math.sqrt(2)).ravel().tolist()
            image *= 0.5 + 0.5 * np.fromiter(map(math.erf, scaled), x.dtype, len(scaled)).reshape(image.shape)
        return x

    def add(self, x: Any, y: Any) -> Any:
        return x + y

    def scale(self, x: Any, factors: Array) -> Any:
        return x * factors

    def prepend(self, token: Array, x: Any) -> Any:
        import numpy as np

        return np.concatenate([np.repeat(token, len(x), 0), x], 1)

    def first_tokens(self, x: Any, count: int) -> Any:
        return x[:, :count].reshape(len(x), -1)

    def mean_after(self, x: Any, count: int) -> Any:
        return x[:, count:].mean(1)

    def softmax(self, x: Any) -> Any:
        import numpy as np

        shares = np.exp(x - x.max(-1, keepdims=True))
        return shares / shares.sum(-1, keepdims=True)

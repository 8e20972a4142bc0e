"""What is put behind a network from an ONNX file, so that its output is what a service takes: a class for each service.

Used by `builder.py`. Each computes the same in numpy, for the comparison, and in operations of ONNX, for the artefact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from provider_image.compiler.onnx_models.file import import_onnx
from provider_image.errors import UnsuitableModel
from provider_image.faces.heads import HEADS, STRIDES
from provider_image.services.embedding import MAX_DIMENSIONS

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: Least length of what is divided by its length: a vector of zeros stays one.
_EPSILON = 1e-12
#: Most outputs of a detector.
MAX_OUTPUTS = 12
#: What each head of `keras_graph.HEADS` means for the user.
_FOUND = {
    "none": "the output is probabilities",
    "softmax": "the output is logits; a softmax is added",
    "complement": "the output is the probability of the second class; that of the first is added",
}


class Operations:
    """Adds operations of ONNX to a graph, after those that are there."""

    def __init__(self, graph: Any) -> None:
        self._onnx = import_onnx()
        self._graph = graph
        self._count = 0

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add an operation. :return: the name of its value."""
        name = self._name()
        self._graph.node.append(self._onnx.helper.make_node(operator, inputs, [name], **attributes))
        return name

    def constant(self, values: Any, dtype: str) -> str:
        """Add a constant. :return: its name."""
        import numpy as np

        name = self._name()
        self._graph.initializer.append(self._onnx.numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def reshape(self, name: str, *shape: int) -> str:
        """Add a change of shape. :return: the name of its value."""
        return self.add("Reshape", name, self.constant(shape, "int64"))

    def _name(self) -> str:
        self._count += 1
        return f"mlg{self._count}"


class Ending(Protocol):
    """What is put behind a network."""

    #: What its outputs were found to be, for people.
    found: str
    #: Shape of the result, with an axis for the batch.
    shape: tuple[int, ...]

    def apply(self, outputs: Sequence[Array]) -> Array:
        """Compute the result, without the axis of the batch, from the network's outputs in f32."""

    def add(self, operations: Operations, names: Sequence[str]) -> str:
        """Add operations to the network's outputs in f32. :return: the name of the result."""


class Probabilities:
    """For classifiers: a head of `keras_graph.HEADS` makes probabilities of one output. See `Ending`."""

    def __init__(self, head: str, labels: int) -> None:
        self.found = _FOUND[head]
        self.shape: tuple[int, ...] = (1, labels)
        self._head = head
        #: How many the network returns for an image.
        self._numbers = 1 if head == "complement" else labels

    def apply(self, outputs: Sequence[Array]) -> Array:
        """Compute the result."""
        import numpy as np

        output = outputs[0].reshape(-1)
        if self._head == "softmax":
            powers = np.exp(output.astype(np.float64) - output.max())
            return np.asarray(powers / powers.sum(), np.float32)
        if self._head == "complement":
            return np.concatenate([1 - output, output])
        return output

    def add(self, operations: Operations, names: Sequence[str]) -> str:
        """Add operations for the result."""
        name = operations.reshape(names[0], -1, self._numbers)
        if self._head == "softmax":
            return operations.add("Softmax", name, axis=1)
        if self._head == "complement":
            other = operations.add("Sub", operations.constant([[1]], "float32"), name)
            return operations.add("Concat", other, name, axis=1)
        return name


class UnitVector:
    """For embeddings: one output, divided by its length. See `Ending`.

    :param outputs: the network's output for each image of the self-test.
    :raises UnsuitableModel: it is no vector.
    """

    def __init__(self, outputs: Sequence[Array]) -> None:
        import numpy as np

        shape, size = outputs[0].shape, outputs[0].size
        if size != max(shape, default=1) or not 2 <= size <= MAX_DIMENSIONS:
            raise UnsuitableModel(
                f"The output of the model is {shape}. It must be (N, values): one vector of 2 to {MAX_DIMENSIONS} "
                "values for each image."
            )
        if not all(np.isfinite(each).all() and np.linalg.norm(each) > _EPSILON for each in outputs):
            raise UnsuitableModel(
                "The model returns numbers that are not finite, or only zeros. Check its weights and --preprocessing."
            )
        self.found = f"the output is a vector of {size} values; it is divided by its length"
        self.shape: tuple[int, ...] = (1, size)

    def apply(self, outputs: Sequence[Array]) -> Array:
        """Compute the result."""
        import numpy as np

        vector = outputs[0].reshape(-1).astype(np.float64)
        return np.asarray(vector / max(float(np.linalg.norm(vector)), _EPSILON), np.float32)

    def add(self, operations: Operations, names: Sequence[str]) -> str:
        """Add operations for the result."""
        vector = operations.reshape(names[0], -1, self.shape[1])
        squares = operations.add("Mul", vector, vector)
        total = operations.add("MatMul", squares, operations.constant([[1]] * self.shape[1], "float32"))
        length = operations.add("Max", operations.add("Sqrt", total), operations.constant([[_EPSILON]], "float32"))
        return operations.add("Div", vector, length)


@dataclass(frozen=True, kw_only=True)
class _Output:
    """An output of a detector."""

    #: Its place among the outputs.
    number: int
    #: Rows, and numbers in a row.
    rows: int
    columns: int


class DetectorRows:
    """For detectors: all outputs joined to rows, as `faces/heads.py` reads them. See `Ending`.

    :param outputs: of one image.
    :param height, width: of the network's input.
    :raises UnsuitableModel: they are not those of a detector that is known.
    """

    def __init__(self, outputs: Sequence[Array], height: int, width: int) -> None:
        found = [
            _Output(number=number, rows=output.shape[1], columns=output.shape[2])
            for number, output in enumerate(outputs)
            if output.ndim == 3 and output.shape[0] == 1
        ]
        self.kind = "ssd"
        #: The outputs that are side by side in each group of rows.
        self._groups = [sorted(found, key=lambda one: (one.columns, one.number))]
        if len(found) == MAX_OUTPUTS:
            self.kind = "yunet"
            counts = [(height // stride) * (width // stride) for stride in STRIDES]
            self._groups = [[one for one in self._groups[0] if one.rows == count] for count in counts]
        columns = [[one.columns for one in group] for group in self._groups]
        rows = [{one.rows for one in group} for group in self._groups]
        expected = {"yunet": [[1, 1, 4, 10]] * len(STRIDES), "ssd": [[2, 4]]}[self.kind]
        is_odd = self.kind == "yunet" and bool(height % STRIDES[-1] or width % STRIDES[-1])
        if is_odd or columns != expected or any(len(each) != 1 for each in rows) or len(found) != len(outputs):
            shapes = ", ".join(str(output.shape) for output in outputs)
            raise UnsuitableModel(
                f"The outputs of the model are {shapes}. Two kinds of detectors are known: YuNet with 12 outputs, "
                "which are for strides of 8, 16 and 32 pixels two of (1, cells, 1), one of (1, cells, 4) and one of "
                "(1, cells, 10), and whose input's sides are multiples of 32; and SSD with (1, boxes, 2), "
                "probabilities of background and face, and (1, boxes, 4), left, top, right and bottom as shares of the "
                "sides."
            )
        self.shape: tuple[int, ...] = (1, sum(each.pop() for each in rows), HEADS[self.kind])
        self.found = f"the outputs are those of a detector of the kind {self.kind}"

    def apply(self, outputs: Sequence[Array]) -> Array:
        """Compute the result."""
        import numpy as np

        joined = [np.concatenate([outputs[one.number][0] for one in group], axis=1) for group in self._groups]
        return np.concatenate(joined, axis=0)

    def add(self, operations: Operations, names: Sequence[str]) -> str:
        """Add operations for the result."""
        joined = [
            operations.add(
                "Concat",
                *(operations.reshape(names[one.number], -1, one.rows, one.columns) for one in group),
                axis=2,
            )
            for group in self._groups
        ]
        return operations.add("Concat", *joined, axis=1)

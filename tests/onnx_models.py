"""Small ONNX networks with seeded weights, as users save them, for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime

from provider_image.compiler.custom import CustomModel
from provider_image.compiler.onnx_models import builder
from provider_image.models.artefact import Artefact

SIDE = 32
PETS = ("cat", "dog", "parrot")
#: Factors of the weights of the last layer, for pixel values up to 255 and up to 1.
_SCALES = {True: 0.002, False: 0.3}


def network(
    *,
    layout: str = "nchw",
    ending: str | None = "Softmax",
    classes: int = 3,
    sides: tuple[int | str, int | str] = (SIDE, SIDE),
    batch: int | str = "N",
    opset: int = 17,
    is_raw: bool = False,
    kind: int = onnx.TensorProto.FLOAT,
    before_end: Sequence[Any] = (),
    seed: int = 3,
) -> Any:
    """Make a classifier: convolution, relu, mean of each channel, a layer of `classes`, and an ending.

    :param layout: nchw or nhwc.
    :param ending: the last operator; None: logits.
    :param is_raw: its pixel values go up to 255.
    :param before_end: operations that turn the value `logits` into the value `end`.
    """
    random = np.random.default_rng(seed)
    types = onnx.TensorProto
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind) if kind != types.UINT8 else np.dtype(np.float32)
    weights = {
        "kernel": random.normal(0, 0.3, (8, 3, 3, 3)),
        "kernel_bias": random.normal(0, 0.1, 8),
        "dense": random.normal(0, 4, (8, classes)) * _SCALES[is_raw],
        "dense_bias": random.normal(0, 0.3, classes),
    }
    make = onnx.helper.make_node
    nodes = [make("Cast", ["image"], ["numbers"], to=types.FLOAT)] if kind == types.UINT8 else []
    taken = nodes[-1].output[0] if nodes else "image"
    if layout == "nhwc":
        nodes.append(make("Transpose", [taken], ["first"], perm=[0, 3, 1, 2]))
        taken = "first"
    nodes += [
        make("Conv", [taken, "kernel", "kernel_bias"], ["features"], strides=[2, 2], pads=[1, 1, 1, 1]),
        make("Relu", ["features"], ["positive"]),
        make("GlobalAveragePool", ["positive"], ["pooled"]),
        make("Flatten", ["pooled"], ["flat"], axis=1),
        make("Gemm", ["flat", "dense", "dense_bias"], ["logits"]),
        *before_end,
    ]
    last = "end" if before_end else "logits"
    if ending is not None:
        nodes.append(make(ending, [last], ["answer"], **({"axis": 1} if "Softmax" in ending else {})))
        last = "answer"
    shape = (batch, 3, *sides) if layout == "nchw" else (batch, *sides, 3)
    graph = onnx.helper.make_graph(
        nodes,
        "made by a test",
        [onnx.helper.make_tensor_value_info("image", kind, shape)],
        [onnx.helper.make_tensor_value_info(last, types.FLOAT if kind == types.UINT8 else kind, (batch, classes))],
        [onnx.numpy_helper.from_array(values.astype(dtype), name) for name, values in weights.items()],
    )
    return onnx.helper.make_model(
        graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", opset)], producer_name="a test"
    )


def hidden_determinant() -> list[Any]:
    """Operations that add a determinant times zero, which OpenVINO does not have, to the logits."""
    make = onnx.helper.make_node
    matrix = onnx.numpy_helper.from_array(np.eye(2, dtype=np.float32))
    return [
        make("ReduceSum", ["logits"], ["sum"], keepdims=0),
        make("Constant", [], ["square"], value=matrix),
        make("Mul", ["square", "sum"], ["scaled"]),
        make("Det", ["scaled"], ["determinant"]),
        make("Sub", ["determinant", "determinant"], ["zero"]),
        make("Add", ["logits", "zero"], ["end"]),
    ]


def write(model: Any, path: Path, edit: Callable[[Any], object] = lambda model: None) -> Path:
    """Save a network after an edit in place."""
    edit(model)
    path.write_bytes(model.SerializeToString())
    return path


def move_weights_out(model: Any, folder: Path, file: str = "weights.data") -> Any:
    """Move the weights of a network into a file in a folder; it refers to them."""
    data = b""
    for tensor in model.graph.initializer:
        place(tensor, location=file, offset=str(len(data)), length=str(len(tensor.raw_data)))
        data += tensor.raw_data
        tensor.ClearField("raw_data")
    (folder / file).write_bytes(data)
    return model


def place(tensor: Any, **entries: str) -> None:
    """Say that a tensor is elsewhere."""
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def run(path: Path, inputs: np.ndarray) -> np.ndarray:
    """Run a saved network with onnxruntime."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs})[0]


def install_unusual(models: Path) -> Artefact:
    """Install `unusual`, a model with an operator that OpenVINO does not have; its file stays beside the folder."""
    labels = models.parent / "unusual.txt"
    labels.write_text("\n".join(PETS))
    file = write(network(before_end=hidden_determinant()), models.parent / "unusual.onnx")
    custom = CustomModel(name="unusual", kind="onnx", file=file, labels=labels, preprocessing="torch", channels="bgr")
    return builder.build(models, custom)

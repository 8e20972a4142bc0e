"""Small nets with seeded weights that take an image and return one, as ONNX files, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper


def image_net(
    *,
    layout: str = "nchw",
    sides: tuple[int | str, int | str] = ("H", "W"),
    scale: int = 1,
    ending: str | None = "Clip",
    looks_everywhere: bool = False,
    channels: int = 3,
    seed: int = 5,
) -> Any:
    """Make a net of three convolutions, which looks three pixels far; it takes and returns values from 0 to 1.

    :param layout: nchw or nhwc, of input and output.
    :param scale: it returns so many pixels for each.
    :param ending: Clip, to 0 and 1; Tanh, so that it returns -1 to 1; None.
    :param looks_everywhere: it divides by the deviation of each channel, as nets for styles do.
    :param channels: of the returned image.
    """
    random = np.random.default_rng(seed)
    make = onnx.helper.make_node
    last = channels * scale**2
    # Close to the identity, so that it returns an image.
    identity = np.zeros((last, 8, 3, 3))
    identity[:, :3, 1, 1] = np.eye(3)[:channels].repeat(scale**2, axis=0)
    first = np.zeros((8, 3, 3, 3))
    first[:3, :, 1, 1] = np.eye(3)
    second = np.zeros((8, 8, 3, 3))
    second[:, :, 1, 1] = np.eye(8)
    weights = {
        "first": first + random.normal(0, 0.03, first.shape),
        "second": second + random.normal(0, 0.03, second.shape),
        "third": identity + random.normal(0, 0.03, identity.shape),
        "bias": random.normal(0, 0.02, last),
    }
    nodes = [make("Transpose", ["image"], ["start"], perm=[0, 3, 1, 2])] if layout == "nhwc" else []
    nodes += [
        make("Conv", [nodes[0].output[0] if nodes else "image", "first"], ["a"], pads=[1, 1, 1, 1]),
        make("Relu", ["a"], ["b"]),
        make("Conv", ["b", "second"], ["c"], pads=[1, 1, 1, 1]),
        make("Relu", ["c"], ["d"]),
    ]
    value = "d"
    if looks_everywhere:
        weights |= {"gain": np.full(8, 0.25), "shift": np.full(8, 0.5)}
        nodes.append(make("InstanceNormalization", ["d", "gain", "shift"], ["n"]))
        value = "n"
    nodes.append(make("Conv", [value, "third", "bias"], ["e"], pads=[1, 1, 1, 1]))
    value = "e"
    if scale > 1:
        nodes.append(make("DepthToSpace", ["e"], ["f"], blocksize=scale, mode="CRD"))
        value = "f"
    if ending == "Clip":
        weights |= {"low": np.array(0.0), "high": np.array(1.0)}
        nodes.append(make("Clip", [value, "low", "high"], ["g"]))
        value = "g"
    elif ending is not None:
        nodes.append(make(ending, [value], ["g"]))
        value = "g"
    if layout == "nhwc":
        nodes.append(make("Transpose", [value], ["end"], perm=[0, 2, 3, 1]))
        value = "end"
    shape = ("N", 3, *sides) if layout == "nchw" else ("N", *sides, 3)
    graph = onnx.helper.make_graph(
        nodes,
        "made by a test",
        [onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, (None, None, None, None))],
        [onnx.numpy_helper.from_array(each.astype(np.float32), name) for name, each in weights.items()],
    )
    return onnx.helper.make_model(
        graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)], producer_name="a test"
    )

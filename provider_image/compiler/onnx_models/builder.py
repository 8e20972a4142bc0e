"""The builder of custom models that were saved as ONNX files.

Called by `mlg models compile NAME --onnx FILE --labels FILE`; needs the extra `[onnx]`. The file is checked and copied
(`file.py`); what describes a custom model, and what its output means, is decided as for Keras (`custom.py`). The
preprocessing and the head become operations of ONNX around the network. OpenVINO converts that; where it cannot, or
where it gives other results than onnxruntime, the artefact is for the backend `onnxruntime`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.backends.onnxruntime import GRAPH_FILE, import_onnxruntime, open_session
from provider_image.backends.openvino import import_openvino
from provider_image.compiler.custom import (
    CustomModel,
    Labels,
    begin_custom,
    check_classes,
    check_description,
    choose_head,
    failed_on_images,
    find_size,
)
from provider_image.compiler.installing import build_folder
from provider_image.compiler.keras_graph import preprocess
from provider_image.compiler.labels import read_labels
from provider_image.compiler.onnx_models.endings import (
    MAX_OUTPUTS,
    DetectorRows,
    Ending,
    Operations,
    Probabilities,
    UnitVector,
)
from provider_image.compiler.onnx_models.file import check_onnx_file, check_shapes, import_onnx, missing
from provider_image.compiler.self_test import self_test_images
from provider_image.compiler.verification import decode_for, install_as_it_is, verify_and_install
from provider_image.errors import CompilationFailed, ConfigError, InferenceFailed, UnsuitableModel
from provider_image.images.decoding import decode
from provider_image.models.artefact import Artefact
from provider_image.precision import TOLERANCE

if TYPE_CHECKING:
    import numpy as np

    Arrays = Sequence[np.ndarray[Any, Any]]

#: Part of the digest. Change it whenever the graphs' results change.
RECIPE = "onnx-file-1"
#: Operators that do not change values during inference, as far as the meaning of an output is concerned.
_PASS_THROUGH = ("Identity", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze")
#: Last operators -> the activation that `custom.choose_head` knows; others are not known to be one.
_ACTIVATIONS = {
    "Softmax": "softmax",
    "LogSoftmax": "log_softmax",
    "Sigmoid": "sigmoid",
    "HardSigmoid": "hard_sigmoid",
    "Relu": "relu",
    "Tanh": "tanh",
    **dict.fromkeys(("Gemm", "MatMul", "Conv", "GlobalAveragePool", "AveragePool", "ReduceMean"), "linear"),
}


@dataclass(frozen=True, kw_only=True)
class NetworkInput:
    """What a network takes."""

    #: Height and width in pixels, None for one that is open.
    sides: tuple[int | None, int | None]
    #: True: channels first (NCHW); False: channels last (NHWC).
    is_channels_first: bool
    #: True: blue, green, red.
    is_bgr: bool
    #: numpy's type of its numbers.
    dtype: Any


def build(
    models: Path,
    custom: CustomModel,
    *,
    f16_within: float = TOLERANCE,
    on_step: Callable[[str], None] = lambda step: None,
) -> Artefact:
    """Build a custom model in the models folder; an installed one of the same name is replaced.

    :param f16_within: see `verification.verify_and_install`.
    :param on_step: called with the name of each step.
    :raises ConfigError: it cannot have this name, title, size, preprocessing or order of channels.
    :raises ModelError: it cannot be built; what is not allowed was not run.
    :raises NotInstalled: the models folder cannot be written.
    """
    check_description(models, custom)
    labels = () if custom.labels is None else read_labels(custom.labels)
    is_detector = custom.service == "face_detection"
    try:
        runtime = import_onnxruntime()
    except ImportError as error:
        raise missing(error) from error
    with build_folder(models, custom.name) as folder:
        on_step("checking the file")
        checked = check_onnx_file(custom.file, MAX_OUTPUTS if is_detector else 1)
        network = checked.model
        preprocessing = custom.preprocessing or checked.preprocessing or "none"
        if preprocessing == "caffe" and custom.channels is not None:
            raise ConfigError("The preprocessing caffe gives blue, green and red already. Omit --channels.")
        channels = custom.channels or ("rgb" if preprocessing == "caffe" else checked.channels)
        taken = find_input(network, preprocessing, channels)
        size = find_size(taken.sides, custom)
        draft = begin_custom(
            custom,
            # A detector gets images as they are, and returns boxes in their pixels.
            size=(0, 0) if is_detector else size,
            tile=size if is_detector else (0, 0),
            labels=labels,
            preprocessing=preprocessing,
            weights_sha256=checked.sha256,
            recipe=RECIPE,
            reference=f"onnxruntime {runtime.__version__}",
        )
        fix_input(network, size, taken)
        check_shapes(network)
        is_bgr = taken.is_bgr or preprocessing == "caffe"
        order = "channels first" if taken.is_channels_first else "channels last"
        on_step(f"running the network on {size[0]} x {size[1]}, {order}, {'BGR' if is_bgr else 'RGB'}")
        reference = Reference(network, draft, taken)
        arrays = [decode(data, *size, draft.crop) for data in self_test_images().values()]
        try:
            outputs = [reference.outputs(array) for array in arrays]
        except Exception as error:  # onnxruntime's errors have no base in common
            raise failed_on_images(draft, error) from error
        ending = _find_ending(custom, network, outputs, size, labels)
        on_step(ending.found)
        if custom.service == "embedding":
            draft = replace(draft, dimensions=ending.shape[1])
        complete, operations, names = begin_complete(network, draft, taken)
        complete = end_complete(complete, ending.add(operations, names), ending.shape)

        def results(arrays: Arrays) -> Arrays:
            return [ending.apply(reference.outputs(array)) for array in arrays]

        on_step("converting")
        return install_complete(
            complete,
            folder,
            models,
            draft,
            reference=results,
            f16_within=f16_within,
            on_step=on_step,
            backend=custom.backend,
        )


def _find_ending(
    custom: CustomModel, network: Any, outputs: Sequence[Arrays], size: tuple[int, int], labels: Labels
) -> Ending:
    """Choose what is put behind a network, by its outputs for each image of the self-test.

    :raises UnsuitableModel: they are not what its service takes.
    """
    if custom.service == "face_detection":
        return DetectorRows(outputs[0], *size)
    only = [each[0] for each in outputs]
    if custom.service == "embedding":
        return UnitVector(only)
    check_classes(_count_classes(only), labels)
    head = choose_head([each.reshape(-1) for each in only], last_activation(network), custom.returns)
    return Probabilities(head, len(labels))


def install_complete(
    complete: bytes,
    folder: Path,
    models: Path,
    draft: Artefact,
    *,
    reference: Callable[[Arrays], Arrays],
    f16_within: float,
    on_step: Callable[[str], None],
    tolerance: float = TOLERANCE,
    backend: str | None = None,
) -> Artefact:
    """Install a complete ONNX file: for OpenVINO if that can run it and gives the right results, else for onnxruntime.

    :param folder: from `installing.build_folder`.
    :param backend: onnxruntime installs it for that in any case; None chooses.
    :param reference, tolerance: see `verification.verify_and_install`.
    """
    for_openvino, for_onnxruntime = folder / "openvino", folder / "onnxruntime"
    for_onnxruntime.mkdir()
    (for_onnxruntime / GRAPH_FILE).write_bytes(complete)
    if backend is None:
        try:
            for_openvino.mkdir()
            return verify_and_install(
                _convert(for_onnxruntime / GRAPH_FILE),
                for_openvino,
                models,
                draft,
                reference=reference,
                tolerance=tolerance,
                f16_within=f16_within,
                on_step=on_step,
            )
        except (RuntimeError, CompilationFailed, InferenceFailed) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0]
            on_step(f"OpenVINO cannot be used, so the model will run on onnxruntime: {reason}")
    opened = open_batch(complete, draft)
    if opened is None:
        on_step("it runs one image at a time, on a GPU too")
    else:
        (for_onnxruntime / GRAPH_FILE).write_bytes(opened)
    return install_as_it_is(
        for_onnxruntime,
        models,
        draft,
        backend="onnxruntime",
        files=(GRAPH_FILE,),
        reference=reference,
        tolerance=tolerance,
    )


def open_batch(complete: bytes, draft: Artefact) -> bytes | None:
    """Open the axis of the batch of a complete ONNX file, so that a GPU can run several images at once.

    :return: None if it is for parts of images, or does not answer several as it answers each.
    """
    import numpy as np

    if draft.tile != (0, 0):
        return None
    model = import_onnx().ModelProto.FromString(complete)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    opened: bytes = model.SerializeToString(deterministic=True)
    arrays = decode_for(draft, self_test_images())
    try:
        session = open_session(opened)
        name = session.get_inputs()[0].name
        together = session.run(None, {name: np.stack(arrays)})[0]
        alone = np.concatenate([session.run(None, {name: array[None]})[0] for array in arrays])
    except Exception:  # noqa: BLE001 - onnxruntime's errors have no base in common
        return None
    is_same = together.shape == alone.shape and np.allclose(together, alone, rtol=TOLERANCE, atol=TOLERANCE)
    return opened if is_same else None


def find_input(network: Any, preprocessing: str, channels: str | None) -> NetworkInput:
    """Read what a network takes from its input. :raises UnsuitableModel: no image. :raises ConfigError:"""
    import numpy as np

    kind = network.graph.input[0].type.tensor_type
    shape = tuple(side.dim_value or None for side in kind.shape.dim)
    if len(shape) != 4 or shape[0] not in (None, 1) or (shape[1] == 3) == (shape[3] == 3):
        shown = ", ".join("?" if side is None else str(side) for side in shape)
        raise UnsuitableModel(
            f"The input of the model is ({shown}). It must be (N, 3, height, width) or (N, height, width, 3), with one "
            "image for N. Export it with fixed channels and a batch of one, or an open one."
        )
    is_channels_first = shape[1] == 3
    dtype = import_onnx().helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if dtype == np.uint8 and preprocessing != "none":
        raise ConfigError(
            "The model takes whole numbers from 0 to 255, so it scales them itself. Omit --preprocessing."
        )
    height, width = shape[2:] if is_channels_first else shape[1:3]
    return NetworkInput(
        sides=(height, width), is_channels_first=is_channels_first, is_bgr=channels == "bgr", dtype=np.dtype(dtype)
    )


def fix_input(network: Any, size: tuple[int, int], taken: NetworkInput) -> None:
    """Set the shape of a network's input to one image."""
    shape = (1, 3, *size) if taken.is_channels_first else (1, *size, 3)
    for side, number in zip(network.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
        side.dim_value = number


class Reference:
    """The network as it was saved, run by onnxruntime, with the preprocessing in numpy."""

    def __init__(self, network: Any, draft: Artefact, taken: NetworkInput) -> None:
        try:
            self._session = open_session(network.SerializeToString())
        except Exception as error:  # onnxruntime's errors have no base in common
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UnsuitableModel(f"onnxruntime cannot load the model: {first_line[:300]}") from error
        self._preprocessing = draft.preprocessing
        self._taken = taken

    def output(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the network's only output for a decoded image, uint8 (height, width, 3), as f32."""
        (found,) = self.outputs(array)
        return found

    def outputs(self, array: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        """Return the network's outputs for a decoded image, likewise."""
        import numpy as np

        pixels = preprocess(array.astype(np.float32), self._preprocessing)
        if self._taken.is_bgr:
            pixels = pixels[..., ::-1]
        if self._taken.is_channels_first:
            pixels = pixels.transpose(2, 0, 1)
        pixels = np.ascontiguousarray(pixels, np.float32).astype(self._taken.dtype)
        found = self._session.run(None, {self._session.get_inputs()[0].name: pixels[None]})
        return [np.asarray(output, np.float32) for output in found]


def _count_classes(outputs: Arrays) -> int:
    """Return the number of classes of a network. :raises UnsuitableModel: its output is not one number per class."""
    shape = outputs[0].shape
    if max(shape, default=1) != outputs[0].size or shape[:1] not in ((), (1,), (outputs[0].size,)):
        raise UnsuitableModel(f"The output of the model is {shape}. It must be (N, classes): one number per class.")
    return outputs[0].size


def last_activation(network: Any) -> str | None:
    """Return the name of the last activation, linear if there is none; None if the last operator is of another kind."""
    makers = {name: node for node in network.graph.node for name in node.output if name}
    weights = {each.name for each in network.graph.initializer}
    name = network.graph.output[0].name
    while (node := makers.get(name)) is not None:
        if node.op_type == "Add" and any(each in weights for each in node.input):  # a bias
            return "linear"
        if node.op_type not in _PASS_THROUGH:
            return _ACTIVATIONS.get(node.op_type)
        name = node.input[0]
    return None


class Pixels:
    """A value of a graph, to which `keras_graph.preprocess` adds its operations as if it were an array."""

    def __init__(self, operations: Operations, name: str) -> None:
        self._operations = operations
        self.name = name

    def __sub__(self, other: Any) -> Pixels:
        return Pixels(self._operations, self._operations.add("Sub", self.name, self._f32(other)))

    def __truediv__(self, other: Any) -> Pixels:
        return Pixels(self._operations, self._operations.add("Div", self.name, self._f32(other)))

    def __getitem__(self, key: Any) -> Pixels:
        assert key == (..., slice(None, None, -1))  # the other order of channels
        order = self._operations.constant([2, 1, 0], "int64")
        return Pixels(self._operations, self._operations.add("Gather", self.name, order, axis=3))

    def _f32(self, values: Any) -> str:
        return self._operations.constant(values, "float32")


def begin_complete(network: Any, draft: Artefact, taken: NetworkInput) -> tuple[Any, Operations, list[str]]:
    """Put preprocessing in front of a network.

    :return: an onnx.ModelProto that takes uint8 RGB (1, height, width, 3), what adds operations to it, and the names
        of the network's outputs, as f32.
    """
    onnx = import_onnx()
    types = onnx.TensorProto
    complete = onnx.ModelProto(ir_version=network.ir_version, producer_name=network.producer_name)
    complete.opset_import.extend(network.opset_import)
    complete.graph.name = draft.name
    value = onnx.helper.make_tensor_value_info("image", types.UINT8, (1, *draft.net_size, 3))
    complete.graph.input.append(value)
    complete.graph.initializer.extend(network.graph.initializer)
    operations = Operations(complete.graph)
    pixels = Pixels(operations, operations.add("Cast", "image", to=types.FLOAT))
    pixels = preprocess(pixels, draft.preprocessing)
    if taken.is_bgr:
        pixels = pixels[..., ::-1]
    name = pixels.name
    if taken.is_channels_first:
        name = operations.add("Transpose", name, perm=[0, 3, 1, 2])
    original = network.graph.input[0]
    complete.graph.node.append(
        onnx.helper.make_node("Cast", [name], [original.name], to=original.type.tensor_type.elem_type)
    )
    complete.graph.node.extend(network.graph.node)
    return complete, operations, [operations.add("Cast", each.name, to=types.FLOAT) for each in network.graph.output]


def end_complete(complete: Any, name: str, shape: tuple[int, ...]) -> bytes:
    """Return a network as an ONNX file. :param name, shape: of the value that it returns, f32."""
    onnx = import_onnx()
    value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
    complete.graph.output.append(value)
    data: bytes = complete.SerializeToString(deterministic=True)
    return data


def _convert(file: Path) -> Any:
    """Have OpenVINO read a complete ONNX file. :raises RuntimeError: it cannot."""
    return import_openvino().Core().read_model(str(file))

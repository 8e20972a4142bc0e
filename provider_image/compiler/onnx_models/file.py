"""The ONNX file of a custom model: checked, and copied from what was checked.

Called by `builder.py`, in a confined process (`compiler/confined.py`), because C code of protobuf reads the file. Only
listed operators of ONNX itself pass, without subgraphs, functions, texts and random numbers, and weights are in the
file or in plain files beside it. The copy has new names and nothing else in it, so what other programs read is what was
checked.
Half precision becomes f32 in it, because its rounding is another in each program. Weakness: how much memory a network
needs is known only as far as its shapes can be inferred.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import io
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from provider_image.compiler.keras_config import words
from provider_image.errors import CompilerMissing, UnsafeModelFile, UnsuitableModel, WeightsMissing

#: Largest file, and most bytes of all weights: protobuf ends at 2^31, and the copy holds them all.
MAX_BYTES = 2_000_000_000
#: Most operations, and most weights.
MAX_NODES = 50_000
MAX_TENSORS = 50_000
#: Most numbers of a value between two operations, 1 GB in f32.
MAX_ELEMENTS = 2**28
#: Versions of ONNX' operators that are accepted. onnxruntime reads no older ones; the tests cover these.
MIN_OPSET, MAX_OPSET = 7, 26

#: Version of the format of the copy, which newer operators do not change.
_IR_VERSION = 8
_MAX_RANK = 8
_MAX_NAME_LENGTH = 128
#: Operators that compute values from values, and always the same.
OPERATORS = words(
    """
    Abs Acos Acosh Add AffineGrid And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization
    BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu CenterCropPad Clip Col2Im Concat
    Constant ConstantOfShape Conv ConvInteger ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace DequantizeLinear Det
    Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements
    GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization
    HardSigmoid HardSwish Hardmax Identity InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less
    LessOrEqual Log LogSoftmax LpNormalization LpPool MatMul MatMulInteger Max MaxPool MaxRoiPool MaxUnpool Mean
    MeanVarianceNormalization Min Mish Mod Mul Neg Not OneHot Or PRelu Pad Pow QLinearConv QLinearMatMul QuantizeLinear
    RMSNormalization RNN Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign RotaryEmbedding Round Scatter
    ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth
    Split Sqrt Squeeze Sub Sum Swish Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
    """
)
#: Types of weights -> (bytes of a number, the field that has them if they are not in `raw_data`).
_TENSOR_TYPES: Mapping[str, tuple[int, str]] = {
    "FLOAT": (4, "float_data"),
    "DOUBLE": (8, "double_data"),
    "FLOAT16": (2, "int32_data"),
    "BFLOAT16": (2, "int32_data"),
    "BOOL": (1, "int32_data"),
    "INT8": (1, "int32_data"),
    "UINT8": (1, "int32_data"),
    "INT16": (2, "int32_data"),
    "UINT16": (2, "int32_data"),
    "INT32": (4, "int32_data"),
    "INT64": (8, "int64_data"),
    "UINT32": (4, "uint64_data"),
    "UINT64": (8, "uint64_data"),
}
_TYPED_FIELDS = ("float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data")
#: Kinds of attributes -> the field that has the value. Others hold graphs, types or sparse tensors.
_ATTRIBUTE_FIELDS: Mapping[str, str] = {
    "FLOAT": "f",
    "INT": "i",
    "STRING": "s",
    "TENSOR": "t",
    "FLOATS": "floats",
    "INTS": "ints",
    "STRINGS": "strings",
}
#: Types that become f32, and the attributes that name a type.
_HALF = ("FLOAT16", "BFLOAT16")
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "stash_type", "softmax_precision")
#: What ONNX defines a file to say about its image -> what that means here.
_PIXEL_FORMATS = {"Rgb8": "rgb", "Bgr8": "bgr"}
_PIXEL_RANGES = {"NominalRange_0_255": "none", "Normalized_0_1": "unit", "Normalized_1_1": "tf"}


@dataclass(frozen=True, kw_only=True)
class CheckedNetwork:
    """A network that other programs may read."""

    #: An onnx.ModelProto with only what was checked, and all weights in it. It has one input, and one output unless
    #: more were allowed.
    model: Any
    #: Digest of the file, and of the files beside it that have weights.
    sha256: str
    #: The name of the file, for messages.
    display_name: str
    #: What the file says about its image: one of `custom.CHANNELS` and of `custom.PREPROCESSINGS`; None: nothing.
    channels: str | None
    preprocessing: str | None


def import_onnx() -> Any:
    """Import onnx. :raises CompilerMissing: it is not installed; says how to install it."""
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        raise missing(error) from error


def missing(error: ImportError) -> CompilerMissing:
    """Make the error for a package of the extra `onnx` that cannot be imported."""
    return CompilerMissing(
        f'Compiling ONNX models needs onnx and onnxruntime ({error}). Install them: pip install "mlg[onnx]", '
        "in a source checkout: scripts/setup onnx"
    )


def check_onnx_file(path: Path, max_outputs: int = 1) -> CheckedNetwork:
    """Check an ONNX file and copy what was checked.

    :param max_outputs: most outputs of its network.
    :raises WeightsMissing: there is no such file, or none that it names beside it.
    :raises UnsafeModelFile: it has something that is not allowed; names the part.
    :raises UnsuitableModel: its network is not one of an image.
    """
    onnx = import_onnx()
    data = _read_file(path)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError, which is in a module of its own
        raise UnsafeModelFile(f"{path.name} is not a valid ONNX file ({error}).") from error
    digest = hashlib.sha256(data)
    del data
    weights = _Weights(onnx, path.parent)
    try:
        copy = _copy_model(onnx, model, weights, max_outputs)
    except UnsafeModelFile as error:
        raise UnsafeModelFile(f"{path.name} is refused. {error.reason}") from error
    for each in weights.sha256s():
        digest.update(each)
    stated = {each.key: each.value for each in model.metadata_props[:100]}
    return CheckedNetwork(
        model=copy,
        sha256=digest.hexdigest(),
        display_name=path.name,
        channels=_PIXEL_FORMATS.get(stated.get("Image.BitmapPixelFormat", "")),
        preprocessing=_PIXEL_RANGES.get(stated.get("Image.NominalPixelRange", "")),
    )


def check_shapes(model: Any) -> None:
    """Infer the shapes of all values of a checked network whose input has a fixed size.

    :raises UnsafeModelFile: one is too large.
    :raises UnsuitableModel: they contradict each other.
    """
    onnx = import_onnx()
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except Exception as error:  # its errors have no base in common
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsuitableModel(f"The shapes of the network do not fit each other: {first_line[:300]}") from error
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        sides = [side.dim_value for side in value.type.tensor_type.shape.dim if side.HasField("dim_value")]
        if math.prod(map(abs, sides)) > MAX_ELEMENTS:
            raise UnsafeModelFile(
                f"The network has a value of {' x '.join(map(str, sides))} numbers. At most {MAX_ELEMENTS} are allowed."
            )


def _copy_model(onnx: Any, model: Any, weights: _Weights, max_outputs: int) -> Any:
    """Copy a model with new names. :raises UnsafeModelFile: it has something that is not allowed."""
    graph = model.graph
    if not graph.node:
        raise UnsafeModelFile("It is not an ONNX model: it has no operations.")
    if len(graph.node) > MAX_NODES or len(graph.initializer) > MAX_TENSORS:
        raise UnsafeModelFile(f"It has more than {MAX_NODES} operations or {MAX_TENSORS} weights.")
    if model.functions:
        raise UnsafeModelFile(
            f"It defines the function {_shown(model.functions[0].name)}. Export it with its functions expanded "
            "(torch.onnx.export(..., optimize=True), or onnx.inliner)."
        )
    if graph.sparse_initializer:
        raise UnsafeModelFile("Its weights are sparse. Export them as dense ones.")
    copy = onnx.ModelProto(ir_version=_IR_VERSION, producer_name="mlg")
    copy.opset_import.add(domain="", version=_opset(model))
    copy.graph.name = "network"
    names = _Names()
    initialised = {each.name for each in graph.initializer}
    # Before version 4 of the format, weights were inputs as well.
    inputs = [each for each in graph.input if each.name not in initialised]
    if len(inputs) != 1:
        raise UnsuitableModel(f"The model takes {len(inputs)} inputs. Only classifiers of one image are supported.")
    if not 1 <= len(graph.output) <= max_outputs:
        raise UnsuitableModel(
            f"The model has {len(graph.output)} outputs. "
            + (
                "Only models with one output are supported: cut the others off with onnx.utils.extract_model."
                if max_outputs == 1
                else f"Only models with up to {max_outputs} outputs are supported."
            )
        )
    copy.graph.input.append(_copy_value(onnx, inputs[0], names.define(inputs[0].name)))
    for tensor in graph.initializer:
        copy.graph.initializer.append(weights.copy(tensor, names.define(tensor.name)))
    for node in graph.node:
        _copy_node(onnx, node, copy.graph.node.add(), names, weights)
    for output in graph.output:
        copy.graph.output.append(_copy_value(onnx, output, names.find(output.name)))
        copy.graph.output[-1].type.tensor_type.ClearField("shape")  # what it really is, is seen when it runs
    return copy


class _Names:
    """The names of values: each is defined once, and used only afterwards, so that no graph has a cycle."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def define(self, name: str) -> str:
        """Return the new name of a value that is defined here. :raises UnsafeModelFile: it was defined before."""
        if not name or name in self._names:
            raise UnsafeModelFile(f"It defines the value {_shown(name)} twice.")
        self._names[name] = f"v{len(self._names)}"
        return self._names[name]

    def find(self, name: str) -> str:
        """Return the new name of a value. :raises UnsafeModelFile: it is not defined so far."""
        if name not in self._names:
            raise UnsafeModelFile(f"It uses the value {_shown(name)}, which is not computed before that.")
        return self._names[name]


def _copy_value(onnx: Any, value: Any, name: str) -> Any:
    """Copy the input or the output of a network. :raises UnsuitableModel: it is no tensor of numbers."""
    types = onnx.TensorProto
    kind = value.type.tensor_type
    if value.type.WhichOneof("value") != "tensor_type" or kind.elem_type not in (
        types.FLOAT,
        types.FLOAT16,
        types.DOUBLE,
        types.UINT8,
    ):
        raise UnsuitableModel(f"{_shown(value.name)} is not a tensor of f32, f16, f64 or uint8.")
    if len(kind.shape.dim) > _MAX_RANK:
        raise UnsuitableModel(f"{_shown(value.name)} has more than {_MAX_RANK} dimensions.")
    shape = [side.dim_value if side.dim_value > 0 else None for side in kind.shape.dim]
    return onnx.helper.make_tensor_value_info(name, _widened(onnx, kind.elem_type), shape)


def _widened(onnx: Any, number: int) -> int:
    """Return the type of a value in the copy."""
    types = onnx.TensorProto
    return int(types.FLOAT if number in [getattr(types, name) for name in _HALF] else number)


def _copy_node(onnx: Any, node: Any, copy: Any, names: _Names, weights: _Weights) -> None:
    """Copy an operation. :raises UnsafeModelFile: it is not allowed."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
        operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        raise UnsafeModelFile(
            f"It contains the operator {_shown(operator)}. Only operators of ONNX itself that always compute the same "
            "values from values are allowed: no subgraphs, random numbers, texts or sequences."
        )
    copy.op_type = node.op_type
    copy.input.extend(names.find(name) if name else "" for name in node.input)
    copy.output.extend(names.define(name) if name else "" for name in node.output)
    if node.op_type == "Dropout":  # may drop values at random if it is told that this is training
        if any(copy.output[1:]) or not copy.input or not copy.output:
            raise UnsafeModelFile("It uses the mask of a Dropout, which is for training only.")
        copy.op_type = "Identity"
        del copy.input[1:], copy.output[1:]
        return
    for attribute in node.attribute:
        kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
        field = _ATTRIBUTE_FIELDS.get(kind)
        is_text = node.op_type == "Constant" and kind in ("STRING", "STRINGS")
        if field is None or is_text or attribute.ref_attr_name or not 0 < len(attribute.name) <= _MAX_NAME_LENGTH:
            raise UnsafeModelFile(
                f"Its operator {node.op_type} has the attribute {_shown(attribute.name)} of the kind {kind}, which is "
                "not allowed."
            )
        new = copy.attribute.add(name=attribute.name, type=attribute.type)
        value = getattr(attribute, field)
        if field == "t":
            new.t.CopyFrom(weights.copy(value, "value"))
        elif field in ("f", "i", "s"):
            is_type = field == "i" and attribute.name in _TYPE_ATTRIBUTES
            setattr(new, field, _widened(onnx, value) if is_type else value)
        else:
            getattr(new, field).extend(value)


def _opset(model: Any) -> int:
    """Return the version of ONNX' operators. :raises UnsafeModelFile: there is none, or it is not supported."""
    versions = [each.version for each in model.opset_import if each.domain in ("", "ai.onnx")]
    if len(versions) != 1 or not MIN_OPSET <= versions[0] <= MAX_OPSET:
        raise UnsafeModelFile(
            f"It is written for version {', '.join(map(str, versions[:3])) or 'none'} of ONNX' operators (opset). "
            f"Export it for one of {MIN_OPSET} to {MAX_OPSET}."
        )
    return int(versions[0])


class _Weights:
    """Copies weights, from the file itself and from plain files beside it, up to a limit of all together."""

    def __init__(self, onnx: Any, folder: Path) -> None:
        self._onnx = onnx
        self._folder = folder
        self._total_bytes = 0
        #: Name of a file beside the model -> its digest.
        self._files: dict[str, bytes] = {}

    def sha256s(self) -> Iterable[bytes]:
        """Return the digests of the files beside the model that were used, in the order of their first use."""
        return self._files.values()

    def copy(self, tensor: Any, name: str) -> Any:
        """Copy a tensor with its numbers in `raw_data`.

        :raises UnsafeModelFile: its numbers are not those that its shape claims, or would be read from elsewhere.
        :raises WeightsMissing: a file beside the model is missing.
        """
        shown = _shown(tensor.name or name)
        kind = self._kind(tensor.data_type)
        if kind not in _TENSOR_TYPES:
            raise UnsafeModelFile(f"Its weights {shown} have the type {kind}, which is not supported.")
        size, field = _TENSOR_TYPES[kind]
        sides = list(tensor.dims)
        if len(sides) > _MAX_RANK or any(side < 0 for side in sides) or tensor.HasField("segment"):
            raise UnsafeModelFile(f"Its weights {shown} have the shape {sides[:_MAX_RANK]}, which is not supported.")
        count = math.prod(sides)
        is_half = kind in _HALF
        self._total_bytes += count * (size + size * is_half)
        if count > MAX_ELEMENTS or self._total_bytes > MAX_BYTES:
            raise UnsafeModelFile(
                f"Its weights {shown} claim {count} numbers. At most {MAX_ELEMENTS}, and {MAX_BYTES} bytes of all "
                "weights, are allowed."
            )
        others = [each for each in _TYPED_FIELDS if len(getattr(tensor, each))]
        if tensor.data_location == self._onnx.TensorProto.EXTERNAL:
            if tensor.raw_data or others:
                raise UnsafeModelFile(f"Its weights {shown} are in the file and outside of it.")
            raw = self._read_external(tensor, count * size, shown)
        elif others == [field] and not tensor.raw_data and len(getattr(tensor, field)) == count:
            raw = self._onnx.numpy_helper.to_array(tensor).tobytes()
        else:
            raw = tensor.raw_data
            if others or len(raw) != count * size:
                raise UnsafeModelFile(f"Its weights {shown} do not have the {count} numbers that their shape claims.")
        new = self._onnx.TensorProto(name=name, data_type=tensor.data_type, dims=sides, raw_data=raw)
        if is_half:
            new.raw_data = self._onnx.numpy_helper.to_array(new).astype("float32").tobytes()
            new.data_type = self._onnx.TensorProto.FLOAT
        return new

    def _kind(self, number: int) -> str:
        try:
            return str(self._onnx.TensorProto.DataType.Name(number))
        except ValueError:
            return f"number {number}"

    def _read_external(self, tensor: Any, size_bytes: int, shown: str) -> bytes:
        """Read the numbers of a tensor from a file beside the model."""
        entries = {each.key: each.value for each in tensor.external_data[:10]}
        location = entries.get("location", "")
        if not location or location in (".", "..") or any(each in location for each in ("/", "\\", "\0")):
            raise UnsafeModelFile(
                f"Its weights {shown} are in {_shown(location)}. They may be in a file beside the model only."
            )
        offset, length = entries.get("offset", "0"), entries.get("length", str(size_bytes))
        if not all(each.isascii() and each.isdigit() and len(each) < 16 for each in (offset, length)):
            raise UnsafeModelFile(f"Its weights {shown} have the offset {_shown(offset)}, which is no number.")
        if int(length) != size_bytes:
            raise UnsafeModelFile(f"Its weights {shown} do not have the {size_bytes} bytes that their shape claims.")
        with _open(self._folder / location, os.O_NOFOLLOW) as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise UnsafeModelFile(f"The file {_shown(location)} beside it is larger than {MAX_BYTES} bytes.")
            if location not in self._files:
                self._files[location] = hashlib.file_digest(file, "sha256").digest()
            file.seek(int(offset))
            raw = file.read(size_bytes)
        if len(raw) != size_bytes:
            raise UnsafeModelFile(f"The file {_shown(location)} beside it ends before its weights {shown} do.")
        return raw


def _read_file(path: Path) -> bytes:
    with _open(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise UnsafeModelFile(f"{path.name} is larger than {MAX_BYTES} bytes.")
        return file.read(MAX_BYTES)


def _open(path: Path, flags: int = 0) -> io.BufferedReader:
    """Open a plain file; a pipe would wait for ever. :raises WeightsMissing: :raises UnsafeModelFile: it is none."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeModelFile(f"{path} is a link. Put a copy of the file in its place.") from error
        raise WeightsMissing(f"The file {path} cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UnsafeModelFile(f"{path} is not a file.")
    return os.fdopen(handle, "rb")


def _shown(name: str) -> str:
    return repr(name[:80])

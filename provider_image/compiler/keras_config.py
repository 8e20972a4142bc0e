"""The config.json of a `.keras` file: the check of what it makes Keras create, before Keras reads it.

Called by `keras_file.py`. Keras' own `safe_mode` is not relied on, because it was bypassed more than once:
CVE-2025-1550 imported any module, CVE-2025-8747 called get_file, CVE-2025-9906 disabled it in the config,
CVE-2025-12058 read files and URLs through lookup layers. All lists are of what is allowed, never of what is forbidden.
Weakness: the memory that an allowed layer takes is only limited by the process (`confined.py`). Must not import keras.
"""

from __future__ import annotations

import json
from typing import Any

from provider_image.errors import UnsafeModelFile

#: Most levels of lists and objects; a nested network takes some eight.
MAX_DEPTH = 64
#: Most values; DenseNet-201 has some 60,000.
MAX_VALUES = 1_000_000


def refusal(what: str) -> UnsafeModelFile:
    """Make the error for a file that Keras 3 did not write like this."""
    return UnsafeModelFile(f'{what} Save the model again with Keras 3: model.save("model.keras")')


def words(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


#: Keys of a serialized object. compile_config is dropped unread: it is only for training and may name custom losses.
_KEYS = words(
    "module class_name config registered_name build_config compile_config name inbound_nodes shared_object_id"
)
_DTYPES = words("bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 bfloat16 float32 float64")
#: Replaced by f32, so that graph and reference agree.
_HALF_DTYPES = frozenset({"float16", "bfloat16", "mixed_float16", "mixed_bfloat16"})
_POLICIES = frozenset({"float32", "float64", *_HALF_DTYPES})

_LAYERS = words(
    """
    Activation ActivityRegularization AdaptiveAveragePooling2D AdaptiveMaxPooling2D Add AdditiveAttention AlphaDropout
    Attention AugMix AutoContrast Average AveragePooling1D AveragePooling2D BatchNormalization CenterCrop Concatenate
    Conv1D Conv2D Conv2DTranspose Cropping1D Cropping2D CutMix Dense DepthwiseConv2D Dot Dropout ELU EinsumDense
    Embedding Equalization Flatten GaussianDropout GaussianNoise GlobalAveragePooling1D GlobalAveragePooling2D
    GlobalMaxPooling1D GlobalMaxPooling2D GroupNormalization GroupQueryAttention Identity InputLayer LayerNormalization
    LeakyReLU MaxPooling1D MaxPooling2D Maximum Minimum MixUp MultiHeadAttention Multiply Normalization PReLU Permute
    Pipeline RMSNormalization RandAugment RandomBrightness RandomColorDegeneration RandomColorJitter RandomContrast
    RandomCrop RandomElasticTransform RandomErasing RandomFlip RandomGaussianBlur RandomGrayscale RandomHue RandomInvert
    RandomPerspective RandomPosterization RandomRotation RandomSaturation RandomSharpness RandomShear RandomTranslation
    RandomZoom ReLU RepeatVector Rescaling Reshape Resizing SeparableConv2D Softmax Solarization
    SpatialDropout1D SpatialDropout2D SpectralNormalization Subtract UnitNormalization UpSampling1D UpSampling2D
    ZeroPadding1D ZeroPadding2D
    """
)
# What expressions between layers like `x / 127.5 - 1` are saved as.
_NUMPY_OPERATIONS = words(
    """
    Abs Absolute Add Amax Amin Average BroadcastTo Clip Concatenate Divide Einsum Exp ExpandDims Flip GetItem Log
    Matmul Max Maximum Mean Min Minimum Moveaxis Multiply Negative Pad Power Prod Ravel Reciprocal Repeat Reshape Roll
    Sqrt Square Squeeze Stack Std Subtract Sum Swapaxes Tanh Tile Transpose TrueDivide Var
    """
)
_NN_OPERATIONS = words(
    """
    AdaptiveAveragePool AdaptiveMaxPool AveragePool Celu DepthToSpace Elu Gelu HardSigmoid HardSilu HardTanh LeakyRelu
    LogSigmoid LogSoftmax MaxPool Normalize Relu Relu6 Selu Sigmoid Silu Softmax Softplus Softsign SpaceToDepth
    """
)
_INITIALIZERS = words(
    """
    Constant GlorotNormal GlorotUniform HeNormal HeUniform Identity LecunNormal LecunUniform Ones Orthogonal
    OrthogonalInitializer IdentityInitializer RandomNormal RandomUniform TruncatedNormal VarianceScaling Zeros
    """
)
_MODELS = frozenset({"Functional", "Model", "Sequential"})
#: Module -> its classes that a config may name.
_ALLOWED: dict[str, frozenset[str]] = {
    "keras": _MODELS | {"DTypePolicy"},
    "keras.models": _MODELS,
    "keras.src.models.functional": frozenset({"Functional"}),
    "keras.src.models.sequential": frozenset({"Sequential"}),
    "keras.dtype_policies": frozenset({"DTypePolicy"}),
    "keras.layers": _LAYERS,
    "keras.initializers": _INITIALIZERS,
    "keras.regularizers": frozenset({"L1", "L1L2", "L2", "OrthogonalRegularizer"}),
    "keras.constraints": frozenset({"MaxNorm", "MinMaxNorm", "NonNeg", "UnitNorm"}),
    "keras.random": frozenset({"SeedGenerator"}),
    "keras.src.ops.numpy": _NUMPY_OPERATIONS,
    "keras.src.ops.nn": _NN_OPERATIONS,
    "keras.src.ops.core": frozenset({"Cast", "StopGradient"}),
    "keras.src.activations.activations": frozenset({"Mish", "ReLU"}),
    # The only two models of keras.applications with layers that are not public.
    "keras.src.applications.convnext": frozenset({"LayerScale"}),
    "keras.src.applications.inception_resnet_v2": frozenset({"CustomScaleLayer"}),
}
_ACTIVATIONS = words(
    """
    celu elu exponential gelu glu hard_shrink hard_sigmoid hard_silu hard_swish hard_tanh leaky_relu linear log_sigmoid
    log_softmax mish relu relu6 selu sigmoid silu soft_shrink softmax softplus softsign sparse_plus sparse_sigmoid
    sparsemax squareplus swish tanh tanh_shrink threshold
    """
)
#: Classes of serialized values that are only data.
_DATA_CLASSES = frozenset({"__keras_tensor__", "__tensor__", "__numpy__", "__slice__", "__ellipsis__"})


def check_config(raw: bytes) -> dict[str, Any]:
    """Check a config.json and return the config for Keras.

    :raises UnsafeModelFile: it has something that is not on the lists; names it and its location.
    """
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise refusal(f"Its config.json cannot be read ({type(error).__name__}).") from error
    if not isinstance(config, dict) or config.get("class_name") not in _MODELS:
        raise UnsafeModelFile(f"Its config.json does not describe a Sequential or Functional model. {_REBUILD_HINT}")
    checked: dict[str, Any] = _ConfigChecker().check_object(config, "the model", 0)
    return checked


_REBUILD_HINT = (
    "Build it from Keras' own layers with keras.Sequential or keras.Model(inputs, outputs) and save it again."
)


class _ConfigChecker:
    """A recursive check of one config."""

    def __init__(self) -> None:
        self._remaining = MAX_VALUES

    def value(self, value: Any, location: str, depth: int) -> Any:
        """Check a value and return it as Keras gets it."""
        self._remaining -= 1
        if depth > MAX_DEPTH or self._remaining < 0:
            raise UnsafeModelFile(f"Its config.json is nested too deep or too large at {location}. {_REBUILD_HINT}")
        if isinstance(value, list):
            return [self.value(each, location, depth + 1) for each in value]
        if not isinstance(value, dict):
            return value
        if "class_name" in value:
            return self.check_object(value, location, depth)
        return self._check_plain(value, location, depth)

    def check_object(self, value: dict[str, Any], location: str, depth: int) -> dict[str, Any]:
        """Check a serialized object."""
        name, module, config = value["class_name"], value.get("module"), value.get("config")
        if not isinstance(name, str):
            raise refusal(f"Its config.json has a class without a name at {location}.")
        if name in _DATA_CLASSES:
            return self._check_data(value, name, location, depth)
        if name == "function":
            return self._check_function(value, location)
        if not isinstance(module, str) or name not in _ALLOWED.get(module, ()):
            raise UnsafeModelFile(_refusal_message(module, name, location))
        if value.get("registered_name") not in (None, name):
            raise UnsafeModelFile(
                f"{location} names {str(value['registered_name'])[:80]!r}, which is a custom class. {_REBUILD_HINT}"
            )
        if not isinstance(config, dict) or not value.keys() <= _KEYS:
            raise refusal(f"Its config.json has something unknown at {location} ({name}).")
        if isinstance(config.get("name"), str):
            location = f"{name} {config['name'][:80]!r}"
        if name in _MODELS:
            _check_layers(config, name, location)
        if name == "DTypePolicy":
            if config.get("name") not in _POLICIES:
                raise refusal(f"{location} has the unknown dtype {str(config.get('name'))[:40]!r}.")
            config = {"name": _as_f32(config["name"])}
        nodes = value.get("inbound_nodes", [])
        if not isinstance(nodes, list) or not all(
            isinstance(node, dict) and node.keys() == {"args", "kwargs"} for node in nodes
        ):
            raise refusal(f"{location} is connected in the format of Keras 2.")
        rest = {key: each for key, each in value.items() if key not in ("config", "compile_config")}
        return {
            **{key: self.value(each, location, depth + 1) for key, each in rest.items()},
            "config": self._check_plain(config, location, depth + 1),
        }

    def _check_plain(self, value: dict[str, Any], location: str, depth: int) -> dict[str, Any]:
        if value.keys() & {"class_name", "module", "registered_name"}:
            raise refusal(f"Its config.json has an incomplete serialized object at {location}.")
        checked = {key: self.value(each, location, depth + 1) for key, each in value.items()}
        dtype = checked.get("dtype")
        if not isinstance(dtype, str):
            return checked
        if dtype not in _DTYPES | _POLICIES:
            raise refusal(f"{location} has the unknown dtype {dtype[:40]!r}.")
        return {**checked, "dtype": _as_f32(dtype)}

    def _check_data(self, value: dict[str, Any], name: str, location: str, depth: int) -> dict[str, Any]:
        config = value.get("config")
        if value.keys() != {"class_name", "config"} or not isinstance(config, dict):
            raise refusal(f"Its config.json has something unknown at {location} ({name}).")
        if name in ("__tensor__", "__numpy__", "__keras_tensor__") and config.get("dtype") not in _DTYPES:
            raise refusal(f"{location} holds values that are not numbers.")
        return {"class_name": name, "config": self._check_plain(config, location, depth + 1)}

    def _check_function(self, value: dict[str, Any], location: str) -> dict[str, Any]:
        """Check that a function is one of Keras' activations."""
        module, name = value.get("module"), value.get("config")
        if (
            module not in ("keras.activations", "builtins")
            or not isinstance(name, str)
            or name not in _ACTIVATIONS
            or value.get("registered_name") not in (None, name)
        ):
            raise UnsafeModelFile(f"{location} calls the function {str(module)[:80]}.{str(name)[:80]}. {_REBUILD_HINT}")
        return {"module": module, "class_name": "function", "config": name, "registered_name": name}


def _check_layers(config: dict[str, Any], name: str, location: str) -> None:
    """Check that a model lists its layers in the format of Keras 3; for others it has an older, less strict reader."""
    layers = config.get("layers")
    if not isinstance(layers, list) or not all(isinstance(each, dict) and "class_name" in each for each in layers):
        raise refusal(f"{location} does not list its layers.")
    if name != "Sequential" and not {"name", "input_layers", "output_layers"} <= config.keys():
        raise UnsafeModelFile(f"{location} is a custom model class. {_REBUILD_HINT}")


def _refusal_message(module: Any, name: str, location: str) -> str:
    shown = f"{str(module)[:80]}.{name[:80]}" if module is not None else name[:80]
    if name in ("Lambda", "__lambda__"):
        return (
            f"{location} holds a Lambda, which is code from the file. Use Rescaling or keras.ops instead (x / 255.0 "
            "between two layers works as well) and save it again."
        )
    if isinstance(module, str) and (module == "keras" or module.startswith("keras.")):
        return f"{location} holds {shown}, which is not allowed in an image classifier. {_REBUILD_HINT}"
    return f"{location} holds {shown}, which is not part of Keras. {_REBUILD_HINT}"


def _as_f32(dtype: str) -> str:
    return "float32" if dtype in _HALF_DTYPES else dtype

"""The config.json of a `.keras` file: what it may ask Keras to make, decided before Keras sees it.

Called by `keras_file.py`. Keras' own `safe_mode` is not relied on: it has been passed by more than once (CVE-2025-1550
imported any module, CVE-2025-8747 called get_file, CVE-2025-9906 switched it off from the config, CVE-2025-12058 read
files and addresses through lookup layers). Everything here is a list of what is allowed, never of what is forbidden.
How much memory an allowed layer takes is not looked at. Must not import keras.
"""

from __future__ import annotations

import json
from typing import Any

from provider_image.errors import UnsafeModelFile

#: Levels of lists and objects at most; a network in a network takes some eight.
MAX_DEPTH = 64
#: Values at most; DenseNet-201 has some 60 000.
MAX_VALUES = 1_000_000


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Keys of a serialized object. compile_config is dropped unread: it may name losses of the user's own, and nothing here
#: trains.
_KEYS = _words(
    "module class_name config registered_name build_config compile_config name inbound_nodes shared_object_id"
)
_NUMBERS = _words("bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 bfloat16 float32 float64")
#: Computed in f32 instead, as everything is: graph and reference then agree.
_HALVES = frozenset({"float16", "bfloat16", "mixed_float16", "mixed_bfloat16"})
_POLICIES = frozenset({"float32", "float64", *_HALVES})

_LAYERS = _words(
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
# What `x / 127.5 - 1` and the like become when they stand between two layers.
_NUMPY_OPERATIONS = _words(
    """
    Abs Absolute Add Amax Amin Average BroadcastTo Clip Concatenate Divide Einsum Exp ExpandDims Flip GetItem Log
    Matmul Max Maximum Mean Min Minimum Moveaxis Multiply Negative Pad Power Prod Ravel Reciprocal Repeat Reshape Roll
    Sqrt Square Squeeze Stack Std Subtract Sum Swapaxes Tanh Tile Transpose TrueDivide Var
    """
)
_NN_OPERATIONS = _words(
    """
    AdaptiveAveragePool AdaptiveMaxPool AveragePool Celu DepthToSpace Elu Gelu HardSigmoid HardSilu HardTanh LeakyRelu
    LogSigmoid LogSoftmax MaxPool Normalize Relu Relu6 Selu Sigmoid Silu Softmax Softplus Softsign SpaceToDepth
    """
)
_INITIALIZERS = _words(
    """
    Constant GlorotNormal GlorotUniform HeNormal HeUniform Identity LecunNormal LecunUniform Ones Orthogonal
    OrthogonalInitializer IdentityInitializer RandomNormal RandomUniform TruncatedNormal VarianceScaling Zeros
    """
)
_MODELS = frozenset({"Functional", "Model", "Sequential"})
#: Module -> the classes of it that a config may name.
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
    # The only two of keras.applications that bring layers which are not public.
    "keras.src.applications.convnext": frozenset({"LayerScale"}),
    "keras.src.applications.inception_resnet_v2": frozenset({"CustomScaleLayer"}),
}
_ACTIVATIONS = _words(
    """
    celu elu exponential gelu glu hard_shrink hard_sigmoid hard_silu hard_swish hard_tanh leaky_relu linear log_sigmoid
    log_softmax mish relu relu6 selu sigmoid silu soft_shrink softmax softplus softsign sparse_plus sparse_sigmoid
    sparsemax squareplus swish tanh tanh_shrink threshold
    """
)
#: Serialized values that are only data.
_DATA = frozenset({"__keras_tensor__", "__tensor__", "__numpy__", "__slice__", "__ellipsis__"})


def checked_config(raw: bytes) -> dict[str, Any]:
    """Check a config.json and return what of it Keras is to see.

    :raises UnsafeModelFile: it asks for something that is not on the list; names it and where it stands.
    """
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UnsafeModelFile(f"Its config.json cannot be read ({type(error).__name__}). {_SAVE_AGAIN}") from error
    if not isinstance(config, dict) or config.get("class_name") not in _MODELS:
        raise UnsafeModelFile(f"Its config.json does not describe a Sequential or Functional model. {_BUILD_AGAIN}")
    checked: dict[str, Any] = _Walk().serialized(config, "the model", 0)
    return checked


_SAVE_AGAIN = 'Save the model again with Keras 3: model.save("model.keras")'
_BUILD_AGAIN = (
    "Build it from Keras' own layers with keras.Sequential or keras.Model(inputs, outputs) and save it again."
)


class _Walk:
    """One walk over a config."""

    def __init__(self) -> None:
        self._left = MAX_VALUES

    def value(self, value: Any, place: str, depth: int) -> Any:
        """Check any value and return it as Keras is to see it."""
        self._left -= 1
        if depth > MAX_DEPTH or self._left < 0:
            raise UnsafeModelFile(f"Its config.json is nested too deep or too large at {place}. {_BUILD_AGAIN}")
        if isinstance(value, list):
            return [self.value(each, place, depth + 1) for each in value]
        if not isinstance(value, dict):
            return value
        if "class_name" in value:
            return self.serialized(value, place, depth)
        return self._plain(value, place, depth)

    def serialized(self, value: dict[str, Any], place: str, depth: int) -> dict[str, Any]:
        """Check a serialized object."""
        name, module, config = value["class_name"], value.get("module"), value.get("config")
        if not isinstance(name, str):
            raise UnsafeModelFile(f"Its config.json has a class without a name at {place}. {_SAVE_AGAIN}")
        if name in _DATA:
            return self._data(value, name, place, depth)
        if name == "function":
            return self._function(value, place)
        if not isinstance(module, str) or name not in _ALLOWED.get(module, ()):
            raise UnsafeModelFile(_refusal(module, name, place))
        if value.get("registered_name") not in (None, name):
            raise UnsafeModelFile(
                f"{place} names {str(value['registered_name'])[:80]!r}, a class of the user's own. {_BUILD_AGAIN}"
            )
        if not isinstance(config, dict) or not value.keys() <= _KEYS:
            raise UnsafeModelFile(f"Its config.json has something unknown at {place} ({name}). {_SAVE_AGAIN}")
        if isinstance(config.get("name"), str):
            place = f"{name} {config['name'][:80]!r}"
        if name in _MODELS:
            _check_layers(config, name, place)
        if name == "DTypePolicy":
            if config.get("name") not in _POLICIES:
                raise UnsafeModelFile(f"{place} has the odd dtype {str(config.get('name'))[:40]!r}. {_SAVE_AGAIN}")
            config = {"name": _widened(config["name"])}
        nodes = value.get("inbound_nodes", [])
        if not isinstance(nodes, list) or not all(
            isinstance(node, dict) and node.keys() == {"args", "kwargs"} for node in nodes
        ):
            raise UnsafeModelFile(f"{place} is wired in the way of Keras 2. {_SAVE_AGAIN}")
        rest = {key: each for key, each in value.items() if key not in ("config", "compile_config")}
        return {
            **{key: self.value(each, place, depth + 1) for key, each in rest.items()},
            "config": self._plain(config, place, depth + 1),
        }

    def _plain(self, value: dict[str, Any], place: str, depth: int) -> dict[str, Any]:
        if value.keys() & {"class_name", "module", "registered_name"}:
            raise UnsafeModelFile(f"Its config.json has half of a serialized object at {place}. {_SAVE_AGAIN}")
        checked = {key: self.value(each, place, depth + 1) for key, each in value.items()}
        dtype = checked.get("dtype")
        if not isinstance(dtype, str):
            return checked
        if dtype not in _NUMBERS | _POLICIES:
            raise UnsafeModelFile(f"{place} has the odd dtype {dtype[:40]!r}. {_SAVE_AGAIN}")
        return {**checked, "dtype": _widened(dtype)}

    def _data(self, value: dict[str, Any], name: str, place: str, depth: int) -> dict[str, Any]:
        config = value.get("config")
        if value.keys() != {"class_name", "config"} or not isinstance(config, dict):
            raise UnsafeModelFile(f"Its config.json has something unknown at {place} ({name}). {_SAVE_AGAIN}")
        if name in ("__tensor__", "__numpy__", "__keras_tensor__") and config.get("dtype") not in _NUMBERS:
            raise UnsafeModelFile(f"{place} holds values that are no numbers. {_SAVE_AGAIN}")
        return {"class_name": name, "config": self._plain(config, place, depth + 1)}

    def _function(self, value: dict[str, Any], place: str) -> dict[str, Any]:
        """Check a function by name: an activation of Keras, nothing else."""
        module, name = value.get("module"), value.get("config")
        if (
            module not in ("keras.activations", "builtins")
            or not isinstance(name, str)
            or name not in _ACTIVATIONS
            or value.get("registered_name") not in (None, name)
        ):
            raise UnsafeModelFile(f"{place} calls the function {str(module)[:80]}.{str(name)[:80]}. {_BUILD_AGAIN}")
        return {"module": module, "class_name": "function", "config": name, "registered_name": name}


def _check_layers(config: dict[str, Any], name: str, place: str) -> None:
    """Check that a model lists its layers as Keras 3 does; it reads any other form by an older, laxer way."""
    layers = config.get("layers")
    if not isinstance(layers, list) or not all(isinstance(each, dict) and "class_name" in each for each in layers):
        raise UnsafeModelFile(f"{place} does not list its layers. {_SAVE_AGAIN}")
    if name != "Sequential" and not {"name", "input_layers", "output_layers"} <= config.keys():
        raise UnsafeModelFile(f"{place} is a model class of the user's own. {_BUILD_AGAIN}")


def _refusal(module: Any, name: str, place: str) -> str:
    shown = f"{str(module)[:80]}.{name[:80]}" if module is not None else name[:80]
    if name in ("Lambda", "__lambda__"):
        return (
            f"{place} holds a Lambda, which is code from the file. Use Rescaling or keras.ops instead (x / 255.0 "
            "between two layers works as well) and save it again."
        )
    if isinstance(module, str) and (module == "keras" or module.startswith("keras.")):
        return f"{place} holds {shown}, which is not among what a classifier of pictures may consist of. {_BUILD_AGAIN}"
    return f"{place} holds {shown}, which is not Keras' own. {_BUILD_AGAIN}"


def _widened(dtype: str) -> str:
    return "float32" if dtype in _HALVES else dtype

"""The conversion of a Keras network to an OpenVINO graph, and the only import of Keras.

Called by the builders of Keras models; needs the extra `[compile]`. The preprocessing and the head become part of the
graph, so that every model takes uint8 RGB and returns probabilities.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.backends.openvino import hidden_module, import_openvino
from provider_image.errors import CompilationFailed, CompilerMissing

if TYPE_CHECKING:
    from provider_image.models.catalogue import ModelFacts

#: What is added after the network: nothing, a softmax over its logits, the complement of a single probability, which
#: gives two that sum to one, or what turns 0 to 1 or -1 to 1 into levels.
HEADS = ("none", "softmax", "complement", "unit", "tf")
#: Means of blue, green and red in ImageNet, which Caffe's models subtract.
_CAFFE_MEANS = (103.939, 116.779, 123.68)
#: Means and deviations of red, green and blue in ImageNet, scaled to 0-1, as in PyTorch's models.
TORCH_MEANS = (0.485, 0.456, 0.406)
TORCH_DEVIATIONS = (0.229, 0.224, 0.225)


def import_keras() -> Any:
    """Import keras with the tensorflow backend, regardless of the user's Keras settings.

    :raises CompilerMissing: keras or tensorflow is not installed; says how to install them.
    """
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Otherwise tensorflow allocates all memory of the GPUs, which are not used.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    try:
        with _silenced_stderr():
            importlib.import_module("tensorflow")
            keras = importlib.import_module("keras")
    except ImportError as error:
        raise CompilerMissing(
            f'Compiling Keras models needs tensorflow ({error}). Install it: pip install "mlg[compile]", '
            "in a source checkout: scripts/setup compile"
        ) from error
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    keras.config.set_image_data_format("channels_last")
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    return keras


@contextlib.contextmanager
def keras_session() -> Iterator[Any]:
    """Import keras, and free what networks take in it afterwards. :raises CompilerMissing: it is not installed."""
    keras = import_keras()
    try:
        yield keras
    finally:
        keras.backend.clear_session()


@contextlib.contextmanager
def _silenced_stderr() -> Iterator[None]:
    """Discard what native libraries write to standard error: tensorflow does before it applies its log level."""
    sys.stderr.flush()
    saved_stderr = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(saved_stderr, 2)
        os.close(saved_stderr)


def to_graph(network: Any, row: ModelFacts, head: str = "none") -> Any:
    """Convert a Keras network to an OpenVINO graph: uint8 RGB (1, height, width, 3) in, probabilities (1, n) out.

    :param network: a keras.Model that takes float32 (n, height, width, 3) and returns (n, classes), or pixels.
    :param row: gives its size and preprocessing.
    :param head: one of HEADS.
    :raises CompilationFailed: OpenVINO cannot convert it.
    """
    tensorflow = importlib.import_module("tensorflow")

    def predict(image: Any) -> Any:
        output = network(preprocess(tensorflow.cast(image, tensorflow.float32), row.preprocessing), training=False)
        return apply_head(output, head)

    image = tensorflow.TensorSpec((1, *row.net_size, 3), tensorflow.uint8, name="picture")
    try:
        function = tensorflow.function(predict, input_signature=[image], autograph=False).get_concrete_function()
        convert = _import_converter()
        with _cached_variable_lookup():
            graph = convert(function)
    except Exception as error:  # an unsupported layer can make tensorflow or OpenVINO raise anything
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CompilationFailed(f"{row.title} cannot be converted to an OpenVINO graph: {first_line}") from error
    return graph


def preprocess(pixels: Any, preprocessing: str) -> Any:
    """Convert float32 RGB values 0-255 to a network's input, by a name from `ModelFacts.preprocessing`."""
    match preprocessing:
        case "caffe":
            return pixels[..., ::-1] - _CAFFE_MEANS
        case "tf":
            return pixels / 127.5 - 1.0
        case "torch":
            return (pixels / 255.0 - TORCH_MEANS) / TORCH_DEVIATIONS
        case "lite":
            return (pixels - 127.0) / 128.0
        case "unit":
            return pixels / 255.0
        case "none":
            return pixels
    raise ValueError(f"There is no preprocessing {preprocessing!r}.")


def to_levels(values: Any, head: str) -> Any:
    """Convert what a network returns for pixels to values from 0 to 255, by a head of HEADS. Undoes `preprocess`."""
    match head:
        case "unit":
            return values / (1 / 255)
        case "tf":
            return (values - -1.0) / (1 / 127.5)
    return values


def apply_head(output: Any, head: str) -> Any:
    """Apply a head of HEADS to a network's output, a tensor of shape (n, classes), or (n, height, width, 3)."""
    tensorflow = importlib.import_module("tensorflow")
    if head == "softmax":
        return tensorflow.nn.softmax(output)
    if head == "complement":
        return tensorflow.concat([1.0 - output, output], axis=-1)
    return to_levels(output, head)


@contextlib.contextmanager
def _cached_variable_lookup() -> Iterator[None]:
    """Have OpenVINO's converter look up the variable behind each operation once.

    It asks for the same one some ten times, and searches all variables each time: half of a conversion's time where
    there are many. The function is private to OpenVINO; a version without it converts as before.
    """
    try:
        decoder: Any = importlib.import_module("openvino.frontend.tensorflow.node_decoder").TFGraphNodeDecoder
        look_up = decoder.get_variable
    except (ImportError, AttributeError):
        yield
        return
    decoder.get_variable = staticmethod(functools.cache(look_up))
    try:
        yield
    finally:
        decoder.get_variable = staticmethod(look_up)


def _import_converter() -> Any:
    """Import OpenVINO's converter without its telemetry, which would send usage data."""
    import_openvino()
    with hidden_module("openvino_telemetry"):
        return importlib.import_module("openvino.tools.ovc").convert_model

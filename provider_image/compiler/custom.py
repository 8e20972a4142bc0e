"""Custom models, which users saved elsewhere: what describes one, and the builder of those saved with Keras 3.

Called by `mlg models compile NAME --keras FILE --labels FILE`. The file is checked before Keras loads it
(`keras_file.py`); this module decides whether it is a classifier of one image and what its output means. The
builders of other files (`onnx_models/builder.py`, `transformers/builder.py`) share those decisions.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.compiler.installing import build_folder
from provider_image.compiler.keras_config import words
from provider_image.compiler.keras_file import check_keras_file, load_checked
from provider_image.compiler.keras_graph import apply_head, keras_session, preprocess, to_graph
from provider_image.compiler.labels import read_labels
from provider_image.compiler.self_test import self_test_images
from provider_image.compiler.verification import verify_and_install
from provider_image.errors import ConfigError, UnsuitableModel
from provider_image.images.decoding import decode
from provider_image.models.artefact import Artefact, is_model_name
from provider_image.models.catalogue import EMBEDDING_SUFFIX, ModelFacts, look_up
from provider_image.models.registry import find_custom_name
from provider_image.precision import TOLERANCE

if TYPE_CHECKING:
    import numpy as np

    Arrays = Sequence[np.ndarray[Any, Any]]

#: (id, name) of each class.
Labels = tuple[tuple[str, str], ...]
#: Part of the digest. Change it whenever the graphs' results change.
RECIPE = "keras-file-1"
#: Kind of file -> "module:function" of its builder.
BUILDERS = {
    "keras": "provider_image.compiler.custom:build",
    "onnx": "provider_image.compiler.onnx_models.builder:build",
    "huggingface": "provider_image.compiler.transformers.builder:build_custom",
}
#: The service of nets that return an image, and kind of file -> "module:function" of their builder.
IMAGE_SERVICE = "image_to_image"
IMAGE_BUILDERS = {
    "keras": "provider_image.compiler.image_nets.builder:build_keras",
    "onnx": "provider_image.compiler.image_nets.builder:build_onnx",
}
#: Values of --service.
SERVICES = ("classification", "embedding", "face_detection", IMAGE_SERVICE)
#: Values of --preprocessing.
PREPROCESSINGS = ("none", "unit", "tf", "torch", "caffe")
#: Values of --returns.
RETURNS = ("probabilities", "logits")
#: Values of --returns for a net that returns an image: its range, named as the preprocessing with that.
RETURNED_RANGES = ("none", "unit", "tf")
#: Values of --channels.
CHANNELS = ("rgb", "bgr")
#: Most pixels of a side.
MAX_SIDE = 2048

_MAX_TITLE_LENGTH = 64
#: Allowed difference of the sum of probabilities from 1.
_SUM_TOLERANCE = 1e-3
#: Layers and operations that do not change values during inference.
_PASS_THROUGH = words(
    """
    Activation ActivityRegularization AlphaDropout Cast Dropout Flatten GaussianDropout GaussianNoise Identity Ravel
    Reshape SpatialDropout1D SpatialDropout2D Squeeze StopGradient
    """
)
_ACTIVATIONS = {
    "Softmax": "softmax",
    "Sigmoid": "sigmoid",
    "LogSoftmax": "log_softmax",
    "ReLU": "relu",
    "Relu": "relu",
    "Relu6": "relu6",
    "LeakyReLU": "leaky_relu",
    "PReLU": "prelu",
    "ELU": "elu",
    "Tanh": "tanh",
    "HardSigmoid": "hard_sigmoid",
    "LogSigmoid": "log_sigmoid",
}


@dataclass(frozen=True, kw_only=True)
class CustomModel:
    """A custom model as the user describes it."""

    #: The canonical name that it gets.
    name: str
    #: The saved model: a .keras or an .onnx file, or a folder of Hugging Face's library.
    file: Path
    #: What kind of file that is, one of BUILDERS.
    kind: str = "keras"
    #: The labels file, one line per class; None takes what the file states, which only huggingface does.
    labels: Path | None
    #: The folder of an ONNX file, beside which its weights may be: a confined process is given all that it may read.
    weights_folder: Path | None = None
    #: One of PREPROCESSINGS; None takes what the file states, or none.
    preprocessing: str | None = None
    #: Its name for display; None takes the name.
    title: str | None = None
    #: Height and width in pixels, for a model whose input has no fixed size.
    size: tuple[int, int] | None = None
    #: What it returns, one of RETURNS, or of RETURNED_RANGES for an image; None finds out.
    returns: str | None = None
    #: One of CHANNELS, for an ONNX file; None takes what the file states, or rgb.
    channels: str | None = None
    #: The service that runs it, one of SERVICES.
    service: str = "classification"
    #: True if it takes images of faces.
    takes_faces: bool = False
    #: The backend that an ONNX file is for, onnxruntime; None takes OpenVINO if that computes it as it should.
    backend: str | None = None


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
    :raises ConfigError: it cannot have this name, title or size.
    :raises ModelError: it cannot be built; a file that is not safe has not been loaded.
    :raises NotInstalled: the models folder cannot be written.
    """
    check_description(models, custom)
    assert custom.labels is not None
    labels = read_labels(custom.labels)
    with build_folder(models, custom.name) as folder, contextlib.ExitStack() as stack:
        on_step("checking the file")
        with tempfile.TemporaryDirectory(dir=folder) as private:
            checked = check_keras_file(custom.file, Path(private))
            on_step("starting Keras")
            keras = stack.enter_context(keras_session())
            on_step("reading weights")
            network = load_checked(keras, checked)
        size = find_size(input_sides(network), custom)
        _check_output(network, labels)
        draft = begin_custom(
            custom,
            size=size,
            labels=labels,
            preprocessing=custom.preprocessing or "none",
            weights_sha256=checked.sha256,
            recipe=RECIPE,
            reference=f"keras {keras.__version__}",
        )
        head = _find_head(keras, network, draft, custom.returns)

        def reference(arrays: Arrays) -> Arrays:
            return predictions(keras, network, draft, arrays, head)

        on_step("converting")
        graph = to_graph(single_output(keras, network), draft, head)
        return verify_and_install(
            graph, folder, models, draft, reference=reference, f16_within=f16_within, on_step=on_step
        )


def single_output(keras: Any, network: Any) -> Callable[..., Any]:
    """Take the single output of a network out of any structure around it."""
    return lambda pixels, *, training: keras.tree.flatten(network(pixels, training=training))[0]


def begin_custom(custom: CustomModel, *, size: tuple[int, int], labels: Labels, **facts: Any) -> Artefact:
    """Make the artefact of a custom model that is being built.

    :param size: height and width in pixels.
    :param facts: further fields.
    """
    height, width = size
    return Artefact(
        name=custom.name,
        title=custom.title or custom.name,
        service=custom.service,
        takes_faces=custom.takes_faces or custom.service == "face_detection",
        height=height,
        width=width,
        source="own",
        labels=labels,
        **facts,
    )


def check_custom_name(models: Path, name: str, title: str | None) -> None:
    """Check the name and the title of a custom model; it may be installed already. :raises ConfigError:"""
    if not is_model_name(name):
        raise ConfigError(
            f"{name[:80]!r} is not a valid name. Use at most 64 lower-case letters, digits and `_`, and begin "
            "with a letter or digit."
        )
    if name.endswith(EMBEDDING_SUFFIX):
        raise ConfigError(
            f"The name {name} is that of an embedding, which is built from an installed classifier. Choose "
            "another name."
        )
    known = look_up(name)
    existing = known.name if known else find_custom_name(models, name)
    if known is not None or existing not in (None, name):
        raise ConfigError(
            f"The name {name} is taken by the model {existing}: case and separators do not matter. Choose another name."
        )
    if title is not None and not (
        0 < len(title) <= _MAX_TITLE_LENGTH and title.isprintable() and title == title.strip()
    ):
        raise ConfigError(f"A title has 1 to {_MAX_TITLE_LENGTH} characters and no control characters.")


def check_description(models: Path, custom: CustomModel) -> None:
    """Check name, title and choices. :raises ConfigError: one of them cannot be used, or the name is taken."""
    check_custom_name(models, custom.name, custom.title)
    for what, choice, choices in (
        ("service", custom.service, SERVICES),
        ("preprocessing", custom.preprocessing, PREPROCESSINGS),
        ("output", custom.returns, RETURNED_RANGES if custom.service == IMAGE_SERVICE else RETURNS),
        ("order of channels", custom.channels, CHANNELS),
    ):
        if choice not in (None, *choices):
            raise ConfigError(f"There is no {what} {str(choice)[:40]!r}. There are: {', '.join(choices)}.")


def input_sides(network: Any) -> tuple[int | None, int | None]:
    """Return height and width of a network's one input, None for a side that is open. :raises UnsuitableModel:"""
    inputs = getattr(network, "inputs", None)
    if not inputs:
        raise UnsuitableModel(
            "The model does not define its input. Begin it with keras.Input((height, width, 3)) and save it again."
        )
    if len(inputs) != 1:
        raise UnsuitableModel(f"The model takes {len(inputs)} inputs. Only classifiers of one image are supported.")
    shape = tuple(inputs[0].shape)
    if len(shape) != 4 or shape[3] != 3 or shape[0] not in (None, 1):
        raise UnsuitableModel(
            f"The input of the model is {shape}. It must be (None, height, width, 3): RGB, channels last."
        )
    return shape[1], shape[2]


def find_size(sides: tuple[int | None, int | None], custom: CustomModel) -> tuple[int, int]:
    """Return height and width in pixels of the image that a custom model takes.

    :param sides: those of its input, None for one that is open.
    :raises UnsuitableModel: it is too large, or unknown.
    :raises ConfigError: the requested size is not that of the input.
    """
    if custom.size is None and None in sides:
        raise UnsuitableModel("The input of the model has no fixed size. Add the one it was trained with: --size HxW")
    found = (
        sides
        if custom.size is None
        else tuple(requested if side is None else side for side, requested in zip(sides, custom.size, strict=True))
    )
    if custom.size is not None and found != custom.size:
        raise ConfigError(f"The input of the model is fixed at {sides[0]} x {sides[1]} pixels. Omit --size.")
    height, width = found
    assert height is not None and width is not None
    if not all(1 <= side <= MAX_SIDE for side in (height, width)):
        raise UnsuitableModel(f"The input of {height} x {width} pixels is too large: at most {MAX_SIDE} per side.")
    return height, width


def _check_output(network: Any, labels: Labels) -> None:
    """Check that there is one output with one number per label. :raises UnsuitableModel: there is not."""
    outputs = network.outputs
    if len(outputs) != 1:
        raise UnsuitableModel(f"The model has {len(outputs)} outputs. Only classifiers with one output are supported.")
    shape = tuple(outputs[0].shape)
    if len(shape) != 2 or shape[1] is None:
        raise UnsuitableModel(f"The output of the model is {shape}. It must be (None, classes): one number per class.")
    check_classes(shape[1], labels)


def check_classes(classes: int, labels: Labels) -> None:
    """Check that there is a label for each class. :raises UnsuitableModel: there is not."""
    if classes == 1 and len(labels) != 2:
        raise UnsuitableModel(
            f"The output of the model is one number, the probability of one of two classes; the file has {len(labels)} "
            "labels. Give two: first the class for 0, then the class for 1."
        )
    if classes not in (1, len(labels)):
        raise UnsuitableModel(
            f"The model has {classes} classes and the file {len(labels)} labels. Write one line per class, in order."
        )


def _find_head(keras: Any, network: Any, row: ModelFacts, returns: str | None) -> str:
    """Choose the head of keras_graph.HEADS that turns the output into probabilities, by the self-test images.

    :raises UnsuitableModel: none does.
    """
    arrays = [decode(data, row.height, row.width, row.crop) for data in self_test_images().values()]
    try:
        outputs = predictions(keras, network, row, arrays, "none")
    except Exception as error:  # a custom network can make tensorflow raise anything
        raise failed_on_images(row, error) from error
    return choose_head(outputs, last_activation(network), returns)


def failed_on_images(row: ModelFacts, error: Exception) -> UnsuitableModel:
    """Make the error of a network that cannot be run on images of its own size."""
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UnsuitableModel(f"The model fails on images of {row.net_size[0]} x {row.net_size[1]}: {first_line[:300]}")


def choose_head(outputs: Arrays, last_activation: str | None, returns: str | None = None) -> str:
    """Choose the head of keras_graph.HEADS that turns outputs into probabilities.

    :param outputs: a custom model's output for each self-test image, shape (classes,).
    :param last_activation: the name of the network's last activation, linear if there is none; None if unknown.
    :param returns: what the user says that it returns, one of RETURNS; None finds out.
    :raises UnsuitableModel: none does.
    """
    import numpy as np

    values = np.stack(outputs)
    if not bool(np.isfinite(values).all()):
        raise UnsuitableModel("The model returns numbers that are not finite. Check its weights and --preprocessing.")
    are_probabilities = bool((values >= 0).all() and (values <= 1 + _SUM_TOLERANCE).all())
    sum_to_one = are_probabilities and bool((np.abs(values.sum(axis=1) - 1) <= _SUM_TOLERANCE).all())
    if values.shape[1] == 1:
        if last_activation == "sigmoid" and are_probabilities and returns != "logits":
            return "complement"
        raise UnsuitableModel(
            f"The model returns a single number and ends in {last_activation or 'no activation'}. Only a sigmoid makes "
            "it the probability of one of two classes: add one after the last layer and save it again."
        )
    if returns == "logits":
        return "softmax"
    if returns == "probabilities":
        if sum_to_one:
            return "none"
        raise UnsuitableModel(
            "The model does not return probabilities: its results for the self-test images do not sum to 1. "
            "Omit --returns, or set it to logits."
        )
    if last_activation in ("softmax", None) and sum_to_one:
        return "none"
    if last_activation in ("linear", "log_softmax") or (last_activation is None and not are_probabilities):
        return "softmax"
    if last_activation == "softmax":
        raise UnsuitableModel("The model ends in a softmax, but not over the classes: its results do not sum to 1.")
    if last_activation in ("sigmoid", None):
        raise UnsuitableModel(
            "The model returns an independent probability for each class (sigmoid), so several may be right at once. "
            "Only one class per image is supported: end the model in a softmax and train it again."
        )
    raise UnsuitableModel(
        f"The model ends in {last_activation}, which does not return probabilities. End it in a softmax, or without an "
        "activation for logits."
    )


def last_activation(network: Any) -> str | None:
    """Return the name of the last activation, linear if there is none; None if the last layer is of another kind."""
    tensor = network.outputs[0]
    while True:
        history = tensor._keras_history
        layer = history.operation
        kind = type(layer).__name__
        activation = getattr(getattr(layer, "activation", None), "__name__", None)
        if getattr(layer, "outputs", None):  # a nested network
            tensor = layer.outputs[history.tensor_index]
        elif kind in _ACTIVATIONS:
            return _ACTIVATIONS[kind]
        elif kind in _PASS_THROUGH and activation in (None, "linear"):
            tensor = layer._inbound_nodes[history.node_index].input_tensors[0]
        else:
            return activation


def predictions(keras: Any, network: Any, row: ModelFacts, arrays: Arrays, head: str) -> Arrays:
    """Run images with Keras, one at a time as in a chunk.

    :param arrays: uint8 RGB, shape (height, width, 3).
    """
    import numpy as np

    output = single_output(keras, network)
    inputs = [np.asarray(preprocess(array.astype(np.float32), row.preprocessing), np.float32)[None] for array in arrays]
    return [np.asarray(apply_head(output(each, training=False), head))[0] for each in inputs]

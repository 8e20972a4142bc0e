"""Builds artefacts of classifiers that users made and saved with Keras 3.

Called by `mlg models compile NAME --keras FILE --labels FILE`. The file is checked before Keras is asked to load it
(`keras_file.py`); here it is decided whether it is a classifier of one picture and what its output means.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.compiler.installing import Provenance, build_folder
from provider_image.compiler.keras_file import check_keras_file, load_checked
from provider_image.compiler.keras_graph import apply_head, import_keras, preprocess, to_graph
from provider_image.compiler.labels import read_labels
from provider_image.compiler.self_test import self_test_images
from provider_image.compiler.verification import verify_and_install
from provider_image.errors import ConfigError, NotInstalled, UnsuitableModel
from provider_image.images.decoding import decode
from provider_image.models.artefact import Artefact, is_model_name
from provider_image.models.catalogue import ModelRow, look_up
from provider_image.models.registry import find_custom_name
from provider_image.precision import TOLERANCE

if TYPE_CHECKING:
    import numpy as np

    Arrays = Sequence[np.ndarray[Any, Any]]

#: Part of the digest. Change it whenever the graphs' results change.
RECIPE = "keras-file-1"
#: The ways of preprocessing that a user may name.
PREPROCESSINGS = ("none", "unit", "tf", "torch", "caffe")
#: Pixels of a side at most.
MAX_SIDE = 2048

_MAX_TITLE_LENGTH = 64
#: Probabilities that should sum to one may miss it by this much.
_SUM_TOLERANCE = 1e-3
#: Layers and operations that hand on what they get, when nothing is trained.
_PASS_THROUGH = frozenset(
    (
        "Activation",
        "ActivityRegularization",
        "AlphaDropout",
        "Cast",
        "Dropout",
        "Flatten",
        "GaussianDropout",
        "GaussianNoise",
        "Identity",
        "Ravel",
        "Reshape",
        "SpatialDropout1D",
        "SpatialDropout2D",
        "Squeeze",
        "StopGradient",
    )
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
    """What a user says of a model."""

    #: The name it is to have.
    name: str
    #: The saved model.
    file: Path
    #: A line for each class.
    labels: Path
    #: One of PREPROCESSINGS.
    preprocessing: str = "none"
    #: The name as people write it; None takes the name.
    title: str | None = None
    #: Height and width in pixels, for a model that leaves them open.
    size: tuple[int, int] | None = None


def build(
    models: Path,
    custom: CustomModel,
    *,
    f16_within: float = TOLERANCE,
    on_step: Callable[[str], None] = lambda step: None,
) -> Artefact:
    """Build a user's model in the models folder; one of the same name is replaced.

    :param f16_within: see `verification.verify_and_install`.
    :param on_step: called with the name of each step.
    :raises ConfigError: it cannot have this name, title or size.
    :raises CompilerMissing: tensorflow is not installed.
    :raises WeightsMissing: there is no such file.
    :raises UnsafeModelFile: the file could run code or read other files. None was run, none was read.
    :raises UnsuitableModel: it is no classifier of one picture, or the labels are not its own.
    :raises CompilationFailed: the graph gives other results than Keras.
    :raises NotInstalled: the models folder cannot be written.
    """
    _check_name(models, custom)
    labels = read_labels(custom.labels)
    try:
        with build_folder(models, custom.name) as folder:
            on_step("checking the file")
            with tempfile.TemporaryDirectory(dir=folder) as private:
                checked = check_keras_file(custom.file, Path(private))
                on_step("starting Keras")
                keras = import_keras()
                on_step("reading weights")
                network = load_checked(keras, checked)
            try:
                height, width = _find_size(network, custom)
                _check_classes(network, labels)
                row = ModelRow(
                    name=custom.name,
                    title=custom.title or custom.name,
                    height=height,
                    width=width,
                    preprocessing=custom.preprocessing,
                    source="own",
                )
                head = _find_head(keras, network, row)
                provenance = Provenance(
                    labels=labels,
                    weights_sha256=checked.sha256,
                    recipe=RECIPE,
                    source=row.source,
                    reference=f"keras {keras.__version__}",
                )

                def reference(arrays: Arrays) -> Arrays:
                    return _predictions(keras, network, row, arrays, head)

                on_step("converting")
                graph = to_graph(_SingleOutput(keras, network), row, head)
                return verify_and_install(
                    graph, folder, models, row, provenance, reference=reference, f16_within=f16_within, on_step=on_step
                )
            finally:
                keras.backend.clear_session()
    except OSError as error:
        raise NotInstalled(f"The model {custom.name} could not be written to {models}: {error}") from error


class _SingleOutput:
    """A network that gives its one output bare, in whatever structure the user's has it."""

    def __init__(self, keras: Any, network: Any) -> None:
        self._flatten = keras.tree.flatten
        self._network = network

    def __call__(self, pixels: Any, *, training: bool) -> Any:
        return self._flatten(self._network(pixels, training=training))[0]


def _check_name(models: Path, custom: CustomModel) -> None:
    if not is_model_name(custom.name):
        raise ConfigError(
            f"A model cannot be called {custom.name[:80]!r}. Take small letters, digits and `_`, at most 64, beginning "
            "with a letter or digit."
        )
    known = look_up(custom.name)
    existing = known.name if known else find_custom_name(models, custom.name)
    if known is not None or existing not in (None, custom.name):
        raise ConfigError(
            f"{custom.name} is taken: the model {existing} is found under it as well, because case "
            "and separators do not "
            "matter. Choose another name."
        )
    title = custom.title
    if title is not None and not (
        0 < len(title) <= _MAX_TITLE_LENGTH and title.isprintable() and title == title.strip()
    ):
        raise ConfigError(f"A title has 1 to {_MAX_TITLE_LENGTH} characters and no control characters.")
    if custom.preprocessing not in PREPROCESSINGS:
        raise ConfigError(f"There is no preprocessing {custom.preprocessing[:40]!r}: {', '.join(PREPROCESSINGS)}.")


def _find_size(network: Any, custom: CustomModel) -> tuple[int, int]:
    """Return height and width of the network's one input. :raises UnsuitableModel: :raises ConfigError:"""
    inputs = getattr(network, "inputs", None)
    if not inputs:
        raise UnsuitableModel(
            "The model does not say what it takes. Begin it with keras.Input((height, width, 3)) and save it again."
        )
    if len(inputs) != 1:
        raise UnsuitableModel(f"The model takes {len(inputs)} inputs. A classifier here takes one picture and no more.")
    shape = tuple(inputs[0].shape)
    if len(shape) != 4 or shape[3] != 3 or shape[0] not in (None, 1):
        raise UnsuitableModel(f"The model takes {shape}. It must take (None, height, width, 3): RGB, channels last.")
    if custom.size is None and None in shape[1:3]:
        raise UnsuitableModel("The model leaves its input's size open. Say which it was trained with: --size HxW")
    found = (
        shape[1:3]
        if custom.size is None
        else tuple(requested if side is None else side for side, requested in zip(shape[1:3], custom.size, strict=True))
    )
    if custom.size is not None and found != custom.size:
        raise ConfigError(f"The model takes {shape[1]} x {shape[2]} pixels and nothing else. Leave --size away.")
    if not all(1 <= side <= MAX_SIDE for side in found):
        raise UnsuitableModel(f"A picture of {found[0]} x {found[1]} is more than {MAX_SIDE} pixels a side.")
    return int(found[0]), int(found[1])


def _check_classes(network: Any, labels: Sequence[object]) -> None:
    """Check that there is one output with as many numbers as there are labels. :raises UnsuitableModel:"""
    outputs = network.outputs
    if len(outputs) != 1:
        raise UnsuitableModel(f"The model has {len(outputs)} outputs. A classifier here has one.")
    shape = tuple(outputs[0].shape)
    if len(shape) != 2 or shape[1] is None:
        raise UnsuitableModel(f"The model gives {shape}. It must give (None, classes): one number for each class.")
    if shape[1] == 1 and len(labels) != 2:
        raise UnsuitableModel(
            f"The model gives one number, the probability of one of two classes; the file has {len(labels)} labels. "
            "Give two: first the class for 0, then the class for 1."
        )
    if shape[1] not in (1, len(labels)):
        raise UnsuitableModel(
            f"The model has {shape[1]} classes and the file {len(labels)} labels. Give a line for each class, in order."
        )


def _find_head(keras: Any, network: Any, row: ModelRow) -> str:
    """Decide which head of keras_graph.HEADS makes probabilities of the output, and prove it on the self-test pictures.

    :raises UnsuitableModel: none does.
    """
    import numpy as np

    last_activation = _last_activation(network)
    arrays = [decode(data, row.height, row.width, row.crop) for data in self_test_images().values()]
    try:
        outputs = np.stack(_predictions(keras, network, row, arrays, "none"))
    except Exception as error:  # whatever a network of a user's own makes tensorflow raise
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsuitableModel(
            f"The model fails on pictures of {row.height} x {row.width}: {first_line[:300]}"
        ) from error
    if not bool(np.isfinite(outputs).all()):
        raise UnsuitableModel("The model gives numbers that are not finite. Look at its weights and --preprocessing.")
    are_probabilities = bool((outputs >= 0).all() and (outputs <= 1 + _SUM_TOLERANCE).all())
    sum_to_one = are_probabilities and bool((np.abs(outputs.sum(axis=1) - 1) <= _SUM_TOLERANCE).all())
    if outputs.shape[1] == 1:
        if last_activation == "sigmoid" and are_probabilities:
            return "complement"
        raise UnsuitableModel(
            f"The model gives a single number and ends in {last_activation or 'no activation'}. Only a sigmoid makes "
            "it the probability of one of two classes: add activation='sigmoid' to the last layer and save it again."
        )
    if last_activation in ("softmax", None) and sum_to_one:
        return "none"
    if last_activation in ("linear", "log_softmax") or (last_activation is None and not are_probabilities):
        return "softmax"
    if last_activation == "softmax":
        raise UnsuitableModel("The model ends in a softmax, but not over the classes: its answers do not sum to 1.")
    if last_activation in ("sigmoid", None):
        raise UnsuitableModel(
            "The model gives each class a probability of its own (sigmoid), so several may be right at once. Here a "
            "picture has one class: end the model in a softmax and train it so."
        )
    raise UnsuitableModel(
        f"The model ends in {last_activation}, which gives no probabilities. End it in a "
        "softmax, or in nothing for logits."
    )


def _last_activation(network: Any) -> str | None:
    """Name the activation that a network ends in, linear for none; None if the last layer is of another kind."""
    tensor = network.outputs[0]
    while True:
        history = tensor._keras_history
        layer = history.operation
        kind = type(layer).__name__
        activation = getattr(getattr(layer, "activation", None), "__name__", None)
        if getattr(layer, "outputs", None):  # a network in the network
            tensor = layer.outputs[history.tensor_index]
        elif kind in _ACTIVATIONS:
            return _ACTIVATIONS[kind]
        elif kind in _PASS_THROUGH and activation in (None, "linear"):
            tensor = layer._inbound_nodes[history.node_index].input_tensors[0]
        else:
            return activation


def _predictions(keras: Any, network: Any, row: ModelRow, arrays: Arrays, head: str) -> Arrays:
    """Answer pictures with Keras itself, each alone as it will be asked.

    :param arrays: uint8 RGB, shape (height, width, 3).
    """
    import numpy as np

    single_output = _SingleOutput(keras, network)
    inputs = [np.asarray(preprocess(array.astype(np.float32), row.preprocessing), np.float32)[None] for array in arrays]
    return [np.asarray(apply_head(single_output(each, training=False), head))[0] for each in inputs]

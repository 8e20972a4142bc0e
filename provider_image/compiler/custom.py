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

from provider_image.compiler.installing import Origin, building
from provider_image.compiler.keras_file import check_keras_file, load_checked
from provider_image.compiler.keras_graph import finish_head, import_keras, prepare, to_graph
from provider_image.compiler.self_test import pictures
from provider_image.compiler.verification import TOLERANCE, finish
from provider_image.errors import ConfigError, NotInstalled, UnsuitableModel
from provider_image.images.decoding import decode
from provider_image.models.artefact import Artefact, is_model_name
from provider_image.models.catalogue import ModelRow, look_up
from provider_image.models.labels import read_labels
from provider_image.models.registry import find_own_name

if TYPE_CHECKING:
    import numpy as np

    Arrays = Sequence[np.ndarray[Any, Any]]

#: Part of the digest. Change it whenever the graphs' answers change.
RECIPE = "keras-file-1"
#: The ways of preprocessing that a user may name.
PREPROCESSINGS = ("none", "unit", "tf", "torch", "caffe")
#: Pixels of a side at most.
LARGEST_SIDE = 2048

_LONGEST_TITLE = 64
#: Probabilities that should sum to one may miss it by this much.
_SUM_TOLERANCE = 1e-3
#: Layers and operations that hand on what they get, when nothing is trained.
_PASSING = frozenset(
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
class OwnModel:
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
    own: OwnModel,
    *,
    f16_within: float = TOLERANCE,
    tell: Callable[[str], None] = lambda step: None,
) -> Artefact:
    """Build a user's model in the models folder; one of the same name is replaced.

    :param f16_within: see `finishing.finish`.
    :param tell: called with what is being done.
    :raises ConfigError: it cannot have this name, title or size.
    :raises CompilerMissing: tensorflow is not installed.
    :raises WeightsMissing: there is no such file.
    :raises UnsafeModelFile: the file could run code or read other files. None was run, none was read.
    :raises UnsuitableModel: it is no classifier of one picture, or the labels are not its own.
    :raises CompilationFailed: the graph does not answer as Keras does.
    :raises NotInstalled: the models folder cannot be written.
    """
    _check_name(models, own)
    labels = read_labels(own.labels)
    try:
        with building(models, own.name) as folder:
            tell("checking the file")
            with tempfile.TemporaryDirectory(dir=folder) as private:
                checked = check_keras_file(own.file, Path(private))
                tell("starting Keras")
                keras = import_keras()
                tell("reading weights")
                network = load_checked(keras, checked)
            try:
                height, width = _find_size(network, own)
                _check_classes(network, labels)
                row = ModelRow(
                    name=own.name,
                    title=own.title or own.name,
                    height=height,
                    width=width,
                    preprocessing=own.preprocessing,
                    source="own",
                )
                head = _find_head(keras, network, row)
                origin = Origin(
                    labels=labels,
                    weights_sha256=checked.sha256,
                    recipe=RECIPE,
                    source=row.source,
                    reference=f"keras {keras.__version__}",
                )

                def reference(arrays: Arrays) -> Arrays:
                    return _answers(keras, network, row, arrays, head)

                tell("converting")
                graph = to_graph(_Single(keras, network), row, head)
                return finish(graph, folder, models, row, origin, reference=reference, f16_within=f16_within, tell=tell)
            finally:
                keras.backend.clear_session()
    except OSError as error:
        raise NotInstalled(f"The model {own.name} could not be written to {models}: {error}") from error


class _Single:
    """A network that gives its one output bare, in whatever structure the user's has it."""

    def __init__(self, keras: Any, network: Any) -> None:
        self._flatten = keras.tree.flatten
        self._network = network

    def __call__(self, pixels: Any, *, training: bool) -> Any:
        return self._flatten(self._network(pixels, training=training))[0]


def _check_name(models: Path, own: OwnModel) -> None:
    if not is_model_name(own.name):
        raise ConfigError(
            f"A model cannot be called {own.name[:80]!r}. Take small letters, digits and `_`, at most 64, beginning "
            "with a letter or digit."
        )
    known = look_up(own.name)
    there = known.name if known else find_own_name(models, own.name)
    if known is not None or there not in (None, own.name):
        raise ConfigError(
            f"{own.name} is taken: the model {there} is found under it as well, because case and separators do not "
            "matter. Choose another name."
        )
    title = own.title
    if title is not None and not (0 < len(title) <= _LONGEST_TITLE and title.isprintable() and title == title.strip()):
        raise ConfigError(f"A title has 1 to {_LONGEST_TITLE} characters and no control characters.")
    if own.preprocessing not in PREPROCESSINGS:
        raise ConfigError(f"There is no preprocessing {own.preprocessing[:40]!r}: {', '.join(PREPROCESSINGS)}.")


def _find_size(network: Any, own: OwnModel) -> tuple[int, int]:
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
    if own.size is None and None in shape[1:3]:
        raise UnsuitableModel("The model leaves its input's size open. Say which it was trained with: --size HxW")
    found = (
        shape[1:3]
        if own.size is None
        else tuple(asked if side is None else side for side, asked in zip(shape[1:3], own.size, strict=True))
    )
    if own.size is not None and found != own.size:
        raise ConfigError(f"The model takes {shape[1]} x {shape[2]} pixels and nothing else. Leave --size away.")
    if not all(1 <= side <= LARGEST_SIDE for side in found):
        raise UnsuitableModel(f"A picture of {found[0]} x {found[1]} is more than {LARGEST_SIDE} pixels a side.")
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

    ending = _ending(network)
    arrays = [decode(data, row.height, row.width, row.crop) for data in pictures().values()]
    try:
        outputs = np.stack(_answers(keras, network, row, arrays, "none"))
    except Exception as error:  # whatever a network of a user's own makes tensorflow raise
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsuitableModel(
            f"The model fails on pictures of {row.height} x {row.width}: {first_line[:300]}"
        ) from error
    if not bool(np.isfinite(outputs).all()):
        raise UnsuitableModel("The model gives numbers that are not finite. Look at its weights and --preprocessing.")
    are_shares = bool((outputs >= 0).all() and (outputs <= 1 + _SUM_TOLERANCE).all())
    sum_to_one = are_shares and bool((np.abs(outputs.sum(axis=1) - 1) <= _SUM_TOLERANCE).all())
    if outputs.shape[1] == 1:
        if ending == "sigmoid" and are_shares:
            return "complement"
        raise UnsuitableModel(
            f"The model gives a single number and ends in {ending or 'no activation'}. Only a sigmoid makes it the "
            "probability of one of two classes: add activation='sigmoid' to the last layer and save it again."
        )
    if ending in ("softmax", None) and sum_to_one:
        return "none"
    if ending in ("linear", "log_softmax") or (ending is None and not are_shares):
        return "softmax"
    if ending == "softmax":
        raise UnsuitableModel("The model ends in a softmax, but not over the classes: its answers do not sum to 1.")
    if ending in ("sigmoid", None):
        raise UnsuitableModel(
            "The model gives each class a probability of its own (sigmoid), so several may be right at once. Here a "
            "picture has one class: end the model in a softmax and train it so."
        )
    raise UnsuitableModel(
        f"The model ends in {ending}, which gives no probabilities. End it in a softmax, or in nothing for logits."
    )


def _ending(network: Any) -> str | None:
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
        elif kind in _PASSING and activation in (None, "linear"):
            tensor = layer._inbound_nodes[history.node_index].input_tensors[0]
        else:
            return activation


def _answers(keras: Any, network: Any, row: ModelRow, arrays: Arrays, head: str) -> Arrays:
    """Answer pictures with Keras itself, each alone as it will be asked.

    :param arrays: uint8 RGB, shape (height, width, 3).
    """
    import numpy as np

    single = _Single(keras, network)
    inputs = [np.asarray(prepare(array.astype(np.float32), row.preprocessing), np.float32)[None] for array in arrays]
    return [np.asarray(finish_head(single(each, training=False), head))[0] for each in inputs]

"""Heads, and the builder of models that are a backbone with a head.

A head turns the features of a backbone into an answer. It is fitted by `trainer/heads.py`; this module joins it with
the graph of an installed embedding, so that the result is a model like any other: one graph from pixels to the answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.backends import Device
from provider_image.backends.openvino import GRAPH_FILES, import_openvino, load_net
from provider_image.compiler.custom import check_custom_name
from provider_image.compiler.installing import begin_artefact, build_folder
from provider_image.compiler.verification import verify_and_install
from provider_image.errors import ConfigError, UnsuitableModel
from provider_image.models.artefact import Artefact, Provenance, find_artefact
from provider_image.models.catalogue import ModelFacts
from provider_image.precision import TOLERANCE

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: Part of the digest. Change it whenever the graphs' results change.
RECIPE = "head-1"
#: Largest difference of an answer from what numpy computes of the same features.
HEAD_TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Head:
    """A fitted head. It takes features x of unit length, f32 of shape (items, dimensions).

    Classification gives probabilities: softmax(x @ weights + bias), and if there are `votes`, that @ votes. So logistic
    regression has an output for each class, and nearest neighbours have one for each example and votes that say which
    class it has. Regression gives x @ weights + bias.
    """

    #: classification or regression.
    kind: str
    #: How it was fitted, for people.
    method: str
    #: The names of the classes, in the order of the probabilities; empty for a regression.
    classes: tuple[str, ...] = ()
    #: f32, (dimensions, outputs).
    weights: Array
    #: f32, (outputs,).
    bias: Array
    #: f32, (outputs, classes): each row has a single 1, at the class of that output; None if outputs are classes.
    votes: Array | None = None

    @property
    def dimensions(self) -> int:
        """Return the number of features that it takes."""
        return int(self.weights.shape[0])

    def apply(self, features: Array) -> Array:
        """Compute the answers in numpy and f64.

        :param features: of unit length, shape (items, dimensions).
        :return: f64; probabilities of shape (items, classes), or numbers of shape (items,).
        """
        import numpy as np

        scores = features.astype(np.float64) @ self.weights.astype(np.float64) + self.bias.astype(np.float64)
        if self.kind == "regression":
            return np.asarray(scores[:, 0])
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
        return np.asarray(scores if self.votes is None else scores @ self.votes.astype(np.float64))


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model that is to be built from a backbone and a head."""

    #: The canonical name that it gets.
    name: str
    #: Its name for display; None takes the name.
    title: str | None = None
    #: The canonical name of the installed embedding whose vectors the head was fitted on.
    backbone: str
    #: The digest that it had then.
    backbone_digest: str
    head: Head
    #: Identifies the training: digest of the examples and of what else decided the head.
    training_digest: str
    #: Probability below which an answer is unknown; 0 if every answer counts.
    unknown_below: float = 0.0


def build(
    models: Path,
    trained: TrainedModel,
    *,
    f16_within: float = TOLERANCE,
    on_step: Callable[[str], None] = lambda step: None,
) -> Artefact:
    """Build a trained model in the models folder; an installed one of the same name is replaced.

    :param f16_within: see `verification.verify_and_install`.
    :param on_step: called with the name of each step.
    :raises ConfigError: it cannot have this name or title.
    :raises NotInstalled: the backbone is not installed, or the models folder cannot be written.
    :raises UnsuitableModel: the head does not fit the backbone, or the backbone is another one by now.
    :raises CompilationFailed: the graph gives other answers than numpy with the same features.
    """
    check_custom_name(models, trained.name, trained.title)
    head, backbone = trained.head, find_artefact(models, trained.backbone)
    _check_backbone(backbone, trained)
    draft = begin_artefact(
        ModelFacts(
            name=trained.name,
            title=trained.title or trained.name,
            service=head.kind,
            height=backbone.height,
            width=backbone.width,
            preprocessing=backbone.preprocessing,
            crop=backbone.crop,
            source="own",
            takes_faces=backbone.takes_faces,
        ),
        labels=tuple((name, name) for name in head.classes),
        weights_sha256=_digest(backbone, head),
        recipe=f"{backbone.recipe}, {RECIPE}",
        precision=backbone.precision,
        reference=f"{head.method}, numpy {_numpy_version()}",
        unknown_below=trained.unknown_below,
        provenance=Provenance(
            backbone=backbone.name,
            backbone_digest=backbone.digest,
            training_digest=trained.training_digest,
            method=head.method,
        ),
    )
    net = load_net(backbone, Device(threads=1))

    def reference(arrays: Sequence[Array]) -> list[Array]:
        import numpy as np

        answers = head.apply(np.stack(net.infer(arrays)))
        return [np.atleast_1d(answer) for answer in answers]

    with build_folder(models, trained.name) as folder:
        on_step("joining")
        graph = join(import_openvino().Core().read_model(backbone.folder / GRAPH_FILES[0]), head, trained.name)
        return verify_and_install(
            graph,
            folder,
            models,
            draft,
            reference=reference,
            tolerance=HEAD_TOLERANCE,
            f16_within=f16_within,
            on_step=on_step,
        )


def join(graph: Any, head: Head, name: str) -> Any:
    """Continue the graph of an embedding with a head.

    :param graph: OpenVINO's Model: an image in, a vector of shape (1, dimensions) out.
    :return: OpenVINO's Model with the same input; probabilities of shape (1, classes) out, or a number of shape (1, 1).
    """
    openvino = import_openvino()
    op = openvino.opset13
    vector = graph.get_results()[0].input(0).get_source_output()
    answer = op.matmul(vector, op.constant(head.weights), False, False)
    answer = op.add(answer, op.constant(head.bias[None]))
    if head.kind == "classification":
        answer = op.softmax(answer, 1)
    if head.votes is not None:
        answer = op.matmul(answer, op.constant(head.votes), False, False)
    return openvino.Model([answer], graph.get_parameters(), name)


def _check_backbone(backbone: Artefact, trained: TrainedModel) -> None:
    if backbone.digest != trained.backbone_digest:
        raise UnsuitableModel(
            f"The model {backbone.name} was replaced since the features were computed. Train {trained.name} again."
        )
    if backbone.service != "embedding" or not backbone.files.keys() >= set(GRAPH_FILES):
        raise UnsuitableModel(f"{backbone.name} is no embedding for OpenVINO, so no head can be joined with it.")
    if backbone.dimensions != trained.head.dimensions:
        raise UnsuitableModel(
            f"{backbone.name} returns {backbone.dimensions} values; the head was fitted on {trained.head.dimensions}."
        )
    if not 0 <= trained.unknown_below < 1:
        raise ConfigError(f"A threshold is at least 0 and less than 1, not {trained.unknown_below:g}.")


def _digest(backbone: Artefact, head: Head) -> str:
    """Return the digest of all weights."""
    import numpy as np

    found = hashlib.sha256(backbone.weights_sha256.encode())
    for each in (head.weights, head.bias, head.votes):
        if each is not None:
            found.update(str(each.shape).encode() + np.ascontiguousarray(each, "<f4").tobytes())
    return found.hexdigest()


def _numpy_version() -> str:
    import numpy as np

    return np.__version__

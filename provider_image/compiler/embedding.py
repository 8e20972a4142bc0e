"""The builder of embeddings: models that lack the last layer of a classifier, and return what it takes as a vector.

Called by `mlg models compile NAME_embedding`, and for its graph by `lite0.py`. It needs neither the weights file nor
the framework that the classifier was compiled from: the graph is cut before the matrix product of its last layer, and
its vectors are compared with those that the classifier computes on its way to the labels that its artefact recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.backends.openvino import GRAPH_FILES, import_openvino
from provider_image.check import tolerance
from provider_image.compiler.installing import begin_artefact, build_folder
from provider_image.compiler.verification import verify_and_install
from provider_image.errors import CompilationFailed, UnsuitableModel
from provider_image.models.artefact import Artefact, check_files, find_artefact, is_model_name
from provider_image.models.catalogue import embedding_of
from provider_image.precision import TOLERANCE
from provider_image.service import Output
from provider_image.services import load_service
from provider_image.services.classification import top_labels
from provider_image.services.embedding import MAX_DIMENSIONS

if TYPE_CHECKING:
    import numpy as np

    Arrays = Sequence[np.ndarray[Any, Any]]

#: Part of the digest, after the recipe of the classifier. Change it whenever the graphs' results change.
RECIPE = "embedding-1"
#: Operations between the matrix product and the labels: bias, activation, and what makes two classes of one number.
_HEAD = {
    *("Add", "Subtract", "Multiply", "Divide", "Convert", "Concat", "Reshape", "Squeeze", "Unsqueeze"),
    *("Softmax", "LogSoftmax", "Sigmoid", "Result"),
}
#: Least length of what is divided by its length: a vector of zeros stays one.
_EPSILON = 1e-12


def build(
    models: Path, base: str, *, f16_within: float = TOLERANCE, on_step: Callable[[str], None] = lambda step: None
) -> Artefact:
    """Build the embedding of an installed classifier.

    :param base: the canonical name of the classifier.
    :param f16_within: see `verification.verify_and_install`; the weights of a classifier that has f16 remain f16.
    :param on_step: called with the name of each step.
    :raises NotInstalled: the classifier is not installed, or the models folder cannot be written.
    :raises UnsuitableModel: its last layer is no matrix product.
    :raises BrokenArtefact: it has changed since it was installed.
    :raises CompilationFailed: it does not give the results that it recorded.
    """
    classifier = find_artefact(models, base)
    if classifier.service != "classification" or not classifier.files.keys() >= set(GRAPH_FILES):
        raise UnsuitableModel(f"{base} is no classifier for OpenVINO, so there is no embedding of it.")
    if classifier.reduced is not None:
        raise UnsuitableModel(f"{base} is a copy of {classifier.reduced.base}: build the embedding of that.")
    check_files(classifier)
    if not classifier.samples:
        raise UnsuitableModel(f"{base} has no self-test images to compare its embedding with. Install it again.")
    draft = begin_artefact(
        embedding_of(classifier),
        weights_sha256=classifier.weights_sha256,
        recipe=f"{classifier.recipe}, {RECIPE}",
        precision=classifier.precision,
        reference=classifier.reference,
    )
    if not is_model_name(draft.name):
        raise UnsuitableModel(f"The name {draft.name} of the embedding is too long: at most 64 characters.")
    with build_folder(models, draft.name) as folder:
        on_step("cutting")
        openvino = import_openvino()
        path = classifier.folder / GRAPH_FILES[0]
        graph = cut(openvino.Core().read_model(path), base)
        return verify_and_install(
            graph,
            folder,
            models,
            replace(draft, dimensions=int(graph.output(0).shape[1])),
            images={sample.file: (classifier.folder / sample.file).read_bytes() for sample in classifier.samples},
            reference=lambda images: _vectors(openvino, classifier, images),
            f16_within=f16_within,
            on_step=on_step,
        )


def cut(graph: Any, name: str) -> Any:
    """Return the graph of an embedding.

    :param graph: OpenVINO's Model of a classifier: uint8 RGB (1, height, width, 3) in, probabilities (1, labels) out.
    :param name: the classifier's name, for messages.
    :return: OpenVINO's Model with the same input; what the last matrix product takes, divided by its length, out.
    :raises UnsuitableModel: it does not end in a matrix product, or its vector would be too long.
    """
    import numpy as np

    openvino = import_openvino()
    op = openvino.opset13
    axis = op.constant(np.array([1], np.int64))
    vector = op.normalize_l2(features(graph, name), axis, _EPSILON, "max")
    return openvino.Model([vector], graph.get_parameters(), f"{name}_embedding")


def features(graph: Any, name: str) -> Any:
    """Return the output of a classifier's graph, of shape (1, n), that its last matrix product takes.

    :param name: the classifier's name, for messages.
    :raises UnsuitableModel: it does not end in a matrix product, or n is too large.
    """
    # Converted graphs may have further results, which nobody reads.
    products = _last_operations(graph.get_results()[0])
    kinds = sorted({operation.get_type_name() for operation in products})
    sources = [each.get_source_output() for one in products for each in one.inputs() if not _is_constant(each)]
    if kinds != ["MatMul"] or len(products) != 1 or len(sources) != 1:
        raise UnsuitableModel(
            f"The last layer of {name} is no matrix product ({', '.join(kinds)}), so there is no vector before it and "
            f"no embedding of {name}. A model that ends in a dense layer has one."
        )
    shape = sources[0].get_partial_shape()
    if len(shape) != 2 or not shape.is_static or not 1 <= shape[1].get_length() <= MAX_DIMENSIONS:
        raise UnsuitableModel(
            f"The last layer of {name} takes {shape}. An embedding has one vector of at most {MAX_DIMENSIONS} values."
        )
    return sources[0]


def _last_operations(result: Any) -> list[Any]:
    """Go back from the result of a graph, and return the last operations that are no part of a classifier's head."""
    waiting, seen, found = [result], set(), []
    while waiting:
        operation = waiting.pop()
        if operation.get_friendly_name() in seen:
            continue
        seen.add(operation.get_friendly_name())
        if operation.get_type_name() in _HEAD:
            waiting += [each.get_source_output().get_node() for each in operation.inputs() if not _is_constant(each)]
        else:
            found.append(operation)
    return found


def _is_constant(entry: Any) -> bool:
    """Tell whether an input of an operation is constant, such as weights, also if they are converted from f16."""
    operation = entry.get_source_output().get_node()
    while operation.get_type_name() in ("Convert", "Reshape") and operation.get_input_size():
        operation = operation.input(0).get_source_output().get_node()
    return bool(operation.get_type_name() == "Constant")


def _vectors(openvino: Any, classifier: Artefact, images: Arrays) -> Arrays:
    """Run a classifier, compare its labels with the recorded ones, and return what its last layer takes.

    :param images: the decoded images of its self-test, uint8 (height, width, 3).
    :return: vectors of unit length, computed without the graph that is built.
    :raises CompilationFailed: the labels differ.
    """
    import numpy as np

    core, service = openvino.Core(), load_service(classifier.service)
    graph = core.read_model(classifier.folder / GRAPH_FILES[0])
    graph.add_outputs([features(graph, classifier.name)])
    compiled = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    vectors, allowed = [], tolerance(classifier, "f32")
    for sample, image in zip(classifier.samples, images, strict=True):
        results = list(compiled(image[None]).values())
        probabilities, found = (np.array(each[0], np.float64) for each in (results[0], results[-1]))
        labels = Output(data=top_labels(classifier.labels, probabilities))
        difference = service.compare(Output(data=sample.output), labels, allowed)
        if not difference.largest <= allowed:
            raise CompilationFailed(
                f"{classifier.name} gives other labels than it recorded (probabilities differ by up to "
                f"{difference.largest:.2g}), so there is no embedding of it. Check it: mlg models check "
                f"{classifier.name}"
            )
        vectors.append((found / max(float(np.linalg.norm(found)), _EPSILON)).astype(np.float32))
    return vectors

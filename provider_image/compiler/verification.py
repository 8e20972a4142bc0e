"""Verification of a new graph: compares it with its reference, chooses the storage of its weights, records a self-test.

Called by every builder, inside `installing.build_folder`. No graph is installed whose results differ from those of its
reference.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.backends.openvino import GRAPH_FILES, OpenvinoNet, compile_graph, import_openvino
from provider_image.compiler.installing import install
from provider_image.compiler.self_test import self_test_images
from provider_image.errors import CompilationFailed
from provider_image.images.decoding import decode
from provider_image.models.artefact import Artefact, Sample, Storage
from provider_image.precision import TOLERANCE
from provider_image.service import Difference, Output
from provider_image.services.classification import Classification, top_labels

if TYPE_CHECKING:
    import numpy as np

    Arrays = Sequence[np.ndarray[Any, Any]]

#: Weights are stored as f16 only if that makes the artefact smaller by at least this share.
_MIN_SAVING = 0.1


def verify_and_install(
    graph: Any,
    folder: Path,
    models: Path,
    draft: Artefact,
    *,
    reference: Callable[[Arrays], Arrays] | None = None,
    f16_within: float = TOLERANCE,
    on_step: Callable[[str], None] = lambda step: None,
) -> Artefact:
    """Verify, store and install a graph.

    :param graph: OpenVINO's Model: uint8 RGB (1, height, width, 3) in, probabilities (1, labels) out.
    :param folder: the folder from `installing.build_folder`.
    :param draft: what is known of the artefact without the graph.
    :param reference: returns the right probabilities for decoded images, uint8 (height, width, 3); None takes those of
        the graph itself in f32, if there is nothing else to compare with.
    :param f16_within: weights are stored as f16 if no probability differs by more than this from the reference's.
    :param on_step: called with the name of each step.
    :raises CompilationFailed: the graph differs from the reference.
    """
    on_step("comparing")
    openvino = import_openvino()
    _rename(graph, draft.name)
    openvino.save_model(graph, str(folder / "model.xml"), compress_to_fp16=False)
    files = self_test_images()
    arrays = [decode(data, draft.height, draft.width, draft.crop) for data in files.values()]
    actual = _run(draft, folder, arrays)
    expected = actual if reference is None else reference(arrays)
    outputs = [top_labels(draft.labels, each) for each in expected]
    difference = _compare(outputs, expected, actual, draft)
    if not difference.largest <= TOLERANCE or not difference.is_same_order:
        raise CompilationFailed(
            f"The compiled graph of {draft.name} gives other results than {draft.reference}: "
            "probabilities differ by up "
            f"to {difference.largest:.2g}. It was not installed. Please report this with both versions."
        )
    on_step("storing")
    precision, storage = _choose_storage(openvino, graph, folder, arrays, outputs, expected, draft, f16_within)
    samples = []
    for (file, data), output in zip(files.items(), outputs, strict=True):
        (folder / file).write_bytes(data)
        samples.append(Sample(file=file, sha256=hashlib.sha256(data).hexdigest(), output=output))
    artefact = replace(draft, precision=precision, storage=storage, samples=tuple(samples))
    return install(artefact, folder, models, GRAPH_FILES)


def _rename(graph: Any, name: str) -> None:
    """Name everything in a graph after its place.

    The digest covers the file with the names, and OpenVINO and Keras count what they name over the life of a process.
    """
    graph.set_friendly_name(name)
    for number, operation in enumerate(graph.get_ordered_ops()):
        operation.set_friendly_name(f"{operation.get_type_name()}_{number}")
        for output in operation.outputs():
            output.get_tensor().set_names(set())


def _run(draft: Artefact, folder: Path, arrays: Arrays) -> Arrays:
    return OpenvinoNet(draft, compile_graph(folder / "model.xml", 1, "f32"), 1).infer(arrays)


def _choose_storage(
    openvino: Any,
    graph: Any,
    folder: Path,
    arrays: Arrays,
    outputs: list[Any],
    expected: Arrays,
    draft: Artefact,
    f16_within: float,
) -> tuple[str, Storage]:
    """Store the weights as f16 as well, compare the results, and keep the f16 or the f32 files; return which."""
    f16_folder = folder / "f16"
    f16_folder.mkdir()
    openvino.save_model(graph, str(f16_folder / "model.xml"), compress_to_fp16=True)
    actual = _run(draft, f16_folder, arrays)
    difference = _compare(outputs, expected, actual, draft)
    allowed = _compare(outputs, expected, actual, draft, f16_within)
    f32_bytes, f16_bytes = (
        sum((parent / file).stat().st_size for file in GRAPH_FILES) for parent in (folder, f16_folder)
    )
    is_close = allowed.largest <= f16_within and allowed.is_same_order
    is_f16 = is_close and f16_bytes <= (1 - _MIN_SAVING) * f32_bytes
    if is_f16:
        for file in GRAPH_FILES:
            (f16_folder / file).replace(folder / file)
    shutil.rmtree(f16_folder)
    return "f16" if is_f16 else "f32", Storage(
        f32_bytes=f32_bytes,
        f16_bytes=f16_bytes,
        largest_difference=float(f"{difference.largest:.3g}"),
        is_same_top_five=difference.is_same_order,
    )


def _compare(
    outputs: list[Any], expected: Arrays, actual: Arrays, draft: Artefact, tolerance: float = TOLERANCE
) -> Difference:
    """Compare all probabilities and the order of the top labels. Non-finite numbers give the largest difference."""
    import numpy as np

    largest = max(float(np.abs(a - b).max()) for a, b in zip(expected, actual, strict=True))
    if not math.isfinite(largest):
        return Difference(largest=1.0, is_same_order=False)
    pairs = zip(outputs, actual, strict=True)
    same = [
        Classification().compare(Output(data=output), Output(data=top_labels(draft.labels, each)), tolerance)
        for output, each in pairs
    ]
    return Difference(largest=largest, is_same_order=all(each.is_same_order for each in same))

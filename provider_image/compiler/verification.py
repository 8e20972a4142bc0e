"""Verification of a new graph: compares it with its reference, chooses the storage of its weights, records a self-test.

Called by every builder, inside `installing.build_folder`. No graph is installed whose results differ from those of its
reference.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.backends import Device, load_net
from provider_image.backends.openvino import GRAPH_FILES, OpenvinoNet, compile_graph, import_openvino
from provider_image.compiler.installing import install, with_files
from provider_image.compiler.self_test import MAX_SIDE, self_test_images
from provider_image.errors import CompilationFailed, InferenceFailed
from provider_image.images.decoding import decode
from provider_image.models.artefact import Artefact, Sample, Storage
from provider_image.precision import TOLERANCE
from provider_image.service import Difference, Output, Service, check_params, primary_input
from provider_image.services import load_service

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
    images: Mapping[str, bytes] | None = None,
    reference: Callable[[Arrays], Arrays] | None = None,
    tolerance: float = TOLERANCE,
    f16_within: float = TOLERANCE,
    on_step: Callable[[str], None] = lambda step: None,
) -> Artefact:
    """Verify, store and install a graph.

    :param graph: OpenVINO's Model: uint8 RGB (1, height, width, 3) in, what the service takes of a net (1, ...) out,
        for example probabilities.
    :param folder: the folder from `installing.build_folder`.
    :param draft: what is known of the artefact without the graph. If its weights are f16 already, they remain so.
    :param images: the images of the self-test, by file name; None takes those of `self_test.py`.
    :param reference: returns the right results for decoded images, uint8 (height, width, 3); None takes those of the
        graph itself in f32, if there is nothing else to compare with.
    :param tolerance: largest difference from the reference's results; of numbers beyond 1, as a share of them.
    :param f16_within: weights are stored as f16 if no result differs by more than this from the reference's.
    :param on_step: called with the name of each step.
    :raises CompilationFailed: the graph differs from the reference.
    """
    on_step("comparing")
    openvino = import_openvino()
    name_by_place(graph, draft.name)
    openvino.save_model(graph, str(folder / "model.xml"), compress_to_fp16=False)
    files = self_test_images() if images is None else images
    arrays = decode_for(draft, files)
    actual = _run(draft, folder, arrays)
    expected = _Expected.from_results(draft, actual if reference is None else reference(arrays))
    expected.require(actual, tolerance)
    on_step("storing")
    precision, storage = draft.precision, None
    if precision != "f16":
        precision, storage = _choose_storage(openvino, graph, folder, arrays, expected, f16_within)
    artefact = replace(draft, precision=precision, storage=storage, folder=folder)
    return _install(artefact, folder, models, GRAPH_FILES, expected, files)


def install_as_it_is(
    folder: Path,
    models: Path,
    draft: Artefact,
    *,
    backend: str,
    files: Sequence[str],
    reference: Callable[[Arrays], Arrays],
    tolerance: float = TOLERANCE,
) -> Artefact:
    """Verify and install what another backend than OpenVINO loads, whose files are stored as they are.

    :param folder: has the backend's files; in the folder from `installing.build_folder`.
    :param files: their names.
    :param reference, tolerance: see `verify_and_install`.
    :raises CompilationFailed: the results differ from the reference's.
    """
    images = self_test_images()
    arrays = decode_for(draft, images)
    unverified = with_files(replace(draft, backend=backend, folder=folder), files)
    expected = _Expected.from_results(draft, reference(arrays))
    expected.require(load_net(unverified, Device(threads=1)).infer(arrays), tolerance)
    return _install(unverified, folder, models, files, expected, images)


def _install(
    artefact: Artefact,
    folder: Path,
    models: Path,
    files: Sequence[str],
    expected: _Expected,
    images: Mapping[str, bytes],
) -> Artefact:
    """Record what was expected as the self-test, and install a model.

    Of one with parts, what it answers itself for whole images is recorded. One that enlarges gets smaller images, so
    that what is recorded stays small.
    """
    outputs = expected.outputs
    if not outputs:
        images = self_test_images(MAX_SIDE // artefact.scale)
        outputs = answer_images(with_files(artefact, files), images)
    return install(replace(artefact, samples=write_samples(folder, images, outputs)), folder, models, files)


def decode_for(draft: Artefact, images: Mapping[str, bytes]) -> Arrays:
    """Decode images to what the net takes."""
    return [decode(data, *draft.net_size, draft.crop) for data in images.values()]


def answer_images(artefact: Artefact, images: Mapping[str, bytes]) -> list[Output]:
    """Return what the service answers for images with a model whose files and digest are there."""
    service = load_service(artefact.service)
    net, params = service.load(artefact, Device(threads=1)), check_params(service.params, {})
    outputs: list[Output] = []
    for data in images.values():
        item = service.prepare(artefact, {primary_input(service): data}, params)
        outputs += service.run(net, [item], [params])
    return outputs


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def name_by_place(graph: Any, name: str) -> None:
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
    openvino: Any, graph: Any, folder: Path, arrays: Arrays, expected: _Expected, f16_within: float
) -> tuple[str, Storage]:
    """Store the weights as f16 as well, compare the results, and keep the f16 or the f32 files; return which."""
    f16_folder = folder / "f16"
    f16_folder.mkdir()
    openvino.save_model(graph, str(f16_folder / "model.xml"), compress_to_fp16=True)
    actual = _run(expected.draft, f16_folder, arrays)
    difference, allowed = expected.compare(actual), expected.compare(actual, f16_within)
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


@dataclass(frozen=True, kw_only=True)
class _Expected:
    """The right results for the images of the self-test."""

    draft: Artefact
    #: As the reference computed them.
    results: Arrays
    #: As the service returns them; empty if these are results for parts of images, which are no outputs.
    outputs: Sequence[Output]

    @classmethod
    def from_results(cls, draft: Artefact, results: Arrays) -> _Expected:
        """Make the outputs of results. :raises CompilationFailed: the service cannot use them."""
        if draft.tile != (0, 0):
            return cls(draft=draft, results=results, outputs=())
        try:
            return cls(draft=draft, results=results, outputs=_outputs(draft, results))
        except InferenceFailed as error:
            raise CompilationFailed(f"{error.reason} It was not installed.") from error

    def compare(self, actual: Arrays, tolerance: float = TOLERANCE) -> Difference:
        """Compare all numbers, and the outputs. Numbers that are not finite give the largest difference."""
        import numpy as np

        # Probabilities and vectors of unit length have no numbers beyond 1.
        scale = max(1.0, *(float(np.abs(each).max()) for each in self.results))
        largest = max(float(np.abs(a - b).max()) for a, b in zip(self.results, actual, strict=True)) / scale
        if not math.isfinite(largest):
            return Difference(largest=1.0, is_same_order=False)
        if not self.outputs:
            return Difference(largest=largest, is_same_order=True)
        service = load_service(self.draft.service)
        try:
            pairs = zip(self.outputs, _outputs(self.draft, actual), strict=True)
            found = [service.compare(one, other, tolerance) for one, other in pairs]
        except InferenceFailed:
            return Difference(largest=1.0, is_same_order=False)
        return Difference(
            largest=max(largest, max(each.largest * each.scale for each in found) / max(each.scale for each in found)),
            is_same_order=all(each.is_same_order for each in found),
        )

    def require(self, actual: Arrays, tolerance: float = TOLERANCE) -> None:
        """Check results. :raises CompilationFailed: they are not the right ones."""
        difference = self.compare(actual, tolerance)
        if not difference.largest <= tolerance or not difference.is_same_order:
            raise CompilationFailed(
                f"The compiled graph of {self.draft.name} gives other results than {self.draft.reference}: they differ "
                f"by up to {difference.largest:.2g}. It was not installed. Please report this with both versions."
            )


def write_samples(folder: Path, images: Mapping[str, bytes], outputs: Sequence[Output]) -> tuple[Sample, ...]:
    """Write the images of a self-test and the files of the outputs for them into a folder."""
    samples = []
    for (file, data), output in zip(images.items(), outputs, strict=True):
        results = {name: (f"{Path(file).stem}-{name}.bin", each) for name, each in output.files.items()}
        for name, contents in ((file, data), *results.values()):
            (folder / name).write_bytes(contents)
        samples.append(
            Sample(
                file=file,
                sha256=_sha256(data),
                output=output.data,
                files={name: (stored, _sha256(contents)) for name, (stored, contents) in results.items()},
            )
        )
    return tuple(samples)


@dataclass(kw_only=True)
class _RecordedNet:
    """A net that returns what it is given: it has the service make outputs of results that are there already."""

    artefact: Artefact
    batch_items: int

    def infer(self, batch: Arrays) -> Arrays:
        return batch


def _outputs(draft: Artefact, results: Arrays) -> Sequence[Output]:
    """Return the service's outputs for a net's results. :raises InferenceFailed: it cannot use them."""
    service: Service = load_service(draft.service)
    net = _RecordedNet(artefact=draft, batch_items=len(results))
    return service.run(net, results, [check_params(service.params, {})] * len(results))

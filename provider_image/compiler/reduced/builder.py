"""The builder of a classifier's copy in bf16 or int8, which is installed only if its answers are nearly those of f32.

Called by `mlg models compile NAME --precision P --calibrate FOLDER`. The copy is a model of its own, NAME_P. It is
judged on this processor with the operator's photos, of which those that calibrated are none. What it is in bf16 is the
hint with which the same graph is loaded.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.backends.openvino import GRAPH_FILES, OpenvinoNet, compile_graph, import_openvino
from provider_image.compiler.installing import begin_artefact, build_folder, install, with_files
from provider_image.compiler.reduced.comparison import CopyComparison, compare
from provider_image.compiler.reduced.photos import decode_photos, list_photos, split
from provider_image.compiler.reduced.quantised import RECIPE, count_layers, quantise, rank_layers
from provider_image.compiler.verification import answer_images, name_by_place, write_samples
from provider_image.errors import ConfigError, UnsuitableModel
from provider_image.models.artefact import Artefact, Reduced, check_files, find_artefact, is_model_name, read_artefact
from provider_image.models.catalogue import ModelFacts, look_up
from provider_image.models.intervals import wilson_interval
from provider_image.models.processor import cpu_name, processor_id
from provider_image.models.quickest import copy_name
from provider_image.models.registry import find_custom_name
from provider_image.precision import MIN_AGREEMENT, REDUCED, TOLERANCE_BF16

if TYPE_CHECKING:
    import numpy as np

    from provider_image.backends import Net

#: What is required of the images that calibrate: half of what may be lost, because others will judge.
_CALIBRATION_AGREEMENT = (1 + MIN_AGREEMENT) / 2
#: Shares of the layers that are left in f32, one after the other, until enough answers stay. With more, int8 gains
#: little.
_SHARES_IN_F32 = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)


def build(
    models: Path,
    base: str,
    precision: str,
    photos: Path,
    *,
    bound: float = TOLERANCE_BF16,
    on_step: Callable[[str], None] = lambda step: None,
) -> Artefact:
    """Build, judge and install the copy of an installed classifier.

    :param base: the canonical name of the classifier.
    :param precision: one of REDUCED.
    :param photos: a folder with photos such as the model is for.
    :param bound: the most that a probability may differ on a photo.
    :param on_step: called with the name of each step.
    :raises UnsuitableModel: it is no classifier for OpenVINO, or the copy's answers differ too much; has the figures.
    :raises ConfigError: this processor does not compute in this precision, there are too few photos, or another model
        has the copy's name.
    :raises CompilerMissing: NNCF is not installed, which int8 needs.
    :raises NotInstalled: the classifier is not installed, or the models folder cannot be written.
    :raises BrokenArtefact: it has changed since it was installed.
    """
    model = find_artefact(models, base)
    _check(models, model, precision)
    check_files(model)
    calibrating, judging = split(list_photos(photos)) if precision == "int8" else ((), list_photos(photos))
    with build_folder(models, copy_name(base, precision)) as folder:
        net = _load(model, model.folder, "f32")
        if precision == "int8":
            images = list(decode_photos(calibrating, model))
            _quantise(model, net, images, folder, bound, on_step)
        else:
            images = []
            for file in GRAPH_FILES:
                shutil.copyfile(model.folder / file, folder / file)
        on_step("judging")
        copy = _load(model, folder, "bf16" if precision == "bf16" else "f32")
        found = compare(net, copy, decode_photos(judging, model))
        reduced = _describe(model, precision, found, folder, bound=bound, calibration_images=len(images))
        if not found.is_within(MIN_AGREEMENT, bound):
            raise UnsuitableModel(
                f"{model.name} in {precision} was not installed. Required is the same first label on "
                f"{MIN_AGREEMENT:.0%} of the images, and no larger difference than {bound:g}. Found: {reduced.figures}."
            )
        on_step("storing")
        return _install(model, reduced, folder, models)


def _check(models: Path, model: Artefact, precision: str) -> None:
    """Check that there can be a copy. :raises UnsuitableModel: :raises ConfigError:"""
    if precision not in REDUCED:
        raise ConfigError(f"There is no precision {precision[:40]!r} for a copy. There are: {', '.join(REDUCED)}.")
    is_classifier = model.service == "classification" and model.files.keys() >= set(GRAPH_FILES)
    if not is_classifier or model.reduced is not None:
        raise UnsuitableModel(f"{model.name} is no classifier for OpenVINO in f32, so there is no copy in {precision}.")
    name = copy_name(model.name, precision)
    if not is_model_name(name):
        raise UnsuitableModel(f"The name {name} of the copy is too long: at most 64 characters.")
    taken = look_up(name) is not None or find_custom_name(models, name) not in (None, name)
    if not taken and (models / name / "model.json").exists():
        existing = read_artefact(models / name).reduced
        taken = existing is None or existing.base != model.name
    if taken:
        raise ConfigError(f"Another model has the name {name} of the copy. Delete or rename it.")
    if precision == "bf16" and not has_bf16():
        raise ConfigError(
            "This processor does not compute in bf16, so a copy would not be quicker and cannot be judged."
        )


def has_bf16() -> bool:
    """Tell whether OpenVINO computes in bf16 on this processor."""
    return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _quantise(
    model: Artefact,
    net: Net,
    images: list[np.ndarray[Any, Any]],
    folder: Path,
    bound: float,
    on_step: Callable[[str], None],
) -> None:
    """Write the graph in int8 into a folder; with as few layers in f32 as let the answers for these photos stay.

    If they do not, the last one that was tried is written, and its judgement says so.
    """
    if not images:
        raise ConfigError("There are too few photos: a quarter of them calibrates, the others judge.")
    path, ranked = model.folder / GRAPH_FILES[0], list[str]()
    on_step(f"quantising with {len(images)} photos")
    for share in (0.0, *_SHARES_IN_F32):
        in_f32 = ranked[: math.ceil(share * len(ranked))]
        _save(quantise(path, images, in_f32), model, folder)
        found = compare(net, _load(model, folder, "f32"), images)
        if found.is_within(_CALIBRATION_AGREEMENT, bound):
            return
        on_step(
            f"with {len(in_f32)} layers in f32 {found.same_first_label} of {found.images} first labels stay, "
            f"probabilities differ by up to {found.largest_difference:.2g}"
        )
        ranked = ranked or rank_layers(path, images)


def _save(graph: Any, model: Artefact, folder: Path) -> None:
    name_by_place(graph, model.name)
    import_openvino().save_model(graph, str(folder / GRAPH_FILES[0]), compress_to_fp16=False)


def _load(model: Artefact, folder: Path, precision: str) -> OpenvinoNet:
    return OpenvinoNet(model, compile_graph(folder / GRAPH_FILES[0], 1, precision), 1)


def _describe(
    model: Artefact, precision: str, found: CopyComparison, folder: Path, *, bound: float, calibration_images: int
) -> Reduced:
    if not found.images:
        raise ConfigError("There are no photos to judge with: none of the files is a usable image.")
    low, high = wilson_interval(found.same_first_label, found.images)
    in_f32, layers = count_layers(import_openvino().Core().read_model(folder / GRAPH_FILES[0]))
    return Reduced(
        base=model.name,
        base_digest=model.digest,
        precision=precision,
        layers_in_f32=in_f32 if precision == "int8" else 0,
        layers=layers,
        calibration_images=calibration_images,
        **{**asdict(found), "speedup": round(found.speedup, 3)},
        agreement_low=low or 0.0,
        agreement_high=high or 1.0,
        bound=bound,
        processor=cpu_name(),
        processor_id=processor_id(),
    )


def _install(model: Artefact, reduced: Reduced, folder: Path, models: Path) -> Artefact:
    """Record what the copy answers for the images of the model's self-test, and install it."""
    facts = ModelFacts(**{name: getattr(model, name) for name in ModelFacts.__dataclass_fields__})
    title = f"{model.title[: 64 - len(reduced.precision) - 2]}, {reduced.precision}"
    draft = begin_artefact(
        replace(facts, name=copy_name(model.name, reduced.precision), title=title),
        precision="int8" if reduced.precision == "int8" else model.precision,
        labels=model.labels,
        preprocessing_version=model.preprocessing_version,
        unknown_below=model.unknown_below,
        weights_sha256=model.weights_sha256,
        recipe=f"{model.recipe}, {RECIPE}" if reduced.precision == "int8" else model.recipe,
        reference=f"openvino {import_openvino().__version__.partition('-')[0]} in {reduced.precision}",
        reduced=reduced,
        folder=folder,
    )
    images = {sample.file: (model.folder / sample.file).read_bytes() for sample in model.samples}
    outputs = answer_images(with_files(draft, GRAPH_FILES), images)
    return install(replace(draft, samples=write_samples(folder, images, outputs)), folder, models, GRAPH_FILES)

"""The builder of vision transformers, of the catalogue and custom ones.

Called by `mlg models compile NAME --weights FOLDER` and `mlg models compile NAME --huggingface FOLDER`. The graph is
compared with the same network in numpy, in double precision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.backends.openvino import import_openvino
from provider_image.compiler.custom import CustomModel, begin_custom, check_description
from provider_image.compiler.installing import begin_artefact, build_folder, find_same
from provider_image.compiler.labels import imagenet_labels, read_labels
from provider_image.compiler.transformers.folder import (
    PREPROCESSOR,
    Description,
    labels_of,
    read_description,
    read_preprocessing,
    require_row,
    weights_paths,
)
from provider_image.compiler.transformers.network import count_features, numpy_probabilities, to_graph
from provider_image.compiler.transformers.safetensors_file import Weights
from provider_image.compiler.verification import verify_and_install
from provider_image.errors import UnsuitableModel, WeightsMismatch, WeightsMissing
from provider_image.models.artefact import Artefact
from provider_image.models.catalogue import ModelRow
from provider_image.precision import TOLERANCE

if TYPE_CHECKING:
    import numpy as np

    Arrays = Sequence[np.ndarray[Any, Any]]

#: Part of the digest. Change it whenever the graphs' results change.
RECIPE = "transformers-1"
_REFERENCE = "the same network in numpy"


def build(
    models: Path,
    row: ModelRow,
    folder: Path,
    *,
    again: bool = False,
    f16_within: float = TOLERANCE,
    on_step: Callable[[str], None] = lambda step: None,
) -> Artefact:
    """Build a model of the catalogue in the models folder, unless the same one is installed.

    :param folder: with `config.json` and `model.safetensors`.
    :param again: build even then, for example with another f16_within.
    :param f16_within: see `verification.verify_and_install`.
    :param on_step: called with the name of each step.
    :raises ModelError: it cannot be built.
    :raises NotInstalled: the models folder cannot be written.
    """
    paths = weights_paths(folder)
    description = read_description(paths[0])
    require_row(paths[0], description, row)
    draft = begin_artefact(
        row, labels=imagenet_labels(), weights_sha256=_sha256(*paths), recipe=RECIPE, reference=_REFERENCE
    )
    with build_folder(models, row.name) as work:
        if not again and (installed := find_same(models, draft)) is not None:
            return installed
        on_step("reading weights")
        weights = Weights(paths[1])
        if count_features(weights, description) != row.features:
            raise WeightsMismatch(
                f"{paths[1]} has {'one last layer' if row.features > description.hidden_size else 'two last layers'}, "
                f"unlike {row.title}."
            )
        return _install(models, work, draft, description, weights, f16_within=f16_within, on_step=on_step)


def build_custom(
    models: Path,
    custom: CustomModel,
    *,
    f16_within: float = TOLERANCE,
    on_step: Callable[[str], None] = lambda step: None,
) -> Artefact:
    """Build a custom model in the models folder; an installed one of the same name is replaced.

    :param custom: its file is the folder, with `preprocessor_config.json` as well unless the preprocessing is given.
    :param f16_within: see `verification.verify_and_install`.
    :param on_step: called with the name of each step.
    :raises ConfigError: it cannot have this name or title.
    :raises ModelError: it cannot be built.
    :raises NotInstalled: the models folder cannot be written.
    """
    check_description(models, custom)
    paths = weights_paths(custom.file)
    description = read_description(paths[0])
    labels = labels_of(paths[0], description) if custom.labels is None else read_labels(custom.labels)
    if len(labels) != len(description.names):
        raise UnsuitableModel(
            f"The model has {len(description.names)} classes and {custom.labels} {len(labels)} lines. Write one line "
            "per class, in order."
        )
    preprocessing, crop = _preprocessing(custom)
    draft = begin_custom(
        custom,
        size=(description.image_size, description.image_size),
        labels=labels,
        preprocessing=preprocessing,
        crop=crop,
        weights_sha256=_sha256(*paths),
        recipe=RECIPE,
        reference=_REFERENCE,
    )
    with build_folder(models, custom.name) as work:
        on_step("reading weights")
        return _install(models, work, draft, description, Weights(paths[1]), f16_within=f16_within, on_step=on_step)


def _preprocessing(custom: CustomModel) -> tuple[str, float | None]:
    """Return preprocessing and crop of a custom model. :raises UnsuitableModel: they are not known."""
    path, cure = custom.file / PREPROCESSOR, "Add --preprocessing tf, torch or unit."
    try:
        found, crop = read_preprocessing(path)
    except WeightsMissing as error:
        if custom.preprocessing is None:
            raise UnsuitableModel(f"{error.reason} It says what pixel values the model takes. {cure}") from error
        return custom.preprocessing, None
    preprocessing = custom.preprocessing or found
    if preprocessing is None:
        raise UnsuitableModel(f"The image_mean and image_std of {path} are no preprocessing that exists here. {cure}")
    return preprocessing, crop


def _sha256(*paths: Path) -> str:
    """Return a digest of the files. :raises WeightsMissing: one cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise WeightsMissing(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _install(
    models: Path,
    work: Path,
    draft: Artefact,
    description: Description,
    weights: Weights,
    *,
    f16_within: float,
    on_step: Callable[[str], None],
) -> Artefact:
    on_step("converting")
    graph = to_graph(import_openvino(), weights, description, draft)

    def reference(images: Arrays) -> Arrays:
        return numpy_probabilities(weights, description, draft.preprocessing, images)

    return verify_and_install(graph, work, models, draft, reference=reference, f16_within=f16_within, on_step=on_step)

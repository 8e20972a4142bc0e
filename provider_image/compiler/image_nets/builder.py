"""The builders of nets that take an image and return one, saved with Keras 3 or as ONNX.

Called by `mlg models compile NAME --keras|--onnx FILE --service image_to_image`. Files are checked as those of
classifiers are. The graph takes a part of an image, uint8 RGB (1, height, width, 3), and returns values from 0 to 255,
(1, scale * height, scale * width, 3); the service cuts images into parts.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.backends.onnxruntime import import_onnxruntime
from provider_image.compiler.custom import (
    CustomModel,
    begin_custom,
    check_description,
    input_sides,
    last_activation,
    predictions,
    single_output,
)
from provider_image.compiler.image_nets.facts import (
    RANGES,
    TOLERANCE,
    choose_range,
    choose_tile,
    find_margin,
    find_scale,
)
from provider_image.compiler.installing import build_folder
from provider_image.compiler.keras_file import check_keras_file, load_checked
from provider_image.compiler.keras_graph import keras_session, to_graph, to_levels
from provider_image.compiler.onnx_models import builder as onnx_builder
from provider_image.compiler.onnx_models.file import check_onnx_file, check_shapes, missing
from provider_image.compiler.self_test import self_test_images
from provider_image.compiler.verification import decode_for, verify_and_install
from provider_image.errors import ConfigError, UnsuitableModel
from provider_image.models.artefact import Artefact

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]
    Arrays = Sequence[Array]

#: Part of the digest. Change it whenever the graphs' results change.
KERAS_RECIPE, ONNX_RECIPE = "keras-image-1", "onnx-image-1"


def build_keras(
    models: Path, custom: CustomModel, *, f16_within: float, on_step: Callable[[str], None] = lambda step: None
) -> Artefact:
    """Build a net that was saved with Keras 3. Arguments and errors as `custom.build`."""
    check_description(models, custom)
    _check_preprocessing(custom.preprocessing)
    with build_folder(models, custom.name) as folder, contextlib.ExitStack() as stack:
        on_step("checking the file")
        with tempfile.TemporaryDirectory(dir=folder) as private:
            checked = check_keras_file(custom.file, Path(private))
            on_step("starting Keras")
            keras = stack.enter_context(keras_session())
            on_step("reading weights")
            network = load_checked(keras, checked)
        if len(network.outputs) != 1:
            raise UnsuitableModel(f"The model has {len(network.outputs)} outputs. Only nets with one are supported.")
        draft = _begin(
            custom,
            choose_tile(input_sides(network), custom.size),
            preprocessing=custom.preprocessing or "none",
            weights_sha256=checked.sha256,
            recipe=KERAS_RECIPE,
            reference=f"keras {keras.__version__}",
        )

        def run(arrays: Arrays) -> Arrays:
            return predictions(keras, network, draft, arrays, "none")

        draft, returned = _describe(draft, run, custom.returns, last_activation(network), on_step)
        on_step("converting")
        return verify_and_install(
            to_graph(single_output(keras, network), draft, returned),
            folder,
            models,
            draft,
            reference=lambda arrays: [to_levels(each, returned) for each in run(arrays)],
            tolerance=TOLERANCE,
            f16_within=max(f16_within, TOLERANCE),
            on_step=on_step,
        )


def build_onnx(
    models: Path, custom: CustomModel, *, f16_within: float, on_step: Callable[[str], None] = lambda step: None
) -> Artefact:
    """Build a net that was saved as ONNX. Arguments and errors as `onnx_models.builder.build`."""
    check_description(models, custom)
    try:
        runtime = import_onnxruntime()
    except ImportError as error:
        raise missing(error) from error
    with build_folder(models, custom.name) as folder:
        on_step("checking the file")
        checked = check_onnx_file(custom.file)
        network = checked.model
        preprocessing = custom.preprocessing or checked.preprocessing or "none"
        _check_preprocessing(preprocessing)
        taken = onnx_builder.find_input(network, preprocessing, custom.channels or checked.channels)
        draft = _begin(
            custom,
            choose_tile(taken.sides, custom.size),
            preprocessing=preprocessing,
            weights_sha256=checked.sha256,
            recipe=ONNX_RECIPE,
            reference=f"onnxruntime {runtime.__version__}",
        )
        onnx_builder.fix_input(network, draft.tile, taken)
        check_shapes(network)
        original = onnx_builder.Reference(network, draft, taken)
        is_first = False

        def run(arrays: Arrays) -> Arrays:
            nonlocal is_first
            found = [original.output(array) for array in arrays]
            is_first = _is_channels_first(found[0].shape)
            images = [each[0].transpose(1, 2, 0) if is_first else each[0] for each in found]
            return [each[..., ::-1] for each in images] if taken.is_bgr else images

        draft, returned = _describe(draft, run, custom.returns, onnx_builder.last_activation(network), on_step)

        def reference(arrays: Arrays) -> Arrays:
            return [to_levels(each, returned) for each in run(arrays)]

        complete, operations, (name,) = onnx_builder.begin_complete(network, draft, taken)
        if is_first:
            name = operations.add("Transpose", name, perm=[0, 2, 3, 1])
        pixels = onnx_builder.Pixels(operations, name)
        levels = to_levels(pixels[..., ::-1] if taken.is_bgr else pixels, returned)
        height, width = (side * draft.scale for side in draft.tile)
        on_step("converting")
        return onnx_builder.install_complete(
            onnx_builder.end_complete(complete, levels.name, (1, height, width, 3)),
            folder,
            models,
            draft,
            reference=reference,
            tolerance=TOLERANCE,
            f16_within=max(f16_within, TOLERANCE),
            on_step=on_step,
            backend=custom.backend,
        )


def _check_preprocessing(preprocessing: str | None) -> None:
    if preprocessing == "caffe":
        raise ConfigError(
            "The preprocessing caffe is for classifiers: it has no range that a returned image could have."
        )


def _begin(custom: CustomModel, tile: tuple[int, int], **facts: Any) -> Artefact:
    return replace(begin_custom(custom, size=(0, 0), labels=(), **facts), tile=tile)


def _describe(
    draft: Artefact,
    run: Callable[[Arrays], Arrays],
    returns: str | None,
    activation: str | None,
    on_step: Callable[[str], None],
) -> tuple[Artefact, str]:
    """Find out what a net returns, and how far it looks.

    :param run: returns what the network does for parts of images, (height, width, channels).
    :param returns, activation: see `choose_range`.
    :return: the artefact with scale and margin, and the range of RANGES.
    :raises UnsuitableModel: it fails, or returns no images.
    """
    height, width = draft.tile
    on_step(f"running the network on parts of {height} x {width}")
    try:
        results = run(decode_for(draft, self_test_images()))
    except Exception as error:  # a custom network can make its library raise anything
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsuitableModel(f"The model fails on images of {height} x {width}: {first_line[:300]}") from error
    scale = find_scale(results[0].shape, draft.tile)
    returned = choose_range(results, returns, last_activation=activation, preprocessing=draft.preprocessing)
    size = "the same size" if scale == 1 else f"{scale} times the size"
    on_step(f"it returns images of {size}, with values from {RANGES[returned]}")
    margin, is_enough = find_margin(lambda part: to_levels(run([part])[0], returned), draft.tile, scale)
    on_step(
        f"its results depend on at most {margin} pixels around, so parts overlap by more than that"
        if is_enough
        else "its results depend on all of a part, so parts of large images may differ; they are blended"
    )
    return replace(draft, scale=scale, margin=margin), returned


def _is_channels_first(shape: Sequence[int]) -> bool:
    return len(shape) == 4 and shape[1] == 3 and shape[3] != 3

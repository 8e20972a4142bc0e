"""The sixteen Keras models of the original service, with seeded weights, compiled once and kept for later measurements.

Speed and memory do not depend on what the weights are, and no measurement may need a download of gigabytes. Run as
`python -m scripts.benchmarks.keras_models FOLDER MODEL` it compiles one: in a separate process, so that the memory
that tensorflow takes for it is released.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from provider_image.compiler.keras_weights import WeightsSources, find_weights
from provider_image.errors import BrokenArtefact, NotInstalled
from provider_image.models.artefact import Artefact, find_artefact
from provider_image.models.catalogue import CATALOGUE, ModelRow

#: Those that the original service had.
ORIGINAL_MODELS = (
    "densenet121", "densenet169", "densenet201", "resnet50", "resnet101", "resnet152", "resnet50v2", "resnet101v2",
    "resnet152v2", "vgg16", "vgg19", "nasnet_large", "nasnet_mobile", "xception", "inception_v3",
    "inception_resnet_v2",
)  # fmt: skip
#: A small, a medium and a deep one, for a quick run.
QUICK_MODELS = ("nasnet_mobile", "resnet50", "densenet121")


@dataclass(frozen=True, kw_only=True)
class CompiledModel:
    """A model for both sides."""

    #: Its row in the catalogue.
    row: ModelRow
    #: The artefact that mlg runs.
    artefact: Artefact
    #: The weights that Keras loads.
    weights: Path


def cache_folder() -> Path:
    """Return the folder for compiled models and their weights; 6 GB once all sixteen are there."""
    return Path(tempfile.gettempdir()) / "mlg-bench-keras"


def compiled_model(name: str) -> CompiledModel:
    """Return a model that is ready to be measured, compiling it first if necessary: some ten seconds to two minutes."""
    folder = cache_folder()
    weights = _weights(folder, name)
    if not weights.exists() or not _is_installed(folder / "models", name):
        subprocess.run([sys.executable, "-m", __name__, str(folder), name], check=True)
    return CompiledModel(row=CATALOGUE[name], artefact=find_artefact(folder / "models", name), weights=weights)


def _weights(folder: Path, name: str) -> Path:
    # Not NAME.weights.h5: Keras takes that ending for its newer layout, which the published files do not have.
    return folder / "weights" / f"{name}.h5"


def _is_installed(models: Path, name: str) -> bool:
    try:
        return find_artefact(models, name).folder.is_dir()
    except (NotInstalled, BrokenArtefact):
        return False


def _compile(folder: Path, name: str) -> None:
    from provider_image.compiler.keras_applications import build
    from tests.seeded_weights import seeded_network, write_weights

    weights = _weights(folder, name)
    weights.parent.mkdir(parents=True, exist_ok=True)
    if not weights.exists():
        partial = weights.with_suffix(".tmp")
        write_weights(seeded_network(CATALOGUE[name]), partial)
        partial.replace(weights)
    build(
        folder / "models", CATALOGUE[name], find_weights(CATALOGUE[name], WeightsSources(given=weights, cache=folder))
    )


if __name__ == "__main__":
    _compile(Path(sys.argv[1]), sys.argv[2])

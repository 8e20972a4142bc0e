"""The services and the backend of `tests/extension`, and models for them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from provider_image.backends import REGISTRY as BACKENDS
from provider_image.compiler.installing import begin_artefact, build_folder, install
from provider_image.models.artefact import Artefact, Sample
from provider_image.models.catalogue import ModelFacts
from provider_image.service import Service, primary_input
from provider_image.services import REGISTRY as SERVICES

#: A folder for PYTHONPATH: with it, a process has the extension.
FOLDER = Path(__file__).parent / "extension"
#: Service -> its model.
TEST_SERVICES = {"blend": "blend_even", "posterise": "sepia", "iris": "iris_means"}
COLUMNS = ("sepal_length", "sepal_width", "petal_length", "petal_width")
#: Rows of Fisher's iris data (1936), one of each species.
ROWS = {
    "setosa": (5.1, 3.5, 1.4, 0.2),
    "versicolor": (5.7, 2.8, 4.5, 1.3),
    "virginica": (6.3, 3.3, 6.0, 2.5),
}
#: A text that every service of texts accepts.
TEXT = "A wonderful film, not good for everybody: awful plot. 很喜欢".encode()
#: Means of the species in the same data.
_MEANS = np.array([[5.006, 3.428, 1.462, 0.246], [5.936, 2.77, 4.26, 1.326], [6.588, 2.974, 5.552, 2.026]])
#: Sepia as in the CSS filter of that name.
_SEPIA = np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]])


def refresh_extensions() -> None:
    """Let the registries look for entry points again."""
    SERVICES.refresh()
    BACKENDS.refresh()


def install_extension_models(models: Path) -> Path:
    """Install the models; return the folder."""
    row = json_row(ROWS["setosa"])
    output = {"species": "setosa", "probability": 1.0}
    install_affine(
        models,
        ModelFacts(
            name="iris_means",
            title="Iris",
            service="iris",
            height=0,
            width=0,
            columns=COLUMNS,
            preprocessing="none",
            source="own",
        ),
        # The nearest mean: the score is linear because the square of the row is the same for all species.
        matrix=2 * _MEANS.T,
        bias=-(_MEANS**2).sum(axis=1),
        labels=tuple((name, name) for name in ROWS),
        write_samples=lambda folder: [_sample(folder, "sample.json", row, output)],
    )
    install_affine(
        models,
        ModelFacts(
            name="sepia", title="Sepia", service="posterise", height=64, width=96, preprocessing="none", source="own"
        ),
        matrix=_SEPIA.T,
        bias=np.zeros(3),
    )
    install_affine(
        models,
        ModelFacts(
            name="blend_even", title="Blend", service="blend", height=64, width=96, preprocessing="none", source="own"
        ),
        matrix=np.eye(3),
        bias=np.zeros(3),
    )
    return models


def json_row(values: tuple[float, ...]) -> bytes:
    """A row as a client may send it."""
    fields = ", ".join(f'"{column}": {value}' for column, value in zip(COLUMNS, values, strict=True))
    return f"{{{fields}}}".encode()


def sample_inputs(service: Service, photos: Mapping[str, bytes]) -> dict[str, bytes]:
    """Inputs that every service of this kind accepts, without the optional ones. No two images are the same."""
    data = {"image": photos["coffee"], "row": json_row(ROWS["versicolor"]), "file": b"any bytes", "text": TEXT}
    others = {**data, "image": photos["rocket"]}
    return {
        name: (data if name == primary_input(service) else others)[one.kind]
        for name, one in service.inputs.items()
        if not one.is_optional
    }


def install_affine(
    models: Path,
    row: ModelFacts,
    *,
    matrix: Any,
    bias: Any,
    labels: tuple[tuple[str, str], ...] = (),
    write_samples: Callable[[Path], list[Sample]] = lambda folder: [],
) -> Artefact:
    with build_folder(models, row.name) as folder:
        np.savez(folder / "affine.npz", matrix=matrix.astype(np.float32), bias=bias.astype(np.float32))
        artefact = begin_artefact(
            row,
            backend="affine",
            labels=labels,
            weights_sha256=hashlib.sha256(matrix.tobytes() + bias.tobytes()).hexdigest(),
            recipe="affine-1",
            reference="Fisher 1936",
            samples=tuple(write_samples(folder)),
        )
        return install(artefact, folder, models, ["affine.npz"])


def _sample(folder: Path, file: str, data: bytes, output: Any) -> Sample:
    (folder / file).write_bytes(data)
    return Sample(file=file, sha256=hashlib.sha256(data).hexdigest(), output=output)

"""Small custom models as users save them, and manipulated files of them, for tests."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from provider_image.compiler.keras_graph import import_keras
from tests import needs_keras  # noqa: F401 - importing it is its use

SIDE = 32


def labels_file(folder: Path, *labels: str) -> Path:
    """Write a labels file."""
    path = folder / "labels.txt"
    path.write_text("".join(f"{label}\n" for label in labels))
    return path


def save(network: Any, path: Path) -> Path:
    """Save a network as a user does."""
    with warnings.catch_warnings():
        # TensorFlow's tensors lack numpy 2's `copy` argument, which is only needed for saving.
        warnings.simplefilter("ignore", DeprecationWarning)
        network.save(path)
    return path


def classifier(
    activation: str | None = "softmax", classes: int = 3, *, side: int | None = SIDE, dtype: str = "float32"
) -> Any:
    """Make a small seeded Sequential: augmentation, scaling, convolution, pooling, and a layer with this activation."""
    keras = import_keras()
    keras.utils.set_random_seed(3)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((side, side, 3)),
            layers.RandomFlip("horizontal", seed=1),
            layers.Rescaling(1 / 127.5, offset=-1),
            layers.Conv2D(8, 3, strides=2, activation="relu", dtype=dtype),
            layers.BatchNormalization(dtype=dtype),
            layers.GlobalAveragePooling2D(dtype=dtype),
            layers.Dropout(0.3),
            layers.Dense(
                classes, activation=activation, kernel_initializer=keras.initializers.RandomNormal(stddev=3.0)
            ),
        ]
    )


def edit_keras_file(source: Path, target: Path, edit: Callable[[dict[str, Any]], Any], **members: bytes) -> Path:
    """Copy a .keras file with an edited config.

    :param edit: changes the config in place, or returns a new one.
    :param members: replaces or adds members of the archive; `__` in a name stands for a dot.
    """
    with zipfile.ZipFile(source) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(contents["config.json"])
    contents["config.json"] = json.dumps(edit(config) or config).encode()
    contents |= {name.replace("__", "."): data for name, data in members.items()}
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return target


def edit_weights(source: Path, target: Path, edit: Callable[[Any], Any]) -> Path:
    """Copy a .keras file with edited weights. :param edit: gets the open HDF5 file."""
    import h5py

    with zipfile.ZipFile(source) as archive:
        file = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(file, "r+") as weights:
        edit(weights)
    return edit_keras_file(source, target, lambda config: None, model__weights__h5=file.getvalue())

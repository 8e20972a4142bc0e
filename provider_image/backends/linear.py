"""The backend `linear`: one matrix product in f64, computed by numpy, for models of table rows and of texts.

Loaded by name through `provider_image.backends`. An artefact has the matrix in `weights.npy`, of shape (features,
outputs), and one number for each output in `bias.npy`; `features.json` says what the features are
(`provider_image/features/`). There is no code in these files. A model with labels returns their probabilities, one
without returns a number. Weaknesses: CPU only, and nothing but linear models.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.errors import DAMAGED_FILE_ERRORS, BrokenArtefact, ConfigError, InferenceFailed
from provider_image.features import FEATURES_FILE, load_features
from provider_image.models.artefact import Artefact, check_files
from provider_image.precision import PRECISIONS
from provider_image.schemas import MAX_ITEMS

if TYPE_CHECKING:
    import numpy as np

    from provider_image.backends import Arrays, Device

    Array = np.ndarray[Any, Any]

WEIGHTS_FILE, BIAS_FILE = "weights.npy", "bias.npy"
#: The files of an artefact.
LINEAR_FILES = (FEATURES_FILE, WEIGHTS_FILE, BIAS_FILE)
#: Most numbers in the matrix: 160 MB.
MAX_WEIGHTS = 20_000_000
#: Larger weights could give sums that are not finite.
_MAX_WEIGHT = 1e30


class LinearNet:
    """See `provider_image.backends.Net`: takes the features of an item, f64 of shape (features,)."""

    batch_items = MAX_ITEMS

    def __init__(self, artefact: Artefact, weights: Array, bias: Array) -> None:
        self.artefact = artefact
        #: f64, shape (features, outputs) and (outputs,).
        self.weights, self.bias = weights, bias

    def infer(self, batch: Arrays) -> list[Array]:
        """Multiply the features of each item. :raises InferenceFailed: an array does not fit the model."""
        import numpy as np

        try:
            scores = np.stack(batch).astype(np.float64) @ self.weights + self.bias
        except ValueError as error:
            raise InferenceFailed(f"The input does not fit the model {self.artefact.name}: {error}") from error
        if scores.shape != (len(batch), len(self.bias)):
            raise InferenceFailed(f"The input does not fit the model {self.artefact.name}: it is no list of features.")
        return list(softmax(scores) if self.artefact.labels else scores)


def softmax(scores: Array) -> Array:
    """Turn the scores of each row into probabilities."""
    import numpy as np

    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def load_net(artefact: Artefact, device: Device) -> LinearNet:
    """Check and read an artefact's files.

    :raises BrokenArtefact: a file has changed, or the matrix does not fit the features or the labels.
    :raises ConfigError: the device is not the CPU, or there is no such precision. All are computed in f64.
    """
    import numpy as np

    if device.name != "cpu":
        raise ConfigError(f"The backend linear runs on the device cpu only, not on {device.name!r}.")
    if device.precision not in PRECISIONS:
        raise ConfigError(f"There is no precision {device.precision!r}. There are: {', '.join(PRECISIONS)}.")
    check_files(artefact)
    features, outputs = load_features(artefact).count, len(artefact.labels) or 1
    weights = _read(artefact, WEIGHTS_FILE, (features, outputs))
    bias = _read(artefact, BIAS_FILE, (outputs,))
    if not bool(np.all(np.abs(weights) <= _MAX_WEIGHT)) or not bool(np.all(np.abs(bias) <= _MAX_WEIGHT)):
        raise BrokenArtefact(f"The model {artefact.name} cannot be used: it has weights that are not finite.")
    return LinearNet(artefact, weights, bias)


def write_net(folder: Path, weights: Array, bias: Array) -> None:
    """Write the matrix and the numbers, of the shapes above, into the folder of an artefact that is being built."""
    import numpy as np

    np.save(folder / WEIGHTS_FILE, np.ascontiguousarray(weights, np.float64), allow_pickle=False)
    np.save(folder / BIAS_FILE, np.ascontiguousarray(bias, np.float64), allow_pickle=False)


def _read(artefact: Artefact, file: str, shape: tuple[int, ...]) -> Array:
    import numpy as np

    path, count = artefact.folder / file, math.prod(shape)
    try:
        if count > MAX_WEIGHTS:
            raise ValueError(f"it has more than {MAX_WEIGHTS} numbers")
        # There is one header that it can have; numpy would parse any other as an expression of Python.
        header = io.BytesIO()
        facts = {"descr": "<f8", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, facts)
        with path.open("rb") as data:
            if data.read(len(header.getvalue())) != header.getvalue() or path.stat().st_size != data.tell() + 8 * count:
                raise ValueError(f"it is not {' x '.join(map(str, shape))} numbers of 64 bits")
            return np.fromfile(data, "<f8", count).reshape(shape)
    except DAMAGED_FILE_ERRORS as error:
        raise BrokenArtefact(
            f"{path} cannot be read: {error}. Delete {artefact.folder}, then train the model again."
        ) from error

"""The backend `affine`: a matrix product and a sum, computed by numpy. An artefact has them in `affine.npz`."""

from __future__ import annotations

import zipfile
from typing import Any

from provider_image.backends import Arrays, Device
from provider_image.errors import BrokenArtefact, ConfigError, InferenceFailed
from provider_image.models.artefact import Artefact, check_files

FILE = "affine.npz"


class AffineNet:
    """See `provider_image.backends.Net`: multiplies the last axis."""

    batch_items = 4

    def __init__(self, artefact: Artefact, matrix: Any, bias: Any) -> None:
        self.artefact = artefact
        self._matrix, self._bias = matrix, bias

    def infer(self, batch: Arrays) -> Arrays:
        import numpy as np

        try:
            return list(np.stack(batch).astype(np.float32) @ self._matrix + self._bias)
        except ValueError as error:
            raise InferenceFailed(f"The input does not fit the model {self.artefact.name}: {error}") from error


def load_net(artefact: Artefact, device: Device) -> AffineNet:
    import numpy as np

    if (device.name, device.precision) != ("cpu", "f32"):
        raise ConfigError(f"The backend affine computes on the cpu in f32, not on {device.name} in {device.precision}.")
    check_files(artefact)
    try:
        with np.load(artefact.folder / FILE, allow_pickle=False) as arrays:
            return AffineNet(artefact, arrays["matrix"], arrays["bias"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BrokenArtefact(f"The file {FILE} of {artefact.name} cannot be loaded: {error}") from error

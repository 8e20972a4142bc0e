"""The photos with which a copy in another precision is calibrated and judged.

They are the operator's, are read once by the builder, and are not stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.errors import BadInput, ConfigError
from provider_image.images.decoding import decode
from provider_image.models.artefact import Artefact
from provider_image.schemas import MAX_BYTES

if TYPE_CHECKING:
    import numpy as np

#: Most files that are read; more would take hours and change no figure.
MAX_PHOTOS = 10_000
#: Most photos that calibrate, and their share of all if there are fewer. The others judge.
MAX_CALIBRATION = 300
_CALIBRATION_SHARE = 0.25


def list_photos(folder: Path) -> list[Path]:
    """List the different files below a folder, at most MAX_PHOTOS, ordered by their contents.

    The order has nothing to do with names and folders, so that each part of it is like the whole. It is the same
    wherever the files lie.

    :raises ConfigError: there is no such folder, or a file cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder with photos.")
    found: dict[str, Path] = {}
    try:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and 0 < path.stat().st_size <= MAX_BYTES and len(found) < MAX_PHOTOS:
                with path.open("rb") as file:
                    found.setdefault(hashlib.file_digest(file, "sha256").hexdigest(), path)
    except OSError as error:
        raise ConfigError(f"The photos in {folder} cannot be read: {error}") from error
    return [path for _, path in sorted(found.items())]


def split(photos: Sequence[Path]) -> tuple[Sequence[Path], Sequence[Path]]:
    """Return the photos that calibrate, and those that judge."""
    count = min(MAX_CALIBRATION, int(len(photos) * _CALIBRATION_SHARE))
    return photos[:count], photos[count:]


def decode_photos(photos: Sequence[Path], artefact: Artefact) -> Iterator[np.ndarray[Any, Any]]:
    """Decode photos to what the net takes, one at a time; those that are no usable images are left out."""
    for path in photos:
        try:
            yield decode(path.read_bytes(), *artefact.net_size, artefact.crop)
        except BadInput:
            continue

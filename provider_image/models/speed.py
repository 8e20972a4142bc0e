"""The measured speed of each installed model on this machine: one small file per model, beside the artefacts.

Written after a check, read where models are listed. Not part of the artefact, because an artefact is the same on every
machine.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from provider_image.models.artefact import plain_fields

logger = logging.getLogger(__name__)

#: The folder in a models folder; hidden, so that it is not taken for a model.
_FOLDER = ".speeds"
_MAX_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The measurement of a check."""

    #: Digest of the artefact that was measured.
    digest: str
    #: Images per second with decoding.
    images_per_second: float
    #: Images processed at the same time.
    threads: int
    #: f32, bf16 or auto.
    precision: str
    #: Time in UTC, ISO 8601.
    measured_at: str


def write_speed(models: Path, name: str, speed: Speed) -> bool:
    """Store a model's speed, atomically.

    :return: False if it could not be written: a models folder may be read-only, which is not an error.
    """
    folder = models / _FOLDER
    try:
        folder.mkdir(exist_ok=True)
        temporary = folder / f".{name}.{secrets.token_hex(8)}.tmp"
        try:
            temporary.write_text(json.dumps(asdict(speed)))
            temporary.replace(folder / f"{name}.json")
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        logger.info("speed not stored: %s", error, extra={"model": name})
        return False
    return True


def read_speed(models: Path, name: str, digest: str) -> Speed | None:
    """Return the speed that was measured for the artefact with this digest, or None; takes some 20 microseconds."""
    try:
        with (models / _FOLDER / f"{name}.json").open("rb") as file:
            facts = json.loads(file.read(_MAX_BYTES))
        speed = Speed(**plain_fields(Speed, facts))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    is_valid = math.isfinite(speed.images_per_second) and speed.images_per_second > 0
    return speed if is_valid and speed.digest == digest else None

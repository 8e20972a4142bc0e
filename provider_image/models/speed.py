"""How quickly each installed model answers on this machine: one small file a model, beside the artefacts.

Written after a check, read by whatever lists models. Outside the artefact, because an artefact is the same on every
machine and may lie in a folder that cannot be written.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

#: The folder in a models folder; hidden, so that nobody takes it for a model.
_FOLDER = ".speeds"
_MAX_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a check measured."""

    #: The artefact that was measured.
    digest: str
    #: Pictures a second, decoding included.
    images_per_second: float
    #: Pictures side by side.
    threads: int
    #: f32, bf16 or auto.
    precision: str
    #: When, aware UTC in ISO 8601.
    measured_at: str


def write_speed(models: Path, name: str, speed: Speed) -> bool:
    """Remember a model's speed; a reader never sees half of it.

    :return: False if it could not be written: a models folder may be read-only, and what was measured stands anyhow.
    """
    folder = models / _FOLDER
    try:
        folder.mkdir(exist_ok=True)
        handle, path = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(asdict(speed), file)
            Path(path).chmod(0o644)  # mkstemp made it private, and the server may be another user
            Path(path).replace(folder / f"{name}.json")
        except BaseException:
            Path(path).unlink(missing_ok=True)
            raise
    except OSError as error:
        logger.info("speed not remembered: %s", error, extra={"model": name})
        return False
    return True


def read_speed(models: Path, name: str, digest: str) -> Speed | None:
    """Return the speed that was measured of this very artefact, None if there is none; some 20 microseconds."""
    try:
        with (models / _FOLDER / f"{name}.json").open("rb") as file:
            facts = json.loads(file.read(_MAX_BYTES))
        speed = Speed(
            digest=str(facts["digest"]),
            images_per_second=float(facts["images_per_second"]),
            threads=int(facts["threads"]),
            precision=str(facts["precision"]),
            measured_at=str(facts["measured_at"]),
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    is_sound = math.isfinite(speed.images_per_second) and speed.images_per_second > 0
    return speed if is_sound and speed.digest == digest else None

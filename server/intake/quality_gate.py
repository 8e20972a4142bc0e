"""The limits of quality that an upload may set for its images: `?min_sharpness=100` refuses a blurred one.

Used by `server/intake/accept.py`. An image is measured in a few processes with limits on memory and time, as thumbnails
are made, because it is decoded for that; uploads without limits never wait for it. What is measured is described in
`provider_image/images/quality.py`.
"""

from __future__ import annotations

import json
import math
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from provider_image.decoders import DecoderPool
from provider_image.errors import (
    BrokenImage,
    ChunkTimeout,
    DecodingUnavailable,
    InvalidParams,
    MlgError,
    WorkerDied,
)
from provider_image.images.headers import MAX_SIDE
from provider_image.images.quality import MEASURES
from server.endpoint import Field
from server.errors import NotMeasured, PoorQuality
from store.errors import ImageGone
from store.images import StagedImage

#: Processes that measure.
_WORKERS = 2
#: Limit for an image, and how long one waits for a process.
_IMAGE_SECONDS, _WAIT_SECONDS = 10.0, 20.0
#: Seconds that measuring all images of a batch may take; those that are missing then are refused.
_BATCH_SECONDS = 240.0


@dataclass(frozen=True, kw_only=True)
class _Limit:
    """A limit that an upload may set."""

    #: What is measured, and whether the limit is the least or the most of it.
    measure: str
    is_least: bool
    #: The range of the limit.
    lowest: float
    highest: float
    #: One sentence of help.
    help: str


def _limit(name: str, help: str) -> _Limit:
    measure = name.partition("_")[2]
    lowest, highest, _ = MEASURES.get(measure, (1, MAX_SIDE, ""))
    return _Limit(measure=measure, is_least=name.startswith("min_"), lowest=max(0, lowest), highest=highest, help=help)


#: The limits by the names of their parameters.
LIMITS: Mapping[str, _Limit] = {
    name: _limit(name, help)
    for name, help in {
        "min_sharpness": "Refuse an image that is less sharp; blurred photos have less than about 100.",
        "min_brightness": "Refuse an image that is darker; 0 is black, 1 is white.",
        "max_brightness": "Refuse an image that is brighter; 0 is black, 1 is white.",
        "min_contrast": "Refuse an image with less contrast; 1 is half black, half white.",
        "max_noise": "Refuse an image with more noise, in grey levels.",
        "max_tilt": "Refuse an image whose straight lines are turned by more degrees, either way.",
        "max_uniformity": "Refuse an image of which a larger share of pixels has nearly one colour.",
        "min_width": "Refuse an image with fewer pixels across.",
        "min_height": "Refuse an image with fewer pixels down.",
    }.items()
}
#: The same for the API's description.
QUALITY_LIMITS = tuple(
    Field(
        name=name,
        help=limit.help,
        schema={"type": "number", "minimum": limit.lowest, "maximum": limit.highest},
    )
    for name, limit in LIMITS.items()
)


def take_limits(fields: dict[str, str]) -> dict[str, float]:
    """Take the limits out of what comes beside an image. An empty text, as a form has it, sets none.

    :raises InvalidParams: a limit is no number in its range.
    """
    found = {}
    for name, limit in LIMITS.items():
        text = fields.pop(name, "").strip()
        if not text:
            continue
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not limit.lowest <= value <= limit.highest:
            raise InvalidParams(f"{name} takes a number from {limit.lowest:g} to {limit.highest:g}.")
        found[name] = value
    return found


def check_measures(measures: Mapping[str, Any], limits: Mapping[str, float]) -> None:
    """Compare what was measured with limits. A tilt counts either way, and none is within every limit.

    :raises PoorQuality: names every limit that is not met, with what was measured.
    """
    problems = []
    for name, allowed in limits.items():
        limit = LIMITS[name]
        value = abs(measures[limit.measure] or 0)
        if value < allowed if limit.is_least else value > allowed:
            word = "least" if limit.is_least else "most"
            problems.append(f"its {limit.measure} is {value:g}, and {name} requires at {word} {allowed:g}")
    if problems:
        raise PoorQuality(f"The image was refused: {'; '.join(problems)}. Send a better one.")


class QualityGate:
    """Measures staged images of one server process. Processes are started when they are needed.

    :param batch_seconds: how long measuring all images of a batch may take.
    """

    def __init__(self, batch_seconds: float = _BATCH_SECONDS) -> None:
        self._batch_seconds = batch_seconds
        self._pool = DecoderPool(_WORKERS, limit_seconds=_IMAGE_SECONDS)
        weakref.finalize(self, self._pool.close)

    def check(self, staged: StagedImage, limits: Mapping[str, float], *, wait_seconds: float = _WAIT_SECONDS) -> None:
        """Measure an image and compare it with limits.

        :param wait_seconds: how long it waits for a process.
        :raises PoorQuality: it does not meet them.
        :raises BadInput: it cannot be decoded.
        :raises DecodingUnavailable: no process is free or can be started; the image is not at fault.
        """
        options = {"with_tilt": any(LIMITS[name].measure == "tilt" for name in limits)}
        job = {"do": "measure", "options": options, "inputs": {"image": str(staged.path)}}
        result = self._pool.run(job, wait_seconds=wait_seconds)
        if isinstance(result, FileNotFoundError):
            raise ImageGone() from result
        if isinstance(result, WorkerDied | ChunkTimeout):
            raise BrokenImage(result.reason) from result
        if isinstance(result, MlgError):
            raise result
        check_measures(_read(result["image"]), limits)

    def batch_check(self, limits: Mapping[str, float]) -> Callable[[StagedImage], None]:
        """Return what checks each image of a batch that begins now; it raises as `check`.

        An image whose turn does not come in time is refused by NotMeasured.
        """
        give_up_at = time.monotonic() + self._batch_seconds

        def check(staged: StagedImage) -> None:
            seconds = give_up_at - time.monotonic()
            try:
                if seconds > 0:
                    return self.check(staged, limits, wait_seconds=seconds)
            except DecodingUnavailable:
                if time.monotonic() < give_up_at:
                    raise
            raise NotMeasured("Measuring the images of the batch took too long. Send the rest as another batch.")

        return check


def _read(data: bytes) -> Mapping[str, Any]:
    """Read what a process measured, which the image may control. :raises NotMeasured: it is something else."""
    try:
        found = json.loads(data)
        numbers = [found[name] for name in ("width", "height", *MEASURES)]
        if all(each is None or (isinstance(each, int | float) and math.isfinite(each)) for each in numbers):
            return dict(found)
    except (ValueError, LookupError, TypeError, RecursionError, OverflowError):
        pass  # as below
    raise NotMeasured()

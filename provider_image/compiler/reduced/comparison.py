"""The comparison of a copy with its model: on how many images their first labels agree, how far they differ, how fast.

Used by the builder, for the images that calibrate and for those that judge.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from provider_image.backends import Net


@dataclass(frozen=True, kw_only=True)
class CopyComparison:
    """What was found for some images."""

    images: int
    same_first_label: int
    #: Largest difference of a probability on any image, and its median over the images.
    largest_difference: float
    median_difference: float
    #: How many times as fast the copy was, by the medians of processor time.
    speedup: float

    def is_within(self, agreement: float, bound: float) -> bool:
        """Tell whether the first labels agree on this share of the images and no probability differs by more."""
        return self.same_first_label >= agreement * self.images > 0 and self.largest_difference <= bound


def compare(model: Net, copy: Net, images: Iterable[np.ndarray[Any, Any]]) -> CopyComparison:
    """Run both on each image in turns, in this thread.

    :param images: decoded, uint8 (height, width, 3).
    """
    same, differences = 0, []
    seconds: tuple[list[float], list[float]] = ([], [])
    for image in images:
        started = time.process_time()
        (expected,) = model.infer([image])
        between = time.process_time()
        (found,) = copy.infer([image])
        seconds[0].append(between - started)
        seconds[1].append(time.process_time() - between)
        difference = float(abs(found - expected).max())
        is_finite = math.isfinite(difference)
        same += is_finite and int(found.argmax()) == int(expected.argmax())
        differences.append(difference if is_finite else 1.0)
    if not differences:
        return CopyComparison(images=0, same_first_label=0, largest_difference=0.0, median_difference=0.0, speedup=1.0)
    slow, quick = map(statistics.median, seconds)
    return CopyComparison(
        images=len(differences),
        same_first_label=same,
        largest_difference=max(differences),
        median_difference=statistics.median(differences),
        speedup=slow / quick if quick else 1.0,
    )

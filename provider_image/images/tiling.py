"""Running a net on an image of any size, in parts that overlap, so that no seam shows.

Called by services whose net takes a square and returns one, such as `image_to_image`. Parts begin at multiples of
ALIGNMENT pixels, so that nets which reduce by steps see the same grid in all of them. Of a part, what is closer to a
cut than the margin is not used; neighbours are blended over the next pixels. Where the net's results depend on no pixel
further away than the margin, all of this gives what the net gives for the whole image. At the top and at the left,
parts begin where the image does, so the net treats that border as it always does; below and at the right likewise, if
the image ends at a multiple of ALIGNMENT. Only the results of one row, or of one column, are in memory as floats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from provider_image.errors import InferenceFailed

if TYPE_CHECKING:
    import numpy as np

    from provider_image.models.artefact import Artefact

    Array = np.ndarray[Any, Any]

#: Parts begin at multiples of this many pixels.
ALIGNMENT = 32
#: Smallest and largest side of a part, and the largest factor by which a net enlarges.
MIN_TILE, MAX_TILE, MAX_SCALE = 64, 2048, 8
#: Neighbours are blended over at least this many pixels.
_MIN_RAMP = 8


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How an image is cut into parts."""

    #: Height and width of a part in pixels, as the net takes it.
    tile: tuple[int, int]
    #: Pixels at a cut that are not used, because the net would need to see beyond it.
    margin: int
    #: The net returns so many pixels for each, across and down.
    scale: int

    def __post_init__(self) -> None:
        """Check the numbers. :raises ValueError: they do not fit each other."""
        fits = all(MIN_TILE <= side <= MAX_TILE and self.step(side) > 0 for side in self.tile)
        if not fits or self.margin < 0 or not 1 <= self.scale <= MAX_SCALE:
            raise ValueError(f"an image cannot be cut into parts of {self.tile} with a margin of {self.margin}")

    @classmethod
    def of(cls, artefact: Artefact) -> Tiling:
        """Return the tiling of a model. :raises ValueError: it has none, or an impossible one."""
        return cls(tile=artefact.tile, margin=artefact.margin, scale=artefact.scale)

    @property
    def ramp(self) -> int:
        """Return over how many pixels neighbours are blended."""
        return max(_MIN_RAMP, self.margin)

    def step(self, side: int) -> int:
        """Return the distance of two parts with this side."""
        return (side - 2 * self.margin - self.ramp) // ALIGNMENT * ALIGNMENT


def margins(tile: tuple[int, int]) -> list[int]:
    """List the margins that parts of this size can have, smallest first."""
    return [margin for margin in (8, 16, 32, 64) if 3 * margin <= min(tile) - ALIGNMENT]


def run_tiled(
    infer: Callable[[Array], Array], pixels: Array, tiling: Tiling, on_part: Callable[[float], object] = lambda part: 0
) -> Array:
    """Run a net on all parts of an image, and put its results together.

    :param infer: takes a part, uint8 RGB (height, width, 3), and returns values from 0 to 255, (scale * height,
        scale * width, 3).
    :param pixels: uint8 RGB, of any size. What is smaller than a part is extended by reflection.
    :param on_part: called with the share that is done.
    :return: uint8 RGB, `scale` times as large.
    :raises InferenceFailed: the net returned something else, or numbers that are not finite.
    """
    import numpy as np

    height, width, _ = pixels.shape
    scale = tiling.scale
    whole = _extended(pixels, tiling.tile)
    # Along the longer side one band of parts follows another, so that a band is as short as possible.
    along = 0 if whole.shape[0] >= whole.shape[1] else 1
    bands, others = (_spans(whole.shape[axis], tiling.tile[axis], tiling) for axis in (along, 1 - along))
    result = np.empty((whole.shape[0] * scale, whole.shape[1] * scale, 3), np.uint8)
    turned = result.swapaxes(0, along)
    band = np.zeros((tiling.tile[along] * scale, turned.shape[1], 3), np.float32)
    for number, (start, weights) in enumerate(bands):
        for position, (other_start, other_weights) in enumerate(others):
            top, left = (start, other_start) if along == 0 else (other_start, start)
            part = np.ascontiguousarray(whole[top : top + tiling.tile[0], left : left + tiling.tile[1]])
            values = _checked(infer(part), part, scale).swapaxes(0, along)
            first = other_start * scale
            target = band[:, first : first + values.shape[1]]
            target += values * weights[:, None, None] * other_weights[None, :, None]
            on_part((number + (position + 1) / len(others)) / len(bands))
        # What no later band adds to is complete.
        end = bands[number + 1][0] if number + 1 < len(bands) else start + tiling.tile[along]
        count = (end - start) * scale
        turned[start * scale : end * scale] = to_pixels(band[:count])
        band[: len(band) - count] = band[count:]
        band[len(band) - count :] = 0
    return result[: height * scale, : width * scale]


def to_pixels(values: Array) -> Array:
    """Round values from 0 to 255 to uint8."""
    import numpy as np

    return np.asarray(np.rint(np.clip(values, 0, 255)), np.uint8)


def _extended(pixels: Array, tile: tuple[int, int]) -> Array:
    """Extend an image below and at the right, so that parts at multiples of ALIGNMENT reach its end."""
    import numpy as np

    more = [
        side - length if length <= side else -(length - side) % ALIGNMENT
        for length, side in zip(pixels.shape[:2], tile, strict=True)
    ]
    return pixels if more == [0, 0] else np.pad(pixels, [(0, more[0]), (0, more[1]), (0, 0)], mode="symmetric")


def _spans(length: int, side: int, tiling: Tiling) -> list[tuple[int, Array]]:
    """Divide an axis into parts: where each begins, and the weights of its results. Those of all add up to 1."""
    import numpy as np

    starts = [*range(0, length - side, tiling.step(side)), length - side]
    # The place of each result in its part, from either end.
    places = (np.arange(side * tiling.scale) + 0.5) / tiling.scale
    total = np.zeros(length * tiling.scale)
    found = []
    for start in starts:
        weights = np.ones(len(places))
        if start > 0:
            weights *= np.clip((places - tiling.margin) / tiling.ramp, 0, 1)
        if start + side < length:
            weights *= np.clip((side - places - tiling.margin) / tiling.ramp, 0, 1)
        total[start * tiling.scale : (start + side) * tiling.scale] += weights
        found.append((start, weights))
    return [
        (start, (weights / total[start * tiling.scale : (start + side) * tiling.scale]).astype(np.float32))
        for start, weights in found
    ]


def _checked(values: Array, part: Array, scale: int) -> Array:
    import numpy as np

    expected = (part.shape[0] * scale, part.shape[1] * scale, 3)
    if values.shape != expected or not bool(np.isfinite(values).all()):
        raise InferenceFailed(f"The net returned no image of {expected[1]} x {expected[0]} pixels.")
    return values

"""Style transfer without a network: the image gets the patches of the style. Called by the backend `style`.

It minimises a sliced Wasserstein distance between the patches of both: random filters turn each patch of 9 x 9 pixels
into a number, the numbers of an image and of the style are sorted, and each is drawn to the one of its rank. It does so
from coarse to fine, on luminance. Weaknesses: it transfers texture, not painting: no strokes that follow what is on the
image, and little of styles that consist of colours.

Equal images give equal answers on all x86-64 processors: random numbers are drawn from a fixed seed, and the numbers
of patches are whole ones, so that their sums are exact in f64, in whatever order a processor adds them. Otherwise each
rounding would grow over the steps: images from two kinds of x86-64 processors then differed by 5 to 10 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from provider_image.style.optimising import Adam, Budget, TransferOptions
from provider_image.style.pixels import (
    MIN_SIDE,
    luminance,
    resize,
    to_floats,
    to_pixels,
    with_colours_of,
    with_luminance,
)

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: Side of a patch, and what is added on each side of an image so that every pixel is the centre of one.
_SIDE = 9
_MARGIN = _SIDE // 2
#: Pixels whose patches are in memory at a time.
_BAND_PIXELS = 16 * 1024
#: What values of 0 to 1, and of filters, are multiplied by before they are rounded to whole numbers. The largest sums
#: have some 48 bits.
_VALUE_LEVELS, _FILTER_LEVELS = 16_384, 64
#: The length of a filter, on average.
_FILTER_LENGTH = _FILTER_LEVELS * _SIDE
#: Bits for the place of a pixel in an image.
_PLACE_BITS = 20
#: Filters of a step.
_FILTERS = 12
_SEED = 14
#: Size of each level as a share of the full size, and its share of the steps.
_LEVELS = ((1 / 6, 0.26), (1 / 4, 0.21), (3 / 8, 0.21), (7 / 12, 0.16), (5 / 6, 0.1), (1.0, 0.06))
#: Length of the first step of a level, in values of 0 to 1.
_RATE = 0.04
#: Weight of the image itself at strength 0, where the image hardly changes, and at strength 1.
_CONTENT_WEIGHTS = (1.0, 0.0004)


def transfer(content: Array, style: Array, options: TransferOptions) -> tuple[Array, int]:
    """Give an image the texture of another.

    :param content, style: uint8 RGB, shape (height, width, 3), each side at least MIN_SIDE.
    :return: uint8 RGB of the size of the content, and how many iterations were made.
    """
    import numpy as np

    image, colours = to_floats(content), to_floats(style)
    grey, other = luminance(image), luminance(colours)
    painted = image if options.keeps_colours else with_colours_of(image, colours)
    height, width = grey.shape
    low, high = _CONTENT_WEIGHTS
    weight = low * (high / low) ** options.strength
    random, budget = np.random.default_rng(_SEED), Budget(options=options)
    values: Array | None = None
    target = grey

    def result() -> Array:
        shown = grey if values is None else _enlarge(values, target, grey)
        return to_pixels(with_luminance(painted, shown))

    for share, steps in zip((each for each, _ in _LEVELS), _steps(options.iterations), strict=True):
        # What is small stays large enough for patches.
        size = tuple(max(min(MIN_SIDE, full), round(share * full)) for full in (height, width))
        smaller = target
        target = resize(grey, *size)
        values = target if values is None else _enlarge(values, smaller, target)
        wanted = _Patches(resize(other, *(max(MIN_SIDE, round(share * full)) for full in other.shape)))
        adam = Adam(_RATE, steps)
        for _ in range(steps):
            if not budget.is_left:
                return result(), budget.done
            gradient = wanted.gradient(values, _filters(random)) + weight * (values - target)
            values = values + adam.step(gradient)
            budget.count(result)
    return result(), budget.done


def _steps(iterations: int) -> list[int]:
    """Divide the steps among the levels."""
    ends, total = [], 0.0
    for _, share in _LEVELS:
        total += share
        ends.append(round(iterations * min(1.0, total)))
    ends[-1] = iterations
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _filters(random: np.random.Generator) -> Array:
    """Draw filters of whole numbers: f64, shape (filters, pixels of a patch)."""
    import numpy as np

    return np.asarray(np.rint(random.standard_normal((_FILTERS, _SIDE**2)) * _FILTER_LEVELS))


def _enlarge(values: Array, target: Array, larger: Array) -> Array:
    """Bring values to the size of the next level, with what the image itself has there and had not at this one."""
    if values.shape == larger.shape:
        return values
    return larger + resize(values - target, *larger.shape)


class _Patches:
    """The patches of a style at one level."""

    def __init__(self, style: Array) -> None:
        self._style = style
        #: See `_stretch`.
        self._ranks: tuple[Array, Array] | None = None

    def gradient(self, values: Array, filters: Array) -> Array:
        """Return the gradient of the distance between the patches of some values and these, of the shape of the values.

        The distance is half the mean square over filters, summed over patches, so a patch counts the same at any size.

        :param filters: see `_filters`.
        """
        import numpy as np

        numbers = _project(values, filters)
        places = np.arange(values.size)
        for row, wanted in zip(numbers, _project(self._style, filters), strict=True):
            wanted.sort()
            # Sorted by number and then by place: the order of equal ones must not depend on the processor.
            keys = (row.astype(np.int64) << _PLACE_BITS) + places
            keys.sort()
            row[keys & ((1 << _PLACE_BITS) - 1)] -= np.rint(self._stretch(wanted, len(row)))
        scale = len(filters) * _VALUE_LEVELS * _FILTER_LENGTH**2
        return np.asarray(_project_back(numbers, filters, *values.shape) / scale, np.float32)

    def _stretch(self, wanted: Array, count: int) -> Array:
        """Bring sorted numbers to another count by interpolation."""
        import numpy as np

        have = len(wanted)
        if have == count:
            return wanted
        if self._ranks is None:
            places = np.clip((np.arange(count) + 0.5) * (have / count) - 0.5, 0, have - 1)
            below = np.minimum(places.astype(np.int64), have - 2)
            self._ranks = below, places - below
        below, part = self._ranks
        return np.asarray(wanted[below] + part * (wanted[below + 1] - wanted[below]))


def _bands(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Divide the rows of an image, so that the patches of a part fit into a processor's cache: start and end."""
    step = max(1, _BAND_PIXELS // width)
    return ((top, min(top + step, height)) for top in range(0, height, step))


def _project(values: Array, filters: Array) -> Array:
    """Apply filters to the patch around every pixel, of rounded values; beyond the edges an image is mirrored.

    :return: whole numbers as f64, shape (filters, pixels).
    """
    import numpy as np

    height, width = values.shape
    padded = np.pad(np.rint(np.asarray(values, np.float64) * _VALUE_LEVELS), _MARGIN, "reflect")
    numbers = np.empty((len(filters), height, width))
    for top, bottom in _bands(height, width):
        part = padded[top : bottom + 2 * _MARGIN]
        patches = np.lib.stride_tricks.sliding_window_view(part, (bottom - top, width)).reshape(_SIDE**2, -1)
        numbers[:, top:bottom] = (filters @ patches).reshape(len(filters), bottom - top, width)
    return numbers.reshape(len(filters), -1)


def _project_back(numbers: Array, filters: Array, height: int, width: int) -> Array:
    """Apply the transpose of `_project`, which is linear in the rounded values.

    :param numbers: whole ones.
    :return: whole numbers as f64, shape (height, width).
    """
    import numpy as np

    margin = _MARGIN
    numbers = numbers.reshape(len(filters), height, width)
    padded = np.zeros((height + 2 * margin, width + 2 * margin))
    for top, bottom in _bands(height, width):
        rows = bottom - top
        patches = (filters.T @ numbers[:, top:bottom].reshape(len(filters), -1)).reshape(_SIDE, _SIDE, rows, width)
        for down in range(_SIDE):
            for right in range(_SIDE):
                padded[top + down : bottom + down, right : right + width] += patches[down, right]
    for _ in range(2):  # rows, then columns
        # What was mirrored beyond an edge goes back to where it came from.
        padded[margin + 1 : 2 * margin + 1] += padded[:margin][::-1]
        padded[-2 * margin - 1 : -margin - 1] += padded[-margin:][::-1]
        padded = padded[margin:-margin].T
    return padded

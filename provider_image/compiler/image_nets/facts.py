"""What is found out about a net that takes an image and returns one: its scale, its range, and how far it looks.

Called by the builders of this folder. A net is run on parts of the self-test images for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from provider_image.compiler.self_test import self_test_images
from provider_image.errors import UnsuitableModel
from provider_image.images.decoding import decode
from provider_image.images.tiling import ALIGNMENT, MAX_SCALE, MAX_TILE, MIN_TILE, margins

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: Height and width of the parts for a net whose size is open.
DEFAULT_TILE = (256, 256)
#: Largest difference from the reference, as a share of the 255 levels: less than is rounded.
TOLERANCE = 0.5 / 255
#: Ranges of the returned values -> what they mean for the user.
RANGES: Mapping[str, str] = {"none": "0 to 255", "unit": "0 to 1", "tf": "-1 to 1"}
#: Last activation -> the range of what it returns.
_RANGES_BY_ACTIVATION = {"tanh": "tf", "sigmoid": "unit", "hard_sigmoid": "unit"}
#: Values beyond these are in another range than 0 to 1; nets exceed their range a little.
_LOWEST_UNIT, _HIGHEST_UNIT = -0.25, 2.0
#: Largest difference, in levels, of the results for the same pixels in two parts, where neither looks beyond its part.
_SAME_LEVELS = 0.5
#: Images that are cut into parts for that.
_TRIED_IMAGES = 3


def choose_tile(sides: tuple[int | None, int | None], size: tuple[int, int] | None) -> tuple[int, int]:
    """Return height and width of the parts that a net takes.

    :param sides: those of its input, None for one that is open.
    :param size: what the user says.
    :raises UnsuitableModel: the input is fixed at another size, or the size is not possible.
    """
    wanted = size or tuple(side or default for side, default in zip(sides, DEFAULT_TILE, strict=True))
    height, width = wanted
    if any(side not in (None, chosen) for side, chosen in zip(sides, wanted, strict=True)):
        raise UnsuitableModel(f"The input of the model is fixed at {sides[0]} x {sides[1]} pixels. Omit --size.")
    if not all(MIN_TILE <= side <= MAX_TILE for side in wanted):
        raise UnsuitableModel(
            f"The model takes {height} x {width} pixels. A part of an image has {MIN_TILE} to {MAX_TILE} on a side."
        )
    return height, width


def find_scale(shape: Sequence[int], tile: tuple[int, int]) -> int:
    """Return how many times as large as its input a result is. :param shape: (height, width, channels) of a result.

    :raises UnsuitableModel: it is no image of that kind.
    """
    scale = shape[0] // tile[0] if len(shape) == 3 else 0
    if not 1 <= scale <= MAX_SCALE or tuple(shape) != (tile[0] * scale, tile[1] * scale, 3):
        raise UnsuitableModel(
            f"The model returns {' x '.join(map(str, shape))} for an image of {tile[0]} x {tile[1]}. It must return an "
            f"RGB image of the same size, or one that is enlarged by a whole number up to {MAX_SCALE}."
        )
    return scale


def choose_range(
    results: Sequence[Array], returns: str | None, *, last_activation: str | None, preprocessing: str
) -> str:
    """Return in which of RANGES the results of a net are.

    :param returns: what the user says; None finds out.
    :param last_activation: the name of the net's last activation, None if it is unknown.
    :param preprocessing: what the net takes; one that takes -1 to 1 is expected to return that too.
    :raises UnsuitableModel: they are not finite.
    """
    import numpy as np

    values = np.stack(results)
    if not bool(np.isfinite(values).all()):
        raise UnsuitableModel("The model returns numbers that are not finite. Check its weights and --preprocessing.")
    known = returns or _RANGES_BY_ACTIVATION.get(last_activation or "")
    if known is not None:
        return known
    if values.max() > _HIGHEST_UNIT:
        return "none"
    return "tf" if values.min() < _LOWEST_UNIT or preprocessing == "tf" else "unit"


def find_margin(run: Callable[[Array], Array], tile: tuple[int, int], scale: int) -> tuple[int, bool]:
    """Find out how many pixels at a cut depend on what is beyond it: parts that overlap must agree elsewhere.

    :param run: returns the result for a part, in levels from 0 to 255.
    :return: the margin, and whether it is enough. If it is not, the net looks at all of a part.
    """
    import numpy as np

    # A distance of two parts that no net which reduces by more than ALIGNMENT takes for the same place of its grid.
    step = (min(tile) // 2 // ALIGNMENT | 1) * ALIGNMENT
    largest = 0.0
    possible = [margin for margin in margins(tile) if 2 * margin < min(tile) - step]
    needed = 0
    for data in list(self_test_images().values())[:_TRIED_IMAGES]:
        whole = decode(data, tile[0] + step, tile[1] + step, None)
        parts = [np.ascontiguousarray(whole[at : at + tile[0], at : at + tile[1]]) for at in (0, step)]
        first, second = (np.asarray(run(part), np.float32) for part in parts)
        first, second = first[step * scale :, step * scale :], second[: -step * scale, : -step * scale]
        gaps = np.abs(first - second)
        while needed < len(possible):
            cut = possible[needed] * scale
            largest = float(gaps[cut:-cut, cut:-cut].max())
            if largest <= _SAME_LEVELS:
                break
            needed += 1
    if needed < len(possible):
        return possible[needed], True
    # Wide blending makes up for it as far as that goes.
    return max(margin for margin in margins(tile) if margin <= max(margins(tile)[0], min(tile) // 8)), False

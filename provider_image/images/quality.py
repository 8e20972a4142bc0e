"""The quality of an image: sharpness, light, contrast, noise, tilt and how uniform it is, by classical methods.

Called by the service `quality` through the backend `opencv`, and in decoder processes for uploads that set limits. An
image is measured after it was reduced to at most MEASURED_SIDE pixels a side, which is about what models see of it: so
numbers of images of different sizes can be compared, and one takes a few milliseconds. Weaknesses: fine noise of large
images is averaged away by the reduction; a photo of a smooth subject has a low sharpness, and strong noise or a fine
texture a high one; tilt is only found where there are straight lines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from provider_image.backends.opencv import import_opencv
from provider_image.images.decoding import decode_and_measure

if TYPE_CHECKING:
    import numpy as np

    from provider_image.backends.opencv import Method
    from provider_image.models.artefact import Artefact

    Array = np.ndarray[Any, Any]

#: Longest side of what is measured; larger images are reduced, smaller ones are taken as they are.
MEASURED_SIDE = 512
#: What is measured, in the order of `measure_pixels`: name -> (lowest, highest, what it is).
MEASURES: Mapping[str, tuple[float, float, str]] = {
    "sharpness": (0, 1e6, "variance of the Laplacian of the grey values; blurred photos have less than about 100"),
    "brightness": (0, 1, "mean of the grey values; 0 is black, 1 is white"),
    "contrast": (0, 1, "standard deviation of the grey values; 1 is half black, half white"),
    "dark": (0, 1, "share of pixels that are nearly black"),
    "bright": (0, 1, "share of pixels that are nearly white"),
    "noise": (0, 255, "standard deviation of the noise in grey levels, estimated"),
    "tilt": (-45, 45, "degrees by which straight lines are turned clockwise from level and upright; null without any"),
    "uniformity": (0, 1, "share of pixels whose colour is nearly the most usual one; 1 is a single colour"),
}
#: Decimals that are kept of them.
_DECIMALS = 4
#: Grey values up to the first are nearly black, from the second nearly white.
_DARK, _BRIGHT = 5, 250
#: Largest difference of a channel from the usual colour.
_SAME_COLOUR = 8
#: The mask of Immerkaer's estimate (1996), the difference of two Laplacians, which removes edges and slopes; its
#: length; and the deviation of normal noise divided by the median of its absolute values.
_NOISE_MASK, _NOISE_LENGTH, _DEVIATION_OF_MEDIAN = ((1, -2, 1), (-2, 4, -2), (1, -2, 1)), 6.0, 1.4826
#: A line counts if it has this share of the longer side, and if it is turned by at most so many degrees. A tilt counts
#: if the lines within so many degrees of it have a share of the length of all, and together the length of the longer
#: side.
_LINE_SHARE, _MAX_TILT, _TILT_WIDTH, _TILT_SHARE = 1 / 16, 30.0, 1.5, 0.3
#: Steps of a degree in which a tilt is searched; and the scale at which lines are, for speed.
_TILT_STEPS, _TILT_SCALE = 4, 0.5
#: Images with a shorter side have no lines to speak of.
_LEAST_SIDE = 16


def measure_image(data: bytes, *, with_tilt: bool = True) -> dict[str, Any]:
    """Measure the quality of an image file.

    :param with_tilt: False leaves it out, which takes most of the time.
    :return: its upright width and height, and all of MEASURES.
    :raises BadInput: it cannot be decoded.
    """
    import numpy as np

    image, size = decode_and_measure(data, MEASURED_SIDE)
    return describe(measure_pixels(np.asarray(image), with_tilt=with_tilt), size)


def encode_measures(data: bytes, *, with_tilt: bool) -> bytes:
    """Do as `measure_image`, and write what was found as JSON."""
    return json.dumps(measure_image(data, with_tilt=with_tilt)).encode()


def describe(values: Array, size: tuple[int, int]) -> dict[str, Any]:
    """Name what `measure_pixels` returned. :param size: width and height of the whole image."""
    named = zip(MEASURES, values.tolist(), strict=True)
    measures = {name: None if math.isnan(value) else round(value, _DECIMALS) for name, value in named}
    return {"width": size[0], "height": size[1], **measures}


def measure_pixels(pixels: Array, *, with_tilt: bool = True) -> Array:
    """Measure decoded pixels, uint8 RGB (height, width, 3).

    :return: a number for each of MEASURES, f64; nan for no tilt.
    """
    import numpy as np

    cv2 = import_opencv()
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    laplacian = cv2.Laplacian(grey, cv2.CV_16S, borderType=cv2.BORDER_REFLECT_101)
    usual = np.array([_median(cv2, pixels, channel) for channel in range(3)], np.float64)
    is_usual = cv2.inRange(pixels, usual - _SAME_COLOUR, usual + _SAME_COLOUR)
    mean, deviation = (each.item() for each in cv2.meanStdDev(grey))
    return np.array(
        [
            cv2.meanStdDev(laplacian)[1].item() ** 2,
            mean / 255,
            deviation / 127.5,
            cv2.countNonZero(cv2.inRange(grey, 0, _DARK)) / grey.size,
            cv2.countNonZero(cv2.inRange(grey, _BRIGHT, 255)) / grey.size,
            estimate_noise(grey),
            _tilt(cv2, grey) if with_tilt else math.nan,
            cv2.countNonZero(is_usual) / grey.size,
        ],
        np.float64,
    )


def estimate_noise(grey: Array) -> float:
    """Return the standard deviation of the noise of grey values, uint8 (height, width)."""
    import numpy as np

    cv2 = import_opencv()
    rest = cv2.filter2D(grey, cv2.CV_16S, np.array(_NOISE_MASK, np.float32), borderType=cv2.BORDER_REFLECT_101)
    return _median(cv2, cv2.convertScaleAbs(rest), 0) / _NOISE_LENGTH * _DEVIATION_OF_MEDIAN


def _median(cv2: Any, pixels: Array, channel: int) -> int:
    """Return the median of a channel of 8-bit pixels."""
    counts = cv2.calcHist([pixels], [channel], None, [256], [0, 256]).cumsum()
    return int(counts.searchsorted(counts[-1] / 2))


def _tilt(cv2: Any, grey: Array) -> float:
    """Return by how many degrees the straight lines of an image are turned clockwise; nan if too few agree."""
    import numpy as np

    longer = max(grey.shape)
    if min(grey.shape) < _LEAST_SIDE:
        return math.nan
    lines = cv2.createLineSegmentDetector(cv2.LSD_REFINE_NONE, _TILT_SCALE).detect(grey)[0]
    if lines is None:
        return math.nan
    across, down = (lines[:, 0, end + 2].astype(np.float64) - lines[:, 0, end] for end in (0, 1))
    lengths = np.hypot(across, down)
    # The angle to the nearer of both axes: lines have no direction, and level and upright count alike.
    angles = (np.degrees(np.arctan2(down, across)) + 45) % 90 - 45
    is_counted = (lengths >= longer * _LINE_SHARE) & (np.abs(angles) <= _MAX_TILT)
    lengths, angles = lengths[is_counted], angles[is_counted]
    if lengths.sum() < longer:
        return math.nan
    candidates = np.arange(-_MAX_TILT * _TILT_STEPS, _MAX_TILT * _TILT_STEPS + 1) / _TILT_STEPS
    is_near = np.abs(candidates[:, None] - angles) <= _TILT_WIDTH
    best = is_near[int((is_near @ lengths).argmax())]
    found = lengths[best].sum()
    if found < max(longer, _TILT_SHARE * lengths.sum()):
        return math.nan
    return float((lengths[best] * angles[best]).sum() / found)


def make_method(artefact: Artefact, options: Mapping[str, Any]) -> Method:
    """Make the method of the backend `opencv`. See `provider_image.backends.opencv.MethodFactory`."""
    if options:
        raise ValueError("the method quality has no options")
    return measure_pixels

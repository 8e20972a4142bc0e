"""Removing the noise of an image by non-local means, for the model `denoise`. Run by the backend `opencv`.

A pixel becomes the mean of pixels nearby whose surroundings are like its own (Buades, Coll and Morel 2005), which keeps
edges and repeated textures. How much is removed follows from the noise that is measured in the image itself, so a clean
image is hardly changed. Weaknesses: fine texture that is fainter than the noise goes with it, noise of compression and
coarse grain stay, and it takes more than a second for each million pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from provider_image.backends.opencv import import_opencv
from provider_image.images.quality import estimate_noise

if TYPE_CHECKING:
    import numpy as np

    from provider_image.backends.opencv import Method
    from provider_image.models.artefact import Artefact

    Array = np.ndarray[Any, Any]

#: Sides of the surroundings that are compared, and of the area in which others are looked for.
_PATCH, _SEARCH = 5, 15
#: Noise below this many grey levels is not removed.
_LEAST_NOISE = 0.5
#: The filter's strength, divided by the deviation of the noise.
_STRENGTH = 0.9


def denoise(pixels: Array) -> Array:
    """Remove the noise of an image, uint8 RGB (height, width, 3). :return: likewise."""
    cv2 = import_opencv()
    strength = _STRENGTH * estimate_noise(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))
    if strength < _STRENGTH * _LEAST_NOISE:
        return pixels.copy()
    # It takes blue, green and red, because it works on lightness and colours apart.
    reversed = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    found = cv2.fastNlMeansDenoisingColored(reversed, None, strength, strength, _PATCH, _SEARCH)
    return cast("Array", cv2.cvtColor(found, cv2.COLOR_BGR2RGB))


def make_method(artefact: Artefact, options: Mapping[str, Any]) -> Method:
    """Make the method of the backend `opencv`. See `provider_image.backends.opencv.MethodFactory`."""
    if options:
        raise ValueError("the method denoise has no options")
    return denoise

"""Sizes and colours of the images of a style transfer. Called by the service and by both methods.

A colour is luminance, by the weights of ITU-R BT.601, and what remains of red, green and blue.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from provider_image.errors import BadInput
from provider_image.images.decoding import decode_to_fit

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: Least width and height: less has no texture.
MIN_SIDE = 16
#: Longest side of an image that shows how far a transfer is.
_PREVIEW_SIDE = 256
_LUMINANCE = (0.299, 0.587, 0.114)
#: Colours of a style are spread at most this much wider than those of the image.
_MAX_SPREAD = 2.0


def load_pixels(data: bytes, side: int, max_pixels: int) -> Array:
    """Decode an image upright, with its proportions, so that it fits into a square; it is never enlarged.

    :param side: of the square.
    :param max_pixels: an image that has more is reduced further.
    :return: uint8 RGB, shape (height, width, 3).
    :raises BadInput: it cannot be decoded, or would be narrower than MIN_SIDE.
    """
    import numpy as np

    image = decode_to_fit(data, side)
    if image.width * image.height > max_pixels:
        factor = math.sqrt(max_pixels / (image.width * image.height))
        image = image.resize((max(1, int(image.width * factor)), max(1, int(image.height * factor))))
    if min(image.size) < MIN_SIDE:
        raise BadInput(
            f"Within the size of the answer the image would have {image.width} x {image.height} pixels; at least "
            f"{MIN_SIDE} on each side are needed. Send a larger or less narrow image, or ask for a larger size."
        )
    return np.asarray(image)


def encode_preview(pixels: Array) -> bytes:
    """Return a small JPEG of uint8 RGB."""
    import PIL.Image
    import PIL.JpegImagePlugin  # so that Pillow does not import all plugins to find it

    image, file = PIL.Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
    image.save(file, PIL.JpegImagePlugin.JpegImageFile.format, quality=75)
    return file.getvalue()


def to_floats(pixels: Array) -> Array:
    """Return f32 values of 0 to 1."""
    import numpy as np

    return np.asarray(pixels, np.float32) / np.float32(255)


def to_pixels(values: Array) -> Array:
    """Return uint8 of values of 0 to 1; what is beyond is cut off."""
    import numpy as np

    return np.asarray(np.rint(np.clip(values, 0, 1) * 255), np.uint8)


def luminance(image: Array) -> Array:
    """Return the luminance of RGB: f32, shape (height, width)."""
    # Not as a product of matrices, which rounds differently on different processors.
    red, green, blue = _LUMINANCE
    found: Array = red * image[..., 0] + green * image[..., 1] + blue * image[..., 2]
    return found


def with_luminance(image: Array, values: Array) -> Array:
    """Return RGB with the colours of an image and another luminance, of the same size. May exceed 0 to 1."""
    changed: Array = image + (values - luminance(image))[..., None]
    return changed


def with_colours_of(image: Array, style: Array) -> Array:
    """Return RGB with the luminance of an image, and colours with the mean and the spread of the style's.

    A grey style makes it grey.
    """
    import numpy as np

    grey, other = luminance(image), style - luminance(style)[..., None]
    colour = image - grey[..., None]
    mean, spread = colour.mean((0, 1)), colour.std((0, 1))
    factor = np.minimum(other.std((0, 1)) / np.maximum(spread, 1e-6), _MAX_SPREAD)
    return np.asarray(grey[..., None] + (colour - mean) * factor + other.mean((0, 1)), np.float32)


def resize(values: Array, height: int, width: int) -> Array:
    """Resize f32 values of shape (height, width), smoothed where they are reduced."""
    import numpy as np
    import PIL.Image

    if values.shape == (height, width):
        return values
    return np.asarray(PIL.Image.fromarray(values).resize((width, height), PIL.Image.Resampling.BICUBIC))

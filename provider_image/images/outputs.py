"""Images that services return: encoded, checked when a provider sent them, and compared.

Called by services with the output file `IMAGE_ANSWER`. A check reads headers only, because it runs in the
batcher; a comparison decodes, within limits, because it runs where a model is built or checked.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from provider_image.errors import BadInput, InferenceFailed, MalformedResults
from provider_image.images.decoding import decode_and_measure
from provider_image.images.headers import MAX_SIDE, media_type, read_header
from provider_image.service import Difference, OutputFile, Param

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: Most pixels and bytes of an answer.
MAX_OUTPUT_PIXELS = 16_000_000
MAX_OUTPUT_BYTES = 16 * 1024 * 1024
#: The choices of `format` -> the formats as Pillow names them.
FORMATS = {"png": "PNG", "jpeg": "JPEG"}
#: Qualities of a JPEG; a lower one is tried where the file would have too many bytes.
_JPEG_QUALITIES = (92, 80, 60, 30)
#: JPEG files are compared by the means of squares of this side, within which they are rounded together.
_JPEG_SQUARE = 16

IMAGE_OUTPUT = OutputFile(help="The image, PNG or JPEG.", media_type="image/*", max_bytes=MAX_OUTPUT_BYTES)
FORMAT = Param(
    name="format",
    kind="choice",
    default="png",
    choices=tuple(FORMATS),
    help="Format of the returned image: png keeps every pixel, unless the file would have over 16 MB; then it is jpeg.",
)


def encode_image(pixels: Array, format: str, *, max_bytes: int = MAX_OUTPUT_BYTES) -> bytes:
    """Encode an answer.

    :param pixels: uint8 RGB (height, width, 3).
    :param format: a choice of FORMAT.
    :return: the file, a JPEG if it would have too many bytes as a PNG.
    :raises InferenceFailed: it has too many bytes as a JPEG of the lowest quality as well.
    """
    import PIL.Image
    import PIL.JpegImagePlugin
    import PIL.PngImagePlugin

    image = PIL.Image.fromarray(pixels)
    tries: list[tuple[str, dict[str, int]]] = [("png", {"compress_level": 4})] if format == "png" else []
    tries += [("jpeg", {"quality": quality}) for quality in _JPEG_QUALITIES]
    for chosen, options in tries:
        buffer = io.BytesIO()
        image.save(buffer, FORMATS[chosen], **options)
        if buffer.tell() <= max_bytes:
            return buffer.getvalue()
    raise InferenceFailed(f"The returned image would have more than {max_bytes} bytes. Send a smaller one.")


def image_format(data: bytes) -> str:
    """Return the choice of FORMAT that an encoded answer has."""
    return media_type(data).removeprefix("image/")


def check_image(data: bytes, *, width: int, height: int, format: str) -> None:
    """Check the header of an image that a provider sent. :raises MalformedResults: its size or format is another."""
    try:
        header = read_header(data, MAX_OUTPUT_PIXELS)
    except BadInput as error:
        raise MalformedResults(f"The image cannot be used: {error.reason}") from error
    if (header.format, header.width, header.height) != (FORMATS[format], width, height):
        raise MalformedResults(
            f"The image is {header.format} of {header.width} x {header.height} pixels, not {FORMATS[format]} of "
            f"{width} x {height}."
        )


def compare_images(expected: bytes, output: bytes) -> Difference:
    """Compare two images pixel by pixel, JPEG files by squares of pixels.

    :return: the largest difference of a channel beyond one level of 255, which is rounding, as a share of all levels.
    """
    import numpy as np

    try:
        one, other = (_decode(each) for each in (expected, output))
    except BadInput:
        return Difference(largest=1.0, is_same_order=False)
    if one.shape != other.shape:
        return Difference(largest=1.0, is_same_order=False)
    gaps = one.astype(np.float32) - other.astype(np.float32)
    if any(read_header(each, MAX_OUTPUT_PIXELS).format == "JPEG" for each in (expected, output)):
        gaps = _square_means(gaps)
    return Difference(largest=max(0.0, float(np.abs(gaps).max()) - 1) / 255, is_same_order=True)


def _decode(data: bytes) -> Array:
    import numpy as np

    read_header(data, MAX_OUTPUT_PIXELS)
    return np.asarray(decode_and_measure(data, MAX_SIDE)[0])


def _square_means(values: Array) -> Array:
    import numpy as np

    for axis in (0, 1):
        starts = np.arange(0, values.shape[axis], _JPEG_SQUARE)
        counts = np.diff(np.append(starts, values.shape[axis])).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        values = np.add.reduceat(values, starts, axis=axis) / counts
    return values

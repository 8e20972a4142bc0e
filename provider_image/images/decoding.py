"""Decodes an image file to the pixels that a model takes.

Called by services, on a worker, on a provider and in the batcher's decoder processes, and by the compiler. Formats:
JPEG, PNG, WebP, BMP and the first frame of GIF, WebP and TIFF. Greyscale, palette, CMYK and 16-bit images become RGB;
transparent ones are composited on white, as most viewers do. Pillow and numpy are imported on the first decode.
"""

from __future__ import annotations

import importlib
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from provider_image.errors import DAMAGED_FILE_ERRORS, BadInput, BrokenImage, UnsupportedFormat
from provider_image.images.headers import ImageHeader, read_header

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image

#: Most pixels that a provider decodes; 36 million RGB pixels are 108 MB.
MAX_PIXELS = 36_000_000
#: A JPEG is decoded at a half, a quarter or an eighth of its size while the part that is used remains at least this
#: many times as large as the model's input. The smallest margin at which the top five labels of EfficientNet-Lite0 are
#: unchanged in all cases measured (docs/measurements.md); at 2.5 and 3 the fifth and the sixth label swap
#: where they are within half a percent of each other. Such near-ties remain: no lossy step preserves all of them.
DRAFT_MARGIN = 4.0

#: Format -> (Pillow's module, class). Used directly: Image.open first imports plugins for other formats.
_PLUGINS = {
    "JPEG": ("PIL.JpegImagePlugin", "JpegImageFile"),
    "PNG": ("PIL.PngImagePlugin", "PngImageFile"),
    "WEBP": ("PIL.WebPImagePlugin", "WebPImageFile"),
    "GIF": ("PIL.GifImagePlugin", "GifImageFile"),
    "BMP": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "TIFF": ("PIL.TiffImagePlugin", "TiffImageFile"),
}
#: The EXIF tag of the orientation, and the transposition that turns an image upright, by the tag's value.
_ORIENTATION_TAG = 0x0112
_TRANSPOSITIONS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_SIDEWAYS = ("TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")


def decode(
    data: bytes,
    height: int,
    width: int,
    crop: float | None,
    *,
    max_pixels: int = MAX_PIXELS,
    margin: float = DRAFT_MARGIN,
) -> np.ndarray[Any, Any]:
    """Decode an image to a model's input: upright, RGB, centre crop if any, bicubic resize.

    :param crop: side of the centre square as a share of the shorter side; None takes the whole image and does not keep
        its aspect ratio.
    :param margin: see DRAFT_MARGIN, the default; math.inf never decodes at reduced scale.
    :return: uint8, shape (height, width, 3), values 0-255, not yet normalised.
    :raises BadInput: as `read_header`; BrokenImage also when the pixels cannot be decoded.
    """
    header = read_header(data, max_pixels)
    import numpy as np
    import PIL.Image

    try:
        module, attribute = _PLUGINS[header.format]
        with getattr(importlib.import_module(module), attribute)(io.BytesIO(data)) as image:
            upright, scale = _load_upright(image, header, height, width, crop, max_pixels, margin)
        box = _crop_box(upright, scale, crop)
        if upright.size != (width, height) or crop is not None:
            upright = upright.resize((width, height), PIL.Image.Resampling.BICUBIC, box=box)
        return np.asarray(upright.convert("RGB"))
    except BadInput:
        raise
    except (*DAMAGED_FILE_ERRORS, PIL.Image.DecompressionBombError) as error:
        raise BrokenImage(
            f"The {header.format} image cannot be decoded ({type(error).__name__}: {error}). "
            "Save it again in an image program and send that file."
        ) from error


@dataclass(frozen=True, kw_only=True)
class _LoadedScale:
    """The scale at which an image was loaded."""

    #: Size of the upright image at full scale.
    width: int
    height: int
    #: It was loaded at 1/divisor of that size.
    divisor: int


def _load_upright(
    image: PIL.Image.Image,
    header: ImageHeader,
    height: int,
    width: int,
    crop: float | None,
    max_pixels: int,
    margin: float,
) -> tuple[PIL.Image.Image, _LoadedScale]:
    """Load an opened image, at reduced scale where the margin allows it, and return it upright in mode L or RGB."""
    if image.width * image.height > max_pixels:  # the decoder may see a larger frame than the header declares
        raise BrokenImage("The image is larger than its header says. Save it again and send that file.")
    # Pillow itself turns TIFF upright while loading.
    transposition = None if header.format == "TIFF" else _TRANSPOSITIONS.get(_orientation(image))
    is_sideways = transposition in _SIDEWAYS
    full, divisor = image.size, 1
    if header.format == "JPEG" and math.isfinite(margin):
        factor = margin / (crop or 1.0)
        min_size = (math.ceil(width * factor), math.ceil(height * factor))
        image.draft(None, min_size[::-1] if is_sideways else min_size)
        divisor = round(full[0] / image.width)
    image.load()
    upright = _to_rgb(image)
    if transposition is not None:
        import PIL.Image

        upright = upright.transpose(PIL.Image.Transpose[transposition])
    if divisor == 1:
        full = upright.size
    elif is_sideways:
        full = full[::-1]
    return upright, _LoadedScale(width=full[0], height=full[1], divisor=divisor)


def _crop_box(upright: PIL.Image.Image, scale: _LoadedScale, crop: float | None) -> tuple[float, float, float, float]:
    """Return the box of the centre crop, the same part at every scale, rounded as TensorFlow's EfficientNet does."""
    if crop is None:
        return 0, 0, upright.width, upright.height
    side = max(1, int(crop * min(scale.width, scale.height)))
    left, top = (scale.width - side + 1) // 2, (scale.height - side + 1) // 2
    box = (left, top, left + side, top + side)
    return (
        box[0] / scale.divisor,
        box[1] / scale.divisor,
        min(box[2] / scale.divisor, upright.width),
        min(box[3] / scale.divisor, upright.height),
    )


def _orientation(image: PIL.Image.Image) -> int:
    if "exif" not in image.info and "Raw profile type exif" not in image.info:
        return 1  # spares importing Pillow's EXIF reader
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except DAMAGED_FILE_ERRORS:  # damaged metadata around valid pixels: viewers show such an image as it is stored
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert any of Pillow's modes to L or RGB."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        # Pillow's own conversion to L clips everything over 255 to white.
        return _to_greyscale(image, 1 / 257)
    if image.mode in ("I", "F"):
        # 32-bit TIFF does not define which value is white, so it is inferred from the values in use.
        lowest, highest = _extrema(image)
        if lowest >= 0 and highest <= 1 and image.mode == "F":
            return _to_greyscale(image, 255)
        if lowest >= 0 and highest <= 255:
            return _to_greyscale(image, 1)
        if lowest >= 0 and highest <= 65535:
            return _to_greyscale(image, 1 / 257)
        return _to_greyscale(image, 255 / (highest - lowest), lowest)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        import PIL.Image

        layer = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("P", "CMYK", "YCbCr", "LAB", "HSV", "RGBX"):
        return image.convert("RGB")
    raise UnsupportedFormat(f"Pixels of mode {image.mode!r} are not supported. Save the image as RGB.")


def _extrema(image: PIL.Image.Image) -> tuple[float, float]:
    lowest, highest = image.getextrema()
    if not (isinstance(lowest, int | float) and isinstance(highest, int | float)):
        raise BrokenImage("The image has more channels than its mode says. Save it again and send that file.")
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise BrokenImage("The image has pixels that are not finite numbers. Save it again as 8-bit RGB.")
    return lowest, highest


def _to_greyscale(image: PIL.Image.Image, factor: float, lowest: float = 0.0) -> PIL.Image.Image:
    import numpy as np
    import PIL.Image

    values = (np.asarray(image).astype(np.float32) - lowest) * factor
    return PIL.Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))

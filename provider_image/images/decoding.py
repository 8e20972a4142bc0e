"""Pictures: the quick check at the door, and the decoding that feeds a model.

`check_upload` is called by the server on every upload and needs no Pillow. `decode` is called by services, on the
provider or in the batcher's processes that shrink pictures; those pack the pixels with `encode_lossless`, and the
provider unpacks the very same ones with `decode_resized`. Formats: JPEG, PNG, WebP, BMP and the first frame of GIF,
WebP and TIFF. Greyscale, palette, CMYK and 16-bit pictures become RGB; transparent ones are laid on white, as most
viewers do.
"""

from __future__ import annotations

import importlib
import io
import math
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from provider_image.errors import BadInput, BrokenImage, UnsupportedFormat
from provider_image.images.headers import ImageHeader, read_header

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image

#: What is taken, by Pillow's names.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
#: Pixels that a provider decodes at most; 36 million RGB pixels are 108 MB.
MAX_PIXELS = 36_000_000
#: A JPEG is decoded at a half, a quarter or an eighth of its size while the part that is used stays at least this many
#: times as large as the model's input. The smallest margin at which the five likeliest labels of EfficientNet-Lite0
#: stay in all cases that `scripts/bench scale` tries; at 2.5 and 3 the fifth label changes with the sixth where they
#: are within half a percent of each other. Such near-ties remain: no lossy step keeps all of them.
DRAFT_MARGIN = 4.0

#: Format -> (Pillow's module, class). Asked directly: Image.open first imports plugins for formats that are not taken.
_PLUGINS = {
    "JPEG": ("PIL.JpegImagePlugin", "JpegImageFile"),
    "PNG": ("PIL.PngImagePlugin", "PngImageFile"),
    "WEBP": ("PIL.WebPImagePlugin", "WebPImageFile"),
    "GIF": ("PIL.GifImagePlugin", "GifImageFile"),
    "BMP": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "TIFF": ("PIL.TiffImagePlugin", "TiffImageFile"),
}
#: The EXIF tag for the orientation, and what turns a picture upright, by its value.
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
#: What Pillow raises for damaged files, by its plugins' code and by fuzzing reports.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    EOFError,
    AssertionError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zlib.error,
)


def check_upload(data: bytes, max_pixels: int) -> ImageHeader:
    """Check cheaply that bytes are a whole picture of a format that is taken: header, declared size, file's end.

    :raises EmptyImage: no bytes.
    :raises NotAnImage: not recognised.
    :raises UnsupportedFormat: recognised, but not taken.
    :raises ImageTooLarge: declares more than max_pixels.
    :raises BrokenImage: damaged or cut short, as far as the structure tells.
    """
    return read_header(data, max_pixels)


def decode(
    data: bytes,
    height: int,
    width: int,
    crop: float | None,
    *,
    max_pixels: int = MAX_PIXELS,
    margin: float = DRAFT_MARGIN,
) -> np.ndarray[Any, Any]:
    """Decode a picture to a model's input: upright, RGB, centre crop if any, bicubic to the size.

    :param crop: side of the centre square as a share of the shorter side; None takes the whole picture and lets its
        proportions go.
    :param margin: see DRAFT_MARGIN, the default; math.inf never decodes at reduced scale.
    :return: uint8, shape (height, width, 3), values 0-255, not yet normalised.
    :raises BadInput: as `check_upload`; BrokenImage also when the pixels cannot be decoded.
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
    except (*_DECODE_ERRORS, PIL.Image.DecompressionBombError) as error:
        raise BrokenImage(
            f"The {header.format} image cannot be decoded ({type(error).__name__}: {error}). "
            "Save it again in an image program and send that file."
        ) from error


def encode_lossless(pixels: np.ndarray[Any, Any]) -> bytes:
    """Pack decoded pixels so that `decode_resized` gives exactly the same, with nothing else in the file.

    :param pixels: uint8, shape (height, width, 3), as `decode` gives them.
    """
    import PIL.Image
    import PIL.WebPImagePlugin

    # That import spares Pillow the search for it among all its plugins. The quickest method is
    # used: a photo of 224 x 224 takes 2 ms; the thorough ones save a tenth more and take 40 ms.
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, method=0, quality=50)
    return buffer.getvalue()


def decode_resized(data: bytes, height: int, width: int) -> np.ndarray[Any, Any]:
    """Unpack what `encode_lossless` gave; nothing is turned, cropped or resized.

    :return: uint8, shape (height, width, 3).
    :raises BadInput: it is anything else than a WebP of that many RGB pixels.
    """
    import numpy as np
    import PIL.Image
    import PIL.WebPImagePlugin

    wanted = f"a WebP file of {width} x {height} RGB pixels"
    try:
        header = read_header(data, height * width)
        if (header.format, header.width, header.height) != ("WEBP", width, height):
            raise BadInput(f"It is {header.format} of {header.width} x {header.height} pixels.")
        with PIL.WebPImagePlugin.WebPImageFile(io.BytesIO(data)) as image:
            # The frame is what is decoded; what was announced before it may be something else.
            if (image.mode, image.size, getattr(image, "n_frames", 1)) != ("RGB", (width, height), 1):
                raise BadInput(f"It has {image.mode} pixels, {image.width} x {image.height}, or several frames.")
            image.load()
            return np.asarray(image)
    except (BadInput, *_DECODE_ERRORS, PIL.Image.DecompressionBombError) as error:
        message = f"A shrunk picture must be {wanted}; the same version of mlg must shrink and run. {error}"
        raise BadInput(message) from error


@dataclass(frozen=True, kw_only=True)
class _LoadedScale:
    """How a picture was loaded."""

    #: Size of the upright picture at full scale.
    width: int
    height: int
    #: It was loaded at one in so many of its size.
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
    """Load an opened picture, at reduced scale if that does no harm, and return it upright in mode L or RGB."""
    if image.width * image.height > max_pixels:  # the decoder may see a larger frame than the header declares
        raise BrokenImage("The image is larger than its header says. Save it again and send that file.")
    # TIFF is turned by Pillow while loading.
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
    """Return the part that is used, the same at every scale. The rounding is that of TensorFlow's EfficientNet."""
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
    except _DECODE_ERRORS:  # damaged metadata around sound pixels: viewers show such a picture as it is stored
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert any mode of Pillow's to L or RGB."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        # Pillow's own conversion to L clips everything over 255 to white.
        return _to_greyscale(image, 1 / 257)
    if image.mode in ("I", "F"):
        # 32-bit TIFF does not say which number is white, so the range that is used has to tell.
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
    raise UnsupportedFormat(f"Pixels of the kind {image.mode!r} are not supported. Save the picture as RGB.")


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

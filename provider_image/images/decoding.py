"""Decodes an image file to the pixels that a model takes.

Called by services, on a worker, on a provider and in decoder processes, and by the compiler. Formats: JPEG, PNG, WebP,
BMP and the first frame of GIF, WebP and TIFF. Greyscale, palette, CMYK and 16-bit images become RGB; transparent ones
are composited on white, as most viewers do. Colour profiles are ignored: numbers are taken as they are stored, as
Keras takes them. Pillow and numpy are imported on the first decode.

Memory: the decoded image exists once, and a second time, converted and upright, only if both fit into the limit. Larger
ones (over 24 million pixels with transparency, of CMYK or to be turned) are converted and resized in
bands. Their values may differ a little from those of the usual way, because Pillow decides by size whether it resizes
vertically or horizontally first, and rounds in between.
"""

from __future__ import annotations

import functools
import importlib
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from provider_image.errors import DAMAGED_FILE_ERRORS, BadInput, BrokenImage, UnsupportedFormat
from provider_image.images.headers import MAX_DECODING_BYTES, MAX_PIXELS, ImageHeader, read_header
from provider_image.images.resampling import resampler

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image

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
#: Pixels that are converted at once.
_BAND_PIXELS = 512 * 1024
#: Bytes that Pillow has for a pixel of a mode; 4 of all others.
_PIXEL_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
#: Most characters of text that are read from a PNG; four bytes each at worst.
_MAX_PNG_TEXT = 4 * 1024 * 1024
#: What is beside an image.
_GREY = 128
#: A box in pixels: left, top, right, bottom.
_Box = tuple[float, float, float, float]
#: Converts a part of an image to mode L or RGB.
_Converter = Callable[["PIL.Image.Image"], "PIL.Image.Image"]


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
    import numpy as np

    factor = margin / (crop or 1.0)
    min_size = (math.ceil(width * factor), math.ceil(height * factor)) if math.isfinite(margin) else None

    def reduce(image: _UprightImage) -> PIL.Image.Image:
        import PIL.Image

        return image.resize(width, height, image.centre(crop), PIL.Image.Resampling.BICUBIC)

    return np.asarray(_decode(data, max_pixels, min_size, reduce))


def decode_to_fit(data: bytes, side: int) -> PIL.Image.Image:
    """Decode an image to RGB that fits into a square, upright, with its proportions and never enlarged.

    :param side: of the square, in pixels.
    :raises BadInput: as `decode`.
    """
    return decode_and_measure(data, side)[0]


def decode_and_measure(data: bytes, side: int) -> tuple[PIL.Image.Image, tuple[int, int]]:
    """Do as `decode_to_fit`. :return: the image, and (width, height) of the whole, upright."""
    found = decode_fitted(data, side, side, margin=2.0)
    return found.image, (found.width, found.height)


@dataclass(frozen=True, kw_only=True)
class FittedImage:
    """An image that was scaled to fit into a rectangle."""

    #: In mode RGB.
    image: PIL.Image.Image
    #: Size of the original in pixels, upright.
    width: int
    height: int

    @property
    def pixels(self) -> np.ndarray[Any, Any]:
        """Return its pixels, uint8, shape (height, width, 3)."""
        import numpy as np

        return np.asarray(self.image)


def decode_fitted(data: bytes, width: int, height: int, *, enlarged_to: int = 0, margin: float = 1.0) -> FittedImage:
    """Decode an image to RGB that fits into a rectangle, upright and with its proportions.

    :param width, height: of the rectangle, in pixels.
    :param enlarged_to: an image of less than this many pixels on both sides is enlarged; 0: never.
    :param margin: a JPEG is decoded at reduced scale while both sides remain this many times as long as those of the
        rectangle.
    :raises BadInput: as `decode`.
    """
    full_size = (0, 0)

    def reduce(image: _UprightImage) -> PIL.Image.Image:
        nonlocal full_size
        import PIL.Image

        full_size = image.full_size
        factor = min(max(1.0, enlarged_to / max(full_size)), width / full_size[0], height / full_size[1])
        target = [max(1, round(each * factor)) for each in full_size]
        return image.resize(target[0], target[1], image.centre(None), PIL.Image.Resampling.BILINEAR)

    enough = math.ceil(margin * width), math.ceil(margin * height)
    image = _decode(data, MAX_PIXELS, enough, reduce)
    return FittedImage(image=image, width=full_size[0], height=full_size[1])


@dataclass(frozen=True, kw_only=True)
class ImagePart:
    """A rectangle in an upright image, in its pixels. It may reach beyond the image."""

    left: float
    top: float
    width: float
    height: float
    #: By how many degrees it is turned clockwise around its centre.
    angle: float = 0.0


def decode_part(data: bytes, find_part: Callable[[int, int], ImagePart], max_side: int) -> PIL.Image.Image:
    """Decode a part of an image to RGB, turned so that its top is level.

    :param find_part: returns the part for the width and height of the upright image.
    :param max_side: the longer side of the result is at most this many pixels; a smaller part is not enlarged.
    :return: what is outside of the image is grey.
    :raises BadInput: as `decode`, and if all of the part is outside.
    """

    def reduce(image: _UprightImage) -> PIL.Image.Image:
        return image.turned(find_part(*image.full_size), max_side)

    return _decode(data, MAX_PIXELS, None, reduce)


def _decode(
    data: bytes,
    max_pixels: int,
    min_size: tuple[int, int] | None,
    reduce: Callable[[_UprightImage], PIL.Image.Image],
) -> PIL.Image.Image:
    """Open and load an image, and reduce it. :return: RGB. :raises BadInput: as `decode`.

    :param min_size: (width, height) that are enough of the upright image; None takes full scale.
    """
    header = read_header(data, max_pixels)
    import PIL.Image

    try:
        module_name, attribute = _PLUGINS[header.format]
        module = importlib.import_module(module_name)
        opener = getattr(module, attribute)
        if header.format == "PNG":
            module.MAX_TEXT_MEMORY = _MAX_PNG_TEXT  # type: ignore[attr-defined]
        if header.format == "WEBP":
            opener = _webp_opener(opener)
        with opener(io.BytesIO(data)) as image:
            if image.width * image.height > max_pixels:  # the decoder may see a larger frame than the header declares
                raise BrokenImage("The image is larger than its header says. Save it again and send that file.")
            return reduce(_UprightImage(image, header, min_size)).convert("RGB")
    except BadInput:
        raise
    except (*DAMAGED_FILE_ERRORS, PIL.Image.DecompressionBombError) as error:
        raise BrokenImage(
            f"The {header.format} image cannot be decoded ({type(error).__name__}: {error}). "
            "Save it again in an image program and send that file."
        ) from error


@functools.cache
def _webp_opener(plugin: Any) -> Any:
    """Return Pillow's class for WebP, changed so that it drops the decoder's canvases when it has the first frame."""

    class FirstFrame(plugin):  # type: ignore[misc]
        def _get_next(self) -> Any:
            frame = super()._get_next()
            self._decoder = None
            return frame

    return FirstFrame


class _UprightImage:
    """A loaded image, of which parts are turned upright and converted to mode L or RGB when they are needed.

    :param min_size: see `_decode`.
    """

    def __init__(self, image: PIL.Image.Image, header: ImageHeader, min_size: tuple[int, int] | None) -> None:
        full, self._divisor = image.size, 1
        transposition = None
        if header.format == "JPEG":
            transposition = _TRANSPOSITIONS.get(_orientation(image))
            enough = min_size or full
            if transposition in _SIDEWAYS and min_size is not None:
                enough = enough[::-1]
            if header.buffer_bytes + 4 * full[0] * full[1] > MAX_DECODING_BYTES:
                enough = min(enough[0], full[0] // 2), min(enough[1], full[1] // 2)
            image.draft(None, enough)
            self._divisor = round(full[0] / image.width)
        image.load()
        if header.format not in ("JPEG", "TIFF"):  # Pillow itself turns TIFF; a PNG may have its EXIF data at its end
            transposition = _TRANSPOSITIONS.get(_orientation(image))
        if self._divisor == 1:
            full = image.size
        is_sideways = transposition in _SIDEWAYS
        self._image = image
        self._transposition = transposition
        self._convert = _converter(image)
        #: Memory that stays in use until the image is closed.
        self._held_bytes = 4 * image.width * image.height if header.format == "WEBP" else 0
        #: (width, height), upright, as loaded.
        self.size = image.size[::-1] if is_sideways else image.size
        #: The same at full scale; it was loaded at 1/divisor of that.
        self.full_size = full[::-1] if is_sideways else full

    def centre(self, crop: float | None) -> _Box:
        """Return the box of the centre crop, the same part at every scale, rounded as TensorFlow's EfficientNet does.

        :param crop: see `decode`.
        """
        if crop is None:
            return 0, 0, *self.size
        width, height = self.full_size
        side = max(1, int(crop * min(width, height)))
        left, top = (width - side + 1) // 2, (height - side + 1) // 2
        return (
            left / self._divisor,
            top / self._divisor,
            min((left + side) / self._divisor, self.size[0]),
            min((top + side) / self._divisor, self.size[1]),
        )

    def resize(self, width: int, height: int, box: _Box, filter: PIL.Image.Resampling) -> PIL.Image.Image:
        """Resize the part in a box. :return: mode L or RGB."""
        import PIL.Image

        target = (width, height)
        # If the horizontal pass comes first, its result is beside the image. It is large where the image is many times
        # as high as wide; then the vertical pass comes first.
        between_bytes = 4 * width * self.size[1]
        is_usual_order = 4 * self.size[0] * self.size[1] + between_bytes <= MAX_DECODING_BYTES
        image = self._whole(between_bytes) if is_usual_order else None
        if image is not None:
            return resampler().resize(image, target, filter, box)
        # Bands follow one another along this axis: rows, or columns if the vertical pass comes first.
        axis = 1 if is_usual_order else 0
        other = 1 - axis
        # Outside the box, only as much counts as a bicubic filter reaches: twice the scale.
        reach = 2 * max(1.0, (box[axis + 2] - box[axis]) / target[axis]) + 1
        first = max(0, math.floor(box[axis] - reach))
        last = min(self.size[axis], math.ceil(box[axis + 2] + reach))
        reduced: PIL.Image.Image | None = None
        for start, end in self._steps(axis, first, last):
            band = self._band((*_point(axis, start, 0), *_point(axis, end, self.size[other])))
            band_box = (*_point(axis, 0, box[other]), *_point(axis, end - start, box[other + 2]))
            band = band.resize(_point(axis, end - start, target[other]), filter, band_box)
            reduced = reduced or PIL.Image.new(band.mode, _point(axis, self.size[axis], target[other]))
            reduced.paste(band, _point(axis, start, 0))
        assert reduced is not None
        return reduced.resize(
            target, filter, (*_point(axis, box[axis], 0), *_point(axis, box[axis + 2], target[other]))
        )

    def turned(self, part: ImagePart, max_side: int) -> PIL.Image.Image:
        """Return a part, turned so that its top is level; see `decode_part`. :return: mode L or RGB."""
        import PIL.Image

        scale = min(1.0, max_side / max(part.width, part.height))
        width, height = (max(1, round(each * scale)) for each in (part.width, part.height))
        across, down = math.cos(math.radians(part.angle)), math.sin(math.radians(part.angle))
        centre = part.left + part.width / 2, part.top + part.height / 2
        reach = (
            (abs(part.width * across) + abs(part.height * down)) / 2 + 2,
            (abs(part.width * down) + abs(part.height * across)) / 2 + 2,
        )
        # The pixels around it that are in the image, scaled.
        start = [max(0, math.floor(centre[axis] - reach[axis])) for axis in (0, 1)]
        end = [min(self.full_size[axis], math.ceil(centre[axis] + reach[axis])) for axis in (0, 1)]
        if start[0] >= end[0] or start[1] >= end[1]:
            raise BadInput(
                f"The part to cut out is outside of the image, which has {self.full_size[0]} x {self.full_size[1]} "
                "pixels. Give left and top in pixels of the image as it is shown, upright."
            )
        small = [max(1, math.ceil((end[axis] - start[axis]) * scale)) for axis in (0, 1)]
        loaded = [self.size[axis] / self.full_size[axis] for axis in (0, 1)]
        box = (start[0] * loaded[0], start[1] * loaded[1], end[0] * loaded[0], end[1] * loaded[1])
        around = self.resize(small[0], small[1], box, PIL.Image.Resampling.BICUBIC)
        # From a pixel of the result to the place in `around` that it shows.
        steps = [small[axis] / (end[axis] - start[axis]) for axis in (0, 1)]
        x = (part.width / width * across, -part.height / height * down)
        y = (part.width / width * down, part.height / height * across)
        first = [centre[0] - start[0], centre[1] - start[1]]
        matrix = (
            *(steps[0] * each for each in (*x, first[0] - x[0] * width / 2 - x[1] * height / 2)),
            *(steps[1] * each for each in (*y, first[1] - y[0] * width / 2 - y[1] * height / 2)),
        )
        grey = _GREY if around.mode == "L" else (_GREY,) * 3
        return around.transform(
            (width, height), PIL.Image.Transform.AFFINE, matrix, PIL.Image.Resampling.BICUBIC, fillcolor=grey
        )

    def _whole(self, other_bytes: int) -> PIL.Image.Image | None:
        """Return the whole image upright and in mode L or RGB; None if that would take too much memory.

        :param other_bytes: what is needed beside it.
        """
        import PIL.Image

        if self._convert is None and self._transposition is None:
            return self._image
        width, height = self.size
        result: PIL.Image.Image | None = None
        for start, end in self._steps(1, 0, height):
            band = self._band((0, start, width, end))
            if band.size == self.size:
                return band
            if result is None:
                pixel_bytes = sum(_PIXEL_BYTES.get(mode, 4) for mode in (self._image.mode, band.mode))
                if self._held_bytes + width * height * pixel_bytes + other_bytes > MAX_DECODING_BYTES:
                    return None
                result = PIL.Image.new(band.mode, self.size)
            result.paste(band, (0, start))
        return result

    def _steps(self, axis: int, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Divide a part of an axis into bands: where each starts and ends."""
        step = max(1, _BAND_PIXELS // self.size[1 - axis])
        return ((start, min(last, start + step)) for start in range(first, last, step))

    def _band(self, box: tuple[int, int, int, int]) -> PIL.Image.Image:
        """Return a part of the upright image, converted."""
        import PIL.Image

        stored = _stored_box(self._transposition, box, *self.size)
        band = self._image if stored == (0, 0, *self._image.size) else self._image.crop(stored)
        if self._transposition is not None:
            band = band.transpose(PIL.Image.Transpose[self._transposition])
        return band if self._convert is None else self._convert(band)


def _point(axis: int, along: Any, across: Any) -> tuple[Any, Any]:
    """Return (x, y) of a coordinate along an axis and one across it."""
    return (across, along) if axis else (along, across)


def _stored_box(
    transposition: str | None, box: tuple[int, int, int, int], width: int, height: int
) -> tuple[int, int, int, int]:
    """Return where a part of the upright image is in the image as it is stored.

    :param width, height: of the upright image.
    """
    left, top, right, bottom = box
    if transposition in ("FLIP_LEFT_RIGHT", "ROTATE_180", "ROTATE_270", "TRANSVERSE"):
        left, right = width - right, width - left
    if transposition in ("FLIP_TOP_BOTTOM", "ROTATE_180", "ROTATE_90", "TRANSVERSE"):
        top, bottom = height - bottom, height - top
    return (top, left, bottom, right) if transposition in _SIDEWAYS else (left, top, right, bottom)


def _orientation(image: PIL.Image.Image) -> int:
    if "exif" not in image.info and "Raw profile type exif" not in image.info:
        return 1  # spares importing Pillow's EXIF reader
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except DAMAGED_FILE_ERRORS:  # damaged metadata around valid pixels: viewers show such an image as it is stored
        return 1
    return value if isinstance(value, int) else 1


def _converter(image: PIL.Image.Image) -> _Converter | None:
    """Return what converts parts of an image from any of Pillow's modes to L or RGB; None if it is one of them."""
    transparency = image.info.get("transparency")
    if image.mode in ("L", "RGB") and transparency is None:
        return None
    if image.mode.startswith("I;16"):
        # Pillow's own conversion to L clips everything over 255 to white.
        return lambda part: _to_greyscale(part, 1 / 257, white=transparency)
    if image.mode in ("I", "F"):
        # 32-bit TIFF does not define which value is white, so it is inferred from the values in use.
        lowest, highest = _extrema(image)
        if lowest >= 0 and highest <= 1 and image.mode == "F":
            return lambda part: _to_greyscale(part, 255)
        if lowest >= 0 and highest <= 255:
            return lambda part: _to_greyscale(part, 1)
        if (lowest >= 0 and highest <= 65535) or lowest == highest:
            return lambda part: _to_greyscale(part, 1 / 257)
        return lambda part: _to_greyscale(part, 255 / (highest - lowest), lowest)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or transparency is not None:
        return _composite_on_white
    if image.mode == "1":
        return lambda part: part.convert("L")
    if image.mode in ("P", "CMYK", "YCbCr", "LAB", "HSV", "RGBX"):
        return lambda part: part.convert("RGB")
    raise UnsupportedFormat(f"Pixels of mode {image.mode!r} are not supported. Save the image as RGB.")


def _composite_on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    import PIL.Image

    layer = image if image.mode == "RGBA" and "transparency" not in image.info else image.convert("RGBA")
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _extrema(image: PIL.Image.Image) -> tuple[float, float]:
    lowest, highest = image.getextrema()
    if not (isinstance(lowest, int | float) and isinstance(highest, int | float)):
        raise BrokenImage("The image has more channels than its mode says. Save it again and send that file.")
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise BrokenImage("The image has pixels that are not finite numbers. Save it again as 8-bit RGB.")
    return lowest, highest


def _to_greyscale(
    image: PIL.Image.Image, factor: float, lowest: float = 0.0, white: int | None = None
) -> PIL.Image.Image:
    """Scale values to 0 to 255. :param white: the value of transparent pixels."""
    import numpy as np
    import PIL.Image

    stored = np.asarray(image)
    values = np.clip(np.rint((stored.astype(np.float32) - lowest) * factor), 0, 255).astype(np.uint8)
    if white is not None:
        values[stored == white] = 255
    return PIL.Image.fromarray(values)

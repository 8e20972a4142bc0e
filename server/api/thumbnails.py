"""Thumbnails: of one image, and a contact sheet of many with a label below each.

Called by the views. Uploads were only checked by their header, so decoding may fail here: then the sheet has a grey
square instead. Weakness: clients' images are decoded inside the server, one at a time for each working thread, by
Pillow's decoders for the accepted formats and no others.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from provider_image.errors import BadInput, BrokenImage
from provider_image.images.headers import MEDIA_TYPES, read_header
from store.errors import ImageGone

if TYPE_CHECKING:
    import PIL.Image

log = logging.getLogger(__name__)

#: Smallest and largest side of a thumbnail.
MIN_THUMBNAIL_PIXELS, MAX_THUMBNAIL_PIXELS = 16, 1024
#: Images on one sheet, images per row, and their size.
SHEET_ITEMS, SHEET_COLUMNS, SHEET_PIXELS = 100, 10, 128
_LINE_PIXELS = 14
_LINES = 2
_GREY = (221, 221, 221)


def media_type(data: bytes, max_pixels: int) -> str:
    """Return the media type of an accepted image. :raises BadInput:"""
    return MEDIA_TYPES[read_header(data, max_pixels).format]


def thumbnail(data: bytes, size: int, max_pixels: int) -> bytes:
    """Make a JPEG that fits into a square of `size` pixels, turned upright, with its proportions.

    :raises BrokenImage: it cannot be decoded.
    """
    buffer = io.BytesIO()
    _decode_small(data, size, max_pixels).save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


def contact_sheet(items: Sequence[tuple[Callable[[], bytes], Sequence[str]]], max_pixels: int) -> bytes:
    """Make a PNG of up to SHEET_ITEMS images with lines of text below.

    :param items: a function that returns the bytes or raises ImageGone, and the lines.
    """
    import PIL.Image
    import PIL.ImageDraw

    shown = items[:SHEET_ITEMS]
    columns = min(SHEET_COLUMNS, max(1, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    width, height = SHEET_PIXELS + 8, SHEET_PIXELS + 8 + _LINES * _LINE_PIXELS
    sheet = PIL.Image.new("RGB", (columns * width, rows * height), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for position, (read, lines) in enumerate(shown):
        left, top = position % columns * width + 4, position // columns * height + 4
        small: PIL.Image.Image | None = None
        try:
            small = _decode_small(read(), SHEET_PIXELS, max_pixels)
        except (BadInput, ImageGone) as error:
            log.info("an image of a contact sheet cannot be shown: %s", error)
        if small is None:
            draw.rectangle((left, top, left + SHEET_PIXELS, top + SHEET_PIXELS), fill=_GREY)
        else:
            sheet.paste(small, (left + (SHEET_PIXELS - small.width) // 2, top + (SHEET_PIXELS - small.height) // 2))
        for line, text in enumerate(lines[:_LINES]):
            draw.text((left, top + SHEET_PIXELS + line * _LINE_PIXELS), _truncate(text), fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _truncate(text: str) -> str:
    """Cut a line to the width of an image; the font has Latin letters only."""
    plain = text.encode("latin-1", "replace").decode("latin-1").replace("\n", " ")
    return plain if len(plain) <= 21 else plain[:20] + "~"


def _decode_small(data: bytes, size: int, max_pixels: int) -> PIL.Image.Image:
    read_header(data, max_pixels)
    import PIL.Image
    import PIL.ImageOps

    try:
        with PIL.Image.open(io.BytesIO(data), formats=tuple(MEDIA_TYPES)) as image:
            if image.width * image.height > max_pixels:
                raise BrokenImage("The image is larger than its header says.")
            image.draft("RGB", (2 * size, 2 * size))
            plain: PIL.Image.Image = image
            if image.mode.startswith("I"):  # 16 bits
                plain = image.convert("I").point(lambda value: value / 256).convert("L")
            plain.thumbnail((size, size), PIL.Image.Resampling.BILINEAR)
            upright = PIL.ImageOps.exif_transpose(plain)
            if upright.mode in ("LA", "PA", "RGBA", "P"):
                upright = upright.convert("RGBA")
                white = PIL.Image.new("RGBA", upright.size, "white")
                upright = PIL.Image.alpha_composite(white, upright)
            return upright.convert("RGB")
    except BadInput:
        raise
    except Exception as error:  # decoders raise anything for damaged files
        raise BrokenImage(f"The image cannot be decoded ({type(error).__name__}).") from error

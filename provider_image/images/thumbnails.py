"""Thumbnails: of one image, and a contact sheet of many with a label below each.

Called in decoder processes for the server.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from provider_image.errors import BadInput
from provider_image.images.decoding import decode_to_fit

#: Images on one sheet, images per row, and their size.
SHEET_ITEMS, SHEET_COLUMNS, SHEET_PIXELS = 100, 10, 128
_LINE_PIXELS = 14
_LINES = 2
_GREY = (221, 221, 221)


def thumbnail(data: bytes, side: int) -> bytes:
    """Make a JPEG that fits into a square of `side` pixels, turned upright, with its proportions.

    :raises BadInput: it cannot be decoded.
    """
    import PIL.JpegImagePlugin  # so that Pillow does not import all plugins to find it

    buffer = io.BytesIO()
    decode_to_fit(data, side).save(buffer, PIL.JpegImagePlugin.JpegImageFile.format, quality=82)
    return buffer.getvalue()


def draw_sheet(cells: Sequence[tuple[bytes | None, Sequence[str]]]) -> bytes:
    """Make a PNG of up to SHEET_ITEMS images with lines of text below.

    :param cells: a thumbnail, or None for a grey square, and the lines.
    """
    import PIL.Image
    import PIL.ImageDraw
    import PIL.PngImagePlugin

    shown = cells[:SHEET_ITEMS]
    columns = min(SHEET_COLUMNS, max(1, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    width, height = SHEET_PIXELS + 8, SHEET_PIXELS + 8 + _LINES * _LINE_PIXELS
    sheet = PIL.Image.new("RGB", (columns * width, rows * height), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for position, (data, lines) in enumerate(shown):
        left, top = position % columns * width + 4, position // columns * height + 4
        small: PIL.Image.Image | None = None
        if data is not None:
            try:
                small = decode_to_fit(data, SHEET_PIXELS)
            except BadInput:  # a damaged file of a thumbnail
                small = None
        if small is None:
            draw.rectangle((left, top, left + SHEET_PIXELS, top + SHEET_PIXELS), fill=_GREY)
        else:
            sheet.paste(small, (left + (SHEET_PIXELS - small.width) // 2, top + (SHEET_PIXELS - small.height) // 2))
        for line, text in enumerate(lines[:_LINES]):
            draw.text((left, top + SHEET_PIXELS + line * _LINE_PIXELS), _truncate(text), fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, PIL.PngImagePlugin.PngImageFile.format)
    return buffer.getvalue()


def _truncate(text: str) -> str:
    """Cut a line to the width of an image; the font has Latin letters only."""
    plain = text.encode("latin-1", "replace").decode("latin-1").replace("\n", " ")
    return plain if len(plain) <= 21 else plain[:20] + "~"

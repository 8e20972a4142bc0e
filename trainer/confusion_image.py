"""The confusion matrix as an image: the shares of each class in shades of blue, with the counts.

Drawn by `figures.py` with Pillow alone. Rows are what is true, columns what was answered.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence
from typing import Any

#: Longest side of the matrix itself, in pixels, and the sizes of a cell.
_MAX_SIDE, _MAX_CELL = 2000, 56
#: Smallest cell with a count in it, and smallest with a name beside it.
_MIN_CELL_WITH_COUNT, _MIN_CELL_WITH_NAME = 26, 12
#: Most characters of a name.
_MAX_NAME = 24
_WHITE, _INK, _GREY, _GRID = (255, 255, 255), (31, 35, 40), (87, 96, 106), (208, 215, 222)
#: The colour of a share of 1; those of smaller ones are between white and this.
_FULL = (9, 80, 170)
#: Shares above this have a count in white.
_DARK = 0.55


def draw_confusion(classes: Sequence[str], confusion: Sequence[Sequence[int]]) -> bytes:
    """Draw the matrix. :param confusion: items of class i that were said to be of class j. :return: a PNG."""
    import PIL.Image
    import PIL.ImageDraw
    import PIL.ImageFont

    cell = max(2, min(_MAX_CELL, _MAX_SIDE // max(1, len(classes))))
    side = cell * len(classes)
    small: Any = PIL.ImageFont.load_default(size=min(13, max(8, cell - 2)))
    title: Any = PIL.ImageFont.load_default(size=15)
    names = [_short(name, number) for number, name in enumerate(classes, 1)] if cell >= _MIN_CELL_WITH_NAME else []
    label = max((int(small.getlength(name)) for name in names), default=0) + 12
    left, top = 34 + label, 34 + label
    image = PIL.Image.new("RGB", (max(left + side + 16, 260), top + side + 16), _WHITE)
    draw = PIL.ImageDraw.Draw(image)
    draw.text((left, 8), "answered", fill=_GREY, font=title)
    _draw_rotated(image, "true", (8, top + side), title, _GREY)
    for number, name in enumerate(names):
        middle = number * cell + cell // 2
        draw.text((left - 6, top + middle), name, fill=_INK, font=small, anchor="rm")
        _draw_rotated(image, name, (left + middle, top - 6), small, _INK, is_centred=True)
    for row, counts in enumerate(confusion):
        total = sum(counts)
        for column, count in enumerate(counts):
            share = count / total if total else 0.0
            x, y = left + column * cell, top + row * cell
            colour = tuple(round(white + (full - white) * share) for white, full in zip(_WHITE, _FULL, strict=True))
            outline = _GRID if cell >= _MIN_CELL_WITH_NAME else None
            draw.rectangle((x, y, x + cell, y + cell), fill=colour, outline=outline)
            if count and cell >= _MIN_CELL_WITH_COUNT:
                ink = _WHITE if share > _DARK else _INK
                draw.text((x + cell // 2, y + cell // 2), str(count), fill=ink, font=small, anchor="mm")
    draw.rectangle((left, top, left + side, top + side), outline=_GREY)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _short(name: str, number: int) -> str:
    """Shorten a name. Pillow's built-in font has ASCII only: accents are left out, other letters become a number.

    :param number: the place of the class in the table, from 1.
    """
    letters = [each for each in unicodedata.normalize("NFKD", name) if not unicodedata.combining(each)]
    plain = "".join(letters)
    if not plain.isascii():
        return f"#{number}"
    return plain if len(plain) <= _MAX_NAME else f"{plain[: _MAX_NAME - 3]}..."


def _draw_rotated(
    image: Any, text: str, place: tuple[int, int], font: Any, ink: tuple[int, int, int], *, is_centred: bool = False
) -> None:
    """Draw a text that reads upwards and begins at a place, or is centred on its x."""
    import PIL.Image
    import PIL.ImageDraw

    width, height = int(font.getlength(text)) + 2, int(font.size * 1.4) + 2
    line = PIL.Image.new("L", (width, height), 0)
    PIL.ImageDraw.Draw(line).text((0, height // 2), text, fill=255, font=font, anchor="lm")
    upward = line.rotate(90, expand=True)
    x, y = place
    image.paste(ink, (x - upward.width // 2 if is_centred else x, y - upward.height), upward)

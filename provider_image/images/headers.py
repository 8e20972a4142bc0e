"""The header of an image file: format, declared size, and whether the end of the file is missing.

Called by the server for every upload, some two thousand times a second, and before every decode. Must not decode or
import Pillow, so it cannot tell whether the pixels are valid. Lengths in a file are not trusted: every slice and loop
has a limit.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from provider_image.errors import BrokenImage, EmptyImage, ImageTooLarge, NotAnImage, UnsupportedFormat

#: The formats that are supported, by Pillow's names -> their media types.
MEDIA_TYPES = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
}
#: Most segments or blocks in a file; real files have some dozens.
_MAX_STEPS = 20_000
#: Called by a reader with width and height as soon as it knows them.
_SizeCheck = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageHeader:
    """The contents of a header."""

    #: One of MEDIA_TYPES.
    format: str
    #: Declared size in pixels as stored, before any rotation by an EXIF tag.
    width: int
    height: int


def read_header(data: bytes, max_pixels: int) -> ImageHeader:
    """Read format and size, and check as far as the structure shows that the file is complete.

    :param max_pixels: limit for width x height. Checked as soon as the size is known, so that a decompression bomb is
        reported as too large even when the rest of the file is missing.
    :raises BadInput: EmptyImage, UnsupportedFormat, NotAnImage, ImageTooLarge or BrokenImage.
    """
    if not data:
        raise EmptyImage()

    def check_size(width: int, height: int) -> None:
        if width * height > max_pixels:
            raise ImageTooLarge(
                f"The image declares {width} x {height} pixels; at most {max_pixels / 1e6:g} million are allowed. "
                "Scale it down and send it again."
            )

    for magic, name, reader in _READERS:
        if data.startswith(magic) and (name != "WEBP" or data[8:12] == b"WEBP"):
            if name == "TIFF" and data[8:10] == b"CR":
                raise _unsupported("Canon raw")
            try:
                width, height = reader(data, check_size)
            except (struct.error, IndexError) as error:
                raise BrokenImage(f"The {name} file is cut short. Save it again and send that file.") from error
            if width < 1 or height < 1:
                raise BrokenImage(f"The {name} file declares a size of {width} x {height} pixels.")
            return ImageHeader(format=name, width=width, height=height)
    raise _unrecognised(data)


def _cut_short(name: str) -> BrokenImage:
    return BrokenImage(f"The {name} file is cut short: its end is missing. Save it again and send that file.")


def _jpeg(data: bytes, check_size: _SizeCheck) -> tuple[int, int]:
    """Follow the segments to the frame header, then to the first scan, after which there must be an end marker.

    The EXIF segment is skipped as a whole, so that the end marker of a thumbnail in it does not count.
    """
    position, size = 2, None
    for _ in range(_MAX_STEPS):
        if data[position] != 0xFF:
            raise BrokenImage("The JPEG file is damaged: a segment does not start where it should.")
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # without a length
            position += 2
            continue
        if marker == 0xD9:
            break
        length = (data[position + 2] << 8) | data[position + 3]
        if length < 2:
            raise BrokenImage("The JPEG file is damaged: a segment has an impossible length.")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and size is None:
            if data[position + 4] != 8:
                raise _unsupported(f"{data[position + 4]}-bit JPEG")
            if marker in (0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF):
                raise _unsupported("lossless or hierarchical JPEG")
            size = struct.unpack_from(">HH", data, position + 5)
            check_size(size[1], size[0])
        if marker == 0xDA:
            if size is None:
                raise BrokenImage("The JPEG file is damaged: it has no frame header.")
            if data.rfind(b"\xff\xd9", position + 2 + length) < 0:
                raise _cut_short("JPEG")
            return size[1], size[0]
        position += 2 + length
    raise BrokenImage("The JPEG file is damaged: it has no image data.")


def _png(data: bytes, check_size: _SizeCheck) -> tuple[int, int]:
    if data[8:16] != b"\x00\x00\x00\rIHDR":
        raise BrokenImage("The PNG file is damaged: it does not start with its header.")
    width, height = struct.unpack_from(">II", data, 16)
    check_size(width, height)
    if data.rfind(b"IEND\xaeB`\x82") < 33 or data.find(b"IDAT") < 0:
        raise _cut_short("PNG")
    return width, height


def _webp(data: bytes, check_size: _SizeCheck) -> tuple[int, int]:
    width, height = _webp_size(data)
    check_size(width, height)
    if struct.unpack_from("<I", data, 4)[0] + 8 > len(data):
        raise _cut_short("WEBP")
    if data[12:16] in (b"VP8 ", b"VP8L") and 20 + struct.unpack_from("<I", data, 16)[0] > len(data):
        raise _cut_short("WEBP")
    return width, height


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X" and len(data) >= 30:
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1
    raise BrokenImage("The WEBP file is damaged: it does not start with an image.")


def _gif(data: bytes, check_size: _SizeCheck) -> tuple[int, int]:
    """Follow the blocks to the end of the first frame, the only one used. It may be larger than the declared size."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    check_size(width, height)
    position = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    has_frame = False
    for _ in range(_MAX_STEPS):
        introducer = data[position]
        if introducer == 0x2C:
            left, top, frame_width, frame_height, flags = struct.unpack_from("<HHHHB", data, position + 1)
            width, height = max(width, left + frame_width), max(height, top + frame_height)
            position += 11 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
            check_size(width, height)
            has_frame = True
        elif introducer == 0x21:
            position += 2
        else:
            break
        for _ in range(_MAX_STEPS):
            length = data[position]
            position += 1 + length
            if not length:
                break
        else:
            break
        if has_frame:
            return width, height
    raise BrokenImage("The GIF file is damaged: it has no image.")


def _bmp(data: bytes, check_size: _SizeCheck) -> tuple[int, int]:
    start, header = struct.unpack_from("<II", data, 10)
    if header == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = 0
    elif header >= 40:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
        height = abs(height)  # negative for rows that are stored from the top down
    else:
        raise BrokenImage("The BMP file is damaged: its header has an impossible length.")
    if bits not in (1, 2, 4, 8, 16, 24, 32):
        raise BrokenImage(f"The BMP file is damaged: it declares {bits} bits a pixel.")
    check_size(width, height)
    if compression in (0, 3) and width > 0:
        # The size field is wrong in many files, so the end is computed from the declared size of the image.
        if start + (width * bits + 31) // 32 * 4 * height > len(data):
            raise _cut_short("BMP")
    elif compression not in (1, 2) and width > 0:
        raise _unsupported("BMP with JPEG or PNG inside")
    return width, height


def _tiff(data: bytes, check_size: _SizeCheck) -> tuple[int, int]:
    """Read the first directory; a truncated file lacks the directory or the end of its strips."""
    order = "<" if data[:2] == b"II" else ">"
    (position,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, position)
    values: dict[int, tuple[int, int, int]] = {}
    for index in range(count):
        offset = position + 2 + 12 * index
        tag, kind, length = struct.unpack_from(order + "HHI", data, offset)
        if tag in (256, 257, 273, 279, 322, 323, 324, 325):
            values.setdefault(tag, (kind, length, offset + 8))
    size = []
    for tag in (256, 257):
        numbers = _tiff_numbers(data, order, values.get(tag), 1)
        if not numbers:
            raise BrokenImage("The TIFF file is damaged: it does not declare its size.")
        size.append(numbers[0])
    check_size(size[0], size[1])
    # A tile is decoded as a whole, however small the declared image.
    check_size(*(max(_tiff_numbers(data, order, values.get(tag), 1), default=0) for tag in (322, 323)))
    for starts, lengths in ((273, 279), (324, 325)):
        if starts in values and lengths in values:
            ends = zip(
                _tiff_numbers(data, order, values[starts], _MAX_STEPS),
                _tiff_numbers(data, order, values[lengths], _MAX_STEPS),
                strict=False,
            )
            if max((start + length for start, length in ends), default=0) > len(data):
                raise _cut_short("TIFF")
    return size[0], size[1]


def _tiff_numbers(data: bytes, order: str, entry: tuple[int, int, int] | None, max_count: int) -> tuple[int, ...]:
    if entry is None or entry[0] not in (3, 4) or not 0 < entry[1] <= max_count:
        return ()
    kind, length, offset = entry
    width = 2 if kind == 3 else 4
    if width * length > 4:
        (offset,) = struct.unpack_from(order + "I", data, offset)
    return struct.unpack_from(f"{order}{length}{'H' if kind == 3 else 'I'}", data, offset)


_READERS: tuple[tuple[bytes, str, Callable[[bytes, _SizeCheck], tuple[int, int]]], ...] = (
    (b"\xff\xd8\xff", "JPEG", _jpeg),
    (b"\x89PNG\r\n\x1a\n", "PNG", _png),
    (b"RIFF", "WEBP", _webp),
    (b"GIF87a", "GIF", _gif),
    (b"GIF89a", "GIF", _gif),
    (b"BM", "BMP", _bmp),
    (b"II*\x00", "TIFF", _tiff),
    (b"MM\x00*", "TIFF", _tiff),
)

#: Unsupported formats that error messages name: (offset, magic, name).
_UNSUPPORTED_FORMATS = (
    (0, b"%PDF-", "PDF"),
    (0, b"8BPS", "PSD"),
    (0, b"\x00\x00\x01\x00", "ICO"),
    (0, b"\x00\x00\x02\x00", "CUR"),
    (0, b"II+\x00", "BigTIFF"),
    (0, b"MM\x00+", "BigTIFF"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (0, b"gimp xcf", "XCF"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"DDS ", "DDS"),
    (0, b"qoif", "QOI"),
    (0, b"icns", "ICNS"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"P4\n", "PBM"),
    (0, b"P5\n", "PGM"),
    (0, b"P6\n", "PPM"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftypmsf1", "HEIF"),
    (4, b"ftypcrx", "Canon raw"),
    (4, b"ftyp", "video (MP4 or MOV)"),
)


def _unsupported(name: str) -> UnsupportedFormat:
    return UnsupportedFormat(f"{name} is not supported. Send JPEG, PNG, WebP, GIF, BMP or TIFF.")


def _unrecognised(data: bytes) -> UnsupportedFormat | NotAnImage:
    for offset, magic, name in _UNSUPPORTED_FORMATS:
        if data.startswith(magic, offset):
            return _unsupported(name)
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"<svg") or (start.startswith((b"<?xml", b"<!doctype svg", b"<!--")) and b"<svg" in start):
        return _unsupported("SVG")
    return NotAnImage()

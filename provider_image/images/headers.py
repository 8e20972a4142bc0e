"""The header of an image file: format, declared size, whether its end is missing, and what decoding it would cost.

Called by the server for every upload, some two thousand times a second, and before every decode. Must not decode or
import Pillow, so it cannot tell whether the pixels are valid. Lengths in a file are not trusted: every slice and loop
has a limit. What passes here needs at most MAX_DECODING_BYTES beside its file, and not more time than an honest image
of the largest size, whatever is in it.
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
#: Most pixels of an image; Pillow has four bytes for each one, so 36 million in colour are 137 MB.
MAX_PIXELS = 36_000_000
#: Most pixels on a side: the limit of JPEG. Longer rows would make the first step of resizing large.
MAX_SIDE = 65_535
#: Most memory that decoding may take: the pixels, and the buffers of the decoder. What remains of 200 MB is for the
#: parts of an image that are converted at a time, and for metadata.
MAX_DECODING_BYTES = 186 * 1024 * 1024
#: Most scans of a JPEG, and most pixels of all of them: each scan takes the time of a pass over the image, however few
#: bytes it has. Usual are 10.
MAX_SCANS, MAX_SCANNED_PIXELS = 100, 720_000_000
#: Most bytes of the pixels of a PNG, half of them if it is interlaced, and its channels by its type of colour.
_MAX_PNG_BYTES, _PNG_CHANNELS = 200_000_000, {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
#: Most pixels and bytes of a run-length coded BMP, which Pillow decodes in Python.
_MAX_RLE = 2_000_000
#: Most bytes before the first frame of a GIF, which Pillow reads in Python, and most blocks of that frame.
_MAX_GIF_START, _MAX_GIF_BLOCKS = 1024 * 1024, 300_000
#: Most segments or blocks in a file; real files have some dozens.
_MAX_STEPS = 20_000
#: Most segments of EXIF data in a JPEG, which are joined one by one, and most entries in a directory of a TIFF.
_MAX_EXIF_SEGMENTS, _MAX_ENTRIES = 64, 4096
#: The compressions of TIFF: none, three of CCITT, LZW, JPEG, two numbers of deflate, and PackBits.
_TIFF_COMPRESSIONS = (1, 2, 3, 4, 5, 7, 8, 32946, 32773)
#: Called by a reader with width and height as soon as it knows them.
_SizeCheck = Callable[[int, int], None]
#: What a reader returns: width, height and `ImageHeader.buffer_bytes`.
_Facts = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageHeader:
    """The contents of a header."""

    #: One of MEDIA_TYPES.
    format: str
    #: Declared size in pixels as stored, before any rotation by an EXIF tag.
    width: int
    height: int
    #: Memory that the decoder takes beside the decoded pixels, at most.
    buffer_bytes: int


def read_header(
    data: bytes, max_pixels: int, *, max_decoding_bytes: float = MAX_DECODING_BYTES, max_side: float = MAX_SIDE
) -> ImageHeader:
    """Read format and size, and check as far as the structure shows that the file is complete.

    :param max_pixels: limit for width x height. Checked as soon as the size is known, so that a decompression bomb is
        reported as too large even when the rest of the file is missing.
    :param max_decoding_bytes, max_side: math.inf for an image that is not decoded here.
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
        if max(width, height) > max_side:
            raise ImageTooLarge(
                f"The image declares {width} x {height} pixels; at most {max_side} are allowed on a side. "
                "Cut it into parts and send them one by one."
            )

    for magic, name, reader in _READERS:
        if data.startswith(magic) and (name != "WEBP" or data[8:12] == b"WEBP"):
            if name == "TIFF" and data[8:10] == b"CR":
                raise _unsupported("Canon raw")
            try:
                width, height, buffer_bytes = reader(data, check_size)
            except (struct.error, IndexError) as error:
                raise BrokenImage(f"The {name} file is cut short. Save it again and send that file.") from error
            if width < 1 or height < 1:
                raise BrokenImage(f"The {name} file declares a size of {width} x {height} pixels.")
            # A JPEG can be decoded at half its size, which takes a quarter of the memory.
            needed = buffer_bytes + width * height * (1 if name == "JPEG" else 4)
            if needed > max_decoding_bytes:
                raise ImageTooLarge(
                    f"Decoding the {name} image of {width} x {height} pixels would take {needed / 2**20:.0f} MB; "
                    f"at most {max_decoding_bytes / 2**20:.0f} MB are allowed. Scale it down, or save it as an "
                    "ordinary JPEG (not progressive)."
                )
            return ImageHeader(format=name, width=width, height=height, buffer_bytes=buffer_bytes)
    raise _unrecognised(data)


def media_type(data: bytes) -> str:
    """Return the media type of an image by its first bytes. :raises BadInput: UnsupportedFormat or NotAnImage."""
    for magic, name, _ in _READERS:
        if data.startswith(magic) and (name != "WEBP" or data[8:12] == b"WEBP"):
            return MEDIA_TYPES[name]
    raise _unrecognised(data)


def _cut_short(name: str) -> BrokenImage:
    return BrokenImage(f"The {name} file is cut short: its end is missing. Save it again and send that file.")


def _jpeg(data: bytes, check_size: _SizeCheck) -> _Facts:
    """Follow the segments to the frame header, then to the first scan, after which there must be an end marker.

    The EXIF segment is skipped as a whole, so that the end marker of a thumbnail in it does not count. A JPEG of
    several scans, progressive or not, is decoded to coefficients first, two bytes each.
    """
    position, size, components, coefficient_bytes, is_progressive = 2, None, 0, 0, False
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
            if marker not in (0xC0, 0xC1, 0xC2):
                raise _unsupported("lossless, hierarchical or arithmetic JPEG")
            size = struct.unpack_from(">HH", data, position + 5)
            check_size(size[1], size[0])
            is_progressive, components = marker == 0xC2, data[position + 9]
            coefficient_bytes = _coefficient_bytes(
                size[1], size[0], data[position + 10 : position + 10 + 3 * components]
            )
        if marker == 0xDA:
            if size is None:
                raise BrokenImage("The JPEG file is damaged: it has no frame header.")
            if data.rfind(b"\xff\xd9", position + 2 + length) < 0:
                raise _cut_short("JPEG")
            if data.count(b"Exif\0\0", 0, position) > _MAX_EXIF_SEGMENTS:
                raise BrokenImage("The JPEG file is damaged: it has too many segments of EXIF data.")
            if not is_progressive and data[position + 4] == components:
                return size[1], size[0], 0
            _check_scans(size[1], size[0], data.count(b"\xff\xda\0", position))
            return size[1], size[0], coefficient_bytes
        position += 2 + length
    raise BrokenImage("The JPEG file is damaged: it has no image data.")


def _coefficient_bytes(width: int, height: int, components: bytes) -> int:
    """Return the size of all coefficients. :param components: three bytes each; the second has the sampling factors."""
    factors = [(sampling >> 4, sampling & 15) for sampling in components[1::3]]
    across, down = (max((one[axis] for one in factors), default=0) * 8 for axis in (0, 1))
    if not across or not down:
        raise BrokenImage("The JPEG file is damaged: its components have no size.")
    blocks = -(-width // across) * -(-height // down) * sum(one[0] * one[1] for one in factors)
    return blocks * 64 * 2


def _check_scans(width: int, height: int, scans: int) -> None:
    allowed = min(MAX_SCANS, MAX_SCANNED_PIXELS // max(1, width * height))
    if scans > allowed:
        raise ImageTooLarge(
            f"The JPEG of {width} x {height} pixels has {scans} scans; at most {allowed} are allowed. "
            "Save it as an ordinary JPEG (not progressive) and send that file."
        )


def _png(data: bytes, check_size: _SizeCheck) -> _Facts:
    if data[8:16] != b"\x00\x00\x00\rIHDR":
        raise BrokenImage("The PNG file is damaged: it does not start with its header.")
    width, height = struct.unpack_from(">II", data, 16)
    check_size(width, height)
    if data.rfind(b"IEND\xaeB`\x82") < 33 or data.find(b"IDAT") < 0:
        raise _cut_short("PNG")
    stored_bytes = width * height * _PNG_CHANNELS.get(data[25], 4) * data[24] // 8
    if stored_bytes * (2 if data[28] else 1) > _MAX_PNG_BYTES:
        raise ImageTooLarge(
            f"The PNG has {stored_bytes / 1e6:.0f} million bytes of pixels; at most {_MAX_PNG_BYTES / 1e6:g} million "
            "are allowed, half as many if it is interlaced. Scale it down, or save it with 8 bits."
        )
    position = 8
    for _ in range(_MAX_STEPS):  # Pillow reads chunk by chunk in Python
        if data[position + 4 : position + 8] == b"IEND":
            return width, height, 0
        position += 12 + struct.unpack_from(">I", data, position)[0]
    raise BrokenImage("The PNG file is damaged: it has too many chunks.")


def _webp(data: bytes, check_size: _SizeCheck) -> _Facts:
    width, height = _webp_size(data)
    check_size(width, height)
    if struct.unpack_from("<I", data, 4)[0] + 8 > len(data):
        raise _cut_short("WEBP")
    if data[12:16] in (b"VP8 ", b"VP8L") and 20 + struct.unpack_from("<I", data, 16)[0] > len(data):
        raise _cut_short("WEBP")
    # Pillow copies the file twice, and uses the decoder of animations, which has two canvases.
    return width, height, 2 * 4 * width * height + 2 * len(data)


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


def _gif(data: bytes, check_size: _SizeCheck) -> _Facts:
    """Follow the blocks to the end of the first frame, the only one used. It may be larger than the declared size."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    check_size(width, height)
    position = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    has_frame = False
    while position < _MAX_GIF_START:
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
        for _ in range(_MAX_GIF_BLOCKS):
            length = data[position]
            position += 1 + length
            if not length:
                break
        else:
            break
        if has_frame:
            return width, height, 0
    raise BrokenImage("The GIF file is damaged: it has no image.")


def _bmp(data: bytes, check_size: _SizeCheck) -> _Facts:
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
    elif max(width * height, len(data)) > _MAX_RLE:
        raise ImageTooLarge(
            f"A run-length coded BMP may have at most {_MAX_RLE / 1e6:g} million pixels and bytes. Save it as PNG."
        )
    return width, height, 0


def _tiff(data: bytes, check_size: _SizeCheck) -> _Facts:
    """Read the first directory; a truncated file lacks the directory or the end of its strips."""
    order = "<" if data[:2] == b"II" else ">"
    (position,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, position)
    if count > _MAX_ENTRIES:
        raise BrokenImage("The TIFF file is damaged: its directory has too many entries.")
    values: dict[int, tuple[int, int, int]] = {}
    for index in range(count):
        offset = position + 2 + 12 * index
        tag, kind, length = struct.unpack_from(order + "HHI", data, offset)
        values.setdefault(tag, (kind, length, offset + 8))

    def number(tag: int, default: int, most: int = 1) -> int:
        return max(_tiff_numbers(data, order, values.get(tag), most), default=default)

    width, height = number(256, -1), number(257, -1)
    if min(width, height) < 0:
        raise BrokenImage("The TIFF file is damaged: it does not declare its size.")
    check_size(width, height)
    # A tile is decoded as a whole, however small the declared image, and so is every tile at the image's edge.
    tile_width, tile_height = number(322, 0), number(323, 0)
    check_size(tile_width, tile_height)
    if tile_width and tile_height:
        padded = -(-width // tile_width) * tile_width, -(-height // tile_height) * tile_height
        if padded[0] * padded[1] > 2 * width * height:
            check_size(*padded)
    compression, is_jpeg = number(259, 1), number(259, 1) == 7
    if compression not in _TIFF_COMPRESSIONS:
        raise _unsupported(f"TIFF with the compression {compression}")
    part = tile_width * tile_height or width * min(height, number(278, height))
    for starts, lengths in ((273, 279), (324, 325)):
        if starts in values and lengths in values:
            sizes = _tiff_numbers(data, order, values[lengths], _MAX_STEPS)
            ends = map(sum, zip(_tiff_numbers(data, order, values[starts], _MAX_STEPS), sizes, strict=False))
            if max(ends, default=0) > len(data):
                raise _cut_short("TIFF")
            if is_jpeg and not 0 < sum(sizes) <= len(data):
                raise BrokenImage("The TIFF file is damaged: parts of it have the same bytes.")
    if is_jpeg and data.count(b"\xff\xda\0") * part > MAX_SCANNED_PIXELS:
        raise ImageTooLarge("The TIFF has too many scans of JPEG. Save it as an ordinary JPEG and send that file.")
    # libtiff decodes a strip or tile at a time, YCbCr to four bytes a pixel.
    part_bytes = part * (4 if is_jpeg or number(262, 0) == 6 else max(1, number(277, 1) * number(258, 1, 16) // 8))
    turning_bytes = 4 * width * height if number(274, 1) != 1 else 0  # Pillow turns it as a whole
    return width, height, turning_bytes + (0 if compression == 1 else part_bytes)


def _tiff_numbers(data: bytes, order: str, entry: tuple[int, int, int] | None, max_count: int) -> tuple[int, ...]:
    if entry is None or entry[0] not in (3, 4) or not 0 < entry[1] <= max_count:
        return ()
    kind, length, offset = entry
    width = 2 if kind == 3 else 4
    if width * length > 4:
        (offset,) = struct.unpack_from(order + "I", data, offset)
    return struct.unpack_from(f"{order}{length}{'H' if kind == 3 else 'I'}", data, offset)


_READERS: tuple[tuple[bytes, str, Callable[[bytes, _SizeCheck], _Facts]], ...] = (
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

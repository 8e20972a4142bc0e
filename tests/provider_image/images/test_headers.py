"""The check of headers recognises formats, reads sizes and detects missing ends, all within microseconds."""

import io
import struct
import time
import zlib

import pytest
from PIL import Image

from provider_image.errors import (
    BadInput,
    BrokenImage,
    EmptyImage,
    ImageTooLarge,
    NotAnImage,
    UnsupportedFormat,
)
from provider_image.images.decoding import MAX_PIXELS
from provider_image.images.headers import MEDIA_TYPES, media_type, read_header
from tests.provider_image.conftest import encode_image
from tests.timing import cpu_slowness

GRADIENT = Image.linear_gradient("L").resize((40, 30)).convert("RGB")

EXIF = Image.Exif()
EXIF[0x0112] = 1


def images_by_format() -> dict[str, bytes]:
    """A 40 x 30 image in every format, and in unusual variants of some."""
    return {
        "JPEG": encode_image(GRADIENT, "JPEG"),
        "JPEG progressive": encode_image(GRADIENT, "JPEG", progressive=True),
        "PNG": encode_image(GRADIENT, "PNG"),
        "WEBP": encode_image(GRADIENT, "WEBP"),
        "WEBP lossless": encode_image(GRADIENT, "WEBP", lossless=True),
        "WEBP extended": encode_image(GRADIENT, "WEBP", exif=EXIF),
        "WEBP animated": encode_image(GRADIENT, "WEBP", save_all=True, append_images=[GRADIENT.rotate(90)]),
        "GIF": encode_image(GRADIENT, "GIF"),
        "GIF animated": encode_image(GRADIENT, "GIF", save_all=True, append_images=[GRADIENT.rotate(90)]),
        "BMP": encode_image(GRADIENT, "BMP"),
        "BMP palette": encode_image(GRADIENT.convert("P"), "BMP"),
        "TIFF": encode_image(GRADIENT, "TIFF"),
        "TIFF deflate": encode_image(GRADIENT, "TIFF", compression="tiff_adobe_deflate"),
    }


@pytest.mark.parametrize("name", images_by_format())
def test_format_and_size_are_read(name):
    facts = read_header(images_by_format()[name], MAX_PIXELS)

    assert (facts.format, facts.width, facts.height) == (name.split()[0], 40, 30)
    assert facts.format in MEDIA_TYPES


@pytest.mark.parametrize("name", images_by_format())
def test_no_cut_makes_anything_but_a_refusal(name):
    data = images_by_format()[name]

    outcomes = {"whole": 0, "refused": 0}
    for length in range(len(data)):
        try:
            read_header(data[:length], MAX_PIXELS)
            outcomes["whole"] += 1
        except BadInput:
            outcomes["refused"] += 1

    # What follows the first frame, or the last byte of padding, may be missing.
    assert outcomes["refused"] > 0 if "animated" in name else outcomes["whole"] <= 160


@pytest.mark.parametrize("name", images_by_format())
def test_damaged_bytes_never_make_another_error(name):
    data = images_by_format()[name]

    for position in range(min(len(data), 400)):
        for value in (0, 0x7F, 0xFF):
            damaged = data[:position] + bytes([value]) + data[position + 1 :]
            try:
                read_header(damaged, MAX_PIXELS)
            except BadInput as error:
                assert error.reason


def test_empty_upload_is_empty():
    with pytest.raises(EmptyImage):
        read_header(b"", MAX_PIXELS)


@pytest.mark.parametrize("data", [b"hello, I am text\n" * 50, b"\x00" * 100, b"<html><svg", b"RIFF\x10\0\0\0WAVEfmt "])
def test_what_is_no_image_is_told_so(data):
    with pytest.raises(NotAnImage):
        read_header(data, MAX_PIXELS)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"%PDF-1.7", "PDF"),
        (b"8BPS\x00\x01", "PSD"),
        (b"\x00\x00\x01\x00\x01\x00", "ICO"),
        (b"\x00\x00\x00\x18ftypheic", "HEIC"),
        (b"\x00\x00\x00\x18ftypavif", "AVIF"),
        (b'<?xml version="1.0"?>\n<!-- x -->\n<svg xmlns="', "SVG"),
        (b"  <svg>", "SVG"),
        (b"II*\x00\x10\x00\x00\x00CR\x02\x00", "Canon raw"),
        (b"\xff\x0a", "JPEG XL"),
        (b"P6\n2 2\n", "PPM"),
    ],
)
def test_format_that_is_not_taken_is_named(start, name):
    with pytest.raises(UnsupportedFormat, match=name):
        read_header(start + b"\x00" * 100, MAX_PIXELS)


def test_twelve_bit_jpeg_is_named():
    data = bytearray(encode_image(GRADIENT, "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12

    with pytest.raises(UnsupportedFormat, match="12-bit"):
        read_header(bytes(data), MAX_PIXELS)


def bombs() -> dict[str, bytes]:
    """Small files that declare 50,000 x 50,000 pixels."""
    side = 50_000
    jpeg = bytearray(encode_image(GRADIENT, "JPEG"))
    struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc0") + 5, side, side)
    png = bytearray(encode_image(GRADIENT, "PNG"))
    struct.pack_into(">II", png, 16, side, side)
    webp = bytearray(encode_image(GRADIENT, "WEBP", exif=EXIF))
    webp[24:30] = (side - 1).to_bytes(3, "little") * 2
    gif = bytearray(encode_image(GRADIENT, "GIF"))
    struct.pack_into("<HH", gif, 6, side, side)
    frame = bytearray(encode_image(GRADIENT, "GIF"))
    struct.pack_into("<HH", frame, frame.index(b"\x2c", 13 + 3) + 5, side, side)
    bmp = bytearray(encode_image(GRADIENT, "BMP"))
    struct.pack_into("<ii", bmp, 18, side, -side)
    tiff = encode_image(GRADIENT, "TIFF")
    tiff = tiff.replace(struct.pack("<HHIHH", 256, 4, 1, 40, 0), struct.pack("<HHII", 256, 4, 1, side))
    tiff = tiff.replace(struct.pack("<HHIHH", 257, 4, 1, 30, 0), struct.pack("<HHII", 257, 4, 1, side))
    return {
        "JPEG": bytes(jpeg),
        "PNG": bytes(png),
        "WEBP": bytes(webp),
        "GIF": bytes(gif),
        "GIF without any frame": b"GIF89a" + struct.pack("<HHBBB", side, side, 0, 0, 0) + b";",
        "BMP": bytes(bmp),
        "TIFF": tiff,
    }


@pytest.mark.parametrize("name", bombs())
def test_bomb_is_refused_by_its_header(name):
    with pytest.raises(ImageTooLarge, match=r"50000 x 50000 pixels; at most 36 million"):
        read_header(bombs()[name], MAX_PIXELS)


def test_gif_frame_larger_than_its_screen_counts():
    palette = bytes(6)
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 50_000, 50_000, 0) + b"\x02\x02\x4c\x01\x00;"

    with pytest.raises(ImageTooLarge):
        read_header(b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + palette + frame, MAX_PIXELS)


def test_tile_of_a_tiny_tiff_counts():
    entries = [(256, 4, 10), (257, 4, 10), (322, 4, 60_000), (323, 4, 60_000)]
    data = b"II*\x00\x08\x00\x00\x00" + struct.pack("<H", len(entries))
    data += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries) + bytes(4)

    with pytest.raises(ImageTooLarge):
        read_header(data, MAX_PIXELS)


def test_limit_itself_is_taken():
    data = encode_image(GRADIENT, "PNG")

    assert read_header(data, 40 * 30).width == 40
    with pytest.raises(ImageTooLarge):
        read_header(data, 40 * 30 - 1)


def test_end_of_an_exif_thumbnail_does_not_pass_for_the_end(photos):
    thumbnail = encode_image(GRADIENT, "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", 2 + len(thumbnail)) + thumbnail
    whole = photos["coffee"][:2] + segment + photos["coffee"][2:]

    assert read_header(whole, MAX_PIXELS).width == 600
    with pytest.raises(BrokenImage, match="cut short"):
        read_header(whole[: len(whole) // 2], MAX_PIXELS)


def test_size_zero_is_broken():
    gif = b"GIF89a" + struct.pack("<HHBBB", 0, 0, 0, 0, 0) + b"\x2c" + bytes(9) + b"\x02\x02\x4c\x01\x00;"

    with pytest.raises(BrokenImage, match="0 x 0"):
        read_header(gif, MAX_PIXELS)


def test_jpeg_of_tiny_segments_is_given_up():
    with pytest.raises(BrokenImage):
        read_header(b"\xff\xd8" + b"\xff\xe0\x00\x02" * 500_000, MAX_PIXELS)


def test_check_of_an_ordinary_upload_takes_microseconds():
    image = Image.effect_noise((800, 600), 60).convert("RGB")
    data = next(d for q in range(90, 10, -2) if len(d := encode_image(image, "JPEG", quality=q)) < 120_000)
    assert len(data) > 100_000

    started = time.thread_time()
    for _ in range(200):
        read_header(data, MAX_PIXELS)

    assert (time.thread_time() - started) / 200 < 150e-6 * cpu_slowness()


def test_pillow_agrees_about_sizes():
    for data in images_by_format().values():
        with Image.open(io.BytesIO(data)) as image:
            facts = read_header(data, MAX_PIXELS)

            assert image.size == (facts.width, facts.height)


def progressive(extra_scans: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A progressive JPEG whose last scan, some bytes long, is repeated."""
    data = encode_image(Image.new("L", size, 100), "JPEG", progressive=True)
    tables = data.rfind(b"\xff\xc4", 0, data.rfind(b"\xff\xda"))
    return data[:-2] + data[tables:-2] * extra_scans + b"\xff\xd9"


def test_scans_of_a_progressive_jpeg_are_limited():
    usual = encode_image(GRADIENT, "JPEG", progressive=True).count(b"\xff\xda")

    assert 6 <= usual <= 12  # libjpeg writes 10 for colour and 6 for grey
    assert read_header(progressive(90), MAX_PIXELS).format == "JPEG"
    for extra in (100, 300, 24_800):
        with pytest.raises(ImageTooLarge, match="scans; at most 100"):
            read_header(progressive(extra), MAX_PIXELS)


def test_fewer_scans_are_allowed_in_larger_images():
    data = bytearray(progressive(25))
    read_header(bytes(data), MAX_PIXELS)
    struct.pack_into(">HH", data, data.index(b"\xff\xc2") + 5, 6000, 6000)

    with pytest.raises(ImageTooLarge, match="at most 20"):
        read_header(bytes(data), MAX_PIXELS)


def test_scans_of_single_components_are_limited_without_progression_too():
    data = encode_image(GRADIENT, "JPEG")
    scan = data.index(b"\xff\xda")
    one = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"  # of the first component only

    read_header(data[:scan] + one * 3 + data[scan:], MAX_PIXELS)
    with pytest.raises(ImageTooLarge, match="scans"):
        read_header(data[:scan] + one * 300 + data[scan:], MAX_PIXELS)


def test_arithmetic_jpeg_is_named():
    data = encode_image(GRADIENT, "JPEG").replace(b"\xff\xc0", b"\xff\xc9")

    with pytest.raises(UnsupportedFormat, match="arithmetic"):
        read_header(data, MAX_PIXELS)


@pytest.mark.parametrize(
    ("format", "options", "least", "most"),
    [  # bytes a pixel, from what the decoders of Pillow 13 were seen to take
        ("JPEG", {}, 0, 0),
        ("JPEG", {"progressive": True, "subsampling": 0}, 6, 6.5),
        ("JPEG", {"progressive": True, "subsampling": 2}, 3, 3.5),
        ("WEBP", {}, 8, 9),
        ("PNG", {}, 0, 0),
        ("TIFF", {}, 0, 0),
        ("TIFF", {"compression": "tiff_lzw", "strip_size": 10**9}, 3, 3),
        ("TIFF", {"tiffinfo": {274: 6}}, 4, 4),
    ],
)
def test_memory_of_decoders_is_told(format, options, least, most):
    data = encode_image(Image.effect_noise((400, 300), 9).convert("RGB"), format, **options)

    file = 2 * len(data) if format == "WEBP" else 0
    assert least <= (read_header(data, MAX_PIXELS).buffer_bytes - file) / (400 * 300) <= most


def test_image_that_needs_too_much_memory_is_refused_by_its_header():
    data = bytearray(encode_image(GRADIENT, "JPEG", progressive=True, subsampling=0))
    struct.pack_into(">HH", data, data.index(b"\xff\xc2") + 5, 6000, 6000)
    webp = bytearray(encode_image(GRADIENT, "WEBP", exif=EXIF))
    webp[24:30] = (5999).to_bytes(3, "little") * 2

    for each in (data, webp):
        with pytest.raises(ImageTooLarge, match=r"6000 x 6000 pixels would take \d+ MB"):
            read_header(bytes(each), MAX_PIXELS)


def test_sides_are_limited():
    png = bytearray(encode_image(GRADIENT, "PNG"))
    struct.pack_into(">II", png, 16, 1, 36_000_000)

    with pytest.raises(ImageTooLarge, match="65535"):
        read_header(bytes(png), MAX_PIXELS)


def png_chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_png_of_tiny_chunks_is_given_up():
    data = encode_image(GRADIENT, "PNG")

    read_header(data[:33] + png_chunk(b"teSt") * 10_000 + data[33:], MAX_PIXELS)
    with pytest.raises(BrokenImage, match="too many chunks"):
        read_header(data[:33] + png_chunk(b"teSt") * 30_000 + data[33:], MAX_PIXELS)


@pytest.mark.parametrize(
    ("side", "bits", "colour", "is_interlaced", "is_accepted"),
    [
        (6000, 8, 6, False, True),
        (5700, 8, 2, True, True),
        (6000, 8, 2, True, False),
        (5000, 16, 6, False, True),
        (5100, 16, 6, False, False),
        (6000, 16, 0, True, True),
    ],
)
def test_bytes_of_the_pixels_of_a_png_are_limited(side, bits, colour, is_interlaced, is_accepted):
    header = struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, is_interlaced)
    parts = [png_chunk(b"IHDR", header), png_chunk(b"IDAT"), png_chunk(b"IEND")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(parts)

    if is_accepted:
        assert read_header(data, MAX_PIXELS).width == side
    else:
        with pytest.raises(ImageTooLarge, match="200 million"):
            read_header(data, MAX_PIXELS)


def test_gif_of_large_frames_is_taken_and_one_of_large_comments_is_not():
    small = encode_image(GRADIENT, "GIF")
    start = small.index(b",", 13)
    blocks = (b"\xff" + bytes(255)) * 60_000 + b"\0"
    comment = b"!\xfe" + blocks

    assert read_header(small[: start + 11] + blocks + b";", MAX_PIXELS).width == 40
    with pytest.raises(BrokenImage):
        read_header(small[:start] + comment + small[start:], MAX_PIXELS)


def test_large_run_length_coded_bmp_is_refused():
    def bmp(width: int, height: int) -> bytes:
        header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 2, 0, 0, 256, 256)
        return b"BM" + struct.pack("<IHHI", 0, 0, 0, 1078) + header + bytes(1024) + b"\0\1"

    assert read_header(bmp(1000, 1000), MAX_PIXELS).width == 1000
    with pytest.raises(ImageTooLarge, match="run-length"):
        read_header(bmp(6000, 6000), MAX_PIXELS)


def tiff(**tags: int) -> bytes:
    """A TIFF that is a directory of whole numbers, by tag: {"t256": 10}."""
    entries = [(int(tag[1:]), 4, 1, value) for tag, value in tags.items()]
    data = b"II*\x00\x08\x00\x00\x00" + struct.pack("<H", len(entries))
    return data + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(300)


def test_padding_of_tiles_counts():
    with pytest.raises(ImageTooLarge, match="6000 x 60000"):
        read_header(tiff(t256=1, t257=60_000, t322=6000, t323=6000, t324=200, t325=20), MAX_PIXELS)


@pytest.mark.parametrize("compression", [34925, 50000, 50001])  # LZMA, Zstandard, WebP
def test_rare_compression_of_tiff_is_named(compression):
    with pytest.raises(UnsupportedFormat, match=str(compression)):
        read_header(tiff(t256=10, t257=10, t259=compression), MAX_PIXELS)


def test_tiff_whose_parts_of_jpeg_have_no_length_of_their_own_is_refused():
    with pytest.raises(BrokenImage, match="same bytes"):
        read_header(tiff(t256=10, t257=10, t259=7, t273=200, t279=0), MAX_PIXELS)


def test_tiff_of_many_scans_is_refused():
    data = tiff(t256=6000, t257=6000, t259=7, t273=200, t278=6000, t279=20) + b"\xff\xda\0" * 30

    with pytest.raises(ImageTooLarge, match="scans"):
        read_header(data, MAX_PIXELS)


@pytest.mark.parametrize("name", images_by_format())
def test_media_type_is_told_by_the_first_bytes(name):
    data = images_by_format()[name]

    assert media_type(data[:12]) == MEDIA_TYPES[read_header(data, MAX_PIXELS).format]
    with pytest.raises(NotAnImage):
        media_type(b"RIFF\x10\0\0\0WAVEfmt ")

"""Decoding: every format and mode becomes RGB, upright; what cannot be decoded is a BrokenImage."""

import io
import math
import struct

import numpy as np
import pytest
from PIL import Image

from provider_image.errors import BadInput, BrokenImage, ImageTooLarge, NotAnImage
from provider_image.images.decoding import MAX_PIXELS, decode, decode_to_fit
from provider_image.images.headers import read_header
from tests.provider_image.conftest import encode_image
from tests.provider_image.images.test_headers import GRADIENT, bombs, images_by_format

#: Left half red, right half blue, 64 x 32.
HALVES = Image.new("RGB", (64, 32), "red")
HALVES.paste("blue", (32, 0, 64, 32))


def whole(data: bytes) -> np.ndarray:
    """Decode to 32 x 32 without a crop."""
    return decode(data, 32, 32, None)


def level(data: bytes) -> float:
    """The mean of all pixels."""
    return float(whole(data).mean())


@pytest.mark.parametrize("name", images_by_format())
def test_every_format_decodes_to_rgb(name):
    pixels = decode(images_by_format()[name], 20, 24, 0.875)

    assert (pixels.shape, pixels.dtype) == ((20, 24, 3), np.uint8)
    assert pixels.std() > 10


@pytest.mark.parametrize("options", [{"format": "GIF"}, {"format": "WEBP", "lossless": True}, {"format": "TIFF"}])
def test_first_frame_is_used(options):
    data = encode_image(
        Image.new("RGB", (32, 32), "white"), save_all=True, append_images=[GRADIENT.resize((32, 32))], **options
    )

    assert level(data) == 255


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (HALVES.convert("P"), {"format": "PNG"}),
        (HALVES.convert("P"), {"format": "GIF"}),
        (HALVES.convert("CMYK"), {"format": "JPEG", "quality": 95}),
        (HALVES.convert("CMYK"), {"format": "TIFF"}),
        (HALVES.convert("YCbCr"), {"format": "JPEG", "quality": 95}),
        (HALVES, {"format": "BMP"}),
        (HALVES.convert("RGBA"), {"format": "PNG"}),
        (HALVES.convert("RGBA"), {"format": "WEBP", "lossless": True}),
    ],
)
def test_colours_stay_colours(image, options):
    pixels = whole(encode_image(image, **options)).astype(int)

    red, blue = pixels[16, 4], pixels[16, 28]
    assert red[0] > 200 > 60 > red[2]
    assert blue[2] > 200 > 60 > blue[0]


def test_adobes_inverted_cmyk_is_not_a_negative():
    # Pillow writes CMYK the way Adobe does, inverted and with an APP14 marker.
    data = encode_image(Image.new("CMYK", (32, 32), (0, 0, 0, 0)), "JPEG", quality=95)
    assert b"Adobe" in data

    assert level(data) > 250


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGBA", (32, 32), (0, 0, 0, 0)),
        Image.new("LA", (32, 32), (0, 0)),
    ],
)
def test_transparent_pixels_are_laid_on_white(image):
    assert level(encode_image(image, "PNG")) == 255


def test_half_transparent_pixels_are_half_white():
    assert level(encode_image(Image.new("RGBA", (32, 32), (0, 0, 0, 128)), "PNG")) == pytest.approx(127, abs=1)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_transparent_colour_of_a_palette_is_white(format):
    image = Image.new("P", (32, 32), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])

    assert level(encode_image(image, format, transparency=1)) == 255


def test_transparent_colour_of_rgb_is_white():
    assert level(encode_image(Image.new("RGB", (32, 32), (1, 2, 3)), "PNG", transparency=(1, 2, 3))) == 255


def test_transparent_value_of_sixteen_bit_grey_is_white():
    image = Image.fromarray(np.full((32, 32), 5, np.uint16))

    assert level(encode_image(image, "PNG", transparency=5)) == 255
    assert level(encode_image(image, "PNG", transparency=6)) == 0


def test_black_and_white_keeps_both():
    assert level(encode_image(Image.new("1", (32, 32), 1), "PNG")) == 255
    assert level(encode_image(Image.new("1", (32, 32), 0), "TIFF")) == 0


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(format):
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)

    pixels = whole(encode_image(Image.fromarray(ramp), format))

    assert np.abs(pixels[..., 0].astype(float) - ramp / 257).max() <= 1


def test_sixteen_bit_colour_is_scaled():
    # Pillow cannot write one, so here is the PNG by hand: 1 x 1, RGB, 16 bits.
    import zlib

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"\x00" + struct.pack(">HHH", 65535, 32768, 0))
    data = b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", rows) + part(b"IEND", b"")

    assert decode(data, 1, 1, None)[0, 0].tolist() == [255, 128, 0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.full((32, 32), 40_000, np.int32), 40_000 / 257),
        (np.full((32, 32), 200, np.int32), 200),
        (np.full((32, 32), 0.5, np.float32), 127.5),
        (np.full((32, 32), 200, np.float32), 200),
        (np.linspace(-3e6, 3e6, 1024, dtype=np.float32).reshape(32, 32), 127.5),
    ],
)
def test_thirty_two_bit_tiff_becomes_something_sensible(values, expected):
    assert level(encode_image(Image.fromarray(values), "TIFF")) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(("value", "expected"), [(-5, 0), (70_000, 255)])
def test_thirty_two_bit_tiff_of_one_value_outside_the_range_is_black_or_white(value, expected):
    assert level(encode_image(Image.fromarray(np.full((32, 32), value, np.int32)), "TIFF")) == expected
    assert level(encode_image(Image.fromarray(np.full((32, 32), value, np.float32)), "TIFF")) == expected


def test_tiff_that_is_not_finite_is_broken():
    values = np.full((32, 32), np.nan, np.float32)

    with pytest.raises(BrokenImage):
        whole(encode_image(Image.fromarray(values), "TIFF"))


def turned(format: str, orientation: int, **options) -> bytes:
    """HALVES as a camera with this orientation stores it."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose: its inverses
    stored = HALVES if orientation == 1 else HALVES.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode_image(stored, format, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "options", [{"format": "JPEG", "quality": 95}, {"format": "PNG"}, {"format": "WEBP"}, {"format": "TIFF"}]
)
def test_images_are_turned_upright(orientation, options):
    pixels = decode(turned(orientation=orientation, **options), 32, 64, None).astype(int)

    assert pixels[16, 8, 0] > 200 > 80 > pixels[16, 8, 2]
    assert pixels[16, 56, 2] > 200 > 80 > pixels[16, 56, 0]


def test_png_with_exif_data_behind_its_pixels_is_turned():
    data = turned("PNG", 6)
    start = data.index(b"eXIf") - 4
    end = start + 12 + struct.unpack_from(">I", data, start)[0]
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert moved.index(b"eXIf") > moved.index(b"IDAT")

    assert np.array_equal(decode(moved, 32, 64, None), decode(data, 32, 64, None))


def composited(image: Image.Image) -> Image.Image:
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("mode", "crop"), [("RGB", 0.5), ("RGBA", None), ("P", 0.9), ("LA", None)])
def test_bands_give_the_same_pixels_as_the_whole(orientation, mode, crop):
    # 1.3 million pixels are three bands. Noise shows any difference in the order of steps.
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1200, 1100, 4), np.uint8))
    image = noise.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    methods = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # of Image.Transpose, as Pillow's exif_transpose has them
    upright = image if orientation == 1 else image.transpose(Image.Transpose(methods[orientation]))
    side = int((crop or 1) * 1100)
    left, top = (upright.width - side + 1) // 2, (upright.height - side + 1) // 2
    box = (0, 0, *upright.size) if crop is None else (left, top, left + side, top + side)
    expected = composited(upright).resize((160, 120), Image.Resampling.BICUBIC, box=box)

    pixels = decode(encode_image(image, "PNG", exif=exif, compress_level=1), 120, 160, crop)

    assert np.array_equal(pixels, np.asarray(expected))


def test_image_that_cannot_be_converted_as_a_whole_is_turned_and_resized_alike():
    # 25 million pixels of four bytes, so that no second copy fits into the limit.
    image = Image.new("RGBA", (5600, 4500), "red")
    image.paste("blue", (0, 0, 5600, 2250))
    exif = Image.Exif()
    exif[0x0112] = 6  # the upper half is on the right when upright

    pixels = decode(encode_image(image, "PNG", exif=exif, compress_level=1), 64, 64, None)

    assert (pixels[:, :31] == [255, 0, 0]).all()
    assert (pixels[:, 33:] == [0, 0, 255]).all()


def test_image_many_times_as_high_as_wide_is_resized_in_little_memory():
    image = Image.new("RGB", (540, 65_000), "red")
    image.paste("blue", (0, 32_500, 540, 65_000))

    pixels = decode(encode_image(image, "PNG", compress_level=1), 64, 224, None)

    assert (pixels[:31] == [255, 0, 0]).all() and (pixels[33:] == [0, 0, 255]).all()


def test_progressive_jpeg_is_reduced_where_full_scale_would_take_too_much_memory():
    data = encode_image(HALVES.resize((6000, 5000)), "JPEG", progressive=True, quality=30)

    pixels = decode(data, 1600, 1600, None)  # four times that is over full scale

    assert pixels.shape == (1600, 1600, 3)
    assert pixels[800, 100, 0] > 200 > 60 > pixels[800, 100, 2]


def test_fitting_keeps_proportions_and_does_not_enlarge():
    large, small = encode_image(HALVES.resize((1000, 500)), "JPEG"), encode_image(HALVES, "PNG")

    assert decode_to_fit(large, 200).size == (200, 100)
    assert decode_to_fit(small, 200).size == (64, 32)
    assert decode_to_fit(turned("JPEG", 6), 16).size == (16, 8)
    assert decode_to_fit(encode_image(Image.new("L", (1, 3000)), "PNG"), 16).size == (1, 16)


def test_orientation_that_makes_no_sense_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 99

    assert whole(encode_image(HALVES, "JPEG", exif=exif))[16, 4, 0] > 200


@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_is_ignored():
    assert whole(encode_image(HALVES, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f rubbish"))[16, 4, 0] > 200


def test_crop_takes_the_middle():
    image = Image.new("RGB", (100, 50), "red")
    image.paste("blue", (32, 7, 68, 43))

    pixels = decode(encode_image(image, "PNG"), 36, 36, 0.72)

    assert (pixels == [0, 0, 255]).all()


def test_crop_of_one_pixel_is_possible():
    assert decode(encode_image(Image.new("RGB", (1, 1), "white"), "PNG"), 8, 8, 0.875).mean() == 255


@pytest.mark.parametrize("name", bombs())
def test_bomb_is_not_decoded(name):
    with pytest.raises(ImageTooLarge):
        whole(bombs()[name])


def test_text_is_not_decoded():
    with pytest.raises(NotAnImage):
        whole(b"this is text")


@pytest.mark.parametrize("name", ["JPEG", "JPEG progressive", "PNG", "WEBP", "GIF", "BMP", "TIFF", "TIFF deflate"])
@pytest.mark.filterwarnings("ignore")
def test_cut_or_damaged_images_are_bad_input_and_nothing_else(name):
    data = images_by_format()[name]
    random = np.random.default_rng(0)
    damaged = [data[: len(data) * part // 20] for part in range(20)]
    for _ in range(300):
        changed = bytearray(data)
        for position in random.integers(0, len(data), 3):
            changed[position] = random.integers(0, 256)
        damaged.append(bytes(changed))

    refused = 0
    for each in damaged:
        try:
            assert decode(each, 16, 16, None).shape == (16, 16, 3)
        except BadInput as error:
            refused += 1
            assert error.permanent

    assert refused >= 10


def test_invalid_pixels_in_a_valid_structure_are_a_broken_image(photos):
    data = photos["chelsea"]
    cut = data[: len(data) // 2] + b"\xff\xd9"
    png = bytearray(encode_image(GRADIENT, "PNG"))
    png[60] ^= 0xFF
    read_header(bytes(png), MAX_PIXELS)

    with pytest.raises(BrokenImage) as caught:
        whole(bytes(png))

    assert caught.value.__cause__ is not None
    assert decode(cut, 32, 32, None).shape == (32, 32, 3)  # libjpeg greys what is missing, as viewers do


def test_reduced_scale_is_for_large_jpegs_only():
    image = Image.effect_noise((2060, 2060), 60).convert("RGB")
    jpeg, png = encode_image(image, "JPEG", quality=95), encode_image(image, "PNG")

    reduced = decode(jpeg, 224, 224, 0.875)

    assert not np.array_equal(reduced, decode(jpeg, 224, 224, 0.875, margin=math.inf))
    assert np.array_equal(decode(png, 224, 224, 0.875), decode(png, 224, 224, 0.875, margin=math.inf))
    small = encode_image(image.resize((2040, 2040)), "JPEG", quality=95)
    assert np.array_equal(decode(small, 224, 224, 0.875), decode(small, 224, 224, 0.875, margin=math.inf))


@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_scale_uses_the_same_part_of_a_turned_image(photos, orientation):
    with Image.open(io.BytesIO(photos["rocket"])) as image:
        large = image.resize((2001, 1503))
    if orientation == 6:
        large = large.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode_image(large, "JPEG", quality=92, exif=exif)

    reduced = decode(data, 120, 224, None, margin=1).astype(float)
    full = decode(data, 120, 224, None, margin=math.inf).astype(float)

    assert np.sqrt(((reduced - full) ** 2).mean()) < 8  # the wrong part would differ by more than 30
    assert reduced.std() > 20


@pytest.fixture(scope="module")
def answers(models_folder):
    """Answer a photo of scikit-image's, saved as a JPEG, at the scale that is chosen and at full scale."""
    import skimage.data

    from provider_image.backends import Device
    from provider_image.models.artefact import find_artefact
    from provider_image.services import load_service

    service = load_service("classification")
    net = service.load(find_artefact(models_folder, "efficientnet_lite0"), Device(threads=2))

    def answer(name, size, quality):
        photo = Image.fromarray(getattr(skimage.data, name)()).resize(size, Image.Resampling.BICUBIC)
        data = encode_image(photo, "JPEG", quality=quality)
        items = [decode(data, 224, 224, 0.875), decode(data, 224, 224, 0.875, margin=math.inf)]
        return [output.data for output in service.run(net, items, [{}, {}])]

    return answer


PHOTOS = ["chelsea", "coffee", "rocket", "astronaut"]


@pytest.mark.parametrize("size", [(800, 600), (1707, 1280), (2048, 1536), (3000, 2000), (3000, 2250), (4000, 3000)])
@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("quality", [75, 85, 92])
def test_top_five_stay_at_reduced_scale(answers, name, size, quality):
    reduced, full = answers(name, size, quality)

    assert reduced[0][1] == full[0][1]
    assert {row[1] for row in reduced[:5]} == {row[1] for row in full[:5]}


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("quality", [75, 85, 92])
def test_at_the_smallest_scale_only_equally_probable_labels_swap(answers, name, quality):
    reduced, full = answers(name, (2731, 2048), quality)

    before = {label: probability for _, label, probability in full}
    after = {label: probability for _, label, probability in reduced}
    assert reduced[0][1] == full[0][1]
    assert all(abs(after[label] - before[label]) < 0.02 for label in list(before)[:5])
    for label in set(list(before)[:5]) - set(list(after)[:5]):
        assert before[label] - full[5][2] < 0.005

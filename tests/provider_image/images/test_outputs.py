"""Images that services return: what is accepted from a provider, and when two count as equal."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from provider_image.errors import InferenceFailed, MalformedResults
from provider_image.images.outputs import FORMAT, IMAGE_OUTPUT, check_image, compare_images, encode_image, image_format
from provider_image.precision import TOLERANCE
from provider_image.service import check_files, media_type_of
from tests.provider_image.conftest import encode_image as encode

PIXELS = np.asarray(Image.linear_gradient("L").resize((90, 60)).convert("RGB"))


@pytest.mark.parametrize("format", FORMAT.choices)
def test_encoded_image_passes_its_own_check(format: str) -> None:
    data = encode_image(PIXELS, format)

    assert image_format(data) == format
    check_image(data, width=90, height=60, format=format)
    check_files({"image": IMAGE_OUTPUT}, {"image": data})
    assert media_type_of(IMAGE_OUTPUT, data) == f"image/{format}"


def test_png_keeps_every_pixel() -> None:
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_image(PIXELS, "png")))), PIXELS)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        encode_image(PIXELS, "jpeg"),
        encode_image(PIXELS[:-1], "png"),
        encode_image(PIXELS, "png")[:-20],
    ],
    ids=["empty", "short", "jpeg", "size", "cut"],
)
def test_another_image_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedResults):
        check_image(data, width=90, height=60, format="png")


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
def test_format_that_is_no_output_is_refused(format: str) -> None:
    with pytest.raises(MalformedResults, match="image is not image"):
        check_files({"image": IMAGE_OUTPUT}, {"image": encode(Image.fromarray(PIXELS), format)})


def test_png_with_too_many_bytes_becomes_a_jpeg_and_then_one_of_less_quality() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (60, 90, 3), np.uint8)
    sizes = [len(encode_image(noise, "jpeg", max_bytes=most)) for most in (100_000, 4000)]

    data = encode_image(noise, "png", max_bytes=10_000)

    assert image_format(data) == "jpeg"
    check_image(data, width=90, height=60, format="jpeg")
    assert sizes[1] <= 4000 and sizes[1] < sizes[0] <= 10_000
    with pytest.raises(InferenceFailed, match="Send a smaller one"):
        encode_image(noise, "png", max_bytes=500)


@pytest.mark.parametrize("format", FORMAT.choices)
def test_rounding_is_no_difference(format: str) -> None:
    random = np.random.default_rng(1)
    rounded = np.clip(PIXELS.astype(int) + random.integers(-1, 2, PIXELS.shape), 0, 255).astype(np.uint8)

    found = compare_images(encode_image(PIXELS, format), encode_image(rounded, format))

    assert (found.largest, found.is_same_order) == (0, True)


@pytest.mark.parametrize("format", FORMAT.choices)
def test_changed_part_is_a_difference(format: str) -> None:
    changed = PIXELS.copy()
    changed[40:, 70:] ^= 0x40

    found = compare_images(encode_image(PIXELS, format), encode_image(changed, format))

    assert found.largest > 100 * TOLERANCE


def test_changed_pixel_of_a_png_is_a_difference() -> None:
    changed = PIXELS.copy()
    changed[30, 40, 1] ^= 0x04

    found = compare_images(encode_image(PIXELS, "png"), encode_image(changed, "png"))

    assert found.largest == pytest.approx(3 / 255)


@pytest.mark.parametrize("other", [b"", b"text", encode_image(PIXELS[:, :-1], "png")], ids=["empty", "text", "size"])
def test_what_cannot_be_compared_differs(other: bytes) -> None:
    found = compare_images(encode_image(PIXELS, "png"), other)

    assert (found.largest, found.is_same_order) == (1, False)

"""A resized image is decoded to exactly the same pixels, and nothing else is accepted as one."""

import numpy as np
import pytest
from PIL import Image

from provider_image.errors import BadInput
from provider_image.images.resizing import decode_resized, encode_resized
from tests.provider_image.conftest import encode_image


@pytest.mark.parametrize("is_compressed", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 3), (224, 224, 3), (299, 331, 3)])
def test_resized_pixels_are_decoded_exactly(shape, is_compressed):
    pixels = np.random.default_rng(7).integers(0, 256, shape, np.uint8)

    assert np.array_equal(decode_resized(encode_resized(pixels, is_compressed=is_compressed), *shape[:2]), pixels)


@pytest.mark.parametrize(
    "data",
    {
        "nothing": b"",
        "text": b"text",
        "half of it": encode_resized(np.zeros((30, 40, 3), np.uint8))[:-9],
        "half of an uncompressed one": encode_resized(np.zeros((30, 40, 3), np.uint8), is_compressed=False)[:-999],
        "uncompressed and grey": encode_image(Image.new("L", (40, 30)), "BMP"),
        "wider": encode_resized(np.zeros((30, 41, 3), np.uint8)),
        "smaller": encode_resized(np.zeros((20, 20, 3), np.uint8)),
        "turned": encode_resized(np.zeros((40, 30, 3), np.uint8)),
        "another format": encode_image(Image.new("RGB", (40, 30)), "PNG"),
        "transparent": encode_image(Image.new("RGBA", (40, 30), (1, 2, 3, 4)), "WEBP", lossless=True),
        "several frames": encode_image(
            Image.new("RGB", (40, 30)), "WEBP", save_all=True, append_images=[Image.new("RGB", (40, 30), "red")]
        ),
    }.items(),
    ids=lambda case: case[0],
)
def test_anything_but_a_resized_image_of_the_right_size_is_bad_input(data):
    with pytest.raises(BadInput, match="must be a WebP or BMP file of 40 x 30 RGB pixels") as caught:
        decode_resized(data[1], 30, 40)

    assert caught.value.permanent

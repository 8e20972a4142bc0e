"""Parts of images: cut out upright and turned back, the same whatever the file's orientation is."""

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from provider_image.errors import BadInput
from provider_image.images.decoding import ImagePart, decode_fitted, decode_part
from tests.provider_image.conftest import encode_image

#: Left half red, right half blue, with a white square at (40, 10) to (50, 20).
PHOTO = Image.new("RGB", (64, 32), "red")
PHOTO.paste("blue", (32, 0, 64, 32))
PHOTO.paste("white", (40, 10, 50, 20))
#: How the file has to be stored so that it is upright after the orientation of its EXIF data.
STORED = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def cut(data: bytes, left: float, top: float, width: float, height: float, angle: float = 0, side: int = 999):
    """The pixels of a part."""
    part = ImagePart(left=left, top=top, width=width, height=height, angle=angle)
    return np.asarray(decode_part(data, lambda *size: part, side)).astype(int)


def oriented(orientation: int) -> bytes:
    """The photo as a camera stores it that was turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = PHOTO.transpose(STORED[orientation]) if orientation in STORED else PHOTO
    buffer = io.BytesIO()
    stored.save(buffer, "JPEG", quality=95, subsampling=0, exif=exif)
    return buffer.getvalue()


PNG = encode_image(PHOTO, format="PNG")


def test_a_part_has_exactly_the_pixels_of_the_image():
    found = cut(PNG, 36, 6, 20, 18)

    assert np.array_equal(found, np.asarray(PHOTO)[6:24, 36:56])


def test_a_part_is_found_by_the_size_of_the_upright_image():
    sizes = []

    def find_part(width, height):
        sizes.append((width, height))
        return ImagePart(left=0, top=0, width=width, height=height)

    for orientation in (1, 3, 6, 8):
        assert decode_part(oriented(orientation), find_part, 999).size == (64, 32)
    assert sizes == [(64, 32)] * 4


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_coordinates_are_those_of_the_upright_image(orientation):
    found = cut(oriented(orientation), 38, 8, 14, 14)

    # JPEG blurs, so the difference is not 0 everywhere.
    assert np.abs(found - cut(oriented(1), 38, 8, 14, 14)).mean() < 12
    assert found[7, 7].min() > 200  # the white square is in its middle


def test_what_is_outside_of_the_image_is_grey():
    found = cut(PNG, -10, -4, 20, 8)

    assert (found[:3, :9] == 128).all()
    assert found[6, 15].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("left", "top"), [(70, 0), (0, 40), (-80, 0), (0, -99)])
def test_a_part_outside_of_the_image_is_refused_with_its_size(left, top):
    with pytest.raises(BadInput, match="64 x 32"):
        cut(PNG, left, top, 10, 10)


def test_a_large_part_is_scaled_down_and_a_small_one_is_not_enlarged():
    assert cut(PNG, 0, 0, 64, 32, side=16).shape == (8, 16, 3)
    assert cut(PNG, 0, 0, 8, 8, side=16).shape == (8, 8, 3)
    assert cut(PNG, 0, 0, 1e5, 1, side=16).shape == (1, 16, 3)


@pytest.mark.parametrize("angle", [-170, -45, -10, 20, 90, 180])
def test_what_is_turned_is_turned_back(angle):
    """A cross at two corners of a square that is turned clockwise is level in the part."""
    image = Image.new("L", (200, 160), 0)
    centre, points = np.array([90, 80]), ((-20, -10), (20, -10))
    turn = math.radians(angle)
    for x, y in points:
        across, down = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
        place = centre + np.array([across, down])
        ImageDraw.Draw(image).ellipse((*(place - 4), *(place + 4)), fill=255)

    found = cut(encode_image(image, format="PNG"), 60, 60, 60, 40, angle)[..., 0]

    assert found[10, 10] > 200 and found[10, 50] > 200
    assert found[25:].max() < 60 and found[:, 20:40].max() < 60


def test_a_turned_part_of_a_photo_is_that_of_the_turned_photo(photos):
    whole = Image.open(io.BytesIO(photos["chelsea"])).convert("RGB")
    turned = encode_image(whole.rotate(-25, Image.Resampling.BICUBIC), format="PNG")  # clockwise, around the centre
    width, height = whole.size
    box = (width / 2 - 60, height / 2 - 50, 120, 100)

    gaps = np.abs(cut(turned, *box, angle=25) - cut(encode_image(whole, format="PNG"), *box))

    assert gaps.mean() < 6


def test_an_image_is_fitted_into_a_rectangle_with_its_proportions_and_its_size_is_kept():
    found = decode_fitted(PNG, 16, 100)

    assert (found.pixels.shape, found.width, found.height) == ((8, 16, 3), 64, 32)
    assert decode_fitted(PNG, 640, 640).pixels.shape == (32, 64, 3)
    assert decode_fitted(PNG, 640, 640, enlarged_to=192).pixels.shape == (96, 192, 3)
    assert decode_fitted(oriented(6), 640, 16).pixels.shape == (16, 32, 3)

"""What is measured of images whose quality is known because it was made."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from provider_image.errors import BrokenImage, NotAnImage
from provider_image.images.quality import MEASURED_SIDE, MEASURES, encode_measures, measure_image
from tests.provider_image.conftest import encode_image


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    import skimage.data

    return Image.fromarray(skimage.data.coffee())


def measured(image: Image.Image) -> dict[str, float]:
    return measure_image(encode_image(image, "PNG", compress_level=1))


def grid(degrees: float) -> Image.Image:
    """Lines across and down, turned clockwise."""
    pixels = np.full((400, 500, 3), 200, np.uint8)
    pixels[:, ::50] = pixels[:, 1::50] = pixels[:, 2::50] = 30
    pixels[::60] = pixels[1::60] = 60
    return Image.fromarray(pixels).rotate(-degrees, Image.Resampling.BICUBIC, fillcolor=(200, 200, 200))


def test_every_measure_is_a_number_in_its_range(photo: Image.Image) -> None:
    found = measured(photo)

    assert list(found) == ["width", "height", *MEASURES]
    for name, (lowest, highest, _) in MEASURES.items():
        assert found[name] is None or lowest <= found[name] <= highest


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sharpness", lambda image, step: image.filter(ImageFilter.GaussianBlur(3 - step))),
        ("brightness", lambda image, step: ImageEnhance.Brightness(image).enhance(0.4 + 0.3 * step)),
        ("contrast", lambda image, step: ImageEnhance.Contrast(image).enhance(0.3 + 0.3 * step)),
        ("dark", lambda image, step: image.point(lambda value: max(0, value - 30 * step))),
        ("bright", lambda image, step: image.point(lambda value: min(255, value + 30 * step))),
        ("noise", lambda image, step: noisy(image, 6 * step)),
        ("uniformity", lambda image, step: framed(image, 150 * step)),
    ],
)
def test_more_of_a_quality_is_measured_as_more(
    photo: Image.Image, name: str, change: Callable[[Image.Image, int], Image.Image]
) -> None:
    values = [measured(change(photo, step))[name] for step in range(4)]

    assert values == sorted(values)
    assert values[-1] > 1.2 * values[0]


def noisy(image: Image.Image, deviation: float) -> Image.Image:
    random = np.random.default_rng(1)
    pixels = np.asarray(image).astype(float)
    return Image.fromarray(np.clip(pixels + random.normal(0, deviation, pixels.shape), 0, 255).astype(np.uint8))


def framed(image: Image.Image, border: int) -> Image.Image:
    frame = Image.new("RGB", (image.width + 2 * border, image.height + 2 * border), "teal")
    frame.paste(image, (border, border))
    return frame


def test_noise_of_a_grey_area_is_its_deviation() -> None:
    random = np.random.default_rng(2)
    grey = np.clip(random.normal(128, 8, (300, 300, 1)), 0, 255).repeat(3, axis=2)

    # The median of whole numbers steps by a quarter of a level.
    assert measured(Image.fromarray(grey.astype(np.uint8)))["noise"] == pytest.approx(8, abs=0.3)


@pytest.mark.parametrize("degrees", [0, 3, -7.5, 12])
def test_tilt_is_the_angle_of_lines(degrees: float) -> None:
    assert measured(grid(degrees))["tilt"] == pytest.approx(degrees, abs=0.3)


def test_tilt_is_left_out_where_nobody_asks_for_it() -> None:
    data = encode_image(grid(3), "PNG")

    assert json.loads(encode_measures(data, with_tilt=False)) == {**measure_image(data), "tilt": None}


def test_image_without_lines_has_no_tilt() -> None:
    random = np.random.default_rng(3)
    noise = Image.fromarray(random.integers(0, 256, (200, 300, 3), np.uint8))

    assert measured(noise)["tilt"] is None
    assert measured(Image.new("RGB", (300, 200), "teal"))["tilt"] is None


def test_single_colour_is_uniform() -> None:
    found = measured(Image.new("RGB", (300, 200), "teal"))

    assert (found["uniformity"], found["sharpness"], found["contrast"], found["noise"]) == (1, 0, 0, 0)


@pytest.mark.parametrize(("colour", "share"), [("black", "dark"), ("white", "bright")])
def test_black_and_white_are_extremes(colour: str, share: str) -> None:
    found = measured(Image.new("RGB", (40, 30), colour))

    assert (found["brightness"], found[share]) == (float(colour == "white"), 1)


def test_size_is_that_of_the_whole_upright_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    data = encode_image(Image.new("RGB", (1500, 1000), "teal"), "JPEG", exif=exif)

    found = measure_image(data)

    assert (found["width"], found["height"]) == (1000, 1500)


def test_image_is_measured_as_it_is_when_it_was_enlarged(photo: Image.Image) -> None:
    large = photo.resize((2 * photo.width, 2 * photo.height), Image.Resampling.LANCZOS)
    found, expected = measured(large), measured(photo)

    assert (found["width"], found["height"]) == (2 * photo.width, 2 * photo.height)
    assert max(large.size) > MEASURED_SIDE
    for name in ("sharpness", "brightness", "contrast"):
        assert found[name] == pytest.approx(expected[name], rel=0.1)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (2, 2), (5000, 3)])
def test_image_of_any_size_is_measured(size: tuple[int, int]) -> None:
    found = measured(Image.new("RGB", size, "teal"))

    assert ((found["width"], found["height"]), found["uniformity"]) == (size, 1)


def test_file_that_cannot_be_decoded_is_bad_input(photo: Image.Image) -> None:
    png = encode_image(photo, "PNG")

    with pytest.raises(NotAnImage):
        encode_measures(b"text", with_tilt=True)
    with pytest.raises(BrokenImage):
        encode_measures(png[:5000] + bytes(1000) + png[6000:], with_tilt=True)

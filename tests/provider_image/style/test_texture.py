"""The method `texture`: its gradient against differences, and what it does to images."""

from __future__ import annotations

import numpy as np
import pytest

from provider_image.style import texture
from provider_image.style.optimising import TransferOptions
from provider_image.style.pixels import luminance, to_floats, with_colours_of


def options(**changes) -> TransferOptions:
    return TransferOptions(
        **{"strength": 0.5, "keeps_colours": True, "iterations": 24, "seconds": 600.0, **changes}  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def content() -> np.ndarray:
    """A disc on a slope of red and blue."""
    rows, columns = np.mgrid[:48, :64]
    image = np.stack([3 * columns, 0 * rows + 90, 4 * rows], 2)
    image[np.hypot(rows - 24, columns - 32) < 15] = (230, 200, 40)
    return image.astype(np.uint8)


@pytest.fixture(scope="module")
def stripes() -> np.ndarray:
    """Green stripes."""
    columns = np.mgrid[:60, :50][1]
    return np.stack([40 + 0 * columns, 30 + 200 * (columns // 3 % 2), 60 + 0 * columns], 2).astype(np.uint8)


@pytest.mark.parametrize("shape", [(17, 22), (130, 300)], ids=["one band", "two bands"])
def test_projecting_and_projecting_back_are_transposes(shape) -> None:
    random = np.random.default_rng(1)
    values, filters = random.normal(size=shape).astype(np.float32), texture._filters(random)
    numbers = np.rint(random.normal(0, 1000, (len(filters), values.size)))

    there, back = (
        float(np.sum(texture._project(values, filters) * numbers)),
        texture._project_back(numbers, filters, *shape),
    )

    assert float(np.sum(np.rint(values.astype(np.float64) * texture._VALUE_LEVELS) * back)) == there


def test_sums_are_exact_so_they_are_the_same_on_every_processor() -> None:
    random = np.random.default_rng(4)
    values, filters = random.uniform(-1, 2, (40, 50)).astype(np.float32), texture._filters(random)
    whole = np.rint(values.astype(np.float64) * texture._VALUE_LEVELS).astype(np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(whole, 4, "reflect"), whole.shape).reshape(81, -1)

    numbers = texture._project(values, filters)
    back = texture._project_back(numbers, filters, *values.shape)

    assert np.array_equal(numbers, filters.astype(np.int64) @ windows)
    exact = np.zeros((48, 58), object)
    for place, patch in enumerate(filters.T.astype(np.int64).astype(object) @ numbers.astype(np.int64).astype(object)):
        exact[place // 9 : place // 9 + 40, place % 9 : place % 9 + 50] += patch.reshape(40, 50)
    assert np.array_equal(back[5:-5, 5:-5], exact[9:-9, 9:-9].astype(np.float64))


def test_filters_are_applied_to_the_pixels_around_each() -> None:
    values = np.arange(20 * 30, dtype=np.float32).reshape(20, 30)

    patches = texture._project(values, np.eye(81)).reshape(9, 9, 20, 30) / texture._VALUE_LEVELS

    assert np.array_equal(patches[:, :, 10, 12], values[6:15, 8:17])
    assert np.array_equal(patches[:, :, 0, 0], np.pad(values, 4, "reflect")[:9, :9])


def project_in_f64(image: np.ndarray, filters: np.ndarray) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(image.astype(np.float64), 4, "reflect"), image.shape)
    return filters / texture._FILTER_LENGTH @ windows.reshape(81, -1)


def test_gradient_is_that_of_the_distance() -> None:
    random = np.random.default_rng(2)
    values, style = random.uniform(size=(18, 20)), random.uniform(size=(24, 16)).astype(np.float32)
    wanted, filters = texture._Patches(style), texture._filters(random)

    def distance(image: np.ndarray) -> float:
        numbers, goal = (np.sort(project_in_f64(each, filters), axis=1) for each in (image, style))
        places = (np.arange(18 * 20) + 0.5) * goal.shape[1] / (18 * 20) - 0.5
        stretched = np.stack([np.interp(places, np.arange(goal.shape[1]), row) for row in goal])
        return float(0.5 * np.square(numbers - stretched).sum() / len(filters))

    gradient = wanted.gradient(values.astype(np.float32), filters)

    direction, step = random.normal(size=values.shape), 1e-6
    slope = (distance(values + step * direction) - distance(values - step * direction)) / (2 * step)
    # The values are rounded, and a random direction may be nearly level.
    assert float(np.sum(gradient * direction)) == pytest.approx(slope, abs=5e-3 * float(np.linalg.norm(gradient)))


def test_image_gets_patches_of_the_style_and_keeps_its_size_and_colours(content, stripes) -> None:
    image, done = texture.transfer(content, stripes, options(strength=1.0, iterations=100))

    def distance(pixels: np.ndarray) -> float:
        filters = texture._filters(np.random.default_rng(0))
        wanted = texture._Patches(luminance(to_floats(stripes)))
        return float(np.linalg.norm(wanted.gradient(luminance(to_floats(pixels)), filters)))

    assert (image.shape, image.dtype, done) == (content.shape, np.uint8, 100)
    assert distance(image) < 0.5 * distance(content)
    colour, before = (to_floats(each) - luminance(to_floats(each))[..., None] for each in (image, content))
    is_inside = (image > 0).all(2) & (image < 255).all(2)
    np.testing.assert_allclose(colour[is_inside], before[is_inside], atol=0.01)


def test_strength_decides_how_much_of_the_image_is_left(content, stripes) -> None:
    changes = [
        np.square(
            to_floats(texture.transfer(content, stripes, options(strength=strength))[0]) - to_floats(content)
        ).mean()
        for strength in (0.0, 0.5, 1.0)
    ]

    assert changes == sorted(changes) and changes[0] < 0.5 * changes[2]


def test_colours_of_the_style_are_taken_if_asked_for(content, stripes) -> None:
    image, _ = texture.transfer(content, stripes, options(keeps_colours=False, iterations=6))

    assert image.mean((0, 1)).argmax() == 1 and content.mean((0, 1)).argmax() != 1
    recoloured = with_colours_of(to_floats(content), to_floats(stripes))
    found, wanted = ((each - luminance(each)[..., None]).mean((0, 1)) for each in (recoloured, to_floats(stripes)))
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_grey_style_makes_it_grey(content) -> None:
    found = with_colours_of(to_floats(content), np.full((20, 20, 3), 0.5, np.float32))

    assert np.ptp(found, axis=2).max() < 1e-5


def test_equal_images_give_equal_answers(content, stripes) -> None:
    first, second = (texture.transfer(content, stripes, options())[0] for _ in range(2))

    assert np.array_equal(first, second)


@pytest.mark.parametrize("iterations", [1, 2, 5, 24, 500])
def test_steps_of_all_levels_are_the_iterations(iterations: int) -> None:
    steps = texture._steps(iterations)

    assert sum(steps) == iterations and min(steps) >= 0 and len(steps) == len(texture._LEVELS)


@pytest.mark.parametrize("sizes", [((16, 16), (16, 16)), ((16, 200), (300, 16)), ((31, 17), (64, 64))])
def test_small_and_narrow_images_are_answered(sizes) -> None:
    random = np.random.default_rng(3)
    content, style = (random.integers(0, 256, (*size, 3), np.uint8) for size in sizes)

    image, done = texture.transfer(content, style, options(iterations=8))

    assert (image.shape, done) == (content.shape, 8)


@pytest.mark.parametrize("value", [0, 255])
def test_image_of_one_colour_is_answered(value, content) -> None:
    flat = np.full((24, 24, 3), value, np.uint8)

    for pair in ((flat, content), (content, flat), (flat, flat)):
        image, _ = texture.transfer(*pair, options(iterations=6, keeps_colours=False))
        assert image.shape == pair[0].shape


def test_it_stops_when_its_time_is_over_and_reports_each_step(content, stripes) -> None:
    shown: list[np.ndarray] = []

    image, done = texture.transfer(
        content,
        stripes,
        options(iterations=10**6, seconds=0.1, on_step=lambda fraction, current: shown.append(current())),
    )

    assert 0 < done < 10**6 and len(shown) == done
    assert {each.shape for each in shown} == {content.shape}
    assert np.array_equal(shown[-1], image)

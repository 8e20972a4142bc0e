"""Images in parts: the same as without parts for nets that look only nearby, and without seams for others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from provider_image.errors import InferenceFailed
from provider_image.images.tiling import ALIGNMENT, Tiling, margins, run_tiled

Array = np.ndarray


@pytest.fixture(scope="module")
def photo() -> Array:
    import skimage.data

    return np.ascontiguousarray(skimage.data.astronaut())


def blur(pixels: Array) -> Array:
    """Look 4 pixels far, and take what is outside for black, as padded convolutions do."""
    padded = np.pad(pixels.astype(np.float32), [(4, 4), (4, 4), (0, 0)])
    rows = sum(padded[at : at + pixels.shape[0]] for at in range(9)) / 9
    return sum(rows[:, at : at + pixels.shape[1]] for at in range(9)) / 9


def reduce_and_enlarge(pixels: Array) -> Array:
    """Look at squares of 16 pixels that begin at multiples of 16."""
    height, width, _ = pixels.shape
    means = pixels.reshape(height // 16, 16, width // 16, 16, 3).mean(axis=(1, 3), dtype=np.float32)
    return means.repeat(16, axis=0).repeat(16, axis=1)


def enlarge(pixels: Array) -> Array:
    """Look one pixel far and return twice as many."""
    image = Image.fromarray(pixels)
    large = image.resize((2 * image.width, 2 * image.height), Image.Resampling.BILINEAR)
    return np.asarray(large, np.float32)


def stretch(pixels: Array) -> Array:
    """Look at everything: the mean becomes 128."""
    values = pixels.astype(np.float32)
    return values - values.mean() + 128


@pytest.mark.parametrize(("net", "scale"), [(blur, 1), (reduce_and_enlarge, 1), (enlarge, 2)])
@pytest.mark.parametrize("size", [(256, 256), (160, 256), (256, 160), (64, 96)])
@pytest.mark.parametrize(("tile", "margin"), [((64, 64), 8), ((128, 64), 8), ((128, 128), 16)])
def test_parts_give_what_the_whole_gives_if_the_net_looks_only_nearby(
    photo: Array, net: Callable[[Array], Array], scale: int, size: tuple[int, int], tile: tuple[int, int], margin: int
) -> None:
    pixels = photo[: size[0], : size[1]]
    if any(length < side for length, side in zip(size, tile, strict=True)):
        pytest.skip("smaller than a part")

    found = run_tiled(net, pixels, Tiling(tile=tile, margin=margin, scale=scale))

    expected = np.clip(net(pixels), 0, 255)
    assert (found.dtype, found.shape) == (np.uint8, expected.shape)
    assert np.abs(found - expected).max() <= 0.51  # rounding


@pytest.mark.parametrize("size", [(301, 299), (65, 130), (100, 333)])
def test_image_of_any_size_equals_the_whole_but_where_it_was_extended(photo: Array, size: tuple[int, int]) -> None:
    pixels = photo[: size[0], : size[1]]

    found = run_tiled(blur, pixels, Tiling(tile=(64, 64), margin=8, scale=1))

    assert np.abs(found - blur(pixels))[:-4, :-4].max() <= 0.51


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (63, 64), (64, 64), (65, 64), (20, 30)])
@pytest.mark.parametrize("scale", [1, 3])
def test_small_image_is_returned_in_its_size(photo: Array, size: tuple[int, int], scale: int) -> None:
    pixels = photo[: size[0], : size[1]]

    def repeat(part: Array) -> Array:
        return part.repeat(scale, axis=0).repeat(scale, axis=1).astype(np.float32)

    found = run_tiled(repeat, pixels, Tiling(tile=(64, 96), margin=8, scale=scale))

    assert np.array_equal(found, repeat(pixels))


def test_net_that_looks_at_everything_shows_no_seams(photo: Array) -> None:
    """Where parts differ by tens of levels, neighbours differ by few: the change is spread over the ramp."""
    shade = np.linspace(40, 200, 512).astype(np.uint8)
    pixels = np.broadcast_to(shade[:, None, None], (512, 512, 3)).copy()
    tiling = Tiling(tile=(256, 256), margin=32, scale=1)

    steps = np.abs(np.diff(run_tiled(stretch, pixels, tiling).astype(int), axis=0))

    first, second = stretch(pixels[:256]), stretch(pixels[160:416])
    assert np.abs(first[160:] - second[:96]).min() > 40
    assert steps.max() <= 2


def test_progress_rises_to_one(photo: Array) -> None:
    shares: list[float] = []

    run_tiled(blur, photo[:200, :300], Tiling(tile=(64, 64), margin=8, scale=1), shares.append)

    assert shares == sorted(shares) and len(set(shares)) == len(shares) > 10
    assert shares[-1] == pytest.approx(1)


@pytest.mark.parametrize(
    "net",
    [
        lambda part: part[:-1].astype(np.float32),
        lambda part: part[..., 0].astype(np.float32),
        lambda part: np.full(part.shape, np.nan, np.float32),
        lambda part: np.full(part.shape, np.inf, np.float32),
    ],
    ids=["size", "channels", "nan", "infinite"],
)
def test_net_that_returns_no_image_fails(photo: Array, net: Callable[[Array], Array]) -> None:
    with pytest.raises(InferenceFailed, match="no image of 64 x 64"):
        run_tiled(net, photo[:80, :80], Tiling(tile=(64, 64), margin=8, scale=1))


@pytest.mark.parametrize(
    "facts",
    [
        {"tile": (0, 0)},
        {"tile": (32, 64)},
        {"tile": (64, 4096)},
        {"margin": -1},
        {"margin": 30},
        {"scale": 0},
        {"scale": 9},
    ],
)
def test_impossible_tiling_is_refused(facts: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="cannot be cut"):
        Tiling(**{"tile": (64, 64), "margin": 8, "scale": 1, **facts})


@pytest.mark.parametrize("tile", [(64, 64), (96, 64), (224, 224), (256, 256), (512, 2048)])
def test_every_margin_that_is_possible_leaves_room_for_the_next_part(tile: tuple[int, int]) -> None:
    found = margins(tile)

    assert found
    for margin in found:
        assert min(Tiling(tile=tile, margin=margin, scale=1).step(side) for side in tile) >= ALIGNMENT

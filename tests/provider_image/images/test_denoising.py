"""Noise that was added to photos goes, and what is in them stays."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from provider_image.backends.opencv import import_opencv
from provider_image.chunk import ChunkItem, read_results, write_chunk
from provider_image.images.denoising import denoise
from provider_image.images.headers import read_header
from provider_image.images.quality import estimate_noise
from provider_image.runtime import NetCache, run_chunk
from provider_image.service import check_params
from provider_image.services import load_service


def photo() -> np.ndarray:
    import skimage.data

    return np.ascontiguousarray(skimage.data.coffee()[100:260, 200:400])


def noisy(pixels: np.ndarray, deviation: float) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, deviation, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    """The peak signal-to-noise ratio of two images."""
    return 10 * math.log10(255**2 / float(((one.astype(float) - other.astype(float)) ** 2).mean()))


@pytest.mark.parametrize("deviation", [8, 16])
def test_noisy_photo_is_closer_to_the_clean_one_afterwards(deviation: float) -> None:
    clean = photo()
    before = noisy(clean, deviation)

    after = denoise(before)

    grey = import_opencv().COLOR_RGB2GRAY
    assert decibels(clean, after) > decibels(clean, before) + 2
    assert estimate_noise(import_opencv().cvtColor(after, grey)) < deviation / 3


def test_image_without_noise_is_returned_as_it_is() -> None:
    ramp = np.broadcast_to(np.arange(0, 240, 2, np.uint8)[:, None, None], (120, 90, 3)).copy()

    assert np.array_equal(denoise(ramp), ramp)


def test_colours_stay(photos: dict[str, bytes]) -> None:
    before = noisy(np.broadcast_to(np.array([200, 80, 30], np.uint8), (60, 60, 3)), 10)

    assert np.abs(denoise(before).mean(axis=(0, 1)) - [200, 80, 30]).max() < 2


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (3, 3)])
def test_image_of_any_size_is_denoised(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (*size, 3), np.uint8)

    assert denoise(pixels).shape == pixels.shape


def test_chunk_of_photos_is_answered_with_images(tmp_path: Path, photos: dict[str, bytes]) -> None:
    params = check_params(load_service("image_to_image").params, {"format": "jpeg"})
    items = [
        ChunkItem(number=number, inputs={"image": data}, params=params)
        for number, data in enumerate((photos["chelsea"], b"no image", photos["rocket"]))
    ]
    write_chunk(tmp_path / "chunk.zip", "c", "image_to_image", "denoise", None, items)

    run_chunk(tmp_path / "chunk.zip", tmp_path / "results.zip", NetCache(tmp_path / "models"))

    first, second, third = read_results(tmp_path / "results.zip", "c", "denoise", range(3)).items
    assert (second.error and second.error.code) == "not_an_image"
    for found, size in ((first, (451, 300)), (third, (640, 427))):
        header = read_header(found.files["image"], 10**6)
        assert (header.format, header.width, header.height) == ("JPEG", *size)
        assert found.output == {"width": size[0], "height": size[1], "format": "jpeg"}

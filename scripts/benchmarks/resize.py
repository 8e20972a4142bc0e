"""Resizing: bytes per image with and without it, and its duration.

Each photo is resized and saved as a JPEG of quality 90, or of the highest that stays under 2 MB. Three model inputs:
224 with the crop of EfficientNet-Lite0, 299 and 331 without, as the Keras models have them. What it costs in local
workers is shown by `MLG_SHRINK=on scripts/bench drain`.
"""

from __future__ import annotations

import statistics

import click

from provider_image.images.decoding import decode
from provider_image.images.resizing import decode_resized, encode_resized
from scripts.benchmarks import photos
from scripts.benchmarks.measuring import milliseconds, print_table, rounds_option

SIZES = ((500, 375), (800, 600), (4000, 3000))
INPUTS: tuple[tuple[int, float | None], ...] = ((224, 0.875), (299, None), (331, None))
MAX_BYTES = 2 * 1024 * 1024


def row(size: tuple[int, int], side: int, crop: float | None, rounds: int) -> list[str]:
    """Measure one size at one input; means over the photos."""
    figures = []
    for name in photos.PHOTOS:
        jpeg = photos.encode(name, size, range(90, 20, -5), MAX_BYTES)
        pixels = decode(jpeg, side, side, crop)
        resized = encode_resized(pixels)
        if (decode_resized(resized, side, side) != pixels).any():
            raise RuntimeError(f"{name} is not the same after resizing")
        works = (
            lambda jpeg=jpeg: decode(jpeg, side, side, crop),
            lambda pixels=pixels: encode_resized(pixels),
            lambda resized=resized: decode_resized(resized, side, side),
        )
        times = [statistics.median(milliseconds(work, rounds + 1)[1:]) for work in works]
        figures.append([len(jpeg) / 1024, len(resized) / 1024, *times])
    before, after, *times = (statistics.mean(column) for column in zip(*figures, strict=True))
    shown = (f"{before:.0f}", f"{after:.0f}", f"{after / before:.2f}", *(f"{each:.1f}" for each in times))
    return [f"{size[0]} x {size[1]}", str(side), *shown]


@click.command()
@rounds_option(9)
def main(rounds: int) -> None:
    """Measure resizing. Example: scripts/bench resize"""
    head = ("image", "input", "JPEG KB", "sent KB", "share", "decode ms", "encode ms", "decode again ms")
    print_table("Means", head, [row(size, side, crop, rounds) for size in SIZES for side, crop in INPUTS])

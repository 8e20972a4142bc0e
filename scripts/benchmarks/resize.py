"""Resizing: bytes per image with and without it, its duration, and its cost in local workers.

Each photo is resized and saved as a JPEG of quality 90, or of the highest that stays under 2 MB. Three model inputs:
224 with the crop of EfficientNet-Lite0, 299 and 331 without, as the Keras models have them.
"""

from __future__ import annotations

import resource
import statistics
from pathlib import Path

import click

from provider_image.compiler import ensure_installed
from provider_image.images.decoding import decode
from provider_image.images.resizing import decode_resized, encode_resized
from scripts.benchmarks import photos, stored_requests
from scripts.benchmarks.golem import batch
from scripts.benchmarks.measuring import in_turns, medians, milliseconds, print_table, rounds_option, work_folder

MODEL = "efficientnet_lite0"
SIZES = ((500, 375), (800, 600), (4000, 3000))
INPUTS: tuple[tuple[int, float | None], ...] = ((224, 0.875), (299, None), (331, None))
MAX_BYTES = 2 * 1024 * 1024
#: Images of the run that shows what starting and ending take.
FEW = 32


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


def drain(folder: Path, base: list[bytes], count: int, choice: str) -> tuple[float, float]:
    """Process queued images with local workers.

    :return: images per second from the first result on; milliseconds of processor time per image without those for
        starting and ending, which vary less on a noisy machine.
    """
    used, rates = [], []
    for number in (FEW, FEW + count):
        home = folder / f"{choice}-{number}"
        home.mkdir(parents=True)
        (home / "models").symlink_to(folder.parent / "models")
        stored_requests.add_images(home, photos.variants(base, number))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        rates.append(batch(home, "local", folder / "log", MLG_SHRINK=choice).steady_rate)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return rates[1], 1000 * (used[1] - used[0]) / count


@click.command()
@rounds_option(9)
@click.option("--images", "count", default=600, show_default=True, help="Images that are drained per turn.")
@click.option("--turns", default=3, show_default=True, help="Turns of draining each way; the median is reported.")
def main(rounds: int, count: int, turns: int) -> None:
    """Measure resizing. Example: scripts/bench resize --images 300"""
    head = ("image", "input", "JPEG KB", "sent KB", "share", "decode ms", "encode ms", "decode again ms")
    print_table("Means", head, [row(size, side, crop, rounds) for size in SIZES for side, crop in INPUTS])
    base = photos.photo_jpegs()
    with work_folder() as folder:
        ensure_installed(folder / "models", MODEL)
        ways = {
            choice: lambda turn, choice=choice: drain(folder / str(turn), base, count, choice)  # type: ignore[misc]
            for choice in ("off", "on")
        }
        seen = in_turns(turns, ways)
    rows = []
    for choice, figures in seen.items():
        rate, cost = medians(figures)
        rates, costs = (" ".join(f"{each:.1f}" for each in column) for column in zip(*figures, strict=True))
        rows.append([choice, f"{rate:.1f}", rates, f"{cost:.1f}", costs])
    title = f"Draining {count} JPEGs of 113 KB, 800 x 600, {MODEL}, local executor"
    print_table(title, ("MLG_SHRINK", "images/s", "runs", "processor ms per image", "runs"), rows)

"""Resizing: bytes per image with and without it, its duration, and its cost in local workers.

Each photo is resized and saved as a JPEG of quality 90, or of the highest that stays under 2 MB. Three model inputs:
224 with the crop of EfficientNet-Lite0, 299 and 331 without, as the Keras models have them.
"""

from __future__ import annotations

import asyncio
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from PIL import Image

from batcher.cycle import Cycle
from batcher.executors import ExecutorContext
from batcher.executors.local import LocalExecutor
from batcher.resizing import make_resizer
from batcher.settings import BatcherSettings
from provider_image.compiler import ensure_installed
from provider_image.cores import available_cores
from provider_image.images.decoding import decode
from provider_image.images.resizing import decode_resized, encode_resized
from scripts.benchmarks import photos
from store import new_id
from store.requests import NewRequest
from store.settings import HomeSettings
from store.store import Store

MODEL = "efficientnet_lite0"
SIZES = ((500, 375), (800, 600), (4000, 3000))
INPUTS: tuple[tuple[int, float | None], ...] = ((224, 0.875), (299, None), (331, None))
MAX_BYTES = 2 * 1024 * 1024


def photo(name: str, size: tuple[int, int]) -> bytes:
    """Save a photo at a size in pixels as a JPEG that the server would take."""
    image = Image.open(photos.photo_folder() / name).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    for quality in range(90, 20, -5):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= MAX_BYTES:
            return buffer.getvalue()
    raise ValueError(f"{name} does not fit into {MAX_BYTES} bytes")


def milliseconds(work: Callable[[], Any], rounds: int) -> float:
    """Time a call, once warm. :return: the median."""
    work()
    seen = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        seen.append(1000 * (time.perf_counter() - started))
    return statistics.median(seen)


def row(size: tuple[int, int], side: int, crop: float | None, rounds: int) -> list[str]:
    """Measure one size at one input; means over the photos."""
    before, after, first, encoding, second = [], [], [], [], []
    for name in photos.PHOTOS:
        jpeg = photo(name, size)
        pixels = decode(jpeg, side, side, crop)
        resized = encode_resized(pixels)
        if (decode_resized(resized, side, side) != pixels).any():
            raise RuntimeError(f"{name} is not the same after resizing")
        before.append(len(jpeg))
        after.append(len(resized))
        first.append(milliseconds(lambda jpeg=jpeg: decode(jpeg, side, side, crop), rounds))  # type: ignore[misc]
        encoding.append(milliseconds(lambda pixels=pixels: encode_resized(pixels), rounds))  # type: ignore[misc]
        second.append(milliseconds(lambda resized=resized: decode_resized(resized, side, side), rounds))  # type: ignore[misc]
    sent, original = statistics.mean(after), statistics.mean(before)
    times = (f"{statistics.mean(each):.1f}" for each in (first, encoding, second))
    kilobytes = (f"{each / 1024:.0f}" for each in (original, sent))
    return [f"{size[0]} x {size[1]}", str(side), *kilobytes, f"{sent / original:.2f}", *times]


def processor_seconds(pids: list[int]) -> float:
    """Add up the processor time of these processes and of this one."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


async def rate(home: Path, models: Path, jpegs: list[bytes], choice: str) -> tuple[float, float]:
    """Process images that are already queued, with local workers.

    :return: images per second; milliseconds of processor time per image, which varies less on a noisy machine.
    """
    work = home / "work"
    work.mkdir(parents=True)
    workers = available_cores()
    settings = BatcherSettings(work=work, models=models, resizers=workers, shrink=choice)
    store = Store(HomeSettings(home=home))
    store.migrate()
    context = ExecutorContext(owner=work.name, work=work, models=models, store=store, environment=os.environ)
    executor = LocalExecutor(context)
    resizer = make_resizer(settings, executor)
    await executor.start()
    try:
        cycle = Cycle(
            store=store, executor=executor, settings=settings, folder=work, batcher_id="bench", resizer=resizer
        )

        def pids() -> list[int]:
            return executor.pids() + (resizer.pids() if resizer is not None else [])

        async def answer(part: list[bytes]) -> tuple[float, float]:
            for jpeg in part:
                request = NewRequest(
                    id=new_id(), service="classification", model=MODEL, is_fresh=True, created_at=datetime.now(UTC)
                )
                store.requests.add(request, store.images.stage(jpeg))
            used = processor_seconds(pids())
            started = time.perf_counter()
            cycle.flush()
            report = await cycle.run(asyncio.Event())
            if report.done != len(part):
                raise RuntimeError(f"{report.done} of {len(part)} were answered")
            seconds = time.perf_counter() - started
            return len(part) / seconds, 1000 * (processor_seconds(pids()) - used) / len(part)

        warm = 32 * workers  # enough to start every process and load every net
        await answer(jpegs[:warm])
        return await answer(jpegs[warm:])
    finally:
        await executor.close()
        if resizer is not None:
            resizer.close()
        store.close()


@click.command()
@click.option("--rounds", default=9, show_default=True, help="Timed calls of each kind; the median is reported.")
@click.option("--images", "count", default=600, show_default=True, help="Images that are drained per round.")
@click.option("--turns", default=3, show_default=True, help="Rounds of draining each way; the median is reported.")
def main(rounds: int, count: int, turns: int) -> None:
    """Measure resizing. Example: scripts/bench resize --images 300"""
    titles = ("image", "input", "JPEG KB", "sent KB", "share", "decode ms", "encode ms", "decode again ms")
    click.echo(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    for size in SIZES:
        for side, crop in INPUTS:
            click.echo(f"| {' | '.join(row(size, side, crop, rounds))} |")
    base = photos.photo_jpegs()
    seen: dict[str, list[tuple[float, float]]] = {"off": [], "on": []}
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        models = Path(folder) / "models"
        ensure_installed(models, MODEL)
        for turn in range(turns):
            for choice, rates in seen.items():
                jpegs = [photos.make_unique(base[n % len(base)], n) for n in range(count + 32 * available_cores())]
                rates.append(asyncio.run(rate(Path(folder) / f"{choice}-{turn}", models, jpegs, choice)))
    median = {
        choice: [statistics.median(each) for each in zip(*figures, strict=True)] for choice, figures in seen.items()
    }
    click.echo(f"\nDraining {count} JPEGs of 113 KB, 800 x 600, {MODEL}, local executor:\n")
    click.echo("| MLG_SHRINK | images/s | runs | processor ms per image | runs |\n| --- | --- | --- | --- | --- |")
    for choice, figures in seen.items():
        rates, costs = ([f"{each:.1f}" for each in column] for column in zip(*figures, strict=True))
        mine = median[choice]
        click.echo(f"| {choice} | {mine[0]:.1f} | {' '.join(rates)} | {mine[1]:.1f} | {' '.join(costs)} |")
    rate_ratio, cost_ratio = (median["on"][column] / median["off"][column] for column in range(2))
    click.echo(f"\non is {rate_ratio:.2f} of off in images/s, {cost_ratio:.2f} in processor time")

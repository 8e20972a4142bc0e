"""Images per second from the first POST to the last recorded result, against the limit of the machine.

The limit is one process with two threads that decode and infer, without HTTP and store. It is measured twice: with
Pillow, as one would write it without mlg, and with mlg's own decoding. `MLG_SHRINK=on` shows what resizing costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np

from provider_image.backends import Device, load_net
from provider_image.compiler import ensure_installed
from provider_image.images.resampling import resampler
from provider_image.models.artefact import Artefact
from scripts.benchmarks.models.resizing import decode_by_mlg, decode_by_pillow
from scripts.benchmarks.support import photos
from scripts.benchmarks.support.measuring import in_turns, medians, print_table, rounds_option, timed, work_folder
from scripts.benchmarks.support.processes import post
from tests.process_tree import cpu_seconds, descendants
from tests.system import System

MODEL = "efficientnet_lite0"
THREADS = 2


def plain_limit(
    artefact: Artefact, jpegs: list[bytes], decode: Callable[[bytes, Artefact], np.ndarray]
) -> tuple[float, float]:
    """Decode and infer in two threads. :return: as `drain`."""
    net = load_net(artefact, Device(threads=THREADS))

    def work(jpeg: bytes) -> None:
        net.infer([decode(jpeg, artefact)])

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, jpegs[:8]))
        used, seconds = time.process_time(), timed(lambda: list(pool.map(work, jpegs)))
        return len(jpegs) / seconds, 1000 * (time.process_time() - used) / len(jpegs)


def drain(home: Path, jpegs: list[bytes]) -> tuple[float, float]:
    """Post all images to a running system and wait for the last result.

    :return: images per second; milliseconds of processor time per image, which vary less on a noisy machine.
    """
    system = System(home)

    def processor_seconds() -> float:
        return sum(cpu_seconds(pid) for pid in (system.process.pid, *descendants(system.process.pid)))

    try:
        (first,) = post(system.base, jpegs[:1])
        system.answer(first)
        used, started = processor_seconds(), time.perf_counter()
        with ThreadPoolExecutor(4) as pool:
            posted = sum(len(ids) for ids in pool.map(lambda part: post(system.base, jpegs[1 + part :: 4]), range(4)))
        while (states := dict(system.query("SELECT state, count(*) FROM requests GROUP BY state"))) != {
            "done": len(jpegs)
        }:
            if "failed" in states:
                raise RuntimeError(f"{states['failed']} failed")
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        return posted / seconds, 1000 * (processor_seconds() - used) / posted
    finally:
        system.stop()


@click.command()
@click.option("--images", "count", default=2000, show_default=True, help="Number of images.")
@rounds_option(3)
def main(count: int, rounds: int) -> None:
    """Measure draining. Example: scripts/bench drain --images 1000"""
    base = photos.photo_jpegs()

    def jpegs(turn: int) -> list[bytes]:
        return photos.variants(base, count + 1, turn * count)

    with work_folder() as folder:
        artefact = ensure_installed(folder / "models", MODEL)
        ways = {
            "plain limit, decoded by Pillow": lambda turn: plain_limit(artefact, jpegs(turn), decode_by_pillow),
            f"limit, resized by {resampler()}": lambda turn: plain_limit(artefact, jpegs(turn), decode_by_mlg),
            "mlg up, end to end": lambda turn: drain(folder / f"home-{turn}", jpegs(turn)),
        }
        seen = in_turns(rounds, ways)
    median = {name: medians(figures) for name, figures in seen.items()}
    ours = median["mlg up, end to end"][0]
    rows = [
        (
            name,
            f"{rate:.0f}",
            " ".join(f"{each[0]:.0f}" for each in seen[name]),
            f"{ours / rate:.0%}",
            f"{cost:.1f}",
        )
        for name, (rate, cost) in median.items()
    ]
    title = f"{count} JPEGs of 113 KB, 800 x 600, {MODEL}"
    print_table(title, ("what", "images/s", "runs", "mlg up reaches of it", "processor ms per image"), rows)

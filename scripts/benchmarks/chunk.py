"""A cold chunk of 16 images: the time from the start of `mlg-provider run` to the results file, and peak memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console

from provider_image.chunk import ChunkItem, write_chunk
from provider_image.compiler import ensure_installed
from scripts.benchmarks import photos

MODEL = "efficientnet_lite0"


@click.command()
@click.option("--rounds", default=9, show_default=True, help="Runs; the median is reported.")
def main(rounds: int) -> None:
    """Measure a cold chunk. Example: scripts/bench chunk"""
    base = photos.photo_jpegs()
    seconds, megabytes = [], []
    with tempfile.TemporaryDirectory(prefix="mlg-bench-") as folder:
        work = Path(folder)
        ensure_installed(work / "models", MODEL)
        items = [
            ChunkItem(number=n, inputs={"image": photos.make_unique(base[n % len(base)], n)}, params={})
            for n in range(16)
        ]
        write_chunk(work / "chunk.zip", "measured", "classification", MODEL, None, items)
        for turn in range(rounds):
            results = work / f"results-{turn}.zip"
            command = [sys.executable, "-m", "provider_image", "run", "--cold", "--models", str(work / "models")]
            started = time.perf_counter()
            process = subprocess.Popen([*command, str(work / "chunk.zip"), str(results)])
            _, status, usage = os.wait4(process.pid, 0)
            seconds.append(time.perf_counter() - started)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode or not results.exists():
                raise RuntimeError(f"the run exited with status {process.returncode}")
            megabytes.append(usage.ru_maxrss / 1024)
    Console().print(
        f"a cold chunk of 16: median {statistics.median(seconds):.2f} s "
        f"(min {min(seconds):.2f}, max {max(seconds):.2f}), peak {statistics.median(megabytes):.0f} MB"
    )

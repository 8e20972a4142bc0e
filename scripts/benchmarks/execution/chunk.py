"""A cold chunk of 16 images: the time from the start of `mlg-provider run` to the results file, and peak memory."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from provider_image.chunk import Results, read_results
from provider_image.compiler import ensure_installed
from scripts.benchmarks.support import photos
from scripts.benchmarks.support.measuring import rounds_option, timed

MODEL = "efficientnet_lite0"


def cold_run(models: Path, model: str, chunk: Path) -> tuple[float, Results]:
    """Run `mlg-provider run` for one chunk. :return: seconds; the results."""
    results = chunk.with_suffix(".results")
    command = [sys.executable, "-m", "provider_image", "run", "--cold", str(chunk), str(results)]
    seconds = timed(lambda: subprocess.run([*command, "--models", str(models)], check=True))
    return seconds, read_results(results, photos.CHUNK_ID, model, range(photos.CHUNK_ITEMS))


@click.command()
@rounds_option(9)
def main(rounds: int) -> None:
    """Measure a cold chunk. Example: scripts/bench chunk"""
    with tempfile.TemporaryDirectory(prefix="mlg-bench-") as folder:
        models = Path(folder) / "models"
        ensure_installed(models, MODEL)
        chunk = photos.make_chunk(Path(folder) / "chunk.zip", MODEL, photos.photo_jpegs())
        runs = [cold_run(models, MODEL, chunk) for _ in range(rounds)]
    seconds = [each for each, _ in runs]
    megabytes = statistics.median(results.peak_memory_bytes for _, results in runs) / 1e6
    click.echo(
        f"a cold chunk of 16: median {statistics.median(seconds):.2f} s "
        f"(min {min(seconds):.2f}, max {max(seconds):.2f}), peak {megabytes:.0f} MB"
    )

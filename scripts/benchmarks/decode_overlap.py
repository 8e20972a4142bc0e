"""The share of OpenVINO's throughput that remains when images are decoded as well, and the throughput of decoding.

Decoding runs in parallel to inference, but on the same cores. An image that takes i seconds of processor time to infer
and d to decode allows 1 / (i + d) images per second and core, and OpenVINO alone 1 / i. The share is i / (i + d), and
more only if cores would otherwise be idle.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from provider_image.compiler import ensure_installed
from scripts.benchmarks import photos
from scripts.benchmarks.keras_models import cache_folder, compiled_model
from scripts.benchmarks.models import make_chunk
from scripts.benchmarks.processes import JsonLineProcess

MODELS = ("densenet121", "efficientnet_lite0")
MIN_SHARE = 0.95


@click.command()
@click.option("--rounds", default=3, show_default=True, help="Rounds of each; the median is reported.")
@click.option("--seconds", default=3.0, show_default=True, help="Minimum length of a round.")
def main(rounds: int, seconds: float) -> None:
    """Measure decoding in parallel to inference. Example: scripts/bench decode_overlap"""
    table = Table(
        "model",
        "images",
        "chunk /s",
        "OpenVINO /s",
        "decode /s",
        "Pillow whole /s",
        "share",
        "arithmetic",
        "of decode",
    )
    kinds = {
        "500 x 375, quality 90": photos.jpegs_of_quality(500, 375, 90),
        "4000 x 3000, 2 MB": photos.photo_jpegs(width=4000, height=3000, size=2_000_000),
    }
    with tempfile.TemporaryDirectory(prefix="mlg-bench-") as folder:
        work = Path(folder)
        for model in MODELS:
            models = cache_folder() / "models"
            if model == "efficientnet_lite0":
                ensure_installed(models, model)
            else:
                compiled_model(model)
            chunks = [make_chunk(work / f"{number}.zip", model, kinds[kind]) for number, kind in enumerate(kinds)]
            with JsonLineProcess(sys.executable, "-m", "scripts.benchmarks.runtime_side", str(models), model) as side:
                for kind, chunk in zip(kinds, chunks, strict=True):
                    seen = _measure(side, chunk, rounds, seconds)
                    both = 1 / (1 / seen["queue"] + 1 / seen["decode"])
                    share = seen["chunk"] / seen["queue"]
                    table.add_row(
                        model,
                        kind,
                        *(f"{seen[way]:.1f}" for way in ("chunk", "queue", "decode", "pillow")),
                        f"{share:.0%} {'met' if share >= MIN_SHARE else 'missed'}",
                        f"{both / seen['queue']:.0%}",
                        f"{seen['chunk'] / seen['decode']:.0%}",
                    )
    Console(width=160).print(table)


def _measure(side: JsonLineProcess, chunk: Path, rounds: int, seconds: float) -> dict[str, float]:
    ways = ("chunk", "queue", "decode", "pillow")
    for way in ways[:2]:
        side.request(way=way, seconds=0, chunk=str(chunk))
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            found[way].append(side.request(way=way, seconds=seconds, chunk=str(chunk)))
    return {way: statistics.median(figures) for way, figures in found.items()}

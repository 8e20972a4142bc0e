"""The share of OpenVINO's throughput that remains when images are decoded as well, and the throughput of decoding.

Decoding runs in parallel to inference, but on the same cores. An image that takes i seconds of processor time to infer
and d to decode allows 1 / (i + d) images per second and core, and OpenVINO alone 1 / i. The share is i / (i + d), and
more only if cores would otherwise be idle.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import click

from scripts.benchmarks import photos
from scripts.benchmarks.keras_models import artefact_of, cache_folder
from scripts.benchmarks.measuring import in_turns, print_table, rounds_option, seconds_option
from scripts.benchmarks.runtime_rates import runtime_rates

MODELS = ("densenet121", "efficientnet_lite0")
WAYS = ("chunk", "queue", "decode", "pillow")
MIN_SHARE = 0.95


@click.command()
@rounds_option(3)
@seconds_option(3.0)
def main(rounds: int, seconds: float) -> None:
    """Measure decoding in parallel to inference. Example: scripts/bench decode_overlap"""
    kinds = {
        "500 x 375, quality 90": photos.jpegs_of_quality((500, 375), 90),
        "4000 x 3000, 2 MB": photos.photo_jpegs((4000, 3000), 2_000_000),
    }
    rows = []
    with tempfile.TemporaryDirectory(prefix="mlg-bench-") as folder:
        for model in MODELS:
            artefact_of(model)
            for kind, jpegs in kinds.items():
                chunk = photos.make_chunk(Path(folder) / "chunk.zip", model, jpegs)
                rates = runtime_rates(cache_folder() / "models", model, chunk)
                for way in ("chunk", "queue"):
                    rates[way](0.1)
                seen = in_turns(rounds, {way: lambda _, work=rates[way]: work(seconds) for way in WAYS})  # type: ignore
                median = {way: statistics.median(figures) for way, figures in seen.items()}
                share = median["chunk"] / median["queue"]
                both = 1 / (1 / median["queue"] + 1 / median["decode"])
                shares = (
                    f"{share:.0%} {'met' if share >= MIN_SHARE else 'missed'}",
                    f"{both / median['queue']:.0%}",
                    f"{median['chunk'] / median['decode']:.0%}",
                )
                rows.append([model, kind, *(f"{median[way]:.1f}" for way in WAYS), *shares])
    rates_head = ("chunk /s", "OpenVINO /s", "decode /s", "Pillow whole /s")
    head = ("model", "images", *rates_head, "share", "arithmetic", "of decode")
    print_table(f"medians of {rounds}", head, rows)

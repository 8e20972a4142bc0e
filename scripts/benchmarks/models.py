"""The compiled Keras models against Keras itself: a cold chunk of 16, warm throughput, memory, and the machine's limit.

Both sides get the same photos and the same seeded weights and alternate in one run. Models are compiled before the
measurement and only once, in the folder of `keras_models.cache_folder`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import click

from provider_image.chunk import ChunkItem, read_results, write_chunk
from scripts.benchmarks import photos
from scripts.benchmarks.keras_models import ORIGINAL_MODELS, QUICK_MODELS, CompiledModel, cache_folder, compiled_model
from scripts.benchmarks.limits import f32_gigaflops, gigaflops_of
from scripts.benchmarks.processes import JsonLineProcess

ITEMS = 16
#: Required geometric means over the models.
MIN_WARM_RATIO, MIN_COLD_RATIO, MAX_MEMORY_RATIO = 1.9, 5.0, 0.40


@dataclass
class Measurements:
    """The measurements of one model, a number for each round."""

    #: Seconds and megabytes of a cold chunk.
    cold: list[float] = field(default_factory=list)
    keras_cold: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    keras_memory: list[float] = field(default_factory=list)
    #: Images per second, warm: whole chunks, the bare net, the bare net in bf16, and Keras' predict.
    chunk: list[float] = field(default_factory=list)
    net: list[float] = field(default_factory=list)
    bf16: list[float] = field(default_factory=list)
    keras: list[float] = field(default_factory=list)
    #: Images of a chunk with the same first label on both sides.
    same_first: int = 0

    def ratio(self, one: str, other: str) -> float:
        """Divide a median by another; nan if there are none."""
        first, second = getattr(self, one), getattr(self, other)
        return statistics.median(first) / statistics.median(second) if first and second else float("nan")


def has_bf16() -> bool:
    """Tell whether this processor computes in bf16 itself."""
    return "bf16" in Path("/proc/cpuinfo").read_text()


def make_chunk(path: Path, model: str, base: list[bytes]) -> Path:
    """Write a chunk of ITEMS images, made from JPEGs of `images`."""
    items = [
        ChunkItem(number=n, inputs={"image": photos.make_unique(base[n % len(base)], n)}, params={})
        for n in range(ITEMS)
    ]
    write_chunk(path, "measured", "classification", model, None, items)
    return path


def measure_cold(model: CompiledModel, chunk: Path, work: Path, rounds: int, figures: Measurements) -> None:
    """Start both sides in turns, each for one chunk."""
    labels = [list(label) for label in model.artefact.labels]
    for _ in range(rounds):
        ours, theirs = work / "results.zip", work / "keras.json"
        figures.cold.append(
            _seconds(
                "provider_image", "run", "--cold", str(chunk), str(ours), "--models", str(cache_folder() / "models")
            )
        )
        results = read_results(ours, "measured", model.row.name, range(ITEMS))
        figures.memory.append(results.peak_memory_bytes / 1e6)
        figures.keras_cold.append(_seconds(*_keras_command("cold", model, chunk), str(theirs)))
        answer = json.loads(theirs.read_text())
        figures.keras_memory.append(answer["peak_memory_bytes"] / 1e6)
        firsts = [labels.index(item.output[0][:2]) for item in results.items]
        figures.same_first = sum(a == b[0] for a, b in zip(firsts, answer["best"], strict=True))


def measure_warm(model: CompiledModel, chunk: Path, rounds: int, seconds: float, figures: Measurements) -> None:
    """Measure a warm process of each side alternately, after one round for warming up."""
    with (
        JsonLineProcess(
            *_module("scripts.benchmarks.runtime_side", str(cache_folder() / "models"), model.row.name)
        ) as ours,
        JsonLineProcess(*_module(*_keras_command("warm", model, chunk))) as keras,
    ):
        ways = ["chunk", "net", *(["bf16"] if has_bf16() else [])]
        for way in ways:
            ours.request(way=way, seconds=0, chunk=str(chunk))
        for _ in range(rounds):
            for way in ways:
                getattr(figures, way).append(ours.request(way=way, seconds=seconds, chunk=str(chunk)))
            figures.keras.append(keras.request(seconds=seconds))


def _keras_command(way: str, model: CompiledModel, chunk: Path) -> list[str]:
    return ["scripts.benchmarks.keras_side", way, str(model.row.keras_class), str(model.weights), str(chunk)]


def _module(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]


def _seconds(*words: str) -> float:
    started = time.perf_counter()
    subprocess.run(_module(*words), check=True)
    return time.perf_counter() - started


def _row(model: CompiledModel, figures: Measurements, limit: float) -> str:
    seen = {
        name: statistics.median(value) for name, value in vars(figures).items() if isinstance(value, list) and value
    }
    flops = gigaflops_of(model.artefact.folder / "model.xml")
    bf16 = f"{figures.ratio('bf16', 'net'):.2f}" if figures.bf16 else "-"
    cells = (
        model.row.name,
        f"{model.artefact.size_bytes / 1e6:.0f}",
        f"{seen['cold']:.2f}",
        f"{seen['keras_cold']:.2f}",
        f"{figures.ratio('keras_cold', 'cold'):.1f}",
        f"{seen['memory']:.0f}",
        f"{seen['keras_memory']:.0f}",
        f"{figures.ratio('memory', 'keras_memory'):.0%}",
        f"{seen['chunk']:.1f}",
        f"{seen['net']:.1f}",
        f"{seen['keras']:.1f}",
        f"{figures.ratio('chunk', 'keras'):.2f}",
        f"{figures.ratio('net', 'keras'):.2f}",
        f"{flops:.1f}",
        f"{seen['net'] * flops / limit:.0%}",
        bf16,
    )
    return f"| {' | '.join(cells)} |"


_HEAD = (
    "| model | MB | cold s | Keras | times | peak MB | Keras | share | chunk /s | net /s | Keras /s | chunk times "
    "| net times | GFLOP | of limit | bf16 |"
)


@click.command()
@click.option("--models", help="Names, separated by commas; all sixteen if not given.")
@click.option("--quick", is_flag=True, help=f"Only {', '.join(QUICK_MODELS)}.")
@click.option("--rounds", default=3, show_default=True, help="Rounds of each; the median is reported.")
@click.option("--seconds", default=2.0, show_default=True, help="Minimum length of a warm round.")
def main(models: str | None, quick: bool, rounds: int, seconds: float) -> None:
    """Measure the compiled Keras models. Example: scripts/bench models --quick

    Compiling takes 10 minutes and 6 GB the first time, measuring some 60 seconds a model: 20 minutes for sixteen.
    """
    names = models.split(",") if models else QUICK_MODELS if quick else ORIGINAL_MODELS
    limit = f32_gigaflops()
    all_figures: list[Measurements] = []
    rows = []
    with tempfile.TemporaryDirectory(prefix="mlg-bench-") as folder:
        work, spent, base = Path(folder), 0.0, photos.jpegs_of_quality(500, 375, 90)
        for name in names:
            model = compiled_model(name)
            started = time.perf_counter()
            chunk = make_chunk(work / "chunk.zip", name, base)
            figures = Measurements()
            measure_cold(model, chunk, work, rounds, figures)
            measure_warm(model, chunk, rounds, seconds, figures)
            all_figures.append(figures)
            rows.append(_row(model, figures, limit))
            spent += time.perf_counter() - started
            click.echo(f"{name}: {figures.same_first} of {ITEMS} first labels as Keras, {spent:.0f} s so far", err=True)
    click.echo(
        f"f32 limit of this machine: {limit:.0f} GFLOP/s; medians of {rounds}; {spent:.0f} s without compiling\n"
    )
    click.echo("\n".join([_HEAD, "|" + " --- |" * (_HEAD.count("|") - 1), *rows]))
    click.echo()
    for what, one, other, wanted, is_least in (
        ("warm, whole chunks", "chunk", "keras", MIN_WARM_RATIO, True),
        ("warm, bare net", "net", "keras", MIN_WARM_RATIO, True),
        ("cold", "keras_cold", "cold", MIN_COLD_RATIO, True),
        ("memory", "memory", "keras_memory", MAX_MEMORY_RATIO, False),
    ):
        mean = statistics.geometric_mean(figures.ratio(one, other) for figures in all_figures)
        is_met = mean >= wanted if is_least else mean <= wanted
        click.echo(
            f"{what}: geometric mean {mean:.2f}, required {'at least' if is_least else 'at most'} {wanted:g}: "
            f"{'met' if is_met else 'missed'}"
        )

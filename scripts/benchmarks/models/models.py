"""The compiled Keras models against Keras itself: a cold chunk of 16, warm throughput, memory, and the machine's limit.

Both sides get the same photos and the same seeded weights and alternate in one run. Models are compiled before the
measurement and only once, in the folder `keras_models.CACHE`. Where the processor computes in bf16, copies in bf16 are
built as `mlg models compile --precision bf16` does, see `trained_copies.py`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import click

from provider_image.backends import Device
from provider_image.chunk import Results, open_chunk
from provider_image.compiler.reduced.builder import has_bf16
from provider_image.images.decoding import decode
from provider_image.models.artefact import Artefact
from provider_image.runtime import NetCache, run_chunk
from scripts.benchmarks.execution.chunk import cold_run
from scripts.benchmarks.models.keras_models import CACHE, ORIGINAL_MODELS, artefact_of, weights_of
from scripts.benchmarks.models.trained_copies import judge, train
from scripts.benchmarks.support import photos
from scripts.benchmarks.support.limits import f32_gigaflops, gigaflops_of
from scripts.benchmarks.support.measuring import parallel_rate, print_table, rate, rounds_option, seconds_option, timed

HEAD = (
    "model", "MB", "cold s", "Keras", "times", "peak MB", "Keras", "share", "chunk /s", "net /s", "Keras /s",
    "chunk times", "net times", "GFLOP", "of limit", "bf16", "bf16 times", "quickest", "trained",
)  # fmt: skip
#: Who asks the gate for a copy in bf16 -> the figure for it: the net's rate in the quickest precision that is admitted.
QUICKEST = {"as seeded": "quickest_seeded", "with a head that was trained": "quickest_trained"}
_NET = "warm, bare net"
#: What is compared -> the figures whose ratio it is, and the least or most that its geometric mean should be.
TARGETS = {
    "warm, whole chunks": ("chunk", "keras", "at least", 1.9),
    _NET: ("net", "keras", "at least", 1.9),
    **{f"{_NET}, quickest admitted precision, {who}": (key, "keras", "at least", 3.0) for who, key in QUICKEST.items()},
    f"{_NET}, if bf16 were always admitted": ("bf16", "keras", "at least", 3.0),
    "cold": ("keras_cold", "cold", "at least", 5.0),
    "memory": ("memory", "keras_memory", "at most", 0.40),
}


def runtime_rates(artefact: Artefact, chunk: Path) -> dict[str, Callable[[float], float]]:
    """Return what is measured of mlg's runtime: name -> a function that works for some seconds and returns images/s.

    Whole chunks from file to file as in a worker, including decoding (chunk), and the bare net on ready arrays, as many
    threads as cores, in f32 and in bf16 (net, bf16). Nets are loaded when they are first needed.
    """
    f32, bf16 = (NetCache(CACHE / "models", Device(precision=precision)) for precision in ("f32", "bf16"))
    with open_chunk(chunk) as reader:
        images = [reader.read_inputs(item)["image"] for item in reader.items]
    arrays = [decode(image, artefact.height, artefact.width, artefact.crop) for image in images]

    def net_rate(cache: NetCache, seconds: float) -> float:
        net = cache.get("classification", artefact.name, None).net
        return parallel_rate(lambda array: net.infer([array]), arrays, seconds)

    return {
        "chunk": lambda seconds: rate(lambda: len(run_chunk(chunk, chunk.with_suffix(".warm"), f32).items), seconds),
        "net": lambda seconds: net_rate(f32, seconds),
        "bf16": lambda seconds: net_rate(bf16, seconds),
    }


def measure(
    artefact: Artefact, jpegs: list[bytes], rounds: int, seconds: float, *, with_cold: bool = True
) -> tuple[dict[str, float], str]:
    """Measure both sides of one model in turns.

    :return: medians: seconds (cold, keras_cold) and megabytes (memory, keras_memory) of a cold chunk, and warm images
        per second (chunk, net, bf16, keras); how far the answers agree, for people, if there were cold chunks.
    """
    name, models = artefact.name, CACHE / "models"
    seen: dict[str, list[float]] = defaultdict(list)
    agreement = "no cold chunks"
    with tempfile.TemporaryDirectory(prefix="mlg-bench-") as folder:
        chunk, answers = photos.make_chunk(Path(folder) / "chunk.zip", name, jpegs), Path(folder) / "keras.json"
        module = "scripts.benchmarks.models.keras_side"

        def keras_command(way: str, *more: str) -> list[str]:
            return [sys.executable, "-m", module, way, name, str(weights_of(name)), str(chunk), *more]

        for _ in range(rounds if with_cold else 0):
            cold_seconds, results = cold_run(models, name, chunk)
            seen["cold"].append(cold_seconds)
            seen["memory"].append(results.peak_memory_bytes / 1e6)
            command = keras_command("cold", str(answers))
            seen["keras_cold"].append(timed(lambda command=command: subprocess.run(command, check=True)))  # type: ignore[misc]
            keras_answers = json.loads(answers.read_text())
            seen["keras_memory"].append(keras_answers["peak_memory_bytes"] / 1e6)
            agreement = _agreement(artefact, results, keras_answers["probabilities"])

        rates = runtime_rates(artefact, chunk)
        ways = {way: rates[way] for way in ("chunk", "net", *(["bf16"] if has_bf16() else []))}
        pipe = subprocess.PIPE
        with subprocess.Popen(keras_command("warm"), stdin=pipe, stdout=pipe, text=True, bufsize=1) as keras:

            def keras_rate(seconds: float) -> float:
                print(seconds, file=keras.stdin, flush=True)
                return float(keras.stdout.readline())

            ways["keras"] = keras_rate
            for way in ways.values():
                way(0)  # loads the net
            for _ in range(rounds):
                for key, way in ways.items():
                    seen[key].append(way(seconds))
    return {key: statistics.median(figures) for key, figures in seen.items()}, agreement


def _agreement(artefact: Artefact, results: Results, keras_answers: list[list[float]]) -> str:
    """Say how far the answers of both sides agree. :param keras_answers: the probabilities of each image."""
    number_of = {id: number for number, (id, _) in enumerate(artefact.labels)}
    pairs = list(zip([item.output for item in results.items], keras_answers, strict=True))
    same = sum(number_of[output[0][0]] == answer.index(max(answer)) for output, answer in pairs)
    largest = max(abs(share - answer[number_of[id]]) for output, answer in pairs for id, _, share in output)
    return f"{same} of {len(pairs)} first labels as Keras, probabilities differ by up to {largest:.2g}"


def row(artefact: Artefact, seen: dict[str, float], limit: float) -> list[str]:
    """Write the row of one model."""
    flops = gigaflops_of(artefact.folder / "model.xml")
    cold = ["-"] * 6
    if "cold" in seen:
        cold = [
            f"{seen['cold']:.2f}",
            f"{seen['keras_cold']:.2f}",
            f"{seen['keras_cold'] / seen['cold']:.1f}",
            f"{seen['memory']:.0f}",
            f"{seen['keras_memory']:.0f}",
            f"{seen['memory'] / seen['keras_memory']:.0%}",
        ]
    return [
        artefact.name,
        f"{artefact.size_bytes / 1e6:.0f}",
        *cold,
        *(f"{seen[way]:.1f}" for way in ("chunk", "net", "keras")),
        *(f"{seen[way] / seen['keras']:.2f}" for way in ("chunk", "net")),
        f"{flops:.1f}",
        f"{seen['net'] * flops / limit:.0%}",
        f"{seen['bf16'] / seen['net']:.2f}" if "bf16" in seen else "-",
        *(f"{seen[way] / seen['keras']:.2f}" if way in seen else "-" for way in ("bf16", *QUICKEST.values())),
    ]


def judge_copies(name: str, seen: dict[str, float], count: int) -> None:
    """Ask the gate for copies of a model in bf16, and add to its figures the rates in the quickest admitted precision.

    :param count: the photos that judge.
    """
    with tempfile.TemporaryDirectory(prefix="mlg-bench-") as folder:  # each copy has the size of the model
        models = Path(folder)
        (models / name).symlink_to(CACHE / "models" / name)
        for (who, figure), classifier in zip(QUICKEST.items(), (name, train(models, name).name), strict=True):
            copy, judgement = judge(models, classifier, count)
            seen[figure] = max(seen["net"], seen["bf16"]) if copy is not None else seen["net"]
            click.echo(f"{name} {who}: {judgement}\n")


@click.command()
@click.option("--models", help="Names, separated by commas; all sixteen if not given.")
@click.option("--no-cold", is_flag=True, help="Leave the cold chunks out.")
@click.option(
    "--judged", default=70, show_default=True, help="Photos that judge each copy in bf16; 0 builds no copies."
)
@rounds_option(3)
@seconds_option(2.0)
def main(models: str | None, no_cold: bool, judged: int, rounds: int, seconds: float) -> None:
    """Measure the compiled Keras models. Example: scripts/bench models --no-cold --models nasnet_mobile,densenet121

    Compiling takes 10 minutes and 6 GB the first time. Then each model takes some 60 seconds for cold chunks, and as
    many for the warm rates and copies in bf16, the largest three times that.
    vit_base_patch16_224, vit_large_patch16_224 and deit_base are compared with keras-hub: pip install --no-deps
    keras-hub==0.32.0 regex tokenizers
    """
    limit, jpegs = f32_gigaflops(), [photos.encode(name, (500, 375), [90]) for name in photos.PHOTOS]
    rows, figures = [], []
    for name in models.split(",") if models else ORIGINAL_MODELS:
        artefact = artefact_of(name)
        seen, agreement = measure(artefact, jpegs, rounds, seconds, with_cold=not no_cold)
        click.echo(f"{name}: {agreement}", err=True)
        if judged and has_bf16():
            judge_copies(name, seen, judged)
        figures.append(seen)
        rows.append(row(artefact, seen, limit))
    print_table(f"f32 limit of this machine: {limit:.0f} GFLOP/s; medians of {rounds}", HEAD, rows)
    for what, (one, other, bound, wanted) in TARGETS.items():
        if not {one, other} <= figures[0].keys():
            continue
        mean = statistics.geometric_mean(seen[one] / seen[other] for seen in figures)
        is_met = mean >= wanted if bound == "at least" else mean <= wanted
        verdict = "met" if is_met else "missed"
        click.echo(f"{what}: geometric mean {mean:.2f}, required {bound} {wanted:g}: {verdict}")

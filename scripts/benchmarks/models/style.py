"""Style transfer: an iteration of the compiled gradient against tensorflow's and the cores' own rate, and `texture`.

Weights are seeded: neither time nor memory depends on them.
"""

from __future__ import annotations

import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from provider_image.backends.openvino import GRAPH_FILES
from provider_image.compiler import ensure_installed
from provider_image.compiler.keras_graph import import_keras
from provider_image.compiler.keras_weights import WeightsSources, find_weights
from provider_image.compiler.style import vgg19
from provider_image.cores import available_cores
from provider_image.models.artefact import Artefact
from provider_image.models.catalogue import CATALOGUE
from provider_image.style.gradient import CONTENT, STYLES, WEIGHTS, GradientGraph
from scripts.benchmarks.support.measuring import in_turns, print_table, rounds_option, timed

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: Height and width of the image, and of the one that `texture` gets.
SIZE, TEXTURE_SIDE = (384, 512), 384
#: Side of the matrices that show the cores' own rate.
_MATRIX_SIDE = 4096
#: Threads of what ran before wait this long for more work, and take time from others meanwhile.
_PAUSE_SECONDS = 0.2
#: What a process does whose memory is measured: a model's folder, and the side of the images.
_TRANSFER = """
import sys
from pathlib import Path
from provider_image.backends import Device
from provider_image.models.artefact import read_artefact
from provider_image.runtime import peak_memory_bytes
from provider_image.service import check_params
from provider_image.services import load_service
from scripts.benchmarks.models.style import style_inputs
import time

service, artefact = load_service("style_transfer"), read_artefact(Path(sys.argv[1]))
params = check_params(service.params, {"size": sys.argv[2], "iterations": sys.argv[3], "seconds": 600})
net = service.load(artefact, Device())
started = time.process_time()
(output,) = service.run(net, [service.prepare(artefact, style_inputs(), params)], [params])
print(time.process_time() - started, peak_memory_bytes(), output.data["width"], output.data["height"])
"""


def style_inputs() -> dict[str, bytes]:
    """Return a photo and a texture of scikit-image, of 4 : 3, as a client sends them."""
    import numpy as np
    import skimage.data

    from provider_image.images.outputs import encode_image

    content, style = skimage.data.astronaut()[:384], skimage.data.gravel()[:384]
    return {"image": encode_image(content, "png"), "style": encode_image(np.stack([style] * 3, 2), "png")}


def build(folder: Path) -> tuple[Artefact, Any]:
    """Compile `style_vgg19` from seeded weights. :return: the artefact, and Keras' network."""
    import numpy as np

    from tests.seeded_weights import write_weights

    row, keras = CATALOGUE["style_vgg19"], import_keras()
    assert row.weights is not None
    keras.utils.set_random_seed(1)
    network = keras.applications.VGG19(weights=None, include_top=False)
    random = np.random.default_rng(1)
    for layer in network.layers:
        if layer.weights:
            kernel, bias = layer.get_weights()
            layer.set_weights([random.normal(0, np.sqrt(2 / (9 * kernel.shape[2])), kernel.shape), bias])
    write_weights(network, folder / row.weights.file)
    weights = find_weights(row, WeightsSources(given=folder, cache=folder))
    return vgg19.build(folder / "models", row, weights), network


def floating_point_operations(network: Any, height: int, width: int) -> int:
    """Count the operations of an iteration: each convolution forward and backward, and the products of features."""
    total, layers = 0, vgg19.layers_of(network)
    for layer in layers:
        _, _, before, after = layer.kernel.shape
        total += 2 * 2 * 9 * before * after * height * width
        if layer.compared_as in STYLES:
            total += 2 * 2 * after * after * height * width
        if layer.is_pooled:
            height, width = height // 2, width // 2
    return total


def tensorflow_iteration(network: Any, wanted: dict[str, Array], image: Array) -> Callable[[], object]:
    """Return what computes the same loss and its gradient by tensorflow, compiled to a graph."""
    tensorflow, keras = importlib.import_module("tensorflow"), import_keras()
    goals = {name: tensorflow.constant(value) for name, value in wanted.items()}
    content = tensorflow.constant(wanted[CONTENT].transpose(0, 2, 3, 1))
    variable = tensorflow.Variable(image.transpose(0, 2, 3, 1))

    @tensorflow.function  # type: ignore[untyped-decorator]
    def iterate() -> Any:
        with tensorflow.GradientTape() as tape:
            loss = 0.0
            for name, features in vgg19.keras_features(keras, network, variable).items():
                if name == CONTENT:
                    difference, weight = features - content, goals[WEIGHTS][0] / 2
                else:
                    rows = tensorflow.reshape(features, (-1, features.shape[-1]))
                    pixels = float(rows.shape[0])
                    difference = tensorflow.matmul(rows, rows, transpose_a=True) / pixels - goals[name]
                    weight = goals[WEIGHTS][1 + STYLES.index(name)]
                loss += weight * tensorflow.reduce_mean(tensorflow.square(difference))
        return loss, tape.gradient(loss, variable)

    return lambda: [each.numpy() for each in iterate()]


def in_process(folder: Path, side: int, iterations: int) -> tuple[float, int, str]:
    """Transfer a style in a process of its own.

    :return: seconds of processors, peak memory in bytes, and the size of the answer.
    """
    arguments = [sys.executable, "-c", _TRANSFER, str(folder), str(side), str(iterations)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # as a worker has it
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
    seconds, peak_bytes, width, height = done.stdout.split()
    return float(seconds), int(peak_bytes), f"{width} x {height}"


@click.command()
@rounds_option(15)
def main(rounds: int) -> None:
    """Measure style transfer. Takes some two minutes. Example: scripts/bench style --rounds 5"""
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="mlg-bench-") as name:
        folder = Path(name)
        texture = ensure_installed(folder / "models", "texture")
        runs = [in_process(texture.folder, TEXTURE_SIDE, 0) for _ in range(min(rounds, 3))]
        seconds, peak, size = (statistics.median(run[0] for run in runs), max(run[1] for run in runs), runs[0][2])
        click.echo(f"texture, {size}: median {seconds:.1f} s of one core, {peak / 1e6:.0f} MB at peak")
        artefact, network = build(folder)
        _, peak, size = in_process(artefact.folder, SIZE[1], 3)
        click.echo(f"style_vgg19, {size}: {peak / 1e6:.0f} MB at peak")
        image, other = np.random.default_rng(1).uniform(0, 255, (2, 1, 3, *SIZE)).astype(np.float32)
        graph = GradientGraph(artefact.folder / GRAPH_FILES[0], available_cores(), "f32")
        wanted = graph.describe(image, [CONTENT]) | graph.describe(other, STYLES)
        wanted[WEIGHTS] = np.ones(1 + len(STYLES), np.float32)
        started = time.perf_counter()
        objective = graph.objective(wanted, image.shape)
        click.echo(f"compiling for {size}: {time.perf_counter() - started:.1f} s")
        theirs = tensorflow_iteration(network, wanted, image)
        one, two = np.random.default_rng(1).random((2, _MATRIX_SIDE, _MATRIX_SIDE), np.float32)
        product_work = 2 * _MATRIX_SIDE**3

        def product() -> object:
            return one @ two

        found = in_turns(
            rounds + 1,  # the first warms up
            {
                "openvino": lambda turn: _seconds(lambda: objective(image)),
                "tensorflow": lambda turn: _seconds(theirs),
                "product of matrices": lambda turn: _seconds(product),
            },
        )
        work = {way: floating_point_operations(network, *SIZE) for way in found} | {"product of matrices": product_work}
        turns = {way: runs[1:] for way, runs in found.items()}
        wall, busy = (
            {way: statistics.median(each[kind] for each in runs) for way, runs in turns.items()} for kind in (0, 1)
        )
        # Of each turn, so that what else the machine does in it affects both.
        ratios = {
            way: [
                sorted(
                    one[kind] / other[kind] * work["tensorflow"] / work[way]
                    for one, other in zip(runs, turns["tensorflow"], strict=True)
                )
                for kind in (0, 1)
            ]
            for way, runs in turns.items()
        }
        rate = work["product of matrices"] / busy["product of matrices"]
        rows = [
            [
                way,
                f"{wall[way]:.2f}",
                f"{busy[way]:.2f}",
                *(f"{statistics.median(each):.2f}" for each in ratios[way]),
                f"{100 * work[way] / busy[way] / rate:.0f} %",
            ]
            for way in found
        ]
        head = (
            "",
            "s",
            "s of processors",
            "of tensorflow's, clock",
            "of tensorflow's, processors",
            "of the cores' rate",
        )
        print_table(f"An iteration of {work['openvino'] / 1e9:.0f} GFLOP, {size}; {rounds} turns", head, rows)
        middle = [each[len(each) // 4 : len(each) - len(each) // 4] for each in ratios["openvino"]]
        clock, processors = (f"{each[0]:.2f} to {each[-1]:.2f}" for each in middle)
        click.echo(f"the middle half of the turns: {clock} of tensorflow's by the clock, {processors} of processors")


def _seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Time a call. :return: seconds, and seconds of processors, which other processes on the machine change less."""
    time.sleep(_PAUSE_SECONDS)
    started = time.process_time()
    seconds = timed(work)
    return seconds, time.process_time() - started

"""Images per second on a GPU through the runtime, against what the card computes on arrays that are ready.

The model has the layers of ResNet-50 and seeded weights: speed does not depend on what they are. Without a GPU it says
so; `--device cpu` runs the same code on the processor, to try it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from provider_image.backends import Device, load_net
from provider_image.backends.onnxruntime import check_device
from provider_image.compiler.custom import CustomModel
from provider_image.compiler.onnx_models import builder
from provider_image.cores import available_cores
from provider_image.errors import ConfigError
from provider_image.images.decoding import decode
from provider_image.models.artefact import Artefact
from provider_image.runtime import NetCache, run_chunk
from scripts.benchmarks.support import photos
from scripts.benchmarks.support.measuring import (
    in_turns,
    medians,
    parallel_rate,
    print_table,
    rate,
    rounds_option,
    work_folder,
)

MODEL, SIDE, CLASSES = "card", 224, 1000
#: Blocks of each stage, their inner channels, and the stride of the first.
STAGES = ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2))


def residual_network() -> Any:
    """Make an ONNX classifier with the layers of ResNet-50; its normalisation is part of the convolutions."""
    import numpy as np
    import onnx

    random, nodes, weights, names = np.random.default_rng(7), [], [], (f"v{number}" for number in itertools.count())

    def weight(*shape: int) -> str:
        deviation = (2 / np.prod(shape[1:])) ** 0.5 / 2
        values = random.normal(0, deviation, shape) if len(shape) > 1 else np.zeros(shape)
        weights.append(onnx.numpy_helper.from_array(values.astype(np.float32), next(names)))
        return str(weights[-1].name)

    def add(operator: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(onnx.helper.make_node(operator, inputs, [next(names)], **attributes))
        return str(nodes[-1].output[0])

    def convolve(value: str, taken: int, given: int, side: int, stride: int = 1) -> str:
        around = [side // 2] * 4
        return add("Conv", value, weight(given, taken, side, side), weight(given), strides=[stride] * 2, pads=around)

    value = add("Relu", convolve("image", 3, 64, 7, 2))
    value, channels = add("MaxPool", value, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4), 64
    for blocks, inner, first_stride in STAGES:
        for stride in (first_stride, *[1] * (blocks - 1)):
            is_same = stride == 1 and channels == 4 * inner
            kept = value if is_same else convolve(value, channels, 4 * inner, 1, stride)
            value = add("Relu", convolve(value, channels, inner, 1))
            value = add("Relu", convolve(value, inner, inner, 3, stride))
            value, channels = add("Relu", add("Add", convolve(value, inner, 4 * inner, 1), kept)), 4 * inner
    value = add("Flatten", add("GlobalAveragePool", value), axis=1)
    value = add("Softmax", add("Gemm", value, weight(channels, CLASSES), weight(CLASSES)), axis=1)
    shapes = {"image": ("N", 3, SIDE, SIDE), value: ("N", CLASSES)}
    taken, given = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()
    )
    graph = onnx.helper.make_graph(nodes, "residual", [taken], [given], weights)
    return onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])


def install_model(folder: Path) -> Artefact:
    """Install the model in `folder/models`, as `mlg models compile --onnx FILE --gpu` does."""
    file, labels = folder / "card.onnx", folder / "labels.txt"
    file.write_bytes(residual_network().SerializeToString())
    labels.write_text("\n".join(f"class {number}" for number in range(CLASSES)))
    custom = CustomModel(
        name=MODEL, kind="onnx", file=file, labels=labels, preprocessing="torch", backend="onnxruntime"
    )
    return builder.build(folder / "models", custom)


def ready_rate(artefact: Artefact, device: Device, arrays: list[Any], seconds: float) -> float:
    """Run batches of ready arrays from two threads. :return: images per second."""
    net = load_net(artefact, device)
    batch = list(itertools.islice(itertools.cycle(arrays), net.batch_items))
    net.infer(batch)  # the first batch of a size is slower

    def turn(_: int) -> float:
        return rate(lambda: len(net.infer(batch)), seconds)

    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(turn, range(2)))


def chunk_rate(nets: NetCache, chunk: Path, at_once: int, seconds: float) -> float:
    """Run a chunk again and again, so many times at once. :return: images per second."""

    def turn(number: int) -> float:
        results = chunk.with_name(f"results-{number}.zip")
        return rate(lambda: len(run_chunk(chunk, results, nets).items), seconds)

    with ThreadPoolExecutor(at_once) as pool:
        return sum(pool.map(turn, range(at_once)))


@click.command()
@click.option("--device", "name", default="cuda:0", show_default=True, help="The card.")
@click.option("--batch-items", default=32, show_default=True, help="Images that it gets at once.")
@click.option("--seconds", default=5.0, show_default=True, help="Length of one measurement.")
@rounds_option(3)
def main(name: str, batch_items: int, seconds: float, rounds: int) -> None:
    """Measure a GPU. Example: scripts/bench gpu --batch-items 64"""
    device = Device(name=name, threads=available_cores(), batch_items=batch_items)
    try:
        click.echo(check_device(device))
    except ConfigError as error:
        click.echo(f"There is no GPU to measure here, so there are no figures. {error.reason}")
        return
    jpegs = photos.photo_jpegs()
    with work_folder() as folder:
        artefact = install_model(folder)
        chunk = photos.make_chunk(folder / "chunk.zip", MODEL, jpegs)
        arrays = [decode(jpeg, SIDE, SIDE, artefact.crop) for jpeg in jpegs]
        nets = NetCache(artefact.folder.parent, device)
        run_chunk(chunk, folder / "first.zip", nets)
        at_once = 2 + -(-2 * batch_items // photos.CHUNK_ITEMS)
        seen = in_turns(
            rounds,
            {
                "the card, arrays ready": lambda _: [ready_rate(artefact, device, arrays, seconds)],
                "decoding alone": lambda _: [
                    parallel_rate(lambda jpeg: decode(jpeg, SIDE, SIDE, artefact.crop), jpegs, seconds)
                ],
                "chunks of JPEGs": lambda _: [chunk_rate(nets, chunk, at_once, seconds)],
            },
        )
    head = ("what", "images/s", "of the card's limit")
    print_table(f"{name}, batches of {batch_items}, {device.threads} cores", head, _rows(seen))


def _rows(seen: dict[str, list[list[float]]]) -> Iterator[tuple[str, str, str]]:
    found = {what: medians(runs)[0] for what, runs in seen.items()}
    limit = found["the card, arrays ready"]
    for what, images in found.items():
        yield what, f"{images:.1f}", f"{images / limit:.0%}"

"""Resizing by the compiled part against Pillow: processor time of one image, of its decoding, and with inference."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import click
import numpy as np
from PIL import Image

from provider_image.backends import Device, load_net
from provider_image.compiler import ensure_installed
from provider_image.images.decoding import decode
from provider_image.images.resampling import resampler
from provider_image.models.artefact import Artefact
from scripts.benchmarks.support import photos
from scripts.benchmarks.support.measuring import in_turns, medians, print_table, rounds_option, work_folder

MODEL = "efficientnet_lite0"
BICUBIC = Image.Resampling.BICUBIC


def centre_box(image: Image.Image, artefact: Artefact) -> tuple[int, int, int, int]:
    """Return the box of the centre crop that the model takes."""
    side = int((artefact.crop or 1) * min(image.size))
    left, top = (image.width - side + 1) // 2, (image.height - side + 1) // 2
    return left, top, left + side, top + side


def decode_by_pillow(jpeg: bytes, artefact: Artefact) -> np.ndarray:
    """Decode a JPEG as a program without mlg would, with Pillow alone, to the same pixels."""
    with Image.open(io.BytesIO(jpeg)) as image:
        rgb = image.convert("RGB")
        return np.asarray(rgb.resize((artefact.width, artefact.height), BICUBIC, centre_box(rgb, artefact)))


def decode_by_mlg(jpeg: bytes, artefact: Artefact) -> np.ndarray:
    """Decode a JPEG as a worker does."""
    return decode(jpeg, artefact.height, artefact.width, artefact.crop)


def cost(work: Callable[[bytes], object], jpegs: list[bytes]) -> list[float]:
    """Return the milliseconds of processor time of each image."""
    found = []
    for jpeg in jpegs:
        started = time.process_time()
        work(jpeg)
        found.append(1000 * (time.process_time() - started))
    return found


@click.command()
@rounds_option(15)
def main(rounds: int) -> None:
    """Measure resizing. Example: scripts/bench resizing"""
    jpegs = photos.photo_jpegs()
    with work_folder() as folder:
        artefact = ensure_installed(folder / "models", MODEL)
        net = load_net(artefact, Device(threads=1))
        size = artefact.width, artefact.height
        loaded = {}
        for jpeg in jpegs:
            loaded[jpeg] = Image.open(io.BytesIO(jpeg))
            loaded[jpeg].load()
        ways = {
            ("resize", "Pillow"): lambda jpeg: loaded[jpeg].resize(size, BICUBIC, centre_box(loaded[jpeg], artefact)),
            ("resize", "mlg"): lambda jpeg: resampler().resize(
                loaded[jpeg], size, BICUBIC, centre_box(loaded[jpeg], artefact)
            ),
            ("decode and resize", "Pillow"): lambda jpeg: decode_by_pillow(jpeg, artefact),
            ("decode and resize", "mlg"): lambda jpeg: decode_by_mlg(jpeg, artefact),
            ("decode, resize, infer", "Pillow"): lambda jpeg: net.infer([decode_by_pillow(jpeg, artefact)]),
            ("decode, resize, infer", "mlg"): lambda jpeg: net.infer([decode_by_mlg(jpeg, artefact)]),
        }
        for jpeg in jpegs:
            assert np.array_equal(decode_by_pillow(jpeg, artefact), decode_by_mlg(jpeg, artefact))
        seen = in_turns(rounds, {name: lambda _, work=work: cost(work, jpegs) for name, work in ways.items()})
    median = {name: sum(medians(figures)) / len(jpegs) for name, figures in seen.items()}
    rows = [
        (
            what,
            f"{median[what, 'Pillow']:.2f}",
            f"{median[what, 'mlg']:.2f}",
            f"{median[what, 'mlg'] / median[what, 'Pillow']:.2f}",
        )
        for what, by in ways
        if by == "mlg"
    ]
    title = f"JPEGs of 113 KB, 800 x 600, {MODEL}, resized by {resampler()}"
    print_table(title, ("what", "Pillow, ms", "mlg, ms", "ratio"), rows)

"""A tiny classifier of colours, and photos for it, for tests of copies in other precisions."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from provider_image.backends.openvino import import_openvino
from provider_image.compiler.installing import begin_artefact, build_folder, install
from provider_image.compiler.verification import verify_and_install
from provider_image.models.artefact import Artefact, Reduced, read_artefact
from provider_image.models.catalogue import ModelFacts
from provider_image.models.processor import processor_id

SIDE = 32
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def install_colours(models: Path, name: str = "colours", *, outlier: float = 1.0) -> Artefact:
    """Install a classifier: a convolution, a depthwise and a pointwise one, an average, a product and a softmax.

    The probability of the image's colour is near 1, so that no rounding changes the label.

    :param outlier: what the channel that nothing depends on is multiplied with. With 1000 the others vanish in int8
        where they share one range of numbers with it, which is at the input of the pointwise convolution.
    """
    openvino = import_openvino()
    op, random = openvino.opset13, np.random.default_rng(7)
    image = op.parameter([1, SIDE, SIDE, 3], openvino.Type.u8)
    x = op.transpose(op.divide(op.convert(image, "f32"), op.constant(np.float32(255))), np.array([0, 3, 1, 2]))
    # Channels 0 to 2 are the colours, the others mixtures, the last one is the sum.
    first = np.concatenate([np.eye(3), random.uniform(0, 1, (4, 3)), np.full((1, 3), outlier)]).astype(np.float32)
    x = _convolution(op, x, np.repeat(np.repeat(first[:, :, None, None] / 9, 3, 2), 3, 3), stride=2)
    depthwise = np.full((8, 1, 1, 3, 3), 1 / 9, np.float32)
    x = op.relu(op.group_convolution(x, op.constant(depthwise), [1, 1], [1, 1], [1, 1], [1, 1]))
    second = np.zeros((6, 8), np.float32)
    second[:3, :3] = np.eye(3)
    second[3:, 3:7] = random.uniform(0, 0.1, (3, 4))
    x = _convolution(op, x, second[:, :, None, None])
    x = op.reduce_mean(x, op.constant(np.array([2, 3])), False)
    last = np.concatenate([np.eye(3) * 20, np.zeros((3, 3))]).astype(np.float32)
    graph = openvino.Model([op.softmax(op.matmul(x, op.constant(last), False, False), 1)], [image], name)
    row = ModelFacts(name=name, title="Colours", height=SIDE, width=SIDE, preprocessing="unit", source="own")
    labels = tuple((colour, colour) for colour in COLOURS)
    draft = begin_artefact(row, labels=labels, weights_sha256="0" * 64, recipe="colours-1", reference="test")
    with build_folder(models, name) as folder:
        return verify_and_install(graph, folder, models, draft)


def _convolution(op: Any, x: Any, weights: Any, stride: int = 1) -> Any:
    padding = [weights.shape[2] // 2] * 2
    weights = op.constant(weights.astype(np.float32))
    return op.relu(op.convolution(x, weights, [stride, stride], padding, padding, [1, 1]))


def install_copy(models: Path, name: str, **facts: Any) -> Artefact:
    """Install what says that it is a copy of a model in int8 and passed on this processor; its files are the model's.

    :param facts: other figures of its judgement.
    """
    model = read_artefact(models / name)
    judgement: dict[str, Any] = {
        "base": name, "base_digest": model.digest, "precision": "int8", "layers": 4, "layers_in_f32": 1,
        "calibration_images": 300, "images": 1000, "same_first_label": 995, "agreement_low": 0.988,
        "agreement_high": 0.998, "largest_difference": 0.1, "median_difference": 0.01, "bound": 0.2,
        "processor": "a processor", "processor_id": processor_id(), "speedup": 2.0,
    }  # fmt: skip
    copy = replace(model, name=f"{name}_int8", reduced=Reduced(**{**judgement, **facts}))
    with build_folder(models, copy.name) as folder:
        for file in model.file_names:
            shutil.copyfile(model.folder / file, folder / file)
        return install(copy, folder, models, tuple(model.files))


def photo(colour: tuple[int, int, int], random: np.random.Generator) -> bytes:
    """Make an image of a colour with noise."""
    pixels = np.clip(np.array(colour) + random.normal(0, 15, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_photos(folder: Path, count: int) -> Path:
    """Write different images, each of one of the colours, and two files that are none of those."""
    random = np.random.default_rng(11)
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:03}.png").write_bytes(photo(list(COLOURS.values())[number % 3], random))
    (folder / "copy.png").write_bytes((folder / "000.png").read_bytes())
    (folder / "notes.txt").write_text("no image")
    return folder

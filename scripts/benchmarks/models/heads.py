"""Own classifiers on the features of a backbone: accuracy on images that come with packages, and the time of a fit."""

from __future__ import annotations

import functools
import io
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from provider_image.backends import Device
from provider_image.backends.openvino import load_net
from provider_image.compiler import ensure_installed
from provider_image.cores import available_cores
from provider_image.images.decoding import decode
from provider_image.models.artefact import Artefact
from scripts.benchmarks.support.measuring import rounds_option, timed
from trainer.figures import Figures, classification_figures
from trainer.fitting import fit_and_evaluate_classes
from trainer.heads import Head, fit_classifier
from trainer.splitting import find_groups

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

MODEL = "efficientnet_lite0_embedding"


def faces() -> tuple[list[bytes], list[str]]:
    """Return the 200 images of scikit-image's lfw_subset: the first half are faces."""
    import skimage.data

    return [_png(each * 255) for each in skimage.data.lfw_subset()], ["face"] * 100 + ["no face"] * 100


def digits() -> tuple[list[bytes], list[str]]:
    """Return scikit-learn's 1,797 digits of 8 x 8 pixels, in a black frame of a pixel.

    They reach to the edges, of which the backbone cuts a sixteenth off.
    """
    import numpy as np
    from sklearn.datasets import load_digits

    found = load_digits()
    return [_png(np.pad(each * 255 / 16, 1)) for each in found.images], [str(each) for each in found.target]


def _png(pixels: Array) -> bytes:
    import numpy as np
    import PIL.Image

    file = io.BytesIO()
    PIL.Image.fromarray(np.rint(pixels).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def features_of(artefact: Artefact, images: Sequence[bytes]) -> Array:
    """Compute the features of images by an embedding, f32 of shape (images, dimensions)."""
    import numpy as np

    net = load_net(artefact, Device(threads=available_cores()))

    def run(data: bytes) -> Array:
        return net.infer([decode(data, artefact.height, artefact.width, artefact.crop)])[0]

    with ThreadPoolExecutor(available_cores()) as pool:
        return np.stack(list(pool.map(run, images)))


def evaluate(features: Array, labels: Sequence[str], of_each: int, seed: int) -> tuple[Head, float, str]:
    """Learn from some images of each class and answer the rest."""
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    learn: list[int] = []
    for name in sorted(set(labels)):
        mine = [each for each in order if labels[each] == name]
        learn += mine[:of_each]
    rest = sorted(set(order) - set(learn))
    groups = find_groups(features[learn]).numbers
    head = fit_classifier(features[learn], [labels[each] for each in learn], groups, seed=seed)
    found = classification_figures(
        head.classes, [labels[each] for each in rest], head.apply(features[rest]), list(map(str, rest))
    )
    return head, *_describe(found)


def evaluate_holdout(features: Array, labels: Sequence[str], seed: int) -> tuple[Head, float, str]:
    """Do what a training does: a fifth is held out, with near-duplicates on one side."""
    found = fit_and_evaluate_classes(features, labels, [str(each) for each in range(len(labels))], seed=seed)
    return found.head, *_describe(found.figures)


def _describe(figures: Figures) -> tuple[float, str]:
    assert figures.accuracy is not None
    return figures.accuracy, f"{figures.accuracy_low:.3f} to {figures.accuracy_high:.3f} of {figures.count}"


@click.command()
@rounds_option(10)
def main(rounds: int) -> None:
    """Train classifiers on splits with different seeds. Example: scripts/bench heads"""
    with tempfile.TemporaryDirectory(prefix="mlg-bench-") as folder:
        artefact = ensure_installed(Path(folder) / "models", MODEL)
        images, labels = faces()
        features = features_of(artefact, images)
        for of_each in (5, 10, 20):
            runs = [evaluate(features, labels, of_each, seed) for seed in range(rounds)]
            _report(f"faces, {of_each} of each class", runs)
        images, labels = digits()
        features = features_of(artefact, images)
        _report("digits, a fifth held out", [evaluate_holdout(features, labels, seed) for seed in range(rounds)])
    fit = functools.partial(fit_classifier, features[:1000], labels[:1000], find_groups(features[:1000]).numbers)
    started = time.process_time()
    seconds = [timed(fit) for _ in range(rounds)]
    busy = (time.process_time() - started) / rounds
    click.echo(
        f"fit of 1,000 x {features.shape[1]}, ten classes: median {statistics.median(seconds):.2f} s, {busy:.2f} s of "
        "processor time"
    )


def _report(what: str, runs: list[tuple[Head, float, str]]) -> None:
    runs = sorted(runs, key=lambda run: run[1])
    head, accuracy, interval = runs[len(runs) // 2]
    click.echo(
        f"{what}: median accuracy {accuracy:.4f} (interval {interval}; {runs[0][1]:.4f} to {runs[-1][1]:.4f} over "
        f"{len(runs)} splits), {head.method}"
    )

"""How often the top five labels change when JPEGs are decoded at reduced scale, by the margin.

For a model that uses the centre of an image, and for compiled Keras models, which use the whole of it. The latter have
seeded weights, which are more sensitive to small differences than trained ones: compare their numbers with those for
noise of one grey level, which is invisible.
"""

from __future__ import annotations

import io
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from provider_image.backends import Device
from provider_image.compiler import ensure_installed
from provider_image.cores import available_cores
from provider_image.images import decoding
from provider_image.models.artefact import Artefact
from provider_image.services.classification import Classification
from scripts.benchmarks import photos
from scripts.benchmarks.keras_models import ORIGINAL_MODELS, cache_folder, compiled_model

SIZES = (
    (640, 560), (800, 600), (900, 600), (1024, 768), (1100, 740),
    (1280, 960), (1600, 1200), (2000, 1500), (3000, 2000), (4000, 3000),
)  # fmt: skip
QUALITIES = (60, 75, 85, 92, 96)
MARGINS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
#: Whole images are also decoded to these sizes for a model that uses the centre.
WHOLE_SIDES = (224, 299, 331)
#: Labels whose probabilities are closer than this may swap.
NEAR_TIE = 0.005
#: With a crop at 224, then whole images at 224, 299 and 331.
MODELS = "efficientnet_lite0,nasnet_mobile,inception_v3,nasnet_large"


@click.command()
@click.option("--models", default=MODELS, show_default=True, help="Names, separated by commas.")
def main(models: str) -> None:
    """Measure the effect of reduced scale. Example: scripts/bench reduced_scale --models efficientnet_lite0

    Takes two seconds (EfficientNet-Lite0) to four minutes (NASNet-Large) a model, besides compiling and encoding.
    """
    for name in models.split(","):
        artefact = (
            compiled_model(name).artefact
            if name in ORIGINAL_MODELS
            else ensure_installed(cache_folder() / "models", name)
        )
        _print(artefact, artefact.height, artefact.crop, _measure(artefact, artefact.height, artefact.crop))
        # The only trained weights that are always available, so they are used for the geometry of other models as well.
        for side in WHOLE_SIDES if artefact.crop else ():
            _print(artefact, side, None, _measure(artefact, side, None))


class AnswerChanges:
    """The changes of the results of all images."""

    def __init__(self) -> None:
        self.images = 0
        #: Images that are reduced at the default margin.
        self.reduced = 0
        #: Margin or "noise" -> how often changed: the first label, the set of five, the set of five by labels that were
        #: further apart than NEAR_TIE.
        self.changed: dict[str, list[int]] = {}

    def add(self, whole: list[Any], answers: dict[str, list[Any]], is_reduced: bool) -> None:
        """Compare the results of one image with that of the image decoded at full scale."""
        self.images += 1
        self.reduced += is_reduced
        likely = {row[1]: row[2] for row in whole}
        for what, answer in answers.items():
            before, after = ({row[1] for row in rows[:5]} for rows in (whole, answer))
            gone, new = (
                [likely.get(label, whole[-1][2]) for label in labels] for labels in (before - after, after - before)
            )
            counts = self.changed.setdefault(what, [0, 0, 0])
            counts[0] += whole[0][1] != answer[0][1]
            counts[1] += before != after
            counts[2] += before != after and max(gone) - min(new) > NEAR_TIE


def _measure(artefact: Artefact, side: int, crop: float | None) -> AnswerChanges:
    """Classify every image decoded in full, at each margin, and in full with noise.

    :param side: what is decoded to; the model's own input is made from that.
    """
    service = Classification()
    net = service.load(artefact, Device())
    noise = np.random.default_rng(1).integers(-1, 2, (side, side, 3))

    def compare(jpeg: bytes) -> tuple[list[Any], dict[str, list[Any]], bool]:
        known: dict[bytes, list[Any]] = {}

        def classify(array: Any) -> list[Any]:
            pixels = array.tobytes()
            if pixels not in known:  # most margins give the same scale
                known[pixels] = service.run(net, [_resized(array, artefact)], [{}])[0].data
            return known[pixels]

        arrays = {
            margin: decoding.decode(jpeg, side, side, crop, margin=margin)
            for margin in (math.inf, decoding.DRAFT_MARGIN, *MARGINS)
        }
        whole = arrays[math.inf]
        answers = {f"{margin:g}": classify(arrays[margin]) for margin in MARGINS}
        answers["noise"] = classify(np.clip(whole + noise, 0, 255).astype(np.uint8))
        return classify(whole), answers, bool((arrays[decoding.DRAFT_MARGIN] != whole).any())

    seen = AnswerChanges()
    with ThreadPoolExecutor(available_cores()) as pool:
        for name in photos.PHOTOS:
            photo = Image.open(photos.photo_folder() / name).convert("RGB")
            for size in SIZES:
                resized = photo.resize(size, Image.Resampling.BICUBIC)
                # Not in the threads: Pillow keeps the quality in the image while it saves.
                jpegs = [_encode(resized, quality) for quality in QUALITIES]
                for whole, answers, is_reduced in pool.map(compare, jpegs):
                    seen.add(whole, answers, is_reduced)
    return seen


def _resized(array: Any, artefact: Artefact) -> Any:
    if array.shape[:2] == (artefact.height, artefact.width):
        return array
    size = (artefact.width, artefact.height)
    return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BICUBIC))


def _encode(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _print(artefact: Artefact, side: int, crop: float | None, seen: AnswerChanges) -> None:
    part = f"centre, {crop:g}" if crop else "whole"
    Console().print(
        f"\n{artefact.name} at {side} ({part}): {seen.images} images, of which a margin of "
        f"{decoding.DRAFT_MARGIN:g} reduces {seen.reduced}"
    )
    table = Table("margin", "first label changed", "top five changed", f"by more than {NEAR_TIE:.1%}")
    for what, counts in seen.changed.items():
        table.add_row(what, *map(str, counts))
    Console().print(table)

"""How often the top five labels change when JPEGs are decoded at reduced scale, by the margin.

For a model that uses the centre of an image, and for compiled Keras models, which use the whole of it. The latter have
seeded weights, which are more sensitive to small differences than trained ones: compare their numbers with those for
noise of one grey level, which is invisible.
"""

from __future__ import annotations

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click
import numpy as np
from PIL import Image

from provider_image.backends import Device
from provider_image.cores import available_cores
from provider_image.images.decoding import DRAFT_MARGIN, decode
from provider_image.models.artefact import Artefact
from provider_image.services.classification import Classification
from scripts.benchmarks import photos
from scripts.benchmarks.keras_models import artefact_of
from scripts.benchmarks.measuring import print_table

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

    Takes some seconds (EfficientNet-Lite0) to four minutes (NASNet-Large) a model, besides compiling and encoding.
    """
    for name in models.split(","):
        artefact = artefact_of(name)
        measure(artefact, artefact.height, artefact.crop)
        # The only trained weights that are always available, so they are used for the geometry of other models as well.
        for side in WHOLE_SIDES if artefact.crop else ():
            measure(artefact, side, None)


def changes(whole: list[Any], answer: list[Any]) -> list[str]:
    """Say what differs between the results of an image decoded at full scale and decoded otherwise."""
    before, after = ({row[1] for row in rows[:5]} for rows in (whole, answer))
    found = ["first"] if whole[0][1] != answer[0][1] else []
    if before != after:
        likely = {row[1]: row[2] for row in whole}
        gone, new = ([likely.get(label, whole[-1][2]) for label in some] for some in (before - after, after - before))
        found += ["five", "clearly"] if max(gone) - min(new) > NEAR_TIE else ["five"]
    return found


def measure(artefact: Artefact, side: int, crop: float | None) -> None:
    """Classify every image decoded in full, at each margin, and in full with noise, and print the changes.

    :param side: what is decoded to; the model's own input is made from that.
    """
    service = Classification()
    net = service.load(artefact, Device())
    noise = np.random.default_rng(1).integers(-1, 2, (side, side, 3))

    def compare(jpeg: bytes) -> list[tuple[str, str]]:
        """Return the changes, each with its margin or "noise"."""
        known: dict[bytes, list[Any]] = {}

        def classify(array: Any) -> list[Any]:
            pixels = array.tobytes()
            if pixels not in known:  # most margins give the same scale
                known[pixels] = service.run(net, [_resized(array, artefact)], [{}])[0].data
            return known[pixels]

        whole = decode(jpeg, side, side, crop, margin=math.inf)
        answers = {f"{margin:g}": classify(decode(jpeg, side, side, crop, margin=margin)) for margin in MARGINS}
        answers["noise"] = classify(np.clip(whole + noise, 0, 255).astype(np.uint8))
        return [(what, change) for what, answer in answers.items() for change in changes(classify(whole), answer)]

    # Encoded in this thread: Pillow keeps the quality in the image while it saves.
    jpegs = (photos.encode(name, size, [quality]) for name in photos.PHOTOS for size in SIZES for quality in QUALITIES)
    with ThreadPoolExecutor(available_cores()) as pool:
        seen = Counter(found for several in pool.map(compare, jpegs) for found in several)
    count = len(photos.PHOTOS) * len(SIZES) * len(QUALITIES)
    part = f"centre, {crop:g}" if crop else "whole"
    print_table(
        f"{artefact.name} at {side} ({part}): {count} images; the runtime's margin is {DRAFT_MARGIN:g}",
        ("margin", "first label changed", "top five changed", f"by more than {NEAR_TIE:.1%}"),
        [
            (what, *(seen[what, change] for change in ("first", "five", "clearly")))
            for what in (*(f"{margin:g}" for margin in MARGINS), "noise")
        ],
    )


def _resized(array: Any, artefact: Artefact) -> Any:
    if array.shape[:2] == (artefact.height, artefact.width):
        return array
    size = (artefact.width, artefact.height)
    return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BICUBIC))

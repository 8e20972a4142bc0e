"""Copies of EfficientNet-Lite0 in bf16 and int8: how often their answers stay, and how much quicker they are.

Photos are parts of those in the wheels of scikit-image and scikit-learn, of different sizes and places. That is harder
than an operator's own photos: many parts show nothing that is one of the classes, so that the model is unsure.
"""

from __future__ import annotations

import io
import statistics
import tempfile
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np
from PIL import Image

from provider_image.backends import Device, Net, load_net
from provider_image.compiler import ensure_installed
from provider_image.compiler.reduced import builder
from provider_image.compiler.reduced.comparison import compare
from provider_image.compiler.reduced.photos import decode_photos, list_photos
from provider_image.errors import ConfigError, UnsuitableModel
from provider_image.models.artefact import Artefact
from provider_image.precision import REDUCED
from scripts.benchmarks.support.measuring import in_turns, parallel_rate, print_table, rounds_option, seconds_option

MODEL = "efficientnet_lite0"
#: Package -> its colour photos, below the package's folder. Drawings and pictures of a microscope are left out.
PHOTOS = {
    "skimage": ("data", ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}
#: Shares of the shorter side that a part has.
SHARES = (0.5, 1.0)
SIDE = 256


def write_parts(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Write so many different parts of the photos as JPEG.

    :return: the name of the photo that each is of, in the order of the files' names.
    """
    photos = []
    for package, (place, names) in PHOTOS.items():
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None
        photos += [(name, Image.open(Path(spec.origin).parent / place / name).convert("RGB")) for name in names]
    random, found = np.random.default_rng(seed), []
    for number in range(count):
        name, photo = photos[number % len(photos)]
        side = int(min(photo.size) * random.uniform(*SHARES))
        left, top = (int(random.integers(0, length - side + 1)) for length in photo.size)
        part = photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        if random.integers(2):
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        buffer = io.BytesIO()
        part.save(buffer, "JPEG", quality=92)
        (folder / f"{number:05}.jpg").write_bytes(buffer.getvalue())
        found.append(name)
    return found


def build_copy(models: Path, base: str, precision: str, photos: Path) -> tuple[Artefact | None, str]:
    """Build a copy as `mlg models compile --precision` does. :return: it, or None if it was refused; its judgement."""
    try:
        artefact = builder.build(models, base, precision, photos, on_step=lambda step: click.echo(step, err=True))
    except (UnsuitableModel, ConfigError) as error:
        return None, error.reason
    assert artefact.reduced is not None
    return artefact, f"{artefact.name} is installed, {artefact.size_bytes / 1e6:.1f} MB: {artefact.reduced.figures}"


def sure_ones(model: Artefact, photos: Path, least: float) -> None:
    """Delete the photos for which no label is as probable as this."""
    net = load_net(model, Device(threads=1))
    for path in list_photos(photos):
        (image,) = decode_photos([path], model)
        if float(net.infer([image])[0].max()) < least:
            path.unlink()


@click.command()
@click.option("--photos", "count", default=1600, show_default=True, help="Parts of photos.")
@click.option("--surer-than", default=0.0, show_default=True, help="Only parts whose first label is as probable.")
@click.option("--precisions", default=",".join(REDUCED), show_default=True, help="Which copies.")
@rounds_option(5)
@seconds_option(1.0)
def main(count: int, surer_than: float, precisions: str, rounds: int, seconds: float) -> None:
    """Build and judge the copies, then measure them in turns. Takes some 10 minutes, most of it for int8.

    Example: scripts/bench precision --surer-than 0.5
    """
    with tempfile.TemporaryDirectory(prefix="mlg-bench-") as folder:
        models, photos = Path(folder) / "models", Path(folder) / "photos"
        photos.mkdir()
        write_parts(photos, count)
        model = ensure_installed(models, MODEL)
        if surer_than:
            sure_ones(model, photos, surer_than)
        images = list(decode_photos(list_photos(photos), model))
        click.echo(f"{len(images)} photos")
        nets: dict[str, Net] = {"f32": load_net(model, Device())}
        for precision in precisions.split(","):
            artefact, judgement = build_copy(models, MODEL, precision, photos)
            click.echo(judgement)
            if artefact is not None:
                nets[precision] = load_net(artefact, Device())

        def rate_of(net: Net) -> float:
            return parallel_rate(lambda image: net.infer([image]), images[:64], seconds)

        found = in_turns(rounds, {name: lambda _, net=net: rate_of(net) for name, net in nets.items()})  # type: ignore[misc]
        rates = {name: statistics.median(each) for name, each in found.items()}
        rows = [
            [
                name,
                f"{rate:.0f}",
                f"{rate / rates['f32']:.2f}",
                f"{compare(nets['f32'], nets[name], images[:200]).speedup:.2f}",
            ]
            for name, rate in rates.items()
        ]
        print_table(f"medians of {rounds}", ("precision", "images/s", "times f32", "of processor time"), rows)

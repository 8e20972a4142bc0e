"""`mlg train`: the time from a zip of photos to the served model, features included."""

from __future__ import annotations

import io
import json
import random
import statistics
import subprocess
import tempfile
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

import click
from PIL import Image, ImageEnhance

from scripts.benchmarks.support.measuring import print_table, rounds_option
from scripts.benchmarks.support.processes import mlg
from tests.system import System

#: Ten photos in the wheels of scikit-image and scikit-learn; each becomes a class.
PHOTOS = (
    *(("skimage", f"data/{name}") for name in (
        "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "moon.png", "rocket.jpg"
    )),
    *(("sklearn", f"datasets/images/{name}") for name in ("china.jpg", "flower.jpg")),
)  # fmt: skip
SIZE = (800, 600)


def variations(package: str, name: str, count: int, seed: int) -> list[bytes]:
    """Make JPEG files of SIZE from parts of a photo, each with another place, brightness and direction."""
    # Its folder is found without importing the library.
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    photo = Image.open(Path(spec.origin).parent / name).convert("RGB")
    chance = random.Random(f"{name} {seed}")
    found = []
    for _ in range(count):
        width = chance.uniform(0.4, 0.9) * min(photo.width, photo.height * SIZE[0] / SIZE[1])
        height = width * SIZE[1] / SIZE[0]
        left, top = chance.uniform(0, photo.width - width), chance.uniform(0, photo.height - height)
        part = photo.resize(SIZE, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        part = ImageEnhance.Brightness(part).enhance(chance.uniform(0.7, 1.3))
        if chance.random() < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        buffer = io.BytesIO()
        part.save(buffer, "JPEG", quality=85)
        found.append(buffer.getvalue())
    return found


def write_zip(path: Path, images: int, seed: int) -> None:
    """Pack photos of ten classes, so many together."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for package, name in PHOTOS:
            for number, jpeg in enumerate(variations(package, name, images // len(PHOTOS), seed)):
                archive.writestr(f"{Path(name).stem}/{number}.jpg", jpeg)


@click.command()
@rounds_option(3)
@click.option("--images", default=1000, show_default=True, help="Photos, of ten classes together.")
def main(rounds: int, images: int) -> None:
    """Measure a training. Example: scripts/bench training --images 1000"""
    seconds, parts, figures = [], [], {}
    with tempfile.TemporaryDirectory(prefix="mlg-bench-") as folder:
        system = System(Path(folder, "home"))
        try:
            for turn in range(rounds + 1):  # the first, with few images, installs the backbone
                archive = Path(folder, f"{turn}.zip")
                write_zip(archive, images if turn else 10 * len(PHOTOS), seed=turn)
                started = time.perf_counter()
                command = mlg("train", "measured", str(archive), "--url", system.base, "--json")
                training = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                if turn:
                    seconds.append(time.perf_counter() - started)
                    times = [_moment(training[name]) for name in ("created_at", "started_at", "ended_at")]
                    parts.append((times[1] - times[0], times[2] - times[1]))
                    figures = training["figures"]
        finally:
            system.stop()
    print_table(
        f"`mlg train` on {images} photos of {SIZE[0]} x {SIZE[1]} in ten classes",
        ("from the zip to the served model, s", "of that from accepted to features, s", "fit, figures, install, s"),
        [[f"{statistics.median(each):.1f}" for each in (seconds, *zip(*parts, strict=True))]],
    )
    low, high = figures["accuracy_low"], figures["accuracy_high"]
    click.echo(f"accuracy {figures['accuracy']:.4f} ({low:.4f} to {high:.4f}) of {figures['count']} held out")


def _moment(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()

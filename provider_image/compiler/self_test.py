"""The images of the self-test, which verifies an artefact when it is built and whenever it is checked.

Called by `verification.py` and `custom.py`. Photos if scikit-image is installed, whose wheel contains some (part of the
extra `[compile]`), otherwise drawn images. They are stored in the artefact, so that all machines use the same.
"""

from __future__ import annotations

import functools
import importlib.util
import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import PIL.Image

#: Public-domain photos in scikit-image's wheel: a cat, a cup, a rocket, a person, a garage, and one in grey.
_PHOTOS = ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png", "motorcycle_left.png", "camera.png")
#: Longest side in pixels; larger photos are scaled down to keep artefacts small.
MAX_SIDE = 400
#: Width and height of the drawn images.
_DRAWN_SIZES = ((320, 240), (240, 320), (400, 225), (224, 224))


@functools.cache
def self_test_images(max_side: int = MAX_SIDE) -> dict[str, bytes]:
    """Return file name -> JPEG of the self-test images. :param max_side: their longest side, at most MAX_SIDE."""
    found = _photos() or [_draw(number, *size) for number, size in enumerate(_DRAWN_SIZES)]
    return {f"selftest-{number}.jpg": _jpeg(image, max_side) for number, image in enumerate(found)}


def _photos() -> list[PIL.Image.Image]:
    spec = importlib.util.find_spec("skimage")  # finds the folder without importing scikit-image, which takes seconds
    if spec is None or spec.origin is None:
        return []
    import PIL.Image

    folder = Path(spec.origin).parent / "data"
    return [PIL.Image.open(folder / name) for name in _PHOTOS if (folder / name).exists()]


def _draw(number: int, width: int, height: int) -> PIL.Image.Image:
    """Draw three discs on coloured noise with the spectrum of photos."""
    import numpy as np
    import PIL.Image
    import PIL.ImageDraw

    random = np.random.default_rng(number)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height)))
    spectrum = np.fft.fft2(random.normal(size=(3, height, width))) / np.maximum(frequency, 1 / max(width, height))
    noise = np.fft.ifft2(spectrum).real
    noise = 128 + 50 * noise / noise.std(axis=(1, 2), keepdims=True)
    image = PIL.Image.fromarray(np.clip(noise.transpose(1, 2, 0), 0, 255).astype(np.uint8))
    draw = PIL.ImageDraw.Draw(image)
    for x, y, radius, red, green, blue in random.integers(0, 256, (3, 6)).tolist():
        left, top, size = x * width // 256, y * height // 256, 10 + radius // 4
        draw.ellipse((left - size, top - size, left + size, top + size), fill=(red, green, blue))
    return image


def _jpeg(image: PIL.Image.Image, max_side: int) -> bytes:
    image.thumbnail((max_side, max_side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()

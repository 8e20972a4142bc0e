"""Real photos as JPEGs, with variants that differ in their bytes, and chunks of them."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from provider_image.chunk import ChunkItem, write_chunk

#: Colour photos in scikit-image's wheel.
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
#: Length of the JPEG comment that makes the bytes of each variant different.
UNIQUE_BYTES = 32
#: The id and the number of images of the chunks.
CHUNK_ID, CHUNK_ITEMS = "measured", 16


@functools.lru_cache(1)
def _resized(name: str, size: tuple[int, int]) -> Image.Image:
    # Its folder is found without importing the library.
    spec = find_spec("skimage")
    assert spec is not None and spec.origin is not None
    photo = Image.open(Path(spec.origin).parent / "data" / name)
    return photo.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def encode(name: str, size: tuple[int, int], qualities: Iterable[int], max_bytes: float = math.inf) -> bytes:
    """Save a photo at a size in pixels, with the first of the qualities within a number of bytes.

    The JPEG has a comment of UNIQUE_BYTES bytes after its start marker, for `make_unique`.
    """
    for quality in qualities:
        buffer = io.BytesIO()
        _resized(name, size).save(buffer, "JPEG", quality=quality)
        jpeg = buffer.getvalue()
        if len(jpeg) <= max_bytes:
            return jpeg[:2] + b"\xff\xfe" + (UNIQUE_BYTES + 2).to_bytes(2) + b"@" * UNIQUE_BYTES + jpeg[2:]
    raise ValueError(f"{name} does not fit into {max_bytes} bytes")


def photo_jpegs(size: tuple[int, int] = (800, 600), max_bytes: int = 113 * 1024) -> list[bytes]:
    """Encode each photo with the highest quality within a number of bytes."""
    return [encode(name, size, range(98, 10, -1), max_bytes) for name in PHOTOS]


def make_unique(jpeg: bytes, number: int) -> bytes:
    """Return the same image with a different comment."""
    return jpeg[:6] + f"{number:0{UNIQUE_BYTES}d}".encode() + jpeg[6 + UNIQUE_BYTES :]


def variants(jpegs: list[bytes], count: int, first: int = 0) -> list[bytes]:
    """Make images that all differ, numbered from `first`."""
    return [make_unique(jpegs[number % len(jpegs)], first + number) for number in range(count)]


def make_chunk(path: Path, model: str, jpegs: list[bytes]) -> Path:
    """Write a chunk of CHUNK_ITEMS images."""
    images = enumerate(variants(jpegs, CHUNK_ITEMS))
    items = [ChunkItem(number=number, inputs={"image": image}, params={}) for number, image in images]
    write_chunk(path, CHUNK_ID, "classification", model, None, items)
    return path

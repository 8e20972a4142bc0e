"""Real photos as JPEGs of a given size in bytes, with variants that differ in their bytes."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

#: Colour photos in scikit-image's wheel.
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
#: Length of the JPEG comment that makes the bytes of each variant different.
UNIQUE_BYTES = 32


def photo_folder() -> Path:
    """Return the folder of scikit-image's photos without importing the library."""
    from importlib.util import find_spec

    spec = find_spec("skimage")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "data"


def photo_jpegs(*, width: int = 800, height: int = 600, size: int = 113 * 1024) -> list[bytes]:
    """Encode each photo at the pixel size, with the highest quality within the byte size.

    Each has a comment of UNIQUE_BYTES bytes after its start marker, for `make_unique`.
    """
    return [_with_comment(_encode(photo_folder() / name, width, height, size)) for name in PHOTOS]


def jpegs_of_quality(width: int, height: int, quality: int) -> list[bytes]:
    """Encode each photo at the pixel size and quality, with a comment for `make_unique`."""
    found = []
    for name in PHOTOS:
        buffer = io.BytesIO()
        image = Image.open(photo_folder() / name).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        image.save(buffer, "JPEG", quality=quality)
        found.append(_with_comment(buffer.getvalue()))
    return found


def _encode(path: Path, width: int, height: int, size: int) -> bytes:
    image = Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    for quality in range(98, 10, -1):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= size:
            return buffer.getvalue()
    raise ValueError(f"{path} does not fit into {size} bytes")


def _with_comment(jpeg: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xfe" + (UNIQUE_BYTES + 2).to_bytes(2) + b"@" * UNIQUE_BYTES + jpeg[2:]


def make_unique(jpeg: bytes, number: int) -> bytes:
    """Return the same image with a different comment."""
    return jpeg[:6] + f"{number:0{UNIQUE_BYTES}d}".encode() + jpeg[6 + UNIQUE_BYTES :]

"""The images that are sent: reading them, and dividing many into batches of bounded size."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

#: A path, the bytes themselves, or a file opened for reading in binary.
Image = str | os.PathLike[str] | bytes | IO[bytes]

#: Files with these endings are taken from a folder.
SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"})
#: Images and bytes that are sent as one batch; a server accepts more.
MAX_BATCH_IMAGES, MAX_BATCH_BYTES = 500, 32 * 1024 * 1024
#: Longest id of an image in a batch, in characters.
_MAX_ID_LENGTH = 200


@dataclass(frozen=True, kw_only=True)
class Upload:
    """An image that is about to be sent."""

    #: Unique in its batch.
    id: str
    #: The file name.
    name: str
    data: bytes = field(repr=False)

    @property
    def form_field(self) -> tuple[str, tuple[str, bytes, str]]:
        """The field of a form that holds the image."""
        return "image", (self.name, self.data, "application/octet-stream")


def load(image: Image, *, name: str | None = None, id: str | None = None) -> Upload:
    """Read an image.

    :param name: the path's or file's own, or "image", unless it is given.
    :param id: the name unless it is given.
    """
    own_name = "image"
    if isinstance(image, bytes):
        data = image
    elif isinstance(image, str | os.PathLike):
        path = Path(image)
        data, own_name = path.read_bytes(), os.fsencode(path.name).decode("utf-8", "replace")
    else:
        data, file_name = image.read(), getattr(image, "name", None)
        own_name = Path(file_name).name if isinstance(file_name, str) else own_name
    name = name or own_name
    return Upload(id=(id or name)[-_MAX_ID_LENGTH:], name=name, data=data)


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """List the images of a folder and the folders in it, in the order of their names.

    :raises FileNotFoundError: there is no image.
    """
    found = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(f"No image files in {folder}. Taken are: {' '.join(sorted(SUFFIXES))}")
    return found


def split(uploads: Iterable[Upload]) -> Iterator[list[Upload]]:
    """Divide images into batches, reading some at a time, so that a large folder is never in memory."""
    batch: dict[str, Upload] = {}
    size_bytes = 0
    for upload in uploads:
        if batch and (len(batch) == MAX_BATCH_IMAGES or size_bytes + len(upload.data) > MAX_BATCH_BYTES):
            yield list(batch.values())
            batch, size_bytes = {}, 0
        id = upload.id
        if id in batch:
            id = f"{len(batch)}:{id}"[:_MAX_ID_LENGTH]
        batch[id] = Upload(id=id, name=upload.name, data=upload.data)
        size_bytes += len(upload.data)
    if batch:
        yield list(batch.values())

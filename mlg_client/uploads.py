"""Images to send: reads them, and divides many into batches of limited size."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

#: A path, the bytes themselves, or a file opened for reading in binary.
Image = str | os.PathLike[str] | bytes | IO[bytes]

#: Name of an input -> what it is: as an image, or a table row.
Inputs = Mapping[str, Image | Mapping[str, Any]]

#: Suffixes of the files that are sent from a folder.
SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"})
#: Maximum number of images and bytes in one batch; the server's limits are higher.
MAX_BATCH_IMAGES, MAX_BATCH_BYTES = 500, 32 * 1024 * 1024
#: Maximum length of an image's id in a batch, in characters.
_MAX_ID_LENGTH = 200


@dataclass(frozen=True, kw_only=True)
class ImageUpload:
    """An image to send."""

    #: Its name for the client; `split` makes it unique in its batch.
    id: str
    #: The file name.
    name: str
    data: bytes = field(repr=False)
    #: The model's name of what it is.
    input: str = "image"

    @property
    def form_field(self) -> tuple[str, tuple[str, bytes, str]]:
        """The field of a multipart form with the image."""
        return self.input, (self.name, self.data, "application/octet-stream")


def load(image: Image, *, name: str | None = None, id: str | None = None, input: str = "image") -> ImageUpload:
    """Read an image, or what else a model takes.

    :param name: defaults to the name of the path or file, or "image".
    :param id: defaults to the name.
    :param input: the model's name of it.
    """
    default_name = "image"
    if isinstance(image, bytes):
        data = image
    elif isinstance(image, str | os.PathLike):
        path = Path(image)
        data, default_name = path.read_bytes(), os.fsencode(path.name).decode("utf-8", "replace")
    else:
        data, file_name = image.read(), getattr(image, "name", None)
        default_name = Path(file_name).name if isinstance(file_name, str) else default_name
    name = name or default_name
    return ImageUpload(id=id or name, name=name, data=data, input=input)


def form_fields(inputs: Inputs) -> list[tuple[str, tuple[str | None, bytes, str]]]:
    """Build the fields of a multipart form with the inputs of one request."""
    fields: list[tuple[str, tuple[str | None, bytes, str]]] = []
    for name, value in inputs.items():
        if isinstance(value, Mapping):
            fields.append((name, (None, json.dumps(dict(value)).encode(), "application/json")))
        else:
            upload = load(value)
            fields.append((name, (upload.name, upload.data, "application/octet-stream")))
    return fields


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """List the images of a folder and its subfolders, in the order of their names.

    :raises FileNotFoundError: there are none.
    """
    found = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(f"No image files in {folder}. Suffixes that are sent: {' '.join(sorted(SUFFIXES))}")
    return found


def split(uploads: Iterable[ImageUpload]) -> Iterator[list[ImageUpload]]:
    """Divide images into batches lazily, so that only one batch is in memory. Their ids are unique in a batch."""
    batch: dict[str, ImageUpload] = {}
    size_bytes = 0
    for upload in uploads:
        if batch and (len(batch) == MAX_BATCH_IMAGES or size_bytes + len(upload.data) > MAX_BATCH_BYTES):
            yield list(batch.values())
            batch, size_bytes = {}, 0
        id, number = _clean_id(upload.id), len(batch)
        cleaned = id
        while not id or id in batch:
            id, number = f"{number}:{cleaned}"[:_MAX_ID_LENGTH].strip(), number + 1
        batch[id] = replace(upload, id=id)
        size_bytes += len(upload.data)
    if batch:
        yield list(batch.values())


def _clean_id(text: str) -> str:
    """Shorten an id, and leave out what the server leaves out: two ids that differ in nothing else are equal to it."""
    visible = "".join(character for character in text if unicodedata.category(character)[0] != "C")
    return visible.strip()[-_MAX_ID_LENGTH:].strip()

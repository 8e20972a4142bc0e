"""Image answers as files of a folder: their names, and writing them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from mlg_client.records import IMAGE_ANSWER, Request

_SUFFIXES = {"image/jpeg": ".jpg", "image/png": ".png", "image/webp": ".webp"}
#: Longest name of the image that was sent that is kept, in characters; a name has at most 255 bytes.
_MAX_STEM_LENGTH = 50


def name_images(requests: Iterable[Request], folder: Path) -> list[Path | None]:
    """Return the file of each request's image answer: its image's name and the model, each name once.

    The model is part of it, so that a folder that has the photos is not overwritten.

    :return: None for a request without such an answer.
    """
    files: list[Path | None] = []
    taken: set[str] = set()
    for request in requests:
        if IMAGE_ANSWER not in request.files:
            files.append(None)
            continue
        # The name comes from a server: nothing of it may lead to another folder.
        sent = PurePosixPath((request.name or "").replace("\\", "/").replace("\0", "")).stem.lstrip(".")
        stem = f"{sent[:_MAX_STEM_LENGTH] or 'image'}-{PurePosixPath(request.model).name}"
        suffix = _SUFFIXES.get(request.files[IMAGE_ANSWER], ".bin")
        name, number = f"{stem}{suffix}", 2
        while name.lower() in taken:
            name, number = f"{stem}-{number}{suffix}", number + 1
        taken.add(name.lower())
        files.append(folder / name)
    return files


def write_whole(file: Path, data: bytes) -> None:
    """Write a file whole or not at all. :raises OSError:"""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)

"""Packs a planned chunk into a chunk file.

Called by `batcher.cycle` in a thread. A picture whose file is gone is left out, so that it harms nobody else.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from batcher.planner import PlannedChunk, PlannedItem
from provider_image.chunk import ChunkItem, write_chunk
from provider_image.services import load_service


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A planned chunk and its files."""

    #: Random; the only id that leaves this house.
    chunk_id: str
    #: What was planned.
    planned: PlannedChunk
    #: The items inside, by their number in the chunk.
    items: tuple[PlannedItem, ...]
    #: Those left out because their pictures are gone.
    missing: tuple[PlannedItem, ...]
    #: The chunk file; not written when there are no items.
    chunk: Path
    #: Where the results file will be.
    results: Path
    #: Size of the chunk file.
    size_bytes: int

    def remove_files(self) -> None:
        """Remove both files; harmless when they are not there."""
        self.chunk.unlink(missing_ok=True)
        self.results.unlink(missing_ok=True)


def pack(planned: PlannedChunk, *, folder: Path, picture: Callable[[str], Path], digest: str | None) -> Packed:
    """Write a chunk file into a folder.

    :param picture: where the picture with a digest is.
    :param digest: of the artefact that must answer; None takes any.
    :raises OSError: a picture that is there cannot be read, or the file cannot be written.
    :raises MalformedChunk: no reader would take such a chunk.
    """
    chunk_id = secrets.token_hex(16)
    chunk, results = folder / f"{chunk_id}.chunk.zip", folder / f"{chunk_id}.results.zip"
    (input_name,) = load_service(planned.service).inputs
    size_bytes = 0
    while True:
        items = tuple(item for item in planned.items if picture(item.first.image_sha256).exists())
        if not items:
            break
        numbered = [
            ChunkItem(number=number, inputs={input_name: picture(item.first.image_sha256)}, params=item.first.params)
            for number, item in enumerate(items)
        ]
        try:
            size_bytes = write_chunk(chunk, chunk_id, planned.service, planned.model, digest, numbered)
        except FileNotFoundError:
            if all(picture(item.first.image_sha256).exists() for item in items):
                raise  # it is the folder that is gone, not a picture
            continue  # a picture went after it was looked for
        break
    return Packed(
        chunk_id=chunk_id,
        planned=planned,
        items=items,
        missing=tuple(item for item in planned.items if item not in items),
        chunk=chunk,
        results=results,
        size_bytes=size_bytes,
    )

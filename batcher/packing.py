"""Packs a planned chunk into a chunk file: original images, or images resized to the model's input.

Called by `batcher.cycle` in a thread. An image whose file is missing or that cannot be resized is left out, so that it
does not affect the others.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from batcher.planner import PlannedChunk, PlannedItem
from batcher.resizing import Resizer
from provider_image.chunk import ChunkItem, write_chunk
from provider_image.errors import MlgError, ModelError, NotInstalled, UnknownModel
from provider_image.models.artefact import Artefact, find_artefact
from provider_image.models.catalogue import CATALOGUE, ModelRow
from provider_image.service import ModelInput
from provider_image.services import load_service


@dataclass(frozen=True, kw_only=True)
class RejectedItem:
    """An item that is not sent, and why."""

    item: PlannedItem
    error: MlgError


@dataclass(frozen=True, kw_only=True)
class PackedChunk:
    """A planned chunk and its files."""

    #: Random; the only id that executors and providers see.
    chunk_id: str
    #: The plan.
    planned: PlannedChunk
    #: The items in the file, by their number in the chunk.
    items: tuple[PlannedItem, ...]
    #: Items left out because their image files are missing.
    missing: tuple[PlannedItem, ...]
    #: Items left out because they could not be resized.
    rejected: tuple[RejectedItem, ...]
    #: The chunk file; not written when there are no items.
    chunk: Path
    #: Where the results file will be.
    results: Path
    #: Size of the chunk file.
    size_bytes: int

    def remove_files(self) -> None:
        """Remove both files, if they exist."""
        self.chunk.unlink(missing_ok=True)
        self.results.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class _PackableItem:
    """An item and the sources of its inputs."""

    item: PlannedItem
    inputs: Mapping[str, Path | bytes]

    def exists(self) -> bool:
        return all(isinstance(source, bytes) or source.exists() for source in self.inputs.values())


def pack(
    planned: PlannedChunk, *, folder: Path, image_path: Callable[[str], Path], models: Path, resizer: Resizer | None
) -> PackedChunk:
    """Write a chunk file into a folder.

    :param image_path: returns the path of the image with a SHA-256.
    :param models: the folder of artefacts. If the model is installed there, only that artefact may answer.
    :param resizer: None sends the originals.
    :raises OSError: an existing image cannot be read, or the chunk file cannot be written.
    :raises MalformedChunk: no reader would accept the chunk.
    :raises NotInstalled: the size of the model's input is unknown, so its images cannot be resized.
    :raises ResizingUnavailable: no image can be resized now.
    """
    chunk_id = secrets.token_hex(16)
    chunk, results = folder / f"{chunk_id}.chunk.zip", folder / f"{chunk_id}.results.zip"
    (input_name,) = load_service(planned.service).inputs
    ready = [
        _PackableItem(item=item, inputs={input_name: image_path(item.first.image_sha256)}) for item in planned.items
    ]
    ready = [each for each in ready if each.exists()]
    rejected: tuple[RejectedItem, ...] = ()
    # Looked up once, so that digest and input size belong to the same artefact.
    model = _model(models, planned.model)
    if resizer is not None and ready:
        ready, rejected = _resize_items(resizer, planned.service, model, ready)
    digest = model.digest if isinstance(model, Artefact) else None
    size_bytes = 0
    while ready:
        numbered = [
            ChunkItem(number=number, inputs=each.inputs, params=each.item.first.params)
            for number, each in enumerate(ready)
        ]
        header = (chunk_id, planned.service, planned.model, digest)
        try:
            size_bytes = write_chunk(chunk, *header, numbered, is_resized=resizer is not None)
        except FileNotFoundError:
            left = [each for each in ready if each.exists()]
            if len(left) == len(ready):
                raise  # the folder is missing, not an image
            ready = left  # an image was deleted after the check above
            continue
        break
    items = tuple(each.item for each in ready)
    not_missing = [*items, *(each.item for each in rejected)]
    return PackedChunk(
        chunk_id=chunk_id,
        planned=planned,
        items=items,
        missing=tuple(item for item in planned.items if item not in not_missing),
        rejected=rejected,
        chunk=chunk,
        results=results,
        size_bytes=size_bytes,
    )


def _model(models: Path, name: str) -> Artefact | ModelRow | None:
    """Return what describes the model's input: its artefact, or its catalogue row if it is built on first use."""
    try:
        return find_artefact(models, name)
    except (NotInstalled, UnknownModel, ModelError):
        return CATALOGUE.get(name)


def _resize_items(
    resizer: Resizer, service: str, model: Artefact | ModelRow | None, originals: list[_PackableItem]
) -> tuple[list[_PackableItem], tuple[RejectedItem, ...]]:
    if model is None:
        raise NotInstalled()
    model_input = ModelInput(height=model.height, width=model.width, crop=model.crop)
    paths = [{name: path for name, path in each.inputs.items() if isinstance(path, Path)} for each in originals]
    ready, rejected = [], []
    for each, resized in zip(originals, resizer.resize(service, model_input, paths), strict=True):
        if isinstance(resized, MlgError):
            rejected.append(RejectedItem(item=each.item, error=resized))
        elif not isinstance(resized, FileNotFoundError):
            ready.append(_PackableItem(item=each.item, inputs=resized))
    return ready, tuple(rejected)

"""Packs a planned chunk into a chunk file: pictures as they came, or shrunk to what the model sees of them.

Called by `batcher.cycle` in a thread. A picture whose file is gone is left out, so that it harms nobody else; so is one
that cannot be shrunk.
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

    #: Random; the only id that leaves this house.
    chunk_id: str
    #: What was planned.
    planned: PlannedChunk
    #: The items inside, by their number in the chunk.
    items: tuple[PlannedItem, ...]
    #: Those left out because their pictures are gone.
    missing: tuple[PlannedItem, ...]
    #: Those left out because they could not be shrunk.
    rejected: tuple[RejectedItem, ...]
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


@dataclass(frozen=True, kw_only=True)
class _PackableItem:
    """An item that can be written."""

    item: PlannedItem
    inputs: Mapping[str, Path | bytes]

    def exists(self) -> bool:
        return all(isinstance(source, bytes) or source.exists() for source in self.inputs.values())


def pack(
    planned: PlannedChunk, *, folder: Path, image_path: Callable[[str], Path], models: Path, resizer: Resizer | None
) -> PackedChunk:
    """Write a chunk file into a folder.

    :param image_path: where the picture with a digest is.
    :param models: the folder of artefacts; the one that is installed there must answer, any if there is none.
    :param resizer: None sends pictures as they came.
    :raises OSError: a picture that is there cannot be read, or the file cannot be written.
    :raises MalformedChunk: no reader would take such a chunk.
    :raises NotInstalled: nothing is known of the model, so that nothing can be shrunk for it.
    :raises ShrinkingUnavailable: nothing can be shrunk at all.
    """
    chunk_id = secrets.token_hex(16)
    chunk, results = folder / f"{chunk_id}.chunk.zip", folder / f"{chunk_id}.results.zip"
    (input_name,) = load_service(planned.service).inputs
    ready = [
        _PackableItem(item=item, inputs={input_name: image_path(item.first.image_sha256)}) for item in planned.items
    ]
    ready = [each for each in ready if each.exists()]
    rejected: tuple[RejectedItem, ...] = ()
    # Asked once, so that digest and size are the same artefact's.
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
                raise  # it is the folder that is gone, not a picture
            ready = left  # a picture went after it was looked for
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
    """Find what says what the model takes: its artefact, or its row if it will be built on first use."""
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

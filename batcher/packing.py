"""Packs a planned chunk into a chunk file: the inputs as they were sent, or images resized to the model's input.

Called by `batcher.cycle` in a thread. An item with a file that is missing or that cannot be resized is left out, so
that it does not affect the others.
"""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from batcher.errors import ImageMissing
from batcher.planner import PlannedChunk, PlannedItem
from batcher.resizing import Resizer
from provider_image.chunk import ChunkItem, write_chunk
from provider_image.errors import MlgError, ModelError, NotInstalled, UnknownModel
from provider_image.models.artefact import Artefact, find_artefact
from provider_image.models.catalogue import CATALOGUE, ModelFacts
from provider_image.models.quickest import find_copies
from provider_image.service import limit_seconds, primary_input
from provider_image.services import load_service
from store.requests import Claim

#: The part of a chunk's time that an item which ends by itself may take; the rest is for loading and decoding.
_ITEM_SHARE = 0.75


@dataclass(frozen=True, kw_only=True)
class PackedChunk:
    """A planned chunk and its files."""

    #: Random; the only id that executors and providers see.
    chunk_id: str
    #: The plan.
    planned: PlannedChunk
    #: The items in the file, by their number in the chunk.
    items: tuple[PlannedItem, ...]
    #: Items left out, because files of theirs are missing or could not be resized, and why.
    rejected: tuple[tuple[PlannedItem, MlgError], ...]
    #: The chunk file; not written when there are no items.
    chunk: Path
    #: Where the results file will be.
    results: Path
    #: Size of the chunk file.
    size_bytes: int
    #: Digests of the artefact that must answer, empty if it is not installed yet, and of its copies.
    digests: tuple[str, ...]
    #: The most seconds that an item may take which ends by itself.
    item_seconds: float

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
    planned: PlannedChunk,
    *,
    folder: Path,
    image_path: Callable[[str], Path],
    models: Path,
    resizer: Resizer | None,
    timeout_seconds: float = math.inf,
) -> PackedChunk:
    """Write a chunk file into a folder.

    :param image_path: returns the path of the stored file with a SHA-256.
    :param models: the folder of artefacts. If the model is installed there, only that artefact may answer.
    :param resizer: None sends the originals.
    :param timeout_seconds: how long the chunk may take.
    :raises OSError: an existing file cannot be read, or the chunk file cannot be written.
    :raises MalformedChunk: no reader would accept the chunk.
    :raises NotInstalled: the size of the model's input is unknown, so its images cannot be resized.
    :raises ResizingUnavailable: no image can be resized now.
    """
    chunk_id = secrets.token_hex(16)
    chunk, results = folder / f"{chunk_id}.chunk.zip", folder / f"{chunk_id}.results.zip"
    service = load_service(planned.service)
    ready = []
    for item in planned.items:
        digests = {primary_input(service): item.first.image_sha256}
        digests |= {name: one.sha256 for name, one in item.first.inputs.items()}
        ready.append(_PackableItem(item=item, inputs={name: image_path(each) for name, each in digests.items()}))
    ready = [each for each in ready if each.exists()]
    rejected: list[tuple[PlannedItem, MlgError]] = []
    # Looked up once, so that digest and input size belong to the same artefact.
    model = _model(models, planned.model)
    images = {name for name, one in service.inputs.items() if one.kind == "image"}
    # A model without a size takes images as they are.
    is_resized = resizer is not None and bool(images) and (model is None or model.height > 0)
    if resizer is not None and is_resized and ready:
        ready, rejected = _resize_items(resizer, model, images, ready)
    installed = (model, *find_copies(models, model)) if isinstance(model, Artefact) else ()
    digest = installed[0].digest if installed else None
    item_seconds = _ITEM_SHARE * timeout_seconds
    size_bytes = 0
    while ready:
        numbered = [
            ChunkItem(
                number=number,
                inputs=each.inputs,
                params=limit_seconds(service.params, each.item.first.params, item_seconds),
            )
            for number, each in enumerate(ready)
        ]
        header = (chunk_id, planned.service, planned.model, digest)
        try:
            size_bytes = write_chunk(chunk, *header, numbered, is_resized=is_resized)
        except FileNotFoundError:
            left = [each for each in ready if each.exists()]
            if len(left) == len(ready):
                raise  # the folder is missing, not an image
            ready = left  # an image was deleted after the check above
            continue
        break
    items = tuple(each.item for each in ready)
    not_missing = [*items, *(item for item, _ in rejected)]
    rejected += [(item, ImageMissing()) for item in planned.items if item not in not_missing]
    return PackedChunk(
        chunk_id=chunk_id,
        planned=planned,
        items=items,
        rejected=tuple(rejected),
        chunk=chunk,
        results=results,
        size_bytes=size_bytes,
        digests=tuple(one.digest for one in installed),
        item_seconds=item_seconds,
    )


def resized_bytes(models: Path) -> Callable[[Claim], int]:
    """Return what tells the most bytes that a claim takes in a chunk when its images are resized."""

    @functools.cache
    def image_inputs(service: str, model: str) -> Mapping[str, int]:
        """Return the size of each input that is an image, by its name; the first input is called ""."""
        try:
            implementation = load_service(service)
        except MlgError:  # packing tells why
            return {}
        found = _model(models, model)
        if found is None or not found.height:
            return {}
        first = primary_input(implementation)
        size = 4 * found.height * found.width + 1024  # lossless: what is noise takes three bytes a pixel
        images = (name for name, one in implementation.inputs.items() if one.kind == "image")
        return {"" if name == first else name: size for name in images}

    def packed_bytes(claim: Claim) -> int:
        resized = image_inputs(claim.service, claim.model)
        sizes = {"": claim.image_bytes} | {name: one.size_bytes for name, one in claim.inputs.items()}
        return sum(resized.get(name, size) for name, size in sizes.items())

    return packed_bytes


def _model(models: Path, name: str) -> ModelFacts | None:
    """Return what describes the model's input: its artefact, or its catalogue row if it is built on first use."""
    try:
        return find_artefact(models, name)
    except (NotInstalled, UnknownModel, ModelError):
        return CATALOGUE.get(name)


def _resize_items(
    resizer: Resizer, model: ModelFacts | None, images: Collection[str], originals: list[_PackableItem]
) -> tuple[list[_PackableItem], list[tuple[PlannedItem, MlgError]]]:
    if model is None:
        raise NotInstalled()
    paths = [
        {name: path for name, path in each.inputs.items() if name in images and isinstance(path, Path)}
        for each in originals
    ]
    ready: list[_PackableItem] = []
    rejected: list[tuple[PlannedItem, MlgError]] = []
    for each, resized in zip(originals, resizer.resize(model, paths), strict=True):
        if isinstance(resized, MlgError):
            rejected.append((each.item, resized))
        elif not isinstance(resized, FileNotFoundError):
            ready.append(_PackableItem(item=each.item, inputs={**each.inputs, **resized}))
    return ready, rejected

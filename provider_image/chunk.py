"""Chunk files, which are sent to a provider, and results files, which it sends back.

A chunk is a zip of `chunk.json` and one file per input, `NUMBER-INPUT`; a results file is a zip of `results.json` and
the items' output files, `NUMBER-FILE`. The batcher writes chunks and reads results, the runtime does the reverse, and
neither trusts the other: the names must be exactly the expected ones, nothing is compressed (which excludes zip bombs),
and every length is checked against a limit before it is read. A chunk must not contain request ids, clients or their
file names. The images of a chunk are either all as the client sent them or all resized (see
`images/resizing.py`), and the chunk says which: an image that was cropped and resized must not be cropped again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from provider_image.archive import Archive, add, add_json, atomic_zip
from provider_image.errors import MalformedChunk, MalformedResults, MlgError, error_from_reply
from provider_image.schemas import (
    FILE_NAME,
    MAX_BYTES,
    MAX_FILES,
    MAX_ITEMS,
    MAX_REASON,
    RESULTS_FIELDS,
    VERSION,
    check_chunk,
    check_results,
)


@dataclass(frozen=True, kw_only=True)
class ChunkItem:
    """An item of a chunk that is written."""

    #: Its number in the chunk; items are numbered from 0 without gaps.
    number: int
    #: Name of the input -> its file or its bytes.
    inputs: Mapping[str, Path | bytes]
    #: The client's parameters, checked by the service.
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ItemResult:
    """The result of one item."""

    #: Its number in the chunk.
    number: int
    #: The service's output, JSON; None if there is an error.
    output: Any = None
    #: Output files by name.
    files: Mapping[str, bytes] = field(default_factory=dict)
    #: Why it has no output; None if it has one.
    error: MlgError | None = None
    #: Seconds spent on it, including decoding.
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Results:
    """The contents of a results file."""

    #: The chunk's id.
    chunk_id: str
    #: The model's name, and the digest of the artefact that was used.
    model: str
    digest: str
    #: Program -> version.
    versions: Mapping[str, str]
    #: f32, bf16 or auto; for a copy in another precision its own.
    precision: str
    #: The processor's name.
    cpu: str
    #: Seconds to load the model; 0 if it was loaded before.
    load_seconds: float
    #: Peak memory of the process.
    peak_memory_bytes: int
    #: In ascending order of their numbers.
    items: tuple[ItemResult, ...]


def write_chunk(
    path: Path,
    chunk_id: str,
    service: str,
    model: str,
    digest: str | None,
    items: Iterable[ChunkItem],
    *,
    is_resized: bool = False,
) -> int:
    """Write a chunk file, atomically.

    :param digest: digest of the required artefact; None accepts any.
    :param is_resized: images are what `images/resizing.py` made of those that the client sent.
    :return: the file's size in bytes.
    :raises MalformedChunk: too many items or bytes, or a name that a reader would refuse.
    :raises OSError: an input cannot be read or the file cannot be written.
    """
    entries, total = [], 0
    with atomic_zip(path) as archive:
        for number, item in enumerate(items):
            if item.number != number or number >= MAX_ITEMS:
                raise MalformedChunk(f"Items must be numbered from 0 to at most {MAX_ITEMS - 1} without gaps.")
            if not 0 < len(item.inputs) <= MAX_FILES or not all(FILE_NAME.fullmatch(name) for name in item.inputs):
                raise MalformedChunk(f"Item {number} must have 1 to {MAX_FILES} inputs with plain names.")
            sizes = {}
            for name, source in item.inputs.items():
                sizes[name] = add(archive, f"{number}-{name}", source)
                total += sizes[name]
                if total > MAX_BYTES:
                    raise MalformedChunk(
                        f"The inputs have more than {MAX_BYTES} bytes. Put fewer items into the chunk."
                    )
            entries.append({"number": number, "inputs": sizes, "params": dict(item.params)})
        if not entries:
            raise MalformedChunk("A chunk must have at least one item.")
        document = {
            "version": VERSION,
            "chunk_id": chunk_id,
            "service": service,
            "model": model,
            "digest": digest,
            "is_shrunk": is_resized,
            "items": entries,
        }
        check_chunk(document)
        add_json(archive, "chunk.json", document, MalformedChunk)
    return path.stat().st_size


@dataclass(frozen=True, kw_only=True)
class ItemEntry:
    """An item of a chunk that was opened; its inputs are still in the file."""

    #: Its number in the chunk.
    number: int
    #: Name of the input -> its size in bytes.
    sizes: Mapping[str, int]
    #: The client's parameters, not yet checked by the service.
    params: Mapping[str, Any]


class ChunkReader:
    """An opened chunk; the bytes of an item are read on request. Thread-safe."""

    def __init__(self, archive: Archive) -> None:
        self._archive, document = archive, archive.document
        #: The chunk's random id.
        self.chunk_id: str = document["chunk_id"]
        #: The name of the service.
        self.service: str = document["service"]
        #: The model's name.
        self.model: str = document["model"]
        #: Digest of the required artefact; None accepts any.
        self.digest: str | None = document["digest"]
        #: Images are what `images/resizing.py` made of those that the client sent.
        self.is_resized: bool = document["is_shrunk"]
        #: In ascending order of their numbers.
        self.items = tuple(
            ItemEntry(number=item["number"], sizes=item["inputs"], params=item["params"]) for item in document["items"]
        )

    def read_inputs(self, item: ItemEntry) -> dict[str, bytes]:
        """Read the inputs of one item. :raises MalformedChunk: they are damaged."""
        return {name: self._archive.read(f"{item.number}-{name}", size) for name, size in item.sizes.items()}


@contextlib.contextmanager
def open_chunk(path: Path, file: BinaryIO | None = None) -> Iterator[ChunkReader]:
    """Open a chunk file and check everything except the contents of the inputs.

    :param file: the same file, if it is open already; it is closed at the end.
    :raises MalformedChunk: it cannot be read, has another version, or violates the format.
    """
    with contextlib.closing(Archive(path, "chunk.json", MalformedChunk, file)) as archive:
        check_chunk(archive.document)
        archive.check_files(_sizes(archive.document, "inputs"))
        yield ChunkReader(archive)


def _sizes(document: Mapping[str, Any], kind: str) -> dict[str, int]:
    """Return the size of each file that the items list as their inputs or files, by its name in the zip."""
    items = document["items"]
    return {f"{item['number']}-{name}": size for item in items for name, size in item.get(kind, {}).items()}


def write_results(path: Path, results: Results) -> None:
    """Write a results file, atomically."""
    entries: list[dict[str, Any]] = []
    with atomic_zip(path) as archive:
        for item in results.items:
            entry: dict[str, Any] = {"number": item.number, "seconds": round(item.seconds, 6)}
            if item.error is None:
                sizes = {name: add(archive, f"{item.number}-{name}", data) for name, data in item.files.items()}
                entry |= {"ok": True, "output": item.output, "files": sizes}
            else:
                reply = item.error.to_reply()
                entry |= {"ok": False, "error": {**reply, "reason": reply["reason"][:MAX_REASON]}}
            entries.append(entry)
        document = {
            "version": VERSION,
            **{name: getattr(results, name) for name in RESULTS_FIELDS},
            "versions": dict(results.versions),
            "cpu": results.cpu[:200],
            "load_seconds": round(results.load_seconds, 6),
            "items": entries,
        }
        add_json(archive, "results.json", document, MalformedResults)


def read_results(
    path: Path,
    chunk_id: str,
    model: str,
    numbers: Collection[int],
    digest: str | None = None,
    *,
    other_digests: Collection[str] = (),
    max_bytes: Mapping[str, int] | None = None,
) -> Results:
    """Read a results file and check that it belongs to this chunk: its id, model, digest and exactly its items.

    The outputs themselves are checked by the service's `check_output`.

    :param digest: digest of the required artefact; None accepts any.
    :param other_digests: those of its copies in other precisions, which may have been used in its place.
    :param max_bytes: name of each file that an item may have -> its most bytes; no other is read. None accepts any.
    :raises MalformedResults: it cannot be read, violates the format, or belongs to another chunk.
    """
    with contextlib.closing(Archive(path, "results.json", MalformedResults)) as archive:
        document = archive.document
        check_results(document)
        for name, expected in (("chunk_id", chunk_id), ("model", model), ("digest", digest)):
            is_other = name == "digest" and document[name] in other_digests
            if expected is not None and document[name] != expected and not is_other:
                raise MalformedResults(f"The results have {name} {document[name]!r}, not {expected!r}.")
        found = [item["number"] for item in document["items"]]
        if sorted(found) != sorted(numbers):
            raise MalformedResults(f"The results are for the items {sorted(found)}, not {sorted(numbers)}.")
        archive.check_files(_sizes(document, "files"))
        for name, size in (each for item in document["items"] for each in item.get("files", {}).items()):
            if max_bytes is not None and size > max_bytes.get(name, -1):
                raise MalformedResults(f"The results have the file {name} of {size} bytes, which nobody asked for.")
        items = tuple(_item_result(archive, item) for item in sorted(document["items"], key=lambda i: int(i["number"])))
    load_seconds = float(document["load_seconds"])
    return Results(**{name: document[name] for name in RESULTS_FIELDS} | {"load_seconds": load_seconds, "items": items})


def _item_result(archive: Archive, item: Mapping[str, Any]) -> ItemResult:
    number, seconds = item["number"], float(item["seconds"])
    if item["ok"]:
        files = {name: archive.read(f"{number}-{name}", size) for name, size in item["files"].items()}
        return ItemResult(number=number, output=item["output"], files=files, seconds=seconds)
    return ItemResult(number=number, error=error_from_reply(item["error"]), seconds=seconds)

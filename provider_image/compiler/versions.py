"""The versions of a trained model: what was installed before stays beside the models, and can be installed again.

`models/.versions/NAME/DIGEST` is an artefact's folder whose files are links to those of the model, so a version takes
room only when it is not installed any more. Called by `trainer/training.py` before it installs, and by those that go
back. Must not import a backend.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from provider_image.compiler.installing import build_folder, install
from provider_image.errors import MlgError, NotInstalled
from provider_image.models.artefact import Artefact, is_model_name, read_artefact

#: The folder in a models folder; hidden, so that it is not taken for a model.
_FOLDER = ".versions"
#: Earlier versions of a model that are kept.
MAX_VERSIONS = 10


class UnknownVersion(MlgError):
    """There is no such version of this model any more. `mlg models versions NAME` lists them."""

    permanent = True


def keep_version(models: Path, name: str, *, max_versions: int = MAX_VERSIONS) -> str | None:
    """Keep the installed artefact of a model, and delete the versions that were used least recently.

    :return: its digest; None if none is installed.
    :raises NotInstalled: the models folder cannot be written.
    """
    try:
        artefact = read_artefact(models / name)
    except NotInstalled:
        return None
    target = _folder(models, name) / artefact.digest
    try:
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".", dir=target.parent))
            try:
                for file in (*_files(artefact), "model.json"):
                    _link(artefact.folder / file, temporary / file)
                temporary.chmod(0o755)
                temporary.rename(target)
            except OSError:
                if not target.is_dir():  # else another process was faster
                    raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        os.utime(target)
        for digest in list_versions(models, name)[max_versions:]:
            shutil.rmtree(_folder(models, name) / digest, ignore_errors=True)
    except OSError as error:
        raise NotInstalled(f"A version of {name} could not be kept in {models}: {error}") from error
    return artefact.digest


def list_versions(models: Path, name: str) -> list[str]:
    """List the digests of the versions that are kept, the one that was installed last first."""
    try:
        found = [path for path in _folder(models, name).iterdir() if path.is_dir() and not path.name.startswith(".")]
        return [path.name for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]
    except OSError:
        return []


def use_version(models: Path, name: str, digest: str) -> Artefact:
    """Install a version again, and keep what is installed now. :raises UnknownVersion: :raises NotInstalled:"""
    if digest == keep_version(models, name):
        return read_artefact(models / name)
    if digest not in list_versions(models, name):
        raise UnknownVersion()
    artefact = read_artefact(_folder(models, name) / digest)
    with build_folder(models, name) as folder:
        for file in _files(artefact):
            _link(artefact.folder / file, folder / file)
        installed = install(artefact, folder, models, tuple(artefact.files))
    with contextlib.suppress(OSError):
        os.utime(_folder(models, name) / digest)
    return installed


def remove_version(models: Path, name: str, digest: str) -> None:
    """Delete a version that is kept; what is installed stays."""
    if digest in list_versions(models, name):
        shutil.rmtree(_folder(models, name) / digest, ignore_errors=True)


def remove_model(models: Path, name: str) -> None:
    """Delete a model with all its versions. :raises NotInstalled: the models folder cannot be written."""
    shutil.rmtree(_folder(models, name), ignore_errors=True)
    with build_folder(models, name) as folder, contextlib.suppress(FileNotFoundError):
        (models / name).rename(folder / name)  # in one step; removed with the folder


def _folder(models: Path, name: str) -> Path:
    if not is_model_name(name):
        raise UnknownVersion()
    return models / _FOLDER / name


def _files(artefact: Artefact) -> tuple[str, ...]:
    return (*artefact.files, *(sample.file for sample in artefact.samples))


def _link(source: Path, target: Path) -> None:
    """Link a file, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)

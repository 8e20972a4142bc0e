"""The image that providers run: programs and models, described by a small JSON document.

On the real network an image is a file system of a hundred megabytes. Here the document takes its place: it is published
by HTTP, named by its hash and address in the demand, downloaded and checked by each provider when it deploys, and only
what is in it can be run. `Devnet` publishes one image, with the models that the home had when the devnet started.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import provider_image

#: Folders of this machine that stand for the system in every image.
_SYSTEM_FOLDERS = ("/bin", "/usr/bin")
_PACKAGE = re.compile(r"hash:sha3:([0-9a-f]{56}):(https?://\S+)")
_MAX_BYTES = 1024 * 1024
_DOWNLOAD_SECONDS = 30.0


class ImageUnusable(Exception):
    """An image cannot be downloaded, has another hash, or is not one of a devnet."""


@dataclass(frozen=True, kw_only=True)
class Image:
    """The content of an image."""

    #: Path of a program in the image -> the file on this machine that is run.
    programs: Mapping[str, str]
    #: Folder of the models, which is MLG_HOME of the programs; None if the image has none.
    home: str | None = None
    #: Model -> SHA-256 of its model.json, so that other models make another image.
    models: Mapping[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the file that providers download."""
        return json.dumps({"mlg_devnet_image": asdict(self)}, sort_keys=True).encode()

    @property
    def hash(self) -> str:
        """SHA3-224 of the file, as Golem names images."""
        return hashlib.sha3_224(self.to_bytes()).hexdigest()

    def find_program(self, path: str) -> str | None:
        """Return the file of this machine that is at an absolute path in the image; None if there is none."""
        is_system = str(Path(path).parent) in _SYSTEM_FOLDERS and Path(path).exists()
        return self.programs.get(path) or (path if is_system else None)


def build_image(folder: Path, home: Path | None) -> Image:
    """Make an image with `mlg-provider` and the models of a home, in a folder that is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    models = {}
    if home is not None and (home / "models").is_dir():
        for model in sorted((home / "models").iterdir()):
            if (model / "model.json").is_file():
                shutil.copytree(model, folder / "models" / model.name, copy_function=_link)
                description = (folder / "models" / model.name / "model.json").read_bytes()
                models[model.name] = hashlib.sha256(description).hexdigest()
    return Image(programs={"/usr/local/bin/mlg-provider": str(_write_program(folder))}, home=str(folder), models=models)


def _write_program(folder: Path) -> Path:
    """Write a script for `mlg-provider` that does what the one of the provider image does, with this Python."""
    script = shlex.quote(str(Path(provider_image.__file__).with_name("mlg-provider")))
    installed = shlex.quote(str(Path(sys.executable).with_name("mlg-provider")))
    program = folder / "mlg-provider"
    folder.mkdir(parents=True, exist_ok=True)
    program.write_text(f'#!/bin/sh\n[ "$1" != next ] || exec /bin/sh {script} "$@"\nexec {installed} "$@"\n')
    program.chmod(0o755)
    return program


def load_image(package: str) -> Image:
    """Download and check an image. :param package: as in a demand. :raises ImageUnusable:"""
    found = _PACKAGE.fullmatch(package)
    if found is None:
        raise ImageUnusable(f"golem.srv.comp.task_package must be hash:sha3:HASH:URL, not {package!r}.")
    # The devnet is on this machine, so no proxy is used.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(found[2], timeout=_DOWNLOAD_SECONDS) as response:
            content = response.read(_MAX_BYTES)
    except OSError as error:
        raise ImageUnusable(f"The image cannot be downloaded from {found[2]}: {error}") from error
    if hashlib.sha3_224(content).hexdigest() != found[1]:
        raise ImageUnusable(f"The file at {found[2]} does not have the hash {found[1]}.")
    try:
        fields: dict[str, Any] = json.loads(content)["mlg_devnet_image"]
        return Image(**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise ImageUnusable("A devnet runs only the image that it publishes itself.") from error


def _link(source: str, target: str) -> None:
    """Link a file, because weights are large: what is installed later replaces files, and does not change them."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or another owner
        Path(target).symlink_to(Path(source).resolve())

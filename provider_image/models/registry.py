"""The shelf: every model that can be asked for here, those of the catalogue and the users' own that are installed.

Read by the server on every upload, by the batcher on every look at what is due, and by the commands. A user's own
model is known by its artefact alone: it comes with its folder and goes with it. Must not import anything heavy.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path

from provider_image.errors import BrokenArtefact, ModelError, NotInstalled
from provider_image.models.artefact import find_artefact, is_model_name
from provider_image.models.catalogue import CATALOGUE, MAX_NAME_LENGTH, ModelRow, look_up, normalise_name, unknown_model
from provider_image.services import REGISTRY

#: A listing is kept only if the folder had been at rest for this long: file systems stamp changes by a coarse clock.
_SETTLE_NS = 2_000_000_000

#: Models folder -> (its mtime_ns, key -> name of the folders in it that no model of the catalogue has).
_listing_cache: dict[str, tuple[int, Mapping[str, str]]] = {}


def list_rows(models: Path) -> tuple[ModelRow, ...]:
    """List the catalogue, then the installed models of users' own by name; one that is damaged is left out."""
    custom = []
    for name in sorted(_custom_names(models).values()):
        try:
            custom.append(_custom_row(models, name))
        except (NotInstalled, ModelError):
            continue  # `find_artefact` has told the log
    return (*CATALOGUE.values(), *custom)


def find_row(models: Path, spelling: str) -> ModelRow:
    """Find a model by its name in any case; `-`, `_` and blanks do not matter.

    :raises UnknownModel: there is none; names the nearest, and how to list them.
    :raises BrokenArtefact: it is a user's own and damaged.
    """
    row = look_up(spelling)
    if row is not None:
        return row
    names = _custom_names(models)
    name = names.get(normalise_name(spelling[:MAX_NAME_LENGTH]))
    if name is not None:
        try:
            return _custom_row(models, name)
        except NotInstalled:
            pass  # a folder without a model in it
    raise unknown_model(spelling, names)


def find_custom_name(models: Path, spelling: str) -> str | None:
    """Return the name of the folder of a user's own model that is spelt like this, None if there is none."""
    return _custom_names(models).get(normalise_name(spelling[:MAX_NAME_LENGTH]))


def find_folder(models: Path, text: str) -> Path:
    """Find the folder of a model by the model's name in any spelling, or by the path of the folder itself.

    :return: it may be without an artefact, or not exist.
    :raises UnknownModel: it is neither a path nor a model that is in the catalogue or installed.
    """
    if os.sep in text or text in (".", ".."):
        return Path(text).expanduser().absolute()
    row = look_up(text)
    name = find_custom_name(models, text) if row is None else row.name
    if name is None and Path(text).is_dir():
        return Path(text).absolute()
    return models / (name or find_row(models, text).name)


def installed_folders(models: Path) -> list[Path]:
    """List the folders of the installed models, damaged ones included. :raises NotInstalled: there is none."""
    try:
        found = sorted(path for path in models.iterdir() if is_model_name(path.name) and path.is_dir())
    except OSError:
        found = []
    if not found:
        raise NotInstalled(f"No model is installed in {models}. Install one: mlg models compile efficientnet_lite0")
    return found


def _custom_row(models: Path, name: str) -> ModelRow:
    artefact = find_artefact(models, name)
    if artefact.name != name or artefact.service not in REGISTRY:
        raise BrokenArtefact(
            f"{models / name} holds the model {artefact.name[:64]!r} for {artefact.service[:64]!r}, which cannot be "
            f"used under this name. Delete {models / name}."
        )
    return dataclasses.replace(artefact.row, source="own")


def _custom_names(models: Path) -> Mapping[str, str]:
    """List the folders that may be users' own models, by key. One stat while the models folder is unchanged."""
    path = str(models)
    try:
        changed_at = os.stat(path).st_mtime_ns  # noqa: PTH116 - as in artefact.py
        cached = _listing_cache.get(path)
        if cached is not None and cached[0] == changed_at:
            return cached[1]
        with os.scandir(path) as entries:
            names = sorted(entry.name for entry in entries if is_model_name(entry.name) and entry.is_dir())
    except OSError:
        return {}
    # The first of two that are spelt alike, which nobody can install, is at least always the same.
    found = {normalise_name(name): name for name in reversed(names) if look_up(name) is None}
    if time.time_ns() - changed_at > _SETTLE_NS:
        _listing_cache[path] = (changed_at, found)
    return found

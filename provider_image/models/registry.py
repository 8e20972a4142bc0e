"""The registry of the models that requests can name: those of the catalogue, and the custom ones that are installed.

Read by the server for every upload, by the batcher in every cycle, and by the commands. A custom model is known only
from its artefact: it exists as long as its folder does. Must not import anything heavy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path

from provider_image.errors import BrokenArtefact, ModelError, NotInstalled
from provider_image.models.artefact import find_artefact, is_model_name
from provider_image.models.catalogue import (
    CATALOGUE,
    EMBEDDING_SUFFIX,
    MAX_NAME_LENGTH,
    ModelFacts,
    embedding_of,
    look_up,
    normalise_name,
    unknown_model,
)
from provider_image.services import REGISTRY

#: A listing is cached only if the folder has not changed for this long: timestamps of file systems are coarse.
_SETTLE_NS = 2_000_000_000

#: Models folder -> (its mtime_ns, normalised name -> name of each folder in it that is no catalogue model's).
_listing_cache: dict[str, tuple[int, Mapping[str, str]]] = {}


def list_rows(models: Path) -> tuple[ModelFacts, ...]:
    """List the catalogue, then the installed custom models by name, without damaged ones."""
    custom = []
    for name in sorted(_custom_names(models).values()):
        try:
            custom.append(_custom_row(models, name))
        except (NotInstalled, ModelError):
            continue  # `find_artefact` has logged it
    return (*CATALOGUE.values(), *custom)


def find_row(models: Path, spelling: str) -> ModelFacts:
    """Find a model by its name in any spelling: case, `-`, `_` and blanks do not matter.

    The embedding of a custom classifier is found before it is built, so that errors can say how to build it.

    :raises UnknownModel: there is none; suggests the most similar name, and how to list all.
    :raises BrokenArtefact: it is a custom model and damaged.
    """
    row = look_up(spelling)
    if row is not None:
        return row
    names = _custom_names(models)
    key = normalise_name(spelling[:MAX_NAME_LENGTH])
    if key in names:
        with contextlib.suppress(NotInstalled):  # a folder without a model in it
            return _custom_row(models, names[key])
    base = names.get(key.removesuffix(normalise_name(EMBEDDING_SUFFIX)))
    if base is not None:
        with contextlib.suppress(NotInstalled, ModelError):
            classifier = _custom_row(models, base)
            if classifier.service == "classification":
                return embedding_of(classifier)
    raise unknown_model(spelling, names)


def find_custom_name(models: Path, spelling: str) -> str | None:
    """Return the name of the custom model with this name in any spelling, None if there is none."""
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


def _custom_row(models: Path, name: str) -> ModelFacts:
    artefact = find_artefact(models, name)
    if artefact.name != name:
        raise BrokenArtefact(
            f"{models / name} holds the model {artefact.name[:64]!r}, which cannot be used under this name. "
            f"Delete {models / name}."
        )
    if artefact.service not in REGISTRY:
        raise BrokenArtefact(
            f"The model {name} needs the service {artefact.service[:64]!r}. Install the package that has it."
        )
    return dataclasses.replace(artefact, source="own")


def _custom_names(models: Path) -> Mapping[str, str]:
    """Return normalised name -> name of the folders that may be custom models. One stat if unchanged."""
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
    # Of two with the same normalised name, which cannot be installed by mlg, always the first.
    found = {normalise_name(name): name for name in reversed(names) if look_up(name) is None}
    if time.time_ns() - changed_at > _SETTLE_NS:
        _listing_cache[path] = (changed_at, found)
    return found

"""Features: what a linear model computes with, made of table rows (`table.py`) and of texts (`text.py`).

Training and serving call the same functions, so a model never sees features that differ from those it was fitted on.
An artefact describes its features in the file `features.json`, which holds no code and is not trusted. The modules of
this folder import numpy inside their functions only.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

from provider_image.errors import DAMAGED_FILE_ERRORS, BrokenArtefact
from provider_image.features.table import TableFeatures
from provider_image.features.text import TextFeatures
from provider_image.models.artefact import Artefact
from provider_image.schemas import parse_json

#: The file of an artefact that describes its features, and its most bytes.
FEATURES_FILE = "features.json"
MAX_FEATURES_BYTES = 16 * 1024 * 1024
_KINDS: dict[Any, type[TableFeatures] | type[TextFeatures]] = {"table": TableFeatures, "text": TextFeatures}


def load_table_features(artefact: Artefact) -> TableFeatures:
    """Return the features of an artefact that takes rows. :raises BrokenArtefact: as `load_features`."""
    found = load_features(artefact)
    if not isinstance(found, TableFeatures) or found.names != artefact.columns:
        raise _broken(artefact, "it does not describe the model's columns")
    return found


def load_text_features(artefact: Artefact) -> TextFeatures:
    """Return the features of an artefact that takes texts. :raises BrokenArtefact: as `load_features`."""
    found = load_features(artefact)
    if not isinstance(found, TextFeatures):
        raise _broken(artefact, "it does not describe the features of texts")
    return found


def load_features(artefact: Artefact) -> TableFeatures | TextFeatures:
    """Return an artefact's features, read once for each artefact.

    :raises BrokenArtefact: the file is missing, has changed, or cannot be used.
    """
    if FEATURES_FILE not in artefact.files:
        raise _broken(artefact, "it is missing")
    return _read(str(artefact.folder), *artefact.files[FEATURES_FILE])


@functools.lru_cache(maxsize=8)
def _read(folder: str, size: int, sha256: str) -> TableFeatures | TextFeatures:
    from pathlib import Path

    path = Path(folder) / FEATURES_FILE
    try:
        if size > MAX_FEATURES_BYTES:
            raise ValueError(f"it has more than {MAX_FEATURES_BYTES} bytes")
        with path.open("rb") as file:
            data = file.read(size + 1)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("it has changed since it was made")
        facts = parse_json(data, BrokenArtefact, "The description")
        return _KINDS[facts.pop("kind")].from_json(facts)
    except (BrokenArtefact, *DAMAGED_FILE_ERRORS) as error:
        raise BrokenArtefact(f"{path} cannot be used: {error}. Delete {folder}, then train the model again.") from error


def _broken(artefact: Artefact, why: str) -> BrokenArtefact:
    return BrokenArtefact(
        f"{artefact.folder / FEATURES_FILE} cannot be used: {why}. "
        f"Delete {artefact.folder}, then train the model again."
    )

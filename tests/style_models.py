"""A model that transfers styles in some milliseconds."""

from __future__ import annotations

import hashlib
from pathlib import Path

from provider_image.backends.style import SETTINGS_FILE, TEXTURE, StyleSettings
from provider_image.compiler.installing import begin_artefact, build_folder
from provider_image.compiler.style.samples import install_style
from provider_image.models.artefact import Artefact
from provider_image.models.catalogue import CATALOGUE

#: Parameters with which a transfer takes some milliseconds.
QUICK_PARAMS = {"size": 96, "iterations": 12}


def install_quick_texture(models: Path) -> Artefact:
    """Install `texture` with few iterations."""
    with build_folder(models, "texture") as folder:
        StyleSettings(method=TEXTURE, iterations=3, max_pixels=128 * 128).write(folder)
        draft = begin_artefact(
            CATALOGUE["texture"],
            backend="style",
            weights_sha256=hashlib.sha256(b"").hexdigest(),
            recipe="quick",
            reference="nothing",
        )
        return install_style(draft, folder, models, [SETTINGS_FILE])

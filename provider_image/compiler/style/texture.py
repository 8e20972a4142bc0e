"""The builder of `texture`, which has no weights: a few settings, and what they gave for the images of the self-test.

Called by `compiler.build`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from provider_image.backends.style import SETTINGS_FILE, TEXTURE, StyleSettings
from provider_image.compiler.installing import begin_artefact, build_folder
from provider_image.compiler.style.samples import install_style
from provider_image.errors import BrokenArtefact, NotInstalled
from provider_image.models.artefact import Artefact, find_artefact
from provider_image.models.catalogue import ModelRow

#: Part of the digest. Change it whenever the results change.
RECIPE = "texture-1"
SETTINGS = StyleSettings(method=TEXTURE, iterations=192, max_pixels=1024 * 1024)


def build(models: Path, row: ModelRow, *, again: bool = False, f16_within: float = 0.0) -> Artefact:
    """Build an artefact in the models folder; some seconds, for the self-test.

    :param again: build even if an intact one is installed, for example by a process that held the lock before.
    :param f16_within: has no effect, because there are no weights.
    """
    import numpy as np

    with build_folder(models, row.name) as folder:
        if not again:
            try:
                return find_artefact(models, row.name)
            except (NotInstalled, BrokenArtefact):
                pass  # the usual case
        SETTINGS.write(folder)
        draft = begin_artefact(
            row,
            backend="style",
            weights_sha256=hashlib.sha256(b"").hexdigest(),  # there are none
            recipe=RECIPE,
            reference=f"numpy {np.__version__}",
        )
        return install_style(draft, folder, models, [SETTINGS_FILE])

"""Fixtures for every room's tests. Lazy and of session scope: what a test does not ask for costs nothing."""

from __future__ import annotations

import io
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def photos() -> dict[str, bytes]:
    """Real photos as JPEG files of good quality: chelsea (a cat), coffee and rocket, from scikit-image's wheel."""
    import skimage.data
    from PIL import Image

    found = {}
    for name in ("chelsea", "coffee", "rocket"):
        file = io.BytesIO()
        Image.fromarray(getattr(skimage.data, name)()).save(file, "JPEG", quality=95)
        found[name] = file.getvalue()
    return found


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder in which efficientnet_lite0 is installed. Shared, so a test must not change it."""
    from provider_image.models.compilers import ensure_installed

    folder = tmp_path_factory.mktemp("models")
    ensure_installed(folder, "efficientnet_lite0")
    return folder

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


@pytest.fixture(scope="session")
def own_models_folder(models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with efficientnet_lite0 and `my_pets`, a user's own classifier of three. Must not be changed."""
    from provider_image.models.own import OwnModel, build
    from tests.own_models import classifier, labels_file, save

    folder = tmp_path_factory.mktemp("own-models")
    (folder / "efficientnet_lite0").symlink_to(models_folder / "efficientnet_lite0")
    place = tmp_path_factory.mktemp("own-file")
    labels = labels_file(place, "cat", "dog", "parrot")
    build(
        folder, OwnModel(name="my_pets", file=save(classifier(), place / "pets.keras"), labels=labels, title="My pets")
    )
    return folder

"""The builder of models that are methods of OpenCV: their options and OpenCV's own files, with recorded results.

Called by `compiler.build`. There is nothing to compare such a model with: the self-test has what it returns itself, so
that a check finds a machine that computes something else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from provider_image.backends.opencv import METHOD_FILE, import_opencv, write_method
from provider_image.compiler.installing import begin_artefact, build_folder, find_same, install, with_files
from provider_image.compiler.self_test import self_test_images
from provider_image.compiler.verification import answer_images, write_samples
from provider_image.faces.cascades import make_files
from provider_image.models.artefact import Artefact
from provider_image.models.catalogue import ModelRow
from provider_image.precision import TOLERANCE


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """How a model is made."""

    #: The name in `backends.opencv.METHODS`, and what its factory gets.
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    #: Returns the further files of the artefact, by name.
    make_files: Callable[[], Mapping[str, bytes]] = dict
    #: Part of the digest. Change it whenever results change.
    recipe: str


#: Model -> how it is made.
_RECIPES = {
    "crop": _Recipe(method="copy", recipe="crop-1"),
    "face_crop": _Recipe(method="copy", recipe="crop-1"),
    "face_detector": _Recipe(method="cascades", make_files=make_files, recipe="cascades-1"),
    "face_quality": _Recipe(method="face_quality", recipe="face-quality-1"),
    "denoise": _Recipe(method="denoise", recipe="denoise-1"),
    "quality": _Recipe(method="quality", recipe="quality-1"),
}


def build(models: Path, row: ModelRow, *, again: bool = False, f16_within: float = TOLERANCE) -> Artefact:
    """Build an artefact in the models folder.

    :param again: build even if an intact one is installed, for example by a process that held the lock before.
    :param f16_within: has no effect, as there are no weights.
    """
    made = _RECIPES[row.name]
    with build_folder(models, row.name) as folder:
        content, files = write_method(folder, made.method, made.options), made.make_files()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        names = [METHOD_FILE, *files]
        draft = begin_artefact(
            row,
            backend="opencv",
            weights_sha256=hashlib.sha256(content).hexdigest(),
            recipe=made.recipe,
            reference=f"opencv {import_opencv().__version__}",
        )
        draft = with_files(replace(draft, folder=folder), names)
        if not again and (found := find_same(models, draft)) is not None:
            return found
        images = self_test_images()
        samples = write_samples(folder, images, answer_images(draft, images))
        return install(replace(draft, samples=samples), folder, models, names)

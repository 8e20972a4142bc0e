"""A model that was trained here, with a head that tests choose instead of fitting one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from provider_image.compiler.heads import Head, TrainedModel, build
from provider_image.models.artefact import Artefact, find_artefact

BACKBONE = "efficientnet_lite0_embedding"
#: The name of the model.
RATINGS = "ratings"


def install_ratings(models: Path) -> Artefact:
    """Install a regression in a models folder that has the backbone: ten times the first value of the features."""
    backbone = find_artefact(models, BACKBONE)
    weights = np.zeros((backbone.dimensions, 1), np.float32)
    weights[0] = 10
    head = Head(kind="regression", method="chosen", weights=weights, bias=np.array([3], np.float32))
    return build(
        models,
        TrainedModel(
            name=RATINGS,
            backbone=BACKBONE,
            backbone_digest=backbone.digest,
            head=head,
            training_digest="0" * 64,
        ),
    )

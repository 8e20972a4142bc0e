"""The gate for copies in bf16, asked for the Keras models: as they are, and with a head that was trained.

Their weights are seeded, so that many of their labels are nearly as probable as the next one, and the first label
changes with any rounding. Weights that were learned give surer answers. So the gate also judges a classifier as `mlg
train` makes one: the model's features with a head that has learned from which photo a part is. It judges both with
parts that nothing was learned from; they are cut from the same photos, so its figures say how far a copy keeps answers,
and not how right they are.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from provider_image.compiler import embedding, heads
from provider_image.models.artefact import Artefact
from scripts.benchmarks.models.heads import features_of
from scripts.benchmarks.models.precision import build_copy, write_parts
from trainer.heads import fit_classifier

#: Parts of photos that a head learns from.
_LEARNED = 105


def judge(models: Path, classifier: str, count: int) -> tuple[Artefact | None, str]:
    """Build a copy in bf16, judged with so many parts of photos. :return: see `build_copy`."""
    with tempfile.TemporaryDirectory(prefix="mlg-bench-") as folder:
        write_parts(Path(folder), count)
        return build_copy(models, classifier, "bf16", Path(folder))


def train(models: Path, name: str) -> Artefact:
    """Make a classifier for the photos of a model's features and a head that is fitted."""
    backbone = embedding.build(models, name)
    with tempfile.TemporaryDirectory(prefix="mlg-bench-") as folder:
        labels = write_parts(Path(folder), _LEARNED, seed=1)
        images = [path.read_bytes() for path in sorted(Path(folder).iterdir())]
    trained = heads.TrainedModel(
        name=f"trained_{name}",
        backbone=backbone.name,
        backbone_digest=backbone.digest,
        head=fit_classifier(features_of(backbone, images), labels, range(len(labels))),
        training_digest="0" * 64,
    )
    return heads.build(models, trained)

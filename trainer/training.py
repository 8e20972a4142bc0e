"""One training, from its row in the store to the installed model.

Run by `trainer/__main__.py` in a process of its own. It may be killed anywhere and run again: the same examples and
seed give the same model, and the row says that it is done only after the model is installed and the files are written.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.compiler.heads import TrainedModel, build
from provider_image.compiler.versions import keep_version
from provider_image.errors import MlgError
from provider_image.features.text import SEGMENTERS
from provider_image.models.artefact import Artefact, find_artefact
from store.errors import UnknownRequest
from store.requests import RequestRecord
from store.states import RequestState
from store.store import Store
from store.trainings.files import INPUT
from store.trainings.records import TrainingExample, TrainingKind, TrainingRecord
from trainer.errors import UnusableExamples
from trainer.figures import Figures
from trainer.fitting import Fitted, fit_and_evaluate_classes, fit_and_evaluate_numbers
from trainer.heads import normalise
from trainer.tables import train_table
from trainer.texts import train_text

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

log = logging.getLogger(__name__)

#: Examples that were left out of which the figures give the reason.
MAX_LEFT_OUT = 100
#: Classes of which the figures have the confusion matrix: its size is the square.
MAX_CONFUSION_CLASSES = 100
#: Media types of the files of a training.
PNG, CSV = "image/png", "text/csv"


class TrainingCancelled(Exception):
    """The training was cancelled, or another process has it."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """An example that could not be used."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a training has made; the model is installed."""

    digest: str
    #: JSON.
    figures: Mapping[str, Any]
    #: Name -> (media type, bytes).
    files: Mapping[str, tuple[str, bytes]]


def train(store: Store, models: Path, id: str, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
    """Fit, evaluate and install the model of a training, and record how it ended. Another process's is left alone.

    :raises StoreError: how it ended could not be recorded.
    """
    training = store.trainings.claim(id, now=clock())
    if training is None:
        return

    def report(step: str) -> None:
        if not store.trainings.set_step(training, step):
            raise TrainingCancelled()

    try:
        train_on = train_on_images if training.kind is TrainingKind.IMAGES else train_on_table
        result = train_on(store, models, training, report)
        for name, (_, data) in result.files.items():
            store.trainings.files.write(id, name, data)
        kinds = {name: kind for name, (kind, _) in result.files.items()}
        store.trainings.finish(training, digest=result.digest, figures=result.figures, files=kinds, now=clock())
    except TrainingCancelled:
        log.info("the training %s was cancelled", id)
    except MlgError as error:
        store.trainings.fail(training, code=error.code, reason=error.reason, now=clock())
    except Exception as error:
        log.exception("the training %s failed", id)
        reason = f"The training failed; the log of the batcher says more ({type(error).__name__}: {error})."
        store.trainings.fail(training, code="training_failed", reason=reason[:1000], now=clock())


def train_on_images(store: Store, models: Path, training: TrainingRecord, report: Callable[[str], None]) -> Result:
    """Fit a head on the features of images.

    :param report: called with the name of each step; raises to stop.
    :raises UnusableExamples: too few examples have features. :raises TrainerMissing:
    """
    report("reading the features")
    backbone = find_artefact(models, f"{training.backbone}_embedding")
    examples, features, left_out = load_features(store, backbone, store.trainings.examples(training.id))
    if training.batch_id is not None:
        refused = store.batches.refused_items(training.batch_id)
        left_out = [LeftOut(name=one.client_id, reason=one.reason) for one in refused] + left_out
    report("fitting and evaluating")
    names = [example.name for example in examples]
    targets = [example.target for example in examples if example.target is not None]
    if targets:
        fitted = fit_and_evaluate_numbers(features, targets, names, seed=training.seed)
    else:
        labels = [example.label or "" for example in examples]
        fitted = fit_and_evaluate_classes(features, labels, names, seed=training.seed)
    report("compiling the model")
    artefact = _install(store, models, training, backbone, fitted, examples)
    ids = {example.name: example.request_id for example in examples}
    figures = {
        **_to_json(fitted.figures),
        "method": fitted.head.method,
        "backbone": training.backbone,
        "examples": len(examples),
        "near_duplicates": fitted.plan.groups.duplicates,
        "left_out_count": len(left_out),
        "left_out": [asdict(one) for one in left_out[:MAX_LEFT_OUT]],
    }
    for mistake in figures["mistakes"]:
        mistake["req_id"] = ids[mistake["name"]]
    return Result(digest=artefact.digest, figures=figures, files=figure_files(fitted.figures))


def train_on_table(store: Store, models: Path, training: TrainingRecord, report: Callable[[str], None]) -> Result:
    """Fit a linear model on a table or on texts.

    :param report: called with the name of each step; raises to stop.
    :raises UnusableExamples: the table cannot be used. :raises TrainerMissing:
    """
    table, target = store.trainings.files.path(training.id, INPUT), training.target or ""
    facts: dict[str, Any] = {"name": training.name, "models": models, "seed": training.seed, "on_step": report}
    report("reading the table")
    keep_version(models, training.name)
    if training.kind is TrainingKind.TEXT:
        segmenter = training.options.get("segmenter") or next(iter(SEGMENTERS))
        artefact, figures = train_text(table, training.options["text"], target, segmenter=segmenter, **facts)
    else:
        artefact, figures = train_table(table, target, **facts)
    document = {**_to_json(figures), "examples": training.examples, "left_out_count": 0, "left_out": []}
    return Result(digest=artefact.digest, figures=document, files=figure_files(figures))


def load_features(
    store: Store, backbone: Artefact, examples: Iterable[TrainingExample]
) -> tuple[list[TrainingExample], Array, list[LeftOut]]:
    """Read the features of those examples that have some.

    :param backbone: the model that must have computed them.
    :return: the examples, their features (f32 of unit length, shape (examples, dimensions)), and those without.
    :raises UnusableExamples: no example has features.
    """
    import numpy as np

    found, vectors, left_out = [], [], []
    for example in examples:
        try:
            vectors.append(_read_vector(store, backbone, store.requests.get(example.request_id)))
            found.append(example)
        except UnknownRequest:
            left_out.append(LeftOut(name=example.name, reason="The image was deleted meanwhile."))
        except UnusableExamples as error:
            left_out.append(LeftOut(name=example.name, reason=error.reason))
    if not vectors:
        first = f" The first: {left_out[0].reason}" if left_out else ""
        raise UnusableExamples(f"No image has features.{first}")
    return found, normalise(np.stack(vectors)), left_out


def _read_vector(store: Store, backbone: Artefact, request: RequestRecord) -> Array:
    """Read the features of one image. :raises UnusableExamples: it has none."""
    import numpy as np

    if request.state is not RequestState.DONE:
        raise UnusableExamples(request.reason or f"The request for its features is {request.status}.")
    if request.digest != backbone.digest:
        raise UnusableExamples(f"Its features are from another version of {backbone.name}. Train again.")
    data = store.images.read(request.files["vector"].sha256)
    return np.frombuffer(data, "<f4", count=backbone.dimensions)


def _to_json(figures: Figures) -> dict[str, Any]:
    """Return figures as JSON. With many classes without the confusion matrix, which `answers.csv` has implicitly."""
    document = figures.as_json()
    return document if len(figures.classes) <= MAX_CONFUSION_CLASSES else {**document, "confusion": []}


def figure_files(figures: Figures) -> dict[str, tuple[str, bytes]]:
    """Make the files of an evaluation: every answer, the worst mistakes, and for classes the confusion matrix."""
    rows = list(figures.rows())
    mistakes = {item.name for item in figures.mistakes}
    files = {
        "answers.csv": (CSV, _to_csv(rows)),
        "mistakes.csv": (CSV, _to_csv([rows[0], *(row for row in rows[1:] if row[0] in mistakes)])),
    }
    if figures.kind == "classification" and figures.count:
        files["confusion.png"] = (PNG, figures.confusion_png())
    return files


def _to_csv(rows: Iterable[Sequence[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "replace")


def _install(
    store: Store,
    models: Path,
    training: TrainingRecord,
    backbone: Artefact,
    fitted: Fitted,
    examples: Sequence[TrainingExample],
) -> Artefact:
    """Build the model and install it; keep the one before. :raises UnsuitableModel: :raises CompilationFailed:"""
    threshold = fitted.figures.threshold
    trained = TrainedModel(
        name=training.name,
        backbone=backbone.name,
        backbone_digest=backbone.digest,
        head=fitted.head,
        training_digest=_training_digest(store, training, examples),
        unknown_below=0.0 if threshold is None else threshold.probability,
    )
    keep_version(models, training.name)
    return build(models, trained)


def _training_digest(store: Store, training: TrainingRecord, examples: Sequence[TrainingExample]) -> str:
    """Return the digest of the examples, and of what else decided the head."""
    digest = hashlib.sha256(f"{training.backbone} {training.seed}\n".encode())
    for example in examples:
        image = store.requests.get(example.request_id).image_sha256
        digest.update(json.dumps([image, example.label, example.target]).encode())
    return digest.hexdigest()

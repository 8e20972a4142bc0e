"""One training, run in this process on features that tests make: what is left out, killed, cancelled, done again."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from provider_image.compiler import ensure_installed
from provider_image.models.artefact import find_artefact
from store import new_id
from store.batches import BatchRecord, RefusedItem
from store.files import NewFile
from store.requests import Answer, NewRequest
from store.settings import HomeSettings
from store.store import Store
from store.trainings.records import TrainingExample, TrainingKind, TrainingRecord, TrainingState
from tests.stores import open_store
from trainer.training import TrainingCancelled, train, train_on_images

MODEL = "efficientnet_lite0_embedding"
NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
CLASSES = ("cats", "dogs")
COUNT = 8


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with a backbone; tests copy it."""
    folder = tmp_path_factory.mktemp("backbone")
    ensure_installed(folder, MODEL)
    return folder


@pytest.fixture
def store(tmp_path: Path, backbone_folder: Path) -> Iterator[Store]:
    """A store of a home with the backbone."""
    settings = HomeSettings(home=tmp_path / "home")
    store = open_store(settings)
    shutil.copytree(backbone_folder, settings.models)
    yield store
    store.close()


def models_of(store: Store) -> Path:
    return store.database.path.parent / "models"


def make_image(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 255 - shade, 40)).save(buffer, "PNG")
    return buffer.getvalue()


def make_vector(label: str, number: int, dimensions: int) -> bytes:
    """Features of unit length: those of a class are alike, but no near-duplicates."""
    chance = np.random.default_rng(CLASSES.index(label) * 1000 + number)
    vector = chance.random(dimensions)
    vector[CLASSES.index(label) :: 2] += 1.0
    return (vector / np.linalg.norm(vector)).astype("<f4").tobytes()


def add(store: Store, *, digest: str | None = None, failed: int = 0, **changes: object) -> TrainingRecord:
    """Add a training with answered requests for features. :param failed: requests that fail."""
    backbone = find_artefact(models_of(store), MODEL)
    batch = BatchRecord(id=new_id(), service="embedding", model=MODEL, created_at=NOW)
    names = [(label, number) for label in CLASSES for number in range(COUNT)]
    facts = {"service": "embedding", "model": MODEL, "created_at": NOW, "batch_id": batch.id}
    new = [NewRequest(id=new_id(), **facts) for _ in names]  # type: ignore[arg-type]
    images = [store.images.stage(make_image(10 * n + 100 * CLASSES.index(label))) for label, n in names]
    refused = [RefusedItem(position=99, client_id="cats/broken.png", code="c", reason="It is broken.")]
    store.batches.add(batch, list(zip(new, images, strict=True)), refused)
    claims = store.requests.claim(
        models={MODEL}, limit=100, now=NOW, lease_ends_at=NOW + timedelta(seconds=30), oldest_before=None
    )
    answers = [
        Answer(
            claim=claim,
            output={"dimensions": backbone.dimensions},
            digest=digest or backbone.digest,
            chunk_id="c",
            provider="local",
            seconds=0.01,
            files={
                "vector": NewFile(
                    data=make_vector(*names[place], backbone.dimensions), media_type="application/octet-stream"
                )
            },
        )
        for place, claim in enumerate(claims)
    ]
    store.requests.finish(answers[failed:], now=NOW)
    store.requests.fail(claims[:failed], code="broken_image", reason="It cannot be decoded.", now=NOW)
    examples = [
        TrainingExample(position=place, request_id=one.id, name=f"{label}/{n}.png", label=label)
        for place, (one, (label, n)) in enumerate(zip(new, names, strict=True))
    ]
    facts = {"id": new_id(), "name": "pets", "kind": TrainingKind.IMAGES, "backbone": "efficientnet_lite0"}
    training = TrainingRecord(**{**facts, "batch_id": batch.id, "created_at": NOW, **changes})  # type: ignore[arg-type]
    return store.trainings.add(training, examples)


def test_a_training_makes_a_model_with_figures_and_files(store: Store) -> None:
    training = add(store)

    train(store, models_of(store), training.id)

    found = store.trainings.get(training.id)
    assert (found.state, found.version, found.reason) == (TrainingState.DONE, 1, None)
    artefact = find_artefact(models_of(store), "pets")
    assert (artefact.digest, artefact.service) == (found.digest, "classification")
    assert [name for _, name in artefact.labels] == list(CLASSES)
    assert (found.figures["accuracy"], found.figures["count"], found.figures["examples"]) == (1.0, 16, 16)
    assert found.figures["left_out"] == [{"name": "cats/broken.png", "reason": "It is broken."}]
    assert set(found.files) == {"answers.csv", "mistakes.csv", "confusion.png"}
    assert store.trainings.files.read(training.id, "answers.csv").count(b"\n") == 17
    assert store.trainings.find_ready() is None


def test_requests_that_failed_or_were_deleted_are_left_out_with_the_reason(store: Store) -> None:
    training = add(store, failed=1)
    examples = store.trainings.examples(training.id)
    store.requests.remove(examples[-1].request_id)

    train(store, models_of(store), training.id)

    found = store.trainings.get(training.id)
    assert (found.state, found.figures["examples"], found.figures["left_out_count"]) == (TrainingState.DONE, 14, 3)
    reasons = {one["name"]: one["reason"] for one in found.figures["left_out"]}
    assert reasons["cats/0.png"] == "It cannot be decoded."
    assert reasons["dogs/7.png"] == "The image was deleted meanwhile."


def test_features_of_another_backbone_are_not_used(store: Store) -> None:
    training = add(store, digest="f" * 64)

    train(store, models_of(store), training.id)

    found = store.trainings.get(training.id)
    assert (found.state, found.code) == (TrainingState.FAILED, "unusable_examples")
    assert found.reason is not None and "another version of efficientnet_lite0_embedding" in found.reason


def test_a_process_that_is_killed_after_installing_is_repeated_with_the_same_result(store: Store) -> None:
    training = add(store)
    claimed = store.trainings.claim(training.id, now=NOW)
    assert claimed is not None
    first = train_on_images(store, models_of(store), claimed, lambda step: None)
    store.trainings.close()  # as if this process had ended
    assert store.trainings.release_lost() == [training.id]

    train(store, models_of(store), training.id)

    found = store.trainings.get(training.id)
    assert (found.state, found.digest, found.version) == (TrainingState.DONE, first.digest, 1)


def test_a_cancelled_training_installs_nothing(store: Store) -> None:
    training = add(store)
    claimed = store.trainings.claim(training.id, now=NOW)
    assert claimed is not None
    steps = []

    def report(step: str) -> None:
        steps.append(step)
        if len(steps) == 2:
            raise TrainingCancelled()

    with pytest.raises(TrainingCancelled):
        train_on_images(store, models_of(store), claimed, report)

    assert not (models_of(store) / "pets").exists()


def test_training_again_keeps_the_version_before(store: Store) -> None:
    ids = [add(store, seed=seed).id for seed in (1, 2)]
    for id in ids:
        train(store, models_of(store), id)

    versions = store.trainings.versions("pets")

    assert [one.version for one in versions] == [2, 1]
    assert find_artefact(models_of(store), "pets").digest == versions[0].digest
    kept = {path.name for path in (models_of(store) / ".versions" / "pets").iterdir()}
    assert kept == {versions[1].digest}

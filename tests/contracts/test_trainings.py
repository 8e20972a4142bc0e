"""What every Trainings must do. A new implementation adds a parameter to `store`, not tests."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from store import new_id
from store.batches import BatchRecord
from store.requests import NewRequest
from store.store import Store
from store.trainings.files import INPUT, LEFTOVER_SECONDS
from store.trainings.records import (
    NameTaken,
    TooManyModels,
    TooManyTrainings,
    TrainingEnded,
    TrainingExample,
    TrainingInProgress,
    TrainingKind,
    TrainingRecord,
    TrainingRights,
    TrainingState,
    UnknownTraining,
)
from store.trainings.trainings import MAX_FAILURES, MAX_UNFINISHED, MAX_VERSIONS
from tests.contracts.conftest import OpenStore

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
CLIENT = TrainingRights(is_operator=False, max_models=2)


def new_training(name: str = "pets", **changes: Any) -> TrainingRecord:
    facts = {"id": new_id(), "name": name, "kind": TrainingKind.TABLE, "created_at": NOW, **changes}
    return TrainingRecord(**facts)


def add(store: Store, name: str = "pets", **changes: Any) -> TrainingRecord:
    return store.trainings.add(new_training(name, **changes))


def finish(store: Store, training: TrainingRecord, digest: str = "d" * 64) -> None:
    claimed = store.trainings.claim(training.id, now=NOW)
    assert claimed is not None
    assert store.trainings.finish(claimed, digest=digest, figures={"accuracy": 0.9}, files={}, now=NOW)


def add_images(store: Store) -> tuple[TrainingRecord, BatchRecord]:
    batch = BatchRecord(id=new_id(), service="embedding", model="m_embedding", created_at=NOW)
    facts: dict[str, Any] = {"service": "embedding", "model": "m_embedding", "created_at": NOW, "batch_id": batch.id}
    requests = [NewRequest(id=new_id(), **facts) for _ in range(2)]
    store.batches.add(batch, [(one, store.images.stage(one.id.encode())) for one in requests], [])
    examples = [
        TrainingExample(position=position, request_id=one.id, name=f"cats/{position}.jpg", label="cats")
        for position, one in enumerate(requests)
    ]
    training = new_training(kind=TrainingKind.IMAGES, backbone="m", batch_id=batch.id)
    return store.trainings.add(training, examples), batch


@pytest.fixture
def other(open_store: OpenStore, tmp_path: Path) -> Iterator[Store]:
    """The same home, as another process sees it."""
    other = open_store(tmp_path / "home")
    yield other
    other.close()


def test_a_training_is_read_back_with_its_examples(store: Store) -> None:
    training, batch = add_images(store)

    found = store.trainings.get(training.id)

    assert found == training
    assert (found.state, found.examples, found.batch_id) == (TrainingState.WAITING, 2, batch.id)
    assert [(one.name, one.label, one.target) for one in store.trainings.examples(training.id)] == [
        ("cats/0.jpg", "cats", None),
        ("cats/1.jpg", "cats", None),
    ]
    assert store.trainings.list() == [training]
    with pytest.raises(UnknownTraining):
        store.trainings.get("nope")


def test_a_training_is_ready_when_no_request_for_its_features_waits(store: Store) -> None:
    training, batch = add_images(store)

    before, claimed = store.trainings.find_ready(), store.trainings.claim(training.id, now=NOW)
    store.batches.cancel(batch.id, now=NOW)

    assert (before, claimed) == (None, None)
    assert store.trainings.find_ready() == training.id


def test_only_one_of_two_processes_gets_a_training(store: Store, other: Store) -> None:
    training = add(store)

    claims = [one.trainings.claim(training.id, now=NOW) for one in (store, other)]

    assert claims[0] is not None and claims[0].state is TrainingState.FITTING
    assert claims[1] is None
    assert other.trainings.find_ready() is None


def test_a_training_is_given_back_when_its_process_has_ended_and_not_before(store: Store, other: Store) -> None:
    training = add(store)
    lost = other.trainings.claim(training.id, now=NOW)
    assert lost is not None

    before = store.trainings.release_lost()
    other.trainings.close()
    after = store.trainings.release_lost()
    again = store.trainings.claim(training.id, now=NOW)

    assert (before, after) == ([], [training.id])
    assert again is not None and again.token == lost.token + 1
    assert not other.trainings.set_step(lost, "fitting")
    assert not other.trainings.finish(lost, digest="x", figures={}, files={}, now=NOW)
    assert not other.trainings.fail(lost, code="c", reason="r", now=NOW)
    assert store.trainings.set_step(again, "fitting")
    assert store.trainings.get(training.id).step == "fitting"


def test_finished_trainings_of_a_name_are_numbered_and_the_oldest_forgotten(store: Store) -> None:
    trainings = []
    for number in range(MAX_VERSIONS + 1):
        trainings.append(add(store))
        store.trainings.files.write(trainings[-1].id, "answers.csv", b"name\n")
        finish(store, trainings[-1], digest=f"{number:064d}")

    versions = store.trainings.versions("PETS")

    assert [one.version for one in versions] == list(range(MAX_VERSIONS + 1, 1, -1))
    assert versions[0].figures == {"accuracy": 0.9}
    with pytest.raises(UnknownTraining):
        store.trainings.get(trainings[0].id)
    assert not store.trainings.files.path(trainings[0].id, "answers.csv").exists()
    assert store.trainings.files.read(trainings[1].id, "answers.csv") == b"name\n"


def test_a_training_fails_after_its_process_has_ended_too_often(store: Store) -> None:
    training = add(store)

    for _ in range(MAX_FAILURES - 1):
        store.trainings.count_failure(training.id, reason="It was killed.", now=NOW)
    before = store.trainings.get(training.id).state
    store.trainings.count_failure(training.id, reason="It was killed.", now=NOW)

    found = store.trainings.get(training.id)
    assert before is TrainingState.WAITING
    assert (found.state, found.code, found.reason) == (TrainingState.FAILED, "trainer_died", "It was killed.")


def test_the_last_failure_can_be_the_first(store: Store) -> None:
    training = add(store)

    store.trainings.count_failure(training.id, reason="It took too long.", now=NOW, is_last=True)

    assert store.trainings.get(training.id).state is TrainingState.FAILED


def test_a_name_belongs_to_the_key_that_trained_it_first(store: Store) -> None:
    finish(store, add(store, key_id="alice"))
    finish(store, add(store, "from_before"))

    for name, key_id in (("pets", "bob"), ("p_ets", "alice"), ("pets", None), ("from_before", "bob")):
        with pytest.raises(NameTaken):
            store.trainings.add(new_training(name, key_id=key_id), rights=CLIENT)
    again = store.trainings.add(new_training(key_id="alice"), rights=CLIENT)
    operators = store.trainings.add(new_training("from_before", key_id="operator"))

    assert [one.id for one in store.trainings.list()] == [
        operators.id,
        again.id,
        *(one.id for one in store.trainings.list()[2:]),
    ]
    assert [one.id for one in store.trainings.list(key_id="operator")] == [operators.id]


def test_a_key_has_a_limited_number_of_models_and_of_trainings_that_wait(store: Store) -> None:
    for name in ("one", "two"):
        finish(store, store.trainings.add(new_training(name, key_id="alice"), rights=CLIENT))

    with pytest.raises(TooManyModels):
        store.trainings.add(new_training("three", key_id="alice"), rights=CLIENT)
    for _ in range(MAX_UNFINISHED):
        store.trainings.add(new_training("two", key_id="alice"), rights=CLIENT)
    with pytest.raises(TooManyTrainings):
        store.trainings.check(new_training("two", key_id="alice"), CLIENT)
    store.trainings.add(new_training("three", key_id="bob"), rights=CLIENT)


def test_what_is_refused_leaves_nothing(store: Store) -> None:
    add(store, key_id="alice")
    refused = new_training(key_id="bob")
    example = TrainingExample(position=0, request_id="r", name="n", label="l")

    with pytest.raises(NameTaken):
        store.trainings.add(refused, [example], table=b"a,b\n", rights=CLIENT)

    assert store.trainings.examples(refused.id) == []
    assert not (store.trainings.files.folder / refused.id).exists()


def test_a_cancelled_training_is_not_finished_and_its_table_is_deleted(store: Store) -> None:
    training = store.trainings.add(new_training(), table=b"a,b\n")
    claimed = store.trainings.claim(training.id, now=NOW)
    assert claimed is not None and store.trainings.files.read(training.id, INPUT) == b"a,b\n"

    store.trainings.cancel(training.id, now=NOW)

    assert not store.trainings.set_step(claimed, "fitting")
    assert store.trainings.get(training.id).state is TrainingState.CANCELLED
    assert not store.trainings.files.path(training.id, INPUT).exists()
    with pytest.raises(TrainingEnded):
        store.trainings.cancel(training.id, now=NOW)


def test_only_a_training_that_has_ended_can_be_deleted(store: Store) -> None:
    training, _ = add_images(store)

    with pytest.raises(TrainingInProgress):
        store.trainings.remove(training.id)
    store.trainings.cancel(training.id, now=NOW)
    store.trainings.remove(training.id)

    assert (store.trainings.list(), store.trainings.examples(training.id)) == ([], [])


def test_a_purge_deletes_what_failed_long_ago_and_what_killed_processes_left(store: Store) -> None:
    failed, done = add(store, "failed"), add(store, "done")
    finish(store, done)
    store.trainings.count_failure(failed.id, reason="r", now=NOW, is_last=True)
    leftover = store.trainings.files.folder / ".leftover"
    leftover.mkdir(parents=True)
    os.utime(leftover, (time.time() - 2 * LEFTOVER_SECONDS,) * 2)
    recent = store.trainings.files.folder / ".recent"
    recent.mkdir()

    store.retention.purge(images_before=NOW, results_before=NOW + timedelta(days=1), now=NOW)

    assert [one.name for one in store.trainings.list()] == ["done"]
    assert (leftover.exists(), recent.exists()) == (False, True)


def test_a_file_cannot_have_a_name_that_leads_elsewhere(store: Store) -> None:
    for name in ("../x.csv", "/etc/passwd", ".hidden.csv", "a/b.csv", ""):
        with pytest.raises(ValueError, match="plain file name"):
            store.trainings.files.path("id", name)

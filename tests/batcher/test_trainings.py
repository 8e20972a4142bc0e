"""The processes that fit: started when a training is ready, ended with the batcher, started again after a kill."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from batcher.settings import BatcherTimings
from batcher.trainings import TrainingRunner
from store import new_id
from store.settings import HomeSettings
from store.store import Store
from store.trainings.records import TrainingKind, TrainingRecord, TrainingState
from store.trainings.trainings import MAX_FAILURES
from tests.process_tree import is_alive
from tests.stores import open_store
from tests.timing import until

TIMINGS = BatcherTimings(training_poll_seconds=0.05)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store without models."""
    store = open_store(HomeSettings(home=tmp_path / "home"))
    yield store
    store.close()


def add(store: Store, name: str, kind: TrainingKind = TrainingKind.TABLE) -> str:
    training = TrainingRecord(id=new_id(), name=name, kind=kind, backbone="resnet50", created_at=datetime.now(UTC))
    return store.trainings.add(training).id


def runner(
    store: Store, module: str = "tests.batcher.trainer_process", timings: BatcherTimings = TIMINGS
) -> TrainingRunner:
    return TrainingRunner(store.trainings, store.database.path.parent, os.environ, module=module, timings=timings)


async def test_the_real_process_records_why_a_training_fails(store: Store) -> None:
    id = add(store, "pets", TrainingKind.IMAGES)

    await runner(store, "trainer").run_ready(asyncio.Event())

    found = store.trainings.get(id)
    assert (found.state, found.code) == (TrainingState.FAILED, "not_installed")
    assert found.reason is not None and "resnet50_embedding" in found.reason


async def test_trainings_that_are_ready_are_fitted_one_after_the_other(store: Store) -> None:
    ids = [add(store, "one"), add(store, "two")]

    await runner(store).run_ready(asyncio.Event())

    assert [store.trainings.get(id).state for id in ids] == [TrainingState.DONE] * 2


async def test_a_training_whose_process_dies_each_time_fails_and_the_next_is_fitted(store: Store) -> None:
    killed, other = add(store, "killed"), add(store, "other")

    await runner(store).run_ready(asyncio.Event())

    found = store.trainings.get(killed)
    assert (found.state, found.failures, found.token) == (TrainingState.FAILED, MAX_FAILURES, MAX_FAILURES)
    assert found.reason is not None and "SIGKILL" in found.reason
    assert store.trainings.get(other).state is TrainingState.DONE


async def test_stopping_ends_the_process_and_charges_nobody(store: Store) -> None:
    id, stop = add(store, "slow"), asyncio.Event()
    running = asyncio.create_task(runner(store).run(stop))
    pid = int(await until(lambda: store.trainings.get(id).step))

    stop.set()
    await running

    found = store.trainings.get(id)
    assert (found.state, found.failures) == (TrainingState.WAITING, 0)
    assert not is_alive(pid)


async def test_cancelling_ends_the_process(store: Store) -> None:
    id, stop = add(store, "slow"), asyncio.Event()
    running = asyncio.create_task(runner(store).run(stop))
    pid = int(await until(lambda: store.trainings.get(id).step))

    store.trainings.cancel(id, now=datetime.now(UTC))
    await until(lambda: not is_alive(pid))
    stop.set()
    await running

    assert store.trainings.get(id).state is TrainingState.CANCELLED


async def test_a_process_that_takes_too_long_is_ended_and_not_started_again(store: Store) -> None:
    id = add(store, "slow")

    timings = BatcherTimings(training_poll_seconds=0.05, training_seconds=0.5)
    await runner(store, timings=timings).run_ready(asyncio.Event())

    found = store.trainings.get(id)
    assert (found.state, found.code) == (TrainingState.FAILED, "trainer_died")
    assert found.reason is not None and "0.5 s" in found.reason


async def test_what_a_killed_process_left_is_started_again(store: Store) -> None:
    id, stop = add(store, "slow"), asyncio.Event()
    running = asyncio.create_task(runner(store).run(stop))
    pid = int(await until(lambda: store.trainings.get(id).step))

    os.kill(pid, signal.SIGKILL)
    again = int(await until(lambda: (step := store.trainings.get(id).step) and int(step) != pid and step))
    stop.set()
    await running

    assert again != pid
    assert store.trainings.get(id).token == 2

"""What becomes of each claim, decided without a store."""

from __future__ import annotations

from typing import Any

import pytest

from batcher.executors import Outcome
from batcher.planner import PlannedItem
from batcher.results import BACKOFF_SECONDS, OBSTACLE_SECONDS, settle_failure
from provider_image.errors import BrokenArtefact, ChunkTimeout, NotInstalled, WorkerDied
from store.records import Blame, Claim


def item(*claims: Claim) -> PlannedItem:
    return PlannedItem(claims=claims)


@pytest.fixture
def claims(bench: Any) -> list[Claim]:
    bench.add_many(4)
    now = bench.clock.now
    found: list[Claim] = bench.store.claim(
        models={"efficientnet_lite0"}, limit=16, now=now, lease_ends_at=now, oldest_before=None
    )
    return found


def failed(error: Any, *, is_blameless: bool = False) -> Outcome:
    return Outcome(provider="p", seconds=1.0, error=error, is_blameless=is_blameless)


def test_several_items_share_the_blame_of_their_chunk_and_are_due_at_once(claims: list[Claim]) -> None:
    settlement = settle_failure(map(item, claims), failed(WorkerDied()))

    (setback,) = settlement.setbacks
    assert (setback.blame, setback.delay_seconds, setback.code) == (Blame.CHUNK, 0.0, "worker_died")
    assert list(setback.claims) == claims


def test_a_lone_item_has_itself_to_blame_whoever_waits_for_it(claims: list[Claim]) -> None:
    settlement = settle_failure([item(*claims)], failed(ChunkTimeout()))

    (setback,) = settlement.setbacks
    assert (setback.blame, setback.delay_seconds) == (Blame.ITEM, BACKOFF_SECONDS[0])
    assert len(setback.claims) == 4


@pytest.mark.parametrize("error", [NotInstalled(), BrokenArtefact()])
def test_the_models_failure_is_nobodys_fault(claims: list[Claim], error: Any) -> None:
    settlement = settle_failure(map(item, claims), failed(error))

    assert {(setback.blame, setback.delay_seconds) for setback in settlement.setbacks} == {
        (Blame.NOBODY, OBSTACLE_SECONDS)
    }
    assert settlement.is_model_unusable


def test_what_is_given_back_at_a_stop_is_due_at_once(claims: list[Claim]) -> None:
    outcome = failed(WorkerDied("closed"), is_blameless=True)

    settlement = settle_failure(map(item, claims), outcome, is_stopping=True)

    assert [(setback.blame, setback.delay_seconds) for setback in settlement.setbacks] == [(Blame.NOBODY, 0.0)]
    assert not settlement.is_model_unusable

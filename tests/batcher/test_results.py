"""The outcome of each claim, decided without a store."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from batcher.errors import ImageMissing
from batcher.executors import Outcome
from batcher.planner import PlannedItem
from batcher.results import ITEM_BACKOFF, UNAVAILABLE_RETRY_SECONDS, _check_item, resolve_failed_chunk
from provider_image.chunk import ItemResult
from provider_image.errors import (
    BrokenArtefact,
    BrokenImage,
    ChunkTimeout,
    MalformedResults,
    NotInstalled,
    WorkerDied,
)
from store.requests import Blame, Claim


def item(*claims: Claim) -> PlannedItem:
    return PlannedItem(claims=claims)


@pytest.fixture
def claims(harness: Any) -> list[Claim]:
    harness.add_many(4)
    now = harness.clock.now
    found: list[Claim] = harness.store.requests.claim(
        models={"efficientnet_lite0"}, limit=16, now=now, lease_ends_at=now, oldest_before=None
    )
    return found


def failed(error: Any, *, is_blameless: bool = False) -> Outcome:
    return Outcome(provider="p", seconds=1.0, error=error, is_blameless=is_blameless)


def test_several_items_of_a_failed_chunk_share_the_blame_and_are_due_immediately(claims: list[Claim]) -> None:
    chunk_outcome = resolve_failed_chunk(map(item, claims), failed(WorkerDied()))

    (failure,) = chunk_outcome.failures
    assert (failure.blame, failure.delay_seconds, failure.code) == (Blame.CHUNK, 0.0, "worker_died")
    assert list(failure.claims) == claims


def test_a_single_item_is_to_blame_for_its_chunk_for_all_its_claims(claims: list[Claim]) -> None:
    chunk_outcome = resolve_failed_chunk([item(*claims)], failed(ChunkTimeout()))

    (failure,) = chunk_outcome.failures
    assert (failure.blame, failure.delay_seconds) == (Blame.ITEM, ITEM_BACKOFF.after(1))
    assert len(failure.claims) == 4


@pytest.mark.parametrize("error", [NotInstalled(), BrokenArtefact()])
def test_a_failure_of_the_model_blames_no_item(claims: list[Claim], error: Any) -> None:
    chunk_outcome = resolve_failed_chunk(map(item, claims), failed(error))

    assert {(failure.blame, failure.delay_seconds) for failure in chunk_outcome.failures} == {
        (Blame.NOBODY, UNAVAILABLE_RETRY_SECONDS)
    }
    assert chunk_outcome.is_model_unusable


def test_items_released_at_a_stop_are_due_immediately(claims: list[Claim]) -> None:
    outcome = failed(WorkerDied("closed"), is_blameless=True)

    chunk_outcome = resolve_failed_chunk(map(item, claims), outcome, is_stopping=True)

    assert [(failure.blame, failure.delay_seconds) for failure in chunk_outcome.failures] == [(Blame.NOBODY, 0.0)]
    assert not chunk_outcome.is_model_unusable


@pytest.mark.parametrize("raised", [KeyError("label"), BrokenImage("an output file that is no image")])
def test_whatever_the_check_of_an_output_raises_the_provider_is_to_blame(
    claims: list[Claim], monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    class Careless:
        params = ()
        outputs: ClassVar[dict[str, Any]] = {}

        def check_output(self, *_: Any) -> None:
            raise raised

    monkeypatch.setattr("batcher.results.load_service", lambda name: Careless())
    artefact: Any = None

    with pytest.raises(MalformedResults, match="cannot be checked"):
        _check_item("careless", artefact, item(claims[0]), ItemResult(number=0, output={}))


def test_a_provider_cannot_say_that_an_image_is_missing_here(claims: list[Claim]) -> None:
    artefact: Any = None

    with pytest.raises(MalformedResults, match="missing"):
        _check_item("classification", artefact, item(claims[0]), ItemResult(number=0, error=ImageMissing()))

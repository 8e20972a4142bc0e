"""The outcome of each claim, decided without a store."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from batcher.errors import ImageMissing, ResizingUnavailable, UntrueResults
from batcher.executors import Outcome
from batcher.packing import PackedChunk, pack
from batcher.planner import PlannedItem, plan
from batcher.results import (
    ITEM_BACKOFF,
    UNAVAILABLE_RETRY_SECONDS,
    _answers,
    _check_item,
    check_results,
    resolve_chunk,
    resolve_failed_chunk,
)
from provider_image.chunk import ItemResult, Results, write_results
from provider_image.errors import (
    BrokenArtefact,
    BrokenImage,
    ChunkTimeout,
    InferenceFailed,
    MalformedResults,
    MlgError,
    NotInstalled,
    UnsupportedFormat,
    WorkerDied,
)
from provider_image.models.artefact import find_artefact
from store.requests import MAX_ATTEMPTS, Blame, Claim
from tests.batcher.conftest import MODEL, output_for
from tests.reduced_models import install_copy


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


def test_results_that_are_proven_wrong_blame_no_item(claims: list[Claim]) -> None:
    chunk_outcome = resolve_failed_chunk([item(*claims)], failed(UntrueResults()))

    assert {(failure.blame, failure.code) for failure in chunk_outcome.failures} == {
        (Blame.NOBODY, "malformed_results")
    }
    assert not chunk_outcome.is_model_unusable


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


# What a stranger says of an item

Write = Callable[..., PackedChunk]


@pytest.fixture
def answered(harness: Any, claims: list[Claim], tmp_path: Path) -> Write:
    """Pack a chunk of four and write a results file for it: the given results, and valid ones for the other items."""

    def write(*given: ItemResult, **facts: Any) -> PackedChunk:
        options = {"image_path": harness.store.images.path, "models": harness.models, "resizer": None}
        packed = pack(plan(claims)[0], folder=tmp_path, **options)
        artefact = find_artefact(harness.models, MODEL)
        items = {
            number: ItemResult(number=number, output=output_for(artefact, b"?"), seconds=7.0) for number in range(4)
        }
        items |= {each.number: each for each in given}
        results = Results(
            chunk_id=packed.chunk_id,
            model=MODEL,
            digest=artefact.digest,
            versions={},
            precision="f32",
            cpu="",
            load_seconds=0.0,
            peak_memory_bytes=1,
            items=tuple(items.values()),
        )
        write_results(packed.results, replace(results, **facts))
        return packed

    return write


def trying(*found: MlgError | None) -> Any:
    """What the inputs of the items are found to be when they are tried here."""

    def try_item(chunk: Path, number: int) -> MlgError | None:
        error = found[number]
        if isinstance(error, ResizingUnavailable):
            raise error
        return error

    return try_item


REFUSED = ItemResult(number=1, error=BrokenImage("a lie"))
DONE = Outcome(provider="p", seconds=1.0)


@pytest.mark.parametrize("was_installed", [True, False], ids=["installed", "built while it is computed"])
def test_a_provider_that_refuses_an_input_that_can_be_used_has_not_answered(
    harness: Any, answered: Write, was_installed: bool
) -> None:
    packed = answered(REFUSED)
    if not was_installed:
        packed = replace(packed, digests=())

    with pytest.raises(UntrueResults, match=r"can be used.*a lie"):
        check_results(packed, harness.models, trying(None, None, None, None), packed.results)


def test_an_input_that_cannot_be_used_here_either_is_an_answer_but_no_image(harness: Any, answered: Write) -> None:
    packed = answered(REFUSED)

    assert check_results(packed, harness.models, trying(None, BrokenImage(), None, None), packed.results) == 3


def test_any_other_failure_of_an_item_is_one_of_the_provider(harness: Any, answered: Write) -> None:
    packed = answered(ItemResult(number=2, error=NotInstalled("nothing is installed")))

    with pytest.raises(InferenceFailed, match="nothing is installed"):
        check_results(packed, harness.models, trying(), packed.results)


def test_a_provider_is_not_blamed_for_what_cannot_be_tried_or_is_missing_here(
    harness: Any, answered: Write, tmp_path: Path
) -> None:
    packed = answered(REFUSED)

    assert check_results(packed, harness.models, trying(None, ResizingUnavailable()), packed.results) == 3
    assert check_results(packed, tmp_path / "nothing", trying(), packed.results) == 0


def test_a_copy_answers_for_its_model_on_this_machine_only(harness: Any, answered: Write, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(harness.models / MODEL, models / MODEL)
    copy = install_copy(models, MODEL)
    packed = answered(digest=copy.digest, precision="int8")

    outcome = resolve_chunk(packed, DONE, models)

    # Requests to the model do not get it as an earlier answer: they look for the model's digest.
    assert [answer.digest for answer in outcome.answers] == [copy.digest] * len(packed.items)
    with pytest.raises(MalformedResults, match="digest"):
        check_results(packed, models, trying(), packed.results)
    install_copy(models, MODEL, base_digest="0" * 64)
    assert isinstance(resolve_chunk(packed, DONE, models).error, MalformedResults)


@pytest.mark.parametrize("is_copy", [True, False])
def test_a_model_that_changes_while_it_computes_blames_nobody(
    harness: Any, answered: Write, tmp_path: Path, is_copy: bool
) -> None:
    models = tmp_path / "models"
    shutil.copytree(harness.models / MODEL, models / MODEL)
    copy, model = install_copy(models, MODEL), find_artefact(models, MODEL)
    packed = replace(answered(digest=copy.digest if is_copy else model.digest), digests=(model.digest, copy.digest))
    document = models / (copy.name if is_copy else MODEL) / "model.json"
    if is_copy:
        document.unlink()
    else:
        document.write_text(document.read_text().replace(model.digest, "0" * 64))

    outcome = resolve_chunk(packed, DONE, models)
    of_strangers = resolve_chunk(packed, DONE, models, try_item=trying())

    assert [(each.blame, each.code, each.delay_seconds) for each in outcome.failures] == [
        (Blame.NOBODY, "model_replaced", 0.0)
    ]
    assert not outcome.is_model_unusable
    assert of_strangers.error is not None
    assert of_strangers.error.code == ("malformed_results" if is_copy else "model_replaced")
    if not is_copy:
        assert check_results(packed, models, trying(), packed.results) == 0


@pytest.mark.parametrize(("seconds", "is_complete", "suffix"), [(300, False, "-90s"), (300, True, ""), (90, False, "")])
def test_an_answer_that_the_time_of_a_chunk_cut_short_is_none_to_later_requests(
    harness: Any, claims: list[Claim], tmp_path: Path, seconds: int, is_complete: bool, suffix: str
) -> None:
    style = replace(claims[0], service="style_transfer", model="texture", params={"seconds": seconds})
    options = {"image_path": harness.store.images.path, "models": harness.models, "resizer": None}
    packed = pack(plan([style])[0], folder=tmp_path, timeout_seconds=120.0, **options)
    result = ItemResult(number=0, output={"complete": is_complete})

    (answer,) = _answers(packed, item(style), result, "d", DONE)

    assert answer.digest == f"d{suffix}"


def test_results_in_another_precision_are_no_answer(harness: Any, answered: Write) -> None:
    packed = answered(precision="bf16")

    with pytest.raises(UntrueResults, match="bf16"):
        check_results(packed, harness.models, trying(), packed.results)


def test_an_item_fails_for_good_only_for_a_reason_that_is_found_here(harness: Any, answered: Write) -> None:
    packed = answered(REFUSED, ItemResult(number=2, error=BrokenImage("a lie")))
    found = trying(None, UnsupportedFormat("found here"), None, None)

    outcome = resolve_chunk(packed, DONE, harness.models, try_item=found)

    assert [(each.blame, each.code) for each in outcome.failures] == [
        (None, "unsupported_format"),
        (Blame.NOBODY, "malformed_results"),
    ]
    assert outcome.failures[0].reason == "found here"
    assert outcome.items_done == 2


def test_an_item_is_queued_again_without_blame_if_its_input_cannot_be_tried(harness: Any, answered: Write) -> None:
    packed = answered(REFUSED)

    outcome = resolve_chunk(packed, DONE, harness.models, try_item=trying(None, ResizingUnavailable()))

    assert [(each.blame, each.delay_seconds) for each in outcome.failures] == [
        (Blame.NOBODY, UNAVAILABLE_RETRY_SECONDS)
    ]


def test_the_word_of_a_worker_that_is_trusted_is_enough(harness: Any, answered: Write) -> None:
    outcome = resolve_chunk(answered(REFUSED), DONE, harness.models)

    assert [(each.blame, each.reason) for each in outcome.failures] == [(None, "a lie")]


@pytest.mark.parametrize(
    ("attempts", "found", "expected"),
    [
        (MAX_ATTEMPTS - 2, BrokenImage("found here"), (Blame.ITEM, "worker_died", "a stranger")),
        (MAX_ATTEMPTS - 1, BrokenImage("found here"), (None, "broken_image", "found here")),
        (MAX_ATTEMPTS - 1, ChunkTimeout("hangs here"), (Blame.ITEM, "chunk_timeout", "hangs here")),
        (MAX_ATTEMPTS - 1, ResizingUnavailable("later"), (Blame.NOBODY, "shrinking_unavailable", "later")),
        (MAX_ATTEMPTS - 1, None, (Blame.ITEM, "worker_died", "a stranger Its input can be used on the server")),
    ],
)
def test_an_item_that_strangers_fail_for_good_is_tried_here(
    harness: Any, claims: list[Claim], tmp_path: Path, attempts: int, found: Any, expected: tuple[Any, str, str]
) -> None:
    options = {"image_path": harness.store.images.path, "models": harness.models, "resizer": None}
    packed = pack(plan([replace(claims[0], attempts=attempts)])[0], folder=tmp_path, **options)
    outcome = failed(WorkerDied("a stranger"))

    (failure,) = resolve_chunk(packed, outcome, harness.models, try_item=trying(found)).failures
    (trusted,) = resolve_chunk(packed, outcome, harness.models).failures

    assert (failure.blame, failure.code) == expected[:2]
    assert failure.reason.startswith(expected[2])
    assert (trusted.blame, trusted.reason) == (Blame.ITEM, "a stranger")


def test_an_item_cannot_have_taken_longer_than_its_chunk(harness: Any, answered: Write) -> None:
    outcome = resolve_chunk(answered(), DONE, harness.models)

    assert {answer.seconds for answer in outcome.answers} == {1.0}


def test_an_answer_in_another_precision_is_not_that_of_the_artefact(harness: Any, answered: Write) -> None:
    outcome = resolve_chunk(answered(precision="bf16"), DONE, harness.models)

    assert {answer.digest for answer in outcome.answers} == {f"{find_artefact(harness.models, MODEL).digest}-bf16"}

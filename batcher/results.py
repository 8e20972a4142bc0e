"""Decides the outcome of each claim of a chunk: answered, failed, or tried again.

Called by `batcher.cycle` in a thread. A results file is not trusted: it is accepted only if it answers exactly this
chunk with the artefact that is installed here, and each output passes the service's check. That an input cannot be used
is not taken from a stranger: it is tried here. Must not open the store.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from batcher.backoff import Backoff
from batcher.errors import ExecutorUnavailable, ImageMissing, ModelReplaced, ResizingUnavailable, UntrueResults
from batcher.executors import Outcome
from batcher.packing import PackedChunk
from batcher.planner import PlannedItem
from provider_image.chunk import ItemResult, Results, read_results
from provider_image.errors import (
    BadInput,
    ChunkError,
    InferenceFailed,
    MalformedResults,
    MlgError,
    ModelError,
    NotInstalled,
    UnknownModel,
)
from provider_image.models.artefact import Artefact, find_artefact
from provider_image.models.quickest import find_copies
from provider_image.service import Output, check_files, check_params, limit_seconds, media_type_of
from provider_image.services import load_service
from store.files import NewFile
from store.requests import MAX_ATTEMPTS, Answer, Blame, Claim

#: Pauses before an item that failed alone is tried again.
ITEM_BACKOFF = Backoff(first_seconds=1.0, max_seconds=16.0, factor=4.0)
#: Seconds before work is tried again that failed without fault of its items: an unusable model, a full disk.
UNAVAILABLE_RETRY_SECONDS = 30.0
#: Errors of the model, not of the items: other chunks of the model would fail the same way.
MODEL_ERRORS = (NotInstalled, ModelError, UnknownModel, ExecutorUnavailable)
#: Tries on this machine whether the model can take the inputs of an item: chunk file, number -> None, or why not.
#: :raises ResizingUnavailable: that cannot be tried now.
TryItem = Callable[[Path, int], MlgError | None]


@dataclass(frozen=True, kw_only=True)
class ClaimFailure:
    """Claims without an answer, and why."""

    claims: tuple[Claim, ...]
    #: The code for programs, and the sentence for people.
    code: str
    reason: str
    #: What is at fault; None fails the claims permanently.
    blame: Blame | None
    #: Seconds before they are tried again.
    delay_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ChunkOutcome:
    """The outcome for each claim of one chunk; each claim appears exactly once."""

    answers: tuple[Answer, ...] = ()
    failures: tuple[ClaimFailure, ...] = ()
    #: Number of items with an answer.
    items_done: int = 0
    #: Why the chunk failed as a whole; None if it did not.
    error: MlgError | None = None
    #: True when the model is at fault, so that other chunks of it would fail the same way.
    is_model_unusable: bool = False

    @property
    def claims(self) -> list[Claim]:
        """All claims."""
        answered = [answer.claim for answer in self.answers]
        return answered + [claim for failure in self.failures for claim in failure.claims]


def resolve_unsent_items(packed: PackedChunk) -> ChunkOutcome:
    """Fail the items that are not sent, whatever happens to the chunk."""
    return ChunkOutcome(failures=tuple(_item_failure(item, error) for item, error in packed.rejected))


def resolve_chunk(
    packed: PackedChunk,
    outcome: Outcome,
    models: Path,
    *,
    try_item: TryItem | None = None,
    is_stopping: bool = False,
) -> ChunkOutcome:
    """Decide the outcome of the items that were sent; for the others see `resolve_unsent_items`.

    :param models: the folder of artefacts.
    :param try_item: confirms that an input cannot be used; None if the executor's workers are trusted.
    :param is_stopping: items released without blame are due again immediately, for other batchers.
    """
    if not packed.items:
        return ChunkOutcome()
    if outcome.error is not None:
        resolved = resolve_failed_chunk(packed.items, outcome, is_stopping=is_stopping)
        if try_item is None or not is_last_try(packed.items) or resolved.failures[0].blame is not Blame.ITEM:
            return resolved
        failure = _try_once_more(packed, resolved.failures[0], try_item, is_stopping)
        return replace(resolved, failures=(failure,))
    try:
        artefact = find_artefact(models, packed.planned.model)
        # Workers of this machine may have taken a quicker copy; strangers must use the model itself.
        copies = find_copies(models, artefact) if try_item is None else []
        installed = {each.digest: each for each in (artefact, *copies)}
        possible = packed.digests[:1] if try_item is not None else packed.digests
        results = _read(packed, artefact, packed.results, [*installed, *possible])
        if results.digest not in installed:
            raise ModelReplaced()
    except (MalformedResults, ModelReplaced, *MODEL_ERRORS) as error:
        failed = Outcome(provider=outcome.provider, seconds=outcome.seconds, error=error)
        return resolve_failed_chunk(packed.items, failed, is_stopping=is_stopping)
    answers: list[Answer] = []
    failures: list[ClaimFailure] = []
    computed_by = installed[results.digest]
    # An answer in another precision is none to later requests, which look for the artefact's digest.
    suffix = "" if results.precision == computed_by.computes_in else f"-{results.precision}"
    digest = f"{computed_by.digest}{suffix}"
    delay = 0.0 if is_stopping else UNAVAILABLE_RETRY_SECONDS
    for item, result in zip(packed.items, results.items, strict=True):
        try:
            if try_item is not None and isinstance(result.error, BadInput):
                raise try_item(packed.chunk, result.number) or _untrue(result.error)
            _check_item(packed.planned.service, artefact, item, result)
        except (ResizingUnavailable, UntrueResults) as error:
            failures.append(_make_failure([item], error, Blame.NOBODY, delay))
        except MlgError as error:
            failures.append(_item_failure(item, error))
        else:
            answers += _answers(packed, item, result, digest, outcome)
    items_done = len(packed.items) - len(failures)
    return ChunkOutcome(answers=tuple(answers), failures=tuple(failures), items_done=items_done)


def is_last_try(items: Sequence[PlannedItem]) -> bool:
    """Tell whether a chunk has one item, which fails for good if it fails once more."""
    return len(items) == 1 and max(claim.attempts for claim in items[0].claims) + 1 >= MAX_ATTEMPTS


def _try_once_more(packed: PackedChunk, failure: ClaimFailure, try_item: TryItem, is_stopping: bool) -> ClaimFailure:
    """Try here the input of an item that fails for good because strangers failed on it."""
    (item,) = packed.items
    try:
        error = try_item(packed.chunk, 0)
    except ResizingUnavailable as unavailable:
        return _make_failure([item], unavailable, Blame.NOBODY, 0.0 if is_stopping else UNAVAILABLE_RETRY_SECONDS)
    if error is not None:
        return _item_failure(item, error)
    hint = "Its input can be used on the server's machine, so another try may succeed: queue it again."
    return replace(failure, reason=f"{failure.reason} {hint}")


def check_results(packed: PackedChunk, models: Path, try_item: TryItem, results: Path) -> int:
    """Check whether a stranger's results file is a valid answer to a chunk, without computing anything.

    For executors that try another provider then. Each item must have a valid output, or an input that cannot be used
    here either.

    :return: the number of items with an output.
    :raises UntrueResults: it says untruly that an input cannot be used, or was computed in another precision.
    :raises MlgError: it answers another chunk or model, is damaged, or has values out of range.
    """
    try:
        artefact = find_artefact(models, packed.planned.model)
    except MODEL_ERRORS:
        return 0  # missing here, which is not the provider's fault; `resolve_chunk` says so
    if packed.digests and artefact.digest != packed.digests[0]:
        return 0  # likewise, if it was installed again meanwhile
    found = _read(packed, artefact, results)
    if found.precision != artefact.computes_in:
        raise UntrueResults(f"The results were computed in {found.precision}, not in {artefact.computes_in}.")
    for item, result in zip(packed.items, found.items, strict=True):
        if result.error is None:
            _check_item(packed.planned.service, artefact, item, result)
        elif not isinstance(result.error, BadInput):
            # The item may be at fault, but nobody knows before it fails elsewhere too.
            raise InferenceFailed(f"The provider failed on an item: {_printable(result.error)[:200]}")
        else:
            with contextlib.suppress(ResizingUnavailable):
                if try_item(packed.chunk, result.number) is None:
                    raise _untrue(result.error)
    return sum(result.error is None for result in found.items)


def resolve_failed_chunk(items: Iterable[PlannedItem], outcome: Outcome, *, is_stopping: bool = False) -> ChunkOutcome:
    """Decide the outcome of a chunk that failed as a whole.

    :param outcome: with an error.
    """
    failed = tuple(items)
    error = outcome.error or ChunkError()
    is_model_unusable = isinstance(error, MODEL_ERRORS)
    if outcome.is_blameless or is_model_unusable or isinstance(error, UntrueResults | ModelReplaced):
        delay = 0.0 if is_stopping or isinstance(error, ModelReplaced) else UNAVAILABLE_RETRY_SECONDS
        failures = [_make_failure(failed, error, Blame.NOBODY, delay)]
    elif len(failed) == 1:
        failures = [_blame_item(failed[0], error)]
    else:
        # Due immediately, in smaller chunks: the item at fault is found, and the others are answered.
        failures = [_make_failure(failed, error, Blame.CHUNK, 0.0)]
    return ChunkOutcome(failures=tuple(failures if failed else ()), error=error, is_model_unusable=is_model_unusable)


def _read(packed: PackedChunk, artefact: Artefact, results: Path, other_digests: Sequence[str] = ()) -> Results:
    """Read a results file. :param artefact: the one that must have answered, or one of the other digests."""
    numbers, outputs = range(len(packed.items)), load_service(packed.planned.service).outputs
    max_bytes = {name: one.max_bytes for name, one in outputs.items()}
    return read_results(
        results,
        packed.chunk_id,
        packed.planned.model,
        numbers,
        artefact.digest,
        other_digests=other_digests,
        max_bytes=max_bytes,
    )


def _untrue(error: MlgError) -> UntrueResults:
    return UntrueResults(f"A provider refused an input that can be used: {error.code}, {_printable(error)[:200]}")


def _check_item(service_name: str, artefact: Artefact, item: PlannedItem, result: ItemResult) -> None:
    """Check what a provider returned for an item. :raises MlgError: it is invalid, or is an error."""
    if isinstance(result.error, ImageMissing):
        raise MalformedResults("A provider cannot know whether an image is missing here.")
    if result.error is not None:
        raise result.error
    service = load_service(service_name)
    params = check_params(service.params, item.first.params)
    try:
        check_files(service.outputs, result.files)
        service.check_output(artefact, params, Output(data=result.output, files=result.files))
    except MalformedResults:
        raise
    except Exception as error:
        # Whatever a check raises, it is about the output: the provider is to blame, not the client's input.
        raise MalformedResults(f"The output cannot be checked ({type(error).__name__}: {error}).") from error


def _answers(packed: PackedChunk, item: PlannedItem, result: ItemResult, digest: str, outcome: Outcome) -> list[Answer]:
    service = load_service(packed.planned.service)
    outputs = service.outputs
    asked = item.first.params
    is_lowered = limit_seconds(service.params, asked, packed.item_seconds) != asked
    if is_lowered and isinstance(result.output, dict) and result.output.get("complete") is False:
        # With more time for chunks it would be another answer, so it is none to later requests either.
        digest = f"{digest}-{packed.item_seconds:g}s"
    files = {
        name: NewFile(data=data, media_type=media_type_of(outputs[name], data)) for name, data in result.files.items()
    }
    return [
        Answer(
            claim=claim,
            output=result.output,
            files=files,
            digest=digest,
            chunk_id=packed.chunk_id,
            provider=outcome.provider or "unknown",
            seconds=min(result.seconds, outcome.seconds),
        )
        for claim in item.claims
    ]


def _item_failure(item: PlannedItem, error: MlgError) -> ClaimFailure:
    if isinstance(error, BadInput | ImageMissing):
        # Decided by the error's class here, not by the provider's `permanent` flag.
        return _make_failure([item], error, None)
    return _blame_item(item, error)


def _blame_item(item: PlannedItem, error: MlgError) -> ClaimFailure:
    attempts = max(claim.attempts for claim in item.claims)
    return _make_failure([item], error, Blame.ITEM, ITEM_BACKOFF.after(attempts + 1))


def _make_failure(
    items: Iterable[PlannedItem], error: MlgError, blame: Blame | None, delay_seconds: float = 0.0
) -> ClaimFailure:
    return ClaimFailure(
        claims=tuple(claim for item in items for claim in item.claims),
        code=error.code,
        reason=_printable(error),
        blame=blame,
        delay_seconds=delay_seconds,
    )


def _printable(error: MlgError) -> str:
    """Return the reason without control characters: it may come from a provider, and is shown in terminals."""
    return "".join(character if character.isprintable() else " " for character in error.reason)[:1000]

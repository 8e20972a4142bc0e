"""Lets requests to pipelines go on: which steps follow from what has been answered, and adding their requests.

Run by `batcher/scheduler.py` beside the cycle, which claims the steps' requests like all others. `plan` is pure: no
clock, no I/O, and the same answers always give the same steps, so it does not matter which batcher does it, or how
often. Nothing is kept here between two runs.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from provider_image.errors import MlgError
from provider_image.features.text import parse_text
from provider_image.models.artefact import installed_digest
from provider_image.rows import format_row, parse_row
from provider_image.service import check_params
from provider_image.services import load_service
from store import new_id
from store.collections.collections import CollectionExists, CollectionRecord
from store.errors import LimitReached, StoreError, UnknownRequest
from store.files import StoredFile
from store.images import StagedImage
from store.pipelines.definition import (
    EACH,
    MAX_ITEMS,
    REQUEST,
    MissingValue,
    PipelineStep,
    file_of,
    look_up,
    parse_condition,
    path_of,
    source_of,
)
from store.pipelines.pipelines import Advance, Failure, NewChild, ReadyRun
from store.pipelines.runs import PipelineRun, Place, StepOutcome
from store.requests import NewRequest, RequestRecord
from store.states import EXPIRED, RequestState
from store.store import Store

log = logging.getLogger(__name__)

#: Runs that are looked at together, each with all of its steps.
_RUNS_AT_ONCE = 10


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """A step that can begin for one item."""

    step: PipelineStep
    position: int
    #: By name; a value that is not stored yet is JSON.
    inputs: Mapping[str, StoredFile | Any]
    params: Mapping[str, Any]


@dataclass(kw_only=True)
class NextSteps:
    """What follows from the answers that there are."""

    steps: list[PlannedStep] = field(default_factory=list)
    outcomes: list[StepOutcome] = field(default_factory=list)
    #: True if every step has ended.
    is_finished: bool = True


def plan(parent: RequestRecord, run: PipelineRun) -> NextSteps:
    """Find the steps that can begin now, and those that never will."""
    found = NextSteps()
    outcomes = dict(run.outcomes)

    def add(step: PipelineStep, position: int, status: str, code: str, reason: str) -> None:
        outcome = StepOutcome(step=step.name, position=position, status=status, code=code, reason=reason)
        outcomes[step.name, position] = outcome
        found.outcomes.append(outcome)

    # Each step comes after those that it needs.
    for step in run.pipeline.steps:
        if step.for_each is None:
            items: list[Any] = [None]
        else:
            source = run.children.get((source_of(step.for_each), 0))
            ended = outcomes.get((source_of(step.for_each), 0))
            if ended is not None or (source is not None and source.state.is_final and not _is_done(source)):
                if (step.name, 0) not in outcomes:
                    add(step, 0, "skipped", "not_reached", _why_not(source_of(step.for_each), source, ended))
                continue
            if source is None or not _is_done(source):
                found.is_finished = False
                continue
            try:
                items = _items(look_up(source.output, step.for_each), step)
            except MissingValue as error:
                if (step.name, 0) not in outcomes:
                    add(step, 0, "failed", error.code, error.reason)
                continue
            if len(items) > MAX_ITEMS and (step.name, MAX_ITEMS) not in outcomes:
                reason = f"{step.for_each} has {len(items)} items; the first {MAX_ITEMS} are used."
                add(step, MAX_ITEMS, "skipped", "too_many_items", reason)
        for position, item in enumerate(items[:MAX_ITEMS]):
            child = run.children.get((step.name, position))
            if child is not None:
                found.is_finished = found.is_finished and child.state.is_final
                continue
            if (step.name, position) in outcomes:
                continue
            try:
                planned = _plan_step(step, position, item, parent, run, outcomes)
            except _NotReached as stopped:
                add(step, position, "skipped", stopped.code, stopped.reason)
            except MlgError as error:
                add(step, position, "failed", error.code, error.reason)
            else:
                found.is_finished = False
                found.steps += [] if planned is None else [planned]
    return found


class _NotReached(MlgError):
    """A step is not needed, or another one has no answer."""

    code = "not_reached"


class _ConditionFalse(_NotReached):
    code = "condition_false"


def _is_done(request: RequestRecord) -> bool:
    return request.state is RequestState.DONE


def _why_not(name: str, child: RequestRecord | None, outcome: StepOutcome | None) -> str:
    status = outcome.status if outcome is not None else child.status if child is not None else "missing"
    return f"The step {name} has no answer: it was {status}." if status != "failed" else f"The step {name} failed."


def _items(found: Any, step: PipelineStep) -> list[Any]:
    if not isinstance(found, list):
        raise MissingValue(f"{step.for_each} is no list.")
    return found


def _plan_step(
    step: PipelineStep,
    position: int,
    item: Any,
    parent: RequestRecord,
    run: PipelineRun,
    outcomes: Mapping[Place, StepOutcome],
) -> PlannedStep | None:
    """Plan a step for one item. :return: None if it must wait. :raises _NotReached: :raises MlgError: it fails."""
    lists = {one.name: one.for_each for one in run.pipeline.steps}
    needed: dict[str, RequestRecord] = {}
    for name in sorted(step.needed()):
        place = (name, position if lists[name] is not None else 0)
        child, outcome = run.children.get(place), outcomes.get(place)
        if outcome is not None or (child is not None and child.state.is_final and not _is_done(child)):
            raise _NotReached(_why_not(name, child, outcome))
        if child is None or not _is_done(child):
            return None
        needed[name] = child

    def value_of(reference: str) -> Any:
        source = source_of(reference)
        return look_up(item if source == EACH else needed[source].output, reference)

    for text in step.when:
        condition = parse_condition(text)
        if not condition.is_true(value_of(condition.reference)):
            raise _ConditionFalse(f"Its condition is not true: {text}")
    service = load_service(step.service)
    raw = {**step.params, **{name: value_of(reference) for name, reference in step.references.items()}}
    stored = tuple(param for param in service.params if not param.is_read_time)
    inputs: dict[str, Any] = {}
    for name, reference in step.inputs.items():
        source = source_of(reference)
        if source == REQUEST:
            given = _input_of(parent, run, path_of(reference)[0])
            if given is not None:
                inputs[name] = given
            elif not service.inputs[name].is_optional:
                raise MissingValue(f"The request has no input {path_of(reference)[0]}.")
            continue
        made_by = needed.get(source)
        file = None if made_by is None else file_of(reference, load_service(made_by.service))
        if made_by is None or file is None:
            inputs[name] = value_of(reference)
        elif file in made_by.files:
            inputs[name] = made_by.files[file]
        elif not service.inputs[name].is_optional:
            raise MissingValue(f"The answer has no file {reference}.")
    return PlannedStep(step=step, position=position, inputs=inputs, params=check_params(stored, raw))


def _input_of(parent: RequestRecord, run: PipelineRun, name: str) -> StoredFile | None:
    if name == next(iter(run.pipeline.inputs())):
        # Its media type is that of the service's input, which nothing reads.
        return StoredFile(sha256=parent.image_sha256, size_bytes=parent.image_bytes, media_type="")
    return parent.inputs.get(name)


class PipelineRunner:
    """Lets runs go on, see the module.

    :param models: the models folder.
    """

    def __init__(
        self,
        store: Store,
        models: Path,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        self._store = store
        self._models = models
        self._clock = clock

    def run_ready(self) -> int:
        """Do what there is to do for some runs. :return: how many. :raises StoreError:"""
        now = self._clock()
        ready = self._store.pipelines.list_ready(now=now, limit=_RUNS_AT_ONCE)
        self._store.requests.settle_children([one.id for one in ready if one.is_ended], now=now)
        for one in ready:
            if one.is_retried and not one.is_ended:
                self._store.requests.retry_children(one.id, now=now)
        self._advance([one for one in ready if not one.is_ended and not one.is_retried], now)
        return len(ready)

    def _advance(self, ready: Sequence[ReadyRun], now: datetime) -> None:
        advances = []
        staged: list[StagedImage] = []
        try:
            for one in ready:
                with contextlib.suppress(UnknownRequest):  # deleted meanwhile, which makes its run ready again
                    advances.append(self._prepare(self._store.requests.get(one.id), now, staged))
            try:
                self._store.pipelines.advance(advances, now=now)
            except StoreError:
                raise
            except Exception:
                # One of them must not stop the others.
                log.exception("cannot let some pipelines go on, trying them one by one")
                self._advance_alone([advance.parent.id for advance in advances], now, staged)
        finally:
            for each in staged:
                self._store.images.discard(each)

    def _advance_alone(self, ids: Sequence[str], now: datetime, staged: list[StagedImage]) -> None:
        for id in ids:
            with contextlib.suppress(UnknownRequest):  # likewise
                # Again: inputs that were published are gone with the commit that failed.
                advance = self._prepare(self._store.requests.get(id), now, staged)
                try:
                    self._store.pipelines.advance([advance], now=now)
                except StoreError:
                    raise
                except Exception as error:
                    log.exception("a pipeline cannot go on", extra={"request": id})
                    self._store.pipelines.advance([_failed(advance.parent, advance.run, error)], now=now)

    def _prepare(self, parent: RequestRecord, now: datetime, staged: list[StagedImage]) -> Advance:
        """Plan what follows for a run, and store the inputs that are not files yet. :param staged: gets these."""
        run = parent.run
        assert run is not None
        try:
            planned = plan(parent, run)
            new: list[NewChild] = []
            goes_on = False
            is_late = parent.deadline_at is not None and parent.deadline_at <= now
            # One that has no answer expires as a whole.
            begins_none = is_late and any(_is_done(child) for child in run.children.values())
            for one in planned.steps:
                if begins_none:
                    goes_on = True
                    reason = "The deadline of the request passed before it began."
                    planned.outcomes.append(
                        StepOutcome(
                            step=one.step.name, position=one.position, status="skipped", code=EXPIRED, reason=reason
                        )
                    )
                    continue
                try:
                    new.append(self._make_child(one, parent, now, staged))
                except StoreError:
                    raise
                except MlgError as error:
                    goes_on = True
                    planned.outcomes.append(
                        StepOutcome(
                            step=one.step.name,
                            position=one.position,
                            status="failed",
                            code=error.code,
                            reason=error.reason,
                        )
                    )
        except StoreError:
            raise
        except Exception as error:
            # Of an answer or a pipeline that was not expected. It must not stop the others.
            log.exception("a pipeline cannot go on", extra={"request": parent.id})
            return _failed(parent, run, error)
        is_finished = planned.is_finished
        return Advance(
            parent=parent,
            run=run,
            new=new,
            outcomes=planned.outcomes,
            goes_on=goes_on,
            is_finished=is_finished,
            failure=_failure(run, planned.outcomes) if is_finished else None,
        )

    def _make_child(
        self, planned: PlannedStep, parent: RequestRecord, now: datetime, staged: list[StagedImage]
    ) -> NewChild:
        """Build the request of a step. :raises MlgError: it cannot be made."""
        step = planned.step
        service = load_service(step.service)
        collection = None if step.collection is None else self._find_collection(step, parent, now)
        inputs: dict[str, StoredFile] = {}
        own: list[StagedImage] = []
        for name, one in service.inputs.items():
            value = planned.inputs.get(name)
            if isinstance(value, StoredFile):
                inputs[name] = value
            elif name in planned.inputs:
                data, media_type = _to_bytes(value, one.kind, name)
                if len(data) > one.max_bytes:
                    raise MissingValue(f"The input {name} may have at most {one.max_bytes} bytes.")
                own.append(replace(self._store.images.stage(data), media_type=media_type))
                staged.append(own[-1])
                inputs[name] = StoredFile(sha256=own[-1].sha256, size_bytes=own[-1].size, media_type=media_type)
            if name in inputs and not inputs[name].size_bytes:
                raise MissingValue(f"The input {name} is empty.")
        return NewChild(
            new=NewRequest(
                id=new_id(),
                service=step.service,
                model=step.model,
                params=planned.params,
                name=parent.name,
                # Its labels become those of the member.
                labels={} if collection is None else parent.labels,
                key_id=parent.key_id,
                created_at=now,
                deadline_at=parent.deadline_at,
                digest=installed_digest(self._models, step.model),
                parent=parent.id,
                step=step.name,
                position=planned.position,
                collection=collection,
            ),
            inputs=inputs,
            staged=own,
        )

    def _find_collection(self, step: PipelineStep, parent: RequestRecord, now: datetime) -> int:
        """Return the number of the collection of the request's key, which is created if there is none."""
        name, key_id = str(step.collection), parent.key_id
        collections = self._store.collections
        try:
            found = collections.find(name, key_id=key_id)
        except UnknownRequest:
            new = CollectionRecord(id=new_id(), name=name, key_id=key_id, model=step.model, created_at=now)
            try:
                found = collections.add(new)
            except CollectionExists:
                found = collections.find(name, key_id=key_id)
        if found.model != step.model:
            raise LimitReached(f"The collection {name} has vectors of the model {found.model}, not of {step.model}.")
        collections.check_room(found, 1)
        return found.number


def _to_bytes(value: Any, kind: str, name: str) -> tuple[bytes, str]:
    """Turn a value of an answer into an input. :return: bytes, media type. :raises MlgError: it is of another kind."""
    if kind == "text" and isinstance(value, str | int | float):
        return parse_text(str(value).encode()).encode(), "text/plain"
    if kind == "row" and isinstance(value, dict):
        return format_row(parse_row(json.dumps(value).encode())), "application/json"
    raise MissingValue(f"The input {name} takes: {kind}. The value is of another kind.")


def _failure(run: PipelineRun, outcomes: Sequence[StepOutcome]) -> Failure | None:
    """Tell why a request fails as a whole: no step has an answer, and one of them failed."""
    if any(_is_done(child) for child in run.children.values()):
        return None
    for child in run.children.values():
        if child.state is RequestState.FAILED:
            return Failure(code=child.code or "failed", reason=f"Step {child.step}: {child.reason}")
    for outcome in (*run.outcomes.values(), *outcomes):
        if outcome.status == "failed":
            return Failure(code=outcome.code, reason=f"Step {outcome.step}: {outcome.reason}")
    if any(child.status == EXPIRED for child in run.children.values()):
        return Failure(code=EXPIRED, reason="Its deadline passed before a step had an answer.")
    return None


def _failed(parent: RequestRecord, run: PipelineRun, error: Exception) -> Advance:
    failure = Failure(code="pipeline_failed", reason=f"The pipeline cannot go on ({type(error).__name__}).")
    if isinstance(error, MlgError):
        failure = Failure(code=error.code, reason=error.reason)
    return Advance(parent=parent, run=run, is_finished=True, failure=failure)

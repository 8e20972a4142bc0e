"""Why a request waits, and how long it will: pure functions of the store's figures, with the clock as an argument.

Called by `server/context.py`. An estimate is computed from the live batchers, the requests ahead of this one and the
recent throughput of the model. `eta_seconds` is an estimate, not a guarantee.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from store.chunks import Throughput
from store.processes.batchers import BatcherRecord
from store.requests import ISOLATION_STEPS, ModelBacklog, RequestRecord
from store.states import RequestState

#: A batcher without a heartbeat for this long counts as gone.
ALIVE_SECONDS = 20.0
#: Assumed duration of a chunk before the model has been used.
ASSUMED_CHUNK_SECONDS = 5.0
#: Items of a full chunk.
FULL_CHUNK_ITEMS = ISOLATION_STEPS[0]


@dataclass(frozen=True, kw_only=True)
class EtaInputs:
    """What the estimates of all requests for one model have in common."""

    batchers: Sequence[BatcherRecord]
    #: Waiting and claimed requests, by model.
    backlog: Sequence[ModelBacklog]
    #: Recent throughput of the model; None if it has not been used.
    throughput: Throughput | None
    #: Why the model cannot be used, for example that it is not installed; None if it can.
    unavailable_reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class WaitEstimate:
    """Why a request waits, and for how long."""

    waiting_for: str
    #: Seconds from now until the result; None if unknown.
    eta_seconds: float | None
    #: Requests for the same model ahead of this one; None once it is claimed.
    ahead: int | None = None


def estimate(request: RequestRecord, inputs: EtaInputs, now: datetime) -> WaitEstimate | None:
    """Estimate why and how long a request waits. :return: None if it has ended."""
    if request.state.is_final:
        return None
    ahead = _requests_ahead(request, inputs) if request.state is RequestState.QUEUED else None
    reason = _blocking_notice(request.model, inputs)
    if ahead is not None and not inputs.batchers:
        reason = "Nothing is processed now: no batcher is running. Start one: mlg batch (or mlg up)."
    if ahead is not None and inputs.unavailable_reason is not None:
        reason = inputs.unavailable_reason
    if reason is not None:
        return WaitEstimate(waiting_for=reason, eta_seconds=None, ahead=ahead)
    if ahead is None:
        elapsed = _seconds(now - (request.claimed_at or now))
        why, eta = f"Processing started {format_duration(elapsed)} ago.", max(0.5, _chunk_seconds(inputs) - elapsed)
        if request.progress is not None and request.progress.fraction > 0:
            eta = elapsed * (1 / request.progress.fraction - 1)
    else:
        due_in, why = _seconds_until_due(request, inputs, ahead, now)
        eta = due_in + _seconds_of_work_ahead(request, inputs, ahead) + _chunk_seconds(inputs)
    return WaitEstimate(waiting_for=why, eta_seconds=round(eta, 1), ahead=ahead)


def _blocking_notice(model: str, inputs: EtaInputs) -> str | None:
    """Return the first batcher's reason not to process the model now; None if any batcher processes it."""
    notices = [batcher.notices.get(model) for batcher in inputs.batchers]
    return notices[0] if notices and None not in notices else None


def _seconds_until_due(request: RequestRecord, inputs: EtaInputs, ahead: int, now: datetime) -> tuple[float, str]:
    """Return the most seconds until a batcher claims the request, and the reason for the wait."""
    if request.reason is not None or request.attempts:
        reason = (request.reason or "no reason given").rstrip(".")
        # Without an attempt, nothing failed: the request was released, for example because no provider was found.
        was_attempted = bool(request.attempts or request.isolation)
        last = f"The last attempt failed ({reason})." if was_attempted else f"{reason}."
        due_in = _seconds(request.due_at - now)
        if due_in > 0:
            return due_in, f"{last} It will be retried in {format_duration(due_in)}."
        return 0.0, f"{last} It will be retried with the next chunk."
    before = f"{ahead} {'request is' if ahead == 1 else 'requests are'} ahead of it"
    own_backlog = _find_backlog(request.model, inputs)
    waiting = own_backlog.waiting if own_backlog else 1
    if ahead < waiting - waiting % FULL_CHUNK_ITEMS:
        # Full chunks are claimed at once, so only the work ahead of this request counts.
        return 0.0, f"{before}; all are due." if ahead else "It is next: the first free worker takes it."
    oldest_at = own_backlog.oldest_at if own_backlog and own_backlog.oldest_at else request.created_at
    due_in = min(_seconds_until_next_cycle(batcher, oldest_at, now) for batcher in inputs.batchers)
    others = f" {before}." if ahead else ""
    if due_in < 1:
        return due_in, f"It will be processed in a moment.{others}"
    return due_in, (
        f"It will be processed as soon as {FULL_CHUNK_ITEMS} images for {request.model} are waiting, "
        f"at the latest in {format_duration(due_in)}.{others}"
    )


def _seconds_until_next_cycle(batcher: BatcherRecord, oldest_at: datetime, now: datetime) -> float:
    """Return the seconds until this batcher claims everything: at its timer, or when the oldest request is due."""
    running = _seconds(now - batcher.started_at)
    timer = batcher.every_seconds - running % batcher.every_seconds
    remaining_wait = batcher.max_wait_seconds - _seconds(now - oldest_at)
    return max(0.0, min(timer, remaining_wait))


def _seconds_of_work_ahead(request: RequestRecord, inputs: EtaInputs, ahead: int) -> float:
    """Return the seconds of work that is done first: claimed requests and those ahead of it; models alternate."""
    capacity = max(1, sum(batcher.capacity for batcher in inputs.batchers))
    items = ahead
    for backlog in inputs.backlog:
        items += backlog.claimed
        if backlog.model != request.model:
            items += min(backlog.waiting, ahead + FULL_CHUNK_ITEMS)
    per_second = inputs.throughput.items_per_second if inputs.throughput else FULL_CHUNK_ITEMS / ASSUMED_CHUNK_SECONDS
    return items / max(1e-6, per_second * capacity)


def _requests_ahead(request: RequestRecord, inputs: EtaInputs) -> int:
    own_backlog = _find_backlog(request.model, inputs)
    if own_backlog is None or own_backlog.oldest_number is None:
        return 0
    # Numbers are common to all models, so the difference may be too large; limit it to the waiting requests.
    return max(0, min(request.number - own_backlog.oldest_number, own_backlog.waiting - 1))


def _find_backlog(model: str, inputs: EtaInputs) -> ModelBacklog | None:
    return next((backlog for backlog in inputs.backlog if backlog.model == model), None)


def _chunk_seconds(inputs: EtaInputs) -> float:
    return inputs.throughput.chunk_seconds if inputs.throughput else ASSUMED_CHUNK_SECONDS


def _seconds(length: timedelta) -> float:
    return max(0.0, length.total_seconds())


def format_duration(seconds: float) -> str:
    """Format a duration: 4 s, 5 min 12 s, 2 h 5 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min" if whole % 3600 >= 60 else f"{whole // 3600} h"

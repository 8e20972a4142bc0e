"""Why a request waits, and how long it will: pure functions of what the store tells, with the clock as an argument.

Called by `answers.py`. An estimate is made from the batchers that are alive, what waits before the request, and how
fast the model was answered lately. It is a promise to nobody: `eta_seconds` is what is likely, not what is certain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from store.chunks import BatcherRecord, ModelBacklog, Throughput
from store.records import ISOLATION_STEPS, RequestRecord, RequestState

#: A batcher that has said nothing for this long counts as gone.
ALIVE_SECONDS = 20.0
#: What a chunk is assumed to take while there is no experience with the model.
ASSUMED_CHUNK_SECONDS = 5.0
#: Items of a full chunk.
FULL_CHUNK_ITEMS = ISOLATION_STEPS[0]


@dataclass(frozen=True, kw_only=True)
class EtaInputs:
    """What everybody who waits for one model shares."""

    #: The batchers that are alive.
    batchers: Sequence[BatcherRecord]
    #: What waits and is worked on, by model.
    backlog: Sequence[ModelBacklog]
    #: How fast the model was answered lately.
    throughput: Throughput | None
    #: Why nobody can work on the model, for example that it is not installed; None if somebody can.
    unavailable_reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class WaitEstimate:
    """Why and how long."""

    #: A sentence for people.
    waiting_for: str
    #: Seconds from now; None when nobody knows.
    eta_seconds: float | None
    #: Requests of the same model before it; None once it is worked on.
    ahead: int | None = None


def estimate(request: RequestRecord, inputs: EtaInputs, now: datetime) -> WaitEstimate | None:
    """Say why the request waits and how long it will; None when it waits no more."""
    if request.state is RequestState.CLAIMED:
        notice = _blocking_notice(request.model, inputs)
        return (
            _estimate_claimed(request, inputs, now)
            if notice is None
            else WaitEstimate(waiting_for=notice, eta_seconds=None)
        )
    if request.state is not RequestState.QUEUED:
        return None
    ahead = _requests_ahead(request, inputs)
    if inputs.unavailable_reason is not None:
        return WaitEstimate(waiting_for=inputs.unavailable_reason, eta_seconds=None, ahead=ahead)
    if not inputs.batchers:
        return WaitEstimate(
            waiting_for="Nobody takes requests now: no batcher is running. Start one: mlg batch (or mlg up).",
            eta_seconds=None,
            ahead=ahead,
        )
    notice = _blocking_notice(request.model, inputs)
    if notice is not None:
        return WaitEstimate(waiting_for=notice, eta_seconds=None, ahead=ahead)
    due_in, why = _seconds_until_due(request, inputs, ahead, now)
    eta = due_in + _seconds_of_work_ahead(request, inputs, ahead) + _chunk_seconds(inputs)
    return WaitEstimate(waiting_for=why, eta_seconds=round(eta, 1), ahead=ahead)


def _blocking_notice(model: str, inputs: EtaInputs) -> str | None:
    """Return why no batcher takes any of the model now, in the words of the first; None when one of them does."""
    notices = [batcher.notices.get(model) for batcher in inputs.batchers]
    return notices[0] if notices and None not in notices else None


def _estimate_claimed(request: RequestRecord, inputs: EtaInputs, now: datetime) -> WaitEstimate:
    elapsed = _seconds(now - (request.claimed_at or now))
    eta = max(0.5, _chunk_seconds(inputs) - elapsed)
    return WaitEstimate(
        waiting_for=f"It is being worked on since {format_duration(elapsed)}.", eta_seconds=round(eta, 1)
    )


def _seconds_until_due(request: RequestRecord, inputs: EtaInputs, ahead: int, now: datetime) -> tuple[float, str]:
    """Tell in how many seconds a batcher will take the request at the latest, and why not at once."""
    if request.reason is not None or request.attempts:
        reason = (request.reason or "no reason given").rstrip(".")
        # Neither its own fault nor its chunk's: nothing was attempted, so nothing failed.
        is_nobodys_fault = not request.attempts and not request.isolation
        last = f"{reason}." if is_nobodys_fault else f"The last attempt failed ({reason})."
        due_in = _seconds(request.due_at - now)
        if due_in > 0:
            return due_in, f"{last} It is tried again in {format_duration(due_in)}."
        return 0.0, f"{last} It is tried again with the next batch."
    before = f"{ahead} {'request is' if ahead == 1 else 'requests are'} ahead of it"
    own_backlog = _find_backlog(request.model, inputs)
    waiting = own_backlog.waiting if own_backlog else 1
    if ahead < waiting - waiting % FULL_CHUNK_ITEMS:
        # Full chunks are taken at once, so only the work before this one counts.
        return 0.0, f"{before}; all are due." if ahead else "It is next: the first free worker takes it."
    oldest_at = own_backlog.oldest_at if own_backlog and own_backlog.oldest_at else request.created_at
    due_in = min(_seconds_until_next_cycle(batcher, oldest_at, now) for batcher in inputs.batchers)
    others = f" {before}." if ahead else ""
    if due_in < 1:
        return due_in, f"It goes out with the next batch, in a moment.{others}"
    return due_in, (
        f"It waits for the next batch: as soon as {FULL_CHUNK_ITEMS} pictures for {request.model} are together, "
        f"at the latest in {format_duration(due_in)}.{others}"
    )


def _seconds_until_next_cycle(batcher: BatcherRecord, oldest_at: datetime, now: datetime) -> float:
    """Seconds until this batcher takes everything: its timer, or the oldest request's longest wait."""
    running = _seconds(now - batcher.started_at)
    timer = batcher.every_seconds - running % batcher.every_seconds
    remaining_wait = batcher.max_wait_seconds - _seconds(now - oldest_at)
    return max(0.0, min(timer, remaining_wait))


def _seconds_of_work_ahead(request: RequestRecord, inputs: EtaInputs, ahead: int) -> float:
    """Seconds of work that is done first: what is under way, and what waits before it, models taking turns."""
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
    # Numbers are shared by all models, so the difference may be too large; never more than those that wait.
    return max(0, min(request.number - own_backlog.oldest_number, own_backlog.waiting - 1))


def _find_backlog(model: str, inputs: EtaInputs) -> ModelBacklog | None:
    return next((backlog for backlog in inputs.backlog if backlog.model == model), None)


def _chunk_seconds(inputs: EtaInputs) -> float:
    return inputs.throughput.chunk_seconds if inputs.throughput else ASSUMED_CHUNK_SECONDS


def _seconds(length: timedelta) -> float:
    return max(0.0, length.total_seconds())


def format_duration(seconds: float) -> str:
    """Write a length of time for people: 4 s, 5 min 12 s, 2 h 5 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min" if whole % 3600 >= 60 else f"{whole // 3600} h"

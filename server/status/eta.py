"""Why a request waits, and how long it will: pure functions of what the store tells, with the clock as an argument.

Called by `answers.py`. An estimate is made from the batchers that are alive, what waits before the request, and how
fast the model was answered lately. It is a promise to nobody: `eta_seconds` is what is likely, not what is certain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from store.chunks import Backlog, BatcherRecord, Pace
from store.records import ISOLATION_STEPS, Request, State

#: A batcher that has said nothing for this long counts as gone.
ALIVE_SECONDS = 20.0
#: What a chunk is assumed to take while there is no experience with the model.
ASSUMED_CHUNK_SECONDS = 5.0
#: Items of a full chunk.
FULL_CHUNK = ISOLATION_STEPS[0]


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What everybody who waits for one model shares."""

    #: The batchers that are alive.
    batchers: Sequence[BatcherRecord]
    #: What waits and is worked on, by model.
    backlog: Sequence[Backlog]
    #: How fast the model was answered lately.
    pace: Pace | None
    #: Why nobody can work on the model, for example that it is not installed; None if somebody can.
    obstacle: str | None = None


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Why and how long."""

    #: A sentence for people.
    waiting_for: str
    #: Seconds from now; None when nobody knows.
    eta_seconds: float | None
    #: Requests of the same model before it; None once it is worked on.
    ahead: int | None = None


def estimate(request: Request, outlook: Outlook, now: datetime) -> Wait | None:
    """Say why the request waits and how long it will; None when it waits no more."""
    if request.state is State.CLAIMED:
        notice = _notice(request.model, outlook)
        return _under_way(request, outlook, now) if notice is None else Wait(waiting_for=notice, eta_seconds=None)
    if request.state is not State.QUEUED:
        return None
    ahead = _ahead(request, outlook)
    if outlook.obstacle is not None:
        return Wait(waiting_for=outlook.obstacle, eta_seconds=None, ahead=ahead)
    if not outlook.batchers:
        return Wait(
            waiting_for="Nobody takes requests now: no batcher is running. Start one: mlg batch (or mlg up).",
            eta_seconds=None,
            ahead=ahead,
        )
    notice = _notice(request.model, outlook)
    if notice is not None:
        return Wait(waiting_for=notice, eta_seconds=None, ahead=ahead)
    due_in, why = _until_due(request, outlook, ahead, now)
    eta = due_in + _work_before(request, outlook, ahead) + _chunk_seconds(outlook)
    return Wait(waiting_for=why, eta_seconds=round(eta, 1), ahead=ahead)


def _notice(model: str, outlook: Outlook) -> str | None:
    """Return why no batcher takes any of the model now, in the words of the first; None when one of them does."""
    notices = [batcher.notices.get(model) for batcher in outlook.batchers]
    return notices[0] if notices and None not in notices else None


def _under_way(request: Request, outlook: Outlook, now: datetime) -> Wait:
    elapsed = _seconds(now - (request.claimed_at or now))
    eta = max(0.5, _chunk_seconds(outlook) - elapsed)
    return Wait(waiting_for=f"It is being worked on since {duration(elapsed)}.", eta_seconds=round(eta, 1))


def _until_due(request: Request, outlook: Outlook, ahead: int, now: datetime) -> tuple[float, str]:
    """Tell in how many seconds a batcher will take the request at the latest, and why not at once."""
    if request.reason is not None or request.attempts:
        reason = (request.reason or "no reason given").rstrip(".")
        # Neither its own fault nor its chunk's: nothing was attempted, so nothing failed.
        is_nobodys_fault = not request.attempts and not request.isolation
        last = f"{reason}." if is_nobodys_fault else f"The last attempt failed ({reason})."
        due_in = _seconds(request.due_at - now)
        if due_in > 0:
            return due_in, f"{last} It is tried again in {duration(due_in)}."
        return 0.0, f"{last} It is tried again with the next batch."
    before = f"{ahead} {'request is' if ahead == 1 else 'requests are'} ahead of it"
    mine = _backlog_of(request.model, outlook)
    waiting = mine.waiting if mine else 1
    if ahead < waiting - waiting % FULL_CHUNK:
        # Full chunks are taken at once, so only the work before this one counts.
        return 0.0, f"{before}; all are due." if ahead else "It is next: the first free worker takes it."
    oldest_at = mine.oldest_at if mine and mine.oldest_at else request.created_at
    due_in = min(_round_in(batcher, oldest_at, now) for batcher in outlook.batchers)
    others = f" {before}." if ahead else ""
    if due_in < 1:
        return due_in, f"It goes out with the next batch, in a moment.{others}"
    return due_in, (
        f"It waits for the next batch: as soon as {FULL_CHUNK} pictures for {request.model} are together, "
        f"at the latest in {duration(due_in)}.{others}"
    )


def _round_in(batcher: BatcherRecord, oldest_at: datetime, now: datetime) -> float:
    """Seconds until this batcher takes everything: its timer, or the oldest request's longest wait."""
    running = _seconds(now - batcher.started_at)
    timer = batcher.every_seconds - running % batcher.every_seconds
    patience = batcher.max_wait_seconds - _seconds(now - oldest_at)
    return max(0.0, min(timer, patience))


def _work_before(request: Request, outlook: Outlook, ahead: int) -> float:
    """Seconds of work that is done first: what is under way, and what waits before it, models taking turns."""
    capacity = max(1, sum(batcher.capacity for batcher in outlook.batchers))
    items = ahead
    for backlog in outlook.backlog:
        items += backlog.claimed
        if backlog.model != request.model:
            items += min(backlog.waiting, ahead + FULL_CHUNK)
    per_second = outlook.pace.items_per_second if outlook.pace else FULL_CHUNK / ASSUMED_CHUNK_SECONDS
    return items / max(1e-6, per_second * capacity)


def _ahead(request: Request, outlook: Outlook) -> int:
    mine = _backlog_of(request.model, outlook)
    if mine is None or mine.oldest_number is None:
        return 0
    # Numbers are shared by all models, so the difference may be too large; never more than those that wait.
    return max(0, min(request.number - mine.oldest_number, mine.waiting - 1))


def _backlog_of(model: str, outlook: Outlook) -> Backlog | None:
    return next((backlog for backlog in outlook.backlog if backlog.model == model), None)


def _chunk_seconds(outlook: Outlook) -> float:
    return outlook.pace.chunk_seconds if outlook.pace else ASSUMED_CHUNK_SECONDS


def _seconds(length: timedelta) -> float:
    return max(0.0, length.total_seconds())


def duration(seconds: float) -> str:
    """Write a length of time for people: 4 s, 5 min 12 s, 2 h 5 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min" if whole % 3600 >= 60 else f"{whole // 3600} h"

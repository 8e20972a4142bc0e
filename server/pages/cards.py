"""How a request looks on a page: the card in a gallery, and the steps of its life.

Made by the views of the pages from the store's records; pure, the clock is not asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from provider_image.services import load_service
from server.status.eta import format_duration
from store.records import RequestRecord, RequestState

#: Bars of an answer on a page.
TOP_CLASSES = 5


@dataclass(frozen=True, kw_only=True)
class Card:
    """A request in a gallery."""

    #: The request's id.
    id: str
    #: The client's file name.
    name: str | None
    #: The model's canonical name.
    model: str
    #: The state's word; "expired" for what was cancelled because its time was over.
    status: str
    #: The likeliest class: id, name, probability; None without an answer of that kind.
    best: tuple[str, str, float] | None
    #: Why it failed.
    reason: str | None
    #: False when retention has removed the picture.
    has_image: bool
    #: When it came in.
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class Step:
    """One moment in a request's life."""

    #: What happened.
    title: str
    #: When; None for what is still to come.
    at: datetime | None = None
    #: More about it.
    text: str = ""
    #: done, open or bad: how it is drawn.
    kind: str = "done"


def card(request: RequestRecord) -> Card:
    """Make a request's card."""
    best = top_classes(request, 1)
    return Card(
        id=request.id,
        name=request.name,
        model=request.model,
        status=request.status,
        best=best[0] if best else None,
        reason=request.reason if request.state is RequestState.FAILED else None,
        has_image=request.image_deleted_at is None,
        created_at=request.created_at,
    )


def top_classes(request: RequestRecord, top: int = TOP_CLASSES) -> list[tuple[str, str, float]]:
    """Return the likeliest classes of an answer; none when there is no answer, or one of another kind."""
    if request.state is not RequestState.DONE or request.service != "classification":
        return []
    payload = load_service(request.service).view(request.output, {**request.params, "top": top})
    return [(str(row[0]), str(row[1]), float(row[2])) for row in payload]


def timeline(request: RequestRecord, payload: Mapping[str, Any]) -> Sequence[Step]:
    """Tell a request's life. :param payload: its JSON, which says why it waits."""
    steps = [Step(title="Received", at=request.created_at)]
    if request.is_cached:
        steps.append(
            Step(
                title="Answered at once",
                at=request.finished_at,
                text="The same picture was answered by the same model before.",
            )
        )
        return steps
    steps.append(Step(title="Queued", at=request.created_at, text=_attempts(request)))
    if request.claimed_at is not None and request.state is not RequestState.QUEUED:
        who = f"to {request.provider}" if request.provider else ""
        steps.append(Step(title="Dispatched", at=request.claimed_at, text=who))
    if request.state is RequestState.QUEUED:
        steps.append(Step(title="Waiting", text=str(payload.get("waiting_for", "")), kind="open"))
    elif request.state is RequestState.CLAIMED:
        steps.append(Step(title="In work", text=str(payload.get("waiting_for", "")), kind="open"))
    elif request.finished_at is not None:
        steps.append(_end(request, request.finished_at))
    return steps


def _end(request: RequestRecord, at: datetime) -> Step:
    seconds = (at - request.created_at).total_seconds()
    took = f"{format_duration(seconds) if seconds >= 10 else f'{seconds:.2g} s'} after it came in"
    if request.state is RequestState.DONE:
        model = "" if request.seconds is None else f"; the model worked {request.seconds * 1000:.0f} ms on it"
        return Step(title="Answered", at=at, text=f"{took}{model}")
    titles = {"failed": "Failed", "expired": "Expired"}
    kind = "bad" if request.state is RequestState.FAILED else "open"
    return Step(title=titles.get(request.status, "Cancelled"), at=at, text=request.reason or "", kind=kind)


def _attempts(request: RequestRecord) -> str:
    if not request.attempts or request.state is RequestState.FAILED:
        return ""
    times = "once" if request.attempts == 1 else f"{request.attempts} times"
    return f"It was tried {times} before."

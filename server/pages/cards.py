"""What the pages show of a request: its most likely classes, its history.

Called by the page views. Pure functions of the store's records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from provider_image.services import load_service
from server.status.eta import format_duration
from store.requests import RequestRecord
from store.states import RequestState

#: The states of a request with their labels, in the order of the filter.
STATE_LABELS = {
    "queued": "waiting",
    "claimed": "processing",
    "done": "done",
    "failed": "failed",
    "cancelled": "cancelled",
    "expired": "expired",
}
#: Classes that the page of a request shows.
TOP_CLASSES = 5


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step in the history of a request."""

    title: str
    #: When it happened; None for the present step of an unfinished request.
    at: datetime | None = None
    text: str = ""
    #: done, open or bad; the CSS class.
    kind: str = "done"


#: Services whose answers have labels.
_WITH_LABELS = ("classification", "table", "text")


def best_class(request: RequestRecord) -> tuple[str, str, float] | None:
    """Return the most likely class of a result: id, name, probability; None without labels."""
    return next(iter(top_classes(request, 1)), None)


def top_classes(request: RequestRecord, top: int = TOP_CLASSES) -> list[tuple[str, str, float]]:
    """Return the most likely classes of a result: id, name, probability; none without labels."""
    if request.state is not RequestState.DONE or request.service not in _WITH_LABELS:
        return []
    payload = load_service(request.service).view(request.output, {**request.params, "top": top})
    rows = payload.get("labels", []) if isinstance(payload, Mapping) else payload
    # A row of a table's or a text's answer has no id.
    return [(str(row[0]), str(row[-2]), float(row[-1])) for row in rows]


def number_of(request: RequestRecord) -> float | None:
    """Return the number of a regression; None without one."""
    value = request.output.get("value") if isinstance(request.output, Mapping) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if request.state is RequestState.DONE and is_number else None


def deciding_words(request: RequestRecord) -> list[tuple[str, float]]:
    """Return the words that decided the answer for a text, and what each adds to it; strongest first."""
    if request.state is not RequestState.DONE or request.service != "text":
        return []
    return [(str(word), float(number)) for word, number in request.output["words"]]


def timeline(request: RequestRecord, payload: Mapping[str, Any]) -> Sequence[Step]:
    """List the steps of a request's history. :param payload: its JSON, which has the reason why it waits."""
    steps = [Step(title="Received", at=request.created_at)]
    if request.is_cached:
        text = "The same model has answered for the same input before."
        return [*steps, Step(title="Answered from an earlier result", at=request.finished_at, text=text)]
    steps.append(Step(title="Queued", at=request.created_at, text=_attempts(request)))
    if request.claimed_at is not None and request.state is not RequestState.QUEUED:
        worker = f"to {request.provider}" if request.provider else ""
        steps.append(Step(title="Dispatched", at=request.claimed_at, text=worker))
    if not request.state.is_final:
        title = "Waiting" if request.state is RequestState.QUEUED else "Processing"
        steps.append(Step(title=title, text=str(payload.get("waiting_for", "")), kind="open"))
    elif request.finished_at is not None:
        steps.append(_end(request, request.finished_at))
    return steps


def _end(request: RequestRecord, at: datetime) -> Step:
    seconds = (at - request.created_at).total_seconds()
    duration = format_duration(seconds) if seconds >= 10 else f"{seconds:.2g} s"
    if request.state is RequestState.DONE:
        model = "" if request.seconds is None else f", of which {request.seconds * 1000:.0f} ms in the model"
        return Step(title="Answered", at=at, text=f"{duration} after it was received{model}")
    titles = {"failed": "Failed", "expired": "Expired"}
    kind = "bad" if request.state is RequestState.FAILED else "open"
    return Step(title=titles.get(request.status, "Cancelled"), at=at, text=request.reason or "", kind=kind)


def _attempts(request: RequestRecord) -> str:
    if not request.attempts or request.state is RequestState.FAILED:
        return ""
    times = "once" if request.attempts == 1 else f"{request.attempts} times"
    return f"Attempted {times} before."

"""What the calls return: requests, batches and models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlg_client.errors import Refused

#: The file of a result that is the image which answers the request.
IMAGE_ANSWER = "image"
#: Statuses that do not change any more, unless the request is retried.
FINAL = frozenset({"done", "failed", "cancelled", "expired"})


@dataclass(frozen=True, kw_only=True)
class Request:
    """An image that a server has accepted, in the state that the server last reported."""

    #: Identifies the request on the server.
    id: str
    #: queued, claimed, done, failed, cancelled or expired.
    status: str
    #: Name of the model in the catalogue.
    model: str
    #: File name.
    name: str | None = None
    #: The JSON of the result; of a classification rows of [wnid, label, probability], most probable first. None while
    #: there is no result.
    preds: Any = None
    #: Media type of each file that the result has beside it, by name; see `Client.file`.
    files: Mapping[str, str] = field(default_factory=dict)
    #: Whether the result was reused from an earlier request with the same image.
    is_cached: bool = False
    #: Of a pipeline: the answer of each step as far as it is, or a list with one for each item.
    steps: Mapping[str, Any] = field(default_factory=dict)
    #: Why there is no result, for people and for programs.
    reason: str | None = None
    code: str | None = None
    #: Why it waits, and the estimated seconds until it is done.
    waiting_for: str | None = None
    eta_seconds: float | None = None
    #: The labels that were sent with it.
    labels: Mapping[str, str] = field(default_factory=dict)
    #: The server's response.
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_final(self) -> bool:
        """Tell whether the status does not change any more."""
        return self.status in FINAL

    @property
    def is_read(self) -> bool:
        """Tell whether the request is final and its result, if it has one, has been read."""
        return self.is_final and (self.status != "done" or self.preds is not None)

    @property
    def best(self) -> tuple[str, float] | None:
        """Return the most probable label and its probability; None while there is no result, or if it has no labels."""
        rows = self.preds.get("labels") if isinstance(self.preds, dict) else self.preds
        # Labels of a table's row or a text have no id.
        best = rows[0] if isinstance(rows, list) and rows else None
        return (str(best[-2]), float(best[-1])) if isinstance(best, list) and len(best) in (2, 3) else None

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> Request:
        """Create the record from a response of the server."""
        return cls(
            id=str(answer["req_id"]),
            status=str(answer.get("status") or ("done" if answer.get("preds") else "queued")),
            model=str(answer.get("model", "")),
            files={name: str(file["media_type"]) for name, file in (answer.get("files") or {}).items()},
            is_cached=bool(answer.get("cached", False)),
            labels=dict(answer.get("labels") or {}),
            steps=dict(answer.get("steps") or {}),
            raw=dict(answer),
            **{name: answer.get(name) for name in ("name", "preds", "reason", "code", "waiting_for", "eta_seconds")},
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images that were sent with one call. The server may have several batches for them, or none."""

    #: Ids of the batches on the server; empty if the images were sent one by one.
    ids: tuple[str, ...] = ()
    #: The requests, in the order of the files.
    requests: tuple[Request, ...] = ()
    #: (file name, why the server refused the image).
    refused: tuple[tuple[str, str], ...] = ()
    #: For each image, in order, its request or the error with which the server refused it.
    outcomes: tuple[Request | Refused, ...] = ()
    #: The server's response to each batch.
    raw: tuple[Mapping[str, Any], ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that the server knows."""

    #: The name to use in calls.
    name: str
    title: str
    #: Kind of work, such as classification.
    service: str
    #: Whether the server can run it.
    is_installed: bool
    #: The server's response.
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> Model:
        """Create the record from a response of the server."""
        return cls(
            name=str(answer["name"]),
            title=str(answer.get("title", answer["name"])),
            service=str(answer.get("service", "")),
            is_installed=bool(answer.get("installed") or answer.get("builds_on_first_use")),
            raw=dict(answer),
        )


def to_dataframe(results: Iterable[Request], *, top: int = 1) -> Any:
    """Create a pandas DataFrame with one row for each of the `top` most probable labels of each request.

    :raises ImportError: pandas is not installed; nothing else in mlg needs it.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_dataframe needs pandas. Install it: pip install pandas") from error
    rows = []
    for request in results:
        preds = request.preds if isinstance(request.preds, list) else None
        shared = {"req_id": request.id, "name": request.name, "model": request.model, "status": request.status}
        for rank, pred in enumerate((preds or [[None, None, None]])[:top], start=1):
            # Labels of a table's row have no id.
            label = dict(zip(("probability", "label", "wnid"), reversed(pred), strict=False))
            rows.append({**shared, "rank": rank if preds else None, **label, "reason": request.reason})
    return pandas.DataFrame(rows)

"""What the calls return: requests, batches and models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlg_client.errors import Refused

#: States in which nothing more happens by itself.
FINAL = frozenset({"done", "failed", "cancelled", "expired"})


@dataclass(frozen=True, kw_only=True)
class Request:
    """An image that a server accepted, as it stood when it was asked."""

    #: Reads the answer.
    id: str
    #: queued, claimed, done, failed, cancelled or expired.
    status: str
    #: The model's own name.
    model: str
    #: The file's name.
    name: str | None = None
    #: Rows of [wnid, label, probability], likeliest first; None while there is no answer.
    preds: list[list[Any]] | None = None
    #: Whether the answer is an earlier one.
    is_cached: bool = False
    #: Why there is no answer, for people and for programs.
    reason: str | None = None
    code: str | None = None
    #: Why it waits, and for how many seconds more.
    waiting_for: str | None = None
    eta_seconds: float | None = None
    #: The client's own words about it.
    labels: Mapping[str, str] = field(default_factory=dict)
    #: All that the server said.
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_final(self) -> bool:
        """Tell whether nothing more will happen by itself."""
        return self.status in FINAL

    @property
    def is_read(self) -> bool:
        """Tell whether all is known that will be."""
        return self.is_final and (self.status != "done" or self.preds is not None)

    @property
    def best(self) -> tuple[str, float] | None:
        """Return the likeliest label and its probability."""
        return None if not self.preds else (str(self.preds[0][1]), float(self.preds[0][2]))

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> Request:
        """Build the record from what a server says."""
        return cls(
            id=str(answer["req_id"]),
            status=str(answer.get("status") or ("done" if answer.get("preds") else "queued")),
            model=str(answer.get("model", "")),
            name=answer.get("name"),
            preds=answer.get("preds"),
            is_cached=bool(answer.get("cached", False)),
            reason=answer.get("reason"),
            code=answer.get("code"),
            waiting_for=answer.get("waiting_for"),
            eta_seconds=answer.get("eta_seconds"),
            labels=dict(answer.get("labels") or {}),
            raw=dict(answer),
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images that were sent together. The server may keep them as several batches of its own, or as none."""

    #: The server's own batches; empty if the images were sent one by one.
    ids: tuple[str, ...] = ()
    #: The requests, in the order of the files.
    requests: tuple[Request, ...] = ()
    #: (file's name, why the server did not take it).
    refused: tuple[tuple[str, str], ...] = ()
    #: For each image, in their order, its request or the error with which the server did not take it.
    outcomes: tuple[Request | Refused, ...] = ()
    #: All that the server said of each of its batches.
    raw: tuple[Mapping[str, Any], ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the server's catalogue."""

    #: The name to send images under.
    name: str
    title: str
    #: What kind of work it does.
    service: str
    #: Whether it answers there.
    is_installed: bool
    #: All that the server said.
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> Model:
        """Build the record from what a server says."""
        return cls(
            name=str(answer["name"]),
            title=str(answer.get("title", answer["name"])),
            service=str(answer.get("service", "")),
            is_installed=bool(answer.get("installed") or answer.get("builds_on_first_use")),
            raw=dict(answer),
        )


def to_dataframe(results: Iterable[Request], *, top: int = 1) -> Any:
    """Make a pandas DataFrame of requests: a row for each of the `top` likeliest labels of each.

    :raises ImportError: pandas is not installed; mlg does not need it otherwise.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_dataframe needs pandas. Install it: pip install pandas") from error
    rows = []
    for request in results:
        shared = {"req_id": request.id, "name": request.name, "model": request.model, "status": request.status}
        for rank, pred in enumerate((request.preds or [[None, None, None]])[:top], start=1):
            label = dict(zip(("wnid", "label", "probability"), pred, strict=False))
            rows.append({**shared, "rank": rank if request.preds else None, **label, "reason": request.reason})
    return pandas.DataFrame(rows)

"""The feed: every change of a request's state, in the order in which the changes were committed.

The listeners of a server process hear of it through `server/live/changes.py`. A change is written in the very
transaction that makes it, by the table itself, so whoever changes a state cannot forget it. Coming in as queued is no
change.

A request's position is (the number of its last change, its own number). Whoever has been told everything up to a
position and asks again later needs only the requests with a larger one: nothing is missed, and nothing is told twice.
Changes are kept for some hours. A request whose last change is older has the floor, the last number that was deleted,
in its place; who comes back with a position below the floor has to be told everything again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from store.records import RequestRecord, RequestState

#: Where a listener stands: (number of a change, number of a request).
Position = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ChangeRecord:
    """One change of a request's state."""

    #: Counts up in the order of the commits.
    seq: int
    #: The request's number.
    number: int
    #: The batch it came in with.
    batch_id: str | None
    #: The state it got.
    state: RequestState


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Where the requests that somebody listens to stand at one moment."""

    #: The last change that was made by then.
    latest: int
    #: The last change that is not kept any more.
    floor: int
    #: Position and state of each request, in the order of the positions.
    requests: tuple[tuple[Position, RequestState], ...]


class ChangeFeed(Protocol):
    """What has changed."""

    def latest_change(self) -> int:
        """Tell the number of the last change; 0 before the first."""

    def changes(self, after: int, *, limit: int = 1000) -> list[ChangeRecord]:
        """List the changes after that number, in order."""

    def count_changes(self, after: int) -> tuple[int, Mapping[RequestState, int]]:
        """Count the changes after that number by the state they led to. :return: the last change's number, and them."""

    def snapshot(self, *, ids: Collection[str] = (), batch_id: str | None = None) -> Snapshot:
        """Tell where the requests with these ids, or those of a batch, stand. Unknown ones are left out."""

    def read_changed(self, numbers: Collection[int]) -> list[tuple[Position, RequestRecord]]:
        """Read requests with their positions, in the order of these. Unknown ones are left out."""

    def purge_changes(self, *, before: datetime) -> int:
        """Delete the changes made before that time, save the last of all. :return: how many."""

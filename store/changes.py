"""The change feed: the table `changes`, every change of a request's state in the order of the commits.

Server processes read it through `server/live/changes.py`. `transition` writes a change in the transaction that makes
it. Being added as queued is no change.

A request's position is (number of its last change, its own number). A listener that has received everything up to a
position and asks again later needs only the requests with a higher one: nothing is missed and nothing is sent twice.
SQLite has one writer at a time for all processes, so the numbers in a committed transaction are all lower than those in
the next one.

Changes are kept for `retention.KEEP_CHANGES`. A request whose last change is older has the floor, the last number that
was deleted, in its place; a listener that comes back with a position below the floor has to receive everything again.
"""

from __future__ import annotations

import builtins
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from store.database import Database
from store.requests import RequestRecord, read_requests
from store.rows import to_text
from store.states import RequestState

#: Values in one IN list; SQLite's own limit is far higher.
MAX_IN_VALUES = 500
#: Changes that one commit deletes.
ROWS_PER_COMMIT = 2000

_LATEST = "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'changes'), 0)"

# Purging keeps the last change, so an empty table has never had one.
_FLOOR = "SELECT coalesce((SELECT min(seq) FROM changes), 1) - 1"

_CHANGES = "SELECT seq, number, batch_id, state FROM changes WHERE seq > ? ORDER BY seq LIMIT ?"

_COUNT = "SELECT state, count(*) FROM changes WHERE seq > ? GROUP BY state"

_LAST_CHANGE = "(SELECT max(seq) FROM changes WHERE changes.number = requests.number)"

_SNAPSHOT = f"SELECT coalesce({_LAST_CHANGE}, :floor), number, state FROM requests WHERE "

_PURGE = """
    DELETE FROM changes WHERE seq IN (
        SELECT seq FROM changes
        WHERE seq < (SELECT max(seq) FROM changes) ORDER BY seq LIMIT :rows_per_commit)
    AND at < :before
"""

#: How far a listener has read: (number of a change, number of a request).
Position = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ChangeRecord:
    """One change of a request's state."""

    #: Counts up in the order of the commits.
    seq: int
    #: The request's number.
    number: int
    #: The batch it belongs to.
    batch_id: str | None
    #: The new state.
    state: RequestState


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Positions and states of the requests that a listener watches, at one moment."""

    #: Number of the last change that was made by then.
    latest: int
    #: Number of the last change that is not kept any more.
    floor: int
    #: Position and state of each request, in the order of the positions.
    requests: tuple[tuple[Position, RequestState], ...]


class Changes:
    """The changes, and requests read with their positions."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def latest(self) -> int:
        """Return the number of the last change; 0 before the first."""
        return int(self._database.row(_LATEST)[0])

    def count(self, after: int) -> tuple[int, Mapping[RequestState, int]]:
        """Count the changes after a number by the new state.

        :return: (number of the last change, state -> count).
        """
        with self._database.snapshot() as connection:
            latest = int(connection.execute(_LATEST).fetchone()[0])
            rows = connection.execute(_COUNT, (after,)).fetchall()
        return latest, {RequestState(state): count for state, count in rows}

    def snapshot(self, *, ids: Collection[str] = (), batch_id: str | None = None) -> Snapshot:
        """Return positions and states of the requests with these ids and of a batch. Unknown ones are left out."""
        id_list = list(ids)
        rows: list[tuple[int, int, str]] = []
        with self._database.snapshot() as connection:
            latest = int(connection.execute(_LATEST).fetchone()[0])
            floor = int(connection.execute(_FLOOR).fetchone()[0])
            if batch_id is not None:
                sql = f"{_SNAPSHOT} batch_id = :batch_id"
                rows += connection.execute(sql, {"floor": floor, "batch_id": batch_id}).fetchall()
            for start in range(0, len(id_list), MAX_IN_VALUES):
                part = {f"i{place}": id for place, id in enumerate(id_list[start : start + MAX_IN_VALUES])}
                sql = f"{_SNAPSHOT} id IN ({', '.join(f':{name}' for name in part)})"
                rows += connection.execute(sql, {"floor": floor, **part}).fetchall()
        requests = sorted(((int(seq), int(number)), RequestState(state)) for seq, number, state in rows)
        return Snapshot(latest=latest, floor=floor, requests=tuple(requests))

    def read_changed(self, numbers: Collection[int]) -> list[tuple[Position, RequestRecord]]:
        """Read requests with their positions, in the order of the positions. Unknown ones are left out."""
        number_list = list(numbers)
        rows: list[Any] = []
        with self._database.snapshot() as connection:
            floor = int(connection.execute(_FLOOR).fetchone()[0])
            for start in range(0, len(number_list), MAX_IN_VALUES):
                part = number_list[start : start + MAX_IN_VALUES]
                sql = f"""
                    SELECT *, coalesce({_LAST_CHANGE}, ?) AS last_change FROM requests
                    WHERE number IN ({", ".join("?" * len(part))})
                """
                rows += connection.execute(sql, (floor, *part)).fetchall()
            rows.sort(key=lambda row: (row["last_change"], row["number"]))
            positions = [(row["last_change"], row["number"]) for row in rows]
            return list(zip(positions, read_requests(connection, rows), strict=True))

    def purge(self, *, before: datetime) -> int:
        """Delete the changes made before a time, except the last one of all. :return: how many."""
        return self._database.execute_in_steps(
            _PURGE, {"before": to_text(before)}, rows_per_commit=ROWS_PER_COMMIT, is_background=True
        )

    def list(self, after: int, *, limit: int = 1000) -> builtins.list[ChangeRecord]:
        """List the changes after a number, in order."""
        rows = self._database.rows(_CHANGES, (after, limit))
        return [
            ChangeRecord(seq=seq, number=number, batch_id=batch_id, state=RequestState(state))
            for seq, number, batch_id, state in rows
        ]

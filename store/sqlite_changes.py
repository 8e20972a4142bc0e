"""The feed on SQLite: the table `changes`, which triggers of the table `requests` fill.

A base of `SqliteStore`, which gives it the readers and the writer. SQLite has one writer at a time for all processes,
so the numbers that a committed transaction gave are all smaller than those of the next one, and who has read up to a
number has missed nothing below it.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime

from store.changes import ChangeRecord, Position, Snapshot
from store.database import ReaderPool, Writer
from store.records import RequestRecord, RequestState, to_text
from store.sqlite_costs import request_with_cost

#: Values in one IN list; SQLite's own limit is far above.
MAX_IN_VALUES = 500
#: Changes that one commit deletes.
ROWS_PER_COMMIT = 2000

_LATEST = "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'changes'), 0)"

# Deleting keeps the last change, so an empty table has never had any.
_FLOOR = "SELECT coalesce((SELECT min(seq) FROM changes), 1) - 1"

_CHANGES = "SELECT seq, number, batch_id, state FROM changes WHERE seq > ? ORDER BY seq LIMIT ?"

_COUNT = "SELECT state, count(*) FROM changes WHERE seq > ? GROUP BY state"

_LAST_CHANGE = "(SELECT max(seq) FROM changes WHERE changes.number = requests.number)"

_SNAPSHOT = f"SELECT coalesce({_LAST_CHANGE}, :floor), number, state FROM requests WHERE "

_PURGE = """
    DELETE FROM changes WHERE seq IN (
        SELECT seq FROM changes
        WHERE seq < (SELECT max(seq) FROM changes) ORDER BY seq LIMIT :step)
    AND at < :before
"""


def delete_changes(writer: Writer, *, before: datetime) -> int:
    """Delete the changes made before that time, save the last of all, in small commits. :return: how many."""
    values = {"before": to_text(before), "step": ROWS_PER_COMMIT}
    total = 0
    while True:
        deleted: int = writer.run(lambda transaction: transaction.execute(_PURGE, values).rowcount)
        total += deleted
        if deleted < ROWS_PER_COMMIT:
            return total


class SqliteChangeFeed:
    """What has changed."""

    _readers: ReaderPool
    _writer: Writer

    def latest_change(self) -> int:
        """See Feed.latest_change."""
        with self._readers.connection() as connection:
            return int(connection.execute(_LATEST).fetchone()[0])

    def changes(self, after: int, *, limit: int = 1000) -> list[ChangeRecord]:
        """See Feed.changes."""
        with self._readers.connection() as connection:
            rows = connection.execute(_CHANGES, (after, limit)).fetchall()
        return [
            ChangeRecord(seq=seq, number=number, batch_id=batch_id, state=RequestState(state))
            for seq, number, batch_id, state in rows
        ]

    def count_changes(self, after: int) -> tuple[int, Mapping[RequestState, int]]:
        """See Feed.count_changes."""
        with self._read_transaction() as connection:
            latest = int(connection.execute(_LATEST).fetchone()[0])
            rows = connection.execute(_COUNT, (after,)).fetchall()
        return latest, {RequestState(state): count for state, count in rows}

    def snapshot(self, *, ids: Collection[str] = (), batch_id: str | None = None) -> Snapshot:
        """See Feed.standing."""
        wanted = list(ids)
        rows: list[tuple[int, int, str]] = []
        with self._read_transaction() as connection:
            latest = int(connection.execute(_LATEST).fetchone()[0])
            floor = int(connection.execute(_FLOOR).fetchone()[0])
            if batch_id is not None:
                sql = f"{_SNAPSHOT} batch_id = :batch_id"
                rows += connection.execute(sql, {"floor": floor, "batch_id": batch_id}).fetchall()
            for start in range(0, len(wanted), MAX_IN_VALUES):
                part = {f"i{place}": id for place, id in enumerate(wanted[start : start + MAX_IN_VALUES])}
                sql = f"{_SNAPSHOT} id IN ({', '.join(f':{name}' for name in part)})"
                rows += connection.execute(sql, {"floor": floor, **part}).fetchall()
        requests = sorted(((int(seq), int(number)), RequestState(state)) for seq, number, state in rows)
        return Snapshot(latest=latest, floor=floor, requests=tuple(requests))

    def read_changed(self, numbers: Collection[int]) -> list[tuple[Position, RequestRecord]]:
        """See Feed.read_changed."""
        wanted = list(numbers)
        found: list[tuple[Position, RequestRecord]] = []
        with self._read_transaction() as connection:
            floor = int(connection.execute(_FLOOR).fetchone()[0])
            costs: dict[str, object] = {}
            for start in range(0, len(wanted), MAX_IN_VALUES):
                part = wanted[start : start + MAX_IN_VALUES]
                sql = f"""
                    SELECT *, coalesce({_LAST_CHANGE}, ?) AS last_change FROM requests
                    WHERE number IN ({", ".join("?" * len(part))})
                """
                for row in connection.execute(sql, (floor, *part)).fetchall():
                    found.append(((row["last_change"], row["number"]), request_with_cost(row, connection, costs)))
        return sorted(found, key=lambda pair: pair[0])

    def purge_changes(self, *, before: datetime) -> int:
        """See Feed.purge_changes."""
        return delete_changes(self._writer, before=before)

    @contextlib.contextmanager
    def _read_transaction(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection whose reads all see the same state."""
        with self._readers.connection() as connection:
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                connection.execute("ROLLBACK")

"""Batchers: the table `batchers`, those that are alive.

Each batcher writes its own row; the server and the commands read them.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from store.database import Database
from store.rows import from_row, insert_sql, to_row, to_text


@dataclass(frozen=True, kw_only=True)
class BatcherRecord:
    """A batcher that is alive: it sends a heartbeat every few seconds."""

    #: Random, one per process.
    id: str
    #: Host and process id.
    host: str
    pid: int
    #: Executor names, comma separated.
    executor: str
    #: Interval of the timer on which it claims everything that is queued.
    every_seconds: float
    #: A request is claimed after this long at the latest.
    max_wait_seconds: float
    #: Number of chunks that it runs at once.
    capacity: int
    started_at: datetime
    seen_at: datetime
    #: Model -> a sentence that explains why it claims none of it now.
    notices: Mapping[str, str] = field(default_factory=dict)
    #: "run", "day", "total" -> spending limit in GLM as decimal text; empty where nothing is paid.
    budget: Mapping[str, str] = field(default_factory=dict)


class Batchers:
    """The batchers that are alive."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def heartbeat(self, batcher: BatcherRecord) -> None:
        """Record that a batcher is alive; the first heartbeat registers it."""
        row = to_row(batcher)
        self._database.execute(f"INSERT OR REPLACE INTO {insert_sql('batchers', row)}", row)

    def deregister(self, batcher_id: str) -> None:
        """Remove a batcher that has ended."""
        self._database.execute("DELETE FROM batchers WHERE id = ?", (batcher_id,))

    def list(self, *, seen_since: datetime) -> builtins.list[BatcherRecord]:
        """List the batchers whose last heartbeat is not older."""
        rows = self._database.rows(
            "SELECT * FROM batchers WHERE seen_at >= ? ORDER BY started_at", (to_text(seen_since),)
        )
        return [from_row(BatcherRecord, row) for row in rows]

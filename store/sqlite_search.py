"""The list on SQLite. A base of `SqliteStore`, which gives it the writer, the readers and the pictures.

Each page is one statement: an inner one walks down one index, the best of those that what is asked for allows, over at
most so many requests; an outer one reads the rows and applies everything else. Weakness: what has no index of its own
beside others (a rare name, a rare pair of state and model) comes in short pages.
"""

from __future__ import annotations

import sqlite3
from datetime import datetime, timedelta
from typing import Any

from store.batches import EXPIRED
from store.chunks import ChunkRecord
from store.database import ReaderPool, Transaction, Writer
from store.errors import UnknownRequest
from store.images import ImageStore
from store.records import RequestState, to_text
from store.search import NotRemovable, Page, Query
from store.sqlite_chunks import chunk_from_row
from store.sqlite_costs import request_with_cost

#: Requests whose rows are looked at for one page, and names, which stand in an index by themselves.
MAX_ROWS_SCANNED = 5_000
MAX_NAMES_SCANNED = 30_000
#: Requests that come in at the same time may be numbered in another order than their times; never by as much as this.
MAX_ARRIVAL_SKEW_SECONDS = 120.0

_FIRST_SINCE = "SELECT number FROM requests WHERE created_at >= ? ORDER BY created_at LIMIT 1"

_IS_NEEDED = "SELECT EXISTS (SELECT 1 FROM requests WHERE image_sha256 = ? AND image_deleted_at IS NULL)"


class _SearchSql:
    """What is looked for, as SQL."""

    def __init__(self, query: Query, before: int | None, limit: int) -> None:
        self.values: dict[str, Any] = {
            "batch_id": query.batch_id,
            "key_id": query.key_id,
            "model": query.model,
            "before": before,
            "limit": limit + 1,
        }
        #: Table and index that the inner statement walks down, its conditions, and what they cover.
        self.source = "requests"
        self.index_conditions: list[str] = [] if before is None else ["number < :before"]
        self.filters: list[str] = []
        self.scan_limit = MAX_ROWS_SCANNED
        self._choose_index(query)
        if not self.filters:
            self.scan_limit = limit + 1
        self.values["most"] = self.scan_limit

    def _choose_index(self, query: Query) -> None:
        labels = list(query.labels)
        state = self._state_of(query)
        if query.batch_id is not None:
            self._use_index("requests_batch", "batch_id = :batch_id")
        elif labels:
            name, value = labels.pop(0)
            self.values |= {"label_name": name, "label_value": value}
            self.source = "request_labels"
            self.index_conditions += ["name = :label_name", "value = :label_value"]
        elif state is not None and state not in (RequestState.DONE, RequestState.CLAIMED) and query.key_id is None:
            if state is RequestState.QUEUED and query.model is not None:
                self._use_index("requests_queued", "model = :model", "state = 'queued'")
            else:
                index = "requests_waiting" if state is RequestState.QUEUED else f"requests_{state}"
                self._use_index(index, f"state = '{state}'")
        elif state is RequestState.CLAIMED:
            self._use_index("requests_claimed", "state = 'claimed'")
        elif query.key_id is not None:
            self._use_index("requests_key", "key_id = :key_id")
        elif query.model is not None:
            self._use_index("requests_model", "model = :model")
        elif state is not None:
            self._use_index("requests_done", f"state = '{state}'")
        elif query.text is not None:
            # LIKE is looked at in the walk's own index, so many more fit into the same time.
            self._use_index("requests_name", "name IS NOT NULL")
            self.scan_limit = MAX_NAMES_SCANNED
        done = " ".join(self.index_conditions)
        for given, condition in (
            (query.batch_id, "batch_id = :batch_id"),
            (query.key_id, "key_id = :key_id"),
            (query.model, "model = :model"),
        ):
            if given is not None and condition not in done:
                self.filters.append(condition)
        if state is not None and f"state = '{state}'" not in done:
            self.filters.append(f"state = '{state}'")
        if query.status == EXPIRED:
            self.filters.append(f"code = '{EXPIRED}'")
        elif state is RequestState.CANCELLED:
            self.filters.append(f"code IS NOT '{EXPIRED}'")
        for position, (name, value) in enumerate(labels):
            self.values |= {f"name_{position}": name, f"value_{position}": value}
            self.filters.append(
                f"EXISTS (SELECT 1 FROM request_labels AS also WHERE also.name = :name_{position} "
                f"AND also.value = :value_{position} AND also.number = found.number)"
            )
        if query.text is not None:
            escaped = query.text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
            self.values["text"] = f"%{escaped}%"
            self.filters.append("requests.name LIKE :text ESCAPE '\\'")
        for name, moment, sign in (("since", query.since, ">="), ("until", query.until, "<")):
            if moment is not None:
                self.values[name] = to_text(moment)
                self.filters.append(f"created_at {sign} :{name}")

    @staticmethod
    def _state_of(query: Query) -> RequestState | None:
        if query.status is None:
            return None
        return RequestState.CANCELLED if query.status == EXPIRED else RequestState(query.status)

    def _use_index(self, index: str, *conditions: str) -> None:
        self.source = f"requests INDEXED BY {index}"
        self.index_conditions += conditions
        if index in ("requests_waiting", "requests_done", "requests_model"):
            self.index_conditions.append("number > 0")  # these are for nobody else, see the migration

    def add_time_bounds(self, connection: sqlite3.Connection, since: datetime | None, until: datetime | None) -> None:
        """Turn times into numbers, so that the walk begins and ends near them."""
        slack = timedelta(seconds=MAX_ARRIVAL_SKEW_SECONDS)
        if since is not None:
            row = connection.execute(_FIRST_SINCE, (to_text(since - slack),)).fetchone()
            self.values["lowest"] = 2**62 if row is None else row[0]
            self.index_conditions.append("number >= :lowest")
        if until is not None:
            row = connection.execute(_FIRST_SINCE, (to_text(until + slack),)).fetchone()
            if row is not None:
                # One bound and not two: SQLite would begin at the one and step over all down to the other.
                before = self.values["before"]
                self.values["before"] = row[0] if before is None else min(before, row[0])
                if before is None:
                    self.index_conditions.append("number < :before")

    @property
    def scan_sql(self) -> str:
        """Walk down the index, over as many as may be looked at."""
        name = ", name" if "requests_name" in self.source else ""
        where = " AND ".join(self.index_conditions) or "1"
        return f"SELECT number{name} FROM {self.source} WHERE {where} ORDER BY number DESC LIMIT :most"

    @property
    def page_sql(self) -> str:
        """Read the rows that fit.

        The order is the walk's: CROSS JOIN keeps it outside. To ask for it again would have SQLite read and sort all
        that was walked over before the first row comes.
        """
        filters = " AND ".join(self.filters) or "1"
        if "requests_name" in self.source:
            # The name stands in the walk's index: a row is read only when it fits.
            filters = filters.replace("requests.name LIKE", "found.name LIKE")
        return (
            f"SELECT requests.* FROM ({self.scan_sql}) AS found CROSS JOIN requests ON requests.number = found.number "
            f"WHERE {filters} LIMIT :limit"
        )

    @property
    def last_scanned(self) -> str:
        """Find the last number that was looked at, if there may be more after it."""
        where = " AND ".join(self.index_conditions) or "1"
        return f"SELECT number FROM {self.source} WHERE {where} ORDER BY number DESC LIMIT 1 OFFSET :most - 1"


class SqliteSearch:
    """What `Listing` promises."""

    images: ImageStore
    _writer: Writer
    _readers: ReaderPool

    def find(self, query: Query, *, before: int | None = None, limit: int = 50) -> Page:
        """See Listing.find."""
        search = _SearchSql(query, before, limit)
        with self._readers.connection() as connection:
            search.add_time_bounds(connection, query.since, query.until)
            rows = connection.execute(search.page_sql, search.values).fetchall()
            costs: dict[str, Any] = {}
            requests = [request_with_cost(row, connection, costs) for row in rows[:limit]]
            if len(rows) > limit:
                return Page(requests=requests, next_before=requests[-1].number)
            last_scanned = connection.execute(search.last_scanned, search.values).fetchone()
        return Page(requests=requests, next_before=None if last_scanned is None else last_scanned[0])

    def explain_query_plan(self, query: Query, *, before: int | None = None) -> list[str]:
        """Say how SQLite would look for a page; for tests and for the curious."""
        search = _SearchSql(query, before, 50)
        with self._readers.connection() as connection:
            search.add_time_bounds(connection, query.since, query.until)
            rows = connection.execute(f"EXPLAIN QUERY PLAN {search.page_sql}", search.values).fetchall()
        return [row["detail"] for row in rows]

    def get_chunk(self, id: str) -> ChunkRecord | None:
        """See Listing.get_chunk."""
        with self._readers.connection() as connection:
            row = connection.execute("SELECT * FROM chunks WHERE id = ?", (id,)).fetchone()
        return None if row is None else chunk_from_row(row)

    def remove(self, id: str) -> None:
        """See Listing.remove."""

        def write(transaction: Transaction) -> None:
            removed = transaction.execute(
                "DELETE FROM requests WHERE id = ? AND finished_at IS NOT NULL RETURNING image_sha256", (id,)
            ).fetchall()
            if not removed:
                if transaction.execute("SELECT 1 FROM requests WHERE id = ?", (id,)).fetchone() is None:
                    raise UnknownRequest()
                raise NotRemovable()
            sha256 = removed[0][0]
            if not transaction.execute(_IS_NEEDED, (sha256,)).fetchone()[0]:
                self.images.delete(sha256)

        self._writer.run(write)

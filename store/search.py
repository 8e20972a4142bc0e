"""Search: pages of requests, newest first, narrowed by a query, at any depth of a long history.

Used by `server/api/views/requests.py` and by the pages. `Requests.list` is for operators' commands.

A page takes bounded time: only so many requests are scanned. When few of them match, a page comes back short, or empty,
and `next_before` tells where to go on; only None is the end. A filter that is used alone (a state, a model, a batch, a
label, a key, a label of a key), and a state together with a key, has an index of its own, so its pages are full, except
while a large batch arrives, whose requests are hidden.

With a key, only requests of that key are walked over. Otherwise `next_before` would tell a client about the requests of
others: that many have a label, or belong to a batch.

Each page is one statement: an inner one walks down one index, the best that the query allows, over a bounded number of
requests; an outer one reads the rows and applies the other filters. Weakness: a filter without an index (a rare name, a
rare pair of state and model) gives short pages.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from store.database import Database
from store.requests import IS_VISIBLE, RequestRecord, read_requests
from store.rows import to_text
from store.states import EXPIRED, RequestState

#: Requests whose rows are scanned for one page, and names, which an index alone contains.
MAX_ROWS_SCANNED = 5_000
MAX_NAMES_SCANNED = 30_000
#: Requests that arrive at the same time may be numbered in a different order from their times, but within this.
MAX_ARRIVAL_SKEW_SECONDS = 120.0

# As in the indexes `requests_status` and `requests_key_status`.
_STATUS = f"CASE WHEN state = '{RequestState.CANCELLED}' AND code = '{EXPIRED}' THEN '{EXPIRED}' ELSE state END"

_FIRST_SINCE = "SELECT number FROM requests WHERE created_at >= ? ORDER BY created_at LIMIT 1"


@dataclass(frozen=True, kw_only=True)
class Query:
    """The filters of a search; None does not filter. Accepted between `since`, included, and `until`."""

    #: A state of the store, or "expired"; "cancelled" leaves the expired ones out.
    status: str | None = None
    model: str | None = None
    batch_id: str | None = None
    key_id: str | None = None
    #: All of these, as (name, value).
    labels: Sequence[tuple[str, str]] = field(default_factory=tuple)
    since: datetime | None = None
    until: datetime | None = None
    #: Contained in the file name; the case of ASCII letters does not matter.
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Page:
    """One page of matching requests, newest first."""

    requests: Sequence[RequestRecord]
    #: `before` of the next page; None at the end.
    next_before: int | None


def _shift(moment: datetime, seconds: float) -> datetime:
    """Move a time, at most to the first or last that there is."""
    try:
        return moment + timedelta(seconds=seconds)
    except OverflowError:
        return (datetime.min if seconds < 0 else datetime.max).replace(tzinfo=UTC)


class _SearchSql:
    """A query as SQL."""

    def __init__(self, query: Query, before: int | None, limit: int) -> None:
        self.values: dict[str, Any] = {
            "status": query.status,
            "batch_id": query.batch_id,
            "key_id": query.key_id,
            "model": query.model,
            "before": before,
            "limit": limit + 1,
        }
        #: Table and index that the inner statement walks down, and the conditions that the index answers.
        self.source = "requests"
        self.index_conditions: list[str] = [] if before is None else ["number < :before"]
        #: Conditions of the outer statement.
        self.filters: list[str] = []
        self.scan_limit = MAX_ROWS_SCANNED
        self._choose_index(query)
        if not self.filters:
            # The walk ends with the page, unless what it meets is hidden.
            self.scan_limit = MAX_NAMES_SCANNED
        self.filters.append(IS_VISIBLE)
        self.values["scan_limit"] = self.scan_limit

    def _choose_index(self, query: Query) -> None:
        labels = list(query.labels)
        status = f"{_STATUS} = :status"
        if query.batch_id is not None:
            self._use_index("requests_batch", "batch_id = :batch_id")
            if query.key_id is not None:
                # Evaluated once: the requests of a batch have its key.
                batch = "SELECT 1 FROM batches WHERE id = :batch_id AND key_id = :key_id"
                self.index_conditions.append(f"EXISTS ({batch})")
        elif labels:
            name, value = labels.pop(0)
            self.values |= {"label_name": name, "label_value": value}
            self.source = "request_labels"
            self.index_conditions += ["name = :label_name", "value = :label_value"]
            if query.key_id is not None:
                self.source += " INDEXED BY request_labels_key"
                self.index_conditions.append("key_id = :key_id")
        elif query.key_id is not None and query.status is not None:
            self._use_index("requests_key_status", "key_id = :key_id", status)
        elif query.key_id is not None:
            self._use_index("requests_key", "key_id = :key_id")
        elif query.status == RequestState.QUEUED and query.model is not None:
            self._use_index("requests_queued", "model = :model", "state = 'queued'")
        elif query.status == RequestState.DONE and query.model is not None:
            self._use_index("requests_model", "model = :model")  # most requests of a model are done
        elif query.status is not None:
            self._use_index("requests_status", status)
        elif query.model is not None:
            self._use_index("requests_model", "model = :model")
        elif query.text is not None:
            # LIKE is evaluated on the index alone, so many more fit into the same time.
            self._use_index("requests_name", "name IS NOT NULL")
            self.scan_limit = MAX_NAMES_SCANNED
        indexed = " ".join(self.index_conditions)
        for given, condition in (
            (query.batch_id, "batch_id = :batch_id"),
            (query.key_id, "key_id = :key_id"),
            (query.model, "model = :model"),
            (query.status, status),
        ):
            if given is not None and condition not in indexed:
                self.filters.append(condition)
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

    def _use_index(self, index: str, *conditions: str) -> None:
        self.source = f"requests INDEXED BY {index}"
        self.index_conditions += conditions
        if index == "requests_model":
            self.index_conditions.append("number > 0")  # the index requires it, see m005_batches

    def add_time_bounds(self, connection: sqlite3.Connection, since: datetime | None, until: datetime | None) -> None:
        """Turn times into numbers, so that the walk starts and ends near them."""
        if since is not None:
            row = connection.execute(_FIRST_SINCE, (to_text(_shift(since, -MAX_ARRIVAL_SKEW_SECONDS)),)).fetchone()
            self.values["lowest"] = 2**62 if row is None else row[0]
            self.index_conditions.append("number >= :lowest")
        if until is not None:
            row = connection.execute(_FIRST_SINCE, (to_text(_shift(until, MAX_ARRIVAL_SKEW_SECONDS)),)).fetchone()
            if row is not None:
                # One bound, not two: SQLite would start at the one and skip row by row to the other.
                before = self.values["before"]
                self.values["before"] = row[0] if before is None else min(before, row[0])
                if before is None:
                    self.index_conditions.append("number < :before")

    @property
    def scan_sql(self) -> str:
        """Statement that walks down the index, over at most `scan_limit` rows."""
        name = ", name" if "requests_name" in self.source else ""
        where = " AND ".join(self.index_conditions) or "1"
        return f"SELECT number{name} FROM {self.source} WHERE {where} ORDER BY number DESC LIMIT :scan_limit"

    @property
    def page_sql(self) -> str:
        """Statement that reads the matching rows.

        The order is that of the walk: CROSS JOIN keeps the walk as the outer loop. An ORDER BY would have SQLite read
        and sort everything that was walked over before the first row comes.
        """
        filters = " AND ".join(self.filters) or "1"
        if "requests_name" in self.source:
            # The index of the walk contains the name: a row is read only when it matches.
            filters = filters.replace("requests.name LIKE", "found.name LIKE")
        return (
            f"SELECT requests.* FROM ({self.scan_sql}) AS found CROSS JOIN requests ON requests.number = found.number "
            f"WHERE {filters} LIMIT :limit"
        )

    @property
    def last_scanned_sql(self) -> str:
        """Statement that finds the last number that was scanned, if there may be more after it."""
        where = " AND ".join(self.index_conditions) or "1"
        return f"SELECT number FROM {self.source} WHERE {where} ORDER BY number DESC LIMIT 1 OFFSET :scan_limit - 1"


class Search:
    """Searching the requests."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, query: Query, *, before: int | None = None, limit: int = 50) -> Page:
        """List matching requests, newest first. :param before: `next_before` of the previous page."""
        search = _SearchSql(query, before, limit)
        with self._database.read() as connection:
            search.add_time_bounds(connection, query.since, query.until)
            rows = connection.execute(search.page_sql, search.values).fetchall()
            requests = read_requests(connection, rows[:limit], with_steps=False)
            if len(rows) > limit:
                return Page(requests=requests, next_before=requests[-1].number)
            last_scanned = connection.execute(search.last_scanned_sql, search.values).fetchone()
        return Page(requests=requests, next_before=None if last_scanned is None else last_scanned[0])

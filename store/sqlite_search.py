"""The list on SQLite. A base of `SqliteStore`, which gives it the writer, the readers and the pictures.

Each page is one statement: an inner one walks down one index, the best of those that what is asked for allows, over at
most so many requests; an outer one reads the rows and applies everything else. Weakness: what has no index of its own
beside others (a rare name, a rare pair of state and model) comes in short pages.
"""

from __future__ import annotations

import sqlite3
from datetime import datetime, timedelta
from typing import Any

from provider_image.errors import UnknownRequest
from store.batches import EXPIRED
from store.chunks import ChunkRecord
from store.database import Readers, Transaction, Writer
from store.images import Blobs
from store.records import State, to_text
from store.search import NotRemovable, Page, Wanted
from store.sqlite_chunks import chunk_from_row
from store.sqlite_costs import priced

#: Requests whose rows are looked at for one page, and names, which stand in an index by themselves.
MOST_LOOKED_AT = 5_000
MOST_NAMES_LOOKED_AT = 30_000
#: Requests that come in at the same time may be numbered in another order than their times; never by as much as this.
DISORDER_SECONDS = 120.0

_FIRST_SINCE = "SELECT number FROM requests WHERE created_at >= ? ORDER BY created_at LIMIT 1"

_IS_NEEDED = "SELECT EXISTS (SELECT 1 FROM requests WHERE image_sha256 = ? AND image_deleted_at IS NULL)"


class _Search:
    """What is looked for, as SQL."""

    def __init__(self, wanted: Wanted, before: int | None, limit: int) -> None:
        self.values: dict[str, Any] = {
            "batch_id": wanted.batch_id,
            "key_id": wanted.key_id,
            "model": wanted.model,
            "before": before,
            "limit": limit + 1,
        }
        #: Table and index that the inner statement walks down, its conditions, and what they cover.
        self.source = "requests"
        self.walk: list[str] = [] if before is None else ["number < :before"]
        self.rest: list[str] = []
        self.most = MOST_LOOKED_AT
        self._choose(wanted)
        if not self.rest:
            self.most = limit + 1
        self.values["most"] = self.most

    def _choose(self, wanted: Wanted) -> None:
        labels = list(wanted.labels)
        state = self._state_of(wanted)
        if wanted.batch_id is not None:
            self._walk_down("requests_batch", "batch_id = :batch_id")
        elif labels:
            name, value = labels.pop(0)
            self.values |= {"label_name": name, "label_value": value}
            self.source = "request_labels"
            self.walk += ["name = :label_name", "value = :label_value"]
        elif state is not None and state not in (State.DONE, State.CLAIMED) and wanted.key_id is None:
            if state is State.QUEUED and wanted.model is not None:
                self._walk_down("requests_queued", "model = :model", "state = 'queued'")
            else:
                index = "requests_waiting" if state is State.QUEUED else f"requests_{state}"
                self._walk_down(index, f"state = '{state}'")
        elif state is State.CLAIMED:
            self._walk_down("requests_claimed", "state = 'claimed'")
        elif wanted.key_id is not None:
            self._walk_down("requests_key", "key_id = :key_id")
        elif wanted.model is not None:
            self._walk_down("requests_model", "model = :model")
        elif state is not None:
            self._walk_down("requests_done", f"state = '{state}'")
        elif wanted.text is not None:
            # LIKE is looked at in the walk's own index, so many more fit into the same time.
            self._walk_down("requests_name", "name IS NOT NULL")
            self.most = MOST_NAMES_LOOKED_AT
        done = " ".join(self.walk)
        for given, condition in (
            (wanted.batch_id, "batch_id = :batch_id"),
            (wanted.key_id, "key_id = :key_id"),
            (wanted.model, "model = :model"),
        ):
            if given is not None and condition not in done:
                self.rest.append(condition)
        if state is not None and f"state = '{state}'" not in done:
            self.rest.append(f"state = '{state}'")
        if wanted.status == EXPIRED:
            self.rest.append(f"code = '{EXPIRED}'")
        elif state is State.CANCELLED:
            self.rest.append(f"code IS NOT '{EXPIRED}'")
        for position, (name, value) in enumerate(labels):
            self.values |= {f"name_{position}": name, f"value_{position}": value}
            self.rest.append(
                f"EXISTS (SELECT 1 FROM request_labels AS also WHERE also.name = :name_{position} "
                f"AND also.value = :value_{position} AND also.number = found.number)"
            )
        if wanted.text is not None:
            escaped = wanted.text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
            self.values["text"] = f"%{escaped}%"
            self.rest.append("requests.name LIKE :text ESCAPE '\\'")
        for name, moment, sign in (("since", wanted.since, ">="), ("until", wanted.until, "<")):
            if moment is not None:
                self.values[name] = to_text(moment)
                self.rest.append(f"created_at {sign} :{name}")

    @staticmethod
    def _state_of(wanted: Wanted) -> State | None:
        if wanted.status is None:
            return None
        return State.CANCELLED if wanted.status == EXPIRED else State(wanted.status)

    def _walk_down(self, index: str, *conditions: str) -> None:
        self.source = f"requests INDEXED BY {index}"
        self.walk += conditions
        if index in ("requests_waiting", "requests_done", "requests_model"):
            self.walk.append("number > 0")  # these are for nobody else, see the migration

    def bound(self, connection: sqlite3.Connection, since: datetime | None, until: datetime | None) -> None:
        """Turn times into numbers, so that the walk begins and ends near them."""
        slack = timedelta(seconds=DISORDER_SECONDS)
        if since is not None:
            row = connection.execute(_FIRST_SINCE, (to_text(since - slack),)).fetchone()
            self.values["lowest"] = 2**62 if row is None else row[0]
            self.walk.append("number >= :lowest")
        if until is not None:
            row = connection.execute(_FIRST_SINCE, (to_text(until + slack),)).fetchone()
            if row is not None:
                # One bound and not two: SQLite would begin at the one and step over all down to the other.
                before = self.values["before"]
                self.values["before"] = row[0] if before is None else min(before, row[0])
                if before is None:
                    self.walk.append("number < :before")

    @property
    def inner(self) -> str:
        """Walk down the index, over as many as may be looked at."""
        name = ", name" if "requests_name" in self.source else ""
        where = " AND ".join(self.walk) or "1"
        return f"SELECT number{name} FROM {self.source} WHERE {where} ORDER BY number DESC LIMIT :most"

    @property
    def page(self) -> str:
        """Read the rows that fit.

        The order is the walk's: CROSS JOIN keeps it outside. To ask for it again would have SQLite read and sort all
        that was walked over before the first row comes.
        """
        rest = " AND ".join(self.rest) or "1"
        if "requests_name" in self.source:
            # The name stands in the walk's index: a row is read only when it fits.
            rest = rest.replace("requests.name LIKE", "found.name LIKE")
        return (
            f"SELECT requests.* FROM ({self.inner}) AS found CROSS JOIN requests ON requests.number = found.number "
            f"WHERE {rest} LIMIT :limit"
        )

    @property
    def last(self) -> str:
        """Find the last number that was looked at, if there may be more after it."""
        where = " AND ".join(self.walk) or "1"
        return f"SELECT number FROM {self.source} WHERE {where} ORDER BY number DESC LIMIT 1 OFFSET :most - 1"


class SqliteListing:
    """What `Listing` promises."""

    blobs: Blobs
    _writer: Writer
    _readers: Readers

    def find(self, wanted: Wanted, *, before: int | None = None, limit: int = 50) -> Page:
        """See Listing.find."""
        search = _Search(wanted, before, limit)
        with self._readers.lend() as connection:
            search.bound(connection, wanted.since, wanted.until)
            rows = connection.execute(search.page, search.values).fetchall()
            costs: dict[str, Any] = {}
            requests = [priced(row, connection, costs) for row in rows[:limit]]
            if len(rows) > limit:
                return Page(requests=requests, next_before=requests[-1].number)
            last = connection.execute(search.last, search.values).fetchone()
        return Page(requests=requests, next_before=None if last is None else last[0])

    def explain(self, wanted: Wanted, *, before: int | None = None) -> list[str]:
        """Say how SQLite would look for a page; for tests and for the curious."""
        search = _Search(wanted, before, 50)
        with self._readers.lend() as connection:
            search.bound(connection, wanted.since, wanted.until)
            rows = connection.execute(f"EXPLAIN QUERY PLAN {search.page}", search.values).fetchall()
        return [row["detail"] for row in rows]

    def get_chunk(self, id: str) -> ChunkRecord | None:
        """See Listing.get_chunk."""
        with self._readers.lend() as connection:
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
                self.blobs.delete(sha256)

        self._writer.run(write)

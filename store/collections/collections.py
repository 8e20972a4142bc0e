"""Collections: the table `collections`, what a collection has, and the cache that it is searched with.

The server creates, reads, searches and removes them. A collection belongs to an API key like a batch and has a name
that is unique for its key. All its vectors are of one model: of the artefact that made the first one. Members come with
their requests, see `members.py`; a request that is there already becomes one by `add_requests`.

Removing a large collection takes several commits. The first makes it invisible and its name free; what a killed process
leaves is removed by the next purge.
"""

from __future__ import annotations

import builtins
import functools
import json
import logging
import re
import shutil
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from provider_image.errors import InvalidParams, MlgError
from store.collections.members import (
    NewMember,
    TooManyCollections,
    add_members,
    complete_members,
    remove_members,
)
from store.collections.vector_cache import VectorCache, VectorChange
from store.database import Database, Transaction
from store.errors import LimitReached, StoreError, UnknownRequest
from store.images import as_store_error
from store.rows import from_row, insert_sql, to_row, to_text
from store.states import RequestState

log = logging.getLogger(__name__)

#: Collections of one key, and members of one collection.
MAX_COLLECTIONS = 1000
MAX_MEMBERS = 2_000_000
#: Letters, digits, dots, underscores and hyphens; an id is never a name.
NAME_PATTERN = "[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
_ID_PATTERN = "[0-9a-f]{32}"
#: Members that one commit adds or removes, changes that one forgets, and vectors that one query reads.
_MEMBERS_PER_COMMIT, _CHANGES_PER_COMMIT = 50, 2000
_VECTORS_PER_READ = 2000
#: How long removing a collection goes on before the rest is left to the next purge.
REMOVAL_SECONDS = 5.0

_FIND = """
    SELECT * FROM collections WHERE deleted_at IS NULL AND coalesce(key_id, '') = coalesce(:key_id, '') AND name = :name
"""

_FIND_BY_ID = "SELECT * FROM collections WHERE deleted_at IS NULL AND id = :name"

_COUNT_OF_KEY = "SELECT count(*) FROM collections WHERE deleted_at IS NULL AND key_id IS ?"

_COUNTS = """
    SELECT count(*) AS total, count(sequence) AS ready FROM collection_members
    INDEXED BY collection_members_sequence WHERE collection = ?
"""

_COUNT_WITHOUT_VECTOR = """
    SELECT count(*) FROM collection_members INDEXED BY collection_members_sequence
    WHERE collection = ? AND sequence IS NULL
"""

_COUNT_FAILED = f"""
    SELECT count(*) FROM collection_members INDEXED BY collection_members_sequence
    LEFT JOIN requests ON requests.number = request_number
    WHERE collection = ? AND sequence IS NULL
      AND coalesce(state, '') NOT IN ('{RequestState.QUEUED}', '{RequestState.CLAIMED}')
"""

_MEMBERS = """
    SELECT collection_members.number AS number, requests.id AS id, requests.name AS name,
           collection_members.image_sha256 AS image_sha256, requests.created_at AS created_at, collection,
           CASE WHEN sequence IS NOT NULL THEN 'ready' WHEN state IN ('queued', 'claimed') THEN 'pending'
                ELSE 'failed' END AS status,
           coalesce(collection_members.reason,
                    CASE WHEN sequence IS NULL THEN requests.reason END,
                    CASE WHEN sequence IS NULL AND state = 'cancelled' THEN 'Its request was cancelled.' END) AS reason
    FROM collection_members JOIN requests ON requests.number = request_number
"""

_PAGE = f"""
    {_MEMBERS} WHERE collection_members.number IN (
        SELECT number FROM collection_members INDEXED BY collection_members_collection
        WHERE collection = :collection AND number < :before ORDER BY number DESC LIMIT :limit)
    ORDER BY collection_members.number DESC
"""

_SOME = f"{_MEMBERS} WHERE collection_members.number IN (SELECT value FROM json_each(?))"

_LABELS = "SELECT number, name, value FROM collection_labels WHERE number IN (SELECT value FROM json_each(?))"

_WITH_LABEL = "SELECT number FROM collection_labels WHERE collection = ? AND value = ?"

_MEMBER_OF_IMAGE = """
    SELECT collection_members.number AS number, vector FROM collection_members JOIN collection_vectors USING (number)
    WHERE image_sha256 = ? AND collection = ?
"""

_CHANGES_AFTER = """
    SELECT sequence, collection_changes.number AS number, vector
    FROM collection_changes LEFT JOIN collection_vectors ON collection_vectors.number = collection_changes.number
    WHERE collection = ? AND sequence > ? ORDER BY sequence LIMIT ?
"""

_SEQUENCE = "SELECT sequence FROM collections WHERE number = ?"

_REQUESTS = "SELECT id, number, image_sha256 FROM requests WHERE id IN (SELECT value FROM json_each(?)) AND model = ?"

_MEMBER_OF_REQUEST = """
    SELECT * FROM collection_members
    WHERE collection = ? AND request_number = (SELECT number FROM requests WHERE id = ?)
"""

_FORGET_CHANGES = """
    DELETE FROM collection_changes WHERE collection = :number AND sequence IN (
        SELECT sequence FROM collection_changes WHERE collection = :number LIMIT :rows_per_commit)
"""

_SOME_MEMBERS = "SELECT * FROM collection_members WHERE collection = ? LIMIT ?"


class UnknownCollection(UnknownRequest):
    """There is no collection with this name. GET /collections lists those there are."""


class UnknownMember(UnknownRequest):
    """The collection has no image of this request."""


class CollectionExists(MlgError):
    """There is a collection with this name already. Choose another name, or delete that one first."""

    permanent = True


class TooManyMembers(LimitReached):
    """The collection would have too many images. Create another one."""


@dataclass(frozen=True, kw_only=True)
class CollectionRecord:
    """One collection."""

    #: Unguessable and unique; see `store.new_id`.
    id: str
    #: Unique for its key.
    name: str
    #: The API key it belongs to; None where none is required.
    key_id: str | None = None
    #: The model whose vectors it has.
    model: str
    #: Digest of the artefact that made the vectors; None before the first.
    digest: str | None = None
    #: Values of a vector; None before the first.
    dimensions: int | None = None
    #: Counts every vector that was added or removed.
    sequence: int = 0
    created_at: datetime
    #: Counts up in the order of creation; 0 before it is added.
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class MemberCounts:
    """How many images a collection has."""

    #: With a vector.
    ready: int
    #: Whose request is queued or claimed.
    pending: int
    #: Whose request has ended without a vector.
    failed: int

    @property
    def total(self) -> int:
        """Count all."""
        return self.ready + self.pending + self.failed


@dataclass(frozen=True, kw_only=True)
class MemberRecord:
    """One image of a collection."""

    #: Never used again.
    number: int
    #: Id of the request that computes its vector.
    id: str
    #: The client's name of the file.
    name: str | None
    image_sha256: str
    #: When the request was accepted.
    created_at: datetime
    #: ready, pending or failed.
    status: str
    #: Why it has no vector.
    reason: str | None
    #: Given by the client, and the most likely label of each classifier under the classifier's name.
    labels: Mapping[str, str] = field(default_factory=dict)


def is_collection_name(text: str) -> bool:
    """Tell whether a collection may have this name."""
    return bool(re.fullmatch(NAME_PATTERN, text, re.ASCII)) and not re.fullmatch(_ID_PATTERN, text)


class Collections:
    """The collections of a home. :param folder: of the caches, one folder for each."""

    def __init__(self, database: Database, folder: Path) -> None:
        self._database = database
        self._folder = folder

    def add(self, new: CollectionRecord) -> CollectionRecord:
        """Create a collection.

        :raises InvalidParams: its name is not one.
        :raises CollectionExists: :raises TooManyCollections:
        """
        if not is_collection_name(new.name):
            raise InvalidParams(
                "The name of a collection has 1 to 64 letters, digits, dots, underscores or hyphens, and begins with a "
                "letter or a digit."
            )
        row = to_row(new)
        del row["number"]

        def write(transaction: Transaction) -> CollectionRecord:
            if transaction.execute(_FIND, row).fetchone() is not None:
                raise CollectionExists()
            if transaction.execute(_COUNT_OF_KEY, (new.key_id,)).fetchone()[0] >= MAX_COLLECTIONS:
                raise TooManyCollections()
            transaction.execute(f"INSERT INTO {insert_sql('collections', row)}", row)
            return from_row(CollectionRecord, transaction.execute(_FIND, row).fetchone())

        return self._database.write(write)

    def find(self, name: str, *, key_id: str | None) -> CollectionRecord:
        """Read a collection by its name among those of a key, or any by its id. :raises UnknownCollection:"""
        with self._database.read() as connection:
            values = {"name": name, "key_id": key_id}
            row = connection.execute(_FIND, values).fetchone() or connection.execute(_FIND_BY_ID, values).fetchone()
        if row is None:
            raise UnknownCollection()
        return from_row(CollectionRecord, row)

    def list(
        self, *, key_id: str | None = None, before: int | None = None, limit: int = 50
    ) -> builtins.list[CollectionRecord]:
        """List collections, newest first.

        :param key_id: only those of this key.
        :param before: only lower numbers.
        """
        conditions = ["deleted_at IS NULL", *(["key_id = :key_id"] if key_id is not None else [])]
        conditions += ["number < :before"] if before is not None else []
        return self._database.records(
            CollectionRecord,
            f"SELECT * FROM collections WHERE {' AND '.join(conditions)} ORDER BY number DESC LIMIT :limit",
            {"key_id": key_id, "before": before, "limit": limit},
        )

    def count(self, collection: CollectionRecord) -> MemberCounts:
        """Count the members."""
        with self._database.snapshot() as connection:
            total, ready = connection.execute(_COUNTS, (collection.number,)).fetchone()
            (failed,) = connection.execute(_COUNT_FAILED, (collection.number,)).fetchone()
        return MemberCounts(ready=ready, pending=total - ready - failed, failed=failed)

    def check_room(self, collection: CollectionRecord, count: int) -> None:
        """Check that so many images may be added. :raises TooManyMembers:"""
        # No more than these; counting them all would take long for each image of a large collection.
        (waiting,) = self._database.row(_COUNT_WITHOUT_VECTOR, (collection.number,))
        if collection.sequence + waiting + count <= MAX_MEMBERS:
            return
        (total, _) = self._database.row(_COUNTS, (collection.number,))
        if total + count > MAX_MEMBERS:
            raise TooManyMembers(f"A collection has at most {MAX_MEMBERS} images. Create another one.")

    # Members

    def add_requests(
        self, collection: CollectionRecord, ids: Sequence[str], labels: Mapping[str, str] | None = None
    ) -> set[str]:
        """Make the images of requests members that have, or will have, a vector of the collection's model.

        :return: the ids of those; the others are unknown, or requests for another model.
        """

        def write(part: Sequence[str], transaction: Transaction) -> set[str]:
            rows = transaction.execute(_REQUESTS, (json.dumps(part), collection.model)).fetchall()
            new = (NewMember(collection.number, row["number"], row["image_sha256"], labels or {}) for row in rows)
            add_members(transaction, list(new))
            complete_members(transaction, [row["number"] for row in rows])
            return {row["id"] for row in rows}

        starts = range(0, len(ids), _MEMBERS_PER_COMMIT)
        writes = [functools.partial(write, list(ids[start : start + _MEMBERS_PER_COMMIT])) for start in starts]
        return set().union(*self._database.write_each(writes))

    def members(
        self, collection: CollectionRecord, *, before: int | None = None, limit: int = 50
    ) -> builtins.list[MemberRecord]:
        """List members, the last added first. :param before: only lower numbers."""
        values = {"collection": collection.number, "before": 2**62 if before is None else before, "limit": limit}
        with self._database.read() as connection:
            return _with_labels(connection, connection.execute(_PAGE, values).fetchall())

    def get_members(self, numbers: Sequence[int]) -> Mapping[int, MemberRecord]:
        """Read members by their numbers. Those that were removed meanwhile are missing."""
        with self._database.read() as connection:
            rows = connection.execute(_SOME, (json.dumps(list(numbers)),)).fetchall()
            return {one.number: one for one in _with_labels(connection, rows)}

    def remove_member(self, collection: CollectionRecord, request_id: str) -> None:
        """Remove the image of a request, its vector and its labels. :raises UnknownMember:"""

        def write(transaction: Transaction) -> None:
            rows = transaction.execute(_MEMBER_OF_REQUEST, (collection.number, request_id)).fetchall()
            if not remove_members(transaction, rows):
                raise UnknownMember()

        self._database.write(write)

    def find_image(self, collection: CollectionRecord, image_sha256: str) -> tuple[int, bytes] | None:
        """Return the number and the vector of the member with this image; None if there is none with a vector."""
        row = self._database.row(_MEMBER_OF_IMAGE, (image_sha256, collection.number))
        return None if row is None else (row["number"], row["vector"])

    def numbers_with_labels(
        self, collection: CollectionRecord, labels: Iterable[tuple[str | None, str]]
    ) -> builtins.list[int] | None:
        """List the numbers of the members that have all of these labels; None without labels.

        :param labels: (name, value); a name that is None stands for any.
        """
        selects: list[str] = []
        values: list[object] = []
        for name, value in labels:
            selects.append(_WITH_LABEL if name is None else f"{_WITH_LABEL} AND name = ?")
            values += [collection.number, value, *(() if name is None else (name,))]
        if not selects:
            return None
        with self._database.read() as connection:
            return [number for (number,) in connection.execute(" INTERSECT ".join(selects), values)]

    # Searching

    def cache(self, collection: CollectionRecord) -> VectorCache:
        """Return the cache of a collection, which must have a vector."""
        assert collection.dimensions is not None
        return VectorCache(self._folder / collection.id, collection.dimensions)

    def update_cache(
        self,
        collection: CollectionRecord,
        cache: VectorCache,
        *,
        makes_bits: bool = True,
        wait_seconds: float | None = None,
    ) -> int:
        """Bring a cache up to date, see `VectorCache.update`. :return: the sequence number that it has.

        :raises TimeoutError: :raises StoreError:
        """
        try:
            return cache.update(
                lambda sequence: self.changes_after(collection, sequence),
                latest=lambda: self.sequence(collection),
                makes_bits=makes_bits,
                wait_seconds=wait_seconds,
            )
        except TimeoutError:
            raise
        except OSError as error:
            raise as_store_error(error, self._folder) from error

    def sequence(self, collection: CollectionRecord) -> int:
        """Return how many vectors were added and removed so far. :raises UnknownCollection: it was removed."""
        row = self._database.row(_SEQUENCE, (collection.number,))
        if row is None:
            raise UnknownCollection()
        return int(row["sequence"])

    def changes_after(self, collection: CollectionRecord, sequence: int) -> Iterator[VectorChange]:
        """Iterate over the vectors that were added and removed after a sequence number."""
        while True:
            rows = self._database.rows(_CHANGES_AFTER, (collection.number, sequence, _VECTORS_PER_READ))
            yield from (from_row(VectorChange, row) for row in rows)
            if len(rows) < _VECTORS_PER_READ:
                return
            sequence = rows[-1]["sequence"]

    def update_caches(self) -> None:
        """Bring the caches that there are up to date: what was deleted is then deleted from their files too."""
        for path in self._folder.glob("*"):
            row = self._database.row(_FIND_BY_ID, {"name": path.name})
            collection = None if row is None else from_row(CollectionRecord, row)
            if collection is None:
                shutil.rmtree(path, ignore_errors=True)  # its collection is deleted
            elif collection.dimensions is not None:
                cache = self.cache(collection)
                if cache.sequence() != collection.sequence:
                    try:
                        self.update_cache(collection, cache, makes_bits=False, wait_seconds=0)
                    except (TimeoutError, UnknownCollection):
                        continue  # another process is doing it, or has removed the collection
                    except StoreError:
                        log.exception("cannot bring the vectors in %s up to date; the next purge tries again", path)

    # Removing

    def remove(self, collection: CollectionRecord, *, now: datetime) -> None:
        """Delete a collection. Its requests stay, and follow the retention again.

        :raises UnknownCollection: it was deleted meanwhile.
        """
        sql = "UPDATE collections SET deleted_at = ? WHERE number = ? AND deleted_at IS NULL"
        if not self._database.execute(sql, (to_text(now), collection.number)):
            raise UnknownCollection()
        give_up_at = time.monotonic() + REMOVAL_SECONDS
        self._finish_removal(collection.number, collection.id, lambda: time.monotonic() > give_up_at)

    def finish_removals(self, *, is_stopping: Callable[[], bool] = lambda: False) -> None:
        """Remove what is left of deleted collections, until it shall stop."""
        for number, id in self._database.rows("SELECT number, id FROM collections WHERE deleted_at IS NOT NULL"):
            self._finish_removal(number, id, is_stopping, is_background=True)

    def _finish_removal(
        self, number: int, id: str, is_stopping: Callable[[], bool], *, is_background: bool = False
    ) -> None:
        def remove(transaction: Transaction, rows: int) -> int:
            if is_stopping():
                return 0
            found = transaction.execute(_SOME_MEMBERS, (number, rows)).fetchall()
            return remove_members(transaction, found)

        def forget(transaction: Transaction, rows: int) -> int:
            values = {"number": number, "rows_per_commit": rows}
            return 0 if is_stopping() else transaction.execute(_FORGET_CHANGES, values).rowcount

        shutil.rmtree(self._folder / id, ignore_errors=True)
        self._database.write_in_steps(remove, rows_per_commit=_MEMBERS_PER_COMMIT, is_background=is_background)
        if is_stopping():
            return
        self._database.write_in_steps(forget, rows_per_commit=_CHANGES_PER_COMMIT, is_background=is_background)
        self._database.execute(
            "DELETE FROM collections WHERE number = :number "
            "AND NOT EXISTS (SELECT 1 FROM collection_members WHERE collection = :number)"
            "AND NOT EXISTS (SELECT 1 FROM collection_changes WHERE collection = :number)",
            {"number": number},
        )


def _with_labels(connection: sqlite3.Connection, rows: Sequence[sqlite3.Row]) -> builtins.list[MemberRecord]:
    labels: dict[int, dict[str, str]] = defaultdict(dict)
    for number, name, value in connection.execute(_LABELS, (json.dumps([row["number"] for row in rows]),)):
        labels[number][name] = value
    return [from_row(MemberRecord, row, labels=labels[row["number"]]) for row in rows]

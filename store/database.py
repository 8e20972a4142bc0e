"""SQLite connections: one writer that shares its commits, and a pool of readers.

Concurrent writers each waiting for their own fsync would give a few hundred commits a second. Here every write of the
process is a small function, and all those that wait are run inside one BEGIN IMMEDIATE and one commit. A function that
raises takes only its own changes back (a savepoint); its neighbours are committed.

Weakness: SQLite has one writer for the whole file. Several processes on one home take turns, polling for the lock.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from store.errors import DiskFull, StoreBusy, StoreError, StoreUnavailable

log = logging.getLogger(__name__)

#: Writes that share a commit at most; bounds how long the lock is held.
MAX_WRITES_PER_COMMIT = 128
#: Pause between two tries for the write lock.
LOCK_POLL_SECONDS = 0.0005


def as_store_error(error: sqlite3.Error, database: Path) -> StoreError:
    """Translate what SQLite said into what to do about it."""
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreBusy()
    if code == sqlite3.SQLITE_FULL:
        return DiskFull()
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StoreUnavailable(f"The database {database} is damaged ({error}). Restore it from a backup.")
    return StoreUnavailable(
        f"The database {database} cannot be used: {error}. "
        "Check that its folder exists, belongs to this user and is not read-only."
    )


def connect(database: Path, *, busy_seconds: float) -> sqlite3.Connection:
    """Open a connection in manual transaction mode. :raises StoreError:"""
    try:
        connection = sqlite3.connect(
            database, timeout=busy_seconds, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        connection.row_factory = sqlite3.Row
        # FULL: the commit is in the file before it returns; NORMAL may lose the last ones in a power cut.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error as error:
        raise as_store_error(error, database) from error
    return connection


class Transaction:
    """What a write function gets: the connection, and hooks that run with the commit."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        #: Folders whose names must be durable before the commit.
        self.folders_to_sync: set[Path] = set()
        #: Pictures that this transaction gave their name; taken back if it is not committed.
        self.published: list[str] = []

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        """Run one statement."""
        return self.connection.execute(sql, parameters)


WriteFunction = Callable[[Transaction], Any]


class _PendingWrite:
    """A write that waits, and what became of it."""

    __slots__ = ("failure", "has_savepoint", "is_done", "result", "wakeup", "write")

    def __init__(self, write: WriteFunction, has_savepoint: bool) -> None:
        self.write = write
        self.has_savepoint = has_savepoint
        self.result: Any = None
        self.failure: Exception | None = None
        self.is_done = False
        #: Held until the entry is done, or its thread is to lead. A bare lock: an Event costs three times as much.
        self.wakeup = threading.Lock()
        self.wakeup.acquire()


class Writer:
    """The one place that writes, one thread at a time.

    The first thread that comes leads: it runs its own write and those of all who came meanwhile in one commit, wakes
    them, and hands the lead to one of those who have come since. Compared with a thread of its own for writing this
    saves two thread switches for a lone write, and one for each that is led.

    :param before_commit: called with the transaction before each commit (makes folder entries durable).
    :param undo: called under the lock with a transaction that was rolled back, to take back what it published.
    """

    def __init__(
        self,
        database: Path,
        *,
        busy_seconds: float,
        before_commit: Callable[[Transaction], None],
        undo: Callable[[Transaction], None],
    ) -> None:
        self._database = database
        self._busy_seconds = busy_seconds
        self._before_commit = before_commit
        self._undo = undo
        self._lock = threading.Lock()
        self._waiting: collections.deque[_PendingWrite] = collections.deque()
        self._has_leader = False
        self._is_closed = False
        self._connection: sqlite3.Connection | None = None

    def run(self, write: WriteFunction, *, has_savepoint: bool = True) -> Any:
        """Run a write and return its result when it is durable.

        :param has_savepoint: False saves two statements; right for a function that ends with its only changing one.
        :raises StoreError: and what the function raises.
        """
        entry = _PendingWrite(write, has_savepoint)
        with self._lock:
            if self._is_closed:
                raise StoreUnavailable("The store is closed.")
            self._waiting.append(entry)
            is_leader, self._has_leader = not self._has_leader, True
        if not is_leader:
            entry.wakeup.acquire()
        if not entry.is_done:
            self._run_group_commit()
        if entry.failure is not None:
            raise entry.failure
        return entry.result

    def close(self) -> None:
        """Refuse further writes, let those that came be committed, and close the connection."""
        with self._lock:
            self._is_closed = True
        while True:
            with self._lock:
                if not self._has_leader:
                    break
            time.sleep(LOCK_POLL_SECONDS)
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _run_group_commit(self) -> None:
        """Commit what waits, the caller's own write among it, and pass the lead on."""
        with self._lock:
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_WRITES_PER_COMMIT))]
        try:
            if self._connection is None:
                self._connection = connect(self._database, busy_seconds=0)  # see _begin
            self._commit(self._connection, batch)
        except BaseException as error:
            failure = error if isinstance(error, Exception) else StoreUnavailable("The process is being stopped.")
            if isinstance(error, sqlite3.Error):
                failure = as_store_error(error, self._database)
                failure.__cause__ = error
            for entry in batch:
                entry.result, entry.failure = None, failure
            if self._connection is not None and not isinstance(failure, StoreBusy):
                # A fresh one next time: the file may have been replaced or remounted meanwhile.
                self._connection.close()
                self._connection = None
            if not isinstance(error, Exception):
                raise
        finally:
            for entry in batch:
                entry.is_done = True
                entry.wakeup.release()
            with self._lock:
                if self._waiting:
                    self._waiting[0].wakeup.release()
                else:
                    self._has_leader = False

    def _commit(self, connection: sqlite3.Connection, batch: list[_PendingWrite]) -> None:
        self._begin(connection)
        transaction = Transaction(connection)
        try:
            for entry in batch:
                published_before = len(transaction.published)
                if entry.has_savepoint:
                    connection.execute("SAVEPOINT one_write")
                try:
                    entry.result = entry.write(transaction)
                except Exception as error:
                    if not connection.in_transaction:
                        raise
                    if entry.has_savepoint:
                        connection.execute("ROLLBACK TO one_write")
                    self._undo_publishing(transaction, published_before)
                    if isinstance(error, sqlite3.Error):
                        known = as_store_error(error, self._database)
                        known.__cause__ = error
                        error = known
                    entry.failure = error
                if entry.has_savepoint:
                    connection.execute("RELEASE one_write")
            self._before_commit(transaction)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if transaction.published:
                self._undo_publishing_after_rollback(connection, transaction)
            raise

    def _begin(self, connection: sqlite3.Connection) -> None:
        """Take the write lock. Another process holds it for some milliseconds at most.

        SQLite's own busy handler sleeps longer from try to try, up to a tenth of a second, and so starves a process
        whose neighbour writes all the time (measured with two server processes: a 99th percentile of 1.5 s).
        """
        deadline = time.monotonic() + self._busy_seconds
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
                break
            except sqlite3.OperationalError as error:
                if (error.sqlite_errorcode & 0xFF) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(LOCK_POLL_SECONDS)

    def _undo_publishing(self, transaction: Transaction, keep: int) -> None:
        kept, transaction.published = transaction.published[:keep], transaction.published[keep:]
        try:
            self._undo(transaction)
        except OSError:
            log.exception("could not remove pictures of a write that failed; the next sweep will")
        transaction.published = kept

    def _undo_publishing_after_rollback(self, connection: sqlite3.Connection, transaction: Transaction) -> None:
        """Take back pictures after the rollback, under a lock of its own: somebody may refer to them by now."""
        try:
            self._begin(connection)
            self._undo_publishing(transaction, 0)
            connection.execute("ROLLBACK")
        except sqlite3.Error:
            log.exception("could not remove pictures of a write that failed; the next sweep will")


class ReaderPool:
    """Connections for reading, lent to one thread at a time."""

    def __init__(self, database: Path, *, busy_seconds: float) -> None:
        self._database = database
        self._busy_seconds = busy_seconds
        self._idle: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()
        self._is_closed = False

    @contextlib.contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection. :raises StoreError: it cannot be opened or read."""
        if self._is_closed:
            raise StoreUnavailable("The store is closed.")
        try:
            connection = self._idle.get_nowait()
        except queue.Empty:
            connection = connect(self._database, busy_seconds=self._busy_seconds)
            connection.execute("PRAGMA query_only = ON")
        try:
            yield connection
        except sqlite3.Error as error:
            connection.close()
            raise as_store_error(error, self._database) from error
        except BaseException:
            self._return(connection)
            raise
        self._return(connection)

    def _return(self, connection: sqlite3.Connection) -> None:
        if self._is_closed:
            connection.close()
        else:
            self._idle.put(connection)

    def close(self) -> None:
        """Close the idle connections; those lent are closed when they come back."""
        self._is_closed = True
        while True:
            try:
                self._idle.get_nowait().close()
            except queue.Empty:
                return

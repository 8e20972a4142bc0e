"""SQLite connections: one writer that shares its commits, and a pool of readers.

Concurrent writers each waiting for their own fsync would give a few hundred commits a second. Here every write of the
process is a small function, and all waiting ones run inside one BEGIN IMMEDIATE and one commit (group commit). A
function that raises undoes only its own changes (a savepoint); the others are committed.

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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from store.errors import DiskFull, StoreBusy, StoreError, StoreUnavailable

log = logging.getLogger(__name__)

#: Maximum number of writes in one commit; bounds how long the lock is held.
MAX_WRITES_PER_COMMIT = 128
#: Pause between two attempts to get the write lock.
LOCK_POLL_SECONDS = 0.0005


def database_error(error: sqlite3.Error, database: Path) -> StoreError:
    """Translate an error of SQLite into one that tells the cure."""
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
        # FULL: a commit is on disk before it returns; NORMAL may lose the last ones in a power cut.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error as error:
        raise database_error(error, database) from error
    return connection


class Transaction:
    """The argument of a write function: the connection, and what else belongs to the commit."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        #: Folders to sync before the commit.
        self.folders_to_sync: set[Path] = set()
        #: Images that this transaction published; undone if it is not committed.
        self.published: list[str] = []

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        """Run one statement."""
        return self.connection.execute(sql, parameters)


T = TypeVar("T")
WriteFunction = Callable[[Transaction], T]


class _PendingWrite:
    """A write that waits, and its result."""

    __slots__ = ("failure", "has_savepoint", "is_done", "result", "wakeup", "write")

    def __init__(self, write: WriteFunction[Any], has_savepoint: bool) -> None:
        self.write = write
        self.has_savepoint = has_savepoint
        self.result: Any = None
        self.failure: Exception | None = None
        self.is_done = False
        #: Released when the write is done or its thread becomes the leader. An Event costs three times as much.
        self.wakeup = threading.Lock()
        self.wakeup.acquire()


class Writer:
    """Runs all writes of the process, one thread at a time.

    The first thread that comes is the leader: it runs its own write and all waiting ones in one commit, wakes their
    threads, and makes one of the threads that have come since the next leader. Compared with a dedicated writer thread
    this saves two thread switches for a single write, and one for each write in a group.

    :param before_commit: called with the transaction before each commit (makes folder entries durable).
    :param undo: called under the lock with a transaction that was rolled back, to delete what it published.
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

    def run(self, write: WriteFunction[T], *, has_savepoint: bool = True) -> T:
        """Run a write and return its result when it is durable.

        :param has_savepoint: False saves two statements; for a function whose last statement is the only changing one.
        :raises StoreError: or what the function raises.
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
        return cast("T", entry.result)

    def execute(self, sql: str, parameters: Any = ()) -> int:
        """Run one statement as a write. :return: how many rows it changed."""
        return self.run(lambda transaction: transaction.execute(sql, parameters).rowcount)

    def run_in_steps(self, write: WriteFunction[int], *, rows_per_commit: int) -> int:
        """Run a write repeatedly, each time in a commit of its own, until it changes fewer rows than it may.

        :param write: changes at most `rows_per_commit` rows and returns how many.
        :return: how many rows it changed in all.
        """
        total = 0
        while True:
            changed = self.run(write)
            total += changed
            if changed < rows_per_commit:
                return total

    def execute_in_steps(self, sql: str, parameters: Mapping[str, Any], *, rows_per_commit: int) -> int:
        """Run a statement in small commits, see `run_in_steps`. :param sql: has a `LIMIT :rows_per_commit`."""
        values = {**parameters, "rows_per_commit": rows_per_commit}
        return self.run_in_steps(
            lambda transaction: transaction.execute(sql, values).rowcount, rows_per_commit=rows_per_commit
        )

    def close(self) -> None:
        """Reject new writes, commit the waiting ones, and close the connection."""
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
        """Commit the waiting writes, the caller's own among them, and pass the leadership on."""
        with self._lock:
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_WRITES_PER_COMMIT))]
        try:
            if self._connection is None:
                self._connection = connect(self._database, busy_seconds=0)  # see _begin
            self._commit(self._connection, batch)
        except BaseException as error:
            failure = error if isinstance(error, Exception) else StoreUnavailable("The process is being stopped.")
            if isinstance(error, sqlite3.Error):
                failure = database_error(error, self._database)
                failure.__cause__ = error
            for entry in batch:
                entry.result, entry.failure = None, failure
            if self._connection is not None and not isinstance(failure, StoreBusy):
                # A new one next time: the file may have been replaced or remounted meanwhile.
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
                        known = database_error(error, self._database)
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
        """Get the write lock. Another process holds it for some milliseconds at most.

        SQLite's own busy handler sleeps longer from attempt to attempt, up to a tenth of a second, and so starves a
        process while another one writes continuously (measured with two server processes: a 99th percentile of 1.5 s).
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
            log.exception("could not delete images of a write that failed; the next purge will")
        transaction.published = kept

    def _undo_publishing_after_rollback(self, connection: sqlite3.Connection, transaction: Transaction) -> None:
        """Delete published images after the rollback, under a new lock: another request may refer to them by now."""
        try:
            self._begin(connection)
            self._undo_publishing(transaction, 0)
            connection.execute("ROLLBACK")
        except sqlite3.Error:
            log.exception("could not delete images of a write that failed; the next purge will")


class ReaderPool:
    """Connections for reading, each used by one thread at a time."""

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
            raise database_error(error, self._database) from error
        except BaseException:
            self._return(connection)
            raise
        self._return(connection)

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection whose reads all see the same state. :raises StoreError:"""
        with self.connection() as connection:
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                connection.execute("ROLLBACK")

    def _return(self, connection: sqlite3.Connection) -> None:
        if self._is_closed:
            connection.close()
        else:
            self._idle.put(connection)

    def close(self) -> None:
        """Close the idle connections; the others are closed when they are returned."""
        self._is_closed = True
        while True:
            try:
                self._idle.get_nowait().close()
            except queue.Empty:
                return

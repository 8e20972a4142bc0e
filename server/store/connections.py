"""SQLite connections: one writer that shares its commits, and a pool of readers.

Concurrent writers each waiting for their own fsync would give a few hundred commits a second. Here every write of the
process is a small function handed to one thread, which runs all those that wait inside one BEGIN IMMEDIATE and one
commit. A function that raises takes only its own changes back (a savepoint); its neighbours are committed.

Weakness: SQLite has one writer for the whole file. Several processes on one home take turns, polling for the lock.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from provider_image.errors import DiskFull, StoreBusy, StoreError, StoreUnavailable

log = logging.getLogger(__name__)

#: Writes that share a commit at most; bounds how long the lock is held.
MOST_IN_A_COMMIT = 128
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


Write = Callable[[Transaction], Any]
_STOP = None


class Writer:
    """The one thread that writes.

    :param before_commit: called with the transaction before each commit (makes folder entries durable).
    :param undo: called with the transaction, the lock still held, when it will not be committed.
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
        self._waiting: queue.SimpleQueue[tuple[Write, Future[Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._start_lock = threading.Lock()
        self._is_closed = False

    def run(self, write: Write) -> Any:
        """Run a write and return its result when it is durable. :raises StoreError: and what the function raises."""
        future: Future[Any] = Future()
        with self._start_lock:
            if self._is_closed:
                raise StoreUnavailable("The store is closed.")
            if self._thread is None:
                # Started with the first write, so that a process that forks after importing has no dead thread.
                self._thread = threading.Thread(target=self._loop, name="store-writer", daemon=True)
                self._thread.start()
            self._waiting.put((write, future))
        return future.result()

    def close(self) -> None:
        """Commit what waits and end the thread."""
        with self._start_lock:
            self._is_closed = True
            thread = self._thread
            self._waiting.put(_STOP)
        if thread is not None:
            thread.join()

    def _loop(self) -> None:
        connection: sqlite3.Connection | None = None
        stopping = False
        while not stopping:
            batch: list[tuple[Write, Future[Any]]] = []
            entry = self._waiting.get()
            while entry is not _STOP:
                batch.append(entry)
                if len(batch) == MOST_IN_A_COMMIT:
                    break
                try:
                    entry = self._waiting.get_nowait()
                except queue.Empty:
                    break
            else:
                stopping = True
            if not batch:
                continue
            try:
                if connection is None:
                    connection = connect(self._database, busy_seconds=self._busy_seconds)
                self._commit(connection, batch)
            except Exception as error:  # noqa: BLE001 - the thread must outlive any failure; each waiter gets it
                failure: Exception = error
                if isinstance(error, sqlite3.Error):
                    failure = as_store_error(error, self._database)
                    failure.__cause__ = error
                for _, future in batch:
                    if not future.done():
                        future.set_exception(failure)
                if connection is not None and not isinstance(failure, StoreBusy):
                    # A fresh one next time: the file may have been replaced or remounted meanwhile.
                    connection.close()
                    connection = None
        if connection is not None:
            connection.close()

    def _commit(self, connection: sqlite3.Connection, batch: list[tuple[Write, Future[Any]]]) -> None:
        outcomes: list[tuple[Future[Any], Any, Exception | None]] = []
        self._begin(connection)
        transaction = Transaction(connection)
        try:
            for write, future in batch:
                published_before = len(transaction.published)
                connection.execute("SAVEPOINT one_write")
                try:
                    result = write(transaction)
                except Exception as error:
                    if not connection.in_transaction:
                        raise
                    connection.execute("ROLLBACK TO one_write")
                    self._take_back(transaction, published_before)
                    if isinstance(error, sqlite3.Error):
                        known = as_store_error(error, self._database)
                        known.__cause__ = error
                        error = known
                    outcomes.append((future, None, error))
                else:
                    outcomes.append((future, result, None))
                connection.execute("RELEASE one_write")
            self._before_commit(transaction)
            connection.execute("COMMIT")
        except BaseException:
            # The lock is still held unless SQLite has rolled back by itself, so nobody can have begun to refer to
            # a picture that is taken away here. In that other case the sweep for unreferred pictures gets it.
            if connection.in_transaction:
                self._take_back(transaction, 0)
                connection.execute("ROLLBACK")
            raise
        for future, result, failure in outcomes:
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)

    def _begin(self, connection: sqlite3.Connection) -> None:
        """Take the write lock. Another process holds it for some milliseconds at most.

        SQLite's own busy handler sleeps longer from try to try, up to a tenth of a second, and so starves a process
        whose neighbour writes all the time (measured with two server processes: a 99th percentile of 1.5 s).
        """
        deadline = time.monotonic() + self._busy_seconds
        connection.execute("PRAGMA busy_timeout = 0")
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
                break
            except sqlite3.OperationalError as error:
                if (error.sqlite_errorcode & 0xFF) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(LOCK_POLL_SECONDS)

    def _take_back(self, transaction: Transaction, keep: int) -> None:
        kept, transaction.published = transaction.published[:keep], transaction.published[keep:]
        try:
            self._undo(transaction)
        except OSError:
            log.exception("could not remove pictures of a write that failed; the next sweep will")
        transaction.published = kept


class Readers:
    """Connections for reading, lent to one thread at a time."""

    def __init__(self, database: Path, *, busy_seconds: float) -> None:
        self._database = database
        self._busy_seconds = busy_seconds
        self._idle: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()
        self._is_closed = False

    @contextlib.contextmanager
    def lend(self) -> Iterator[sqlite3.Connection]:
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
            self._give_back(connection)
            raise
        self._give_back(connection)

    def _give_back(self, connection: sqlite3.Connection) -> None:
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

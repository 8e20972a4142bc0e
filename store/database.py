"""The database of a home: an SQLite file with one writer that shares its commits, and connections for reading.

Concurrent writers each waiting for their own fsync would give a few hundred commits a second. Here every write of the
process is a small function, and all waiting ones run inside one BEGIN IMMEDIATE and one commit (group commit). A
function that raises undoes only its own changes (a savepoint); the others are committed.

Weakness: SQLite has one writer for the whole file. Several processes on one home take turns, polling for the lock.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import itertools
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from store.errors import DiskFull, StoreBusy, StoreError, StoreUnavailable
from store.images import ImageStore, StagedImage, is_needed
from store.rows import from_row

log = logging.getLogger(__name__)

#: Maximum number of writes in one commit; bounds how long the lock is held.
MAX_WRITES_PER_COMMIT = 128
#: Pause between two attempts to get the write lock.
LOCK_POLL_SECONDS = 0.0005
#: Files that are deleted while the write lock is held once.
FILES_PER_LOCK = 16
#: The longest pause between two commits of a write in steps, and of one in the background.
MAX_STEP_PAUSE_SECONDS = 0.1
MAX_BACKGROUND_PAUSE_SECONDS = 1.0
#: How many times as long as a commit in the background the pause after it is.
BACKGROUND_PAUSE_FACTOR = 3.0
#: How long the statements of one step shall take, and the fewest rows that it may change.
STEP_SECONDS = 0.005
MIN_ROWS_PER_COMMIT = 10


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


def _try_begin(connection: sqlite3.Connection, *, is_last: bool = False) -> bool:
    """Take the write lock. :return: False if another process has it, unless this is the last try, which raises."""
    try:
        connection.execute("BEGIN IMMEDIATE")
        return True
    except sqlite3.OperationalError as error:
        if is_last or (error.sqlite_errorcode & 0xFF) != sqlite3.SQLITE_BUSY:
            raise
        return False


class Transaction:
    """The argument of a write function: the connection, and the images that belong to the commit."""

    def __init__(self, connection: sqlite3.Connection, images: ImageStore) -> None:
        self.connection = connection
        self._images = images
        self._published: list[str] = []
        self._unneeded: set[str] = set()

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        """Run one statement."""
        return self.connection.execute(sql, parameters)

    def execute_many(self, sql: str, parameters: Sequence[Any]) -> None:
        """Run one statement for each of these parameters."""
        if parameters:
            self.connection.executemany(sql, parameters)

    def publish(self, staged: StagedImage) -> None:
        """Give a staged image and its other inputs their final names, which they lose if the write is not committed."""
        for each in (staged, *staged.others.values()):
            self._images.publish(each)
            self._published.append(each.sha256)

    def read_file(self, sha256: str) -> bytes:
        """Read a published file. :raises FileNotFoundError:"""
        return self._images.read(sha256)

    def count_published(self) -> int:
        """Count the images that were published so far."""
        return len(self._published)

    def sync_published(self) -> None:
        """Make the names of published images durable."""
        if self._published:
            self._images.sync()

    def delete_files(self, digests: Iterable[str]) -> None:
        """Delete files after the commit, except those that a request needs then.

        A crash in between leaves files that no request needs, which a purge finds; never a request without its files.
        """
        self._unneeded.update(digests)

    def take_unneeded(self) -> list[str]:
        """Take some of the files that are to be deleted; empty when none is left."""
        return [self._unneeded.pop() for _ in range(min(len(self._unneeded), FILES_PER_LOCK))]

    def unpublish(self, keep: int = 0) -> None:
        """Delete the images that were published after the first `keep`, unless a request needs them."""
        self._published, undone = self._published[:keep], self._published[keep:]
        try:
            for sha256 in undone:
                if not is_needed(self.connection, sha256):
                    self._images.delete(sha256)
        except OSError:
            log.exception("could not delete images of a write that failed; the next purge will")


T = TypeVar("T")
WriteFunction = Callable[[Transaction], T]
#: Changes at most as many rows as the second argument says, and returns how many.
StepFunction = Callable[[Transaction, int], int]


class _PendingWrite:
    """A write that waits, and its result."""

    __slots__ = ("failure", "is_done", "result", "wakeup", "write")

    def __init__(self, write: WriteFunction[Any]) -> None:
        self.write = write
        self.result: Any = None
        self.failure: Exception | None = None
        self.is_done = False
        #: Released when the write is done or its thread becomes the leader. An Event costs three times as much.
        self.wakeup = threading.Lock()
        self.wakeup.acquire()


def _next_rows(rows: int, seconds: float, most: int) -> int:
    """Tell how many rows the next step may change. :param seconds: that the statements took for `rows` rows."""
    # At most twice as many: one step may have been fast because its rows were small.
    wanted = 2 * rows if seconds <= STEP_SECONDS / 2 else int(rows * STEP_SECONDS / seconds)
    return min(max(wanted, MIN_ROWS_PER_COMMIT), most)


class Database:
    """Runs the reads and writes of one process.

    Writes run one thread at a time. The first thread that comes is the leader: it runs its own write and all waiting
    ones in one commit, wakes their threads, and makes one of the threads that have come since the next leader. Compared
    with a dedicated writer thread this saves two thread switches for a single write, and one for each write in a group.

    Reads run at the same time, each thread with a connection of its own.
    """

    def __init__(self, path: Path, images: ImageStore, *, busy_seconds: float) -> None:
        self.path = path
        self._waiting_file = path.with_name(f"{path.name}-waiting")
        self._images = images
        self._busy_seconds = busy_seconds
        self._lock = threading.Lock()
        self._waiting: collections.deque[_PendingWrite] = collections.deque()
        self._has_leader = False
        self._is_closed = False
        self._background_ends = threading.Event()
        self._write_connection: sqlite3.Connection | None = None
        self._idle_readers: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()

    # Reading

    @contextlib.contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection for reading. :raises StoreError: the database cannot be opened or read."""
        if self._is_closed:
            raise StoreUnavailable("The store is closed.")
        try:
            connection = self._idle_readers.get_nowait()
        except queue.Empty:
            connection = connect(self.path, busy_seconds=self._busy_seconds)
            connection.execute("PRAGMA query_only = ON")
        try:
            yield connection
        except sqlite3.Error as error:
            connection.close()
            raise database_error(error, self.path) from error
        except BaseException:
            self._return(connection)
            raise
        self._return(connection)

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection whose reads all see the same state. :raises StoreError:"""
        with self.read() as connection:
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                connection.execute("ROLLBACK")

    def rows(self, sql: str, parameters: Any = ()) -> list[Any]:
        """Read all rows of one statement. :raises StoreError:"""
        with self.read() as connection:
            return connection.execute(sql, parameters).fetchall()

    def records(self, record: type[T], sql: str, parameters: Any = ()) -> list[T]:
        """Read all rows of one statement as records. :raises StoreError:"""
        return [from_row(record, row) for row in self.rows(sql, parameters)]

    def row(self, sql: str, parameters: Any = ()) -> Any:
        """Read the first row of one statement; None if there is none. :raises StoreError:"""
        with self.read() as connection:
            return connection.execute(sql, parameters).fetchone()

    def _return(self, connection: sqlite3.Connection) -> None:
        if self._is_closed:
            connection.close()
        else:
            self._idle_readers.put(connection)

    # Writing

    def write(self, write: WriteFunction[T]) -> T:
        """Run a write and return its result when it is durable. :raises StoreError: or what the function raises."""
        entry = _PendingWrite(write)
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
        return self.write(lambda transaction: transaction.execute(sql, parameters).rowcount)

    def write_in_steps(self, write: StepFunction, *, rows_per_commit: int, is_background: bool = False) -> int:
        """Run a write repeatedly, each time in a commit of its own, until it changes fewer rows than it may.

        How many it may change follows from how long its statements took the last time, without the flush of the disk:
        fewer rows would not make that shorter.

        :param rows_per_commit: the most that one commit changes.
        :param is_background: see `write_each`.
        :return: how many rows it changed in all.
        """
        rows, seconds, total = rows_per_commit, 0.0, 0

        def step(transaction: Transaction) -> int:
            nonlocal seconds
            started = time.monotonic()
            changed = write(transaction, rows)
            seconds = time.monotonic() - started
            return changed

        for changed in self.write_each(itertools.repeat(step), is_background=is_background):
            total += changed
            if changed < rows:
                break
            rows = _next_rows(rows, seconds, rows_per_commit)
        return total

    def write_each(self, writes: Iterable[WriteFunction[T]], *, is_background: bool = False) -> Iterator[T]:
        """Run writes, each in a commit of its own. Between them others that wait have the lock as long as each took.

        :param is_background: leave it for three times that long in any case, so that those who come in that time need
            not wait, and uploads and webhooks have most of the disk and of the processor; and end at `end_background`.
        """
        factor, longest = 1.0, MAX_STEP_PAUSE_SECONDS
        if is_background:
            factor, longest = BACKGROUND_PAUSE_FACTOR, MAX_BACKGROUND_PAUSE_SECONDS
        pause = 0.0
        for write in writes:
            if is_background:
                if self._background_ends.wait(pause):
                    return
            elif pause and self._is_awaited():
                time.sleep(pause)
            started = time.monotonic()
            yield self.write(write)
            pause = min(factor * (time.monotonic() - started), longest)

    def end_background(self) -> None:
        """Begin no more steps in the background, in this process. What is left to do is found the next time."""
        self._background_ends.set()

    def _is_awaited(self) -> bool:
        """Tell whether another thread or process wants to write now."""
        if self._has_leader:
            return True
        try:
            with self._lock_of_waiting(fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
        except OSError:
            return True  # others hold it, or cannot say that they wait

    @contextlib.contextmanager
    def _lock_of_waiting(self, kind: int) -> Iterator[None]:
        """Hold the lock on a file that those share who wait for the write lock: SQLite does not tell of them.

        :raises OSError: for example because others hold it.
        """
        descriptor = os.open(self._waiting_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(descriptor, kind)
            yield
        finally:
            os.close(descriptor)

    def execute_in_steps(
        self, sql: str, parameters: Mapping[str, Any], *, rows_per_commit: int, is_background: bool = False
    ) -> int:
        """Run a statement in small commits, see `write_in_steps`. :param sql: has a `LIMIT :rows_per_commit`."""
        return self.write_in_steps(
            lambda transaction, rows: transaction.execute(sql, {**parameters, "rows_per_commit": rows}).rowcount,
            rows_per_commit=rows_per_commit,
            is_background=is_background,
        )

    def close(self) -> None:
        """Reject new reads and writes, commit the waiting writes, and close the connections.

        A connection that is lent at that moment is closed when it is returned.
        """
        with self._lock:
            self._is_closed = True
        while True:
            with self._lock:
                if not self._has_leader:
                    break
            time.sleep(LOCK_POLL_SECONDS)
        if self._write_connection is not None:
            self._write_connection.close()
            self._write_connection = None
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle_readers.get_nowait().close()

    def _run_group_commit(self) -> None:
        """Commit the waiting writes, the caller's own among them, and pass the leadership on."""
        with self._lock:
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_WRITES_PER_COMMIT))]
        try:
            if self._write_connection is None:
                self._write_connection = connect(self.path, busy_seconds=0)  # see _begin
            self._commit(self._write_connection, batch)
        except BaseException as error:
            failure = error if isinstance(error, Exception) else StoreUnavailable("The process is being stopped.")
            if isinstance(error, sqlite3.Error):
                failure = database_error(error, self.path)
                failure.__cause__ = error
            for entry in batch:
                entry.result, entry.failure = None, failure
            if self._write_connection is not None and not isinstance(failure, StoreBusy):
                # A new one next time: the file may have been replaced or remounted meanwhile.
                self._write_connection.close()
                self._write_connection = None
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
        transaction = Transaction(connection, self._images)
        try:
            for entry in batch:
                published_before = transaction.count_published()
                connection.execute("SAVEPOINT one_write")
                try:
                    entry.result = entry.write(transaction)
                except Exception as error:
                    if not connection.in_transaction:
                        raise
                    connection.execute("ROLLBACK TO one_write")
                    transaction.unpublish(keep=published_before)
                    if isinstance(error, sqlite3.Error):
                        known = database_error(error, self.path)
                        known.__cause__ = error
                        error = known
                    entry.failure = error
                connection.execute("RELEASE one_write")
            transaction.sync_published()
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if transaction.count_published():
                self._unpublish_after_rollback(connection, transaction)
            raise
        self._delete_unneeded(connection, transaction)

    def _delete_unneeded(self, connection: sqlite3.Connection, transaction: Transaction) -> None:
        """Delete files after the commit, under new locks: another request may refer to them by now."""
        try:
            while digests := transaction.take_unneeded():
                self._begin(connection)
                try:
                    for sha256 in digests:
                        if not is_needed(connection, sha256):
                            self._images.delete(sha256)
                finally:
                    connection.execute("ROLLBACK")
        except (sqlite3.Error, OSError):
            # What was asked for is committed.
            log.exception("could not delete files that no request needs; the next purge will")

    def _begin(self, connection: sqlite3.Connection) -> None:
        """Get the write lock. Another process holds it for some milliseconds at most.

        SQLite's own busy handler sleeps longer from attempt to attempt, up to a tenth of a second, and so starves a
        process while another one writes continuously (measured with two server processes: a 99th percentile of 1.5 s).
        """
        if _try_begin(connection):
            return
        deadline = time.monotonic() + self._busy_seconds
        with contextlib.ExitStack() as waiting:
            with contextlib.suppress(OSError):  # then those that write in steps may not notice it, and it waits longer
                waiting.enter_context(self._lock_of_waiting(fcntl.LOCK_SH))
            while not _try_begin(connection, is_last=time.monotonic() > deadline):
                time.sleep(LOCK_POLL_SECONDS)

    def _unpublish_after_rollback(self, connection: sqlite3.Connection, transaction: Transaction) -> None:
        """Delete published images after the rollback, under a new lock: another request may refer to them by now."""
        try:
            self._begin(connection)
            transaction.unpublish()
            connection.execute("ROLLBACK")
        except sqlite3.Error:
            log.exception("could not delete images of a write that failed; the next purge will")

"""The composed store: one SQLite database (WAL, synchronous=FULL) for all records, and images as files beside it.

Made by `cli/open_store.py` and `server/process.py`; used by the server, the batcher and the commands. Each base class
is one noun with the statements, records and rules of its tables; this file has only the start and the end.

Weaknesses: one machine only, and one writer at a time for all processes. Good for thousands of requests a second on
one disk; beyond that it needs a database server.
"""

from __future__ import annotations

import sqlite3
import time

import sqlite_utils

from store.batches import Batches
from store.changes import ChangeFeed
from store.chunks import Chunks
from store.controls import Controls
from store.database import ReaderPool, Transaction, Writer, connect, database_error
from store.errors import StoreUnavailable
from store.idempotency import Idempotency
from store.images import ImageStore, as_store_error, is_referenced, sync_folder
from store.keys import Keys
from store.ledger import Ledger
from store.migrations import migrate
from store.providers import Providers
from store.requests import Requests
from store.retention import Retention
from store.search import Search
from store.settings import HomeSettings
from store.stats import Stats
from store.webhooks import Webhooks


class SqliteStore(
    Requests,
    Batches,
    Search,
    Chunks,
    Ledger,
    Providers,
    Keys,
    Stats,
    Idempotency,
    Controls,
    Retention,
    ChangeFeed,
    Webhooks,
):
    """All parts of the store on one home.

    May be used from any thread, and by several processes at once.
    """

    def __init__(self, settings: HomeSettings) -> None:
        self._home = settings.home
        self._database = settings.database
        self._busy_seconds = settings.busy_seconds
        self.images = ImageStore(settings.images)
        self._readers = ReaderPool(self._database, busy_seconds=settings.busy_seconds)
        self._writer = Writer(
            self._database,
            busy_seconds=settings.busy_seconds,
            before_commit=self._sync_folders,
            undo=self._unpublish,
        )

    def migrate(self) -> list[str]:
        """Create the home if necessary and bring the database to the current schema.

        :return: the names of the steps applied now.
        :raises StoreUnavailable: the home cannot be written.
        :raises ConfigError: the database was made by a newer mlg.
        """
        try:
            self._home.mkdir(parents=True, exist_ok=True, mode=0o750)
        except OSError as error:
            raise as_store_error(error, self._home) from error
        self.images.create()
        connection = connect(self._database, busy_seconds=max(self._busy_seconds, 30.0))
        try:
            self._switch_to_wal(connection)
            connection.execute("BEGIN IMMEDIATE")
            applied = migrate(sqlite_utils.Database(connection))
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise database_error(error, self._database) from error
        finally:
            connection.close()
        return applied

    @staticmethod
    def _switch_to_wal(connection: sqlite3.Connection) -> None:
        # The switch needs the file exclusively and ignores the busy timeout: processes that start at once take turns.
        deadline = time.monotonic() + 30.0
        while True:
            try:
                mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
                break
            except sqlite3.OperationalError as error:
                if (error.sqlite_errorcode & 0xFF) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        if mode != "wal":
            raise StoreUnavailable(
                f"SQLite cannot use a write-ahead log here (journal mode {mode}). Put the home on a local disk."
            )

    def check(self) -> None:
        """Check that the store can be written. :raises StoreError:"""
        self._writer.execute("UPDATE batchers SET seen_at = seen_at WHERE 0")
        if not self.images.folder.is_dir():
            raise StoreUnavailable(f"The folder {self.images.folder} does not exist.")

    def close(self) -> None:
        """Commit pending writes and close every connection."""
        self._writer.close()
        self._readers.close()

    def _sync_folders(self, transaction: Transaction) -> None:
        try:
            for folder in transaction.folders_to_sync:
                sync_folder(folder)
        except OSError as error:
            raise as_store_error(error, self.images.folder) from error

    def _unpublish(self, transaction: Transaction) -> None:
        for sha256 in transaction.published:
            if not is_referenced(transaction, sha256):
                self.images.delete(sha256)

    def __repr__(self) -> str:
        return f"SqliteStore({str(self._database)!r})"

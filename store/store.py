"""The store: one SQLite database (WAL, synchronous=FULL) for all records, and images as files beside it.

Made by `cli/open_store.py` and `server/process.py`; used by the server, the batcher and the commands. Each part is one
noun with the statements, records and rules of its tables; this file has only the start and the end.

Weaknesses: one machine only, and one writer at a time for all processes. Good for thousands of requests a second on
one disk; beyond that it needs a database server.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time

import sqlite_utils

from store.batches import Batches
from store.changes import Changes
from store.chunks import Chunks
from store.clients.idempotency import Idempotency
from store.clients.keys import Keys
from store.clients.usage import Usage
from store.clients.webhooks import Webhooks
from store.collections.collections import Collections
from store.database import Database, connect, database_error
from store.errors import StoreUnavailable
from store.images import ImageStore, as_store_error
from store.migrations import migrate
from store.pipelines.pipelines import Pipelines
from store.processes.batchers import Batchers
from store.processes.controls import Controls
from store.processes.lease_clock import LeaseClock
from store.processes.progress import Progress
from store.rentals.decisions import Decisions
from store.rentals.ledger import Ledger
from store.rentals.providers import Providers
from store.rentals.reservations import Reservations
from store.requests import Requests
from store.retention import Retention
from store.search import Search
from store.settings import HomeSettings
from store.stats import Stats
from store.trainings.trainings import Trainings


class Store:
    """All parts of the store on one home.

    May be used from any thread, and by several processes at once.
    """

    def __init__(self, settings: HomeSettings) -> None:
        self._settings = settings
        self.images = ImageStore(settings.images)
        self.database = Database(settings.database, self.images, busy_seconds=settings.busy_seconds)
        self.requests = Requests(self.database, self.images)
        self.lease_clock = LeaseClock(self.database)
        self.batches = Batches(self.database, self.images)
        self.pipelines = Pipelines(self.database, self.requests)
        self.search = Search(self.database)
        self.chunks = Chunks(self.database)
        self.batchers = Batchers(self.database)
        self.ledger = Ledger(self.database)
        self.reservations = Reservations(self.database)
        self.decisions = Decisions(self.database)
        self.providers = Providers(self.database)
        self.keys = Keys(self.database)
        self.usage = Usage(self.database)
        self.stats = Stats(self.database)
        self.idempotency = Idempotency(self.database)
        self.controls = Controls(self.database)
        self.changes = Changes(self.database)
        self.progress = Progress(self.database)
        self.webhooks = Webhooks(self.database)
        self.collections = Collections(self.database, settings.collections)
        self.trainings = Trainings(self.database, settings.home / "trainings")
        self.retention = Retention(
            self.database,
            self.images,
            self.batches,
            self.changes,
            self.webhooks,
            self.idempotency,
            self.providers,
            self.collections,
            self.trainings,
            self.usage,
        )

    def migrate(self) -> list[str]:
        """Create the home if necessary and bring the database to the current schema.

        :return: the names of the steps applied now.
        :raises StoreUnavailable: the home cannot be written.
        :raises ConfigError: the database was made by a newer mlg.
        """
        try:
            self._settings.home.mkdir(parents=True, exist_ok=True, mode=0o750)
            with contextlib.suppress(FileExistsError):
                # SQLite would let everybody read it, and takes its mode for the files beside it. A home that was there
                # before may be open to all users.
                os.close(os.open(self.database.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640))
        except OSError as error:
            raise as_store_error(error, self._settings.home) from error
        self.images.create()
        connection = connect(self.database.path, busy_seconds=max(self._settings.busy_seconds, 30.0))
        try:
            self._switch_to_wal(connection)
            connection.execute("BEGIN IMMEDIATE")
            applied = migrate(sqlite_utils.Database(connection))
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise database_error(error, self.database.path) from error
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
        self.database.execute("UPDATE batchers SET seen_at = seen_at WHERE 0")
        if not self.images.folder.is_dir():
            raise StoreUnavailable(f"The folder {self.images.folder} does not exist.")

    def close(self) -> None:
        """Commit pending writes and close every connection."""
        self.idempotency.close()
        self.trainings.close()
        self.database.close()

    def __repr__(self) -> str:
        return f"Store({str(self.database.path)!r})"

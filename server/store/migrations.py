"""Brings a database to the present schema, one numbered step after the other.

A step is never edited once released: a later change is a later step. All pending steps run inside one BEGIN IMMEDIATE,
so that any number of processes may start at once on an empty home.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import sqlite_utils

from provider_image.errors import ConfigError
from server.store.records import State, to_text

Step = Callable[[sqlite_utils.Database], None]


def m001_requests(db: sqlite_utils.Database) -> None:
    """The requests and their queue. States and the times that go with them are checked by the table itself."""
    states = ", ".join(f"'{state}'" for state in State)
    final = ", ".join(f"'{state}'" for state in State if state.is_final)
    db.execute(
        f"""
        CREATE TABLE requests (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            service TEXT NOT NULL,
            model TEXT NOT NULL,
            params TEXT NOT NULL DEFAULT '{{}}',
            name TEXT,
            image_sha256 TEXT NOT NULL CHECK (length(image_sha256) = 64),
            image_bytes INTEGER NOT NULL CHECK (image_bytes > 0),
            state TEXT NOT NULL CHECK (state IN ({states})),
            token INTEGER NOT NULL DEFAULT 0,
            attempts INTEGER NOT NULL DEFAULT 0,
            isolation INTEGER NOT NULL DEFAULT 0,
            is_fresh INTEGER NOT NULL DEFAULT 0,
            is_cached INTEGER NOT NULL DEFAULT 0,
            created_at TEXT NOT NULL,
            due_at TEXT NOT NULL,
            claimed_at TEXT,
            lease_ends_at TEXT,
            finished_at TEXT,
            image_deleted_at TEXT,
            chunk_id TEXT,
            provider TEXT,
            digest TEXT,
            seconds REAL,
            output TEXT,
            code TEXT,
            reason TEXT,
            CHECK ((state = 'claimed') = (lease_ends_at IS NOT NULL)),
            CHECK ((state IN ({final})) = (finished_at IS NOT NULL)),
            CHECK ((state = 'done') = (output IS NOT NULL)),
            CHECK (state != 'done' OR digest IS NOT NULL),
            CHECK (state != 'failed' OR reason IS NOT NULL)
        )
        """
    )
    # The queue: partial, so that it stays small however many answers are kept.
    db.execute("CREATE INDEX requests_queued ON requests (model, number, service) WHERE state = 'queued'")
    # What was claimed before does not wait for a full chunk again.
    db.execute(
        "CREATE INDEX requests_again ON requests (model, due_at) WHERE state = 'queued' AND claimed_at IS NOT NULL"
    )
    db.execute("CREATE INDEX requests_claimed ON requests (lease_ends_at, model) WHERE state = 'claimed'")
    db.execute("CREATE INDEX requests_failed ON requests (number) WHERE state = 'failed'")
    db.execute("CREATE INDEX requests_cancelled ON requests (number) WHERE state = 'cancelled'")
    db.execute("CREATE INDEX requests_finished ON requests (finished_at) WHERE finished_at IS NOT NULL")
    # Equal pictures: for earlier answers, and for whether a file is still referred to.
    db.execute("CREATE INDEX requests_image ON requests (image_sha256, model)")


def m002_journal(db: sqlite_utils.Database) -> None:
    """One row per dispatch, and who is alive."""
    chunks = db["chunks"]
    assert isinstance(chunks, sqlite_utils.db.Table)
    chunks.create(
        {
            "id": str,
            "batcher_id": str,
            "executor": str,
            "provider": str,
            "service": str,
            "model": str,
            "items": int,
            "bytes_sent": int,
            "bytes_received": int,
            "dispatched_at": str,
            "finished_at": str,
            "seconds": float,
            "done": int,
            "failed": int,
            "cost": str,
            "code": str,
            "reason": str,
        },
        pk="id",
        not_null={"batcher_id", "executor", "service", "model", "items", "bytes_sent", "dispatched_at"},
    )
    chunks.create_index(["dispatched_at"])
    chunks.create_index(["model", "finished_at"])
    batchers = db["batchers"]
    assert isinstance(batchers, sqlite_utils.db.Table)
    batchers.create(
        {
            "id": str,
            "host": str,
            "pid": int,
            "executor": str,
            "every_seconds": float,
            "max_wait_seconds": float,
            "capacity": int,
            "started_at": str,
            "seen_at": str,
        },
        pk="id",
    )


STEPS: tuple[Step, ...] = (m001_requests, m002_journal)


def migrate(db: sqlite_utils.Database) -> list[str]:
    """Apply the pending steps. The caller has begun, and commits, the transaction.

    :return: the names of the steps applied now.
    :raises ConfigError: the database was made by a newer mlg.
    """
    db.execute("CREATE TABLE IF NOT EXISTS migrations (name TEXT PRIMARY KEY, applied_at TEXT NOT NULL)")
    applied = {name for (name,) in db.execute("SELECT name FROM migrations")}
    unknown = applied - {step.__name__ for step in STEPS}
    if unknown:
        raise ConfigError(
            f"This database was made by a newer mlg (it has {', '.join(sorted(unknown))}). Update mlg on this machine."
        )
    pending = [step for step in STEPS if step.__name__ not in applied]
    for step in pending:
        step(db)
        db.execute(
            "INSERT INTO migrations (name, applied_at) VALUES (?, ?)", [step.__name__, to_text(datetime.now(UTC))]
        )
    return [step.__name__ for step in pending]

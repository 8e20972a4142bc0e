"""Brings a database to the present schema, one numbered step after the other.

A step is never edited once released: a later change is a later step. All pending steps run inside one BEGIN IMMEDIATE,
so that any number of processes may start at once on an empty home.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import sqlite_utils

from provider_image.errors import ConfigError
from server.store.money import BillState
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


def m003_money(db: sqlite_utils.Database) -> None:
    """What the work costs, and what is known about those who do it. Amounts are decimal text: a REAL would round."""

    def amount(column: str) -> str:
        return f"{column} TEXT NOT NULL CHECK ({column} GLOB '[0-9]*' AND {column} NOT GLOB '*[^0-9.]*')"

    states = ", ".join(f"'{state}'" for state in BillState)
    # No foreign keys between these: an invoice may come before the agreement is noted, and it is money all the same.
    for statement in (
        f"""
        CREATE TABLE allocations (
            id TEXT PRIMARY KEY,
            batcher_id TEXT NOT NULL,
            platform TEXT NOT NULL,
            address TEXT NOT NULL,
            {amount("amount")},
            created_at TEXT NOT NULL,
            released_at TEXT
        )
        """,
        f"""
        CREATE TABLE agreements (
            id TEXT PRIMARY KEY,
            allocation_id TEXT NOT NULL,
            provider_id TEXT NOT NULL,
            provider_name TEXT NOT NULL,
            model TEXT NOT NULL,
            {amount("start_price")},
            {amount("price_per_cpu_second")},
            {amount("price_per_second")},
            created_at TEXT NOT NULL,
            ended_at TEXT,
            reason TEXT,
            CHECK (reason IS NULL OR ended_at IS NOT NULL)
        )
        """,
        """
        CREATE TABLE activities (
            id TEXT PRIMARY KEY,
            agreement_id TEXT NOT NULL,
            created_at TEXT NOT NULL,
            ended_at TEXT,
            cpu_seconds REAL,
            seconds REAL
        )
        """,
        f"""
        CREATE TABLE debit_notes (
            id TEXT PRIMARY KEY,
            activity_id TEXT NOT NULL,
            agreement_id TEXT NOT NULL,
            {amount("amount")},
            state TEXT NOT NULL CHECK (state IN ({states})),
            received_at TEXT NOT NULL
        )
        """,
        f"""
        CREATE TABLE invoices (
            id TEXT PRIMARY KEY,
            agreement_id TEXT NOT NULL,
            {amount("amount")},
            state TEXT NOT NULL CHECK (state IN ({states})),
            received_at TEXT NOT NULL,
            settled_at TEXT,
            reason TEXT,
            CHECK ((state = '{BillState.RECEIVED}') = (settled_at IS NULL))
        )
        """,
        f"""
        CREATE TABLE providers (
            id TEXT PRIMARY KEY,
            name TEXT NOT NULL,
            first_seen_at TEXT NOT NULL,
            seen_at TEXT NOT NULL,
            {amount("start_price")},
            {amount("price_per_cpu_second")},
            {amount("price_per_second")},
            done INTEGER NOT NULL DEFAULT 0,
            failed INTEGER NOT NULL DEFAULT 0,
            images INTEGER NOT NULL DEFAULT 0,
            score REAL NOT NULL CHECK (score BETWEEN 0 AND 1),
            banned_until TEXT,
            ban_reason TEXT,
            is_banned_by_operator INTEGER NOT NULL DEFAULT 0 CHECK (is_banned_by_operator IN (0, 1)),
            CHECK (ban_reason IS NOT NULL OR (banned_until IS NULL AND NOT is_banned_by_operator))
        )
        """,
        """
        CREATE TABLE provider_speeds (
            provider_id TEXT NOT NULL,
            model TEXT NOT NULL,
            images REAL NOT NULL CHECK (images > 0),
            seconds REAL NOT NULL CHECK (seconds > 0),
            measured_at TEXT NOT NULL,
            PRIMARY KEY (provider_id, model)
        )
        """,
        "CREATE INDEX allocations_open ON allocations (created_at) WHERE released_at IS NULL",
        "CREATE INDEX agreements_open ON agreements (created_at) WHERE ended_at IS NULL",
        "CREATE INDEX activities_agreement ON activities (agreement_id)",
        "CREATE INDEX debit_notes_agreement ON debit_notes (agreement_id)",
        "CREATE INDEX invoices_agreement ON invoices (agreement_id)",
        "CREATE INDEX invoices_paid ON invoices (settled_at) WHERE state = 'accepted'",
        "ALTER TABLE chunks ADD COLUMN agreement_id TEXT",
        "ALTER TABLE chunks ADD COLUMN activity_id TEXT",
        "ALTER TABLE chunks ADD COLUMN provider_id TEXT",
        "ALTER TABLE chunks ADD COLUMN answers INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE chunks ADD COLUMN is_cost_final INTEGER NOT NULL DEFAULT 0 CHECK (is_cost_final IN (0, 1))",
        "CREATE INDEX chunks_agreement ON chunks (agreement_id) WHERE agreement_id IS NOT NULL",
        # What has no bill yet: few, however long the history.
        "CREATE INDEX chunks_open ON chunks (agreement_id) WHERE agreement_id IS NOT NULL AND is_cost_final = 0",
        "ALTER TABLE requests ADD COLUMN share INTEGER",
        "ALTER TABLE batchers ADD COLUMN notices TEXT NOT NULL DEFAULT '{}'",
    ):
        db.execute(statement)


def m004_belonging(db: sqlite_utils.Database) -> None:
    """What a request belongs to: a batch, a key, the client's own id and labels, and how long its owner wants it."""
    for column in (
        "batch_id TEXT",
        "client_id TEXT",
        "labels TEXT NOT NULL DEFAULT '{}'",
        "key_id TEXT",
        "keep_seconds REAL CHECK (keep_seconds IS NULL OR keep_seconds >= 0)",
        "deadline_at TEXT",
    ):
        db.execute(f"ALTER TABLE requests ADD COLUMN {column}")
    db.execute("CREATE INDEX requests_batch ON requests (batch_id, number) WHERE batch_id IS NOT NULL")
    db.execute("CREATE INDEX requests_key ON requests (key_id, number) WHERE key_id IS NOT NULL")
    db.execute(
        "CREATE INDEX requests_deadline ON requests (deadline_at) WHERE deadline_at IS NOT NULL AND state = 'queued'"
    )
    db.execute("CREATE INDEX requests_keep ON requests (finished_at) WHERE keep_seconds IS NOT NULL")


STEPS: tuple[Step, ...] = (m001_requests, m002_journal, m003_money, m004_belonging)


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

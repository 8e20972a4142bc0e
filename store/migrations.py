"""Migrations: bring a database to the current schema, one numbered step after another.

`Store.migrate` calls it. A step is never edited once released: a later change is a later step, and the names of
the steps are stored in the database. All pending steps run inside one BEGIN IMMEDIATE, so that any number of processes
may start at once on an empty home.

"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal

import sqlite_utils

from provider_image.errors import ConfigError
from store.amounts import ZERO, to_amount, total
from store.clients.webhooks import host_of, new_secret
from store.rentals.ledger import BillState
from store.rows import to_text
from store.states import RequestState

Step = Callable[[sqlite_utils.Database], None]

#: Until when a finished request with its own retention time is kept, as `to_text` formats it; an index has this text.
KEEP_UNTIL_SQL = "strftime('%Y-%m-%dT%H:%M:%fZ', finished_at, keep_seconds || ' seconds')"


def m001_requests(db: sqlite_utils.Database) -> None:
    """Requests and their queue. The table itself checks states and the times that belong to them."""
    states = ", ".join(f"'{state}'" for state in RequestState)
    final = ", ".join(f"'{state}'" for state in RequestState if state.is_final)
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
    # Requests that were claimed before do not wait for a full chunk again.
    db.execute(
        "CREATE INDEX requests_again ON requests (model, due_at) WHERE state = 'queued' AND claimed_at IS NOT NULL"
    )
    db.execute("CREATE INDEX requests_claimed ON requests (lease_ends_at, model) WHERE state = 'claimed'")
    db.execute("CREATE INDEX requests_failed ON requests (number) WHERE state = 'failed'")
    db.execute("CREATE INDEX requests_cancelled ON requests (number) WHERE state = 'cancelled'")
    db.execute("CREATE INDEX requests_finished ON requests (finished_at) WHERE finished_at IS NOT NULL")
    # Equal images: for earlier answers, and for whether a file is still referenced.
    db.execute("CREATE INDEX requests_image ON requests (image_sha256, model)")


def m002_journal(db: sqlite_utils.Database) -> None:
    """One row for each chunk, and the batchers that are alive."""
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
    """The ledger and the providers. Amounts are decimal text: a REAL would round."""

    def amount(column: str) -> str:
        return f"{column} TEXT NOT NULL CHECK ({column} GLOB '[0-9]*' AND {column} NOT GLOB '*[^0-9.]*')"

    states = ", ".join(f"'{state}'" for state in BillState)
    # No foreign keys between these: an invoice may be recorded before its agreement.
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
        # Chunks without a decided invoice: few, however long the history.
        "CREATE INDEX chunks_open ON chunks (agreement_id) WHERE agreement_id IS NOT NULL AND is_cost_final = 0",
        "ALTER TABLE requests ADD COLUMN share INTEGER",
        "ALTER TABLE batchers ADD COLUMN notices TEXT NOT NULL DEFAULT '{}'",
    ):
        db.execute(statement)


def m004_belonging(db: sqlite_utils.Database) -> None:
    """A request's batch, key, client id, labels, retention time and deadline."""
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


def m005_batches(db: sqlite_utils.Database) -> None:
    """Batches, their refused items, idempotency keys, and indexes for searching many requests."""
    for statement in (
        """
        CREATE TABLE batches (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            service TEXT NOT NULL,
            model TEXT NOT NULL,
            params TEXT NOT NULL,
            name TEXT,
            labels TEXT NOT NULL,
            key_id TEXT,
            created_at TEXT NOT NULL,
            deadline_at TEXT,
            keep_seconds REAL CHECK (keep_seconds IS NULL OR keep_seconds >= 0),
            total INTEGER NOT NULL CHECK (total >= 0),
            refused INTEGER NOT NULL CHECK (refused >= 0),
            ended INTEGER NOT NULL DEFAULT 0,
            cancelled_at TEXT
        )
        """,
        "CREATE INDEX batches_key ON batches (key_id, number) WHERE key_id IS NOT NULL",
        "CREATE INDEX batches_created ON batches (created_at)",
        """
        CREATE TABLE batch_refusals (
            batch_id TEXT NOT NULL,
            position INTEGER NOT NULL,
            client_id TEXT NOT NULL,
            code TEXT NOT NULL,
            reason TEXT NOT NULL,
            PRIMARY KEY (batch_id, position)
        ) WITHOUT ROWID
        """,
        # Position of a batch's request among those that ended, in the order of the commits: a reader that has seen
        # everything up to a number misses nothing. Set by triggers, because requests end in many statements.
        "ALTER TABLE requests ADD COLUMN ended_number INTEGER",
        """
        CREATE TRIGGER requests_batch_ended AFTER UPDATE OF state ON requests
        WHEN NEW.batch_id IS NOT NULL AND NEW.finished_at IS NOT NULL AND OLD.finished_at IS NULL
        BEGIN
            UPDATE batches SET ended = ended + 1 WHERE id = NEW.batch_id;
            UPDATE requests SET ended_number = (SELECT ended FROM batches WHERE id = NEW.batch_id)
            WHERE number = NEW.number;
        END
        """,
        """
        CREATE TRIGGER requests_batch_known AFTER INSERT ON requests
        WHEN NEW.batch_id IS NOT NULL AND NEW.finished_at IS NOT NULL
        BEGIN
            UPDATE batches SET ended = ended + 1 WHERE id = NEW.batch_id;
            UPDATE requests SET ended_number = (SELECT ended FROM batches WHERE id = NEW.batch_id)
            WHERE number = NEW.number;
        END
        """,
        "CREATE INDEX requests_batch_order ON requests (batch_id, ended_number) WHERE ended_number IS NOT NULL",
        # Covers the progress of a batch.
        "CREATE INDEX requests_batch_progress ON requests (batch_id, state, code, chunk_id, share) "
        "WHERE batch_id IS NOT NULL",
        # The labels of requests, filled by triggers from the column of that name.
        """
        CREATE TABLE request_labels (
            name TEXT NOT NULL,
            value TEXT NOT NULL,
            number INTEGER NOT NULL,
            PRIMARY KEY (name, value, number)
        ) WITHOUT ROWID
        """,
        """
        CREATE TRIGGER requests_labelled AFTER INSERT ON requests WHEN NEW.labels != '{}'
        BEGIN
            INSERT INTO request_labels (name, value, number) SELECT key, value, NEW.number FROM json_each(NEW.labels);
        END
        """,
        """
        CREATE TRIGGER requests_unlabelled AFTER DELETE ON requests WHEN OLD.labels != '{}'
        BEGIN
            DELETE FROM request_labels
            WHERE (name, value, number) IN (SELECT key, value, OLD.number FROM json_each(OLD.labels));
        END
        """,
        # Pages of a list, newest first, by filter. The condition `number > 0`, always true, keeps these indexes out of
        # all statements that do not repeat it: SQLite must not prefer them to the indexes of the queue.
        "CREATE INDEX requests_waiting ON requests (number) WHERE state = 'queued' AND number > 0",
        "CREATE INDEX requests_done ON requests (number) WHERE state = 'done' AND number > 0",
        "CREATE INDEX requests_model ON requests (model, number) WHERE number > 0",
        "CREATE INDEX requests_name ON requests (number, name) WHERE name IS NOT NULL",
        "CREATE INDEX requests_created ON requests (created_at)",
        # When a request's own retention time is over.
        "DROP INDEX requests_keep",
        f"CREATE INDEX requests_keep ON requests ({KEEP_UNTIL_SQL}) "
        "WHERE keep_seconds IS NOT NULL AND finished_at IS NOT NULL",
        """
        CREATE TABLE idempotency (
            owner TEXT NOT NULL,
            key TEXT NOT NULL,
            operation TEXT NOT NULL,
            token TEXT NOT NULL,
            lease_ends_at TEXT NOT NULL,
            expires_at TEXT NOT NULL,
            fingerprint TEXT,
            status INTEGER,
            headers TEXT,
            body BLOB,
            PRIMARY KEY (owner, key),
            CHECK ((status IS NULL) = (fingerprint IS NULL))
        )
        """,
        "CREATE INDEX idempotency_expires ON idempotency (expires_at)",
    ):
        db.execute(statement)


def m006_keys(db: sqlite_utils.Database) -> None:
    """API keys, of which only a hash is stored, and the images sent with each key by day (UTC)."""
    for statement in (
        """
        CREATE TABLE api_keys (
            id TEXT PRIMARY KEY CHECK (length(id) = 12),
            name TEXT NOT NULL CHECK (name != ''),
            sha256 TEXT NOT NULL CHECK (length(sha256) = 64),
            scopes TEXT NOT NULL CHECK (scopes != ''),
            pictures_per_day INTEGER CHECK (pictures_per_day IS NULL OR pictures_per_day > 0),
            requests_per_minute INTEGER CHECK (requests_per_minute IS NULL OR requests_per_minute > 0),
            created_at TEXT NOT NULL,
            expires_at TEXT,
            revoked_at TEXT,
            last_used_at TEXT,
            minute INTEGER NOT NULL DEFAULT 0,
            minute_requests INTEGER NOT NULL DEFAULT 0
        )
        """,
        "CREATE UNIQUE INDEX api_keys_name ON api_keys (name) WHERE revoked_at IS NULL",
        """
        CREATE TABLE key_usage (
            key_id TEXT NOT NULL,
            day TEXT NOT NULL CHECK (length(day) = 10),
            pictures INTEGER NOT NULL CHECK (pictures > 0),
            PRIMARY KEY (key_id, day)
        ) WITHOUT ROWID
        """,
        "CREATE INDEX key_usage_day ON key_usage (day)",
    ):
        db.execute(statement)


#: Upper bounds, in seconds, of the histogram of the time from a request's arrival to its end.
_DURATION_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 3600, 14400, 86400)


def m007_webhooks(db: sqlite_utils.Database) -> None:
    """The change feed and the webhook deliveries, both filled by triggers."""
    final = ", ".join(f"'{state}'" for state in RequestState if state.is_final)
    note_change = """
        INSERT INTO changes (number, batch_id, state, at)
        VALUES (new.number, new.batch_id, new.state, strftime('%Y-%m-%dT%H:%M:%fZ', 'now'));
    """
    note_end = """
        INSERT INTO webhook_deliveries (id, endpoint_id, url, event, subject, state, created_at, next_at)
        SELECT 'msg_' || lower(hex(randomblob(16))), id, url, 'request.done', new.id, new.state, new.finished_at,
               new.finished_at
        FROM webhook_endpoints WHERE disabled_at IS NULL AND instr(events, 'request.done');
        INSERT INTO webhook_deliveries (id, url, event, subject, state, created_at, next_at)
        SELECT 'msg_' || lower(hex(randomblob(16))), new.webhook, 'request.done', new.id, new.state, new.finished_at,
               new.finished_at
        WHERE new.webhook IS NOT NULL;
    """
    for statement in (
        "ALTER TABLE requests ADD COLUMN webhook TEXT",
        "ALTER TABLE batches ADD COLUMN webhook TEXT",
        # AUTOINCREMENT: a number is never reused, also when the last rows were deleted.
        """
        CREATE TABLE changes (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            number INTEGER NOT NULL,
            batch_id TEXT,
            state TEXT NOT NULL,
            at TEXT NOT NULL
        )
        """,
        "CREATE INDEX changes_number ON changes (number)",
        """
        CREATE TABLE webhook_endpoints (
            id TEXT PRIMARY KEY,
            url TEXT NOT NULL,
            events TEXT NOT NULL,
            secret TEXT NOT NULL,
            created_at TEXT NOT NULL,
            disabled_at TEXT,
            disabled_reason TEXT
        )
        """,
        # Signs deliveries to URLs that were sent with requests; one row.
        "CREATE TABLE webhook_secret (secret TEXT NOT NULL)",
        """
        CREATE TABLE webhook_deliveries (
            id TEXT PRIMARY KEY,
            endpoint_id TEXT,
            url TEXT NOT NULL,
            event TEXT NOT NULL,
            subject TEXT NOT NULL,
            state TEXT NOT NULL,
            payload TEXT,
            created_at TEXT NOT NULL,
            attempts INTEGER NOT NULL DEFAULT 0,
            next_at TEXT,
            delivered_at TEXT,
            dead_at TEXT,
            last_status INTEGER,
            last_error TEXT,
            CHECK ((next_at IS NULL) = (delivered_at IS NOT NULL OR dead_at IS NOT NULL))
        )
        """,
        "CREATE INDEX webhook_deliveries_due ON webhook_deliveries (next_at) WHERE next_at IS NOT NULL",
        "CREATE INDEX webhook_deliveries_dead ON webhook_deliveries (dead_at) WHERE dead_at IS NOT NULL",
        "CREATE INDEX webhook_deliveries_delivered ON webhook_deliveries (delivered_at) WHERE delivered_at IS NOT NULL",
        f"""
        CREATE TRIGGER requests_changed AFTER UPDATE OF state ON requests WHEN new.state != old.state
        BEGIN {note_change} END
        """,
        f"""
        CREATE TRIGGER requests_ended AFTER UPDATE OF state ON requests
        WHEN new.state IN ({final}) AND old.state NOT IN ({final})
        BEGIN {note_end} END
        """,
        # Done at once with an earlier answer.
        f"""
        CREATE TRIGGER requests_answered_at_once AFTER INSERT ON requests WHEN new.state IN ({final})
        BEGIN {note_change} {note_end} END
        """,
        # `ended` counts every end, also one after a retry.
        """
        CREATE TRIGGER batches_ended AFTER UPDATE OF ended ON batches
        WHEN new.ended >= new.total AND NOT EXISTS (
            SELECT 1 FROM requests WHERE batch_id = new.id AND state IN ('queued', 'claimed'))
        BEGIN
            INSERT INTO webhook_deliveries (id, endpoint_id, url, event, subject, state, created_at, next_at)
            SELECT 'msg_' || lower(hex(randomblob(16))), endpoint_id, url, 'batch.done', new.id, 'done', now, now
            FROM (
                SELECT id AS endpoint_id, url FROM webhook_endpoints
                WHERE disabled_at IS NULL AND instr(events, 'batch.done')
                UNION ALL
                SELECT NULL, new.webhook WHERE new.webhook IS NOT NULL
            ), (SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now') AS now);
        END
        """,
    ):
        db.execute(statement)
    db.execute("INSERT INTO webhook_secret (secret) VALUES (?)", [new_secret()])


def m008_controls(db: sqlite_utils.Database) -> None:
    """Controls, and statistics for operators: totals that retention does not change, and indexes of chunks."""
    for statement in (
        """
        CREATE TABLE controls (
            name TEXT PRIMARY KEY,
            value TEXT NOT NULL,
            changed_at TEXT NOT NULL,
            changed_by TEXT NOT NULL
        )
        """,
        # Number of requests by outcome. Kept by triggers, because requests end in many statements; counting the
        # requests themselves would be slow, and the count would fall when old ones are deleted.
        """
        CREATE TABLE totals (
            model TEXT NOT NULL,
            outcome TEXT NOT NULL,
            code TEXT NOT NULL,
            up_to REAL NOT NULL,
            count INTEGER NOT NULL,
            seconds REAL NOT NULL,
            PRIMARY KEY (model, outcome, code, up_to)
        ) WITHOUT ROWID
        """,
        "ALTER TABLE batchers ADD COLUMN budget TEXT NOT NULL DEFAULT '{}'",
        # Covers the throughput of a day.
        "CREATE INDEX chunks_finished ON chunks (finished_at, model, done, failed, answers, seconds) "
        "WHERE finished_at IS NOT NULL",
        "CREATE INDEX chunks_under_way ON chunks (dispatched_at) WHERE finished_at IS NULL",
        "CREATE INDEX chunks_failed ON chunks (finished_at) WHERE code IS NOT NULL",
    ):
        db.execute(statement)

    classes = " ".join(f"WHEN seconds <= {end} THEN {end}" for end in _DURATION_BUCKETS)

    def facts(row: str, source: str = "") -> str:
        # A subquery with a limit is evaluated once and not copied into each place that uses its column.
        return f"""
            SELECT model, CASE WHEN state = 'done' AND is_cached THEN 'cached'
                               WHEN state = 'cancelled' AND code = 'expired' THEN 'expired' ELSE state END,
                CASE state WHEN 'failed' THEN coalesce(code, 'unknown') ELSE '' END,
                CASE {classes} ELSE 9e999 END, 1, seconds
            FROM (SELECT {row}model AS model, {row}state AS state, {row}is_cached AS is_cached, {row}code AS code,
                         max(0, round((julianday({row}finished_at) - julianday({row}created_at)) * 86400, 3)) AS seconds
                  {source} LIMIT -1)
            WHERE true
        """

    def count(selection: str) -> str:
        return f"""
            INSERT INTO totals (model, outcome, code, up_to, count, seconds) {selection}
            ON CONFLICT (model, outcome, code, up_to)
            DO UPDATE SET count = count + 1, seconds = seconds + excluded.seconds
        """

    db.execute(count(facts("", "FROM requests WHERE finished_at IS NOT NULL")))
    new = count(facts("NEW."))
    db.execute(
        f"""
        CREATE TRIGGER totals_of_ended AFTER UPDATE OF state ON requests
        WHEN NEW.finished_at IS NOT NULL AND OLD.finished_at IS NULL
        BEGIN {new}; END
        """
    )
    db.execute(
        f"CREATE TRIGGER totals_of_known AFTER INSERT ON requests WHEN NEW.finished_at IS NOT NULL BEGIN {new}; END"
    )


def m009_transition(db: sqlite_utils.Database) -> None:
    """What triggers wrote before is now written by `transition`, and labels by `requests.py`."""
    for name in (
        "requests_batch_ended",
        "requests_batch_known",
        "requests_labelled",
        "requests_unlabelled",
        "requests_changed",
        "requests_ended",
        "requests_answered_at_once",
        "batches_ended",
        "totals_of_ended",
        "totals_of_known",
    ):
        db.execute(f"DROP TRIGGER IF EXISTS {name}")


def m010_reservations(db: sqlite_utils.Database) -> None:
    """Amounts that may still be spent, and the caps of batchers; agreements without a decided invoice are committed."""
    for statement in (
        """
        CREATE TABLE reservations (
            id TEXT PRIMARY KEY,
            batcher_id TEXT NOT NULL,
            purpose TEXT NOT NULL,
            amount TEXT NOT NULL,
            state TEXT NOT NULL,
            agreement_id TEXT UNIQUE,
            changed_at TEXT NOT NULL,
            CHECK (state = 'reserved' OR agreement_id IS NOT NULL)
        )
        """,
        "CREATE INDEX reservations_open ON reservations (state, amount) WHERE state != 'settled'",
        "CREATE INDEX reservations_of_batcher ON reservations (batcher_id, amount)",
        """
        CREATE TABLE budgets (
            batcher_id TEXT NOT NULL,
            cap TEXT NOT NULL,
            amount TEXT NOT NULL,
            PRIMARY KEY (batcher_id, cap)
        ) WITHOUT ROWID
        """,
    ):
        db.execute(statement)
    chunks: dict[str, list[Decimal]] = defaultdict(list)
    for agreement_id, cost in db.execute(
        "SELECT agreement_id, cost FROM chunks WHERE agreement_id IS NOT NULL AND cost IS NOT NULL"
    ):
        chunks[agreement_id].append(Decimal(cost))
    notes: dict[str, dict[str, Decimal]] = defaultdict(dict)
    for agreement_id, activity_id, amount in db.execute(
        "SELECT agreement_id, activity_id, amount FROM debit_notes WHERE state = 'accepted'"
    ):
        notes[agreement_id][activity_id] = max(Decimal(amount), notes[agreement_id].get(activity_id, ZERO))
    for id, batcher_id, model, created_at in db.execute(
        """
        SELECT agreements.id, coalesce(batcher_id, ''), model, agreements.created_at
        FROM agreements LEFT JOIN allocations ON allocations.id = allocation_id
        WHERE agreements.id NOT IN (SELECT agreement_id FROM invoices WHERE state IN ('accepted', 'refused'))
        """
    ).fetchall():
        amount = max(total(chunks[id]), total(notes[id].values()))
        db.execute(
            "INSERT INTO reservations VALUES (?, ?, ?, ?, 'committed', ?, ?)",
            [id, batcher_id, model, to_amount(amount), id, created_at],
        )


def m011_files(db: sqlite_utils.Database) -> None:
    """Files of requests beside the image: further inputs, and those of answers."""
    for statement in (
        "ALTER TABLE requests ADD COLUMN inputs TEXT NOT NULL DEFAULT '{}'",
        "ALTER TABLE requests ADD COLUMN files TEXT NOT NULL DEFAULT '{}'",
        # Whether a file is still needed. A deleted request refers to nothing.
        """
        CREATE TABLE request_files (
            number INTEGER NOT NULL REFERENCES requests (number) ON DELETE CASCADE,
            is_input INTEGER NOT NULL CHECK (is_input IN (0, 1)),
            sha256 TEXT NOT NULL CHECK (length(sha256) = 64),
            PRIMARY KEY (number, is_input, sha256)
        ) WITHOUT ROWID
        """,
        "CREATE INDEX request_files_sha256 ON request_files (sha256)",
    ):
        db.execute(statement)


def m012_locks(db: sqlite_utils.Database) -> None:
    """Columns and indexes with which no statement holds the write lock for long; batches that arrive in slices."""
    status = "CASE WHEN state = 'cancelled' AND code = 'expired' THEN 'expired' ELSE state END"
    for statement in (
        # One index told answers and files by their image, and read every request with an equal image for both.
        "DROP INDEX requests_image",
        "CREATE INDEX requests_answer ON requests (image_sha256, model, digest, params, inputs, key_id) "
        "WHERE state = 'done'",
        "CREATE INDEX requests_image_kept ON requests (image_sha256) WHERE image_deleted_at IS NULL",
        # What retention deletes next: the images that are deleted already are not in it.
        "CREATE INDEX requests_finished_with_image ON requests (finished_at) "
        "WHERE finished_at IS NOT NULL AND image_deleted_at IS NULL",
        # Covers claims, so that requests that may not be claimed yet are skipped quickly.
        "DROP INDEX requests_queued",
        "CREATE INDEX requests_queued ON requests (model, number, service, due_at, batch_id, state) "
        "WHERE state = 'queued'",
        # Pages of a list by status.
        "DROP INDEX requests_waiting",
        "DROP INDEX requests_done",
        f"CREATE INDEX requests_status ON requests ({status}, number)",
        f"CREATE INDEX requests_key_status ON requests (key_id, {status}, number) WHERE key_id IS NOT NULL",
        # See `batches.py`: 0 arrived, 1 hidden, 2 visible and not claimed yet.
        "ALTER TABLE batches ADD COLUMN arrival INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE batches ADD COLUMN arrival_ends_at TEXT",
        "ALTER TABLE batches ADD COLUMN arrived INTEGER NOT NULL DEFAULT 0",
        "CREATE INDEX batches_arriving ON batches (arrival, id) WHERE arrival > 0",
        # Deliveries are claimed by owner (an endpoint, a key, or nobody) and host.
        "ALTER TABLE webhook_deliveries ADD COLUMN owner TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE webhook_deliveries ADD COLUMN host TEXT NOT NULL DEFAULT ''",
        "CREATE INDEX webhook_deliveries_claimed ON webhook_deliveries (owner, host, next_at) "
        "WHERE next_at IS NOT NULL",
        "DROP INDEX webhook_deliveries_dead",
        "DROP INDEX webhook_deliveries_delivered",
        "CREATE INDEX webhook_deliveries_ended ON webhook_deliveries (coalesce(delivered_at, dead_at)) "
        "WHERE next_at IS NULL",
        # The lists, newest first: every index ends with the rowid.
        "CREATE INDEX webhook_deliveries_status ON webhook_deliveries "
        "(CASE WHEN next_at IS NOT NULL THEN 'pending' WHEN delivered_at IS NOT NULL THEN 'delivered' ELSE 'dead' END)",
        "CREATE INDEX webhook_deliveries_payload ON webhook_deliveries (subject) WHERE payload IS NOT NULL",
    ):
        db.execute(statement)
    pending = db.execute(
        """
        SELECT webhook_deliveries.id, url,
               coalesce(endpoint_id, requests.key_id, batches.key_id, '')
        FROM webhook_deliveries
        LEFT JOIN requests ON requests.id = subject LEFT JOIN batches ON batches.id = subject
        """
    ).fetchall()
    for id, url, owner in pending:
        db.execute("UPDATE webhook_deliveries SET owner = ?, host = ? WHERE id = ?", [owner, host_of(url), id])


def m013_idempotency(db: sqlite_utils.Database) -> None:
    """Idempotency keys: reserved for a process instead of for a time, limited for each owner."""
    for statement in (
        "ALTER TABLE idempotency RENAME TO idempotency_before",
        "DROP INDEX idempotency_expires",
        """
        CREATE TABLE idempotency (
            owner TEXT NOT NULL,
            key TEXT NOT NULL,
            fingerprint TEXT NOT NULL,
            token TEXT NOT NULL,
            expires_at TEXT NOT NULL,
            position INTEGER,
            status INTEGER,
            headers TEXT,
            body BLOB,
            subject TEXT,
            PRIMARY KEY (owner, key),
            CHECK ((status IS NULL) = (position IS NULL))
        )
        """,
        # Fingerprints were made in another way, so any request matches. No process works on those without a response.
        """
        INSERT INTO idempotency (owner, key, fingerprint, token, expires_at, position, status, headers, body)
        SELECT owner, key, '', token, expires_at,
               sum(max(512, length(body))) OVER (PARTITION BY owner ORDER BY expires_at, key), status, headers, body
        FROM idempotency_before WHERE status IS NOT NULL
        """,
        "DROP TABLE idempotency_before",
        "CREATE INDEX idempotency_expires ON idempotency (expires_at)",
        "CREATE INDEX idempotency_position ON idempotency (owner, position)",
        "CREATE INDEX idempotency_subject ON idempotency (subject) WHERE subject IS NOT NULL",
    ):
        db.execute(statement)


def m014_webhook_secrets(db: sqlite_utils.Database) -> None:
    """A secret for each key. Keys that there are keep the one that they shared, until it is rotated."""
    for statement in (
        "CREATE TABLE webhook_secrets (owner TEXT PRIMARY KEY, secret TEXT NOT NULL) WITHOUT ROWID",
        "INSERT INTO webhook_secrets SELECT '', secret FROM webhook_secret",
        "INSERT INTO webhook_secrets SELECT api_keys.id, secret FROM api_keys, webhook_secret",
        "DROP TABLE webhook_secret",
    ):
        db.execute(statement)


def m015_bills(db: sqlite_utils.Database) -> None:
    """Decisions about bills, and agreements that are written off. What was refused before stays refused."""
    settled = "SELECT agreement_id FROM invoices WHERE state IN ('accepted', 'refused')"
    for statement in (
        "ALTER TABLE agreements ADD COLUMN written_off_at TEXT",
        """
        CREATE TABLE decisions (
            bill_id TEXT PRIMARY KEY,
            kind TEXT NOT NULL CHECK (kind IN ('invoice', 'debit_note')),
            agreement_id TEXT NOT NULL,
            activity_id TEXT,
            amount TEXT NOT NULL,
            max_amount TEXT NOT NULL,
            is_refused INTEGER NOT NULL CHECK (is_refused IN (0, 1)),
            reason TEXT,
            decided_at TEXT NOT NULL,
            finished_at TEXT,
            CHECK ((reason IS NOT NULL) = is_refused)
        ) WITHOUT ROWID
        """,
        "CREATE INDEX agreements_written_off ON agreements (created_at) WHERE written_off_at IS NOT NULL",
        "CREATE INDEX decisions_agreement ON decisions (agreement_id, kind)",
        "CREATE INDEX decisions_unfinished ON decisions (decided_at) WHERE finished_at IS NULL",
        "CREATE INDEX decisions_refused ON decisions (decided_at) WHERE is_refused = 1",
        """
        INSERT INTO decisions (bill_id, kind, agreement_id, amount, max_amount, is_refused, reason, decided_at)
        SELECT id, 'invoice', agreement_id, amount, amount, 1, coalesce(reason, 'It was refused.'), settled_at
        FROM invoices WHERE state = 'refused'
        """,
        # Until now these only no longer counted against the budget.
        f"""
        UPDATE agreements SET written_off_at = (
            SELECT changed_at FROM reservations WHERE agreement_id = agreements.id AND state = 'settled')
        WHERE ended_at IS NOT NULL AND id NOT IN ({settled})
        """,
        """
        UPDATE chunks SET cost = '0', is_cost_final = 1 WHERE finished_at IS NOT NULL
        AND agreement_id IN (SELECT id FROM agreements WHERE written_off_at IS NOT NULL)
        """,
    ):
        db.execute(statement)


def m016_leaks(db: sqlite_utils.Database) -> None:
    """The labels of each key: a search of one key walks over no request of another."""
    for statement in (
        "ALTER TABLE request_labels ADD COLUMN key_id TEXT",
        """
        UPDATE request_labels SET key_id = (SELECT key_id FROM requests WHERE requests.number = request_labels.number)
        WHERE number IN (SELECT number FROM requests WHERE key_id IS NOT NULL)
        """,
        "CREATE INDEX request_labels_key ON request_labels (key_id, name, value, number) WHERE key_id IS NOT NULL",
    ):
        db.execute(statement)


def m017_leases(db: sqlite_utils.Database) -> None:
    """The clocks of leases, see `lease_clock.py`: for each start of the machine, the time at which it shows zero."""
    db.execute("CREATE TABLE lease_clocks (boot_id TEXT PRIMARY KEY, zero_at TEXT NOT NULL) WITHOUT ROWID")


def m018_unused_providers(db: sqlite_utils.Database) -> None:
    """Finds the providers that are forgotten because they were neither rented nor banned."""
    db.execute(
        "CREATE INDEX providers_unused ON providers (seen_at) WHERE done = 0 AND failed = 0 AND ban_reason IS NULL"
    )


def m019_collections(db: sqlite_utils.Database) -> None:
    """Collections of images, see `collections/members.py`, and indexes of what retention may delete."""
    for statement in (
        """
        CREATE TABLE collections (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            name TEXT NOT NULL,
            key_id TEXT,
            model TEXT NOT NULL,
            digest TEXT,
            dimensions INTEGER CHECK (dimensions > 0),
            sequence INTEGER NOT NULL DEFAULT 0,
            created_at TEXT NOT NULL,
            deleted_at TEXT
        )
        """,
        "CREATE UNIQUE INDEX collections_name ON collections (coalesce(key_id, ''), name) WHERE deleted_at IS NULL",
        "CREATE INDEX collections_deleted ON collections (number) WHERE deleted_at IS NOT NULL",
        """
        CREATE TABLE collection_members (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            collection INTEGER NOT NULL REFERENCES collections (number),
            request_number INTEGER NOT NULL,
            image_sha256 TEXT NOT NULL CHECK (length(image_sha256) = 64),
            sequence INTEGER,
            reason TEXT
        )
        """,
        "CREATE UNIQUE INDEX collection_members_image ON collection_members (image_sha256, collection)",
        "CREATE INDEX collection_members_request ON collection_members (request_number)",
        # Also counts the members with and without a vector.
        "CREATE INDEX collection_members_collection ON collection_members (collection, number)",
        "CREATE INDEX collection_members_sequence ON collection_members (collection, sequence)",
        """
        CREATE TABLE collection_vectors (
            number INTEGER PRIMARY KEY REFERENCES collection_members (number) ON DELETE CASCADE,
            vector BLOB NOT NULL
        )
        """,
        """
        CREATE TABLE collection_changes (
            collection INTEGER NOT NULL REFERENCES collections (number),
            sequence INTEGER NOT NULL,
            number INTEGER NOT NULL,
            PRIMARY KEY (collection, sequence)
        ) WITHOUT ROWID
        """,
        """
        CREATE TABLE collection_labels (
            collection INTEGER NOT NULL REFERENCES collections (number),
            value TEXT NOT NULL,
            name TEXT NOT NULL,
            number INTEGER NOT NULL REFERENCES collection_members (number) ON DELETE CASCADE,
            PRIMARY KEY (collection, value, name, number)
        ) WITHOUT ROWID
        """,
        "CREATE INDEX collection_labels_member ON collection_labels (number)",
        # In how many collections a request is a member with a vector; retention does not touch it then.
        "ALTER TABLE requests ADD COLUMN collections INTEGER NOT NULL DEFAULT 0",
        "CREATE INDEX requests_purgeable ON requests (finished_at) WHERE finished_at IS NOT NULL AND collections = 0",
        "DROP INDEX requests_finished_with_image",
        "CREATE INDEX requests_finished_with_image ON requests (finished_at) "
        "WHERE finished_at IS NOT NULL AND image_deleted_at IS NULL AND collections = 0",
    ):
        db.execute(statement)


def m020_trainings(db: sqlite_utils.Database) -> None:
    """Trainings of own models, and their examples."""
    for statement in (
        """
        CREATE TABLE trainings (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            name TEXT NOT NULL,
            name_key TEXT NOT NULL,
            kind TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('waiting_for_features', 'fitting', 'done', 'failed', 'cancelled')),
            key_id TEXT,
            backbone TEXT,
            target TEXT,
            options TEXT NOT NULL,
            seed INTEGER NOT NULL,
            batch_id TEXT,
            examples INTEGER NOT NULL,
            step TEXT,
            failures INTEGER NOT NULL,
            token INTEGER NOT NULL,
            worker TEXT,
            version INTEGER,
            digest TEXT,
            figures TEXT,
            files TEXT,
            code TEXT,
            reason TEXT,
            created_at TEXT NOT NULL,
            started_at TEXT,
            ended_at TEXT,
            CHECK ((state = 'fitting') = (worker IS NOT NULL)),
            CHECK ((state IN ('done', 'failed', 'cancelled')) = (ended_at IS NOT NULL)),
            CHECK (state != 'done' OR (digest IS NOT NULL AND figures IS NOT NULL AND version IS NOT NULL)),
            CHECK (state != 'failed' OR reason IS NOT NULL)
        )
        """,
        "CREATE INDEX trainings_name ON trainings (name_key, number)",
        "CREATE INDEX trainings_key ON trainings (key_id, number)",
        "CREATE INDEX trainings_unfinished ON trainings (state, number) "
        "WHERE state IN ('waiting_for_features', 'fitting')",
        # Added before its training, so that adding many does not hold the write lock for long.
        """
        CREATE TABLE training_examples (
            training_id TEXT NOT NULL,
            position INTEGER NOT NULL,
            request_id TEXT NOT NULL,
            name TEXT NOT NULL,
            label TEXT,
            target REAL,
            PRIMARY KEY (training_id, position)
        ) WITHOUT ROWID
        """,
    ):
        db.execute(statement)


def m021_redo(db: sqlite_utils.Database) -> None:
    """Requests that do an earlier one again with another model; each at most once for a model."""
    for statement in (
        "ALTER TABLE requests ADD COLUMN replaces TEXT",
        "CREATE UNIQUE INDEX requests_replaces ON requests (replaces, model) WHERE replaces IS NOT NULL",
    ):
        db.execute(statement)


def m022_progress(db: sqlite_utils.Database) -> None:
    """What workers report of requests under way."""
    db.execute(
        """
        CREATE TABLE progress (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            number INTEGER NOT NULL UNIQUE,
            fraction REAL NOT NULL CHECK (fraction BETWEEN 0 AND 1),
            previews INTEGER NOT NULL,
            preview BLOB
        )
        """
    )


def m023_pipelines(db: sqlite_utils.Database) -> None:
    """Requests to pipelines and their steps, see `pipelines/runs.py`. A step is not purged by its own age."""
    for statement in (
        "ALTER TABLE requests ADD COLUMN parent TEXT",
        "ALTER TABLE requests ADD COLUMN step TEXT",
        "ALTER TABLE requests ADD COLUMN position INTEGER",
        "CREATE UNIQUE INDEX requests_parent ON requests (parent, step, position) WHERE parent IS NOT NULL",
        "DROP INDEX requests_purgeable",
        "CREATE INDEX requests_purgeable ON requests (finished_at) "
        "WHERE finished_at IS NOT NULL AND collections = 0 AND parent IS NULL",
        """
        CREATE TABLE pipeline_definitions (
            digest TEXT PRIMARY KEY CHECK (length(digest) = 64),
            definition TEXT NOT NULL
        ) WITHOUT ROWID
        """,
        """
        CREATE TABLE pipeline_runs (
            id TEXT PRIMARY KEY,
            number INTEGER NOT NULL,
            definition TEXT NOT NULL REFERENCES pipeline_definitions (digest),
            changed INTEGER NOT NULL,
            advanced INTEGER NOT NULL,
            is_retried INTEGER NOT NULL DEFAULT 0 CHECK (is_retried IN (0, 1)),
            removed INTEGER NOT NULL DEFAULT 0 CHECK (removed IN (0, 1, 2))
        ) WITHOUT ROWID
        """,
        "CREATE INDEX pipeline_runs_ready ON pipeline_runs (number) WHERE changed != advanced",
        """
        CREATE TABLE pipeline_outcomes (
            parent TEXT NOT NULL REFERENCES pipeline_runs (id) ON DELETE CASCADE,
            step TEXT NOT NULL,
            position INTEGER NOT NULL,
            status TEXT NOT NULL CHECK (status IN ('skipped', 'failed')),
            code TEXT NOT NULL,
            reason TEXT NOT NULL,
            PRIMARY KEY (parent, step, position)
        ) WITHOUT ROWID
        """,
    ):
        db.execute(statement)


def m025_usage(db: sqlite_utils.Database) -> None:
    """Usage by day, key, model and kind of client, see `clients/usage.py`.

    It begins now: counting what is kept would take long, and would leave out what was deleted. Of the days before, the
    images of each key are known, in rows without a model.
    """
    for statement in (
        """
        CREATE TABLE usage (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            day TEXT NOT NULL,
            key_id TEXT NOT NULL,
            model TEXT NOT NULL,
            client TEXT NOT NULL,
            accepted INTEGER NOT NULL DEFAULT 0 CHECK (accepted >= 0),
            refused INTEGER NOT NULL DEFAULT 0 CHECK (refused >= 0),
            done INTEGER NOT NULL DEFAULT 0 CHECK (done >= 0),
            cached INTEGER NOT NULL DEFAULT 0 CHECK (cached >= 0),
            failed INTEGER NOT NULL DEFAULT 0 CHECK (failed >= 0),
            cancelled INTEGER NOT NULL DEFAULT 0 CHECK (cancelled >= 0),
            expired INTEGER NOT NULL DEFAULT 0 CHECK (expired >= 0),
            bytes INTEGER NOT NULL DEFAULT 0,
            microseconds INTEGER NOT NULL DEFAULT 0,
            cost TEXT NOT NULL DEFAULT '0'
        )
        """,
        "CREATE UNIQUE INDEX usage_key ON usage (key_id, day, model, client)",
        "CREATE INDEX usage_day ON usage (day)",
        """
        CREATE TABLE usage_chunks (
            chunk_id TEXT NOT NULL,
            usage INTEGER NOT NULL REFERENCES usage (number) ON DELETE CASCADE,
            shares TEXT NOT NULL,
            cost TEXT NOT NULL DEFAULT '0',
            PRIMARY KEY (chunk_id, usage)
        ) WITHOUT ROWID
        """,
        "CREATE INDEX usage_chunks_usage ON usage_chunks (usage)",
        "ALTER TABLE requests ADD COLUMN usage INTEGER",
        """
        INSERT INTO usage (day, key_id, model, client, accepted)
        SELECT day, key_id, '', 'other', pictures FROM key_usage WHERE pictures > 0
        """,
        "DROP TABLE key_usage",
    ):
        db.execute(statement)


def m027_open_requests(db: sqlite_utils.Database) -> None:
    """How many requests of each model have not ended, which `transition` counts from now on."""
    db.execute("CREATE TABLE open_requests (model TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID")
    db.execute(
        """
        INSERT INTO open_requests (model, count) SELECT model, sum(count) FROM (
            SELECT model, count(*) AS count
            FROM requests INDEXED BY requests_queued WHERE state = 'queued' GROUP BY model
            UNION ALL
            SELECT model, count(*) FROM requests INDEXED BY requests_claimed WHERE state = 'claimed' GROUP BY model
        ) GROUP BY model
        """
    )


def m030_open_steps(db: sqlite_utils.Database) -> None:
    """How many of the requests that have not ended are steps of pipelines, which do not count as sent by clients."""
    if "corrections" not in db["open_requests"].columns_dict:  # a version that was not published had it from the start
        db.execute("ALTER TABLE open_requests ADD COLUMN corrections INTEGER NOT NULL DEFAULT 0")
    for statement in (
        "ALTER TABLE open_requests ADD COLUMN steps INTEGER NOT NULL DEFAULT 0",
        "CREATE INDEX requests_open_steps ON requests (model) "
        "WHERE parent IS NOT NULL AND state IN ('queued', 'claimed')",
        """
        UPDATE open_requests SET steps = found.count FROM (
            SELECT model, count(*) AS count FROM requests INDEXED BY requests_open_steps
            WHERE parent IS NOT NULL AND state IN ('queued', 'claimed') GROUP BY model
        ) AS found WHERE found.model = open_requests.model
        """,
    ):
        db.execute(statement)


def m031_pipeline_runs(db: sqlite_utils.Database) -> None:
    """Runs that have something to do by whether their requests have ended, and how many requests came before each."""
    for statement in (
        "ALTER TABLE pipeline_runs ADD COLUMN is_ended INTEGER NOT NULL DEFAULT 0 CHECK (is_ended IN (0, 1))",
        "ALTER TABLE pipeline_runs ADD COLUMN earlier INTEGER",
        # Those of a batch that arrives are passed over in the index.
        "ALTER TABLE pipeline_runs ADD COLUMN batch_id TEXT",
        """
        UPDATE pipeline_runs SET batch_id = (SELECT batch_id FROM requests WHERE requests.number = pipeline_runs.number)
        """,
        """
        UPDATE pipeline_runs SET is_ended = 1
        WHERE number NOT IN (SELECT number FROM requests WHERE state = 'queued' AND service = 'pipeline')
        """,
        # Those that were deleted came before, as most of them did.
        """
        UPDATE pipeline_runs SET earlier = counted.earlier FROM (
            SELECT id, row_number() OVER (ORDER BY number) - 1 - count(*) OVER ()
                   + (SELECT coalesce(sum(count), 0) FROM totals WHERE outcome = 'pipeline') AS earlier
            FROM pipeline_runs
        ) AS counted WHERE counted.id = pipeline_runs.id
        """,
        "DROP INDEX pipeline_runs_ready",
        "CREATE INDEX pipeline_runs_ready ON pipeline_runs (is_ended, number, batch_id) WHERE changed != advanced",
        "CREATE INDEX pipeline_runs_number ON pipeline_runs (number, earlier) WHERE earlier IS NOT NULL",
        "CREATE INDEX totals_pipelines ON totals (count) WHERE outcome = 'pipeline'",
    ):
        db.execute(statement)


def m032_cut_short(db: sqlite_utils.Database) -> None:
    """Answers that a chunk's time has cut short are none to later requests, as those that are recorded now."""
    db.execute(
        "UPDATE requests SET digest = digest || '-cut' "
        "WHERE service = 'style_transfer' AND state = 'done' AND json_extract(output, '$.complete') = 0"
    )


STEPS: tuple[Step, ...] = (
    m001_requests,
    m002_journal,
    m003_money,
    m004_belonging,
    m005_batches,
    m006_keys,
    m007_webhooks,
    m008_controls,
    m009_transition,
    m010_reservations,
    m011_files,
    m012_locks,
    m013_idempotency,
    m014_webhook_secrets,
    m015_bills,
    m016_leaks,
    m017_leases,
    m018_unused_providers,
    m019_collections,
    m020_trainings,
    m021_redo,
    m022_progress,
    m023_pipelines,
    m025_usage,
    m027_open_requests,
    m030_open_steps,
    m031_pipeline_runs,
    m032_cut_short,
)


def migrate(db: sqlite_utils.Database) -> list[str]:
    """Apply the pending steps. The caller begins and commits the transaction.

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

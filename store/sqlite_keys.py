"""The API keys on SQLite: the tables `api_keys` and `key_usage`.

A base of `SqliteStore`, which gives it the writer and the readers. `count_images` is called inside the writes that
add pictures, so that a quota is exact and costs no commit of its own.
"""

from __future__ import annotations

import sqlite3
from datetime import datetime, timedelta

from store.database import ReaderPool, Transaction, Writer
from store.errors import QuotaReached
from store.keys import Grant, KeyNameTaken, KeyRecord, UnknownKey
from store.records import to_text

#: A key's last use is not written again within this time.
TOUCH_SECONDS = 60

_ADD_KEY = """
    INSERT INTO api_keys (id, name, sha256, scopes, pictures_per_day, requests_per_minute, created_at, expires_at)
    VALUES (:id, :name, :sha256, :scopes, :pictures_per_day, :requests_per_minute, :created_at, :expires_at)
"""

# An id goes before a name: a name is anybody's choice.
_REVOKE = """
    UPDATE api_keys SET revoked_at = :now
    WHERE revoked_at IS NULL
      AND id = coalesce((SELECT id FROM api_keys WHERE id = :wanted),
                        (SELECT id FROM api_keys WHERE name = :wanted AND revoked_at IS NULL))
    RETURNING *
"""

_TOUCH = """
    UPDATE api_keys SET last_used_at = :now WHERE id = :id AND (last_used_at IS NULL OR last_used_at < :before)
"""

_MINUTE = "SELECT minute, minute_requests FROM api_keys WHERE id = ?"

_SET_MINUTE = "UPDATE api_keys SET minute = ?, minute_requests = ? WHERE id = ?"

# A key of which there is no row has no quota. Without a first row of the day the INSERT's own WHERE decides.
_COUNT_IMAGES = """
    INSERT INTO key_usage (key_id, day, pictures)
    SELECT :key_id, :day, :count
    WHERE :count <= coalesce((SELECT pictures_per_day FROM api_keys WHERE id = :key_id), 9e15)
    ON CONFLICT (key_id, day) DO UPDATE SET pictures = pictures + excluded.pictures
    WHERE pictures + excluded.pictures
          <= coalesce((SELECT pictures_per_day FROM api_keys WHERE id = excluded.key_id), 9e15)
"""


def count_images(transaction: Transaction, key_id: str, count: int, *, now: str) -> None:
    """Count pictures that are being added with a key; call it inside the write that adds them.

    :param now: as `to_text` writes it.
    :raises QuotaReached: nothing was counted; the write must change nothing either.
    """
    row = {"key_id": key_id, "day": now[:10], "count": count}
    if count and not transaction.execute(_COUNT_IMAGES, row).rowcount:
        raise QuotaReached()


class SqliteKeys:
    """What `Keys` promises."""

    _writer: Writer
    _readers: ReaderPool

    def add_key(self, key: KeyRecord) -> None:
        """See Keys.add_key."""
        row = {
            "id": key.id,
            "name": key.name,
            "sha256": key.sha256,
            "scopes": " ".join(sorted(key.scopes)),
            "pictures_per_day": key.images_per_day,
            "requests_per_minute": key.requests_per_minute,
            "created_at": to_text(key.created_at),
            "expires_at": None if key.expires_at is None else to_text(key.expires_at),
        }

        def write(transaction: Transaction) -> None:
            try:
                transaction.execute(_ADD_KEY, row)
            except sqlite3.IntegrityError as error:
                if "api_keys.name" in str(error):
                    raise KeyNameTaken() from error
                raise

        self._writer.run(write)

    def find_key(self, id: str) -> KeyRecord | None:
        """See Keys.find_key."""
        with self._readers.connection() as connection:
            row = connection.execute("SELECT * FROM api_keys WHERE id = ?", (id,)).fetchone()
        return None if row is None else KeyRecord.from_row(row)

    def list_keys(self) -> list[KeyRecord]:
        """See Keys.list_keys."""
        with self._readers.connection() as connection:
            rows = connection.execute("SELECT * FROM api_keys ORDER BY created_at, id").fetchall()
        return [KeyRecord.from_row(row) for row in rows]

    def has_keys(self) -> bool:
        """See Keys.has_keys."""
        with self._readers.connection() as connection:
            return bool(connection.execute("SELECT EXISTS (SELECT 1 FROM api_keys)").fetchone()[0])

    def revoke_key(self, id_or_name: str, *, now: datetime) -> KeyRecord:
        """See Keys.revoke_key."""

        def write(transaction: Transaction) -> KeyRecord:
            rows = transaction.execute(_REVOKE, {"wanted": id_or_name, "now": to_text(now)}).fetchall()
            if not rows:
                raise UnknownKey()
            return KeyRecord.from_row(rows[0])

        revoked: KeyRecord = self._writer.run(write)
        return revoked

    def touch_key(self, id: str, *, now: datetime) -> None:
        """See Keys.touch_key."""
        row = {"id": id, "now": to_text(now), "before": to_text(now - timedelta(seconds=TOUCH_SECONDS))}
        self._writer.run(lambda transaction: transaction.execute(_TOUCH, row).rowcount)

    def grant_requests(self, id: str, *, minute: int, limit: int, per_minute: int) -> Grant:
        """See Keys.take_requests."""

        def write(transaction: Transaction) -> Grant:
            known = transaction.execute(_MINUTE, (id,)).fetchone()
            if known is None:
                return Grant(granted=0, left=0)
            # A process that is late by a minute takes from the present one; a clock that was set back begins anew.
            present = max(minute, known["minute"]) if known["minute"] <= minute + 1 else minute
            used = known["minute_requests"] if known["minute"] == present else 0
            granted = max(0, min(limit, per_minute - used))
            transaction.execute(_SET_MINUTE, (present, used + granted, id))
            return Grant(granted=granted, left=max(0, per_minute - used - granted))

        taken: Grant = self._writer.run(write)
        return taken

    def images_used(self, id: str, *, now: datetime) -> int:
        """See Keys.pictures_used."""
        with self._readers.connection() as connection:
            row = connection.execute(
                "SELECT pictures FROM key_usage WHERE key_id = ? AND day = ?", (id, to_text(now)[:10])
            ).fetchone()
        return 0 if row is None else int(row[0])

    def images_used_by_key(self, *, now: datetime) -> dict[str, int]:
        """See Keys.pictures_used_by_key."""
        with self._readers.connection() as connection:
            rows = connection.execute("SELECT key_id, pictures FROM key_usage WHERE day = ?", (to_text(now)[:10],))
            return {key_id: int(images) for key_id, images in rows}

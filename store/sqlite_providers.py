"""The providers on SQLite: their prices, how well and how fast they work, and who is banned.

A base of `SqliteStore`, which gives it the writer and the readers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from typing import Any

from store.cost_split import to_amount
from store.database import ReaderPool, Transaction, Writer
from store.ledger import UnknownProvider
from store.ledger_records import ProviderRecord, SpeedRecord
from store.records import to_text
from store.sqlite_ledger import from_row

#: The score of a provider of which nothing is known.
INITIAL_SCORE = 0.5
#: How much the latest chunk counts in the score; the older ones share the rest.
SCORE_WEIGHT = 0.2
#: How much of the earlier images and seconds is kept when new ones are added to a speed.
SPEED_DECAY = 0.8
#: An address is recognised by its beginning from this length on: "0x" and six digits.
MIN_ADDRESS_PREFIX_LENGTH = 8
#: Work quicker than this was not measured well enough for a speed.
MIN_MEASURED_SECONDS = 1e-6

_RECORD_OFFER = """
    INSERT INTO providers (id, name, first_seen_at, seen_at, start_price, price_per_cpu_second, price_per_second, score)
    VALUES (:id, :name, :now, :now, :start_price, :price_per_cpu_second, :price_per_second, :score)
    ON CONFLICT (id) DO UPDATE
    SET name = excluded.name, seen_at = excluded.seen_at, start_price = excluded.start_price,
        price_per_cpu_second = excluded.price_per_cpu_second, price_per_second = excluded.price_per_second
"""

_RECORD_WORK = """
    UPDATE providers
    SET score = min(1.0, max(0.0, score + :weight * (:is_good - score))), done = done + :is_good,
        failed = failed + 1 - :is_good, images = images + :images
    WHERE id = :provider_id
"""

_RECORD_SPEED = """
    INSERT INTO provider_speeds (provider_id, model, images, seconds, measured_at)
    VALUES (:provider_id, :model, :images, :seconds, :now)
    ON CONFLICT (provider_id, model) DO UPDATE
    SET images = images * :kept + excluded.images, seconds = seconds * :kept + excluded.seconds,
        measured_at = excluded.measured_at
"""

_BAN = """
    UPDATE providers SET banned_until = :until, ban_reason = :reason, is_banned_by_operator = :by_operator
    WHERE id = :id AND (:by_operator OR NOT is_banned_by_operator
                        OR (banned_until IS NOT NULL AND (:until IS NULL OR :until > banned_until)))
"""

_UNBAN = "UPDATE providers SET banned_until = NULL, ban_reason = NULL, is_banned_by_operator = 0 WHERE id = :id"

_BANNED = """
    SELECT id, ban_reason FROM providers WHERE ban_reason IS NOT NULL AND (banned_until IS NULL OR banned_until > ?)
"""

# The address itself goes before names, and those before the beginnings of addresses: a name is anybody's choice.
_FIND = (
    "SELECT id FROM providers WHERE id = :wanted",
    "SELECT id FROM providers WHERE name = :wanted ORDER BY id LIMIT 3",
    f"SELECT id FROM providers WHERE length(:wanted) >= {MIN_ADDRESS_PREFIX_LENGTH} "
    "AND substr(id, 1, length(:wanted)) = :wanted ORDER BY id LIMIT 3",
)


class SqliteProviders:
    """What is known about providers, in the tables `providers` and `provider_speeds`."""

    _writer: Writer
    _readers: ReaderPool

    def record_offer(
        self,
        id: str,
        *,
        name: str,
        start_price: Decimal,
        price_per_cpu_second: Decimal,
        price_per_second: Decimal,
        now: datetime,
    ) -> None:
        """See Providers.note_provider."""
        row = {
            "id": id,
            "name": name,
            "start_price": to_amount(start_price),
            "price_per_cpu_second": to_amount(price_per_cpu_second),
            "price_per_second": to_amount(price_per_second),
            "score": INITIAL_SCORE,
            "now": to_text(now),
        }
        self._writer.run(lambda transaction: transaction.execute(_RECORD_OFFER, row).rowcount)

    def record_work(
        self, provider_id: str, *, model: str, images: int, seconds: float, is_failure: bool, now: datetime
    ) -> None:
        """See Providers.note_work."""
        row = {
            "provider_id": provider_id,
            "model": model,
            "images": 0 if is_failure else images,
            "seconds": seconds,
            "is_good": not is_failure,
            "weight": SCORE_WEIGHT,
            "kept": SPEED_DECAY,
            "now": to_text(now),
        }
        is_measured = not is_failure and images > 0 and math.isfinite(seconds) and seconds > MIN_MEASURED_SECONDS

        def write(transaction: Transaction) -> None:
            if transaction.execute(_RECORD_WORK, row).rowcount and is_measured:
                transaction.execute(_RECORD_SPEED, row)

        self._writer.run(write)

    def ban_provider(
        self, id_or_name: str, *, until: datetime | None, reason: str, by_operator: bool
    ) -> ProviderRecord:
        """See Providers.ban_provider."""
        row = {
            "until": None if until is None else to_text(until),
            "reason": reason,
            "by_operator": by_operator,
        }
        return self._change_provider(id_or_name, lambda transaction, id: transaction.execute(_BAN, {**row, "id": id}))

    def unban_provider(self, id_or_name: str) -> ProviderRecord:
        """See Providers.unban_provider."""
        return self._change_provider(id_or_name, lambda transaction, id: transaction.execute(_UNBAN, {"id": id}))

    def list_providers(self) -> list[ProviderRecord]:
        """See Providers.list_providers."""
        with self._readers.connection() as connection:
            rows = connection.execute("SELECT * FROM providers ORDER BY seen_at DESC, id").fetchall()
        return [_provider(row) for row in rows]

    def banned(self, now: datetime) -> dict[str, str]:
        """See Providers.banned."""
        with self._readers.connection() as connection:
            return dict(connection.execute(_BANNED, (to_text(now),)).fetchall())

    def speed(self, model: str) -> dict[str, float]:
        """See Providers.speed."""
        return {found.provider_id: found.images_per_second for found in self.speeds() if found.model == model}

    def speeds(self) -> list[SpeedRecord]:
        """See Providers.speeds."""
        with self._readers.connection() as connection:
            rows = connection.execute(
                "SELECT provider_id, model, images, seconds FROM provider_speeds ORDER BY provider_id, model"
            ).fetchall()
        return [SpeedRecord(**dict(row)) for row in rows]

    def _change_provider(self, id_or_name: str, change: Callable[[Transaction, str], Any]) -> ProviderRecord:
        def write(transaction: Transaction) -> ProviderRecord:
            id = _find(transaction, id_or_name)
            change(transaction, id)
            (row,) = transaction.execute("SELECT * FROM providers WHERE id = ?", (id,)).fetchall()
            return _provider(row)

        changed: ProviderRecord = self._writer.run(write)
        return changed


def _find(transaction: Transaction, id_or_name: str) -> str:
    """Find the one that is meant. :raises UnknownProvider:"""
    for statement in _FIND:
        found: list[str] = [id for (id,) in transaction.execute(statement, {"wanted": id_or_name}).fetchall()]
        if len(found) == 1:
            return found[0]
        if found:
            raise UnknownProvider(
                f"Several providers are called {id_or_name}. Name one by its address: {', '.join(found)}"
            )
    raise UnknownProvider(
        f"There is no provider {id_or_name}. Those that made offers, with addresses: mlg providers list --json"
    )


def _provider(row: Any) -> ProviderRecord:
    values = from_row(row, amounts=("start_price", "price_per_cpu_second", "price_per_second"))
    return ProviderRecord(**{**values, "is_banned_by_operator": bool(values["is_banned_by_operator"])})

"""Providers: the tables `providers` and `provider_speeds`: prices, scores, speeds and bans.

Executors that pay record offers and work, and ban; operators' commands and views list, ban and unban.
"""

from __future__ import annotations

import builtins
import math
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from provider_image.errors import MlgError
from store.amounts import to_amount
from store.database import Database, Transaction
from store.rows import from_row, to_text

#: Score of a new provider.
INITIAL_SCORE = 0.5
#: Weight of the latest chunk in the score.
SCORE_WEIGHT = 0.2
#: Weight of the earlier images and seconds when new ones are added to a speed.
SPEED_DECAY = 0.8
#: A provider that was never rented nor banned is forgotten when it has made no offer for this long.
KEEP_UNUSED = timedelta(days=30)
#: Shortest prefix by which an address is recognised: "0x" and six digits.
MIN_ADDRESS_PREFIX_LENGTH = 8
#: Shorter work is not measured well enough for a speed.
MIN_MEASURED_SECONDS = 1e-6

#: Rows that a purge deletes under one lock.
_ROWS_PER_COMMIT = 50

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

_UNBAN = """
    UPDATE providers SET banned_until = NULL, ban_reason = NULL, is_banned_by_operator = 0
    WHERE id = :id AND (:by_operator OR NOT is_banned_by_operator)
"""

_BANNED = """
    SELECT id, ban_reason FROM providers WHERE ban_reason IS NOT NULL AND (banned_until IS NULL OR banned_until > ?)
"""

_PURGE = """
    DELETE FROM providers WHERE id IN (
        SELECT id FROM providers WHERE seen_at < :before AND done = 0 AND failed = 0 AND ban_reason IS NULL
        LIMIT :rows_per_commit)
"""

# The whole address takes precedence over names, and names over prefixes: names can be chosen freely.
_FIND = (
    "SELECT id FROM providers WHERE id = :id_or_name",
    "SELECT id FROM providers WHERE name = :id_or_name ORDER BY id LIMIT 3",
    f"SELECT id FROM providers WHERE length(:id_or_name) >= {MIN_ADDRESS_PREFIX_LENGTH} "
    "AND substr(id, 1, length(:id_or_name)) = :id_or_name ORDER BY id LIMIT 3",
)


class UnknownProvider(MlgError):
    """There is no such provider. `mlg providers list` shows those that made offers."""

    permanent = True


@dataclass(frozen=True, kw_only=True)
class ProviderRecord:
    """One provider: its latest offer, its work and its ban."""

    #: Its address.
    id: str
    #: Its own name for itself; not unique.
    name: str
    first_seen_at: datetime
    #: When it made its latest offer.
    seen_at: datetime
    #: The prices of that offer in GLM; see AgreementRecord.
    start_price: Decimal
    price_per_cpu_second: Decimal
    price_per_second: Decimal
    #: Chunks that it answered, and chunks that failed there.
    done: int
    failed: int
    #: Images that it answered.
    images: int
    #: Moving average of its success: 0 none, 1 all.
    score: float
    #: End of the ban; None without a ban, and for a permanent one.
    banned_until: datetime | None
    #: Why it is banned; None without a ban.
    ban_reason: str | None
    #: True when an operator banned it, not a batcher.
    is_banned_by_operator: bool

    @property
    def price_per_hour(self) -> Decimal:
        """The price of an hour with one busy core, without the start price."""
        return 3600 * (self.price_per_second + self.price_per_cpu_second)

    def price_per_1000_images(self, images_per_second: float) -> Decimal:
        """Estimate the price of a thousand images at a measured speed, with one busy core and without the start."""
        return self.price_per_hour / 3600 * 1000 / Decimal(repr(max(1e-6, images_per_second)))

    def is_banned(self, now: datetime) -> bool:
        """Tell whether it is banned now."""
        return self.ban_reason is not None and (self.banned_until is None or self.banned_until > now)


class Providers:
    """The providers, their speeds and bans."""

    def __init__(self, database: Database) -> None:
        self._database = database

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
        """Record the prices of a provider's latest offer."""
        row = {
            "id": id,
            "name": name,
            "start_price": to_amount(start_price),
            "price_per_cpu_second": to_amount(price_per_cpu_second),
            "price_per_second": to_amount(price_per_second),
            "score": INITIAL_SCORE,
            "now": to_text(now),
        }
        self._database.execute(_RECORD_OFFER, row)

    def record_work(
        self, provider_id: str, *, model: str, images: int, seconds: float, is_failure: bool, now: datetime
    ) -> None:
        """Record how a chunk ended at a provider: changes its score and, unless it failed, its speed.

        Does nothing for an unknown provider.
        """
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

        self._database.write(write)

    def ban(self, id_or_name: str, *, until: datetime | None, reason: str, by_operator: bool) -> ProviderRecord:
        """Ban a provider from work. A batcher's ban never shortens an operator's.

        :param id_or_name: the address, an unambiguous prefix of it, or an unambiguous name.
        :param until: end of the ban; None is for good.
        :raises UnknownProvider: none or several match.
        """
        end = None if until is None else to_text(until)
        return self._change(id_or_name, _BAN, until=end, reason=reason, by_operator=by_operator)

    def unban(self, id_or_name: str, *, by_operator: bool = True) -> ProviderRecord:
        """Lift a ban; a batcher does not lift an operator's. :raises UnknownProvider:"""
        return self._change(id_or_name, _UNBAN, by_operator=by_operator)

    def banned(self, now: datetime) -> dict[str, str]:
        """Return the providers that are banned now: address -> reason."""
        return dict(self._database.rows(_BANNED, (to_text(now),)))

    def speed(self, model: str) -> dict[str, float]:
        """Return how many images a second of a model each provider answered recently: address -> speed."""
        return {id: speeds[model] for id, speeds in self.speeds().items() if model in speeds}

    def speeds(self) -> defaultdict[str, dict[str, float]]:
        """Return all speeds: address -> model -> images per second."""
        found: defaultdict[str, dict[str, float]] = defaultdict(dict)
        # The sums of images and seconds decay, see _RECORD_SPEED.
        for row in self._database.rows("SELECT * FROM provider_speeds ORDER BY provider_id, model"):
            found[row["provider_id"]][row["model"]] = row["images"] / row["seconds"]
        return found

    def scores(self) -> dict[str, float]:
        """Return the scores of those that have worked: address -> score."""
        return dict(self._database.rows("SELECT id, score FROM providers WHERE done > 0 OR failed > 0"))

    def purge(self, *, before: datetime) -> int:
        """Delete those that were never rented nor banned and made no offer since a time. :return: how many."""
        return self._database.execute_in_steps(
            _PURGE, {"before": to_text(before)}, rows_per_commit=_ROWS_PER_COMMIT, is_background=True
        )

    def list(self) -> builtins.list[ProviderRecord]:
        """List the providers, the last seen first."""
        return self._database.records(ProviderRecord, "SELECT * FROM providers ORDER BY seen_at DESC, id")

    def _change(self, id_or_name: str, sql: str, **parameters: Any) -> ProviderRecord:
        def write(transaction: Transaction) -> ProviderRecord:
            id = _find(transaction, id_or_name)
            transaction.execute(sql, {**parameters, "id": id})
            (row,) = transaction.execute("SELECT * FROM providers WHERE id = ?", (id,)).fetchall()
            return from_row(ProviderRecord, row)

        return self._database.write(write)


def _find(transaction: Transaction, id_or_name: str) -> str:
    """Find a provider by address, name or prefix. :raises UnknownProvider:"""
    for statement in _FIND:
        found: list[str] = [id for (id,) in transaction.execute(statement, {"id_or_name": id_or_name}).fetchall()]
        if len(found) == 1:
            return found[0]
        if found:
            raise UnknownProvider(
                f"Several providers are called {id_or_name}. Name one by its address: {', '.join(found)}"
            )
    raise UnknownProvider(
        f"There is no provider {id_or_name}. Those that made offers, with addresses: mlg providers list --json"
    )

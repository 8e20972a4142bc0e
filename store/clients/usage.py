"""Usage: the tables `usage` and `usage_chunks`, what each API key has sent on each day, with which outcome and cost.

A row counts the requests of one day (UTC, that of their arrival), one API key, one model and one kind of client
program. Every request's own row says which row counts it, from the commit that adds it. It counts as accepted, and once
it has ended also under its outcome; one that is retried has no outcome until it ends again. So a row equals a recount
of its requests after any order of events, and deleting requests changes nothing.

A cost is a sum of shares of chunks' costs. Which shares belong to a row is kept in `usage_chunks`, as a chunk's cost
may change long after its requests were deleted, when a bill is decided.

`requests.py` and `batches.py` count what is accepted, and with it the quotas of keys, in the commit that adds it;
`transition.py` counts outcomes; `chunks.py` and `rentals/ledger.py` say when the cost of a chunk has changed. Nothing
here names a request, an image or a label.
"""

from __future__ import annotations

import builtins
import enum
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from store.amounts import EXACT, ZERO, equal_share, to_amount, total
from store.database import Database, Transaction
from store.errors import QuotaReached
from store.rows import from_row, to_text

#: The columns that tell one row from another.
USAGE_BY = ("day", "key", "model", "client")
#: Name of each of these -> its column.
_COLUMNS = {"day": "day", "key": "key_id", "model": "model", "client": "client"}
#: The final outcomes of a request.
OUTCOMES = ("done", "cached", "failed", "cancelled", "expired")
#: The longest list of rows that is read at once.
MAX_ROWS = 10_000
_ROWS_PER_COMMIT = 200

_QUOTA = "(SELECT pictures_per_day FROM api_keys WHERE id = :key_id)"

#: The images of a key on a day; refused ones too, as each is work.
USED = "SELECT coalesce(sum(accepted + refused), 0) FROM usage WHERE key_id = :key_id AND day = :day"

# An unknown key has no quota. Then nothing is added up.
_COUNT_ACCEPTED = f"""
    INSERT INTO usage (day, key_id, model, client, accepted, refused, bytes)
    SELECT :day, :key_id, :model, :client, :accepted, :refused, :bytes
    WHERE CASE WHEN :accepted + :refused = 0 OR {_QUOTA} IS NULL THEN 1
          ELSE ({USED}) + :accepted + :refused <= {_QUOTA} END
    ON CONFLICT (key_id, day, model, client) DO UPDATE SET
        accepted = accepted + excluded.accepted, refused = refused + excluded.refused, bytes = bytes + excluded.bytes
    RETURNING number
"""

_COUNT_ENDED = f"""
    UPDATE usage SET {", ".join(f"{name} = {name} + :{name}" for name in (*OUTCOMES, "microseconds"))}
    WHERE number = :number
"""

_ADD_SHARES = """
    INSERT INTO usage_chunks (chunk_id, usage, shares)
    SELECT :chunk_id, number, :shares FROM usage WHERE number = :usage
    ON CONFLICT (chunk_id, usage) DO UPDATE SET shares = shares || ',' || excluded.shares
"""

_CHUNK = "SELECT cost, answers, agreement_id, finished_at FROM chunks WHERE id = ?"

_SHARES = """
    SELECT usage, shares, usage_chunks.cost AS cost, usage.cost AS cost_of_all
    FROM usage_chunks JOIN usage ON usage.number = usage WHERE chunk_id = ?
"""

_SET_COST = "UPDATE usage SET cost = ? WHERE number = ?"

_SET_COST_OF_SHARES = "UPDATE usage_chunks SET cost = ? WHERE chunk_id = ? AND usage = ?"

# Rows of which a part of the cost is an estimate. The index of open chunks keeps this short.
_ESTIMATED = """
    SELECT usage FROM chunks INDEXED BY chunks_open CROSS JOIN usage_chunks ON chunk_id = chunks.id
    WHERE agreement_id IS NOT NULL AND is_cost_final = 0
"""

_SUMS = ", ".join(f"sum({name}) AS {name}" for name in ("accepted", "refused", *OUTCOMES, "bytes", "microseconds"))

_LIST = f"""
    SELECT {{columns}} {_SUMS}, group_concat(CASE WHEN cost != '0' THEN cost END) AS costs,
           max(number IN ({_ESTIMATED})) AS is_estimated
    FROM usage INDEXED BY {{index}} WHERE day BETWEEN :since AND :until {{which}} AND accepted + refused > 0
    {{group}}
"""

_PURGE_CHUNKS = """
    DELETE FROM usage_chunks WHERE (chunk_id, usage) IN (
        SELECT chunk_id, usage FROM usage CROSS JOIN usage_chunks ON usage = number
        WHERE day < :before LIMIT :rows_per_commit)
"""

_PURGE = "DELETE FROM usage WHERE number IN (SELECT number FROM usage WHERE day < :before LIMIT :rows_per_commit)"


class ClientKind(enum.StrEnum):
    """Which kind of program has sent a request."""

    BROWSER = "browser"
    #: A browser or an app on a telephone or a tablet.
    MOBILE = "mobile"
    CURL = "curl"
    #: This project's Python client, and the commands that use it.
    OWN_CLIENT = "mlg_client"
    TELEGRAM = "telegram"
    OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class Sender:
    """Who sends requests of one model, and when."""

    #: The API key whose quota counts them; None where none is required.
    key_id: str | None
    client: ClientKind
    model: str
    #: When they are accepted, as `to_text` writes it.
    at: str


@dataclass(frozen=True, kw_only=True)
class UsageRow:
    """What was used in a period; of a day, a key, a model and a kind of client where it is grouped by these."""

    #: UTC, "2026-11-20".
    day: str | None = None
    #: Id of the API key; empty for requests without one.
    key: str | None = None
    #: The key's name; None for requests without one.
    key_name: str | None = None
    #: Empty where only the images of a key are known, see the migration.
    model: str | None = None
    client: str | None = None
    #: Requests that were accepted; equals the sum of the outcomes and of those that still wait.
    accepted: int = 0
    #: Images that a batch refused.
    refused: int = 0
    done: int = 0
    #: Answered with an earlier answer.
    cached: int = 0
    failed: int = 0
    #: Not counting those that expired.
    cancelled: int = 0
    expired: int = 0
    #: Size of all inputs.
    bytes: int = 0
    #: Time that models spent on those that are done.
    seconds: float = 0.0
    #: In GLM.
    cost: Decimal = ZERO
    #: False while a part of the cost is an estimate.
    is_cost_final: bool = True


def count_accepted(
    transaction: Transaction, sender: Sender, *, accepted: int = 0, refused: int = 0, size_bytes: int = 0
) -> int:
    """Count requests that are added; call it inside the write that adds them.

    :param refused: images that are not added, and count against the quota.
    :return: the number of the row, for the requests.
    :raises QuotaReached: nothing was counted; the write must change nothing either.
    """
    row = {
        "day": sender.at[:10],
        "key_id": sender.key_id or "",
        "model": sender.model,
        "client": str(sender.client),
        "accepted": accepted,
        "refused": refused,
        "bytes": size_bytes,
    }
    found = transaction.execute(_COUNT_ACCEPTED, row).fetchone()
    if found is None:
        raise QuotaReached()
    return int(found[0])


def count_outcomes(transaction: Transaction, ended: Iterable[tuple[Any, str]], *, sign: int = 1) -> None:
    """Count requests that have ended.

    :param ended: rows of requests, and one of OUTCOMES for each.
    :param sign: -1 for requests that are queued again.
    """
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for row, outcome in ended:
        if row["usage"] is not None:  # else it was accepted by an older version
            counts[row["usage"]][outcome] += sign
            if outcome == "done":
                # Whole numbers: their sum does not depend on the order.
                counts[row["usage"]]["microseconds"] += sign * round((row["seconds"] or 0.0) * 1e6)
    names = (*OUTCOMES, "microseconds")
    rows = [{"number": number, **{name: found[name] for name in names}} for number, found in counts.items()]
    transaction.execute_many(_COUNT_ENDED, rows)


def add_shares(transaction: Transaction, shares: Mapping[tuple[str, int], Sequence[int]]) -> None:
    """Record which shares of chunks belong to which rows. :param shares: (chunk, row) -> positions of the shares."""
    rows = [
        {"chunk_id": chunk_id, "usage": usage, "shares": ",".join(map(str, positions))}
        for (chunk_id, usage), positions in shares.items()
    ]
    transaction.execute_many(_ADD_SHARES, rows)
    for chunk_id in {chunk_id for chunk_id, _ in shares}:
        settle_chunk(transaction, chunk_id)


def settle_chunk(transaction: Transaction, chunk_id: str) -> None:
    """Correct costs after the cost or the answers of a chunk have changed; may be called at any time."""
    chunk = transaction.execute(_CHUNK, (chunk_id,)).fetchone()
    if chunk is None:
        return
    if chunk["finished_at"] is not None and chunk["agreement_id"] is None and chunk["cost"] is None:
        # Nobody is paid for it. Most chunks of most homes are such.
        transaction.execute("DELETE FROM usage_chunks WHERE chunk_id = ?", (chunk_id,))
        return
    amount = Decimal(chunk["cost"] or 0)
    for row in transaction.execute(_SHARES, (chunk_id,)).fetchall():
        positions = map(int, row["shares"].split(","))
        cost = total(equal_share(amount, chunk["answers"], position) for position in positions)
        change = EXACT.subtract(cost, Decimal(row["cost"]))
        if change:
            cost_of_all = EXACT.add(Decimal(row["cost_of_all"]), change)
            transaction.execute(_SET_COST, (to_amount(cost_of_all), row["usage"]))
            transaction.execute(_SET_COST_OF_SHARES, (to_amount(cost), chunk_id, row["usage"]))


class Usage:
    """The usage, added up."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def list(
        self,
        *,
        since: date,
        until: date,
        by: Sequence[str] = (),
        key_id: str | None = None,
        limit: int = MAX_ROWS,
    ) -> builtins.list[UsageRow]:
        """Add up the usage of some days, the latest day and the most requests first.

        :param since: first day, UTC.
        :param until: last day.
        :param by: some of USAGE_BY, by which it is grouped; without any there is one row, also when nothing was used.
        :param key_id: only that of this key; "" is that without a key.
        """
        columns = [_COLUMNS[name] for name in by]
        named = [f"{_COLUMNS[name]} AS {name}," for name in by]
        if "key" in by:
            named.append("(SELECT name FROM api_keys WHERE id = key_id) AS key_name,")
        order = ", ".join([*(["day DESC"] if "day" in columns else []), "accepted DESC", *columns])
        sql = _LIST.format(
            columns=" ".join(named),
            index="usage_day" if key_id is None else "usage_key",
            which="" if key_id is None else "AND key_id = :key_id",
            group=f"GROUP BY {', '.join(columns)} ORDER BY {order} LIMIT :limit" if by else "",
        )
        values = {"since": since.isoformat(), "until": until.isoformat(), "key_id": key_id, "limit": limit}
        return [_to_record(row) for row in self._database.rows(sql, values)]

    def purge(self, *, before: datetime) -> int:
        """Delete the usage of the days before a time. :return: how many rows."""
        which = {"before": to_text(before)[:10]}
        for sql in (_PURGE_CHUNKS, _PURGE):
            deleted = self._database.execute_in_steps(sql, which, rows_per_commit=_ROWS_PER_COMMIT, is_background=True)
        return deleted


def _to_record(row: Any) -> UsageRow:
    if row["accepted"] is None:  # nothing was used
        return UsageRow()
    costs = (row["costs"] or "").split(",")
    return from_row(
        UsageRow,
        row,
        seconds=row["microseconds"] / 1e6,
        cost=total(Decimal(cost) for cost in costs if cost),
        is_cost_final=not row["is_estimated"],
    )

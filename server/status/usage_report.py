"""The usage of a period as it is shown: which rows are asked for, their JSON and CSV, and what is left of quotas.

Used by the views and the page of usage, and by `mlg usage`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

from provider_image.errors import InvalidParams
from server.csv_cells import to_cell
from server.record_json import fields
from store.clients.keys import KeyRecord
from store.clients.usage import MAX_ROWS, OUTCOMES, USAGE_BY, UsageRow
from store.rows import to_text
from store.store import Store

#: Days of a period that is not given, and of the longest.
DEFAULT_DAYS = 30
MAX_DAYS = 400
#: The columns that are counted.
COUNTS = ("accepted", "refused", *OUTCOMES, "bytes", "seconds", "cost", "cost_is_final")


@dataclass(frozen=True, kw_only=True)
class UsageQuery:
    """Which usage is asked for."""

    #: First and last day, UTC.
    since: date
    until: date
    #: Some of USAGE_BY.
    by: tuple[str, ...]
    #: Id of the key whose usage it is; None for that of all.
    key_id: str | None = None

    @classmethod
    def parse(cls, given: Mapping[str, str], *, now: datetime, key_id: str | None) -> UsageQuery:
        """Read `since`, `until` and `by`. :raises InvalidParams:"""
        until = _parse_day("until", given["until"]) if given.get("until") else date.fromisoformat(to_text(now)[:10])
        first = until - min(timedelta(days=DEFAULT_DAYS - 1), until - date.min)
        since = _parse_day("since", given["since"]) if given.get("since") else first
        if not 0 <= (until - since).days < MAX_DAYS:
            raise InvalidParams(f"since is a day before until, and between them are at most {MAX_DAYS} days.")
        by = tuple(dict.fromkeys(name.strip() for name in (given.get("by") or "day").split(",")))
        if not set(by) <= set(USAGE_BY):
            raise InvalidParams(f"by takes some of {', '.join(USAGE_BY)}, with commas between.")
        return cls(since=since, until=until, by=by, key_id=key_id)

    def read(self, store: Store) -> list[UsageRow]:
        """Read the rows. :raises InvalidParams: there are too many."""
        rows = store.usage.list(since=self.since, until=self.until, by=self.by, key_id=self.key_id, limit=MAX_ROWS + 1)
        if len(rows) > MAX_ROWS:
            raise InvalidParams(f"These are more than {MAX_ROWS} rows. Ask for fewer days, or group by less.")
        return rows

    def read_total(self, store: Store) -> UsageRow:
        """Read the sums of the whole period."""
        (total,) = store.usage.list(since=self.since, until=self.until, key_id=self.key_id)
        return total


def show_row(row: UsageRow, by: Sequence[str] = ()) -> dict[str, Any]:
    """Build the JSON of a row. :param by: what it is grouped by."""
    names = " ".join([*by, *(["key_name"] if "key" in by else [])])
    counts = fields(row, f"accepted refused {' '.join(OUTCOMES)} bytes seconds cost")
    return {**fields(row, names), **counts, "cost_is_final": row.is_cost_final}


def csv_text(rows: Iterable[UsageRow], by: Sequence[str]) -> str:
    """Write rows as CSV."""
    names = [*by, *(["key_name"] if "key" in by else []), *COUNTS]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    for row in rows:
        shown = show_row(row, by)
        writer.writerow([to_cell(shown[name]) for name in names])
    return text.getvalue()


def show_quotas(store: Store, keys: Iterable[KeyRecord], *, now: datetime) -> list[dict[str, Any]]:
    """List what is left of the quotas of keys, for those that are valid and have one."""
    shown = []
    for key in keys:
        if not key.is_usable(now) or (key.images_per_day is None and key.requests_per_minute is None):
            continue
        count = store.keys.images_used(key.id, now=now)
        left = None if key.images_per_day is None else max(0, key.images_per_day - count)
        names = fields(key, "images_per_day requests_per_minute")
        shown.append({"key": key.id, "key_name": key.name, **names, "images_today": count, "images_left": left})
    return shown


def _parse_day(name: str, text: str) -> date:
    try:
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
            return date.fromisoformat(text)
    except ValueError:
        pass
    raise InvalidParams(f"{name} takes a day, for example {name}=2026-11-20")

"""The figures of the operator: everything that the operator's page shows, as one JSON document.

Made once in each server process by `server/api/views/operator.py`. Each figure is kept for a second or two, those of
money for longer, so that any number of open pages costs one look at the store. It must not change anything.

What a minute brought is read once: minutes that are over are remembered, and only the latest are read again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from server.status.dashboard_rows import (
    MinuteTotals,
    batcher_row,
    chunk_row,
    failure_rows,
    latency_row,
    pause_row,
    provider_row,
    throughput_row,
    to_seconds,
)
from server.status.queue_stats import QueueStats
from server.status.stale_cache import StaleCache
from store.amounts import format_amount
from store.chunks import BatcherRecord, ChunkRecord
from store.controls import read_control_state
from store.cost_split import to_amount
from store.ledger import AllocationRecord, CostRow
from store.providers import ProviderRecord
from store.records import to_text
from store.sqlite import SqliteStore
from store.stats import MinuteStats

#: Minutes that a chart shows.
CHART_MINUTES = 60
#: Minutes that are added up; a day.
DAY_MINUTES = 1440
#: A chunk's end may be noted so many minutes late; these are read again.
LATE_MINUTES = 5
#: Requests answered last, of which the latencies are taken; points of the chart of size and seconds; failures.
RECENT_ANSWERS = 1000
MAX_POINTS = 300
RECENT_FAILURES = 500
#: Chunks under way that are listed.
MAX_CHUNKS = 200
#: Providers that are listed, those seen last.
MAX_PROVIDERS = 100


@dataclass(frozen=True, kw_only=True)
class Spending:
    """What was spent, and on whom."""

    total: Decimal
    today: Decimal
    allocations: Sequence[AllocationRecord]
    by_provider: dict[str, CostRow]
    providers: Sequence[ProviderRecord]
    #: Provider -> model -> images a second.
    speeds: dict[str, dict[str, float]]


@dataclass
class _MinuteCache:
    """The minutes that were read."""

    #: minute -> model -> what it brought.
    by_minute: dict[str, dict[str, MinuteStats]] = field(default_factory=dict)
    #: Beginning of a minute -> requests that came in before it.
    arrived: dict[datetime, int] = field(default_factory=dict)
    read_at: datetime | None = None


class Dashboard:
    """The figures of one server process.

    :param queue_stats: what waits and who works; shared with the other views.
    """

    def __init__(self, store: SqliteStore, queue_stats: QueueStats, clock: Callable[[], datetime]) -> None:
        self.store = store
        self._traffic = queue_stats
        self.clock = clock
        self._minutes = _MinuteCache()
        self._throughput = StaleCache(self._read_minutes, fresh_seconds=1.5, stale_seconds=10)
        self._answers = StaleCache(lambda: store.list_answered(limit=RECENT_ANSWERS), fresh_seconds=2, stale_seconds=10)
        self._failures = StaleCache(self._read_failures, fresh_seconds=2, stale_seconds=10)
        self._spending = StaleCache(self._read_spending, fresh_seconds=15, stale_seconds=300)
        self._chunks = StaleCache(
            lambda: store.list_unfinished_chunks(limit=MAX_CHUNKS), fresh_seconds=1, stale_seconds=5
        )

    def status(self) -> dict[str, Any]:
        """Build the JSON of everything. :raises StoreError:"""
        now = self.clock()
        pause = read_control_state(self.store).pause
        batchers = self._traffic.batchers()
        queue = self.queue()
        return {
            "at": to_text(now),
            "hold": None if pause is None else pause_row(pause),
            "queue": queue,
            "waiting": sum(row["waiting"] for row in queue),
            "claimed": sum(row["claimed"] for row in queue),
            "is_idle": not any(row["claimed"] for row in queue),
            "chunks": [chunk_row(chunk, now) for chunk in self.under_way()],
            "batchers": [batcher_row(batcher, now) for batcher in batchers],
            "capacity": sum(batcher.capacity for batcher in batchers),
            "throughput": self._throughput_json(),
            "latency": latency_row(self._answers.get()),
            "failures": self._failures.get(),
            "providers": self._providers_json(now),
            "money": self._spending_json(batchers),
            "points": [
                {"model": each.model, "bytes": each.image_bytes, "seconds": round(each.seconds, 4)}
                for each in self._answers.get()[:MAX_POINTS]
                if each.seconds is not None
            ],
        }

    def queue(self) -> list[dict[str, Any]]:
        """List what waits and is worked on, by model. :raises StoreError:"""
        now = self.clock()
        return [
            {
                "model": each.model,
                "service": each.service,
                "waiting": each.waiting,
                "claimed": each.claimed,
                "oldest_at": None if each.oldest_at is None else to_text(each.oldest_at),
                "oldest_seconds": None if each.oldest_at is None else to_seconds(now - each.oldest_at),
            }
            for each in self._traffic.backlog()
        ]

    def batchers(self) -> Sequence[BatcherRecord]:
        """List the batchers that are alive. :raises StoreError:"""
        return self._traffic.batchers()

    def under_way(self) -> list[ChunkRecord]:
        """List the chunks that live batchers have under way. :raises StoreError:"""
        alive = {batcher.id for batcher in self._traffic.batchers()}
        return [chunk for chunk in self._chunks.get() if chunk.batcher_id in alive]

    def minutes(self) -> list[MinuteTotals]:
        """List what each minute of the last day brought, oldest first, the present one last. :raises StoreError:"""
        return self._throughput.get()

    def spending(self) -> Spending:
        """Tell what was spent, as of some seconds ago. :raises StoreError:"""
        return self._spending.get()

    def invalidate(self) -> None:
        """Find anew what an operator has just changed."""
        self._spending.invalidate()

    # Finding

    def _read_minutes(self) -> list[MinuteTotals]:
        """Read the latest minutes, all of a day at first, and add up the models."""
        now = self.clock().astimezone(UTC).replace(second=0, microsecond=0)
        first = now - timedelta(minutes=DAY_MINUTES - 1)
        known = self._minutes
        is_known = known.read_at is not None and first <= known.read_at <= now
        since = known.read_at - timedelta(minutes=LATE_MINUTES) if is_known and known.read_at else first
        retained = {
            minute: row for minute, row in known.by_minute.items() if _minute_key(first) <= minute < _minute_key(since)
        }
        for row in self.store.list_minute_stats(since):
            retained.setdefault(row.minute, {})[row.model] = row
        # How many came in before the beginning of each minute; that of a past minute never changes.
        marks = [now - timedelta(minutes=back) for back in range(CHART_MINUTES - 1, -1, -1)]
        day_ago = now - timedelta(days=1)
        unknown = sorted(mark for mark in {*marks, day_ago} if mark not in known.arrived)
        arrived = {mark: count for mark, count in known.arrived.items() if mark >= day_ago}
        arrived.update(zip(unknown, self.store.count_accepted_before(unknown), strict=True))
        self._minutes = _MinuteCache(by_minute=retained, arrived=arrived, read_at=now)
        counts = [*(arrived[mark] for mark in marks), self.store.count_accepted()]
        arrivals = {_minute_key(mark): counts[index + 1] - counts[index] for index, mark in enumerate(marks)}
        sums = []
        for back in range(DAY_MINUTES - 1, -1, -1):
            minute = _minute_key(now - timedelta(minutes=back))
            rows = retained.get(minute, {}).values()
            sums.append(
                MinuteTotals(
                    minute=minute,
                    arrived=arrivals.get(minute, 0),
                    answered=sum(row.answered for row in rows),
                    images=sum(row.images for row in rows),
                    failed=sum(row.failed for row in rows),
                )
            )
        return sums

    def _read_failures(self) -> dict[str, Any]:
        return {
            "requests": failure_rows(self.store.list_failures(limit=RECENT_FAILURES)),
            "chunks": failure_rows(self.store.list_failed_chunks(limit=RECENT_FAILURES)),
            "of_latest": RECENT_FAILURES,
        }

    def _read_spending(self) -> Spending:
        midnight = self.clock().astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        speeds: dict[str, dict[str, float]] = defaultdict(dict)
        for speed in self.store.speeds():
            speeds[speed.provider_id][speed.model] = speed.images_per_second
        return Spending(
            total=self.store.spent(),
            today=self.store.spent(since=midnight),
            allocations=self.store.allocations(is_open=True),
            by_provider={row.key: row for row in self.store.costs("provider")},
            providers=self.store.list_providers(),
            speeds=dict(speeds),
        )

    # Showing

    def _throughput_json(self) -> dict[str, Any]:
        minutes = self._throughput.get()
        chart = minutes[-CHART_MINUTES:]
        seconds_of_last = self.clock().second
        counts = self._minutes.arrived
        return {
            "hour": throughput_row(
                chart, CHART_MINUTES - 1 + seconds_of_last / 60, sum(minute.arrived for minute in chart)
            ),
            "day": throughput_row(
                minutes, DAY_MINUTES - 1 + seconds_of_last / 60, self.store.count_accepted() - counts[min(counts)]
            ),
            "minutes": [
                {
                    "minute": each.minute + "Z",
                    "arrived": each.arrived,
                    "answered": each.answered,
                    "images": each.images,
                    "failed": each.failed,
                }
                for each in chart
            ],
        }

    def _providers_json(self, now: datetime) -> list[dict[str, Any]]:
        spending = self._spending.get()
        return [
            provider_row(provider, spending.speeds.get(provider.id, {}), spending.by_provider.get(provider.id), now)
            for provider in spending.providers[:MAX_PROVIDERS]
        ]

    def _spending_json(self, batchers: Sequence[BatcherRecord]) -> dict[str, Any]:
        spending = self._spending.get()
        budget = {name: smallest_budget(batchers, name) for name in ("day", "total")}
        left = {
            "day": _remaining_budget(budget["day"], spending.today),
            "total": _remaining_budget(budget["total"], spending.total),
        }
        return {
            "today": to_amount(spending.today),
            "total": to_amount(spending.total),
            "today_shown": format_amount(spending.today),
            "left_day_shown": None if left["day"] is None else format_amount(left["day"]),
            "total_shown": format_amount(spending.total),
            **{f"budget_{name}": None if amount is None else to_amount(amount) for name, amount in budget.items()},
            **{f"left_{name}": None if amount is None else to_amount(amount) for name, amount in left.items()},
            "allocations": [
                {"id": each.id, "amount": to_amount(each.amount), "created_at": to_text(each.created_at)}
                for each in spending.allocations
            ],
        }


def smallest_budget(batchers: Iterable[BatcherRecord], name: str) -> Decimal | None:
    """Return the smallest of what live batchers may spend. :param name: day or total; None when none has one."""
    return min((Decimal(batcher.budget[name]) for batcher in batchers if name in batcher.budget), default=None)


def _remaining_budget(budget: Decimal | None, spent: Decimal) -> Decimal | None:
    return None if budget is None else max(Decimal(0), budget - spent)


def _minute_key(minute: datetime) -> str:
    return minute.strftime("%Y-%m-%dT%H:%M")

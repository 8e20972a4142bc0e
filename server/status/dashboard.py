"""The dashboard: everything that the operator's page shows, as one JSON document.

Made once in each server process by `server/app.py`, and read by the operator's views, `metrics.py` and `mlg operate`.
Each figure is cached for a second or two, the spending for longer, so any number of open pages costs one read of the
store. The statistics of past minutes are cached for a day; only the latest minutes are read again. It must not change
the store.

"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from server.record_json import fields, to_json
from server.status.queue_stats import QueueStats
from server.status.stale_cache import StaleCache
from store.amounts import EXACT, ZERO, format_amount
from store.chunks import ChunkRecord
from store.pipelines.definition import PIPELINE
from store.processes.batchers import BatcherRecord
from store.rentals.ledger import AllocationRecord, CostRow
from store.rentals.providers import ProviderRecord
from store.rows import to_text
from store.stats import AnsweredRequest, FailureRecord, MinuteStats
from store.store import Store

#: Minutes in a chart.
CHART_MINUTES = 60
#: Minutes in the daily sums.
DAY_MINUTES = 1440
#: The end of a chunk may be recorded this many minutes late; these minutes are read again.
LATE_MINUTES = 5
#: Latest results for the latencies, points in the chart of size and seconds, latest failures.
RECENT_ANSWERS = 1000
MAX_POINTS = 300
RECENT_FAILURES = 500
#: Running chunks that are listed.
MAX_CHUNKS = 200
#: Providers that are listed, the most recently seen first.
MAX_PROVIDERS = 100
#: The counts of a minute beside the requests that arrived.
_TOTALS = ("answered", "images", "failed")


@dataclass(frozen=True, kw_only=True)
class Spending:
    """What was spent, in total and by provider."""

    total: Decimal
    today: Decimal
    #: What counts against budgets, as the batchers see it: paid, and reserved for agreements; day and total.
    used: dict[str, Decimal]
    allocations: Sequence[AllocationRecord]
    by_provider: dict[str, CostRow]
    providers: Sequence[ProviderRecord]
    #: Provider -> model -> images per second.
    speeds: dict[str, dict[str, float]]


class Dashboard:
    """The dashboard of one server process.

    :param queue_stats: waiting requests and live batchers; shared with the other views.
    """

    def __init__(self, store: Store, queue_stats: QueueStats, clock: Callable[[], datetime]) -> None:
        self.store = store
        self.queue_stats = queue_stats
        self.clock = clock
        #: The minutes read so far: minute -> model -> its statistics.
        self._by_minute: dict[str, dict[str, MinuteStats]] = {}
        #: Start of a minute -> requests received before it.
        self._arrived: dict[datetime, int] = {}
        self._read_at: datetime | None = None
        #: The counts of each minute of the last day, oldest first.
        self.minutes = StaleCache(self._read_minutes, fresh_seconds=1.5, stale_seconds=10)
        #: What was spent.
        self.spending = StaleCache(self._read_spending, fresh_seconds=15, stale_seconds=300)
        self._answers = StaleCache(
            lambda: store.stats.list_answered(limit=RECENT_ANSWERS), fresh_seconds=2, stale_seconds=10
        )
        self._failures = StaleCache(self._read_failures, fresh_seconds=2, stale_seconds=10)
        self._chunks = StaleCache(
            lambda: store.stats.list_unfinished_chunks(limit=MAX_CHUNKS), fresh_seconds=1, stale_seconds=5
        )

    def status(self) -> dict[str, Any]:
        """Return the whole dashboard as JSON. :raises StoreError:"""
        now = self.clock()
        pause = self.store.controls.state().pause
        batchers = self.queue_stats.batchers()
        queue = self.queue()
        return {
            "at": to_text(now),
            "hold": None if pause is None else fields(pause, "mode by since reason notice"),
            "queue": queue,
            "waiting": sum(row["waiting"] for row in queue),
            "claimed": sum(row["claimed"] for row in queue),
            "is_idle": not any(row["claimed"] for row in queue),
            "chunks": [
                {**fields(chunk, "id model items executor"), "seconds": _to_seconds(now - chunk.dispatched_at)}
                for chunk in self.running_chunks()
            ],
            "batchers": [
                {
                    **fields(batcher, "id host pid executor capacity"),
                    "up_seconds": _to_seconds(now - batcher.started_at),
                    "seen_seconds": _to_seconds(now - batcher.seen_at),
                    "notices": sorted(set(batcher.notices.values())),
                }
                for batcher in batchers
            ],
            "capacity": sum(batcher.capacity for batcher in batchers),
            "throughput": self._throughput_json(),
            "latency": _latency_row(self._answers.get()),
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
        """Return the waiting and claimed requests, by model, pipelines left out. :raises StoreError:"""
        now = self.clock()
        return [
            {
                **fields(each, "model service waiting claimed oldest_at"),
                "oldest_seconds": None if each.oldest_at is None else _to_seconds(now - each.oldest_at),
            }
            for each in self.queue_stats.backlog()
            if each.service != PIPELINE
        ]

    def running_chunks(self) -> list[ChunkRecord]:
        """Return the running chunks of live batchers. :raises StoreError:"""
        alive = {batcher.id for batcher in self.queue_stats.batchers()}
        return [chunk for chunk in self._chunks.get() if chunk.batcher_id in alive]

    def _read_minutes(self) -> list[dict[str, Any]]:
        """Read the latest minutes, at first those of a whole day, and sum over the models."""
        now = self.clock().astimezone(UTC).replace(second=0, microsecond=0)
        first = now - timedelta(minutes=DAY_MINUTES - 1)
        since = first
        if self._read_at is not None and first <= self._read_at <= now:
            since = self._read_at - timedelta(minutes=LATE_MINUTES)
        retained = {
            minute: row for minute, row in self._by_minute.items() if _minute_key(first) <= minute < _minute_key(since)
        }
        for row in self.store.stats.list_minute_stats(since):
            retained.setdefault(row.minute, {})[row.model] = row
        # Requests received before the start of each minute; the count of a past minute never changes.
        marks = [now - timedelta(minutes=back) for back in range(CHART_MINUTES - 1, -1, -1)]
        day_ago = now - timedelta(days=1)
        unknown = sorted(mark for mark in {*marks, day_ago} if mark not in self._arrived)
        arrived = {mark: count for mark, count in self._arrived.items() if mark >= day_ago}
        arrived.update(zip(unknown, self.store.stats.count_accepted_before(unknown), strict=True))
        self._by_minute, self._arrived, self._read_at = retained, arrived, now
        counts = [*(arrived[mark] for mark in marks), self.store.stats.count_accepted()]
        arrivals = {_minute_key(mark): counts[index + 1] - counts[index] for index, mark in enumerate(marks)}
        sums = []
        for back in range(DAY_MINUTES - 1, -1, -1):
            minute = _minute_key(now - timedelta(minutes=back))
            rows = retained.get(minute, {}).values()
            totals = {name: sum(getattr(row, name) for row in rows) for name in _TOTALS}
            sums.append({"minute": minute, "arrived": arrivals.get(minute, 0), **totals})
        return sums

    def _read_failures(self) -> dict[str, Any]:
        return {
            "requests": _failure_rows(self.store.stats.list_failures(limit=RECENT_FAILURES)),
            "chunks": _failure_rows(self.store.stats.list_failed_chunks(limit=RECENT_FAILURES)),
            "of_latest": RECENT_FAILURES,
        }

    def _read_spending(self) -> Spending:
        now = self.clock().astimezone(UTC)
        return Spending(
            total=self.store.ledger.spent(),
            today=self.store.ledger.spent(since=now.replace(hour=0, minute=0, second=0, microsecond=0)),
            used=self.store.reservations.used_by_all(now=now),
            allocations=self.store.ledger.allocations(is_open=True),
            by_provider={row.key: row for row in self.store.ledger.costs("provider")},
            providers=self.store.providers.list(),
            speeds=self.store.providers.speeds(),
        )

    def _throughput_json(self) -> dict[str, Any]:
        minutes = self.minutes.get()
        chart = minutes[-CHART_MINUTES:]
        seconds_of_last = self.clock().second
        counts = self._arrived
        return {
            "hour": _throughput_row(
                chart, CHART_MINUTES - 1 + seconds_of_last / 60, sum(minute["arrived"] for minute in chart)
            ),
            "day": _throughput_row(
                minutes, DAY_MINUTES - 1 + seconds_of_last / 60, self.store.stats.count_accepted() - counts[min(counts)]
            ),
            "minutes": [{**each, "minute": each["minute"] + "Z"} for each in chart],
        }

    def _providers_json(self, now: datetime) -> list[dict[str, Any]]:
        spending = self.spending.get()
        return [
            _provider_row(provider, spending.speeds.get(provider.id, {}), spending.by_provider.get(provider.id), now)
            for provider in spending.providers[:MAX_PROVIDERS]
        ]

    def _spending_json(self, batchers: Sequence[BatcherRecord]) -> dict[str, Any]:
        spending = self.spending.get()
        budget = {name: smallest_budget(batchers, name) for name in ("day", "total")}
        left = {
            name: None if amount is None else max(ZERO, EXACT.subtract(amount, spending.used[name]))
            for name, amount in budget.items()
        }
        return {
            **fields(spending, "today total"),
            "today_shown": format_amount(spending.today),
            "left_day_shown": None if left["day"] is None else format_amount(left["day"]),
            "total_shown": format_amount(spending.total),
            **{f"used_{name}": to_json(amount) for name, amount in spending.used.items()},
            **{f"used_{name}_shown": format_amount(amount) for name, amount in spending.used.items()},
            **{f"budget_{name}": to_json(amount) for name, amount in budget.items()},
            **{f"left_{name}": to_json(amount) for name, amount in left.items()},
            "allocations": [fields(each, "id amount created_at") for each in spending.allocations],
        }


def smallest_budget(batchers: Iterable[BatcherRecord], name: str) -> Decimal | None:
    """Return the smallest budget of the live batchers. :param name: day or total. :return: None if there is none."""
    return min((Decimal(batcher.budget[name]) for batcher in batchers if name in batcher.budget), default=None)


def ban_fields(provider: ProviderRecord, now: datetime) -> dict[str, Any]:
    """Return the ban of a provider as JSON; a ban that is over is none."""
    is_banned = provider.is_banned(now)
    ban = fields(provider, "banned_until ban_reason")
    return {"is_banned": is_banned, **(ban if is_banned else dict.fromkeys(ban))}


def _minute_key(minute: datetime) -> str:
    return minute.strftime("%Y-%m-%dT%H:%M")


def _to_seconds(length: timedelta) -> float:
    """Return a duration in seconds, at least 0."""
    return round(max(0.0, length.total_seconds()), 1)


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Return the percentile by nearest rank. :param ordered: ascending, not empty. :param share: from 0 to 1."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _throughput_row(minutes: Sequence[dict[str, Any]], length: float, arrived: int) -> dict[str, Any]:
    """Sum minutes up. :param length: minutes that have passed, including the elapsed part of the present one."""
    totals = {name: sum(each[name] for each in minutes) for name in _TOTALS}
    rates = {f"{name}_per_minute": round(totals[name] / length, 2) for name in ("answered", "images")}
    return {"arrived": arrived, **totals, **rates}


def _latency_row(answers: Sequence[AnsweredRequest]) -> dict[str, Any]:
    """Return percentiles of the latest results: seconds until the last claim, until the result, and in the model."""
    lengths = {
        "wait": sorted(max(0.0, (each.claimed_at - each.created_at).total_seconds()) for each in answers),
        "answer": sorted(max(0.0, (each.finished_at - each.created_at).total_seconds()) for each in answers),
        "model": sorted(each.seconds for each in answers if each.seconds is not None),
    }
    return {
        "of": len(answers),
        **{
            name: {f"p{percent}": round(_percentile(found, percent / 100), 4) for percent in (50, 95, 99)}
            if found
            else None
            for name, found in lengths.items()
        },
    }


def _failure_rows(failures: Sequence[FailureRecord]) -> list[dict[str, Any]]:
    """Group failures by code, most frequent first, each with its latest reason."""
    counts = Counter(failure.code for failure in failures)
    latest: dict[str, FailureRecord] = {}
    for failure in failures:
        latest.setdefault(failure.code, failure)
    return [
        {
            "code": code,
            "count": count,
            **fields(latest[code], "model provider reason"),
            "latest_id": latest[code].id,
            "latest_at": to_text(latest[code].finished_at),
        }
        for code, count in counts.most_common()
    ]


def _provider_row(
    provider: ProviderRecord, speeds: dict[str, float], costs: CostRow | None, now: datetime
) -> dict[str, Any]:
    """Return a provider as JSON. :param speeds: model -> images per second."""
    spent = Decimal(0) if costs is None else costs.spent
    best = min((provider.price_per_1000_images(speed) for speed in speeds.values()), default=None)
    return {
        **fields(provider, "id name"),
        "score": round(provider.score, 3),
        **fields(provider, "done failed images"),
        "per_hour": format_amount(provider.price_per_hour),
        "per_1000_images": None if best is None else format_amount(best),
        "spent": format_amount(spent),
        "seen_at": to_text(provider.seen_at),
        **ban_fields(provider, now),
        "is_banned_by_operator": provider.is_banned(now) and provider.is_banned_by_operator,
    }

"""The figures of the operator as JSON, a row at a time.

Called by `figures.py`, which finds them. Nothing here reads the store.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from store.amounts import format_amount, price_per_1000_images, price_per_hour
from store.chunks import BatcherRecord, ChunkRecord
from store.controls import Pause
from store.ledger import CostRow
from store.providers import ProviderRecord
from store.records import to_text
from store.stats import AnsweredRequest, FailureRecord


@dataclass(frozen=True, kw_only=True)
class MinuteTotals:
    """What one minute brought, all models together."""

    minute: str
    arrived: int
    answered: int
    images: int
    failed: int


def to_seconds(length: timedelta) -> float:
    """Write a length of time as seconds, none of them negative."""
    return round(max(0.0, length.total_seconds()), 1)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value that this share of the values does not exceed. :param ordered: ascending, not empty."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def pause_row(pause: Pause) -> dict[str, Any]:
    """Write that work is held."""
    return {
        "mode": str(pause.mode),
        "by": pause.by,
        "since": to_text(pause.since),
        "reason": pause.reason,
        "notice": pause.notice,
    }


def chunk_row(chunk: ChunkRecord, now: datetime) -> dict[str, Any]:
    """Write a chunk that is under way."""
    return {
        "id": chunk.id,
        "model": chunk.model,
        "items": chunk.items,
        "executor": chunk.executor,
        "seconds": to_seconds(now - chunk.dispatched_at),
    }


def batcher_row(batcher: BatcherRecord, now: datetime) -> dict[str, Any]:
    """Write a batcher that is alive."""
    return {
        "id": batcher.id,
        "host": batcher.host,
        "pid": batcher.pid,
        "executor": batcher.executor,
        "capacity": batcher.capacity,
        "up_seconds": to_seconds(now - batcher.started_at),
        "seen_seconds": to_seconds(now - batcher.seen_at),
        "notices": sorted(set(batcher.notices.values())),
    }


def throughput_row(minutes: Sequence[MinuteTotals], length: float, arrived: int) -> dict[str, Any]:
    """Add minutes up. :param length: minutes that have passed, so that the present one counts for what it is."""
    answered, images = sum(each.answered for each in minutes), sum(each.images for each in minutes)
    return {
        "arrived": arrived,
        "answered": answered,
        "images": images,
        "failed": sum(each.failed for each in minutes),
        "answered_per_minute": round(answered / length, 2),
        "images_per_minute": round(images / length, 2),
    }


def latency_row(answers: Sequence[AnsweredRequest]) -> dict[str, Any]:
    """Tell how long the latest answers took: in the queue until they were taken the last time, and in all."""
    lengths = {
        "wait": sorted(max(0.0, (each.claimed_at - each.created_at).total_seconds()) for each in answers),
        "answer": sorted(max(0.0, (each.finished_at - each.created_at).total_seconds()) for each in answers),
        "model": sorted(each.seconds for each in answers if each.seconds is not None),
    }
    return {
        "of": len(answers),
        **{
            name: {f"p{percent}": round(percentile(found, percent / 100), 4) for percent in (50, 95, 99)}
            if found
            else None
            for name, found in lengths.items()
        },
    }


def failure_rows(failures: Sequence[FailureRecord]) -> list[dict[str, Any]]:
    """Group failures by code, the most frequent first; each with its latest reason."""
    counts = Counter(failure.code for failure in failures)
    latest: dict[str, FailureRecord] = {}
    for failure in failures:
        latest.setdefault(failure.code, failure)
    return [
        {
            "code": code,
            "count": count,
            "model": latest[code].model,
            "provider": latest[code].provider,
            "reason": latest[code].reason,
            "latest_id": latest[code].id,
            "latest_at": to_text(latest[code].finished_at),
        }
        for code, count in counts.most_common()
    ]


def provider_row(
    provider: ProviderRecord, speeds: dict[str, float], costs: CostRow | None, now: datetime
) -> dict[str, Any]:
    """Write what is known about a provider. :param speeds: model -> images a second."""
    is_banned = provider.is_banned(now)
    spent = Decimal(0) if costs is None else costs.paid + costs.open
    best = min((price_per_1000_images(provider, speed) for speed in speeds.values()), default=None)
    return {
        "id": provider.id,
        "name": provider.name,
        "score": round(provider.score, 3),
        "done": provider.done,
        "failed": provider.failed,
        "images": provider.images,
        "per_hour": format_amount(price_per_hour(provider)),
        "per_1000_images": None if best is None else format_amount(best),
        "spent": format_amount(spent),
        "seen_at": to_text(provider.seen_at),
        "is_banned": is_banned,
        "banned_until": to_text(provider.banned_until) if is_banned and provider.banned_until else None,
        "ban_reason": provider.ban_reason if is_banned else None,
        "is_banned_by_operator": is_banned and provider.is_banned_by_operator,
    }

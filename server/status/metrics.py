"""What Prometheus reads: the figures of a home in its text format, version 0.0.4.

Called by `server/api/views/operator.py`. Every figure comes from the store, not from this process, so it is the same
whichever server process answers. What is called `_total`, and the histogram, only ever grows: it stands in the store's
totals, which retention does not touch. Written by hand, because it is a screenful of text; a library that counts
inside each process would have nothing to count here.
"""

from __future__ import annotations

import functools
import math
import platform
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from server.status.dashboard import CHART_MINUTES, Dashboard, smallest_budget
from store.controls import Mode, read_control_state
from store.stats import OutcomeTotal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: Codes of failures that have a series of their own, the others share one.
MAX_CODES = 50
#: What the series of the other codes is called.
OTHER = "other"

Labels = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A metric with all its series."""

    name: str
    #: counter, gauge or histogram.
    kind: str
    help: str
    #: End of the name, labels, value.
    samples: Sequence[tuple[str, Labels, float]]


def exposition(families: Iterable[Family]) -> str:
    """Write families in the text format."""
    lines = []
    for family in families:
        lines.append(f"# HELP {family.name} {_escaped(family.help)}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        for end, labels, value in family.samples:
            inside = ",".join(f'{name}="{_escaped(text, is_label=True)}"' for name, text in labels.items())
            lines.append(
                f"{family.name}{end}{{{inside}}} {_number(value)}" if inside else f"{family.name}{end} {_number(value)}"
            )
    return "\n".join(lines) + "\n"


def families(dashboard: Dashboard) -> Iterator[Family]:
    """List all metrics. :raises StoreError:"""
    yield _single_sample(
        "mlg_build_info", "gauge", "The version that answers; always 1.", 1, version=_version(), python=_python()
    )
    yield from _request_metrics(dashboard)
    yield from _queue(dashboard)
    yield from _workers(dashboard)
    yield from _spending(dashboard)


def _request_metrics(dashboard: Dashboard) -> Iterator[Family]:
    totals = dashboard.store.list_totals()
    ended: dict[tuple[str, str], int] = defaultdict(int)
    codes: dict[str, int] = defaultdict(int)
    buckets: dict[str, dict[float, int]] = defaultdict(lambda: defaultdict(int))
    seconds: dict[str, float] = defaultdict(float)
    for total in totals:
        ended[total.model, total.outcome] += total.count
        if total.outcome == "failed":
            codes[total.code] += total.count
        if total.outcome == "done":
            buckets[total.model][total.up_to] += total.count
            seconds[total.model] += total.seconds
    yield _single_sample(
        "mlg_requests_accepted_total",
        "counter",
        "Requests that were ever taken in.",
        # Read after the totals, so that no more have ended than came in.
        dashboard.store.count_accepted(),
    )
    yield Family(
        name="mlg_requests_ended_total",
        kind="counter",
        help="Requests that ended, by outcome: done, cached (an earlier answer), failed, cancelled, expired.",
        samples=[("", {"model": model, "outcome": how}, count) for (model, how), count in sorted(ended.items())],
    )
    yield Family(
        name="mlg_requests_failed_total",
        kind="counter",
        help="Requests that failed, by code.",
        samples=[("", {"code": code}, count) for code, count in _limit_codes(codes)],
    )
    yield Family(
        name="mlg_request_seconds",
        kind="histogram",
        help="Seconds from a request's arrival to its answer; those answered from an earlier one left out.",
        samples=[sample for model in sorted(buckets) for sample in _histogram(model, buckets, seconds, totals)],
    )


def _histogram(
    model: str, buckets: Mapping[str, Mapping[float, int]], seconds: Mapping[str, float], totals: Sequence[OutcomeTotal]
) -> Iterator[tuple[str, Labels, float]]:
    # The classes of all models, so that those of one can be added to those of another.
    bounds = sorted({total.up_to for total in totals} | {math.inf})
    count = 0
    for end in bounds:
        count += buckets[model].get(end, 0)
        yield "_bucket", {"model": model, "le": _number(end)}, count
    yield "_sum", {"model": model}, seconds[model]
    yield "_count", {"model": model}, count


def _queue(dashboard: Dashboard) -> Iterator[Family]:
    queue = dashboard.queue()

    def by_model(name: str, help: str, key: str) -> Family:
        samples = [("", {"model": row["model"]}, row[key] or 0) for row in queue]
        return Family(name=name, kind="gauge", help=help, samples=samples)

    yield by_model("mlg_queue_waiting", "Requests that wait.", "waiting")
    yield by_model("mlg_queue_oldest_seconds", "Age of the oldest request that waits.", "oldest_seconds")
    yield by_model("mlg_queue_claimed", "Requests that are being worked on.", "claimed")
    minutes = dashboard.minutes()[-CHART_MINUTES:]
    for name, help, count in (
        ("mlg_answered_last_hour", "Requests that chunks answered in the last hour.", sum(m.answered for m in minutes)),
        ("mlg_images_last_hour", "Pictures computed in the last hour.", sum(m.images for m in minutes)),
    ):
        yield _single_sample(name, "gauge", help, count)
    pause = read_control_state(dashboard.store).pause
    yield Family(
        name="mlg_hold",
        kind="gauge",
        help="1 while the operator holds work in this way.",
        samples=[("", {"mode": str(mode)}, pause is not None and pause.mode is mode) for mode in Mode],
    )


def _workers(dashboard: Dashboard) -> Iterator[Family]:
    batchers = dashboard.batchers()
    yield _single_sample("mlg_batchers", "gauge", "Batchers that are alive.", len(batchers))
    yield _single_sample(
        "mlg_capacity", "gauge", "Chunks that they work on at once.", sum(each.capacity for each in batchers)
    )
    yield _single_sample(
        "mlg_chunks_under_way", "gauge", "Chunks that are being worked on.", len(dashboard.under_way())
    )
    spending = dashboard.spending()
    now = dashboard.clock()
    banned = sum(provider.is_banned(now) for provider in spending.providers)
    yield Family(
        name="mlg_providers",
        kind="gauge",
        help="Providers that ever made an offer, by whether they get work.",
        samples=[
            ("", {"state": "good"}, len(spending.providers) - banned),
            ("", {"state": "banned"}, banned),
        ],
    )


def _spending(dashboard: Dashboard) -> Iterator[Family]:
    spending = dashboard.spending()
    yield _single_sample(
        "mlg_spent_glm", "gauge", "Paid, and an estimate of what is open, in GLM.", float(spending.total)
    )
    yield _single_sample("mlg_spent_today_glm", "gauge", "The same since midnight UTC.", float(spending.today))
    yield Family(
        name="mlg_budget_glm",
        kind="gauge",
        help="Most that may be spent, as live batchers say; no series where there is no limit.",
        samples=[
            ("", {"period": period}, float(amount))
            for period in ("day", "total")
            if (amount := smallest_budget(dashboard.batchers(), period)) is not None
        ],
    )
    yield _single_sample(
        "mlg_allocations_open", "gauge", "Allocations whose money is kept ready.", len(spending.allocations)
    )
    yield _single_sample(
        "mlg_allocated_glm",
        "gauge",
        "The money that is kept ready.",
        float(sum(each.amount for each in spending.allocations)),
    )


def _single_sample(name: str, kind: str, help: str, value: float, **labels: str) -> Family:
    return Family(name=name, kind=kind, help=help, samples=[("", labels, value)])


def _limit_codes(codes: Mapping[str, int]) -> list[tuple[str, int]]:
    """Keep as many codes as may have a series, in the order of the alphabet."""
    ordered = sorted(codes.items())
    rest = sum(count for _, count in ordered[MAX_CODES:])
    return ordered[:MAX_CODES] + ([(OTHER, rest)] if rest else [])


def _number(value: float) -> str:
    if value == math.inf:
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(float(value))


def _escaped(text: str, *, is_label: bool = False) -> str:
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n")
    return escaped.replace('"', '\\"') if is_label else escaped


@functools.cache
def _version() -> str:
    try:
        return version("mlg")
    except PackageNotFoundError:
        return "unknown"


def _python() -> str:
    return platform.python_version()

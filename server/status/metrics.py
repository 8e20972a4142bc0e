"""The metrics of a home in the Prometheus text format, version 0.0.4.

Called by `server/api/views/operator.py`. Every value comes from the store, not from this process, so it is the same
whichever server process answers. Counters and the histogram never decrease: they are the store's totals, which
retention does not delete. Without a client library, because one would count inside each process.
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
from store.controls import Mode
from store.stats import OutcomeTotal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: Failure codes with a series each; all others share one.
MAX_CODES = 50
#: Label of the series of all other codes.
OTHER = "other"

Labels = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A metric with all its samples."""

    name: str
    #: counter, gauge or histogram.
    kind: str
    help: str
    #: Suffix of the name, labels, value.
    samples: Sequence[tuple[str, Labels, float]]


def exposition(families: Iterable[Family]) -> str:
    """Return families in the text format."""
    lines = []
    for family in families:
        lines.append(f"# HELP {family.name} {_escaped(family.help)}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        for suffix, labels, value in family.samples:
            inside = ",".join(f'{name}="{_escaped(text, is_label=True)}"' for name, text in labels.items())
            braces = f"{{{inside}}}" if inside else ""
            lines.append(f"{family.name}{suffix}{braces} {_number(value)}")
    return "\n".join(lines) + "\n"


def families(dashboard: Dashboard) -> Iterator[Family]:
    """Yield all metrics. :raises StoreError:"""
    yield _single_sample(
        "mlg_build_info", "gauge", "The version of the server; always 1.", 1, version=_version(), python=_python()
    )
    yield from _request_metrics(dashboard)
    yield from _queue(dashboard)
    yield from _workers(dashboard)
    yield from _spending(dashboard)


def _request_metrics(dashboard: Dashboard) -> Iterator[Family]:
    totals = dashboard.store.stats.list_totals()
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
        "Requests accepted since the start of the home.",
        # Read after the totals, so that never more requests have ended than were accepted.
        dashboard.store.stats.count_accepted(),
    )
    yield Family(
        name="mlg_requests_ended_total",
        kind="counter",
        help="Requests that ended, by outcome: done, cached (an earlier result), failed, cancelled, expired.",
        samples=[
            ("", {"model": model, "outcome": outcome}, count) for (model, outcome), count in sorted(ended.items())
        ],
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
        help="Seconds from the arrival of a request to its result, without those answered from an earlier result.",
        samples=[sample for model in sorted(buckets) for sample in _histogram(model, buckets, seconds, totals)],
    )


def _histogram(
    model: str, buckets: Mapping[str, Mapping[float, int]], seconds: Mapping[str, float], totals: Sequence[OutcomeTotal]
) -> Iterator[tuple[str, Labels, float]]:
    # Every model has the buckets of all models, so that they can be summed.
    bounds = sorted({total.up_to for total in totals} | {math.inf})
    count = 0
    for bound in bounds:
        count += buckets[model].get(bound, 0)
        yield "_bucket", {"model": model, "le": _number(bound)}, count
    yield "_sum", {"model": model}, seconds[model]
    yield "_count", {"model": model}, count


def _queue(dashboard: Dashboard) -> Iterator[Family]:
    queue = dashboard.queue()

    def by_model(name: str, help: str, key: str) -> Family:
        samples = [("", {"model": row["model"]}, row[key] or 0) for row in queue]
        return Family(name=name, kind="gauge", help=help, samples=samples)

    yield by_model("mlg_queue_waiting", "Waiting requests.", "waiting")
    yield by_model("mlg_queue_oldest_seconds", "Age of the oldest waiting request.", "oldest_seconds")
    yield by_model("mlg_queue_claimed", "Requests being processed.", "claimed")
    minutes = dashboard.minutes()[-CHART_MINUTES:]
    for name, help, count in (
        ("mlg_answered_last_hour", "Requests answered by chunks in the last hour.", sum(m.answered for m in minutes)),
        ("mlg_images_last_hour", "Images processed in the last hour.", sum(m.images for m in minutes)),
    ):
        yield _single_sample(name, "gauge", help, count)
    pause = dashboard.store.controls.state().pause
    yield Family(
        name="mlg_hold",
        kind="gauge",
        help="1 while the operator pauses or drains the batchers.",
        samples=[("", {"mode": str(mode)}, pause is not None and pause.mode is mode) for mode in Mode],
    )


def _workers(dashboard: Dashboard) -> Iterator[Family]:
    batchers = dashboard.batchers()
    yield _single_sample("mlg_batchers", "gauge", "Live batchers.", len(batchers))
    yield _single_sample(
        "mlg_capacity", "gauge", "Chunks that the batchers process at once.", sum(each.capacity for each in batchers)
    )
    yield _single_sample("mlg_chunks_under_way", "gauge", "Chunks being processed.", len(dashboard.running_chunks()))
    spending = dashboard.spending()
    now = dashboard.clock()
    banned = sum(provider.is_banned(now) for provider in spending.providers)
    yield Family(
        name="mlg_providers",
        kind="gauge",
        help="Providers that ever made an offer, by state.",
        samples=[
            ("", {"state": "good"}, len(spending.providers) - banned),
            ("", {"state": "banned"}, banned),
        ],
    )


def _spending(dashboard: Dashboard) -> Iterator[Family]:
    spending = dashboard.spending()
    yield _single_sample(
        "mlg_spent_glm", "gauge", "Spent in GLM: paid, and an estimate of open bills.", float(spending.total)
    )
    yield _single_sample("mlg_spent_today_glm", "gauge", "Spent since midnight UTC, in GLM.", float(spending.today))
    yield Family(
        name="mlg_budget_glm",
        kind="gauge",
        help="The smallest budget of the live batchers, in GLM; no series without a budget.",
        samples=[
            ("", {"period": period}, float(amount))
            for period in ("day", "total")
            if (amount := smallest_budget(dashboard.batchers(), period)) is not None
        ],
    )
    yield _single_sample("mlg_allocations_open", "gauge", "Open allocations.", len(spending.allocations))
    yield _single_sample(
        "mlg_allocated_glm",
        "gauge",
        "Amount reserved by open allocations, in GLM.",
        float(sum(each.amount for each in spending.allocations)),
    )


def _single_sample(name: str, kind: str, help: str, value: float, **labels: str) -> Family:
    return Family(name=name, kind=kind, help=help, samples=[("", labels, value)])


def _limit_codes(codes: Mapping[str, int]) -> list[tuple[str, int]]:
    """Keep the first MAX_CODES codes in alphabetical order and sum up the others."""
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

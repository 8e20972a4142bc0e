"""The metrics of a home in the Prometheus text format, version 0.0.4.

Called by `server/api/views/operator.py`. Every value comes from the store, not from this process, so it is the same
whichever server process answers. Counters and the histogram never decrease: they are the store's totals, which
retention does not delete. Without a client library, because one would count inside each process.
"""

from __future__ import annotations

import math
import platform
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from importlib.metadata import version

from server.status.dashboard import CHART_MINUTES, Dashboard, smallest_budget
from store.processes.controls import Mode
from store.stats import OutcomeTotal

_VERSION = version("mlg")
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
    python = platform.python_version()
    yield _single("mlg_build_info", "The version of the server; always 1.", 1, version=_VERSION, python=python)
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
    # Read after the totals, so that never more requests have ended than were accepted.
    accepted = dashboard.store.stats.count_accepted()
    yield _single(
        "mlg_requests_accepted_total", "Requests accepted since the start of the home.", accepted, kind="counter"
    )
    yield Family(
        name="mlg_requests_ended_total",
        kind="counter",
        help="Requests that ended, by outcome: done, cached (an earlier result), failed, cancelled, expired.",
        samples=[
            ("", {"model": model, "outcome": outcome}, count) for (model, outcome), count in sorted(ended.items())
        ],
    )
    yield _by_label(
        "mlg_requests_failed_total", "Requests that failed, by code.", "code", _limit_codes(codes), kind="counter"
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
    for name, help, key in (
        ("mlg_queue_waiting", "Waiting requests.", "waiting"),
        ("mlg_queue_oldest_seconds", "Age of the oldest waiting request.", "oldest_seconds"),
        ("mlg_queue_claimed", "Requests being processed.", "claimed"),
    ):
        yield _by_label(name, help, "model", [(row["model"], row[key] or 0) for row in queue])
    minutes = dashboard.minutes.get()[-CHART_MINUTES:]
    answered, images = (sum(each[name] for each in minutes) for name in ("answered", "images"))
    yield _single("mlg_answered_last_hour", "Requests answered by chunks in the last hour.", answered)
    yield _single("mlg_images_last_hour", "Images processed in the last hour.", images)
    pause = dashboard.store.controls.state().pause
    modes = [(str(mode), pause is not None and pause.mode is mode) for mode in Mode]
    yield _by_label("mlg_hold", "1 while the operator pauses or drains the batchers.", "mode", modes)


def _workers(dashboard: Dashboard) -> Iterator[Family]:
    batchers = dashboard.queue_stats.batchers()
    capacity = sum(batcher.capacity for batcher in batchers)
    yield _single("mlg_batchers", "Live batchers.", len(batchers))
    yield _single("mlg_capacity", "Chunks that the batchers process at once.", capacity)
    yield _single("mlg_chunks_under_way", "Chunks being processed.", len(dashboard.running_chunks()))
    providers, now = dashboard.spending.get().providers, dashboard.clock()
    banned = sum(provider.is_banned(now) for provider in providers)
    states = [("good", len(providers) - banned), ("banned", banned)]
    yield _by_label("mlg_providers", "Providers that ever made an offer, by state.", "state", states)


def _spending(dashboard: Dashboard) -> Iterator[Family]:
    spending, batchers = dashboard.spending.get(), dashboard.queue_stats.batchers()
    yield _single("mlg_spent_glm", "Spent in GLM: paid, and an estimate of open bills.", spending.total)
    yield _single("mlg_spent_today_glm", "Spent since midnight UTC, in GLM.", spending.today)
    budgets = [(period, smallest_budget(batchers, period)) for period in ("day", "total")]
    limits = [(period, float(amount)) for period, amount in budgets if amount is not None]
    help = "The smallest budget of the live batchers, in GLM; no series without a budget."
    yield _by_label("mlg_budget_glm", help, "period", limits)
    used = [(period, float(amount)) for period, amount in spending.used.items()]
    help = "What counts against budgets, in GLM: paid, and reserved for what is rented."
    yield _by_label("mlg_budget_used_glm", help, "period", used)
    allocated = sum(each.amount for each in spending.allocations)
    yield _single("mlg_allocations_open", "Open allocations.", len(spending.allocations))
    yield _single("mlg_allocated_glm", "Amount reserved by open allocations, in GLM.", allocated)


def _single(name: str, help: str, value: float | Decimal, *, kind: str = "gauge", **labels: str) -> Family:
    return Family(name=name, kind=kind, help=help, samples=[("", labels, float(value))])


def _by_label(name: str, help: str, label: str, values: Iterable[tuple[str, float]], *, kind: str = "gauge") -> Family:
    """Return a metric with a sample for each value of a label."""
    return Family(name=name, kind=kind, help=help, samples=[("", {label: text}, value) for text, value in values])


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

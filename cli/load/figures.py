"""The figures of a load: percentiles, failures, and both over time. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from cli.load.plan import LoadPlan
from cli.load.runner import NOT_SENT, LoadSample

#: The parts into which the time is divided, at most.
MAX_INTERVALS = 120
#: The percentiles that are reported.
PERCENTILES = (50, 90, 99)
#: Kinds of failures that are told apart; a server may send any number.
_MAX_CODES = 20
#: A sender that is later than this measures itself.
LATE_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Interval:
    """What was planned in one part of the time."""

    #: Seconds after the start.
    start: float
    seconds: float
    planned: int = 0
    failed: int = 0
    #: Requests that ended well in this part, whenever they were sent.
    completed: int = 0
    #: Percentiles of the latencies of the planned ones that did not fail; None without any.
    latencies: tuple[float | None, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoadFigures:
    """How a server did under a load."""

    #: Requests that were due, and those of them that were sent.
    planned: int
    sent: int
    failed: int
    #: Code -> failures, the most frequent first.
    failures: dict[str, int] = field(default_factory=dict)
    #: Seconds from the first planned time to the last end.
    seconds: float
    #: Percentiles of the latencies of those that did not fail, in seconds; None without any.
    latencies: tuple[float | None, ...]
    maximum: float | None
    #: 99th percentile of how late requests were sent.
    late: float
    intervals: tuple[Interval, ...]
    #: All latencies, ascending.
    ordered: Sequence[float] = field(repr=False)

    @property
    def per_second(self) -> float:
        """Requests a second that ended well."""
        return (self.planned - self.failed) / self.seconds if self.seconds else 0.0

    @property
    def failed_percent(self) -> float:
        """The failures among the planned requests."""
        return 100 * self.failed / self.planned if self.planned else 0.0

    @property
    def p99(self) -> float | None:
        """The 99th percentile of the latencies."""
        return self.latencies[PERCENTILES.index(99)]


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """Return the lowest value that so many percent do not exceed; None without values. :param ordered: ascending."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else None


def evaluate(plan: LoadPlan, samples: Sequence[LoadSample]) -> LoadFigures:
    """Compute the figures."""
    ordered = sorted(one.seconds for one in samples if one.seconds is not None)
    codes = Counter(one.code for one in samples if one.code)
    failures = dict(codes.most_common(_MAX_CODES))
    if len(codes) > len(failures):
        failures["others"] = codes.total() - sum(failures.values())
    end = max((one.planned + (one.seconds or 0.0) for one in samples), default=0.0)
    late = percentile(sorted(one.late for one in samples if one.code != NOT_SENT), 99)
    return LoadFigures(
        planned=len(samples),
        sent=len(samples) - codes[NOT_SENT],
        failed=codes.total(),
        failures=failures,
        seconds=end,
        latencies=tuple(percentile(ordered, percent) for percent in PERCENTILES),
        maximum=ordered[-1] if ordered else None,
        late=late or 0.0,
        intervals=divide(samples, plan.seconds, MAX_INTERVALS),
        ordered=ordered,
    )


def divide(samples: Sequence[LoadSample], seconds: float, most: int) -> tuple[Interval, ...]:
    """Divide a time into intervals of whole seconds, so many at most, and some more for late answers."""
    seconds = float(max(1, math.ceil(seconds / most)))
    planned: dict[int, list[LoadSample]] = {}
    completed: Counter[int] = Counter()
    for one in samples:
        planned.setdefault(int(one.planned / seconds), []).append(one)
        if one.seconds is not None:
            completed[int((one.planned + one.seconds) / seconds)] += 1
    found = []
    for index in range(max([*planned, *completed], default=-1) + 1):
        mine = planned.get(index, [])
        ordered = sorted(one.seconds for one in mine if one.seconds is not None)
        found.append(
            Interval(
                start=index * seconds,
                seconds=seconds,
                planned=len(mine),
                failed=sum(bool(one.code) for one in mine),
                completed=completed[index],
                latencies=tuple(percentile(ordered, percent) for percent in PERCENTILES),
            )
        )
    return tuple(found)

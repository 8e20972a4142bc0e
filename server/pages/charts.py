"""The charts of the pages of the operator and of usage: positions of bars, points and ticks, drawn as SVG by templates.

Called by `operator.py` and `usage.py`. Pure. Every chart comes with the rows of a table, for readers who cannot see it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from store.clients.usage import UsageRow

#: Size of a chart in its own units, and the margins for the tick labels.
WIDTH, HEIGHT = 640, 180
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 24
_BASELINE, _PLOT_WIDTH = HEIGHT - BOTTOM, WIDTH - LEFT - RIGHT
#: Rows of the table of the points chart.
POINT_ROWS = 5
#: Minutes in a row of the table of the minutes chart.
MINUTES_PER_ROW = 10


def minutes_chart(minutes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Lay out the chart of requests received and answered in each minute. :param minutes: oldest first."""
    maximum = max([1, *(max(each["arrived"], each["answered"]) for each in minutes)])
    ticks = nice_ticks(maximum)
    step = _PLOT_WIDTH / max(1, len(minutes))
    bars, line = [], []
    for index, each in enumerate(minutes):
        y = _y(each["answered"], ticks[-1])
        x, width, height = LEFT + index * step + 0.1 * step, 0.8 * step, _BASELINE - y
        bars.append({"x": round(x, 1), "y": y, "w": round(width, 1), "h": round(height, 1)})
        line.append(f"{round(LEFT + (index + 0.5) * step, 1)},{_y(each['arrived'], ticks[-1])}")
    rows = []
    for start in range(0, len(minutes), MINUTES_PER_ROW):
        part = minutes[start : start + MINUTES_PER_ROW]
        row = {name: sum(each[name] for each in part) for name in ("arrived", "answered", "images", "failed")}
        rows.append({"from": part[0]["minute"], **row})
    return {
        **_frame(ticks),
        "bars": bars,
        "line": " ".join(line),
        "labels": [
            {
                "x": round(LEFT + (index + (1 if index == len(minutes) - 1 else 0.5)) * step, 1),
                "text": each["minute"][11:16],
            }
            for index, each in enumerate(minutes)
            if index % 15 == 0 or index == len(minutes) - 1
        ],
        "rows": rows,
    }


def usage_chart(days: Sequence[tuple[str, UsageRow | None]]) -> dict[str, Any]:
    """Lay out the chart of requests by day, each a bar with its answered and its other requests.

    :param days: oldest first, without gaps; None for a day without requests.
    """
    counts = [
        (0, 0) if row is None else (row.done + row.cached, row.failed + row.cancelled + row.expired) for _, row in days
    ]
    ticks = nice_ticks(max([1, *map(sum, counts)]))
    step = _PLOT_WIDTH / len(days)
    bars = []
    for index, ((day, _), (answered, others)) in enumerate(zip(days, counts, strict=True)):
        base = 0
        for count, is_bad in ((answered, False), (others, True)):
            top, bottom = _y(base + count, ticks[-1]), _y(base, ticks[-1])
            bars.append(
                {
                    "x": round(LEFT + (index + 0.1) * step, 2),
                    "y": top,
                    "w": round(0.8 * step, 2),
                    "h": round(bottom - top, 1),
                    "is_bad": is_bad,
                    "title": f"{day}: {count} {'not answered' if is_bad else 'answered'}",
                }
            )
            base += count
    last, distance = len(days) - 1, max(1, len(days) // 6)
    # The text of the last one ends at its place, so the one before must not be near.
    labelled = [*(index for index in range(0, last, distance) if last - index >= distance), last]
    labels = [
        {"x": round(LEFT + (index + (1 if index == last and last else 0.5)) * step, 1), "text": days[index][0]}
        for index in labelled
    ]
    return {**_frame(ticks), "bars": bars, "labels": labels}


def points_chart(points: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Lay out the chart of seconds in the model against file size. :return: None without points."""
    if not points:
        return None
    x_ticks = nice_ticks(max(point["bytes"] for point in points))
    y_ticks = nice_ticks(max(point["seconds"] for point in points))
    ordered = sorted(points, key=lambda point: int(point["bytes"]))
    size = math.ceil(len(ordered) / POINT_ROWS)
    rows = []
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        seconds = sorted(point["seconds"] for point in part)
        rows.append(
            {
                "from": part[0]["bytes"],
                "to": part[-1]["bytes"],
                "count": len(part),
                "median": seconds[(len(seconds) - 1) // 2],
                "maximum": seconds[-1],
            }
        )
    return {
        **_frame(y_ticks),
        "points": [
            {"x": round(LEFT + _PLOT_WIDTH * point["bytes"] / x_ticks[-1], 1), "y": _y(point["seconds"], y_ticks[-1])}
            for point in points
        ],
        "labels": [{"x": round(LEFT + _PLOT_WIDTH * tick / x_ticks[-1], 1), "bytes": tick} for tick in x_ticks],
        "rows": rows,
    }


def nice_ticks(maximum: float) -> list[float]:
    """Choose tick values from 0 to at least `maximum`, in about four steps of 1, 2 or 5 times a power of ten."""
    if maximum <= 0:
        return [0, 1]
    raw = maximum / 4
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    steps = math.ceil(maximum / step - 1e-9)
    return [round(step * index, 12) for index in range(max(1, steps) + 1)]


def short_number(value: float) -> str:
    """Format a number for an axis: 0.05, 250, 12k."""
    if value >= 10_000_000:
        return f"{value / 1e6:g}M"
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"


def _frame(ticks: Sequence[float]) -> dict[str, Any]:
    """Return the size of a chart, and the ticks of its vertical axis."""
    edges = {"left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": _BASELINE}
    shown = [{"y": _y(tick, ticks[-1]), "text": short_number(tick)} for tick in ticks]
    return {"width": WIDTH, "height": HEIGHT, **edges, "ticks": shown}


def _y(value: float, maximum: float) -> float:
    return round(_BASELINE - (_BASELINE - TOP) * value / maximum, 1)

"""Charts as numbers: where each bar, point and tick of a drawing stands. Templates draw them as SVG.

Called by the views; pure. Every drawing comes with the same figures as a table, for those who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

#: Size of a drawing in its own units, and what is left free for the ticks.
WIDTH, HEIGHT = 640, 180
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 24
#: Rows of the table beside the points.
POINT_CLASSES = 5
#: Minutes that a row of the table beside the bars stands for.
MINUTES_A_ROW = 10


def minutes_chart(minutes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Draw what came in and what was answered, minute by minute. :param minutes: oldest first."""
    maximum = max([1, *(max(each["arrived"], each["answered"]) for each in minutes)])
    ticks = nice_ticks(maximum)
    step = (WIDTH - LEFT - RIGHT) / max(1, len(minutes))
    bars, line = [], []
    for index, each in enumerate(minutes):
        y = _y(each["answered"], ticks[-1])
        bars.append(
            {
                "x": _rounded(LEFT + index * step + 0.1 * step),
                "y": y,
                "w": _rounded(0.8 * step),
                "h": _rounded(_bottom() - y),
            }
        )
        line.append(f"{_rounded(LEFT + (index + 0.5) * step)},{_y(each['arrived'], ticks[-1])}")
    rows = []
    for start in range(0, len(minutes), MINUTES_A_ROW):
        part = minutes[start : start + MINUTES_A_ROW]
        row = {name: sum(each[name] for each in part) for name in ("arrived", "answered", "images", "failed")}
        rows.append({"from": part[0]["minute"], **row})
    return {
        **_frame(),
        "bars": bars,
        "line": " ".join(line),
        "ticks": [{"y": _y(tick, ticks[-1]), "text": short_number(tick)} for tick in ticks],
        "labels": [
            {
                "x": _rounded(LEFT + (index + (1 if index == len(minutes) - 1 else 0.5)) * step),
                "text": each["minute"][11:16],
            }
            for index, each in enumerate(minutes)
            if index % 15 == 0 or index == len(minutes) - 1
        ],
        "rows": rows,
    }


def points_chart(points: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Draw size against seconds. :return: None without points."""
    if not points:
        return None
    x_ticks = nice_ticks(max(point["bytes"] for point in points))
    y_ticks = nice_ticks(max(point["seconds"] for point in points))
    width = WIDTH - LEFT - RIGHT
    ordered = sorted(points, key=lambda point: int(point["bytes"]))
    size = math.ceil(len(ordered) / POINT_CLASSES)
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
                "longest": seconds[-1],
            }
        )
    return {
        **_frame(),
        "points": [
            {"x": _rounded(LEFT + width * point["bytes"] / x_ticks[-1]), "y": _y(point["seconds"], y_ticks[-1])}
            for point in points
        ],
        "ticks": [{"y": _y(tick, y_ticks[-1]), "text": short_number(tick)} for tick in y_ticks],
        "labels": [{"x": _rounded(LEFT + width * tick / x_ticks[-1]), "bytes": tick} for tick in x_ticks],
        "rows": rows,
    }


def nice_ticks(maximum: float, *, count: int = 4) -> list[float]:
    """Choose round numbers from 0 to at least `maximum`: about `count` steps of 1, 2 or 5 times a power of ten."""
    if maximum <= 0:
        return [0, 1]
    raw = maximum / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    steps = math.ceil(maximum / step - 1e-9)
    return [round(step * index, 12) for index in range(max(1, steps) + 1)]


def short_number(value: float) -> str:
    """Write a number for an axis: 0.05, 250, 12k."""
    if value >= 10_000_000:
        return f"{value / 1e6:g}M"
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"


def _frame() -> dict[str, Any]:
    return {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": _bottom()}


def _bottom() -> float:
    return HEIGHT - BOTTOM


def _y(value: float, maximum: float) -> float:
    return _rounded(_bottom() - (_bottom() - TOP) * value / maximum)


def _rounded(value: float) -> float:
    return round(value, 1)

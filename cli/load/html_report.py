"""The report of a load as one HTML file: figures, charts as inline SVG, and the same as tables.

It loads nothing from anywhere, has no scripts, and follows the reader's light or dark setting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from html import escape

from cli.load.figures import PERCENTILES, Interval, LoadFigures, percentile
from cli.load.plan import LoadPlan
from server.pages.charts import nice_ticks, short_number

_WIDTH, _HEIGHT = 720, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 26
_PLOT_WIDTH, _PLOT_HEIGHT = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
#: The percentages of the curve of latencies.
_CURVE = (0, 10, 25, 50, 75, 90, 95, 99, 99.9, 100)

_STYLE = """
:root { color-scheme: light dark; --text: #1c2733; --muted: #5b6875; --line: #d8dee4; --back: #fff; --panel: #f6f8fa;
  --a: #0b6bcb; --b: #b26a00; --c: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --muted: #9aa7b4; --line: #38434f; --back: #12181f;
  --panel: #1a222b; --a: #58a6ff; --b: #e3a33b; --c: #ff7b72; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } .muted, figcaption { color: var(--muted); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .75rem; }
dl div { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
dt { color: var(--muted); font-size: .85rem; } dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
figure { margin: 0; } svg { width: 100%; height: auto; background: var(--panel); border: 1px solid var(--line);
  border-radius: 8px; } svg text { font-size: 11px; fill: var(--muted); } .end { text-anchor: end; }
.middle { text-anchor: middle; } .axis { stroke: var(--line); } polyline { fill: none; stroke-width: 2;
  stroke-linejoin: round; } .a { stroke: var(--a); } .b { stroke: var(--b); } .c { stroke: var(--c); }
.key { margin-right: 1rem; white-space: nowrap; } .key::before { content: ""; display: inline-block; width: .9em;
  height: 3px; vertical-align: middle; margin-right: .4em; background: var(--a); }
.key.b::before { background: var(--b); } .key.c::before { background: var(--c); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } .bad { color: var(--c); }
"""


def milliseconds(seconds: float | None) -> str:
    """Format a latency for people."""
    return "–" if seconds is None else f"{seconds * 1000:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"


def html_report(plan: LoadPlan, figures: LoadFigures, *, at: datetime, missed: Sequence[str]) -> str:
    """Build the report. :param at: when it began. :param missed: the limits that were not kept, for people."""
    title = f"Load of {plan.url}"
    until = "answered" if plan.waits else "accepted"
    tiles = {
        "requests planned": f"{figures.planned}",
        "failed": f"{figures.failed} ({figures.failed_percent:.2f} %)",
        f"{until} a second": f"{figures.per_second:.1f}",
        **{f"p{percent}": milliseconds(value) for percent, value in zip(PERCENTILES, figures.latencies, strict=True)},
        "slowest": milliseconds(figures.maximum),
        "sent late, p99": milliseconds(figures.late),
    }
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles.items())
    judged = "".join(f'<p class="bad">{escape(text)}</p>' for text in missed)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="muted">Model {escape(plan.model)}, {plan.rate:g} requests a second for {plan.seconds:g} seconds, of which
{plan.ramp_seconds:g} seconds with a growing rate; {len(plan.images)} images in turn; begun {at:%Y-%m-%d %H:%M:%S %Z}.
A latency counts from the planned time until the request is {until}.</p>
{judged}
<dl>{shown}</dl>
{_latency_chart(figures.intervals)}
{_rate_chart(figures.intervals)}
{_curve(figures.ordered)}
{_failures(figures)}
{_table(figures.intervals)}
</body>
</html>
"""


def _latency_chart(intervals: Sequence[Interval]) -> str:
    lines = [
        (name, [(one.start, one.latencies[index]) for one in intervals])
        for index, name in enumerate(f"p{percent}" for percent in PERCENTILES)
    ]
    return _chart("Latency over time", "milliseconds by the planned time", lines, lambda value: value * 1000)


def _rate_chart(intervals: Sequence[Interval]) -> str:
    lines = [
        ("planned", [(one.start, one.planned / one.seconds) for one in intervals]),
        ("ended well", [(one.start, one.completed / one.seconds) for one in intervals]),
        ("failed", [(one.start, one.failed / one.seconds) for one in intervals]),
    ]
    return _chart("Throughput and failures over time", "requests a second", lines, lambda value: value)


def _chart(
    title: str,
    unit: str,
    lines: Sequence[tuple[str, Sequence[tuple[float, float | None]]]],
    scale: Callable[[float], float],
) -> str:
    """Draw lines over the time. :param lines: name -> (seconds, value), None leaves a gap."""
    values = [scale(value) for _, points in lines for _, value in points if value is not None]
    y_ticks = nice_ticks(max(values, default=0))
    last = max((seconds for _, points in lines for seconds, _ in points), default=0) or 1.0
    drawn = []
    for style, (_, points) in zip("abc", lines, strict=True):
        part: list[str] = []
        for seconds, value in (*points, (0.0, None)):
            if value is not None:
                part.append(_point(seconds / last, scale(value) / y_ticks[-1]))
            elif part:
                # A single point would not be seen.
                drawn.append(
                    f'<polyline class="{style}" points="{" ".join(part if len(part) > 1 else 2 * part)}" '
                    'stroke-linecap="round"/>'
                )
                part = []
    keys = "".join(f'<span class="key {style}">{name}</span>' for style, (name, _) in zip("abc", lines, strict=True))
    labels = [(tick / last, f"{short_number(tick)} s") for tick in nice_ticks(last) if tick <= last]
    return _figure(title, f"{keys} {unit}; the table below has the figures", "".join(drawn), y_ticks, labels)


def _curve(ordered: Sequence[float]) -> str:
    """Draw which share of the requests was how fast; the percentages are at even distances."""
    values = [(percentile(ordered, percent) or 0.0) * 1000 for percent in _CURVE]
    y_ticks = nice_ticks(max(values))
    places = [index / (len(_CURVE) - 1) for index in range(len(_CURVE))]
    points = " ".join(_point(x, value / y_ticks[-1]) for x, value in zip(places, values, strict=True))
    labels = [(x, f"{percent:g} %") for x, percent in zip(places, _CURVE, strict=True)]
    caption = "milliseconds within which so many percent ended"
    return _figure("Latency by percentile", caption, f'<polyline class="a" points="{points}"/>', y_ticks, labels)


def _point(x: float, y: float) -> str:
    return f"{_LEFT + x * _PLOT_WIDTH:.1f},{_TOP + (1 - y) * _PLOT_HEIGHT:.1f}"


def _figure(title: str, caption: str, drawn: str, y_ticks: Sequence[float], labels: Sequence[tuple[float, str]]) -> str:
    grid = ""
    for tick in y_ticks:
        y = _TOP + (1 - tick / y_ticks[-1]) * _PLOT_HEIGHT
        grid += f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        grid += f'<text class="end" x="{_LEFT - 6}" y="{y + 4:.1f}">{short_number(tick)}</text>'
    for x, text in labels:
        style = "end" if x > 0.99 else "middle"
        grid += f'<text class="{style}" x="{_LEFT + x * _PLOT_WIDTH:.1f}" y="{_HEIGHT - 8}">{escape(text)}</text>'
    return (
        f"<h2>{title}</h2>\n<figure><figcaption>{caption}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">{grid}{drawn}</svg></figure>'
    )


def _failures(figures: LoadFigures) -> str:
    if not figures.failures:
        return "<h2>Failures</h2>\n<p>None.</p>"
    rows = "".join(f"<tr><td>{escape(code)}</td><td>{count}</td></tr>" for code, count in figures.failures.items())
    return f"<h2>Failures</h2>\n<table><tr><th>reason</th><th>requests</th></tr>{rows}</table>"


def _table(intervals: Sequence[Interval]) -> str:
    names = ("second", "planned", "ended well", "failed", *(f"p{percent}" for percent in PERCENTILES))
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = ""
    for one in intervals:
        cells = [f"{one.start:g}", one.planned, one.completed, one.failed, *map(milliseconds, one.latencies)]
        rows += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"
    return f'<h2>By time</h2>\n<div class="scroll"><table><tr>{head}</tr>\n{rows}</table></div>'

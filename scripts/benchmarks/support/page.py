"""The page of benchmarks: HTML without scripts, from the tables that benchmarks print.

A table whose first column is a number gets a plot for each other column, on logarithmic axes; of others the first
column of numbers is drawn as bars. Called by `all.py`.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

#: Width and height of a plot, and the margin around it, in its own units.
WIDTH, HEIGHT, MARGIN = 200, 110, 24

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --line: #d5dae0; --soft: #5b6570; --bar: #2f6fb3 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --paper: #14171a; --line: #363d45; --soft: #9aa5b1; --bar: #6aa8e8 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper) }
h1 { line-height: 1.2 } h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
a { color: var(--bar) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem } dd { margin: 0; overflow-wrap: anywhere }
code, pre { font-size: .875rem } pre { overflow-x: auto; padding: .75rem; border: 1px solid var(--line) }
p code { overflow-wrap: anywhere }
.note { color: var(--soft) } .table { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .875rem }
th, td { padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th { font-weight: 600 }
.bars { display: grid; gap: .5rem; margin: 1rem 0; max-width: 44rem }
.bars div { display: grid; grid-template-columns: 1fr auto; gap: 0 1rem } .bars i { grid-column: 1 / -1; height: .75rem;
  background: var(--bar) }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem; margin: 1rem 0 }
figure { margin: 0 } figcaption { font-size: .875rem } svg { width: 100%; height: auto; display: block }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif } svg path { fill: none; stroke: var(--line) }
svg polyline { fill: none; stroke: var(--bar); stroke-width: 2 } svg circle { fill: var(--bar) }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr } dd { margin-bottom: .5rem } }
"""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table that a benchmark has printed."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Section:
    """What one benchmark has shown."""

    name: str
    #: One sentence: what is measured.
    about: str
    #: As it was run here, and as it is run in full.
    command: str
    full_command: str
    seconds: float
    #: See `machine.load`, when it began.
    load: float
    #: Of what was printed, the tables and the other lines.
    tables: Sequence[Table] = ()
    text: str = ""
    #: Why there is nothing; None if there is.
    failure: str | None = None
    #: Title of a table's column that is drawn instead of the first with numbers.
    column: str | None = field(default=None)


def read_output(text: str) -> tuple[list[Table], str]:
    """Divide what a benchmark printed into tables in Markdown, as `print_table` writes them, and the rest."""
    tables, rest = [], []
    lines = text.splitlines()
    while lines:
        if not lines[0].startswith("| "):
            rest.append(lines.pop(0))
            continue
        rows = []
        while lines and lines[0].startswith("|"):
            rows.append([cell.strip() for cell in lines.pop(0).strip().strip("|").split("|")])
        while rest and not rest[-1]:
            rest.pop()
        title = rest.pop() if rest else ""
        tables.append(Table(title=title, head=rows[0], rows=rows[2:]))
    return tables, "\n".join(rest).strip()


def render(facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """Return the page."""
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
    links = "".join(f'<li><a href="#{_text(each.name)}">{_sentence(each.about)}</a></li>' for each in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>mlg: benchmarks</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>Benchmarks of mlg</h1>\n"
        "<p>Written by <code>scripts/bench all</code>, which runs each benchmark in a shorter form than it has by "
        "itself; both commands stand beside the results. Ratios within one run say more than absolute figures. What "
        'was measured at length, and why figures are as they are: <a href="measurements.md">measurements</a>.</p>\n'
        f"<dl>{rows}</dl>\n<ul>{links}</ul>\n" + "\n".join(map(_section, sections)) + "\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    parts = [
        f'<section id="{_text(section.name)}">\n<h2>{_text(section.name)}</h2>\n<p>{_sentence(section.about)}</p>',
        f'<p class="note">Here <code>{_text(section.command)}</code>, {section.seconds:.0f} s, at a load of '
        f"{section.load:.1f}. In full: <code>{_text(section.full_command)}</code></p>",
    ]
    if section.failure is not None:
        parts.append(f"<p><strong>Not measured.</strong> {_text(section.failure)}</p>")
    for table in section.tables:
        parts += [f"<h3>{_text(table.title)}</h3>", _plot(table, section.column), _table(table)]
    if section.text:
        parts.append(f"<pre>{_text(section.text)}</pre>")
    return "\n".join([*filter(None, parts), "</section>"])


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in table.head)
    rows = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>\n" for row in table.rows)
    return f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody>\n</table></div>'


def _plot(table: Table, column: str | None) -> str:
    """Draw a table; nothing if there is nothing to compare."""
    sized = [(size, row) for row in table.rows if (size := number(row[0])) is not None and size > 0]
    if len(sized) >= 2:
        plots = [
            _line(
                name, [(size, value) for size, row in sized if (value := number(row[index])) is not None and value > 0]
            )
            for index, name in enumerate(table.head)
            if index > 0
        ]
        return f'<div class="plots">{"".join(plots)}</div>' if any(plots) else ""
    for index, name in enumerate(table.head[1:], 1):
        values = [(row[0], row[index], value) for row in table.rows if (value := number(row[index])) is not None]
        if len(values) >= 2 and column in (None, name) and max(value for *_, value in values) > 0:
            return _bars(name, values)
    return ""


def _bars(name: str, values: Sequence[tuple[str, str, float]]) -> str:
    largest = max(value for *_, value in values)
    rows = "".join(
        f'<div><span>{_text(label)}</span><span>{_text(shown)}</span><i style="width:{max(0.0, value) / largest:.1%}">'
        "</i></div>"
        for label, shown, value in values
    )
    return f'<p class="note">{_text(name)}</p><div class="bars">{rows}</div>'


def _line(name: str, points: Sequence[tuple[float, float]]) -> str:
    """Draw one column over the first, both logarithmic; what does not grow is level, in the middle."""
    if len(points) < 2:
        return ""
    xs, ys = ([math.log10(each) for each in values] for values in zip(*points, strict=True))
    middle = (min(ys) + max(ys)) / 2
    # At least a factor of a hundred, so that noise does not look like growth.
    reach = max(2.0, max(ys) - min(ys))
    across = (WIDTH - 2 * MARGIN) / ((max(xs) - min(xs)) or 1)
    up = (HEIGHT - 2 * MARGIN) / reach
    at = [(MARGIN + (x - min(xs)) * across, HEIGHT / 2 - (y - middle) * up) for x, y in zip(xs, ys, strict=True)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in at)
    ends = "".join(
        f'<text x="{x:.1f}" y="{y - 7:.1f}" text-anchor="{anchor}">{shown:.3g}</text>'
        for (x, y), (_, shown), anchor in ((at[0], points[0], "start"), (at[-1], points[-1], "end"))
    )
    floor = HEIGHT - MARGIN + 6
    sizes = "".join(
        f'<text x="{x:.1f}" y="{floor + 13}" text-anchor="{anchor}">{size:,.0f}</text>'
        for (x, _), (size, _), anchor in ((at[0], points[0], "start"), (at[-1], points[-1], "end"))
    )
    said = f"{name}: {points[0][1]:.3g} at {points[0][0]:,.0f}, {points[-1][1]:.3g} at {points[-1][0]:,.0f}"
    return (
        f"<figure><figcaption>{_text(name)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(said)}">'
        f'<path d="M{MARGIN} {floor}H{WIDTH - MARGIN}"/><polyline points="{line}"/>{dots}{ends}{sizes}</svg></figure>'
    )


def number(text: str) -> float | None:
    """Read a cell: a number, perhaps with separators, a percent sign or a unit; None for anything else."""
    found = re.fullmatch(r"(-?[\d,]*\.?\d+) ?(?:%|[a-zA-Z/]\D*)?", text.strip())
    return float(found[1].replace(",", "")) if found else None


def _text(text: str) -> str:
    return html.escape(text)


def _sentence(text: str) -> str:
    """Show what stands between backticks as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", _text(text))

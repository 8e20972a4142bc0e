"""The picture of a pipeline as SVG: a box for each step, a line from each step to those that need it.

Made for the pages and for `mlg pipelines picture`. Pure. It has no styles of its own that a page would have to allow,
and takes the colour of the text around it.
"""

from __future__ import annotations

from html import escape

from store.pipelines.definition import REQUEST, Pipeline, PipelineStep, source_of

_WIDTH, _HEIGHT, _ACROSS, _DOWN, _MARGIN = 200, 74, 64, 22, 8
#: Letters that fit into a box.
_MAX_LETTERS = 30


def draw_pipeline(pipeline: Pipeline) -> str:
    """Draw a pipeline: what needs nothing on the left, what needs it to the right of it."""
    columns: dict[str, int] = {REQUEST: 0}
    for step in pipeline.steps:
        # Each comes after those that it needs.
        columns[step.name] = 1 + max((columns[name] for name in _before(step)), default=0)
    rows: dict[str, int] = {}
    for name, column in columns.items():
        rows[name] = sum(columns[other] == column for other in rows)
    corners = {
        name: (_MARGIN + column * (_WIDTH + _ACROSS), _MARGIN + rows[name] * (_HEIGHT + _DOWN))
        for name, column in columns.items()
    }
    width = max(left for left, _ in corners.values()) + _WIDTH + _MARGIN
    height = max(top for _, top in corners.values()) + _HEIGHT + _MARGIN
    inputs = ", ".join(f"{name} ({one.kind})" for name, one in pipeline.inputs().items())
    shapes = [_box(corners[REQUEST], REQUEST, [inputs], is_round=True)]
    for step in pipeline.steps:
        shapes += [_line(corners[name], corners[step.name]) for name in sorted(_before(step))]
        shapes.append(_box(corners[step.name], step.name, _texts(step), is_list=step.for_each is not None))
    title = escape(f"{pipeline.title}: {', '.join(step.name for step in pipeline.steps)}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="sans-serif" font-size="13" fill="currentColor"><title>{title}</title>'
        f"{''.join(shapes)}</svg>"
    )


def _before(step: PipelineStep) -> set[str]:
    """Return the steps that a step needs, and the request if it takes an input of that, or needs nothing else."""
    is_given = any(source_of(one) == REQUEST for one in step.inputs.values())
    return step.needed() | ({REQUEST} if is_given and not step.needed() else set())


def _texts(step: PipelineStep) -> list[str]:
    texts = [step.model]
    texts += [f"for each of {step.for_each}"] if step.for_each is not None else []
    texts += [f"when {' and '.join(step.when)}"] if step.when else []
    return [*texts, *([f"into {step.collection}"] if step.collection is not None else [])][:3]


def _box(corner: tuple[int, int], name: str, texts: list[str], *, is_round: bool = False, is_list: bool = False) -> str:
    left, top = corner
    frame = 'fill="none" stroke="currentColor"'
    size = f'width="{_WIDTH}" height="{_HEIGHT}" rx="{_HEIGHT // 2 if is_round else 6}"'
    # A second edge behind it: it runs several times.
    behind = f'<rect x="{left + 4}" y="{top + 4}" {size} {frame} stroke-opacity="0.4"/>' if is_list else ""
    lines = "".join(
        f'<text x="{left + 12 + 8 * is_round}" y="{top + 37 + 15 * place}" font-size="11">{escape(_cut(text))}</text>'
        for place, text in enumerate(texts)
    )
    heading = f'<text x="{left + 12 + 8 * is_round}" y="{top + 20}" font-weight="bold">{escape(name)}</text>'
    return f'{behind}<rect x="{left}" y="{top}" {size} {frame}/>{heading}{lines}'


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_LETTERS else f"{text[: _MAX_LETTERS - 1]}…"


def _line(start: tuple[int, int], end: tuple[int, int]) -> str:
    x1, y1, x2, y2 = start[0] + _WIDTH, start[1] + _HEIGHT // 2, end[0], end[1] + _HEIGHT // 2
    middle = x2 - _ACROSS // 2
    path = f"M{x1} {y1}C{middle} {y1} {middle} {y2} {x2 - 6} {y2}"
    arrow = f"M{x2} {y2}l-8 -4v8z"
    return f'<path d="{path}" fill="none" stroke="currentColor"/><path d="{arrow}"/>'

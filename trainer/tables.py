"""Training on a table: a class or a number for a row of numbers and categories.

The columns' kinds are found in the values. The model is linear in the features of `provider_image/features/table.py`,
which are learned here: means, deviations, categories. What was found is told in the basis of the figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.errors import NotARow
from provider_image.features.normal_form import normalise
from provider_image.features.table import (
    MAX_CATEGORY_LENGTH,
    MAX_COLUMNS,
    CategoryColumn,
    Column,
    NumberColumn,
    TableFeatures,
    is_missing,
    to_category,
    to_number,
)
from provider_image.models.artefact import Artefact
from provider_image.models.catalogue import ModelFacts
from provider_image.rows import Value, format_row
from trainer.errors import UnusableExamples
from trainer.examples import ExampleLimits, read_csv
from trainer.figures import Figures
from trainer.linear import Trained, digest_training, fit_and_evaluate, install_linear, read_targets

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: Most numbers of the features of a table.
MAX_NUMBERS = 50_000_000
#: Fewest rows of a category of its own; rarer ones are `other`. Most categories of a column, the most frequent ones.
MIN_OF_CATEGORY, MAX_CATEGORIES = 3, 200
#: A column of text with more different values than this, and than this share of the rows, names rows.
_MAX_DIFFERENT, _MAX_DIFFERENT_SHARE = 50, 0.5
#: A column with at least this share of numbers is one of numbers with errors in it.
_NUMBER_SHARE = 0.95
#: Rows of the self-test.
_SAMPLES = 4
#: Most columns that a text names.
_MAX_NAMED = 30


@dataclass(frozen=True, kw_only=True)
class FoundColumn:
    """What was found out about a column."""

    name: str
    #: number, category, or unused.
    kind: str
    #: Why it is unused; else how many values are missing or different, for people.
    detail: str


@dataclass(frozen=True, kw_only=True)
class LearningTable:
    """A table that can be learned from."""

    #: The used columns, without the target.
    columns: tuple[FoundColumn, ...]
    #: Those that are not used.
    unused: tuple[FoundColumn, ...]
    #: The values of each row, in the order of the used columns.
    rows: tuple[tuple[str, ...], ...]
    #: The values of the target.
    target: tuple[str, ...]
    #: Number of each row in the file; the header is 1, if no row has line ends in it.
    numbers: tuple[int, ...]
    #: Rows without a target, which were left out.
    without_target: int

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the used columns."""
        return tuple(one.name for one in self.columns)

    def values(self, row: Sequence[str]) -> tuple[Value, ...]:
        """Return what a row says, however it is written: rows with 3 and 3.0 are equal."""
        return tuple(
            to_number(column.name, value) if column.kind == "number" else to_category(value)
            for column, value in zip(self.columns, row, strict=True)
        )


def train_table(
    table: Path,
    target: str,
    *,
    name: str,
    models: Path,
    title: str | None = None,
    is_regression: bool | None = None,
    seed: int = 0,
    limits: ExampleLimits | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> tuple[Artefact, Figures]:
    """Train a model on a CSV file and install it under a name; an installed one of the same name is replaced.

    :param target: the column with the class or the number.
    :param is_regression: None finds out from the values, see `linear.read_targets`.
    :param on_step: called with the name of each step.
    :raises UnusableExamples: the table cannot be used.
    :raises ConfigError: the model cannot have this name or title.
    :raises TrainerMissing: scikit-learn is not installed. :raises NotInstalled: the models folder cannot be written.
    """
    limits = limits or ExampleLimits()
    on_step("reading the table")
    found = read_table(table, target, limits)
    targets = read_targets(found.target, is_regression=is_regression, limits=limits, column=target)
    equal: dict[tuple[Value, ...], int] = {}
    groups = [equal.setdefault(found.values(row), len(equal)) for row in found.rows]
    names = [f"row {number}" for number in found.numbers]
    trained = fit_and_evaluate(_TableLearner(found), targets, groups, names, seed=seed, on_step=on_step)
    facts = ModelFacts(
        name=name,
        title=title or name,
        service="table",
        height=0,
        width=0,
        preprocessing="none",
        columns=found.names,
        source="own",
    )
    samples = {f"selftest-{number}.json": data for number, data in enumerate(_make_samples(trained.features))}
    digest = digest_training(table, target, is_regression, seed)
    artefact = install_linear(models, facts, trained, samples, training_digest=digest, on_step=on_step)
    return artefact, _with_columns(trained, found)


def read_table(table: Path, target: str, limits: ExampleLimits | None = None) -> LearningTable:
    """Read a CSV file and find the kind of each column. :raises UnusableExamples: it cannot be used."""
    limits = limits or ExampleLimits()
    lines = read_csv(table, limits)
    header = [normalise(name) for name in next(lines)]
    if len(header) > MAX_COLUMNS + 1:
        raise UnusableExamples(f"{table.name} has {len(header)} columns; at most {MAX_COLUMNS + 1} are allowed.")
    place = find_column(header, target)
    numbers: list[int] = []
    rows: list[list[str]] = []
    without_target = 0
    for number, row in enumerate(lines, 2):
        if number > limits.max_rows + 1 or (number - 1) * len(header) > limits.max_values:
            raise UnusableExamples(
                f"{table.name} is too large: at most {limits.max_rows:,} rows and {limits.max_values:,} values are "
                "allowed."
            )
        if is_missing(row[place]):
            without_target += 1
        else:
            rows.append([normalise(value).strip() for value in row])
            numbers.append(number)
    if not rows:
        raise UnusableExamples(f"{table.name} has no row with a value in the column {target!r}.")
    found = [_find_kind(column, [row[at] for row in rows], numbers) for at, column in enumerate(header) if at != place]
    used = {one.name for one in found if one.kind != "unused"}
    if not used:
        reasons = "; ".join(f"{one.name}: {one.detail}" for one in found[:_MAX_NAMED])
        raise UnusableExamples(f"No column of {table.name} can be used to answer {target!r}. {reasons}".strip())
    places = [at for at, column in enumerate(header) if at != place and column in used]
    return LearningTable(
        columns=tuple(one for one in found if one.name in used),
        unused=tuple(one for one in found if one.name not in used),
        rows=tuple(tuple(row[at] for at in places) for row in rows),
        target=tuple(row[place] for row in rows),
        numbers=tuple(numbers),
        without_target=without_target,
    )


def find_column(header: Sequence[str], name: str) -> int:
    """Return the place of a column. :raises UnusableExamples: there is none, or a name occurs twice."""
    if len(set(header)) != len(header) or not all(column and column.isprintable() for column in header):
        raise UnusableExamples("The first line of the table must name each column, each with its own name.")
    wanted = normalise(name)
    if wanted not in header:
        raise UnusableExamples(f"The table has no column {name[:100]!r}. It has: {', '.join(header)[:300]}.")
    return list(header).index(wanted)


def _find_kind(name: str, values: Sequence[str], numbers: Sequence[int]) -> FoundColumn:
    """Find the kind of a column. :raises UnusableExamples: nearly all of its values are numbers."""
    given = [(value, number) for value, number in zip(values, numbers, strict=True) if not is_missing(value)]
    missing = len(values) - len(given)
    different = len({value for value, _ in given})
    if len(name) > MAX_CATEGORY_LENGTH // 2:
        return FoundColumn(name=name, kind="unused", detail="its name is too long")
    if different < 2 and not (missing and given):
        return FoundColumn(name=name, kind="unused", detail="it is empty" if not given else "all values are equal")
    wrong = [(value, number) for value, number in given if not _is_number(value)]
    if not wrong:
        return FoundColumn(name=name, kind="number", detail=f"{missing} missing" if missing else "")
    if len(wrong) <= (1 - _NUMBER_SHARE) * len(given):
        value, number = wrong[0]
        raise UnusableExamples(
            f"The column {name!r} has numbers, but {value[:40]!r} in row {number}"
            f"{f' and {len(wrong) - 1} more like it' if len(wrong) > 1 else ''}. "
            "Correct it, or leave the value empty, which means that it is missing."
        )
    if different > max(_MAX_DIFFERENT, _MAX_DIFFERENT_SHARE * len(given)):
        return FoundColumn(name=name, kind="unused", detail=f"{different} different texts, so it names rows")
    detail = f"{different} values" + (f", {missing} missing" if missing else "")
    return FoundColumn(name=name, kind="category", detail=detail)


def _is_number(value: str) -> bool:
    try:
        return to_number("", value) is not None
    except NotARow:
        return False


class _TableLearner:
    """See `linear.Learner`."""

    def __init__(self, table: LearningTable) -> None:
        self._table = table
        self.count = len(table.rows)

    def learn(self, positions: Sequence[int]) -> TableFeatures:
        """Learn means, deviations and categories."""
        rows = self._table.rows
        columns = [
            _learn_column(one, [rows[position][at] for position in positions])
            for at, one in enumerate(self._table.columns)
        ]
        try:
            features = TableFeatures(columns)
        except ValueError as error:
            raise UnusableExamples(f"The table cannot be used: {error}.") from error
        if features.count * len(rows) > MAX_NUMBERS:
            raise UnusableExamples(
                f"The table is too large: {len(rows):,} rows with {features.count:,} features each. "
                "Leave out rows, or columns with many categories."
            )
        return features

    def matrix(self, features: TableFeatures, positions: Sequence[int]) -> Array:
        """Compute the features of some rows."""
        import numpy as np

        names, matrix = self._table.names, np.empty((len(positions), features.count))
        for place, position in enumerate(positions):
            row: dict[str, Value] = dict(zip(names, self._table.rows[position], strict=True))
            try:
                matrix[place] = features.vector(row)
            except NotARow as error:
                raise UnusableExamples(f"Row {self._table.numbers[position]}: {error.reason}") from error
        return matrix


def _learn_column(found: FoundColumn, values: Sequence[str]) -> Column:
    import numpy as np

    if found.kind == "number":
        numbers = [to_number(found.name, value) for value in values]
        given = np.array([number for number in numbers if number is not None] or [0.0])
        deviation = float(given.std())
        return NumberColumn(
            name=found.name,
            mean=float(given.mean()),
            # As in scikit-learn, what is only rounding errors of equal numbers is not made large.
            deviation=deviation if deviation > 10 * np.finfo(float).eps * abs(float(given.mean())) else 1.0,
            marks_missing=len(given) < len(numbers),
        )
    counts = Counter(to_category(value) for value in values)
    frequent = [
        category
        for category, count in sorted(counts.items(), key=lambda one: (-one[1], one[0]))
        if count >= MIN_OF_CATEGORY and len(category) <= MAX_CATEGORY_LENGTH
    ][:MAX_CATEGORIES]
    return CategoryColumn(name=found.name, categories=tuple(sorted(frequent)), has_other=len(frequent) < len(counts))


def _make_samples(features: Any) -> list[bytes]:
    """Make rows that nobody sent, from what the features have: artefacts go to other computers."""
    samples = []
    for number in range(_SAMPLES):
        row: dict[str, Value] = {}
        for place, column in enumerate(features.columns):
            if isinstance(column, NumberColumn):
                steps = (number + place) % _SAMPLES - 1  # below the mean, at it, and above
                row[column.name] = (
                    None if column.marks_missing and steps == 2 else column.mean + steps * column.deviation
                )
            else:
                choices = (*column.categories, "a category that is not known")
                row[column.name] = choices[(number + place) % len(choices)]
        samples.append(format_row(row))
    return samples


def _with_columns(trained: Trained, found: LearningTable) -> Figures:
    """Add what was found out about the table to the basis of the figures."""
    from dataclasses import replace

    columns = [f"{one.name} ({one.kind}{', ' * bool(one.detail)}{one.detail})" for one in found.columns]
    unused = [f"{one.name} ({one.detail})" for one in found.unused]
    texts = [trained.figures.basis, f"Columns: {_shorten(columns)}."]
    if unused:
        texts.append(f"Not used: {_shorten(unused)}.")
    if found.without_target:
        texts.append(f"Rows without a value to learn, left out: {found.without_target}.")
    return replace(trained.figures, basis=" ".join(texts))


def _shorten(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _MAX_NAMED} more" if len(texts) > _MAX_NAMED else ""
    return ", ".join(texts[:_MAX_NAMED]) + more

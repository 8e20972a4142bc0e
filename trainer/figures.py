"""The figures of an evaluation: how often a classifier is right, how far a regression is off, and on which items.

Computed from what was true and what was answered, wherever the answers come from: the hold-out of a training, other
data, or two models on the same items. Figures say on what they were computed, and are None where they are not defined.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from provider_image.models.intervals import wilson_interval
from trainer.errors import UnusableExamples
from trainer.splitting import Shortage

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: Most mistakes that are listed: the surest for classes, the largest for numbers.
MAX_MISTAKES = 50
#: The share of the answers above the suggested threshold that are to be right.
KEPT_ACCURACY = 0.95
#: Fewest answers above a suggested threshold: fewer say too little.
_MIN_KEPT = 20


@dataclass(frozen=True, kw_only=True)
class ClassFigures:
    """How one class was answered."""

    #: Its name.
    name: str
    #: Items that have it.
    count: int
    #: Items that were said to have it.
    predicted: int
    #: Items of both.
    correct: int
    #: correct / predicted; None if it was never said.
    precision: float | None
    #: correct / count; None if no item has it.
    recall: float | None


@dataclass(frozen=True, kw_only=True)
class EvaluatedItem:
    """One item with its answer."""

    #: Its name, as in the examples.
    name: str
    #: Its class or its number.
    true: str | float
    #: The answer.
    predicted: str | float
    #: Probability of the answered class; None for a number.
    probability: float | None = None


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A probability below which an answer should be `unknown`."""

    #: The lowest probability that is answered.
    probability: float
    #: Items that are answered, of all.
    kept: int
    #: Share of these that are right.
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """An evaluation. Of the fields, those of the other kind are empty or None."""

    #: classification or regression.
    kind: str
    #: On which items it was computed, for people.
    basis: str
    #: Items.
    count: int
    #: The names of the classes.
    classes: tuple[str, ...] = ()
    #: Share of right answers; None without items.
    accuracy: float | None = None
    #: Its 95 % interval by Wilson (1927).
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    #: Each class, in the order of `classes`.
    per_class: tuple[ClassFigures, ...] = ()
    #: Items of class i that were said to be of class j.
    confusion: tuple[tuple[int, ...], ...] = ()
    #: The threshold that is suggested; None if no threshold has enough right answers above it.
    threshold: Threshold | None = None
    #: Mean absolute error and root of the mean squared error, in the unit of the numbers; None without items.
    mae: float | None = None
    rmse: float | None = None
    #: Pearson's correlation of answers and numbers; None with fewer than three items or if either is constant.
    pearson: float | None = None
    #: The mean absolute error of always answering the mean, for comparison; None without items.
    mae_of_mean: float | None = None
    #: The classes with too few examples for a hold-out.
    shortages: tuple[Shortage, ...] = ()
    #: Every item, in the order in which they were given.
    items: tuple[EvaluatedItem, ...] = ()

    @property
    def mistakes(self) -> tuple[EvaluatedItem, ...]:
        """Return the worst mistakes, worst first: wrong classes by probability, or numbers by distance."""
        if self.kind == "regression":
            worst = sorted(self.items, key=_distance, reverse=True)
        else:
            wrong = [each for each in self.items if each.true != each.predicted]
            worst = sorted(wrong, key=lambda each: each.probability or 0.0, reverse=True)
        return tuple(worst[:MAX_MISTAKES])

    def as_json(self) -> dict[str, Any]:
        """Return everything but the single items as plain JSON, the worst mistakes included."""
        document = asdict(self)
        del document["items"]
        return {**document, "mistakes": [asdict(each) for each in self.mistakes]}

    def rows(self) -> Iterator[list[str]]:
        """Yield the rows of a CSV: a header, then each item."""
        if self.kind == "regression":
            yield ["name", "true", "predicted", "error"]
            for each in self.items:
                error = float(each.predicted) - float(each.true)
                yield [each.name, f"{each.true:.9g}", f"{each.predicted:.9g}", f"{error:.9g}"]
        else:
            yield ["name", "true", "predicted", "probability", "right"]
            for each in self.items:
                is_right = "yes" if each.true == each.predicted else "no"
                yield [each.name, str(each.true), str(each.predicted), f"{each.probability:.6f}", is_right]

    def confusion_png(self) -> bytes:
        """Draw the confusion matrix. :raises UnusableExamples: these are the figures of a regression."""
        from trainer.confusion_image import draw_confusion

        if self.kind == "regression":
            raise UnusableExamples("Only a classification has a confusion matrix.")
        return draw_confusion(self.classes, self.confusion)


def classification_figures(
    classes: Sequence[str], true: Sequence[str], probabilities: Array, names: Sequence[str], *, basis: str = ""
) -> Figures:
    """Evaluate a classifier.

    :param classes: the names, in the order of the probabilities.
    :param true: the class of each item.
    :param probabilities: shape (items, classes).
    :param names: the name of each item.
    :param basis: see `Figures`.
    :raises UnusableExamples: an item has a class that the classifier does not have.
    """
    number = {name: position for position, name in enumerate(classes)}
    unknown = sorted({label for label in true if label not in number})
    if unknown:
        raise UnusableExamples(
            f"The model has no class {unknown[0][:100]!r}{f' and {len(unknown) - 1} more' * (len(unknown) > 1)}. "
            f"It has: {', '.join(classes)[:500]}."
        )
    said = probabilities.argmax(axis=1).tolist() if len(true) else []
    surest = probabilities.max(axis=1).tolist() if len(true) else []
    confusion = [[0] * len(classes) for _ in classes]
    for label, answer in zip(true, said, strict=True):
        confusion[number[label]][answer] += 1
    correct = sum(confusion[each][each] for each in range(len(classes)))
    interval = wilson_interval(correct, len(true))
    per_class = []
    for position, name in enumerate(classes):
        count, predicted = sum(confusion[position]), sum(row[position] for row in confusion)
        right = confusion[position][position]
        per_class.append(
            ClassFigures(
                name=name,
                count=count,
                predicted=predicted,
                correct=right,
                precision=right / predicted if predicted else None,
                recall=right / count if count else None,
            )
        )
    items = tuple(
        EvaluatedItem(name=name, true=label, predicted=classes[answer], probability=probability)
        for name, label, answer, probability in zip(names, true, said, surest, strict=True)
    )
    return Figures(
        kind="classification",
        basis=basis,
        count=len(true),
        classes=tuple(classes),
        accuracy=correct / len(true) if len(true) else None,
        accuracy_low=interval[0],
        accuracy_high=interval[1],
        per_class=tuple(per_class),
        confusion=tuple(map(tuple, confusion)),
        threshold=suggest_threshold(items),
        items=items,
    )


def regression_figures(
    true: Sequence[float], predicted: Sequence[float], names: Sequence[str], *, basis: str = ""
) -> Figures:
    """Evaluate a regression.

    :param true: the number of each item.
    :param predicted: the answer for each.
    :param names: the name of each.
    :param basis: see `Figures`.
    """
    items = tuple(
        EvaluatedItem(name=name, true=float(one), predicted=float(other))
        for name, one, other in zip(names, true, predicted, strict=True)
    )
    distances = [_distance(each) for each in items]
    mean = math.fsum(map(float, true)) / len(true) if len(true) else 0.0
    return Figures(
        kind="regression",
        basis=basis,
        count=len(items),
        mae=_mean(distances),
        rmse=math.hypot(*distances) / math.sqrt(len(items)) if items else None,
        pearson=pearson(true, predicted),
        mae_of_mean=_mean([abs(float(each) - mean) for each in true]),
        items=items,
    )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models on the same items. A model is better on an item if it alone is right, or nearer to the number."""

    #: Items.
    count: int
    #: Items on which the first is better, the second, and neither.
    first_better: int
    second_better: int
    equal: int
    #: Probability of so large a difference or a larger one if both were equally good, by the sign test; None if no item
    #: tells them apart. Where only right and wrong count, this is the exact test of McNemar.
    p_value: float | None
    #: The items in the order of the first, each with the answer of both.
    pairs: tuple[tuple[EvaluatedItem, EvaluatedItem], ...]

    def as_json(self) -> dict[str, Any]:
        """Return everything but the single items as plain JSON."""
        document = asdict(self)
        del document["pairs"]
        return document

    def rows(self) -> Iterator[list[str]]:
        """Yield the rows of a CSV: a header, then each item."""
        yield ["name", "true", "first", "first_probability", "second", "second_probability"]
        for one, other in self.pairs:
            yield [
                one.name,
                *map(_cell, (one.true, one.predicted, one.probability, other.predicted, other.probability)),
            ]


def compare_figures(first: Figures, second: Figures) -> Comparison:
    """Compare two models on the same items. :raises UnusableExamples: the items differ, or the kinds of model."""
    others = {each.name: each for each in second.items}
    if first.kind != second.kind or len(others) != len(second.items) or len(first.items) != len(second.items):
        raise UnusableExamples("Two models can be compared only on the same items, each with a name of its own.")
    pairs = tuple((each, others.get(each.name, each)) for each in first.items)
    if any(one.true != other.true or one.name not in others for one, other in pairs):
        raise UnusableExamples("Two models can be compared only on the same items.")
    gaps = [_loss(one) - _loss(other) for one, other in pairs]
    first_better, second_better = sum(gap < 0 for gap in gaps), sum(gap > 0 for gap in gaps)
    return Comparison(
        count=len(pairs),
        first_better=first_better,
        second_better=second_better,
        equal=len(pairs) - first_better - second_better,
        p_value=_sign_test(first_better, second_better),
        pairs=pairs,
    )


def _loss(item: EvaluatedItem) -> float:
    return float(item.true != item.predicted) if isinstance(item.true, str) else _distance(item)


def _sign_test(one: int, other: int) -> float | None:
    """Return the two-sided p-value of a fair coin. Whole numbers are exact, and divided at the end."""
    count = one + other
    if not count:
        return None
    tail, ways = 0, 1
    for each in range(min(one, other) + 1):
        tail += ways
        ways = ways * (count - each) // (each + 1)
    return float(min(1.0, 2 * tail / 2**count))


def _cell(value: str | float | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.9g}"


def pearson(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return the correlation; None with fewer than three pairs, or if either side is constant."""
    count = len(one)
    if count < 3:
        return None
    means = [math.fsum(each) / count for each in (one, other)]
    deviations = [[float(value) - mean for value in each] for each, mean in zip((one, other), means, strict=True)]
    lengths = [math.hypot(*each) for each in deviations]
    # A constant side has only the rounding errors of its mean as deviations.
    if any(
        length <= 1e-12 * math.sqrt(count) * max(1e-300, abs(mean)) for length, mean in zip(lengths, means, strict=True)
    ):
        return None
    product = math.fsum((a / lengths[0]) * (b / lengths[1]) for a, b in zip(*deviations, strict=True))
    return max(-1.0, min(1.0, product))


def suggest_threshold(items: Sequence[EvaluatedItem], accuracy: float = KEPT_ACCURACY) -> Threshold | None:
    """Suggest the lowest threshold above which the wanted share of answers is right.

    It is the probability of an item, rounded down, so an answer that is less sure than all of these is unknown too.

    :return: None if there is none that leaves enough answers.
    """
    surest_first = sorted(items, key=lambda each: -(each.probability or 0.0))
    best, correct = None, 0
    for kept, each in enumerate(surest_first, 1):
        correct += each.true == each.predicted
        probability = _rounded_down(each.probability or 0.0)
        is_last = kept == len(items) or _rounded_down(surest_first[kept].probability or 0.0) < probability
        if is_last and kept >= _MIN_KEPT and correct >= accuracy * kept:
            best = Threshold(probability=probability, kept=kept, accuracy=correct / kept)
    return best


def _rounded_down(probability: float) -> float:
    """Round to four decimals, and to less than 1: an answer is rounded too, and a sure one must not become unknown."""
    return min(9_999, math.floor(probability * 10_000)) / 10_000


def _distance(item: EvaluatedItem) -> float:
    return abs(float(item.predicted) - float(item.true))


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None

"""The split of examples into those to learn from and those to evaluate on, with near-duplicates on one side.

Two shots of the same scene on both sides would make figures too good. Near-duplicates are found by the features:
examples whose features have a cosine of at least a threshold are one group, and so is everything that is connected by
such pairs. A group is never divided. All of it is seeded: the same examples give the same split.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.errors import TrainerMissing

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: Cosines from which on two examples count as near-duplicates: the first that makes no group too large. Images that all
#: look alike, like scans of digits, would otherwise become a single group that cannot be divided.
THRESHOLDS = (0.98, 0.99, 0.995, 0.999)
#: Most of all examples that a group may have at a threshold.
_MAX_GROUP_SHARE = 0.1
#: The share of each class that is held out.
HOLDOUT_SHARE = 0.2
#: Fewest examples of each class, and fewest groups, for a hold-out; with fewer, figures are cross-validated.
MIN_FOR_HOLDOUT = 20
#: Fewest groups of each class for cross-validation, and its folds.
MIN_FOR_FOLDS, FOLDS = 2, 5
#: Defaults of `find_groups`.
_BLOCK, _MAX_PAIRS = 1024, 4_000_000


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Groups of near-duplicates."""

    #: The group of each example, numbered from 0.
    numbers: tuple[int, ...]
    #: The cosine from which on two examples count as near-duplicates.
    threshold: float

    @property
    def duplicates(self) -> int:
        """Count the examples that are a near-duplicate of an earlier one."""
        return len(self.numbers) - len(set(self.numbers))


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """A class with too few examples for a hold-out."""

    #: Its name.
    name: str
    #: Its examples, and how many of them are not near-duplicates of another.
    count: int
    distinct: int
    #: How many more different examples it needs.
    missing: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the figures are computed."""

    #: holdout, cross-validation or none.
    method: str
    #: Pairs of (positions to learn from, positions to evaluate on); one for a hold-out.
    parts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    #: The classes with too few examples for a hold-out.
    shortages: tuple[Shortage, ...]
    #: The groups that were kept together.
    groups: Groups


def find_groups(features: Array, *, block: int = _BLOCK, max_pairs: int = _MAX_PAIRS) -> Groups:
    """Group near-duplicates.

    :param features: of unit length, shape (examples, dimensions).
    :param block: rows whose cosines are computed at a time.
    :param max_pairs: pairs that are kept at a time.
    :raises TrainerMissing: scikit-learn is not installed, with which scipy comes.
    """
    connected = [_Connected(len(features), max_pairs) for _ in THRESHOLDS]
    for start in range(0, len(features), block):
        rows = features[start : start + block]
        for other in range(0, start + 1, block):
            cosines = rows @ features[other : other + block].T
            for threshold, one in zip(THRESHOLDS, connected, strict=True):
                one.add(cosines >= threshold, start, other)
    most = max(2, _MAX_GROUP_SHARE * len(features))
    found = [
        Groups(numbers=one.numbers(), threshold=threshold) for threshold, one in zip(THRESHOLDS, connected, strict=True)
    ]
    return next((each for each in found if max(Counter(each.numbers).values(), default=0) <= most), found[-1])


def make_plan(labels: Sequence[str], groups: Groups, *, seed: int = 0) -> Plan:
    """Plan the evaluation of a classifier: a stratified hold-out, with too few examples cross-validation, or none.

    :param labels: the class of each example; the same for all of a regression.
    """
    distinct: dict[str, set[int]] = defaultdict(set)
    for label, group in zip(labels, groups.numbers, strict=True):
        distinct[label].add(group)
    counts = Counter(labels)
    shortages = tuple(
        Shortage(
            name=name,
            count=counts[name],
            distinct=len(distinct[name]),
            missing=MIN_FOR_HOLDOUT - len(distinct[name]),
        )
        for name in sorted(distinct)
        if len(distinct[name]) < MIN_FOR_HOLDOUT
    )
    if not shortages:
        held_out = _hold_out(labels, groups.numbers, seed)
        everything = set(range(len(labels)))
        part = (tuple(sorted(everything - held_out)), tuple(sorted(held_out)))
        return Plan(method="holdout", parts=(part,), shortages=(), groups=groups)
    folds = min([FOLDS, *(len(found) for found in distinct.values())])
    parts = fold_parts(labels, groups.numbers, folds, seed=seed) if folds >= MIN_FOR_FOLDS else ()
    method = "cross-validation" if parts else "none"
    return Plan(method=method, parts=parts, shortages=shortages, groups=groups)


def fold_parts(
    labels: Sequence[str], groups: Sequence[int], folds: int, *, seed: int = 0
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """Divide examples into folds, stratified and without dividing a group.

    :return: for each fold, the positions to learn from and those to evaluate on. A fold in which a class would be
        missing from what is learned from is left out.
    """
    of_fold: list[Counter[str]] = [Counter() for _ in range(folds)]
    fold_of: dict[int, int] = {}
    for members in _shuffled_groups(groups, seed, largest_first=True):
        classes = Counter(labels[each] for each in members)
        # The fold that has the fewest of these classes, then the smallest.
        best = min(
            range(folds),
            key=lambda fold: (
                sum(of_fold[fold][name] * count for name, count in classes.items()),
                of_fold[fold].total(),
            ),
        )
        of_fold[best].update(classes)
        fold_of[groups[members[0]]] = best
    parts = []
    for fold in range(folds):
        inside = tuple(each for each, group in enumerate(groups) if fold_of[group] == fold)
        outside = tuple(each for each, group in enumerate(groups) if fold_of[group] != fold)
        if inside and {labels[each] for each in outside} == set(labels):
            parts.append((outside, inside))
    return tuple(parts)


def _hold_out(labels: Sequence[str], groups: Sequence[int], seed: int) -> set[int]:
    """Choose whole groups in a random order until each class has its share; those that would exceed one stay out."""
    room = {name: max(1, round(HOLDOUT_SHARE * count)) for name, count in Counter(labels).items()}
    chosen: set[int] = set()
    for members in _shuffled_groups(groups, seed):
        classes = Counter(labels[each] for each in members)
        if all(count <= room[name] for name, count in classes.items()):
            chosen.update(members)
            for name, count in classes.items():
                room[name] -= count
    return chosen


def _shuffled_groups(groups: Sequence[int], seed: int, *, largest_first: bool = False) -> list[list[int]]:
    members: dict[int, list[int]] = defaultdict(list)
    for position, group in enumerate(groups):
        members[group].append(position)
    found = list(members.values())
    random.Random(seed).shuffle(found)
    return sorted(found, key=len, reverse=True) if largest_first else found


class _Connected:
    """Collects pairs, and numbers the groups that they connect."""

    def __init__(self, count: int, max_pairs: int) -> None:
        self._count, self._max_pairs = count, max_pairs
        self._firsts: list[Array] = []
        self._seconds: list[Array] = []

    def add(self, is_close: Array, row: int, column: int) -> None:
        """Add the pairs of a block. :param row, column: the examples at its first row and column."""
        import numpy as np

        firsts, seconds = np.nonzero(is_close)
        self._firsts.append(firsts + row)
        self._seconds.append(seconds + column)
        if (
            sum(map(len, self._firsts)) > self._max_pairs
        ):  # where all are alike; each is then connected to its group's first
            labels = self._label()
            _, first_of = np.unique(labels, return_index=True)
            self._firsts, self._seconds = [np.arange(self._count)], [first_of[labels]]

    def numbers(self) -> tuple[int, ...]:
        """Number the groups in the order of their first example."""
        numbers: dict[int, int] = {}
        return tuple(numbers.setdefault(label, len(numbers)) for label in self._label().tolist())

    def _label(self) -> Array:
        import numpy as np

        try:
            from scipy.sparse import coo_array
            from scipy.sparse.csgraph import connected_components
        except ImportError as error:
            raise TrainerMissing() from error
        firsts, seconds = (np.concatenate([[], *each]).astype(np.int32) for each in (self._firsts, self._seconds))
        pairs = coo_array((np.ones(len(firsts), bool), (firsts, seconds)), shape=(self._count, self._count))
        return np.asarray(connected_components(pairs, directed=False)[1])

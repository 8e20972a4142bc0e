"""Near-duplicates are those that comparing every pair finds; groups divide all vectors, and are the same each time."""

from __future__ import annotations

import numpy as np
import pytest

from store.collections import likeness
from store.collections.likeness import ComparisonTooLong, group_by_likeness, near_duplicates

DIMENSIONS = 64


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype("<f4")


def clusters(count: int, centres: int, *, spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors like those of images, and the cluster of each."""
    generator = np.random.default_rng(seed)
    middle = unit(np.maximum(0, generator.normal(size=(centres, DIMENSIONS))) + 1e-3)
    chosen = generator.integers(centres, size=count)
    noise = generator.normal(scale=spread, size=(count, DIMENSIONS)) / DIMENSIONS**0.5
    return unit(np.maximum(0, middle[chosen] + noise) + 1e-6), chosen


def connected_by_every_pair(numbers: np.ndarray, vectors: np.ndarray, threshold: float) -> set[tuple[int, ...]]:
    """What the definition says, pair by pair."""
    groups = [{int(number)} for number in numbers if number >= 0]
    usable = [place for place, number in enumerate(numbers) if number >= 0]
    for position, one in enumerate(usable):
        for other in usable[position + 1 :]:
            if float(vectors[one] @ vectors[other]) >= threshold:
                joined = [group for group in groups if numbers[one] in group or numbers[other] in group]
                groups = [group for group in groups if group not in joined] + [set().union(*joined)]
    return {tuple(sorted(group)) for group in groups if len(group) > 1}


@pytest.mark.parametrize("threshold", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("bounded", [False, True])
def test_near_duplicates_are_those_of_every_pair(
    monkeypatch: pytest.MonkeyPatch, threshold: float, bounded: bool
) -> None:
    monkeypatch.setattr(likeness, "_BLOCK_ROWS", 37)
    if bounded:
        monkeypatch.setattr(likeness, "_BASIS_ROWS", 50)
        monkeypatch.setattr(likeness, "_COMPONENTS", 12)
    vectors, _ = clusters(240, 60, spread=0.3)
    numbers = np.arange(240) * 3
    numbers[::17] = -1

    found = near_duplicates(numbers, vectors, threshold, limit_seconds=60)

    assert {group.numbers for group in found} == connected_by_every_pair(numbers, vectors, threshold)
    assert [len(group.numbers) for group in found] == sorted((len(group.numbers) for group in found), reverse=True)
    for group in found:
        assert group.scores[0] == pytest.approx(1, abs=1e-5)


def test_equal_vectors_are_one_group_and_different_ones_none() -> None:
    same = np.repeat(unit(np.ones((1, DIMENSIONS))), 2100, axis=0)
    different = unit(np.eye(DIMENSIONS))

    (group,) = near_duplicates(np.arange(2100), same, 0.99, limit_seconds=60)

    assert group.numbers == tuple(range(2100))
    assert near_duplicates(np.arange(DIMENSIONS), different, 0.5, limit_seconds=60) == []
    assert near_duplicates(np.empty(0, "<i8"), np.empty((0, DIMENSIONS), "<f4"), 0.5, limit_seconds=60) == []


def test_comparison_ends_at_its_limit() -> None:
    vectors, _ = clusters(100, 10, spread=0.1)

    with pytest.raises(ComparisonTooLong):
        near_duplicates(np.arange(100), vectors, 0.9, limit_seconds=-1)


def test_groups_are_the_clusters_there_are_and_the_same_each_time() -> None:
    vectors, clusters_of = clusters(900, 6, spread=0.15)
    numbers = np.arange(900) + 1000
    numbers[5] = -1

    groups = group_by_likeness(numbers, vectors, count=6)

    assert groups == group_by_likeness(numbers, vectors, count=6)
    assert sorted(number for group in groups for number in group.numbers) == sorted(numbers[numbers >= 0].tolist())
    # Most of each group is of one cluster.
    majorities = [np.bincount(clusters_of[np.array(group.numbers) - 1000]).max() for group in groups]
    assert sum(majorities) / 899 > 0.8
    for group in groups:
        assert list(group.scores) == sorted(group.scores, reverse=True)


def test_number_of_groups_follows_the_number_of_vectors() -> None:
    vectors, _ = clusters(50, 50, spread=0.5)

    assert len(group_by_likeness(np.arange(50), vectors)) == 5
    assert len(group_by_likeness(np.arange(2), vectors[:2], count=9)) == 2
    assert group_by_likeness(np.empty(0, "<i8"), vectors[:0]) == []
    same = np.repeat(vectors[:1], 20, axis=0)
    assert [len(group.numbers) for group in group_by_likeness(np.arange(20), same, count=4)] == [20]

"""The split: near-duplicates stay together, classes keep their shares, and too little data is said."""

from __future__ import annotations

from collections import Counter

import numpy as np

from trainer.splitting import (
    HOLDOUT_SHARE,
    MIN_FOR_HOLDOUT,
    THRESHOLDS,
    Groups,
    find_groups,
    fold_parts,
    make_plan,
)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def scattered(count: int, seed: int = 0) -> np.ndarray:
    """Features that are no near-duplicates: random directions in 64 dimensions have cosines of 0.125 on average."""
    return unit(np.random.default_rng(seed).normal(size=(count, 64)))


def apart(count: int) -> Groups:
    return Groups(numbers=tuple(range(count)), threshold=THRESHOLDS[0])


def test_near_duplicates_and_what_they_connect_are_one_group() -> None:
    base = scattered(50)
    # A chain: the ends have a cosine of 0.95, each step one of 0.99 or more.
    angles = np.linspace(0, np.arccos(0.95), 4)
    chain = np.zeros((4, 64))
    chain[:, 0], chain[:, 1] = np.cos(angles), np.sin(angles)

    found = find_groups(unit(np.vstack([base, chain, base[:1]])))

    assert found.numbers == (*range(50), 50, 50, 50, 50, 0)
    assert found.duplicates == 4


def test_groups_are_found_across_blocks() -> None:
    rows = scattered(50)
    features = np.vstack([rows, rows[::-1]])
    whole = find_groups(features)

    assert find_groups(features, block=7, max_pairs=60) == whole
    assert whole.numbers == (*range(50), *reversed(range(50)))


def test_images_that_are_all_alike_are_not_a_single_group() -> None:
    random = np.random.default_rng(3)
    rows = unit(1 + 0.08 * random.normal(size=(60, 64)))  # cosines of about 0.994
    cosines = (rows @ rows.T)[np.triu_indices(60, 1)]
    assert cosines.min() > 0.98 and cosines.max() < 0.999

    found = find_groups(rows)

    assert found.threshold > THRESHOLDS[0]
    assert max(Counter(found.numbers).values()) <= 6


def test_holdout_is_stratified_seeded_and_divides_no_group() -> None:
    labels = ["a"] * 100 + ["b"] * 40
    groups = Groups(numbers=tuple(each // 2 for each in range(140)), threshold=0.98)

    plan, again, other = (make_plan(labels, groups, seed=seed) for seed in (5, 5, 6))

    ((learn, rest),) = plan.parts
    assert plan.method == "holdout" and plan.shortages == ()
    assert sorted(learn + rest) == list(range(140))
    assert not {groups.numbers[each] for each in learn} & {groups.numbers[each] for each in rest}
    assert Counter(labels[each] for each in rest) == {"a": 100 * HOLDOUT_SHARE, "b": 40 * HOLDOUT_SHARE}
    assert again == plan != other


def test_a_large_group_stays_with_what_is_learned_from() -> None:
    labels = ["a"] * 60 + ["b"] * 30
    groups = Groups(numbers=(*[0] * 30, *range(1, 61)), threshold=0.98)

    ((_, rest),) = make_plan(labels, groups).parts

    assert 0 not in rest
    assert Counter(labels[each] for each in rest) == {"a": 12, "b": 6}


def test_too_few_examples_are_cross_validated_and_the_classes_named() -> None:
    labels = ["a"] * 50 + ["b"] * (MIN_FOR_HOLDOUT - 3)

    plan = make_plan(labels, apart(len(labels)))

    assert plan.method == "cross-validation"
    assert [(each.name, each.count, each.missing) for each in plan.shortages] == [("b", MIN_FOR_HOLDOUT - 3, 3)]
    assert sorted(each for _, rest in plan.parts for each in rest) == list(range(len(labels)))
    for learn, rest in plan.parts:
        assert not set(learn) & set(rest)
        assert {labels[each] for each in learn} == {"a", "b"}


def test_near_duplicates_do_not_count_as_different_examples() -> None:
    labels = ["a"] * 40 + ["b"] * 40
    groups = Groups(numbers=(*range(40), *(40 + each // 20 for each in range(40))), threshold=0.98)

    plan = make_plan(labels, groups)

    assert plan.method == "cross-validation"
    assert [(each.name, each.count, each.distinct) for each in plan.shortages] == [("b", 40, 2)]
    assert len(plan.parts) == 2


def test_there_is_no_plan_for_a_class_of_near_duplicates_only() -> None:
    labels = ["a"] * 10 + ["b"] * 10

    plan = make_plan(labels, Groups(numbers=(*range(10), *[10] * 10), threshold=0.98))

    assert (plan.method, plan.parts) == ("none", ())
    assert [each.name for each in plan.shortages] == ["a", "b"]


def test_folds_are_stratified_and_divide_no_group() -> None:
    labels = ["a"] * 30 + ["b"] * 12
    groups = [each // 3 for each in range(42)]

    parts = fold_parts(labels, groups, 3, seed=1)

    assert len(parts) == 3
    for learn, rest in parts:
        assert not {groups[each] for each in learn} & {groups[each] for each in rest}
        counts = Counter(labels[each] for each in rest)
        assert 9 <= counts["a"] <= 12 and 3 <= counts["b"] <= 6

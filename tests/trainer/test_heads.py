"""Fitting heads: what they learn, and that they answer as scikit-learn does."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from trainer.errors import TrainerMissing, UnusableExamples
from trainer.fitting import fit_and_evaluate_classes, fit_and_evaluate_numbers
from trainer.heads import Head, fit_classifier, fit_regression, normalise


def clusters(per_class: int, classes: int, *, spread: float = 0.6, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Features around a direction for each class, and the labels."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(classes, 32))
    rows = np.repeat(centres, per_class, axis=0) + spread * random.normal(size=(per_class * classes, 32))
    return normalise(rows), [f"class {number // per_class}" for number in range(per_class * classes)]


def fit(features: np.ndarray, labels: list[str], **options: int) -> Head:
    return fit_classifier(features, labels, range(len(labels)), **options)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_logistic_regression_gives_the_probabilities_of_scikit_learn(classes: int) -> None:
    from sklearn.linear_model import LogisticRegression

    features, labels = clusters(20, classes)

    head = fit(features, labels)
    strength = float(head.method.split("C = ")[1].split()[0])
    model = LogisticRegression(C=strength, tol=1e-8, max_iter=5000).fit(features.astype(np.float64), labels)

    assert head.classes == tuple(model.classes_)
    assert head.weights.shape == (32, classes) and head.weights.dtype == head.bias.dtype == np.float32
    # Both stop when the gradient is small, ours sooner.
    assert np.abs(head.apply(features) - model.predict_proba(features.astype(np.float64))).max() < 0.02


def test_strength_is_weaker_where_classes_overlap() -> None:
    def strength(spread: float) -> float:
        return float(fit(*clusters(30, 3, spread=spread)).method.split("C = ")[1].split()[0])

    assert strength(2.0) < strength(0.2)


def test_very_few_examples_are_answered_by_their_nearest_neighbours() -> None:
    features, labels = clusters(5, 3)
    others, truth = clusters(5, 3)  # the same centres and spread
    head = fit(features, labels)

    answers = head.apply(others)

    assert head.method.startswith("nearest neighbours")
    assert head.votes is not None and head.votes.shape == (15, 3)
    assert [head.classes[each] for each in answers.argmax(axis=1)] == truth
    assert np.allclose(answers.sum(axis=1), 1)


def test_neighbours_of_a_large_class_do_not_outvote_a_small_one() -> None:
    features = np.eye(2, dtype=np.float32)[[0] * 12 + [1] * 2]
    head = fit(features, ["a"] * 12 + ["b"] * 2)

    between = head.apply(normalise(np.ones((1, 2))))

    assert head.method.startswith("nearest neighbours")
    assert between[0].tolist() == pytest.approx([0.5, 0.5], abs=1e-5)


def test_ridge_regression_finds_a_linear_relation() -> None:
    random = np.random.default_rng(4)
    features = normalise(random.normal(size=(200, 16)))
    targets = features @ random.normal(size=16) * 1000 + 5000

    head = fit_regression(features, targets.tolist(), range(200))

    assert (head.kind, head.weights.shape, head.bias.shape) == ("regression", (16, 1), (1,))
    # Both stop when the gradient is small, ours sooner.
    assert np.abs(head.apply(features) - targets).max() < 0.01 * np.ptp(targets)


def test_fitting_is_repeatable_and_raises_no_warning() -> None:
    features, labels = clusters(30, 4, spread=1.5)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, other = fit(features, labels, seed=1), fit(features, labels, seed=1)

    assert np.array_equal(one.weights, other.weights) and np.array_equal(one.bias, other.bias)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (np.eye(3, dtype=np.float32), ["a", "a", "a"], "only one class"),
        (np.eye(3, dtype=np.float32), ["a", "b"], "3 rows of features for 2 examples"),
        (np.zeros((0, 3), np.float32), [], "0 rows"),
        (2 * np.eye(2, dtype=np.float32), ["a", "b"], "unit length"),
        (np.full((2, 2), np.nan, np.float32), ["a", "b"], "unit length"),
    ],
)
def test_features_that_cannot_be_used_are_refused(features: np.ndarray, labels: list[str], message: str) -> None:
    with pytest.raises(UnusableExamples, match=message):
        fit(features, labels)


def test_numbers_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(UnusableExamples, match="not finite"):
        fit_regression(np.eye(2, dtype=np.float32), [1.0, float("inf")], [0, 1])
    with pytest.raises(UnusableExamples, match=r"beyond 1e\+30"):
        fit_regression(np.eye(2, dtype=np.float32), [1.0, -1e31], [0, 1])
    with pytest.raises(UnusableExamples, match="zero or not finite"):
        normalise(np.zeros((1, 3)))


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)

    with pytest.raises(TrainerMissing, match=r"mlg\[train\]"):
        fit(*clusters(20, 2))


# Fitting and evaluating


def test_figures_are_of_the_holdout_and_the_head_of_everything() -> None:
    features, labels = clusters(50, 3, spread=1.2)
    names = [f"{number}.jpg" for number in range(150)]

    found = fit_and_evaluate_classes(features, labels, names, seed=2)

    ((learn, rest),) = found.plan.parts
    of_part = fit(features[list(learn)], [labels[each] for each in learn], seed=2)
    truth = [labels[each] for each in rest]
    said = [of_part.classes[each] for each in of_part.apply(features[list(rest)]).argmax(axis=1)]
    assert found.figures.count == 30
    assert found.figures.accuracy == np.mean([one == other for one, other in zip(truth, said, strict=True)])
    assert [each.name for each in found.figures.items] == [names[each] for each in rest]
    assert np.array_equal(found.head.weights, fit(features, labels, seed=2).weights)
    assert "30 of 150 examples were held out" in found.figures.basis
    assert "fitted on all 150" in found.figures.basis


def test_figures_without_a_holdout_say_so_and_what_is_missing() -> None:
    features, labels = clusters(12, 3)

    found = fit_and_evaluate_classes(features, labels, labels)

    assert found.figures.count == 36
    assert "cross-validated" in found.figures.basis
    assert "class 0 8, class 1 8, class 2 8" in found.figures.basis
    assert [each.missing for each in found.figures.shortages] == [8, 8, 8]


def test_figures_are_of_the_method_that_is_served() -> None:
    # Enough examples for a regression, but not without the part that is evaluated.
    features, labels = clusters(9, 2, spread=2.0)

    found = fit_and_evaluate_classes(features, labels, labels)
    expected = [
        fit_classifier(features[list(learn)], [labels[each] for each in learn], learn, is_by_neighbours=False).apply(
            features[list(rest)]
        )
        for learn, rest in found.plan.parts
    ]

    assert found.head.method.startswith("logistic")
    assert [each.probability for each in found.figures.items] == np.concatenate(expected).max(axis=1).tolist()


def test_no_figures_where_all_of_a_class_are_near_duplicates() -> None:
    features, labels = clusters(10, 2, spread=0.001)

    found = fit_and_evaluate_classes(features, labels, labels)

    assert (found.figures.count, found.figures.accuracy) == (0, None)
    assert "There are no figures" in found.figures.basis
    assert len(found.head.classes) == 2


def test_shuffled_labels_get_no_good_figures_from_near_duplicates() -> None:
    # Every example twice, under a label that has nothing to do with it: whoever lets twins be on both sides sees 100 %.
    random = np.random.default_rng(7)
    rows = normalise(random.normal(size=(60, 256)))
    labels = random.choice(["a", "b"], 60).tolist()

    found = fit_and_evaluate_classes(np.vstack([rows, rows]), [*labels, *labels], [str(n) for n in range(120)])

    assert found.plan.groups.duplicates == 60
    assert found.figures.accuracy is not None and found.figures.accuracy < 0.8


def test_a_regression_is_evaluated_on_what_was_held_out() -> None:
    random = np.random.default_rng(4)
    features = normalise(random.normal(size=(100, 8)))
    targets = (features @ random.normal(size=8)).tolist()

    found = fit_and_evaluate_numbers(features, targets, [str(n) for n in range(100)])
    few = fit_and_evaluate_numbers(features[:12], targets[:12], [str(n) for n in range(12)])

    assert found.figures.count == 20
    assert found.figures.pearson is not None and found.figures.pearson > 0.99
    assert found.figures.mae is not None and found.figures.mae < (found.figures.mae_of_mean or 0) / 5
    assert few.figures.count == 12 and "cross-validated" in few.figures.basis
    assert "needs 20 different examples; 8 are missing." in few.figures.basis

"""Fitting a head on features: logistic regression, nearest neighbours or ridge regression.

`Head` itself is in `provider_image/compiler/heads.py`, which compiles it. Features have unit length, which makes the
fit some fifty times as fast as with raw ones. One thread is used: with two, the fit takes two to four times as long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from provider_image.compiler.heads import Head
from trainer.errors import TrainerMissing, UnusableExamples
from trainer.splitting import fold_parts

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["Head", "fit_classifier", "fit_regression", "normalise"]

#: Inverse strengths of regularisation that cross-validation chooses from, weakest last.
_INVERSE_STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
#: Strengths of ridge regression that cross-validation chooses from.
_RIDGE_STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
#: How steeply the vote of a neighbour falls with its distance, to choose from; the factor of the cosine.
_STEEPNESSES = (10.0, 20.0, 40.0, 80.0, 160.0)
#: Folds of the cross-validation that chooses.
_FOLDS = 3
#: With fewer examples a class on average, nearest neighbours are used.
_MIN_FOR_REGRESSION = 8
#: Directions of the features in which strengths are compared, the ones of largest variance; the fit uses all.
_COMPARED_DIRECTIONS = 256
#: Most examples times classes for which strengths are compared: that takes a minute or two. With more, the middle one
#: is used.
_MAX_COMPARED = 1_000_000
#: A fit ends when no derivative is larger; that of a comparison, and that of the head. Looser ones answer more of
#: scikit-learn's digits wrongly: two in a hundred at 1e-3, one in two hundred at 1e-4.
_COMPARED_TOLERANCE, _TOLERANCE = 1e-4, 1e-5
#: Largest number to learn: the weights are 32-bit floats.
_MAX_NUMBER = 1e30
#: Allowed deviation of the length of features from 1.
_LENGTH_TOLERANCE = 1e-3


def normalise(features: Array) -> Array:
    """Give every row of features unit length, f32. :raises UnusableExamples: a row is zero or not finite."""
    import numpy as np

    lengths = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    if not bool(np.isfinite(lengths).all()) or not bool((lengths > 0).all()):
        raise UnusableExamples("The features of an example are zero or not finite. Check the model that gave them.")
    return np.asarray(features / lengths, np.float32)


def are_few(count: int, classes: int) -> bool:
    """Tell whether so many examples are so few that nearest neighbours are used."""
    return count < _MIN_FOR_REGRESSION * classes


def fit_classifier(
    features: Array,
    labels: Sequence[str],
    groups: Sequence[int],
    *,
    is_by_neighbours: bool | None = None,
    seed: int = 0,
) -> Head:
    """Fit a classifier: logistic regression, or nearest neighbours for very few examples.

    :param features: f32 of unit length, shape (examples, dimensions).
    :param labels: the class of each example.
    :param groups: the group of near-duplicates of each, which are never divided between folds.
    :param is_by_neighbours: whether to use nearest neighbours; None decides by `are_few`.
    :raises UnusableExamples: there is only one class, or the features cannot be used.
    :raises TrainerMissing: scikit-learn is not installed.
    """
    import numpy as np

    _check(features, len(labels))
    classes = tuple(sorted(set(labels)))
    if len(classes) < 2:
        raise UnusableExamples("There is only one class. Give at least two.")
    number = {name: position for position, name in enumerate(classes)}
    answers = np.array([number[label] for label in labels])
    if are_few(len(labels), len(classes)) if is_by_neighbours is None else is_by_neighbours:
        return _fit_neighbours(features, answers, groups, classes)
    parts = fold_parts(labels, groups, _FOLDS, seed=seed)
    with one_thread():
        strength = _INVERSE_STRENGTHS[len(_INVERSE_STRENGTHS) // 2]
        parts = parts if len(labels) * len(classes) <= _MAX_COMPARED else ()
        if parts:
            reduced = _reduce(features)
            strength = max(_INVERSE_STRENGTHS, key=lambda each: _cross_validated_score(reduced, answers, parts, each))
        # Around their mean, the features need fewer steps; the intercept moves the result back.
        mean = features.mean(axis=0)
        model = _logistic_regression(strength, _TOLERANCE).fit(features - mean, answers)
    weights = model.coef_.T
    bias = model.intercept_ - mean @ weights
    if len(classes) == 2:  # scikit-learn gives the second class alone; its sigmoid is a softmax beside a zero
        weights, bias = np.hstack([np.zeros_like(weights), weights]), np.concatenate([np.zeros_like(bias), bias])
    return Head(
        kind="classification",
        method=f"logistic regression, C = {strength:g}" + " by cross-validation" * bool(parts),
        classes=classes,
        weights=np.ascontiguousarray(weights, np.float32),
        bias=np.asarray(bias, np.float32),
    )


def fit_regression(features: Array, targets: Sequence[float], groups: Sequence[int], *, seed: int = 0) -> Head:
    """Fit a ridge regression. The parameters are those of `fit_classifier`, with a number for each example.

    :raises UnusableExamples: the features cannot be used, or a number is not finite.
    :raises TrainerMissing: scikit-learn is not installed.
    """
    import numpy as np

    _check(features, len(targets))
    numbers = np.array(targets, np.float64)
    if not bool((np.abs(numbers) <= _MAX_NUMBER).all()):
        raise UnusableExamples(f"A number is not finite, or beyond {_MAX_NUMBER:g}.")
    parts = fold_parts([""] * len(numbers), groups, _FOLDS, seed=seed)
    features64 = features.astype(np.float64)
    with one_thread():
        strength = _RIDGE_STRENGTHS[len(_RIDGE_STRENGTHS) // 2]
        if parts:
            errors = [_cross_validated_error(features64, numbers, parts, each) for each in _RIDGE_STRENGTHS]
            strength = _RIDGE_STRENGTHS[int(np.argmin(errors))]
        model = _ridge(strength).fit(features64, numbers)
    return Head(
        kind="regression",
        method=f"ridge regression, strength {strength:g}" + " by cross-validation" * bool(parts),
        weights=np.asarray(model.coef_, np.float32).reshape(-1, 1),
        bias=np.asarray(model.intercept_, np.float32).reshape(1),
    )


def _fit_neighbours(features: Array, answers: Array, groups: Sequence[int], classes: tuple[str, ...]) -> Head:
    """Let every example vote for its class, by its likeness. Classes have the same weight, whatever their size.

    How steeply votes fall with distance is chosen by leaving each group out.
    """
    import numpy as np

    counts = np.bincount(answers, minlength=len(classes))
    bias = -np.log(counts[answers])
    votes = np.eye(len(classes), dtype=np.float32)[answers]
    of_group = np.array(groups)
    cosines = features.astype(np.float64) @ features.astype(np.float64).T
    cosines[of_group[:, None] == of_group[None, :]] = -np.inf
    judged = np.isfinite(cosines).any(axis=1)
    losses = []
    for steepness in _STEEPNESSES:
        scores = cosines[judged] * steepness + bias
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares = scores @ votes / scores.sum(axis=1, keepdims=True)
        losses.append(log_loss(shares, answers[judged]))
    steepness = _STEEPNESSES[int(np.argmin(losses))]
    return Head(
        kind="classification",
        method=f"nearest neighbours: every example votes with the weight exp({steepness:g} x cosine)",
        classes=classes,
        weights=np.ascontiguousarray(features.T * steepness, np.float32),
        bias=np.asarray(bias, np.float32),
        votes=votes,
    )


def _cross_validated_score(
    features: Array, answers: Array, parts: Sequence[tuple[Sequence[int], Sequence[int]]], strength: float
) -> tuple[int, float]:
    """Return how many answers are right; where that is equal, the probabilities of the right ones decide."""
    right, loss = 0, 0.0
    for learn, rest in parts:
        model = _logistic_regression(strength, _COMPARED_TOLERANCE).fit(*_rows(features, answers, learn))
        probabilities, truth = model.predict_proba(features[list(rest)]), answers[list(rest)]
        right += int((probabilities.argmax(axis=1) == truth).sum())
        loss += log_loss(probabilities, truth) * len(rest)
    return right, -loss


def _cross_validated_error(
    features: Array, numbers: Array, parts: Sequence[tuple[Sequence[int], Sequence[int]]], strength: float
) -> float:
    errors = []
    for learn, rest in parts:
        model = _ridge(strength).fit(*_rows(features, numbers, learn))
        errors.append(float(((model.predict(features[list(rest)]) - numbers[list(rest)]) ** 2).sum()))
    return sum(errors)


def log_loss(probabilities: Array, answers: Array) -> float:
    """Return the mean logarithmic loss. :param answers: the number of the right class of each row."""
    import numpy as np

    if not len(answers):
        return 0.0
    right = probabilities[np.arange(len(answers)), answers]
    return float(-np.log(np.maximum(right, 1e-12)).mean())


def _reduce(features: Array) -> Array:
    """Return the features in their directions of largest variance, by the eigenvectors of the smaller Gram matrix."""
    import numpy as np

    centred = features - features.mean(axis=0)
    is_wide = features.shape[1] >= features.shape[0]
    values, vectors = np.linalg.eigh(centred @ centred.T if is_wide else centred.T @ centred)
    values, vectors = values[-_COMPARED_DIRECTIONS:], vectors[:, -_COMPARED_DIRECTIONS:]
    reduced = vectors * np.sqrt(np.maximum(values, 0)) if is_wide else centred @ vectors
    return np.asarray(reduced, np.float32)


def _rows(features: Array, answers: Array, positions: Sequence[int]) -> tuple[Array, Array]:
    return features[list(positions)], answers[list(positions)]


def _logistic_regression(strength: float, tolerance: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, tol=tolerance, max_iter=1000)


def _ridge(strength: float) -> Any:
    from sklearn.linear_model import Ridge

    return Ridge(alpha=strength)


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit scikit-learn to one thread. :raises TrainerMissing: it is not installed."""
    try:
        import sklearn  # noqa: F401
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise TrainerMissing() from error
    with threadpool_limits(1):
        yield


def _check(features: Array, count: int) -> None:
    import numpy as np

    if features.ndim != 2 or len(features) != count or not count:
        raise UnusableExamples(f"There are {len(features)} rows of features for {count} examples.")
    lengths = np.linalg.norm(features, axis=1)
    if not bool((np.abs(lengths - 1) <= _LENGTH_TOLERANCE).all()):
        raise UnusableExamples("The features of an example do not have unit length.")

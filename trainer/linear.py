"""Linear models of table rows and texts: fitting, figures, and the artefact for the backend `linear`.

Called by `tables.py` and `texts.py`, which know the features. Features are learned again for each part of an
evaluation, so figures never profit from what the evaluated rows say about means, categories or words.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from provider_image.backends.linear import LINEAR_FILES, MAX_WEIGHTS, LinearNet, softmax, write_net
from provider_image.compiler.custom import check_custom_name
from provider_image.compiler.installing import begin_artefact, build_folder, install
from provider_image.errors import CompilationFailed
from provider_image.features import FEATURES_FILE, MAX_FEATURES_BYTES
from provider_image.features.table import TableFeatures
from provider_image.features.text import TextFeatures
from provider_image.models.artefact import Artefact, Provenance, Sample
from provider_image.models.catalogue import ModelFacts
from provider_image.service import Service, check_params, primary_input
from provider_image.services import load_service
from trainer.errors import UnusableExamples
from trainer.examples import ExampleLimits, check_class_name, parse_number
from trainer.figures import Figures, classification_figures, regression_figures
from trainer.fitting import describe_plan
from trainer.heads import log_loss, one_thread
from trainer.splitting import Groups, Plan, fold_parts, make_plan

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]
    #: Features: f64, shape (examples, features), dense or a sparse array of scipy.
    Matrix = Any

#: Part of the digest. Change it whenever the results of a model change that is trained on the same data.
RECIPE = "linear-1"
#: Numbers that are classes rather than amounts: at most so many different ones, all of them whole.
MAX_NUMBER_CLASSES = 20
#: Inverse strengths of regularisation of a classifier, and strengths of a regression, to choose from.
_INVERSE_STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
_STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
#: Folds of the cross-validation that chooses.
_FOLDS = 3
#: The written model may differ by this much from scikit-learn's, as a share of the largest number.
_TOLERANCE = 1e-6
#: Steps of the fit of a classifier. One that needs more is used as it is: its figures say how good it is.
_MAX_STEPS = 5000


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What is to be answered: a class or a number for each example."""

    #: The class of each example; the same for all of a regression.
    labels: tuple[str, ...]
    #: The number of each example; empty for a classification.
    numbers: tuple[float, ...] = ()

    @property
    def is_regression(self) -> bool:
        """Tell whether numbers are to be answered."""
        return bool(self.numbers)


@dataclass(frozen=True, kw_only=True)
class LinearModel:
    """A fitted model: features @ weights + bias are the scores of classes, or a number."""

    #: The names of the classes, in the order of the outputs; empty for a regression.
    classes: tuple[str, ...]
    #: f64, shape (features, outputs) and (outputs,).
    weights: Array
    bias: Array
    #: How it was fitted, for people.
    method: str

    def apply(self, matrix: Matrix) -> Array:
        """Compute probabilities, shape (examples, classes), or numbers, shape (examples,)."""
        import numpy as np

        scores = np.asarray(matrix @ self.weights + self.bias)
        return softmax(scores) if self.classes else scores[:, 0]


class Learner(Protocol):
    """Learns the features of a table or of texts."""

    #: How many examples it has.
    count: int

    def learn(self, positions: Sequence[int]) -> TableFeatures | TextFeatures:
        """Learn features from some examples. :raises UnusableExamples: there is nothing to learn from."""

    def matrix(self, features: Any, positions: Sequence[int]) -> Matrix:
        """Compute the features of some examples."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model with its features and figures, not yet installed."""

    features: TableFeatures | TextFeatures
    model: LinearModel
    figures: Figures


def read_targets(values: Sequence[str], *, is_regression: bool | None, limits: ExampleLimits, column: str) -> Targets:
    """Read the values of the target column, none of which is empty.

    :param is_regression: None finds out: numbers with decimals, or many different ones, are amounts.
    :raises UnusableExamples: they are no numbers, or the classes cannot be learned.
    """
    numbers = _numbers(values)
    if is_regression is None:
        is_regression = numbers is not None and (
            len(set(numbers)) > MAX_NUMBER_CLASSES or not all(number.is_integer() for number in numbers)
        )
    if is_regression:
        if numbers is None:
            wrong = next(value for value in values if _numbers([value]) is None)
            raise UnusableExamples(f"The column {column!r} has {wrong[:40]!r}, which is not a number.")
        if len(values) < limits.min_with_number:
            raise UnusableExamples(f"There are {len(values)} examples; at least {limits.min_with_number} are needed.")
        return Targets(labels=("all",) * len(numbers), numbers=tuple(numbers))
    counts = Counter(values)
    for name in counts:
        check_class_name(name)
    if not 2 <= len(counts) <= limits.max_classes:
        raise UnusableExamples(
            f"The column {column!r} has {len(counts)} different values; a classifier has 2 to {limits.max_classes}."
        )
    few = [f"{name!r} has {count}" for name, count in sorted(counts.items()) if count < limits.min_of_class]
    if few:
        more = f" and {len(few) - 10} more" if len(few) > 10 else ""
        raise UnusableExamples(
            f"Each class needs at least {limits.min_of_class} examples. Too few: {', '.join(few[:10])}{more}."
        )
    return Targets(labels=tuple(values))


def _numbers(values: Sequence[str]) -> list[float] | None:
    try:
        return [parse_number(value) for value in values]
    except UnusableExamples:
        return None


def fit_and_evaluate(
    learner: Learner,
    targets: Targets,
    groups: Sequence[int],
    names: Sequence[str],
    *,
    seed: int,
    on_step: Callable[[str], None],
) -> Trained:
    """Compute the figures on examples that the model has not seen, then fit it on all.

    :param groups: the group of each example; equal examples are one group, which is never divided.
    :param names: the name of each example in the figures.
    :raises UnusableExamples: :raises TrainerMissing: scikit-learn is not installed.
    """
    import numpy as np

    plan = make_plan(targets.labels, Groups(numbers=tuple(groups), threshold=1.0), seed=seed)
    classes = () if targets.is_regression else tuple(sorted(set(targets.labels)))
    on_step("evaluating")
    evaluated = [position for _, rest in plan.parts for position in rest]
    answers = []
    everything = range(learner.count)
    features = learner.learn(everything)
    count = features.count * max(1, len(classes))
    if count > MAX_WEIGHTS:
        raise UnusableExamples(
            f"The model would have {count:,} weights; at most {MAX_WEIGHTS:,} are allowed. "
            "Use fewer classes, columns or texts."
        )
    for learn, rest in plan.parts:
        known = learner.learn(learn)
        model = fit(learner.matrix(known, learn), learn, targets, classes, groups, seed=seed)
        answers.append(model.apply(learner.matrix(known, rest)))
    on_step("fitting")
    model = fit(learner.matrix(features, everything), everything, targets, classes, groups, seed=seed)
    chosen_names = [names[position] for position in evaluated]
    basis = f"{_describe(plan, learner.count)} Method: {model.method}."
    if targets.is_regression:
        found = np.concatenate(answers).tolist() if answers else []
        true = [targets.numbers[position] for position in evaluated]
        figures = regression_figures(true, found, chosen_names, basis=basis)
    else:
        probabilities = np.concatenate(answers) if answers else np.zeros((0, len(classes)))
        true_labels = [targets.labels[position] for position in evaluated]
        figures = classification_figures(classes, true_labels, probabilities, chosen_names, basis=basis)
    return Trained(features=features, model=model, figures=replace(figures, shortages=plan.shortages))


def _describe(plan: Plan, count: int) -> str:
    """Say on what figures were computed; equal examples are found without cosines."""
    alike = f"Near-duplicates (a cosine of at least {plan.groups.threshold:g}, {plan.groups.duplicates} found)"
    return describe_plan(plan, count).replace(alike, f"Equal examples ({plan.groups.duplicates} found)")


def fit(
    matrix: Matrix,
    positions: Sequence[int],
    targets: Targets,
    classes: tuple[str, ...],
    groups: Sequence[int],
    *,
    seed: int,
) -> LinearModel:
    """Fit a logistic or a ridge regression whose regularisation is chosen by cross-validation, on one thread.

    :param matrix: the features of the examples at `positions`.
    :param classes: all classes, empty for a regression.
    :raises CompilationFailed: the weights give other answers than scikit-learn.
    """
    import numpy as np

    labels = [targets.labels[position] for position in positions]
    parts = fold_parts(labels, [groups[position] for position in positions], _FOLDS, seed=seed)
    choices = _INVERSE_STRENGTHS if classes else _STRENGTHS
    strength = choices[len(choices) // 2]
    if classes:
        number = {name: place for place, name in enumerate(classes)}
        answers = np.array([number[label] for label in labels])
    else:
        answers = np.array([targets.numbers[position] for position in positions])
    with one_thread(), warnings.catch_warnings():
        # A fit that has not converged after so many steps is a model like any other, and is judged by its figures.
        warnings.filterwarnings("ignore", message=".*failed to converge", category=UserWarning)
        if parts:
            losses = [sum(_loss(matrix, answers, part, each, bool(classes)) for part in parts) for each in choices]
            strength = choices[int(np.argmin(losses))]
        estimator = _estimator(bool(classes), strength, is_final=True).fit(matrix, answers)
    weights, bias = np.atleast_2d(estimator.coef_).T, np.atleast_1d(estimator.intercept_)
    if len(classes) == 2:  # scikit-learn gives the second class alone; its sigmoid is a softmax beside a zero
        weights, bias = np.hstack([np.zeros_like(weights), weights]), np.concatenate([np.zeros_like(bias), bias])
    name = "logistic regression, C =" if classes else "ridge regression, strength"
    method = f"{name} {strength:g}" + " by cross-validation" * bool(parts)
    model = LinearModel(classes=classes, weights=weights, bias=bias, method=method)
    expected = estimator.predict_proba(matrix) if classes else estimator.predict(matrix)
    largest = float(np.abs(model.apply(matrix) - expected).max())
    if not largest <= _TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise CompilationFailed(f"The model's answers differ from scikit-learn's by up to {largest:.2g}.")
    return model


def _loss(
    matrix: Matrix, answers: Array, part: tuple[Sequence[int], Sequence[int]], strength: float, is_classifier: bool
) -> float:
    learn, rest = (list(each) for each in part)
    estimator = _estimator(is_classifier, strength, is_final=False).fit(matrix[learn], answers[learn])
    if is_classifier:
        return log_loss(estimator.predict_proba(matrix[rest]), answers[rest]) * len(rest)
    return float(((estimator.predict(matrix[rest]) - answers[rest]) ** 2).sum())


def _estimator(is_classifier: bool, strength: float, *, is_final: bool) -> Any:
    from sklearn.linear_model import LogisticRegression, Ridge

    if is_classifier:
        # Features of texts are small, and so are derivatives: with 1e-3 a fit ends before its first step.
        return LogisticRegression(C=strength, tol=1e-8 if is_final else 1e-5, max_iter=_MAX_STEPS)
    return Ridge(alpha=strength, tol=1e-8 if is_final else 1e-4)


def digest_training(table: Path, *choices: object) -> str:
    """Return the digest of a table and of what else decides a model. :raises UnusableExamples: it cannot be read."""
    try:
        with table.open("rb") as file:
            found = hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise UnusableExamples(f"{table.name} cannot be read: {error.strerror}.") from error
    found.update(json.dumps(choices).encode())
    return found.hexdigest()


def install_linear(
    models: Path,
    row: ModelFacts,
    trained: Trained,
    samples: dict[str, bytes],
    *,
    training_digest: str,
    on_step: Callable[[str], None],
) -> Artefact:
    """Write the artefact, record what the model answers for the samples, and install it.

    :param row: name, title, service and columns.
    :param samples: file name -> input, for the self-test; must have no row or text of the training data, because
        artefacts go to other computers.
    :param training_digest: digest of the table and of what else decided the model.
    :raises ConfigError: it cannot have this name or title.
    :raises NotInstalled: the models folder cannot be written.
    :raises UnusableExamples: the words or categories are too many bytes.
    """
    import sklearn

    check_custom_name(models, row.name, row.title)
    model = trained.model
    on_step("storing")
    service = load_service(row.service)
    with build_folder(models, row.name) as folder:
        write_net(folder, model.weights, model.bias)
        features = json.dumps(trained.features.to_json(), ensure_ascii=False).encode()
        if len(features) > MAX_FEATURES_BYTES:
            raise UnusableExamples(
                f"The words or categories have more than {MAX_FEATURES_BYTES} bytes. Use shorter ones."
            )
        (folder / FEATURES_FILE).write_bytes(features)
        draft = begin_artefact(
            row,
            backend="linear",
            precision="f64",
            labels=tuple((name, name) for name in model.classes),
            weights_sha256=hashlib.sha256(model.weights.tobytes() + model.bias.tobytes()).hexdigest(),
            recipe=RECIPE,
            reference=f"scikit-learn {sklearn.__version__}",
            provenance=Provenance(
                backbone="", backbone_digest="", training_digest=training_digest, method=model.method
            ),
            folder=folder,
            files={FEATURES_FILE: (len(features), hashlib.sha256(features).hexdigest())},
        )
        recorded = []
        for file, data in samples.items():
            (folder / file).write_bytes(data)
            output = _answer(service, draft, model, data)
            recorded.append(Sample(file=file, sha256=hashlib.sha256(data).hexdigest(), output=output))
        return install(replace(draft, samples=tuple(recorded)), folder, models, LINEAR_FILES)


def _answer(service: Service, draft: Artefact, model: LinearModel, data: bytes) -> Any:
    """Run the service on a sample with the model as it was fitted."""
    net = LinearNet(draft, model.weights, model.bias)
    params = check_params(service.params, {})
    item = service.prepare(draft, {primary_input(service): data}, params)
    return service.run(net, [item], [params])[0].data

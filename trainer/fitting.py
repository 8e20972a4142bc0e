"""Fitting and evaluating in one: the figures first, on what the head has not seen, then the head itself on everything.

Called with the features of all examples. The figures belong to a head of the same kind that was fitted without the
hold-out; the one that is served has seen more and should be no worse, which the basis of the figures says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from provider_image.compiler.heads import Head
from trainer.figures import Figures, classification_figures, regression_figures
from trainer.heads import are_few, fit_classifier, fit_regression
from trainer.splitting import MIN_FOR_HOLDOUT, Plan, find_groups, make_plan

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: The class of all examples with a number.
_NO_CLASS = "all"
#: Most classes that a text names.
_MAX_NAMED = 10


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A head and its figures."""

    #: Fitted on all examples.
    head: Head
    #: Computed with heads that had not seen what they were asked.
    figures: Figures
    #: How the examples were divided.
    plan: Plan


def fit_and_evaluate_classes(features: Array, labels: Sequence[str], names: Sequence[str], *, seed: int = 0) -> Fitted:
    """Fit a classifier and compute its figures.

    :param features: f32 of unit length, shape (examples, dimensions); `heads.normalise` makes them so.
    :param labels: the class of each example.
    :param names: the name of each.
    :raises UnusableExamples, TrainerMissing: see `heads.fit_classifier`.
    """
    plan = make_plan(labels, find_groups(features), seed=seed)
    # Decided for all parts alike: the figures must not be those of another method.
    is_by_neighbours = are_few(len(labels), len(set(labels)))

    def fit(positions: Sequence[int]) -> Head:
        chosen = list(positions)
        groups = [plan.groups.numbers[each] for each in chosen]
        chosen_labels = [labels[each] for each in chosen]
        return fit_classifier(features[chosen], chosen_labels, groups, is_by_neighbours=is_by_neighbours, seed=seed)

    head = fit(range(len(labels)))
    evaluated, answers = _evaluate(features, plan, fit)
    figures = classification_figures(
        head.classes,
        [labels[each] for each in evaluated],
        answers.reshape(len(evaluated), len(head.classes)),
        [names[each] for each in evaluated],
        basis=describe_plan(plan, len(labels)),
    )
    return Fitted(head=head, figures=replace(figures, shortages=plan.shortages), plan=plan)


def fit_and_evaluate_numbers(
    features: Array, targets: Sequence[float], names: Sequence[str], *, seed: int = 0
) -> Fitted:
    """Fit a regression and compute its figures. See `fit_and_evaluate_classes`."""
    plan = make_plan([_NO_CLASS] * len(targets), find_groups(features), seed=seed)

    def fit(positions: Sequence[int]) -> Head:
        chosen = list(positions)
        groups = [plan.groups.numbers[each] for each in chosen]
        return fit_regression(features[chosen], [targets[each] for each in chosen], groups, seed=seed)

    head = fit(range(len(targets)))
    evaluated, answers = _evaluate(features, plan, fit)
    figures = regression_figures(
        [targets[each] for each in evaluated],
        answers.tolist(),
        [names[each] for each in evaluated],
        basis=describe_plan(plan, len(targets), has_classes=False),
    )
    return Fitted(head=head, figures=replace(figures, shortages=plan.shortages), plan=plan)


def _evaluate(features: Array, plan: Plan, fit: Callable[[Sequence[int]], Head]) -> tuple[list[int], Array]:
    """Answer each part of a plan with a head that was fitted on the rest. :return: the positions, and their answers."""
    import numpy as np

    evaluated = [position for _, rest in plan.parts for position in rest]
    answers = [fit(learn).apply(features[list(rest)]) for learn, rest in plan.parts]
    return evaluated, np.concatenate(answers) if answers else np.zeros(0)


def describe_plan(plan: Plan, count: int, *, has_classes: bool = True) -> str:
    """Say on what figures were computed, and what is missing for better ones.

    :param count: all examples.
    """
    evaluated = sum(len(rest) for _, rest in plan.parts)
    alike = (
        f" Near-duplicates (a cosine of at least {plan.groups.threshold:g}, {plan.groups.duplicates} found) were kept "
        "together."
    )
    if plan.method == "holdout":
        return (
            f"{evaluated} of {count} examples were held out and answered by a model that was fitted on the others. The "
            f"model that is served was then fitted on all {count}.{alike}"
        )
    few = [f"{each.name} {each.missing}" for each in plan.shortages]
    more = f" and {len(few) - _MAX_NAMED} classes more" if len(few) > _MAX_NAMED else ""
    needed = (
        f"A hold-out needs {MIN_FOR_HOLDOUT} different examples of each class. Still missing: "
        f"{', '.join(few[:_MAX_NAMED])}{more}."
        if has_classes
        else f"A hold-out needs {MIN_FOR_HOLDOUT} different examples; {plan.shortages[0].missing} are missing."
    )
    if plan.method == "none":
        return f"There are no figures: too few different examples. {needed}"
    return (
        f"Too few examples for a hold-out, so the figures are cross-validated: each of {evaluated} examples was "
        f"answered by a model that was fitted on other parts of the {count}. The model that is served was fitted on "
        f"all of them.{alike} {needed}"
    )

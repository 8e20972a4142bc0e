"""The figures of an evaluation, compared with scikit-learn's and with published values."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from trainer.confusion_image import _short
from trainer.errors import UnusableExamples
from trainer.figures import (
    MAX_MISTAKES,
    EvaluatedItem,
    Figures,
    classification_figures,
    compare_figures,
    pearson,
    regression_figures,
    suggest_threshold,
)

CLASSES = ("bird", "cat", "dog")
TRUE = ["bird", "bird", "cat", "cat", "cat", "cat", "dog"]
#: The two wrong answers are the third (dog, 0.9) and the fifth (bird, 0.6).
PROBABILITIES = np.array(
    [
        [0.8, 0.1, 0.1],
        [0.7, 0.2, 0.1],
        [0.05, 0.05, 0.9],
        [0.1, 0.8, 0.1],
        [0.6, 0.3, 0.1],
        [0.2, 0.5, 0.3],
        [0.1, 0.2, 0.7],
    ]
)
NAMES = [f"{number}.jpg" for number in range(7)]


@pytest.fixture
def figures() -> Figures:
    return classification_figures(CLASSES, TRUE, PROBABILITIES, NAMES, basis="Seven photos.")


def test_figures_of_a_classifier_are_those_of_scikit_learn(figures: Figures) -> None:
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

    said = [CLASSES[each] for each in PROBABILITIES.argmax(axis=1)]
    precision, recall, _, count = precision_recall_fscore_support(TRUE, said, labels=CLASSES)

    assert figures.accuracy == pytest.approx(accuracy_score(TRUE, said))
    assert np.array_equal(figures.confusion, confusion_matrix(TRUE, said, labels=CLASSES))
    assert [each.precision for each in figures.per_class] == pytest.approx(list(precision))
    assert [each.recall for each in figures.per_class] == pytest.approx(list(recall))
    assert [each.count for each in figures.per_class] == list(count)
    assert figures.count == 7


def test_mistakes_are_listed_surest_first(figures: Figures) -> None:
    assert figures.mistakes == (
        EvaluatedItem(name="2.jpg", true="cat", predicted="dog", probability=0.9),
        EvaluatedItem(name="4.jpg", true="cat", predicted="bird", probability=0.6),
    )


def test_figures_are_plain_json_without_the_single_items(figures: Figures) -> None:
    document = json.loads(json.dumps(figures.as_json(), allow_nan=False))

    assert document["basis"] == "Seven photos."
    assert document["confusion"] == [[2, 0, 0], [1, 2, 1], [0, 0, 1]]
    assert document["mistakes"][0] == {"name": "2.jpg", "true": "cat", "predicted": "dog", "probability": 0.9}
    assert "items" not in document


def test_every_item_has_a_row(figures: Figures) -> None:
    rows = list(figures.rows())

    assert rows[0] == ["name", "true", "predicted", "probability", "right"]
    assert rows[1] == ["0.jpg", "bird", "bird", "0.800000", "yes"]
    assert rows[3] == ["2.jpg", "cat", "dog", "0.900000", "no"]
    assert len(rows) == 8


def test_a_class_that_is_never_true_or_never_answered_has_no_recall_or_precision() -> None:
    found = classification_figures(("a", "b"), ["a"], np.array([[0.9, 0.1]]), ["x"])

    assert (found.per_class[1].precision, found.per_class[1].recall) == (None, None)
    assert (found.per_class[0].precision, found.per_class[0].recall) == (1.0, 1.0)


def test_figures_of_nothing_are_undefined() -> None:
    classes = classification_figures(("a", "b"), [], np.zeros((0, 2)), [])
    numbers = regression_figures([], [], [])

    assert (classes.count, classes.accuracy, classes.accuracy_low, classes.threshold) == (0, None, None, None)
    assert (numbers.count, numbers.mae, numbers.rmse, numbers.pearson) == (0, None, None, None)
    assert Image.open(io.BytesIO(classes.confusion_png())).format == "PNG"
    json.dumps([classes.as_json(), numbers.as_json()], allow_nan=False)


def test_a_class_that_the_model_does_not_have_is_named() -> None:
    with pytest.raises(UnusableExamples, match=r"no class 'wolf' and 1 more. It has: bird, cat, dog"):
        classification_figures(CLASSES, ["cat", "wolf", "zebra"], np.eye(3), NAMES[:3])


def test_threshold_keeps_the_most_answers_of_which_the_wanted_share_is_right() -> None:
    # Sorted by probability: 40 right ones, then wrong and right in turn. 38 of 40 are 95 %.
    items = [
        EvaluatedItem(name=str(number), true="a", predicted="a" if number < 40 or number % 2 else "b",
                      probability=0.99 - number / 100)
        for number in range(60)
    ]  # fmt: skip

    found = suggest_threshold(items)

    # 42 of 44 would be 95.5 %: after 40 right ones follow b, a, b, a.
    assert found is not None
    assert (found.kept, found.accuracy) == (44, 42 / 44)
    assert found.probability == pytest.approx(0.99 - 0.43, abs=1e-4)
    assert sum((each.probability or 0) >= found.probability for each in items) == found.kept


def test_threshold_of_a_model_that_is_always_right_is_its_least_sure_answer() -> None:
    items = [EvaluatedItem(name=str(n), true="a", predicted="a", probability=0.6 + n / 100) for n in range(30)]

    found = suggest_threshold(items)

    assert found is not None
    assert (found.kept, found.accuracy, found.probability) == (30, 1.0, pytest.approx(0.6, abs=1e-4))


def test_threshold_of_a_model_that_is_always_certain_is_less_than_one() -> None:
    found = suggest_threshold([EvaluatedItem(name=str(n), true="a", predicted="a", probability=1.0) for n in range(30)])

    assert found is not None
    assert (found.kept, found.probability) == (30, 0.9999)


def test_there_is_no_threshold_where_it_would_say_too_little() -> None:
    few = [EvaluatedItem(name=str(n), true="a", predicted="a", probability=0.9) for n in range(19)]
    bad = [EvaluatedItem(name=str(n), true="a", predicted="ab"[n % 2], probability=0.9) for n in range(100)]

    assert suggest_threshold(few) is None
    assert suggest_threshold(bad) is None


def test_figures_of_a_regression_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import mean_absolute_error, root_mean_squared_error

    random = np.random.default_rng(1)
    true = random.normal(5, 2, 40).tolist()
    said = (np.array(true) + random.normal(0, 1, 40)).tolist()

    found = regression_figures(true, said, [str(n) for n in range(40)], basis="Forty.")

    assert found.mae == pytest.approx(mean_absolute_error(true, said))
    assert found.rmse == pytest.approx(root_mean_squared_error(true, said))
    assert found.pearson == pytest.approx(np.corrcoef(true, said)[0, 1])
    assert found.mae_of_mean == pytest.approx(mean_absolute_error(true, [np.mean(true)] * 40))
    assert len(found.mistakes) == 40 <= MAX_MISTAKES
    distances = [abs(float(each.predicted) - float(each.true)) for each in found.mistakes]
    assert distances == sorted(distances, reverse=True)
    assert next(found.rows()) == ["name", "true", "predicted", "error"]
    assert list(found.rows())[1][1:3] == [f"{true[0]:.9g}", f"{said[0]:.9g}"]
    with pytest.raises(UnusableExamples, match="Only a classification"):
        found.confusion_png()


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2], [1, 2], None),
        ([1, 2, 3], [0.1, 0.1, 0.1], None),
        ([5, 5, 5], [1, 2, 3], None),
        ([1e6 + 0.1] * 7, [1, 2, 3, 4, 5, 6, 7], None),
        ([1, 2, 3], [2, 4, 6], 1.0),
        ([1, 2, 3], [-1, -2, -3], -1.0),
        ([1e300, 2e300, 3e300], [1e-300, 2e-300, 3e-300], 1.0),
    ],
)
def test_pearson_is_undefined_where_a_side_is_constant(
    one: list[float], other: list[float], expected: float | None
) -> None:
    found = pearson(one, other)

    assert found == (expected if expected is None else pytest.approx(expected))


def test_confusion_image_shows_each_share_at_its_place(figures: Figures) -> None:
    image = Image.open(io.BytesIO(figures.confusion_png())).convert("RGB")

    # The lower right corner is the end of the matrix, which is 16 pixels from that of the image.
    cell = 56
    corners = {
        (row, column): image.getpixel(
            (image.width - 16 - cell * (3 - column) + 6, image.height - 16 - cell * (3 - row) + 6)
        )
        for row in range(3)
        for column in range(3)
    }
    assert image.getpixel((2, 2)) == (255, 255, 255)
    assert corners[0, 0] == corners[2, 2] == (9, 80, 170)
    assert corners[0, 1] == corners[2, 0] == (255, 255, 255)
    assert corners[1, 0] == corners[1, 2] != corners[1, 1]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("cat", "cat"),
        ("Hühner", "Huhner"),
        ("\u732b", "#7"),
        ("straße", "#7"),
        ("a name of more than twenty-four letters", "a name of more than t..."),
    ],
)
def test_names_are_written_as_far_as_the_font_can(name: str, written: str) -> None:
    assert _short(name, 7) == written


@pytest.mark.parametrize("count", [2, 60, 300])
def test_confusion_image_has_a_size_that_one_can_look_at(count: int) -> None:
    classes = [f"class with a rather long name {number}" for number in range(count - 1)] + ["\u732b"]
    found = classification_figures(classes, classes, np.eye(count), classes)

    image = Image.open(io.BytesIO(found.confusion_png()))

    assert 100 < image.width < 2500 and 100 < image.height < 2500
    assert math.isclose(found.accuracy or 0, 1)


# Two models on the same items


def test_two_classifiers_are_compared_item_by_item(figures: Figures) -> None:
    order = [6, 5, 4, 3, 2, 1, 0]
    better = np.array(
        [[0.2, 0.7, 0.1] if name == "cat" else row for name, row in zip(TRUE, PROBABILITIES, strict=True)]
    )
    other = classification_figures(CLASSES, [TRUE[n] for n in order], better[order], [NAMES[n] for n in order])

    found = compare_figures(figures, other)

    assert (found.count, found.first_better, found.second_better, found.equal) == (7, 0, 2, 5)
    assert found.p_value == 0.5  # two heads or two tails of two
    assert found.as_json() == {"count": 7, "first_better": 0, "second_better": 2, "equal": 5, "p_value": 0.5}
    assert list(found.rows())[3] == ["2.jpg", "cat", "dog", "0.9", "cat", "0.7"]
    assert compare_figures(figures, figures).p_value is None


def test_two_regressions_are_compared_by_distance() -> None:
    first = regression_figures([1, 2, 3, 4], [1, 2, 3, 9], list("abcd"))
    second = regression_figures([1, 2, 3, 4], [2, 3, 4, 4], list("abcd"))

    found = compare_figures(first, second)

    # 5 of the 16 equally likely results have at most one head, as many at most one tail.
    assert (found.first_better, found.second_better, found.p_value) == (3, 1, 10 / 16)
    assert list(found.rows())[4] == ["d", "4", "9", "", "4", ""]


def test_models_are_not_compared_on_different_items(figures: Figures) -> None:
    fewer = classification_figures(CLASSES, TRUE[:6], PROBABILITIES[:6], NAMES[:6])
    renamed = classification_figures(CLASSES, TRUE, PROBABILITIES, [*NAMES[:6], "other.jpg"])
    twice = classification_figures(CLASSES, TRUE, PROBABILITIES, [*NAMES[:6], NAMES[0]])

    for other in (fewer, renamed, twice, regression_figures([1.0] * 7, [1.0] * 7, NAMES)):
        with pytest.raises(UnusableExamples, match="only on the same items"):
            compare_figures(figures, other)

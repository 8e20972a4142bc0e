"""Training on tables: the columns, the figures, and that the installed model answers as scikit-learn's own pipeline."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from provider_image.backends import Device
from provider_image.check import check_model
from provider_image.errors import ConfigError
from provider_image.features import load_table_features
from provider_image.models.artefact import Artefact, find_artefact
from provider_image.service import check_params
from provider_image.services import load_service
from trainer.errors import UnusableExamples
from trainer.examples import ExampleLimits
from trainer.figures import Figures
from trainer.tables import LearningTable, read_table, train_table


def write(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([header, *rows])
    return path


def answer(artefact: Artefact, rows: Iterable[dict[str, Any]]) -> list[Any]:
    """Answer rows as a worker does, from the files of the artefact."""
    service = load_service(artefact.service)
    net = service.load(artefact, Device(threads=1))
    params = check_params(service.params, {})
    found = []
    for row in rows:
        item = service.prepare(artefact, {"row": json.dumps(row).encode()}, params)
        (output,) = service.run(net, [item], [params])
        service.check_output(artefact, params, output)
        found.append(output.data)
    return found


@pytest.fixture(scope="module")
def diabetes() -> tuple[list[str], list[list[float]], list[float]]:
    """442 patients of Efron et al. (2004), from scikit-learn's wheel: ten columns and a number for each."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes(scaled=False)
    return list(data.feature_names), data.data.tolist(), data.target.tolist()


@pytest.fixture(scope="module")
def trained_diabetes(diabetes: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artefact, Figures, list[Any]]:
    """A regression on a table with a column of categories, missing numbers, and a column that names rows."""
    names, rows, target = diabetes
    random = np.random.default_rng(5)
    cities = random.choice(["Bonn", "Köln", "Ulm", "Jena"], len(rows), p=[0.5, 0.3, 0.196, 0.004]).tolist()
    cells: list[list[Any]] = []
    for number, (row, city, value) in enumerate(zip(rows, cities, target, strict=True)):
        given: list[Any] = list(row)
        if number % 9 == 0:
            given[2] = "NA"
        cells.append([f"patient-{number}", *given, "" if number % 50 == 7 else city, value])
    folder = tmp_path_factory.mktemp("diabetes")
    table = write(folder / "table.csv", ["id", *names, "city", "progression"], cells, delimiter=";")
    steps: list[str] = []
    artefact, figures = train_table(
        table, "progression", name="diabetes", models=folder / "models", on_step=steps.append
    )
    assert steps == ["reading the table", "evaluating", "fitting", "storing"]
    return artefact, figures, cells


def test_answers_are_those_of_the_pipeline_of_scikit_learn(trained_diabetes: Any) -> None:
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    artefact, figures, cells = trained_diabetes
    columns = artefact.columns
    rows = [dict(zip(columns, row[1:-1], strict=True)) for row in cells]
    strength = float(figures.basis.partition("strength ")[2].split()[0])
    table = np.array([[np.nan if value == "NA" else value for value in row.values()] for row in rows], dtype=object)
    numbers, city = list(range(10)), [10]
    pipeline = make_pipeline(
        ColumnTransformer(
            [
                (
                    "numbers",
                    make_pipeline(
                        StandardScaler(), SimpleImputer(strategy="constant", fill_value=0.0, add_indicator=True)
                    ),
                    numbers,
                ),
                ("city", OneHotEncoder(min_frequency=3, handle_unknown="infrequent_if_exist"), city),
            ],
            sparse_threshold=0,
        ),
        Ridge(alpha=strength, tol=1e-8),
    ).fit(table, [row[-1] for row in cells])

    unseen = {**rows[1], "city": "Rom", "bmi": "NA"}
    expected = pipeline.predict(np.vstack([table, np.array([[*table[1][:2], np.nan, *table[1][3:10], "Rom"]], object)]))
    found = [each["value"] for each in answer(artefact, [*rows, unseen])]

    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert load_table_features(artefact).count == 10 + 1 + 5


def test_figures_of_a_regression_are_honest_and_beat_the_mean(trained_diabetes: Any) -> None:
    _, figures, cells = trained_diabetes

    # Ridge regression explains about half of the variance of this data: scikit-learn's user guide finds R2 near 0.5.
    assert figures.kind == "regression"
    assert 80 <= figures.count <= 96  # a fifth is held out
    assert figures.pearson == pytest.approx(0.7, abs=0.12)
    assert figures.mae < 0.8 * figures.mae_of_mean
    assert f"of {len(cells)} examples were held out" in figures.basis
    assert "bmi (number, 50 missing)" in figures.basis
    assert "city (category, " in figures.basis
    assert "Not used: id (442 different texts, so it names rows)." in figures.basis


def test_trained_model_is_installed_like_any_other_and_passes_its_check(trained_diabetes: Any) -> None:
    artefact, _, cells = trained_diabetes

    report = check_model(artefact.folder, Device(threads=1), seconds=0.01)

    assert find_artefact(artefact.folder.parent, "diabetes") == artefact
    assert (report.is_ok, report.problem, report.items) == (True, None, "rows")
    assert len(report.pictures) == 4
    assert artefact.reference.startswith("scikit-learn ")
    assert (artefact.source, artefact.backend, artefact.labels) == ("own", "linear", ())
    # No row of the training data leaves this machine with the artefact.
    samples = [json.loads((artefact.folder / sample.file).read_bytes()) for sample in artefact.samples]
    values = [tuple(row.values()) for row in samples]
    assert not any(tuple(row[1:-1]) in values for row in cells)


@pytest.fixture(scope="module")
def trained_wine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artefact, Figures, Any]:
    """178 wines of three growers (Aeberhard and Forina, 1991), from scikit-learn's wheel."""
    from sklearn.datasets import load_wine

    data = load_wine()
    folder = tmp_path_factory.mktemp("wine")
    rows = [[*row, data.target_names[one]] for row, one in zip(data.data.tolist(), data.target.tolist(), strict=True)]
    table = write(folder / "wine.csv", [*data.feature_names, "grower"], rows)
    artefact, figures = train_table(table, "grower", name="wine", title="Wine", models=folder / "models")
    return artefact, figures, data


def test_classes_are_learned_with_figures(trained_wine: Any) -> None:
    artefact, figures, data = trained_wine

    # Linear models separate these growers nearly perfectly.
    assert figures.accuracy > 0.9
    assert figures.accuracy_low < figures.accuracy <= figures.accuracy_high
    assert figures.classes == tuple(data.target_names)
    assert sum(map(sum, figures.confusion)) == figures.count == 36
    assert all(each.precision > 0.8 and each.recall > 0.8 for each in figures.per_class)
    assert artefact.title == "Wine"


def test_probabilities_are_those_of_scikit_learn(trained_wine: Any) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    artefact, figures, data = trained_wine
    strength = float(figures.basis.partition("C = ")[2].split()[0])
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=strength, tol=1e-8, max_iter=5000))
    pipeline.fit(data.data, data.target_names[data.target])
    expected = pipeline.predict_proba(data.data)

    found = answer(artefact, [dict(zip(data.feature_names, row, strict=True)) for row in data.data.tolist()])

    for rows, right in zip(found, expected.tolist(), strict=True):
        given = dict(map(tuple, rows))
        assert [given[name] for name in pipeline.classes_] == pytest.approx(right, abs=2e-6)


def test_training_again_gives_the_same_artefact(trained_wine: Any, tmp_path: Path) -> None:
    artefact, figures, data = trained_wine
    rows = [[*row, data.target_names[one]] for row, one in zip(data.data.tolist(), data.target.tolist(), strict=True)]
    table = write(tmp_path / "wine.csv", [*data.feature_names, "grower"], rows)

    again, figures_again = train_table(table, "grower", name="wine", title="Wine", models=tmp_path / "models")

    assert again.digest == artefact.digest
    assert figures_again == figures


def test_two_classes_of_numbers_are_classes_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    rows = [[number, number % 7, int(number > 30)] for number in range(60)]
    table = write(tmp_path / "table.csv", ["a", "b", "is_large"], rows)

    classes, _ = train_table(table, "is_large", name="by_class", models=tmp_path / "models")
    numbers, figures = train_table(table, "is_large", name="by_number", models=tmp_path / "models", is_regression=True)

    assert [name for _, name in classes.labels] == ["0", "1"]
    assert answer(classes, [{"a": 59, "b": 3}])[0][0][0] == "1"
    assert (numbers.labels, figures.kind) == ((), "regression")
    assert answer(numbers, [{"a": 59, "b": 3}])[0]["value"] > 0.7


def test_equal_rows_are_on_one_side_of_the_split(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    # Every row is there five times, and its class is random: what is learned by heart must not look like knowledge.
    rows = [[*random.normal(size=12).round(3), str(random.integers(2))] for _ in range(50)] * 4
    rows += [[*(f" {each:.5f}" for each in numbers), label] for *numbers, label in rows[:50]]
    table = write(tmp_path / "table.csv", [*"abcdefghijkl", "class"], rows)

    _, figures = train_table(table, "class", name="noise", models=tmp_path / "models")

    assert figures.accuracy < 0.75
    assert "Equal examples (200 found) were kept together" in figures.basis


@pytest.mark.parametrize(
    ("text", "target", "words"),
    [
        ("a,b\n", "b", "no row with a value in the column 'b'"),
        ("a,b\n1,2\n", "c", "no column 'c'. It has: a, b"),
        ("a,a\n1,2\n", "a", "each with its own name"),
        ("a,,b\n1,2,3\n", "b", "each with its own name"),
        ("a,b\n1\n", "b", "Line 2 of table.csv has 1 values"),
        ('a,b\n"1,2\n', "b", "cannot be read"),
        ("", "b", "is empty"),
        ("a,b\n" + "1,x\n2,y\n" * 2, "b", "Each class needs at least 5 examples. Too few: 'x' has 2, 'y' has 2"),
        ("a,b\n" + "1,x\n" * 9, "b", "No column"),
        ("a,b\n" + "1,x\n2,x\n" * 9, "b", "has 1 different values"),
        ("a,b\n" + "1,x\n2,y\n" * 30 + "oops,x\n", "b", "'oops' in row 62"),
        ("a,b\n" + "\n".join(f"{n},{n}.5" for n in range(5)), "b", "There are 5 examples; at least 10"),
        ("a\tb\n" + "1\tx\n2\ty\x07\n" * 9, "b", "not the name of a class"),
        ("a,b\n" + "1e999,1\n" * 9, "b", "No column"),
    ],
)
def test_table_that_cannot_be_used_is_refused_with_a_reason(tmp_path: Path, text: str, target: str, words: str) -> None:
    table = tmp_path / "table.csv"
    table.write_text(text)

    with pytest.raises(UnusableExamples) as caught:
        train_table(table, target, name="x", models=tmp_path / "models")

    assert words in caught.value.reason
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("limits", [ExampleLimits(max_rows=29), ExampleLimits(max_values=59)], ids=["rows", "values"])
def test_table_that_is_too_large_is_refused(tmp_path: Path, limits: ExampleLimits) -> None:
    table = write(tmp_path / "table.csv", ["a", "b"], [[number, number / 3] for number in range(30)])

    with pytest.raises(UnusableExamples, match="too large"):
        read_table(table, "b", limits)
    assert len(read_table(table, "b", ExampleLimits(max_rows=30, max_values=60)).rows) == 30


def test_table_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes("größe,b\n1,2\n".encode("latin-1"))

    with pytest.raises(UnusableExamples, match="not UTF-8"):
        train_table(tmp_path / "table.csv", "b", name="x", models=tmp_path / "models")


def test_name_of_a_model_of_the_catalogue_is_refused(tmp_path: Path) -> None:
    table = write(tmp_path / "table.csv", ["a", "b"], [[number, number / 3] for number in range(30)])

    with pytest.raises(ConfigError, match="taken by the model resnet50"):
        train_table(table, "b", name="resnet_50", models=tmp_path / "models")


def columns(found: LearningTable) -> dict[str, str]:
    return {one.name: one.kind for one in (*found.columns, *found.unused)}


def test_kinds_of_columns_are_found_and_told(tmp_path: Path) -> None:
    header = ["number", "text", "names", "empty", "constant", "gaps", "target"]
    rows = [
        [number / 2, "ab"[number % 2], f"n{number}", "", "7", "" if number % 3 else number, number]
        for number in range(120)
    ]

    found = read_table(write(tmp_path / "table.csv", header, [*rows, [1, "a", "b", "", 7, 1, "NA"]]), "target")

    assert columns(found) == {
        "number": "number",
        "text": "category",
        "names": "unused",
        "empty": "unused",
        "constant": "unused",
        "gaps": "number",
    }
    assert found.without_target == 1
    assert len(found.rows) == 120
    assert {one.name: one.detail for one in found.columns}["gaps"] == "80 missing"

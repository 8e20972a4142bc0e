"""Training on texts: that the installed model answers as scikit-learn's own pipeline, and why."""

from __future__ import annotations

import csv
import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from provider_image.backends import Device
from provider_image.check import check_model
from provider_image.errors import ConfigError, NotInstalled
from provider_image.features import load_text_features
from provider_image.features.text import find_terms, load_segmenter
from provider_image.models.artefact import Artefact
from provider_image.service import check_params
from provider_image.services import load_service
from trainer.errors import UnusableExamples
from trainer.examples import ExampleLimits
from trainer.figures import Figures
from trainer.texts import _TextLearner, train_text

THINGS = ("film", "hotel", "book", "meal", "concert", "garden", "museum", "walk")
GOOD = ("wonderful", "a delight", "so good", "a great pleasure", "beautiful and warm")
BAD = ("awful", "a waste of time", "not good", "a great disappointment", "boring and cold")
CHINESE_GOOD, CHINESE_BAD = ("很喜欢", "非常好看", "值得推荐"), ("很失望", "不好看", "浪费时间")
CHINESE_THINGS = (
    "这部电影",
    "这家餐厅",
    "那本小说",
    "这个公园",
    "昨天的音乐会",
    "新开的书店",
    "北京的博物馆",
    "海边的酒店",
)


def sentences() -> list[tuple[str, str]]:
    found = []
    for label, words in (("good", GOOD), ("bad", BAD)):
        for number, (thing, word) in enumerate(itertools.product(THINGS, words)):
            found.append((f"The {thing} in town {number % 3} was {word}, I think.", label))
    random.Random(1).shuffle(found)
    return found


def write(path: Path, rows: list[tuple[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("said", "opinion"), *rows])
    return path


def answer(artefact: Artefact, text: str) -> Any:
    service = load_service(artefact.service)
    net = service.load(artefact, Device(threads=1))
    params = check_params(service.params, {})
    (output,) = service.run(net, [service.prepare(artefact, {"text": text.encode()}, params)], [params])
    service.check_output(artefact, params, output)
    return output.data


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artefact, Figures]:
    folder = tmp_path_factory.mktemp("texts")
    rows = [*sentences(), ("", "good"), ("no opinion", "")]
    return train_text(write(folder / "t.csv", rows), "said", "opinion", name="opinion", models=folder / "models")


def test_probabilities_are_those_of_the_pipeline_of_scikit_learn(trained: Any) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    artefact, figures = trained
    strength = float(figures.basis.partition("C = ")[2].split()[0])
    texts, labels = zip(*sentences(), strict=True)
    pipeline = make_pipeline(
        TfidfVectorizer(analyzer=lambda text: list(find_terms(text, None)), min_df=2, sublinear_tf=True),
        LogisticRegression(C=strength, tol=1e-8, max_iter=5000),
    ).fit(texts, labels)
    unseen = ["A wonderful, wonderful book. Not boring.", "nothing known here", "The meal was NOT good"]
    expected = pipeline.predict_proba([*texts, *unseen])

    assert list(pipeline[0].get_feature_names_out()) == list(load_text_features(artefact).terms)
    for text, right in zip([*texts, *unseen], expected.tolist(), strict=True):
        given = dict(map(tuple, answer(artefact, text)["labels"]))
        assert [given[name] for name in pipeline.classes_] == pytest.approx(right, abs=2e-6)


def test_answer_names_the_words_that_decided_it(trained: Any) -> None:
    artefact, figures = trained

    found = answer(artefact, "The hotel was awful, a waste of time")

    assert found["labels"][0][0] == "bad"
    assert {"awful", "waste", "time"} & {word for word, _ in found["words"][:3]}
    assert found["words"][0][1] > 0
    assert figures.accuracy > 0.9
    # Words tell the classes apart without exception, so strong regularisation is wrong.
    assert float(figures.basis.partition("C = ")[2].split()[0]) >= 10
    assert "Rows left out: 1. There is no value to learn." in figures.basis
    assert "Rows left out: 1. The text is empty." in figures.basis


def test_trained_model_passes_its_check_with_texts_that_nobody_sent(trained: Any) -> None:
    artefact, _ = trained

    report = check_model(artefact.folder, Device(threads=1), seconds=0.01)

    assert (report.is_ok, report.problem, report.items) == (True, None, "texts")
    samples = {(artefact.folder / sample.file).read_text() for sample in artefact.samples}
    assert len(samples) == 4
    assert not samples & {text for text, _ in sentences()}


def test_numbers_are_learned_from_texts(tmp_path: Path) -> None:
    rows = [(text, 4.5 if label == "good" else 1.5) for text, label in sentences()]
    table = write(tmp_path / "t.csv", rows)

    artefact, figures = train_text(table, "said", "opinion", name="stars", models=tmp_path / "models")
    classes, _ = train_text(table, "said", "opinion", name="classes", models=tmp_path / "models", is_regression=False)

    assert figures.pearson > 0.8
    assert answer(artefact, "so good, wonderful")["value"] > 3.5 > 2.5 > answer(artefact, "an awful waste")["value"]
    assert answer(artefact, "so good")["words"][0][1] > 0
    assert [name for _, name in classes.labels] == ["1.5", "4.5"]


@pytest.mark.parametrize("segmenter", ["characters", "jieba"])
def test_texts_without_blanks_are_learned(tmp_path: Path, segmenter: str) -> None:
    if segmenter == "jieba":
        pytest.importorskip("rjieba")
    rows = [
        (f"{thing}{word}。", label)
        for label, words in (("good", CHINESE_GOOD), ("bad", CHINESE_BAD))
        for thing, word in itertools.product(CHINESE_THINGS, words)
    ]
    table = write(tmp_path / "t.csv", rows)

    artefact, figures = train_text(table, "said", "opinion", name="zh", models=tmp_path / "models", segmenter=segmenter)
    found = answer(artefact, "朋友说这部电影非常好看，我也很喜欢")

    assert figures.accuracy > 0.8
    assert found["labels"][0][0] == "good"
    assert {"喜欢", "好看", "非常"} & {word for word, _ in found["words"]}


def test_segmenter_that_is_missing_is_named_where_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rjieba")
    table = write(tmp_path / "t.csv", sentences())
    artefact, _ = train_text(table, "said", "opinion", name="opinion", models=tmp_path / "models", segmenter="jieba")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    load_text_features(artefact)._is_ready = False

    with pytest.raises(NotInstalled, match=r'rjieba, which is not installed here.*pip install "mlg\[text\]"'):
        load_service("text").load(artefact, Device(threads=1))
    with pytest.raises(NotInstalled):
        load_segmenter("jieba")


@pytest.mark.parametrize(
    ("rows", "text", "words"),
    [
        ([("a", "b")] * 20, "heard", "no column 'heard'"),
        ([("a", "b")] * 20, "opinion", "two columns"),
        ([("...", "x"), ("!!!", "y")] * 20, "said", "no words in common"),
        ([("", "x")] * 20, "said", "no row with a text"),
    ],
)
def test_texts_that_cannot_be_used_are_refused_with_a_reason(
    tmp_path: Path, rows: list[tuple[str, Any]], text: str, words: str
) -> None:
    with pytest.raises(UnusableExamples, match=words):
        train_text(write(tmp_path / "t.csv", rows), text, "opinion", name="x", models=tmp_path / "models")


@pytest.mark.parametrize(
    "limits", [ExampleLimits(max_rows=79), ExampleLimits(max_text_terms=500)], ids=["rows", "terms"]
)
def test_texts_that_are_too_many_or_too_long_are_refused(tmp_path: Path, limits: ExampleLimits) -> None:
    table = write(tmp_path / "t.csv", sentences())

    with pytest.raises(UnusableExamples, match=r"more than 79 rows|too long: at most 500"):
        train_text(table, "said", "opinion", name="x", models=tmp_path / "models", limits=limits)


def test_a_model_of_too_many_classes_and_terms_is_refused_before_it_is_fitted(tmp_path: Path) -> None:
    # 201 classes of 5 texts; two texts have the same 200 words.
    texts = [", ".join(f"w{block * 200 + word}" for word in range(200)) for block in range(503)]
    rows = [(texts[place // 2], f"c{place // 5}") for place in range(1005)]
    steps: list[str] = []

    with pytest.raises(UnusableExamples, match="20,100,000 weights"):
        train_text(write(tmp_path / "t.csv", rows), "said", "opinion", name="x", models=tmp_path, on_step=steps.append)
    assert "fitting" not in steps


def test_terms_of_an_evaluation_are_chosen_like_those_of_the_model() -> None:
    learner = _TextLearner([Counter(["common", f"rare{number}"]) for number in range(41)], "characters")

    assert learner.learn(range(30)).terms == learner.learn(range(41)).terms == ("common",)


def test_unknown_segmenter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="characters, jieba"):
        train_text(tmp_path / "t.csv", "a", "b", name="x", models=tmp_path, segmenter="scissors")


def test_features_of_one_text_are_those_of_the_matrix(trained: Any) -> None:
    features = load_text_features(trained[0])
    places, values = features.vector("The book was wonderful, so wonderful")

    assert float(np.linalg.norm(values)) == pytest.approx(1.0)
    assert places.tolist() == sorted(places.tolist())

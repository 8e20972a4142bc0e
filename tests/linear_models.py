"""Models for the services `table` and `text` that are written by hand, so that their answers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from provider_image.features.table import CategoryColumn, NumberColumn, TableFeatures
from provider_image.features.text import TextFeatures
from provider_image.models.artefact import Artefact
from provider_image.models.catalogue import ModelFacts
from provider_image.rows import format_row
from tests.extensions import COLUMNS, ROWS
from trainer.figures import classification_figures
from trainer.linear import LinearModel, Trained, install_linear

#: Service and model, two for each service: one with labels, one with a number.
LINEAR_PAIRS = (
    ("table", "iris_table"),
    ("table", "rent"),
    ("text", "mood"),
    ("text", "stars"),
)
#: Means of each species in Fisher's iris data (1936), as in tests/extensions.py.
_MEANS = np.array([[5.006, 3.428, 1.462, 0.246], [5.936, 2.77, 4.26, 1.326], [6.588, 2.974, 5.552, 2.026]])
#: A row of the model `rent`: 400 + 10 * (50 - 40) + 150 = 650.
RENT_ROW = {"area": 50.0, "city": "Bonn"}
#: What a term adds to the score of `good`, or to the stars.
WORDS = {"awful": -2.0, "good": 1.0, "not good": -1.5, "plot": 0.25, "wonderful": 2.0, "很": 0.0, "喜欢": 2.0}


def install_linear_models(models: Path) -> Path:
    """Install the models of LINEAR_PAIRS; return the folder."""
    numbers = [NumberColumn(name=name, mean=0.0, deviation=1.0, marks_missing=False) for name in COLUMNS]
    _install(
        models,
        "iris_table",
        TableFeatures(numbers),
        2 * _MEANS.T,
        -(_MEANS**2).sum(axis=1),
        tuple(ROWS),
        {"sample.json": format_row(dict(zip(COLUMNS, ROWS["setosa"], strict=True)))},
    )
    _install(
        models,
        "rent",
        TableFeatures(
            [
                NumberColumn(name="area", mean=40.0, deviation=2.0, marks_missing=True),
                CategoryColumn(name="city", categories=("", "Bonn", "Köln"), has_other=True),
            ]
        ),
        # area, its mark, no city, Bonn, Köln, another city
        np.array([[20.0], [-50.0], [0.0], [150.0], [200.0], [25.0]]),
        np.array([400.0]),
        (),
        {"sample.json": format_row(dict(RENT_ROW))},
    )
    features = TextFeatures(tuple(WORDS), [1.0] * len(WORDS), "characters")
    weights = np.array([list(WORDS.values())]).T
    sample = {"sample.txt": b"A wonderful film with a good plot."}
    _install(models, "mood", features, np.hstack([-weights, weights]) / 2, np.zeros(2), ("bad", "good"), sample)
    _install(models, "stars", features, weights, np.array([3.0]), (), sample)
    return models


def _install(
    models: Path, name: str, features: Any, weights: Any, bias: Any, classes: tuple[str, ...], samples: dict[str, bytes]
) -> Artefact:
    columns = features.names if isinstance(features, TableFeatures) else ()
    facts = ModelFacts(
        name=name,
        title=name,
        service="table" if columns else "text",
        height=0,
        width=0,
        preprocessing="none",
        columns=columns,
        source="own",
    )
    model = LinearModel(classes=classes, weights=weights, bias=bias, method="by hand")
    figures = classification_figures(classes, [], np.zeros((0, len(classes))), [])
    trained = Trained(features=features, model=model, figures=figures)
    return install_linear(models, facts, trained, samples, training_digest="0" * 64, on_step=lambda step: None)

"""Training on texts: a class or a number for a sentence, by TF-IDF and a linear model.

The terms are learned here; their features are those of `provider_image/features/text.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from provider_image.errors import BadInput, ConfigError
from provider_image.features.normal_form import normalise
from provider_image.features.table import is_missing
from provider_image.features.text import MAX_TERMS, SEGMENTERS, TextFeatures, find_terms, load_segmenter, parse_text
from provider_image.models.artefact import Artefact
from provider_image.models.catalogue import ModelFacts
from provider_image.services.text import MAX_TEXT_BYTES
from trainer.errors import UnusableExamples
from trainer.examples import ExampleLimits, read_csv
from trainer.figures import Figures
from trainer.linear import Trained, digest_training, fit_and_evaluate, install_linear, read_targets
from trainer.tables import find_column

#: Fewest texts that have a term that is learned; 1 for at most so many texts.
_MIN_TEXTS, _FEW_TEXTS = 2, 40
#: Texts of the self-test, and terms in each.
_SAMPLES, _SAMPLE_TERMS = 4, 12


def train_text(
    table: Path,
    text: str,
    target: str,
    *,
    name: str,
    models: Path,
    title: str | None = None,
    is_regression: bool | None = None,
    segmenter: str = "characters",
    seed: int = 0,
    limits: ExampleLimits | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> tuple[Artefact, Figures]:
    """Train a model on a CSV file with texts and install it under a name; see `tables.train_table`.

    :param text: the column with the text.
    :param segmenter: what finds words where there are no blanks between them: characters, or jieba, which then must be
        installed on every machine that runs the model.
    :raises UnusableExamples, ConfigError, TrainerMissing, NotInstalled: as there; NotInstalled also without segmenter.
    """
    limits = limits or ExampleLimits()
    if segmenter not in SEGMENTERS:
        raise ConfigError(f"There is no segmenter {segmenter[:40]!r}. There are: {', '.join(SEGMENTERS)}.")
    on_step("reading the table")
    cut = load_segmenter(segmenter)
    terms: list[Counter[str]] = []
    values: list[str] = []
    names: list[str] = []
    skipped = Counter[str]()
    # Each term is one object, however many texts have it.
    shared: dict[str, str] = {}
    size = 0
    for number, (words, value) in enumerate(_read_texts(table, text, target, limits), 2):
        if isinstance(words, str):
            terms.append(Counter(shared.setdefault(term, term) for term in find_terms(words, cut)))
            size += len(terms[-1])
            if size > limits.max_text_terms:
                raise UnusableExamples(
                    f"The texts of {table.name} are too long: at most {limits.max_text_terms:,} different terms of a "
                    "text are allowed, of all texts together. Use fewer or shorter ones."
                )
            values.append(value)
            names.append(f"row {number}")
        else:
            skipped[words.reason] += 1
    if not values:
        raise UnusableExamples(f"{table.name} has no row with a text and a value in the column {target!r}.")
    targets = read_targets(values, is_regression=is_regression, limits=limits, column=target)
    equal: dict[frozenset[tuple[str, int]], int] = {}
    groups = [equal.setdefault(frozenset(counts.items()), len(equal)) for counts in terms]
    trained = fit_and_evaluate(_TextLearner(terms, segmenter), targets, groups, names, seed=seed, on_step=on_step)
    facts = ModelFacts(
        name=name, title=title or name, service="text", height=0, width=0, preprocessing="none", source="own"
    )
    samples = {f"selftest-{number}.txt": data for number, data in enumerate(_make_samples(trained))}
    digest = digest_training(table, text, target, is_regression, segmenter, seed)
    artefact = install_linear(models, facts, trained, samples, training_digest=digest, on_step=on_step)
    notes = [f"Rows left out: {count}. {reason}" for reason, count in skipped.most_common(3)]
    basis = " ".join((trained.figures.basis, f"Terms: {trained.features.count}.", *notes))
    return artefact, replace(trained.figures, basis=basis)


def _read_texts(table: Path, text: str, target: str, limits: ExampleLimits) -> Any:
    """Yield the text of each row, or why it cannot be used, and the value to learn. :raises UnusableExamples:"""
    lines = read_csv(table, limits)
    header = next(lines)
    text_at, target_at = find_column(header, text), find_column(header, target)
    if text_at == target_at:
        raise UnusableExamples("The text and what is to be learned from it must be two columns.")
    for count, row in enumerate(lines):
        if count == limits.max_rows:
            raise UnusableExamples(f"{table.name} has more than {limits.max_rows:,} rows.")
        data, value = row[text_at].encode(), normalise(row[target_at]).strip()
        try:
            if is_missing(value):
                raise UnusableExamples("There is no value to learn.")
            if len(data) > MAX_TEXT_BYTES:
                raise UnusableExamples(f"The text has more than {MAX_TEXT_BYTES} bytes.")
            yield parse_text(data), value
        except BadInput as error:
            yield error, value


class _TextLearner:
    """See `linear.Learner`."""

    def __init__(self, terms: Sequence[Counter[str]], segmenter: str) -> None:
        self._terms, self._segmenter = terms, segmenter
        self.count = len(terms)

    def learn(self, positions: Sequence[int]) -> TextFeatures:
        """Learn the terms that several texts have, the most frequent ones, and their weights."""
        texts = Counter(term for position in positions for term in self._terms[position])
        least = 1 if self.count <= _FEW_TEXTS else _MIN_TEXTS  # as for the model that is served
        frequent = sorted((-count, term) for term, count in texts.items() if count >= least)[:MAX_TERMS]
        if not frequent:
            raise UnusableExamples("The texts have no words in common, so nothing can be learned from them.")
        terms = sorted(term for _, term in frequent)
        weights = [math.log((1 + len(positions)) / (1 + texts[term])) + 1 for term in terms]
        return TextFeatures(terms, weights, self._segmenter)

    def matrix(self, features: TextFeatures, positions: Sequence[int]) -> Any:
        """Compute the features of some texts, as a sparse array of scipy."""
        import numpy as np
        from scipy.sparse import csr_array

        found = [features.vector_of(self._terms[position]) for position in positions]
        ends = np.cumsum([0, *(len(places) for places, _ in found)])
        places = np.concatenate([places for places, _ in found])
        values = np.concatenate([values for _, values in found])
        return csr_array((values, places, ends), shape=(len(found), features.count))


def _make_samples(trained: Trained) -> list[bytes]:
    """Make texts that nobody sent, of the terms that count most: artefacts go to other computers."""
    import numpy as np

    features, weights = trained.features, trained.model.weights
    assert isinstance(features, TextFeatures)
    order = np.argsort(-np.abs(weights).max(axis=1), kind="stable")
    samples = []
    for number in range(_SAMPLES):
        chosen = order[number::_SAMPLES][:_SAMPLE_TERMS]
        samples.append(". ".join(features.terms[place] for place in chosen.tolist()).encode() or b".")
    return samples

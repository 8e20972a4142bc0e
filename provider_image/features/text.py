"""Texts: an input that is a sentence or some paragraphs, its words, and its features (TF-IDF).

The server reads texts with it, which it stores in one form so that equal texts are equal bytes; used by the service
`text` and by `trainer/texts.py`, which learns the terms. Must not import anything large at the top.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from provider_image.errors import NotAText, NotInstalled
from provider_image.features.normal_form import normalise

if TYPE_CHECKING:
    import numpy as np

#: Most terms of a model.
MAX_TERMS = 100_000
#: Longest term in characters; words of it would be data, not words.
MAX_TERM_LENGTH = 100
#: What cuts texts of languages without blanks into words -> its module, which has `cut`. `characters` needs none: its
#: units are the characters. They differ in what a model learns, so the choice belongs to the artefact.
SEGMENTERS: Mapping[str, str | None] = {"characters": None, "jieba": "rjieba"}
#: Most units of one term: words, and characters where they stand for words.
_WORDS, _CHARACTERS = 2, 3
#: Scripts without blanks between words: Thai, Lao, Myanmar, Khmer, kana, and Chinese characters.
_UNSPACED = (
    "\u0e01-\u0e4e\u0e81-\u0ece\u1000-\u1049\u1780-\u17d3\u3005\u3041-\u3096\u309d-\u30fa\u30fc-\u30ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
#: Marks that belong to the letter before them, which \w does not have.
_MARKS = "\u0300-\u036f\u0591-\u05bd\u064b-\u0655\u0900-\u0963\u0966-\u0df3"
_LETTER = f"(?:(?![{_UNSPACED}])[\\w{_MARKS}])"
_RUN = re.compile(f"(?P<unspaced>[{_UNSPACED}]+)|{_LETTER}+(?:'{_LETTER}+)*")


def parse_text(data: bytes) -> str:
    """Parse a text.

    :return: in normal form C, without blanks around it.
    :raises NotAText: it is not UTF-8, or has nothing but blanks.
    """
    try:
        text = normalise(data.decode("utf-8-sig")).strip()
    except UnicodeDecodeError as error:
        raise NotAText("The text is not UTF-8.") from error
    if not text or "\0" in text:
        raise NotAText("The text is empty." if not text else "The text has a null character.")
    return text


def load_segmenter(name: str) -> Callable[[str], Sequence[str]] | None:
    """Return what cuts a text without blanks into words; None if its characters are the units.

    :raises NotInstalled: its package is not installed here.
    :raises ValueError: there is no such segmenter.
    """
    if name not in SEGMENTERS:
        raise ValueError(f"there is no segmenter {name[:40]!r}")
    module = SEGMENTERS[name]
    if module is None:
        return None
    if importlib.util.find_spec(module) is None:
        raise NotInstalled(
            f"Texts of this model are cut into words by {module}, which is not installed here. "
            'Install it: pip install "mlg[text]"'
        )
    cut: Callable[[str], Sequence[str]] = importlib.import_module(module).cut
    return cut


def find_terms(text: str, cut: Callable[[str], Sequence[str]] | None) -> Iterator[str]:
    """Iterate over the terms of a text: each word and each two in a row, in lower case.

    Where there are no blanks between words, these are the words that `cut` finds, or each character and each two and
    three in a row.
    """
    words: list[str] = []
    end = 0
    folded = normalise(text, "NFKC").lower().replace("\u2019", "'")
    for run in _RUN.finditer(folded):
        if words and (run["unspaced"] or not folded[end : run.start()].isspace()):
            yield from _chains(words, " ", _WORDS)
            words = []
        end = run.end()
        if not run["unspaced"]:
            words.append(run[0])
        elif cut is None:
            yield from _chains(run[0], "", _CHARACTERS)
        else:
            yield from _chains(cut(run[0]), " ", _WORDS)
    yield from _chains(words, " ", _WORDS)


def _chains(units: Sequence[str], between: str, longest: int) -> Iterator[str]:
    for length in range(1, longest + 1):
        for start in range(len(units) - length + 1):
            term = between.join(units[start : start + length])
            if len(term) <= MAX_TERM_LENGTH:
                yield term


class TextFeatures:
    """The features of a text: for each known term in it (1 + ln(count)) * weight, scaled to unit length.

    :param terms: the known terms; the number of a term is its place.
    :param weights: f64, shape (terms,); ln((1 + texts) / (1 + texts with the term)) + 1 of the training data.
    :param segmenter: a name in SEGMENTERS.
    :raises ValueError: the terms or weights are invalid.
    """

    def __init__(self, terms: Sequence[str], weights: Sequence[float], segmenter: str) -> None:
        self.terms, self.weights, self.segmenter = tuple(terms), tuple(weights), segmenter
        self.places = {term: place for place, term in enumerate(self.terms)}
        #: Number of features.
        self.count = len(self.terms)
        self._cut: Callable[[str], Sequence[str]] | None = None
        self._is_ready = False
        if segmenter not in SEGMENTERS:
            raise ValueError(f"there is no segmenter {str(segmenter)[:40]!r}")
        if not 0 < len(self.terms) == len(self.weights) == len(self.places) <= MAX_TERMS:
            raise ValueError(f"there must be 1 to {MAX_TERMS} terms, each once and with a weight")
        if not all(isinstance(term, str) and len(term) <= MAX_TERM_LENGTH for term in self.terms):
            raise ValueError("a term is not a short text")
        if not all(math.isfinite(weight) and 0 < weight <= 100 for weight in self.weights):
            raise ValueError("the weight of a term is impossible")

    def prepare(self) -> None:
        """Load the segmenter. :raises NotInstalled: its package is not installed here."""
        if not self._is_ready:
            self._cut = load_segmenter(self.segmenter)
            self._is_ready = True

    def vector(self, text: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Compute the features of a text that are not 0.

        :return: their places, in ascending order, and their values: f64, of unit length together; both may be empty.
        :raises NotInstalled: as `prepare`.
        """
        self.prepare()
        return self.vector_of(Counter(find_terms(text, self._cut)))

    def vector_of(self, counts: Mapping[str, int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Compute the features of a text whose terms were counted; see `vector`."""
        import numpy as np

        known = sorted((self.places[term], count) for term, count in counts.items() if term in self.places)
        places = np.array([place for place, _ in known], np.int64)
        values = np.array([(1 + math.log(count)) * self.weights[place] for place, count in known], np.float64)
        return places, values / max(float(np.linalg.norm(values)), 1e-300)

    def to_json(self) -> dict[str, Any]:
        """Describe the features as JSON."""
        return {"kind": "text", "segmenter": self.segmenter, "terms": self.terms, "weights": self.weights}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> TextFeatures:
        """Read what `to_json` returned, without its kind. :raises ValueError, KeyError, TypeError, AttributeError:"""
        return cls(list(facts["terms"]), [float(weight) for weight in facts["weights"]], facts["segmenter"])

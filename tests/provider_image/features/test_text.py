"""Texts: their form, their terms, and descriptions of features that cannot be trusted."""

from __future__ import annotations

import pytest

from provider_image.errors import NotAText
from provider_image.features.text import TextFeatures, find_terms, parse_text


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("Not good!", ["not", "good", "not good"]),
        ("good, bad", ["good", "bad"]),
        ("it\u2019s  a\nday", ["it's", "a", "day", "it's a", "a day"]),
        ("3.5 stars", ["3", "5", "stars", "5 stars"]),
        ("\uff26\uff55\uff4c\uff4c", ["full"]),
        ("हिन्दी", ["हिन्दी"]),
        ("很好", ["很", "好", "很好"]),
        ("很好看ok", ["很", "好", "看", "很好", "好看", "很好看", "ok"]),
        ("สวย", ["ส", "ว", "ย", "สว", "วย", "สวย"]),
        ("...", []),
        ("x" * 200, []),
    ],
)
def test_terms_are_words_and_neighbours(text: str, terms: list[str]) -> None:
    assert list(find_terms(text, None)) == terms


def test_segmenter_finds_words_where_there_are_no_blanks() -> None:
    assert list(find_terms("我喜欢 tea", lambda run: [run[:1], run[1:]])) == ["我", "喜欢", "我 喜欢", "tea"]


@pytest.mark.parametrize(
    ("data", "text"),
    [(b" a \n", "a"), (b"\xef\xbb\xbfa", "a"), ("e\u0301".encode(), "\u00e9"), (b"a\r\nb", "a\r\nb")],
)
def test_text_has_one_form(data: bytes, text: str) -> None:
    assert parse_text(data) == text


@pytest.mark.parametrize("data", [b"", b" \n\t", b"\xff\xfe", b"a\0b", b"\xed\xa0\x80"])
def test_what_is_no_text_is_refused(data: bytes) -> None:
    with pytest.raises(NotAText):
        parse_text(data)


@pytest.mark.parametrize(
    ("terms", "weights", "segmenter"),
    [
        ([], [], "characters"),
        (["a", "a"], [1.0, 1.0], "characters"),
        (["a"], [1.0, 1.0], "characters"),
        (["a"], [float("nan")], "characters"),
        (["a"], [-1.0], "characters"),
        (["a"], [1e9], "characters"),
        (["a" * 101], [1.0], "characters"),
        (["a"], [1.0], "os"),
    ],
)
def test_impossible_description_is_refused(terms: list[str], weights: list[float], segmenter: str) -> None:
    with pytest.raises(ValueError):
        TextFeatures(terms, weights, segmenter)

"""Normal forms: equal for texts that look alike, and quick for what is no text of any language."""

from __future__ import annotations

import unicodedata

import pytest

from provider_image.features.normal_form import normalise


@pytest.mark.parametrize(
    "text", ["", "plain", "e\u0301", "a\u0316\u0301\u0316", "\uff26\uff55", "\uac01", "\u1100\u1161"]
)
def test_texts_have_the_normal_form(text: str) -> None:
    assert normalise(text) == unicodedata.normalize("NFC", text)
    assert normalise(text, "NFKC") == unicodedata.normalize("NFKC", text)


@pytest.mark.parametrize("marks", ["\u0316\u0301", "\u0f75", "\uff9e"])
def test_a_letter_with_more_marks_than_any_language_uses_is_not_sorted(marks: str) -> None:
    text = "b" + 31 * marks

    # Sorting half a million of them would take hours.
    assert normalise(text) == normalise(text, "NFKC") == text
    assert len(normalise("b" + 500_000 * marks)) == 1 + 500_000 * len(marks)
    assert normalise("b" + 15 * marks) == unicodedata.normalize("NFC", "b" + 15 * marks)

"""Positions in lists and streams, as clients get them."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.auth.cursors import CursorCodec, Cursors
from store.errors import StoreError


@pytest.fixture
def codec(tmp_path: Path) -> CursorCodec:
    return Cursors(tmp_path).codec("requests", "alice")


@pytest.mark.parametrize("position", [(0,), (1,), (-1, -1), (7, 2**62), (2**63 - 1, 0, -(2**63))])
def test_a_cursor_is_read_as_it_was_written(tmp_path: Path, codec: CursorCodec, position: tuple[int, ...]) -> None:
    another_process = Cursors(tmp_path).codec("requests", "alice")

    assert another_process.read(codec.write(*position)) == position
    assert len({codec.write(*position) for _ in range(100)}) == 100


def test_a_cursor_is_valid_for_one_list_one_key_and_one_home(tmp_path: Path, codec: CursorCodec) -> None:
    (tmp_path / "other").mkdir()
    others = [
        Cursors(tmp_path).codec("requests", "bob"),
        Cursors(tmp_path).codec("requests", None),
        Cursors(tmp_path).codec("batches", "alice"),
        Cursors(tmp_path / "other").codec("requests", "alice"),
    ]

    assert [other.read(codec.write(5)) for other in others] == [None] * 4


def test_a_changed_cursor_is_none(codec: CursorCodec) -> None:
    text = codec.write(5)

    # The last character of 32 bytes has two bits that mean nothing.
    for place, character in enumerate(text[:-1]):
        changed = text[:place] + ("A" if character != "A" else "B") + text[place + 1 :]
        assert codec.read(changed) is None, place
    for other in ("", "x", "é", "\0", text[:-1], text + "A", text + codec.write(6), "bjU"):
        assert codec.read(other) is None, other


def test_cursors_of_neighbours_have_nothing_in_common(codec: CursorCodec) -> None:
    texts = [codec.write(number) for number in range(1000)]

    assert len({text[:8] for text in texts}) == 1000
    assert len({text[-8:] for text in texts}) == 1000
    assert texts != sorted(texts)


def test_a_home_that_cannot_be_written_is_an_error_of_the_store(tmp_path: Path) -> None:
    codec = Cursors(tmp_path / "nowhere").codec("requests", None)

    with pytest.raises(StoreError):
        codec.write(1)

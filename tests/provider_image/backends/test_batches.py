"""Batches take what is ready, whoever submitted it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from provider_image.backends.batches import DeviceBatches
from tests.timing import DEADLINE_SECONDS, wait_until


class Gate:
    """Doubles numbers, once it is open."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.opened = threading.Event()

    def run(self, batch: Sequence[int]) -> list[int]:
        self.seen.append(list(batch))
        assert self.opened.wait(DEADLINE_SECONDS)
        if 13 in batch:
            raise ValueError("13")
        return [2 * each for each in batch]


def test_what_became_ready_meanwhile_is_the_next_batch() -> None:
    gate = Gate()
    batches = DeviceBatches(gate.run, 4)
    first = [batches.submit(0)]
    wait_until(lambda: len(gate.seen) == 1)
    first.append(batches.submit(1))
    wait_until(lambda: len(gate.seen) == 2)
    later = [batches.submit(number) for number in range(2, 9)]

    gate.opened.set()

    assert [each.result(DEADLINE_SECONDS) for each in first + later] == [2 * number for number in range(9)]
    assert gate.seen[:2] == [[0], [1]]
    assert sorted(map(len, gate.seen[2:])) == [3, 4]


def test_error_of_a_batch_is_that_of_its_items_and_the_others_go_on() -> None:
    gate = Gate()
    gate.opened.set()
    batches = DeviceBatches(gate.run, 4)

    with pytest.raises(ValueError, match="13"):
        batches.submit(13).result(DEADLINE_SECONDS)

    assert batches.submit(2).result(DEADLINE_SECONDS) == 4


def test_threads_end_when_it_is_closed_or_dropped() -> None:
    def threads() -> set[threading.Thread]:
        return {each for each in threading.enumerate() if each.name == "batch"}

    before = threads()
    closed, dropped = (DeviceBatches(lambda batch: list(batch), 2) for _ in range(2))
    last = closed.submit(5)
    begun = threads() - before
    assert len(begun) == 4

    closed.close()
    del dropped

    assert last.result(DEADLINE_SECONDS) == 5
    assert wait_until(lambda: not threads() & begun)

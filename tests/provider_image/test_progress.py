"""Reports of items under way: rarely enough, the latest of each, and those of the right item."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from provider_image.backends import Device
from provider_image.progress import MAX_PREVIEW_BYTES, ProgressBoard, ProgressReport, report_progress, reporting
from provider_image.runtime import NetCache, run_chunk
from provider_image.services.classification import Classification
from tests.provider_image.conftest import make_chunk


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(clock: Clock) -> ProgressBoard:
    return ProgressBoard(clock)


def test_an_item_has_two_reports_a_second_at_most(board: ProgressBoard, clock: Clock) -> None:
    taken = []
    for step in range(1001):
        clock.now = step / 100
        board.add(3, step / 1000, None)
        taken += board.take()

    assert len(taken) == 21
    assert [report.fraction for report in taken[:3]] == [0.0, 0.05, 0.1]
    assert {report.item for report in taken} == {3}


def test_a_report_that_was_not_taken_is_replaced_and_keeps_its_preview(board: ProgressBoard, clock: Clock) -> None:
    for clock.now, fraction in ((0, 0.1), (1, 0.2)):
        board.add(0, fraction, lambda: b"a preview")

    assert board.take() == [ProgressReport(item=0, fraction=0.2, preview=b"a preview")]
    assert board.take() == []


def test_a_preview_is_made_every_two_seconds_and_takes_a_small_share_of_the_time(
    board: ProgressBoard, clock: Clock
) -> None:
    made: dict[int, list[float]] = {0: [], 1: []}

    def make(item: int, seconds: float) -> bytes:
        made[item].append(clock.now)
        clock.now += seconds
        return b"a preview"

    for seconds, item in ((0.001, 0), (1.0, 1)):
        clock.now = 0.0
        while clock.now < 50:
            board.add(item, 0.5, lambda item=item, seconds=seconds: make(item, seconds))
            clock.now += 0.125

    assert all(2 <= second - first < 2.7 for first, second in itertools.pairwise(made[0]))
    assert len(made[0]) > 18
    assert all(second - first >= 20 for first, second in itertools.pairwise(made[1]))
    assert len(made[1]) == 3, "5 % of 50 s"


def test_items_are_reported_on_their_own(board: ProgressBoard) -> None:
    with reporting(board, [7, 9]):
        report_progress(0, 0.25)
        report_progress(1, 0.75)

    assert board.take() == [ProgressReport(item=7, fraction=0.25), ProgressReport(item=9, fraction=0.75)]


def test_a_report_that_nobody_watches_makes_no_preview() -> None:
    report_progress(0, 0.5, lambda: pytest.fail("it was made"))
    with reporting(None, [0]):
        report_progress(0, 0.5, lambda: pytest.fail("it was made"))


@pytest.mark.parametrize(("fraction", "reported"), [(-1, 0.0), (7, 1.0), (math.inf, 1.0), (1, 1.0)])
def test_an_impossible_fraction_is_cut(board: ProgressBoard, fraction: float, reported: float) -> None:
    board.add(0, fraction, None)

    assert board.take() == [ProgressReport(item=0, fraction=reported)]


def test_what_is_no_number_is_no_report_and_a_large_preview_is_left_out(board: ProgressBoard) -> None:
    board.add(0, math.nan, None)
    board.add(1, 0.5, lambda: bytes(MAX_PREVIEW_BYTES + 1))

    assert board.take() == [ProgressReport(item=1, fraction=0.5)]


@pytest.mark.parametrize("preview", [None, b"\0\xff"])
def test_a_report_is_the_same_after_it_was_sent(preview: bytes | None) -> None:
    report = ProgressReport(item=3, fraction=0.125, preview=preview)

    assert ProgressReport.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    "raw",
    [
        {},
        [],
        {"item": "0", "fraction": 0.5, "preview": None},
        {"item": 0, "fraction": math.nan, "preview": None},
        {"item": 0, "fraction": 2, "preview": None},
        {"item": 0, "fraction": "half", "preview": None},
        {"item": 0, "fraction": 10**400, "preview": None},
        {"item": 0, "fraction": 0.5, "preview": "?"},
        {"item": 0, "fraction": 0.5, "preview": 7},
        {"item": 0, "fraction": 0.5, "preview": "A" * (2 * MAX_PREVIEW_BYTES)},
    ],
)
def test_a_malformed_report_is_refused(raw: Any) -> None:
    with pytest.raises(ValueError):
        ProgressReport.from_json(raw)


class Reporting(Classification):
    """Reports the length of each image in bytes as a percentage."""

    batch_items = 2

    def load(self, artefact: Any, device: Device) -> Any:
        return self

    @property
    def artefact(self) -> Any:
        raise AssertionError("not used by this net")

    def prepare(self, artefact: Any, inputs: Any, params: Any, *, is_resized: bool = False) -> int:
        return len(inputs["image"])

    def run(self, net: Any, items: Any, params: Any) -> Any:
        for number, length in enumerate(items):
            report_progress(number, length / 100, lambda length=length: bytes(length))
        if 3 in items and len(items) > 1:
            raise ValueError("only alone")
        return super().run(net, items, params)


def test_a_chunk_reports_its_items_by_their_numbers(tmp_path: Path, models_folder: Path) -> None:
    board = ProgressBoard()
    nets = NetCache(models_folder, Device(threads=2), find_service=lambda name: Reporting())
    chunk = make_chunk(tmp_path / "c.zip", [bytes(length) for length in (1, 2, 3, 4, 5)])

    run_chunk(chunk, tmp_path / "r.zip", nets, board=board)

    reports = sorted(board.take(), key=lambda report: report.item)
    assert [(report.item, report.fraction, len(report.preview or b"")) for report in reports] == [
        (number, (number + 1) / 100, number + 1) for number in range(5)
    ]

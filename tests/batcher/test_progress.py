"""Reports of workers reach the store: checked, for every claim of an item, and in few commits."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from PIL import Image

from batcher.progress import ProgressWriter
from batcher.settings import BatcherTimings
from provider_image.progress import ProgressReport
from store.errors import StoreBusy
from store.processes.progress import NewProgress


def image(format: str = "JPEG", size: tuple[int, int] = (96, 64)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "olive").save(file, format)
    return file.getvalue()


def run_with(harness: Any, *reports: ProgressReport) -> list[Any]:
    """Run a cycle whose only chunk makes these reports. :return: what each request shows after they are recorded."""
    shown: list[Any] = []

    async def main() -> None:
        gate = asyncio.Event()
        harness.executor.before_answer = gate.wait
        cycle = harness.cycle()
        cycle.flush()
        run = asyncio.create_task(cycle.run(asyncio.Event()))
        await harness.until(lambda: harness.executor.jobs)
        before = harness.store.progress.latest()
        for report in reports:
            harness.executor.jobs[0].on_progress(report)
        await harness.until(lambda: harness.store.progress.latest() > before)
        shown.extend(harness.store.requests.list())
        gate.set()
        await run

    asyncio.run(main())
    return shown


def test_a_report_is_recorded_for_all_requests_that_wait_for_the_item(harness: Any) -> None:
    harness.add(b"another")
    same = [harness.add(b"the same", is_fresh=True) for _ in range(2)]

    shown = run_with(harness, ProgressReport(item=1, fraction=0.25, preview=image()))

    assert {one.id: one.progress.fraction for one in shown if one.progress} == {one.id: 0.25 for one in same}
    assert all(one.progress.previews == 1 for one in shown if one.progress)
    assert [one.progress for one in harness.reload(*same)] == [None, None]


@pytest.mark.parametrize(
    "preview",
    [b"text", image()[:-20], image("PNG"), image(size=(2000, 1001)), image() + bytes(128 * 1024)],
    ids=["text", "cut short", "another format", "too many pixels", "too large"],
)
def test_a_preview_that_may_not_be_shown_is_dropped_and_the_rest_recorded(harness: Any, preview: bytes) -> None:
    harness.add(b"image")

    (shown,) = run_with(harness, ProgressReport(item=0, fraction=0.5, preview=preview))

    assert (shown.progress.fraction, shown.progress.previews) == (0.5, 0)


def test_a_report_of_an_item_that_the_chunk_does_not_have_is_dropped(
    harness: Any, caplog: pytest.LogCaptureFixture
) -> None:
    harness.add(b"image")

    (shown,) = run_with(harness, *(ProgressReport(item=item, fraction=0.1 + item / 100) for item in (7, -1, 0)))

    assert shown.progress.fraction == 0.1
    assert sum("does not have" in message for message in caplog.messages) == 2


class Packed:
    """A chunk of one item with one claim."""

    class Item:
        class Claim:
            number, token = 5, 2

        claims = (Claim,)

    items = (Item,)


def test_many_reports_take_few_commits_and_the_last_one_is_recorded() -> None:
    recorded: list[NewProgress] = []

    async def main() -> None:
        writer = ProgressWriter(recorded.extend, pause_seconds=0.05)
        running = asyncio.create_task(writer.run())
        packed: Any = Packed()
        for step in range(1, 1001):
            writer.put(packed, ProgressReport(item=0, fraction=step / 1000, preview=image() if step == 1 else None))
            if step % 100 == 0:
                await asyncio.sleep(0)
        while not recorded or recorded[-1].fraction < 1:
            await asyncio.sleep(0.01)
        running.cancel()

    asyncio.run(main())

    assert len(recorded) <= 3
    assert recorded[0].preview == image(), "a later report without a preview keeps it"
    assert (recorded[0].number, recorded[0].token) == (5, 2)


def test_what_a_locked_store_does_not_take_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    recorded: list[NewProgress] = []
    failures = [StoreBusy()]

    def record(new: Sequence[NewProgress]) -> None:
        if failures:
            raise failures.pop()
        recorded.extend(new)

    async def main() -> None:
        writer = ProgressWriter(record, pause_seconds=0.0)
        running = asyncio.create_task(writer.run())
        packed: Any = Packed()
        while not recorded:
            writer.put(packed, ProgressReport(item=0, fraction=0.5))
            await asyncio.sleep(0.01)
        running.cancel()

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())

    assert recorded[0].fraction == 0.5
    assert "cannot record progress" in caplog.text


def test_a_request_is_recorded_at_most_twice_a_second() -> None:
    assert BatcherTimings().progress_seconds >= 0.5

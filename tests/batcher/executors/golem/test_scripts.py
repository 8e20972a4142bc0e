"""Scripts of several chunks: what a provider that stops, hangs or lies in the middle of one costs, and what is kept."""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import devnet.image
from batcher.executors import Outcome
from batcher.executors.golem.job_queue import QueuedJob
from batcher.executors.golem.scripts.attempt import Attempt
from batcher.executors.golem.scripts.commands import add_chunks
from batcher.executors.golem.timings import GolemTimings
from tests.batcher.executors.golem.test_faults import (
    SHORT,
    Play,
    banned,
    close,
    fault,
    increasingly_expensive,
    play,
)
from tests.devnet.running import calls_matching
from tests.golem import GolemHarness, provider

__all__ = ["play"]

#: Scripts of four chunks, whatever the speed of a provider.
PIPELINED = replace(SHORT, script_seconds=1e6, ahead_seconds=1e6)
CHUNKS = 12


def names() -> list[str]:
    return [f"chunk{number}" for number in range(CHUNKS)]


def scripts(harness: GolemHarness) -> int:
    """Count the scripts that were sent, those of starts included."""
    return len(calls_matching(harness.devnet, "POST /activity-api/v1/activity/*/exec"))


def answered_by(outcomes: list[Outcome]) -> Counter[str | None]:
    assert [each.error for each in outcomes] == [None] * len(outcomes)
    return Counter(each.provider for each in outcomes)


def test_several_chunks_travel_in_one_script_and_share_its_cost(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        started_at = time.monotonic()
        outcomes = await harness.run(*names())
        seconds, sent = time.monotonic() - started_at, scripts(harness)
        await close(harness)

        assert answered_by(outcomes) == {"alpha": CHUNKS}
        assert sent < CHUNKS, "the start and the first chunk have scripts of their own"
        bills = [bill for each in outcomes for bill in each.bills]
        assert len(bills) == CHUNKS and all(bill.cost > 0 for bill in bills)
        assert sum(bill.seconds for bill in bills) <= seconds, "the time of a script is divided, not counted for each"
        # What it was paid for also is the time until it was ended.
        assert sum((bill.cost for bill in bills), Decimal(0)) < 2 * harness.store.ledger.spent()

    play(body, provider("alpha"), max_workers=1, timings=PIPELINED)


def test_an_image_of_an_earlier_version_gets_one_chunk_at_a_time(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_program(folder: Path) -> Path:
        installed = Path(sys.executable).with_name("mlg-provider")
        folder.mkdir(parents=True, exist_ok=True)
        program = folder / "mlg-provider"
        program.write_text(f'#!/bin/sh\nexec "{installed}" "$@" > /dev/null\n')  # it knows nothing of `next`
        program.chmod(0o755)
        return program

    monkeypatch.setattr(devnet.image, "_write_program", write_program)

    async def body(harness: GolemHarness) -> None:
        outcomes = await harness.run(*names()[:3])
        sent = scripts(harness)
        await close(harness)

        assert answered_by(outcomes) == {"alpha": 3}
        assert sent == 1 + 3, "one for the start, one for each chunk"

    play(body, provider("alpha"), max_workers=1, timings=PIPELINED)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("die", "ended the activity"),
        ("exit-nonzero", "could not run the chunk"),
        ("garbage", "not a zip"),
        ("swap-results", "have chunk_id"),
    ],
)
def test_of_a_provider_that_fails_in_mid_script_what_has_arrived_counts(play: Play, kind: str, words: str) -> None:
    async def body(harness: GolemHarness) -> None:
        outcomes = await harness.run(*names())
        await close(harness)

        found = answered_by(outcomes)
        assert found["alpha"] >= 2 and found["beta"] >= 1
        attempts = Counter(len(each.bills) for each in outcomes)
        assert attempts == {1: CHUNKS - 1, 2: 1}, "one chunk was worked on in vain, the others were computed once"
        (failed,) = [each for each in outcomes if len(each.bills) == 2]
        assert [bill.provider for bill in failed.bills] == ["alpha", "beta"]
        assert list(banned(harness)) == ["alpha"] and words in banned(harness)["alpha"]

    faults = (fault(kind, after=3, times=1),)
    play(body, *increasingly_expensive(("alpha", faults), ("beta", ())), max_workers=1, timings=PIPELINED)


def test_a_provider_that_hangs_in_mid_script_delays_no_chunk_for_long(play: Play) -> None:
    async def body(harness: GolemHarness) -> None:
        outcomes = await harness.run(*names(), timeout_seconds=10)
        await close(harness)

        assert answered_by(outcomes)["beta"] >= 1
        assert list(banned(harness)) == ["alpha"]

    faults = (fault("hang", after=3),)
    timings = replace(PIPELINED, timeout_grace_seconds=3.0, max_script_chunks=2)
    # One worker: beside another, alpha may not get as many chunks as it answers before it hangs.
    # The chunks behind the one that hangs may wait for longer than an offer usually may take to come.
    plans = increasingly_expensive(("alpha", faults), ("beta", ()))
    play(body, *plans, max_workers=1, timings=timings, offer_seconds=200.0)


class RecordingScript:
    """Writes the commands of a script down."""

    def __init__(self) -> None:
        self.commands: list[str] = []

    def upload_file(self, source: str, target: str) -> None:
        self.commands.append(f"up {target[-5]}")

    def run(self, *words: str) -> None:
        assert words[:2] == ("/usr/local/bin/mlg-provider", "next")
        self.commands.append(" ".join(["next", *(word[-5:-4] or word for word in words[2:])]))

    def download_file(self, source: str, target: str) -> None:
        self.commands.append(f"down {source[-5]}")


def attempt(slot: int, tmp_path: Path) -> Attempt:
    job: Any = SimpleNamespace(chunk=tmp_path / "chunk.zip")
    queued_job = QueuedJob(job=job, outcome=SimpleNamespace())  # type: ignore[arg-type]
    return Attempt(queued_job=queued_job, size_bytes=1, received=tmp_path / "r.part", slot=slot)


def test_a_provider_works_while_chunks_are_sent(tmp_path: Path) -> None:
    one, two, three = (attempt(slot, tmp_path) for slot in (1, 2, 3))
    alone, idle, busy = RecordingScript(), RecordingScript(), RecordingScript()

    add_chunks(alone, new=[one], awaited=[one], has_work=False)
    add_chunks(idle, new=[one, two, three], awaited=[one], has_work=False)
    add_chunks(busy, new=[two, three], awaited=[one, two], has_work=True)

    assert alone.commands == ["up 1", "next 1 1 1", "down 1"]
    assert idle.commands == ["up 1", "next - 1 1", "up 2", "up 3", "next 1 2 2 3 3", "down 1"]
    assert busy.commands == ["up 2", "up 3", "next 1 2 2 3 3", "down 1", "next 2", "down 2"]


@pytest.mark.parametrize(
    ("arrivals", "is_quick", "stays_quick"),
    [
        ([0.9, 1.9, 2.9, 3.9], True, True),  # sent while the first one is computed
        ([1.5, 2.5, 3.5, 4.5], False, True),  # sent in half of the time that the provider has
        ([4.0, 4.1, 4.2, 4.3], False, False),  # the provider waited
        ([0.9, 1.9], True, True),
        ([1.9, 2.0], False, True),  # two may be chance
        ([0.9], False, True),
    ],
)
def test_transfers_are_quick_if_chunks_are_sent_while_one_is_computed(
    arrivals: list[float], is_quick: bool, stays_quick: bool
) -> None:
    timings = GolemTimings()

    found = [timings.has_quick_transfers([100.0 + each for each in arrivals], 100.0, was) for was in (False, True)]

    assert found == [is_quick, stays_quick]


def test_how_many_chunks_a_script_waits_for_follows_from_the_speed() -> None:
    timings = GolemTimings(script_seconds=2.0, max_script_chunks=4, ahead_seconds=10.0)

    found = [timings.pipeline_chunks(speed) for speed in (None, 0.0, 1.0, 1.6, 8.0, 20.0, 1000.0)]

    assert found == [0, 0, 0, 1, 1, 2, 4]

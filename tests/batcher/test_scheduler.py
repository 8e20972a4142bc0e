"""The timer, and the single run."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from batcher import systemd
from batcher.executors import Outcome
from batcher.executors.local import LocalTimings
from batcher.scheduler import OnceReport
from provider_image.errors import BrokenArtefact
from scripts.benchmarks.support import processes
from store import new_id
from store.pipelines.definition import PIPELINE, parse_pipeline
from store.requests import NewRequest, RequestRecord
from store.states import RequestState
from store.store import Store
from tests.batcher.conftest import now
from tests.timing import DEADLINE_SECONDS, wait_until

ROOT = Path(__file__).parents[2]


def run_once(make: Any) -> OnceReport:
    async def main() -> OnceReport:
        report: OnceReport = await make().run_once(asyncio.Event())
        return report

    return asyncio.run(asyncio.wait_for(main(), 300))


def alive(harness: Any) -> list[Any]:
    found: list[Any] = harness.store.batchers.list(seen_since=now() - timedelta(seconds=20))
    return found


def test_a_batcher_writes_heartbeats_and_deregisters_at_its_end(harness: Any, batcher: Any) -> None:
    async def main() -> list[Any]:
        stop = asyncio.Event()
        run = asyncio.create_task(batcher().run(stop))
        await harness.until(lambda: alive(harness) != [])
        found = alive(harness)
        stop.set()
        await run
        return found

    (record,) = asyncio.run(main())

    assert (record.id, record.pid, record.executor, record.capacity) == ("batcher-id", os.getpid(), "table", 4)
    assert alive(harness) == []


def test_the_reason_for_an_unavailable_model_is_in_the_heartbeat_and_in_the_report_of_a_single_run(
    harness: Any, batcher: Any
) -> None:
    harness.add(b"image")
    harness.executor.unavailable_reasons = {"efficientnet_lite0": "The budget of the day is used up."}

    async def main() -> Any:
        stop = asyncio.Event()
        run = asyncio.create_task(batcher().run(stop))
        await harness.until(lambda: alive(harness) != [])
        (found,) = alive(harness)
        stop.set()
        await run
        return found

    record = asyncio.run(main())
    report = run_once(batcher)

    assert record.notices == {"efficientnet_lite0": "The budget of the day is used up."}
    assert report.left == {"efficientnet_lite0": (1, "The budget of the day is used up.")}


TWICE = """
    [steps.first]
    model = "efficientnet_lite0"
    [steps.second]
    model = "efficientnet_lite0"
    when = "first.score > 0"
"""


def send_to_pipeline(harness: Any, image: bytes) -> RequestRecord:
    pipeline = parse_pipeline("twice", TWICE, harness.models)
    new = NewRequest(
        id=new_id(), service=PIPELINE, model="twice", created_at=datetime.now(UTC), pipeline=pipeline.to_text()
    )
    return harness.store.requests.add(new, harness.store.images.stage(image))  # type: ignore[no-any-return]


def test_a_single_run_does_all_steps_of_a_pipeline(harness: Any, batcher: Any) -> None:
    parents = [send_to_pipeline(harness, image) for image in (b"image", b"broken")]

    report = run_once(batcher)

    good, bad = harness.reload(*parents)
    assert (good.state, good.output) == (RequestState.DONE, {"done": 2})
    assert (bad.state, bad.code) == (RequestState.FAILED, "broken_image")
    assert report.left == {}


def test_a_single_run_that_is_stopped_lets_no_pipeline_go_on(harness: Any, batcher: Any) -> None:
    parent = send_to_pipeline(harness, b"image")

    async def main() -> None:
        stop = asyncio.Event()
        stop.set()
        await batcher().run_once(stop)

    asyncio.run(asyncio.wait_for(main(), 300))

    assert harness.reload(parent)[0].run.children == {}


def test_a_step_whose_model_is_not_processed_is_left_by_a_single_run_with_the_reason(
    harness: Any, batcher: Any
) -> None:
    parent = send_to_pipeline(harness, b"image")
    harness.executor.unavailable_reasons = {"efficientnet_lite0": "The budget is used up."}

    report = run_once(batcher)

    assert report.left == {"efficientnet_lite0": (1, "The budget is used up.")}
    assert harness.reload(parent)[0].state is RequestState.QUEUED


def test_the_timer_does_all_steps_of_a_pipeline(harness: Any, batcher: Any) -> None:
    async def main() -> RequestRecord:
        stop = asyncio.Event()
        run = asyncio.create_task(batcher(max_wait_seconds=0, poll_seconds=0.02).run(stop))
        parent = send_to_pipeline(harness, b"image")
        await harness.until(lambda: harness.reload(parent)[0].state.is_final)
        stop.set()
        await run
        found: RequestRecord = harness.reload(parent)[0]
        return found

    assert asyncio.run(asyncio.wait_for(main(), 300)).output == {"done": 2}


def test_requests_are_processed_when_they_have_waited_long_enough(
    harness: Any, batcher: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "batcher.scheduler")
    harness.add(b"first")

    async def main() -> None:
        stop = asyncio.Event()
        run = asyncio.create_task(batcher(max_wait_seconds=0.3, poll_seconds=0.02).run(stop))
        await harness.until(lambda: "cycle ended" in caplog.messages)  # the first cycle, which processes everything
        for number in range(3):
            request = harness.add(b"image %d" % number)
            await harness.until(lambda request=request: harness.reload(request)[0].state is RequestState.DONE)
            waited = harness.reload(request)[0].finished_at - request.created_at
            assert waited > timedelta(seconds=0.3)
        stop.set()
        await run

    asyncio.run(asyncio.wait_for(main(), 300))


def test_at_each_interval_all_waiting_requests_are_processed_and_cycles_do_not_overlap(
    harness: Any, batcher: Any
) -> None:
    in_flight = []

    async def before_answer() -> None:
        in_flight.append(harness.executor.in_flight)
        await asyncio.sleep(0.3)  # longer than the timer's interval

    harness.executor.before_answer = before_answer
    harness.executor.slots = 1

    async def main() -> None:
        stop = asyncio.Event()
        run = asyncio.create_task(batcher(every_seconds=0.1).run(stop))
        for number in range(3):
            request = harness.add(b"image %d" % number)
            await harness.until(lambda request=request: harness.reload(request)[0].state is RequestState.DONE)
        stop.set()
        await run

    asyncio.run(asyncio.wait_for(main(), 300))

    assert in_flight == [1, 1, 1]


def test_usage_is_deleted_after_its_own_time(harness: Any, batcher: Any) -> None:
    days = [(now() - timedelta(days=age)).date() for age in (399, 402)]
    sql = "INSERT INTO usage (day, key_id, model, client, accepted) VALUES (?, '', 'm', 'other', 1)"
    harness.store.database.write(
        lambda transaction: transaction.execute_many(sql, [(day.isoformat(),) for day in days])
    )

    def kept() -> list[str]:
        return [day for (day,) in harness.store.database.rows("SELECT day FROM usage")]

    async def main() -> None:
        stop = asyncio.Event()
        run = asyncio.create_task(batcher().run(stop))
        await harness.until(lambda: len(kept()) < 2)
        stop.set()
        await run

    asyncio.run(asyncio.wait_for(main(), 300))

    assert kept() == [days[0].isoformat()]


def test_an_idle_batcher_writes_only_its_heartbeat(harness: Any, batcher: Any) -> None:
    log = harness.home_settings.database.with_name("mlg.db-wal")

    def read() -> tuple[Any, int]:
        return alive(harness)[0].seen_at, log.stat().st_mtime_ns

    async def main() -> None:
        stop = asyncio.Event()
        run = asyncio.create_task(batcher(poll_seconds=0.01, max_wait_seconds=0.1).run(stop))
        await harness.until(lambda: alive(harness) != [])
        await asyncio.sleep(0.3)
        while True:
            before = read()
            await asyncio.sleep(0.5)
            after = read()
            if before[0] == after[0]:  # no heartbeat came in between
                break
        stop.set()
        await run
        assert after == before

    asyncio.run(asyncio.wait_for(main(), 300))


def test_once_processes_everything_and_is_clean(harness: Any, batcher: Any) -> None:
    requests = harness.add_many(40)

    report = run_once(batcher)

    assert (report.tally.done, report.tally.failed, report.left, report.is_clean) == (40, 0, {}, True)
    assert {request.state for request in harness.reload(*requests)} == {RequestState.DONE}
    assert alive(harness) == []


def test_once_waits_for_back_offs_and_reports_what_failed(harness: Any, batcher: Any) -> None:
    flaky = harness.add(b"flaky")
    harness.add(b"image")
    fails = iter([True, False])

    def repair(results: Any) -> Any:
        from dataclasses import replace

        if next(fails, False):
            return results
        good = [
            item if item.error is None else replace(item, error=None, output=harness.expected_output(b"flaky"))
            for item in results.items
        ]
        return replace(results, items=tuple(good))

    harness.executor.corrupt = repair

    report = run_once(batcher)

    (found,) = harness.reload(flaky)
    assert (found.state, found.attempts) == (RequestState.DONE, 1)
    assert (report.tally.done, report.tally.failed, report.tally.released, report.is_clean) == (2, 0, 1, True)


def test_once_is_not_clean_when_a_request_failed(harness: Any, batcher: Any) -> None:
    harness.add(b"broken")

    report = run_once(batcher)

    assert (report.tally.failed, report.is_clean) == (1, False)


def test_once_reports_the_requests_that_cannot_be_processed_with_the_reason(harness: Any, batcher: Any) -> None:
    harness.add(b"image", model="vgg16")
    harness.add(b"image")
    harness.executor.forced_outcome = Outcome(
        provider="table/1", seconds=0, error=BrokenArtefact("The model is damaged.")
    )

    report = run_once(batcher)

    assert not report.is_clean
    assert report.left["vgg16"][0] == 1 and "mlg models compile vgg16" in report.left["vgg16"][1]
    assert report.left["efficientnet_lite0"] == (1, "The model is damaged.")


def test_once_ends_even_if_new_requests_keep_coming(harness: Any, batcher: Any) -> None:
    harness.add_many(20)
    added = []

    async def add_another() -> None:
        added.append(harness.add(b"late %d" % len(added)))

    harness.executor.before_answer = add_another

    report = run_once(batcher)

    assert report.tally.done >= 20
    assert report.left == {}


def test_expired_data_is_deleted_at_the_start(harness: Any, batcher: Any) -> None:
    harness.clock = lambda: now() - timedelta(days=8)
    old = harness.add(b"image")
    harness.run()
    assert harness.reload(old)[0].state is RequestState.DONE

    async def main() -> None:
        stop = asyncio.Event()
        harness.clock = now
        run = asyncio.create_task(batcher().run(stop))
        await harness.until(lambda: harness.reload(old)[0].image_deleted_at is not None)
        stop.set()
        await run

    asyncio.run(asyncio.wait_for(main(), 300))


@pytest.mark.parametrize("name", ["notify", "@mlg-test-notify"])
def test_systemd_is_asked_for_the_time_to_stop_that_the_settings_grant(
    name: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    address = f"\0{name[1:]}-{os.getpid()}" if name.startswith("@") else name
    home = str(store.database.path.parent)
    variables = {"NOTIFY_SOCKET": address.replace("\0", "@"), "MLG_DRAIN_SECONDS": "7", "PYTHONPATH": str(ROOT)}

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)
        listener.settimeout(DEADLINE_SECONDS)
        batcher = subprocess.Popen(processes.mlg("batch", "--home", home), env={**os.environ, **variables})
        try:
            wait_until(lambda: store.batchers.list(seen_since=now() - timedelta(days=1)))
            batcher.terminate()
            received = listener.recv(4096)
            status = batcher.wait(DEADLINE_SECONDS)
        finally:
            batcher.kill()
            batcher.wait()

    # Drain, results, executor, and a margin.
    executor_seconds = LocalTimings().stop_seconds
    assert received == b"EXTEND_TIMEOUT_USEC=%d" % ((7 + 5 + executor_seconds + 15) * 1_000_000)
    assert status == 0


def test_a_batcher_that_systemd_does_not_hear_stops_as_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    systemd.extend_stop_timeout(1.0, {})
    systemd.extend_stop_timeout(1.0, {"NOTIFY_SOCKET": str(tmp_path / "nobody")})

    assert [message.split(":")[0] for message in caplog.messages] == ["systemd cannot be asked for time to stop"]

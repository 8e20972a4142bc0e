"""The operator's controls, and how batchers follow them."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from decimal import Decimal
from typing import Any

from server.status.eta import EtaInputs, estimate
from store.processes.controls import Mode
from store.states import RequestState
from tests.batcher.conftest import now

MODEL = "efficientnet_lite0"


def notices(harness: Any) -> dict[str, str]:
    found = harness.store.batchers.list(seen_since=now() - timedelta(seconds=20))
    return dict(found[0].notices) if found else {}


def state(harness: Any, request: Any) -> RequestState:
    return harness.reload(request)[0].state  # type: ignore[no-any-return]


def test_a_paused_batcher_claims_nothing_and_shows_the_reason_until_it_resumes(harness: Any, batcher: Any) -> None:
    given = harness.store.controls.pause(Mode.PAUSED, by="ann", now=now(), reason="new kernel")
    request = harness.add(b"image")

    async def main() -> None:
        stop = asyncio.Event()
        run = asyncio.create_task(batcher(every_seconds=0.1, max_wait_seconds=0.05, poll_seconds=0.02).run(stop))
        await harness.until(lambda: notices(harness).get(MODEL) == given.notice)
        await asyncio.sleep(0.3)  # several cycles that would have processed it
        assert state(harness, request) is RequestState.QUEUED
        harness.store.controls.resume(by="ann", now=now())
        await harness.until(lambda: state(harness, request) is RequestState.DONE)
        await harness.until(lambda: notices(harness) == {})
        stop.set()
        await run

    asyncio.run(asyncio.wait_for(main(), 300))


def test_chunks_under_way_are_finished_after_a_pause(harness: Any, batcher: Any) -> None:
    gate = asyncio.Event()
    harness.executor.before_answer = gate.wait
    first = harness.add(b"first")

    async def main() -> None:
        stop = asyncio.Event()
        run = asyncio.create_task(batcher(every_seconds=0.1, poll_seconds=0.02).run(stop))
        await harness.until(lambda: harness.executor.in_flight == 1)
        harness.store.controls.pause(Mode.DRAINING, by="ann", now=now())
        await harness.until(lambda: notices(harness) != {})
        second = harness.add(b"second")
        gate.set()
        await harness.until(lambda: state(harness, first) is RequestState.DONE)
        await asyncio.sleep(0.3)
        assert state(harness, second) is RequestState.QUEUED
        stop.set()
        await run

    asyncio.run(asyncio.wait_for(main(), 300))


def test_run_now_processes_requests_that_are_not_due(harness: Any, batcher: Any) -> None:
    harness.store.controls.run_now(by="ann", now=now())  # before this batcher's start, so it has no effect

    async def main() -> None:
        stop = asyncio.Event()
        run = asyncio.create_task(batcher(every_seconds=600, max_wait_seconds=600, poll_seconds=0.02).run(stop))
        early = harness.add(b"early")
        await harness.until(lambda: state(harness, early) is RequestState.DONE)  # the first cycle processes everything
        request = harness.add(b"image")
        await asyncio.sleep(0.7)
        assert state(harness, request) is RequestState.QUEUED
        harness.store.controls.run_now(by="ann", now=now())
        await harness.until(lambda: state(harness, request) is RequestState.DONE)
        stop.set()
        await run

    asyncio.run(asyncio.wait_for(main(), 300))


def test_a_single_run_during_a_pause_reports_the_waiting_requests_with_the_reason(harness: Any, batcher: Any) -> None:
    given = harness.store.controls.pause(Mode.PAUSED, by="ann", now=now())
    harness.add(b"image")

    async def main() -> Any:
        return await batcher().run_once(asyncio.Event())

    report = asyncio.run(asyncio.wait_for(main(), 300))

    assert (report.tally.done, report.left) == (0, {MODEL: (1, given.notice)})


def test_a_waiting_request_shows_who_paused_the_batcher(harness: Any, batcher: Any) -> None:
    given = harness.store.controls.pause(Mode.PAUSED, by="ann", now=now(), reason="new kernel")
    request = harness.add(b"image")

    async def main() -> Any:
        stop = asyncio.Event()
        run = asyncio.create_task(batcher().run(stop))
        await harness.until(lambda: notices(harness) != {})
        batchers = harness.store.batchers.list(seen_since=now() - timedelta(seconds=20))
        stop.set()
        await run
        return estimate(
            request,
            EtaInputs(
                batchers=batchers, backlog=harness.store.requests.backlog(), throughput=None, unavailable_reason=None
            ),
            now(),
        )

    wait = asyncio.run(asyncio.wait_for(main(), 300))

    assert (wait.waiting_for, wait.eta_seconds) == (given.notice, None)
    assert "ann: new kernel" in wait.waiting_for


def test_a_batcher_with_a_paid_executor_shows_its_budget(harness: Any, batcher: Any) -> None:
    async def main() -> Any:
        stop = asyncio.Event()
        made = batcher()
        harness.store.reservations.set_caps(
            "batcher-", {"day": Decimal(1)}
        )  # the name of its folder, under which executors spend
        run = asyncio.create_task(made.run(stop))
        await harness.until(lambda: harness.store.batchers.list(seen_since=now() - timedelta(seconds=20)) != [])
        (found,) = harness.store.batchers.list(seen_since=now() - timedelta(seconds=20))
        stop.set()
        await run
        return found

    assert asyncio.run(asyncio.wait_for(main(), 300)).budget == {"day": "1"}

"""What the operator says, and what batchers make of it."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from batcher.scheduler import Batcher
from batcher.workspace import Workspace
from server.status.eta import Outlook, estimate
from store.batcher_controls import Mode, hold, resume, run_now
from store.records import State

MODEL = "efficientnet_lite0"


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def batcher(bench: Any) -> Any:
    """Make a batcher inside the loop that will run it."""
    bench.clock = now
    workspace = Workspace(bench.settings.work, "batcher-id")
    workspace.create()

    def make(**settings: Any) -> Batcher:
        bench.change(**settings)
        return Batcher(
            store=bench.store,
            executor=bench.executor,
            settings=bench.settings,
            server_settings=bench.server_settings,
            workspace=workspace,
            batcher_id="batcher-id",
        )

    yield make
    workspace.remove()


def notices(bench: Any) -> dict[str, str]:
    found = bench.store.list_batchers(seen_since=now() - timedelta(seconds=20))
    return dict(found[0].notices) if found else {}


def state(bench: Any, request: Any) -> State:
    return bench.again(request)[0].state  # type: ignore[no-any-return]


def test_a_paused_batcher_claims_nothing_and_says_why_until_work_goes_on(bench: Any, batcher: Any) -> None:
    given = hold(bench.store, Mode.PAUSED, by="ann", now=now(), reason="new kernel")
    request = bench.add(b"picture")

    async def main() -> None:
        stop = asyncio.Event()
        run = asyncio.create_task(batcher(every_seconds=0.1, max_wait_seconds=0.05, poll_seconds=0.02).run(stop))
        await bench.until(lambda: notices(bench) == {MODEL: given.notice})
        await asyncio.sleep(0.3)  # several rounds that would have taken it
        assert state(bench, request) is State.QUEUED
        resume(bench.store, by="ann", now=now())
        await bench.until(lambda: state(bench, request) is State.DONE)
        await bench.until(lambda: notices(bench) == {})
        stop.set()
        await run

    asyncio.run(asyncio.wait_for(main(), 60))


def test_what_is_under_way_when_work_is_paused_is_finished(bench: Any, batcher: Any) -> None:
    gate = asyncio.Event()
    bench.executor.hold = gate.wait
    first = bench.add(b"first")

    async def main() -> None:
        stop = asyncio.Event()
        run = asyncio.create_task(batcher(every_seconds=0.1, poll_seconds=0.02).run(stop))
        await bench.until(lambda: bench.executor.under_way == 1)
        hold(bench.store, Mode.DRAINING, by="ann", now=now())
        await bench.until(lambda: notices(bench) != {})
        second = bench.add(b"second")
        gate.set()
        await bench.until(lambda: state(bench, first) is State.DONE)
        await asyncio.sleep(0.3)
        assert state(bench, second) is State.QUEUED
        stop.set()
        await run

    asyncio.run(asyncio.wait_for(main(), 60))


def test_run_now_takes_what_is_not_due(bench: Any, batcher: Any) -> None:
    run_now(bench.store, by="ann", now=now())  # said before this batcher began: not meant for it

    async def main() -> None:
        stop = asyncio.Event()
        run = asyncio.create_task(batcher(every_seconds=600, max_wait_seconds=600, poll_seconds=0.02).run(stop))
        early = bench.add(b"early")
        await bench.until(lambda: state(bench, early) is State.DONE)  # the first round takes everything
        request = bench.add(b"picture")
        await asyncio.sleep(0.7)
        assert state(bench, request) is State.QUEUED
        run_now(bench.store, by="ann", now=now())
        await bench.until(lambda: state(bench, request) is State.DONE)
        stop.set()
        await run

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_single_round_leaves_what_waits_with_the_reason_while_work_is_paused(bench: Any, batcher: Any) -> None:
    given = hold(bench.store, Mode.PAUSED, by="ann", now=now())
    bench.add(b"picture")

    async def main() -> Any:
        return await batcher().run_once(asyncio.Event())

    report = asyncio.run(asyncio.wait_for(main(), 60))

    assert (report.done, report.left) == (0, {MODEL: (1, given.notice)})


def test_a_request_that_waits_says_who_paused_the_work(bench: Any, batcher: Any) -> None:
    given = hold(bench.store, Mode.PAUSED, by="ann", now=now(), reason="new kernel")
    request = bench.add(b"picture")

    async def main() -> Any:
        stop = asyncio.Event()
        run = asyncio.create_task(batcher().run(stop))
        await bench.until(lambda: notices(bench) != {})
        batchers = bench.store.list_batchers(seen_since=now() - timedelta(seconds=20))
        stop.set()
        await run
        return estimate(
            request, Outlook(batchers=batchers, backlog=bench.store.backlog(), pace=None, obstacle=None), now()
        )

    wait = asyncio.run(asyncio.wait_for(main(), 60))

    assert (wait.waiting_for, wait.eta_seconds) == (given.notice, None)
    assert "ann: new kernel" in wait.waiting_for


def test_a_batcher_that_pays_says_what_it_may_spend(bench: Any, batcher: Any) -> None:
    async def main() -> Any:
        stop = asyncio.Event()
        run = asyncio.create_task(batcher(executor="golem,local").run(stop))
        await bench.until(lambda: bench.store.list_batchers(seen_since=now() - timedelta(seconds=20)) != [])
        (found,) = bench.store.list_batchers(seen_since=now() - timedelta(seconds=20))
        stop.set()
        await run
        return found

    assert asyncio.run(asyncio.wait_for(main(), 60)).budget == {"day": "1"}

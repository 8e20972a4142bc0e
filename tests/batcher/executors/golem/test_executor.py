"""The golem executor on a devnet without faults."""

from __future__ import annotations

import asyncio
import math
import os
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batcher.backoff import Backoff
from batcher.errors import NoProvider
from batcher.executors import Job
from batcher.executors.fallback import FallbackExecutor
from batcher.executors.golem import executor
from batcher.executors.golem.executor import GolemExecutor
from batcher.executors.golem.job_queue import QueuedJob
from batcher.executors.golem.parts import GolemParts
from batcher.executors.golem.recovery import home_tag, is_tagged, tagged
from batcher.executors.golem.settings import GolemSettings
from batcher.executors.golem.timings import GolemTimings
from provider_image.errors import ConfigError
from store.store import Store
from tests.batcher.executors.test_fallback import Member
from tests.contexts import make_context
from tests.golem import MODEL, golem, make_executor, provider, scenario
from tests.timing import slowness, until


def test_chunks_are_answered_and_all_costs_are_in_the_ledger(tmp_path: Path, models_folder: Path) -> None:
    async def main() -> None:
        async with golem(scenario(provider("alpha"), provider("beta")), tmp_path, models_folder) as harness:
            outcomes = await harness.run("one", "two", "three", images=2)
            await harness.executor.close()

            assert [outcome.error for outcome in outcomes] == [None] * 3
            assert {outcome.provider for outcome in outcomes} <= {"alpha", "beta"}
            assert all(bill.agreement_id and bill.cost for outcome in outcomes for bill in outcome.bills)
            assert [len(outcome.bills) for outcome in outcomes] == [1] * 3
            assert harness.store.ledger.spent() == harness.paid() > 0
            assert harness.store.ledger.agreements(is_settled=False) == []
            assert [each.id for each in harness.store.ledger.allocations(is_open=True)] == []
            assert not [each for each in harness.devnet.market.agreements.values() if each.state == "Approved"]

    asyncio.run(asyncio.wait_for(main(), 300))


def test_a_worker_runs_many_chunks_and_ends_when_idle(tmp_path: Path, models_folder: Path) -> None:
    async def main() -> None:
        async with golem(scenario(provider("alpha")), tmp_path, models_folder, idle_seconds=0.5) as harness:
            outcomes = [(await harness.run(f"job{number}"))[0] for number in range(3)]
            agreements = harness.devnet.market.agreements.values
            await until(lambda: all(each.state == "Terminated" for each in agreements()))
            (again,) = await harness.run("after")

            assert len({outcome.bills[0].activity_id for outcome in outcomes}) == 1
            assert again.bills[0].activity_id != outcomes[0].bills[0].activity_id

    asyncio.run(asyncio.wait_for(main(), 300))


def test_the_provider_with_the_higher_measured_speed_gets_the_work(tmp_path: Path, models_folder: Path) -> None:
    async def main() -> None:
        plan = scenario(provider("cheap", second="0.00001"), provider("fast", second="0.00002"))
        async with golem(plan, tmp_path, models_folder, max_workers=1) as harness:
            now = datetime.now(UTC)
            for each, seconds in zip(plan.providers, (10.0, 1.0), strict=True):
                harness.store.providers.record_offer(
                    each.node_id,
                    name=each.name,
                    start_price=each.start_price,
                    price_per_cpu_second=each.price_per_cpu_second,
                    price_per_second=each.price_per_second,
                    now=now,
                )
                harness.store.providers.record_work(
                    each.node_id, model=MODEL, images=20, seconds=seconds, is_failure=False, now=now
                )

            (outcome,) = await harness.run("job")

            assert outcome.provider == "fast"

    asyncio.run(asyncio.wait_for(main(), 300))


def test_a_banned_provider_gets_no_work_until_the_operator_lifts_the_ban(tmp_path: Path, models_folder: Path) -> None:
    async def main() -> None:
        async with golem(scenario(provider("alpha")), tmp_path, models_folder) as harness:
            await harness.run("first")
            harness.store.providers.ban("alpha", until=None, reason="Too slow.", by_operator=True)
            harness.executor._refreshed_at = float("-inf")  # forces the periodic read from the store
            await until(lambda: harness.executor._parts.provider_records.banned.get(provider("alpha").node_id))
            for pool in harness.executor._pools.values():
                for worker in pool.workers:
                    worker.abort.set()
            await until(lambda: not any(pool.workers for pool in harness.executor._pools.values()))
            waiting = asyncio.create_task(harness.executor.run(harness.job("second")))
            await until(lambda: "1 banned" in str(harness.executor.unavailable_reason(MODEL)))
            harness.store.providers.unban("alpha")
            outcome = await waiting

            assert outcome.error is None

    asyncio.run(asyncio.wait_for(main(), 300))


def test_a_provider_whose_ban_ended_while_nothing_was_wanted_is_asked_as_soon_as_it_is_wanted(
    tmp_path: Path, models_folder: Path
) -> None:
    async def main() -> None:
        # Only because of the ban is the demand published again.
        timings = GolemTimings(refresh_seconds=0.1, stale_demand_backoff=Backoff(first_seconds=1e9, max_seconds=1e9))
        async with golem(scenario(provider("alpha")), tmp_path, models_folder, timings=timings) as harness:
            records = harness.executor._parts.provider_records
            alpha = provider("alpha").node_id
            await harness.run("first")
            harness.store.providers.ban("alpha", until=None, reason="Too slow.", by_operator=True)
            await until(lambda: alpha in records.banned)
            (pool,) = harness.executor._pools.values()
            for worker in pool.workers:
                worker.abort.set()
            await until(lambda: records._recent.get((MODEL, alpha), (0, None))[1] == "banned")
            harness.store.providers.unban("alpha")
            await until(lambda: alpha not in records.banned)

            (outcome,) = await harness.run("second")

            assert outcome.error is None

    asyncio.run(asyncio.wait_for(main(), 300))


def test_bans_that_a_chunk_caused_are_lifted_at_the_market_too(tmp_path: Path, store: Store) -> None:
    records = GolemParts(
        make_context(tmp_path, tmp_path, store=store), GolemSettings(), GolemTimings()
    ).provider_records

    async def main() -> None:
        outcome = asyncio.get_running_loop().create_future()
        poison = QueuedJob(job=None, outcome=outcome, failed_on={"0xa", "0xb"})  # type: ignore[arg-type]
        records.banned = {"0xa": "It failed.", "0xb": "It failed."}

        before, _ = records.take_unbanned(), records.lift_bans(poison)

        assert (before, records.take_unbanned(), records.take_unbanned()) == (False, True, False)

    asyncio.run(main())


def test_a_chunk_waits_the_whole_time_for_a_provider_after_the_last_one_is_gone(tmp_path: Path, store: Store) -> None:
    golem_executor = GolemExecutor(make_context(tmp_path, tmp_path, store=store), settings=GolemSettings())
    golem_executor._session_error = None
    workers = [SimpleNamespace(provider_id="0xa1fa")]
    golem_executor._pools[MODEL] = SimpleNamespace(workers=workers)  # type: ignore[assignment]
    job = Job(chunk_id="c", model=MODEL, items=1, chunk=tmp_path, results=tmp_path, timeout_seconds=9)

    async def main() -> None:
        waiting = QueuedJob(job=job, outcome=asyncio.get_running_loop().create_future())
        golem_executor._job_queue.put(waiting)
        waiting.waiting_since -= 301.0  # behind other chunks of the worker
        ended = []
        for happens in (lambda: None, workers.clear, lambda: vars(waiting).update(waiting_since=-math.inf)):
            happens()
            golem_executor._expire_waiting()
            ended.append(waiting.outcome.done())

        assert ended == [False, False, True]
        assert isinstance(waiting.outcome.result().error, NoProvider)

    asyncio.run(main())


def test_a_model_whose_image_is_looked_up_does_not_delay_others(
    tmp_path: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, is_asked = executor.make_payload, asyncio.Event()

    async def look_up(model: str, *arguments: Any) -> Any:
        if model == "slow":
            is_asked.set()
            await asyncio.Event().wait()
        return await plain(model, *arguments)

    monkeypatch.setattr(executor, "make_payload", look_up)

    async def main() -> None:
        async with golem(scenario(provider("alpha")), tmp_path, models_folder) as harness:
            slow = asyncio.create_task(harness.executor.run(replace(harness.job("slow"), model="slow")))
            await is_asked.wait()
            (outcome,) = await harness.run("fast")
            await harness.executor.close()

            assert outcome.error is None
            assert (await slow).is_blameless

    asyncio.run(asyncio.wait_for(main(), 300))


def test_slow_distant_providers_with_deadlines_are_served_and_keep_their_agreement(
    tmp_path: Path, models_folder: Path
) -> None:
    alpha = provider("alpha", latency_seconds=0.2, bytes_per_second=500_000.0, debit_note_seconds=0.3, threads=16)
    plan = scenario(alpha, debit_note_accept_seconds=5.0 * slowness())

    async def main() -> None:
        async with golem(plan, tmp_path, models_folder, max_workers=1) as harness:
            for number in range(3):
                (outcome,) = await harness.run(f"chunk-{number}", images=4)
                assert outcome.error is None
            (agreement,) = harness.devnet.market.agreements.values()
            notes = harness.devnet.payment.debit_notes
            await until(lambda: len(notes) > 2 and any(each.status == "ACCEPTED" for each in notes.values()))
            assert agreement.state == "Approved"
            await harness.executor.close()

            assert harness.store.ledger.spent() == harness.paid() > 0

    asyncio.run(asyncio.wait_for(main(), 300))


def test_with_golem_and_local_the_local_executor_runs_what_golem_cannot(tmp_path: Path, models_folder: Path) -> None:
    async def main() -> None:
        async with golem(scenario(), tmp_path, models_folder) as harness:
            local = Member("local")
            fallback = FallbackExecutor([harness.executor, local], {"MLG_FALLBACK_SECONDS": "0.5"})

            outcome = await fallback.run(harness.job("job"))

            assert outcome.provider == "local"
            assert list(harness.executor._job_queue.queued_jobs()) == []

    asyncio.run(asyncio.wait_for(main(), 300))


@pytest.mark.parametrize(
    ("missing", "words"), [("app_key", "YAGNA_APPKEY"), ("gftp", "gftp is not on the PATH")], ids=lambda each: str(each)
)
def test_without_an_app_key_or_gftp_it_does_not_start_and_names_the_remedy(
    missing: str, words: str, tmp_path: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with golem(scenario(), tmp_path, models_folder) as harness:
            if missing == "gftp":
                monkeypatch.setenv("PATH", str(tmp_path))
            changes = {"app_key": ""} if missing == "app_key" else {}
            other = make_executor(harness.devnet, harness.store, tmp_path, models_folder, name="bbbb2222", **changes)

            with pytest.raises(ConfigError, match=words):
                await other.start()
            await other.close()

    asyncio.run(asyncio.wait_for(main(), 300))


def test_a_home_keeps_its_tag_and_its_allocations_are_recognised_by_their_last_digits(tmp_path: Path) -> None:
    tag = home_tag(tmp_path / "work" / "golem-home")

    amount = tagged(Decimal("1.5"), tag)

    assert home_tag(tmp_path / "work" / "golem-home") == tag
    assert 0 < amount - Decimal("1.5") < Decimal("1e-11")
    assert is_tagged(amount, tag)
    assert not is_tagged(Decimal("1.5"), tag)
    assert not is_tagged(tagged(Decimal("1.5"), f"{int(tag, 16) + 1:x}"), tag)


def test_the_tag_of_a_home_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, synced = os.fsync, []

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((path, path.read_text() if path.is_file() else None))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    file = tmp_path / "work" / "golem-home"

    tag = home_tag(file)

    assert synced == [(file, f"{tag}\n"), (file.parent, None)]


class SlowSession:
    """A session that opens, or settles, only when a test lets it."""

    broken_reason: str | None = None

    def __init__(self, *, opens: bool) -> None:
        self.opens = opens
        self.is_settled = asyncio.Event()
        self.closed_with: list[float] = []

    def __call__(self, *_: object, **__: object) -> SlowSession:
        return self

    async def open(self, **_: object) -> None:
        while not self.opens:
            await asyncio.sleep(1000)

    async def close(self, settle_seconds: float) -> None:
        self.closed_with.append(settle_seconds)
        await self.is_settled.wait()


def lone_executor(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch, session: SlowSession) -> GolemExecutor:
    """Make an executor without a daemon."""
    monkeypatch.setattr(executor, "Session", session)
    monkeypatch.setattr(executor.shutil, "which", lambda name: name)
    settings = GolemSettings(app_key="key", budget_total=Decimal("0.1"), settle_seconds=600.0)
    return GolemExecutor(make_context(folder / "work" / "aaaa1111", folder, store=store), settings=settings)


def test_a_batcher_without_budget_has_started_before_the_invoices_of_earlier_ones_come(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.reservations.reserve("r1", batcher_id="dead", purpose=MODEL, amount=Decimal("0.5"), now=datetime.now(UTC))
    session = SlowSession(opens=True)
    alone = lone_executor(store, tmp_path, monkeypatch, session)

    async def main() -> None:
        starting = asyncio.create_task(alone.start())
        await until(lambda: session.closed_with == [600.0])
        await starting

        assert "MLG_BUDGET_TOTAL" in str(alone.unavailable_reason(MODEL))
        session.is_settled.set()
        await alone.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_session_that_is_being_opened_when_the_executor_closes_is_closed(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = SlowSession(opens=False)
    session.is_settled.set()
    alone = lone_executor(store, tmp_path, monkeypatch, session)

    async def main() -> None:
        starting = asyncio.create_task(alone.start())
        await until(lambda: alone._sessions == 1)
        starting.cancel()
        await alone.close()

        assert session.closed_with == [600.0]

    asyncio.run(asyncio.wait_for(main(), 60))

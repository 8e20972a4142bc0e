"""Agreements that end by time or by money: renewal, kept workers, small budgets."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from batcher.errors import BudgetReached
from batcher.executors import Outcome
from batcher.executors.golem.timings import GolemTimings
from batcher.executors.golem.worker_pool import PublishedDemand, WorkerPool
from devnet.scenario import Fault, ProviderPlan
from tests.batcher.executors.golem.test_faults import SHORT, approved_providers, close
from tests.devnet.running import calls_matching
from tests.golem import MODEL, GolemHarness, golem, provider, scenario
from tests.timing import until, wait_until


def pools(harness: GolemHarness) -> list[WorkerPool]:
    return list(harness.executor._pools.values())


async def renew_during_chunks(harness: GolemHarness) -> None:
    """Let the time for a renewal come whenever a worker of the current demand runs a chunk."""

    def demands_with_work() -> list[PublishedDemand]:
        workers = [worker for pool in pools(harness) for worker in pool.current_workers()]
        return [worker.demand for worker in workers if worker.queued_job is not None]

    renewed = []
    while True:
        await until(lambda: [each for each in demands_with_work() if each not in renewed])
        for demand in {*demands_with_work()} - {*renewed}:
            demand._expires -= harness.executor._settings.rental_seconds
            renewed.append(demand)


def test_renewal_interrupts_no_chunk_and_leaves_no_agreement(tmp_path: Path, models_folder: Path) -> None:
    async def main() -> None:
        plan = scenario(*(provider(name, speed=0.5) for name in ("alpha", "beta", "gamma")))
        settings = {"max_workers": 2, "idle_seconds": 60.0}
        async with golem(plan, tmp_path, models_folder, timings=SHORT, **settings) as harness:
            renewing = asyncio.create_task(renew_during_chunks(harness))
            outcomes: list[Outcome] = []
            agreements: set[str] = set()
            while len(agreements) < 4:
                outcomes += await harness.run(*(f"chunk{len(outcomes) + number}" for number in range(4)))
                agreements |= {bill.agreement_id for each in outcomes for bill in each.bills}
            renewing.cancel()
            await close(harness)

            assert {each.error for each in outcomes} == {None}
            assert {len(each.bills) for each in outcomes} == {1}, "each was begun once"
            assert len(calls_matching(harness.devnet, "POST /market-api/v1/demands")) > 1
            assert {each.ban_reason for each in harness.store.providers.list()} == {None}

    asyncio.run(asyncio.wait_for(main(), 300))


def test_an_agreement_made_just_before_a_renewal_lasts_for_a_start_and_a_chunk_and_five_minutes_at_least() -> None:
    timings = GolemTimings()

    lead = timings.renewal_lead(start_seconds=10.0, chunk_seconds=90.0)
    slow = timings.renewal_lead(start_seconds=900.0, chunk_seconds=90.0)

    # Providers refuse an agreement of less than five minutes.
    assert lead > 300 + 90 + timings.overtime_seconds
    assert slow > timings.start_cover(start_seconds=900.0, chunk_seconds=90.0)
    chunk_seconds = timings.chunk_timeout(items=16, size_bytes=64_000_000, images_per_second=None, max_seconds=18_000.0)
    longest = timings.renewal_lead(start_seconds=3600.0, chunk_seconds=chunk_seconds)
    assert longest < timings.max_agreement_seconds


def test_the_time_that_a_check_takes_here_is_not_held_against_the_provider(tmp_path: Path, models_folder: Path) -> None:
    async def main() -> None:
        async with golem(scenario(provider("alpha")), tmp_path, models_folder, timings=SHORT, max_workers=1) as harness:
            job = harness.job("one")

            def check(path: Path) -> int:
                (worker,) = (each for pool in pools(harness) for each in pool.workers)
                if worker._deadline is not None:
                    worker._deadline -= 1000.0  # the time of the chunk is over
                    wait_until(lambda: worker not in [each for pool in pools(harness) for each in pool.workers])
                assert job.check is not None
                return job.check(path)

            outcome = await harness.executor.run(replace(job, check=check))
            await close(harness)

            assert (outcome.error, outcome.provider) == (None, "alpha")
            assert {each.ban_reason for each in harness.store.providers.list()} == {None}

    asyncio.run(asyncio.wait_for(main(), 300))


def test_a_worker_begins_no_chunk_that_would_outlive_its_agreement(tmp_path: Path, models_folder: Path) -> None:
    async def main() -> None:
        async with golem(scenario(provider("alpha")), tmp_path, models_folder, max_workers=1) as harness:
            await harness.run("one")
            (pool,) = pools(harness)
            (worker,) = pool.workers
            assert pool._demand is not None
            pool._demand._expires -= pool._demand.seconds_left() - 20.0
            (outcome,) = await harness.run("two")
            await close(harness)

            assert (outcome.error, worker.chunks) == (None, 1)
            assert approved_providers(harness) == ["alpha", "alpha"]

    asyncio.run(asyncio.wait_for(main(), 300))


def test_a_start_that_waits_for_its_activity_ends_though_another_worker_ended_meanwhile() -> None:
    async def main() -> None:
        pool: Any = object.__new__(WorkerPool)
        pool.workers, pool._hires, pool.model, pool._background = {"ended"}, {}, MODEL, set()
        agreements = SimpleNamespace(cycle=lambda: asyncio.sleep(0))
        pool._demand = PublishedDemand(SimpleNamespace(agreements_pool=agreements), 100.0)
        is_over = asyncio.Event()

        async def start_worker(job: Any, run_worker: Any, check: Any) -> asyncio.Task[None]:
            async def work() -> None:
                pool.workers = {"new"}
                run_worker.args[1].set()
                await is_over.wait()

            return asyncio.create_task(work())

        async def reserve(offers: Any) -> Any:
            return SimpleNamespace(release=lambda: None)

        pool.session = SimpleNamespace(engine=SimpleNamespace(start_worker=start_worker))
        pool._reserve = reserve

        await asyncio.wait_for(pool._start_worker(), 60)
        is_over.set()

    asyncio.run(main())


# Budgets


def test_a_budget_below_a_start_with_a_chunk_pays_for_no_start_and_says_so(tmp_path: Path, models_folder: Path) -> None:
    async def main() -> None:
        async with golem(
            scenario(provider("alpha")),
            tmp_path,
            models_folder,
            timings=SHORT,
            budget_run=Decimal("0.011"),
            start_seconds=300.0,
        ) as harness:
            (outcome,) = await harness.run("one", timeout_seconds=120)
            reason = harness.executor.unavailable_reason(MODEL)
            await close(harness)

            assert isinstance(outcome.error, BudgetReached) and outcome.is_blameless
            assert reason == outcome.error.reason
            assert "The budget of this run is too small: the next step may cost up to 0.05" in outcome.error.reason
            assert approved_providers(harness) == []
            assert harness.store.reservations.list() == []

    asyncio.run(asyncio.wait_for(main(), 300))


def dear(name: str, *faults: Fault, **fields: Any) -> ProviderPlan:
    """Make a provider whose price per second alone counts, the same idle or busy."""
    return provider(name, *faults, start="0", second="0.001", price_per_cpu_second=Decimal(0), **fields)


#: Without tolerances, which at this price would be more than the budget.
EXACT = replace(SHORT, bill_tolerance=Decimal(1), ending_seconds=0.5, overtime_seconds=0.5, cover_seconds=2.0)


def test_a_kept_worker_ends_with_the_budget_and_is_not_started_again_without_work(
    tmp_path: Path, models_folder: Path
) -> None:
    async def main() -> None:
        # A thousand seconds of work.
        budgets = {"budget_run": Decimal(1), "budget_day": None, "max_price_hour": None}
        settings = {**budgets, "min_workers": 1, "start_seconds": 60.0}
        async with golem(scenario(dear("alpha")), tmp_path, models_folder, timings=EXACT, **settings) as harness:
            (outcome,) = await harness.run("one", timeout_seconds=250)
            (worker,) = pools(harness)[0].workers
            worker.reservation._committed_at -= 999  # as if it had idled for so long
            await until(lambda: not pools(harness)[0].workers)
            # The bill is far lower, so that there is room for another start again.
            await until(lambda: harness.store.ledger.agreements(is_settled=False) == [])
            await until(lambda: harness.executor.unavailable_reason(MODEL) is None)
            steps = harness.executor._refreshed_at
            await until(lambda: harness.executor._refreshed_at > steps)

            assert outcome.error is None
            assert approved_providers(harness) == ["alpha"]
            (next_one,) = await harness.run("two", timeout_seconds=250)
            await close(harness)

            assert next_one.error is None
            assert harness.paid() <= budgets["budget_run"]

    asyncio.run(asyncio.wait_for(main(), 300))


def test_the_minimum_of_workers_is_kept_only_for_a_time_after_the_last_work(
    tmp_path: Path, models_folder: Path
) -> None:
    async def main() -> None:
        timings = replace(SHORT, min_workers_seconds=1.0)
        settings = {"min_workers": 1, "idle_seconds": 0.1}
        async with golem(scenario(provider("alpha")), tmp_path, models_folder, timings=timings, **settings) as harness:
            (outcome,) = await harness.run("one")
            await until(lambda: not any(pool.workers for pool in pools(harness)))
            await close(harness)

            assert outcome.error is None
            assert approved_providers(harness) == ["alpha"]

    asyncio.run(asyncio.wait_for(main(), 300))


def test_what_a_start_did_not_need_is_given_back(tmp_path: Path, models_folder: Path) -> None:
    async def main() -> None:
        timings = GolemTimings(cover_seconds=5.0)
        async with golem(
            scenario(provider("alpha")), tmp_path, models_folder, timings=timings, start_seconds=1000.0
        ) as harness:
            await harness.run("one", timeout_seconds=30)
            (pool,) = pools(harness)
            (worker,) = pool.workers

            assert worker.reservation.covered_seconds < 1000.0
            (reservation,) = harness.store.reservations.list(is_open=True)
            assert reservation.amount == timings.cost_limit(worker.price, worker.reservation.covered_seconds)

    asyncio.run(asyncio.wait_for(main(), 300))

"""What a worker pool reserves before it hires, and which workers it wants, with agreements that are made by hand."""

from __future__ import annotations

import asyncio
import functools
import time
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batcher.backoff import Backoff
from batcher.errors import BudgetReached
from batcher.executors import Job
from batcher.executors.golem import worker_pool
from batcher.executors.golem.executor import GolemExecutor
from batcher.executors.golem.job_queue import QueuedJob
from batcher.executors.golem.parts import GolemParts
from batcher.executors.golem.settings import GolemSettings
from batcher.executors.golem.timings import GolemTimings
from batcher.executors.golem.worker_pool import PublishedDemand, WorkerPool
from store.store import Store
from tests.contexts import make_context
from tests.timing import until

#: Without tolerances, so that amounts are easy to follow.
EXACT = GolemTimings(bill_tolerance=Decimal(1), ending_seconds=0.0, overtime_seconds=0.0)


def offer(start: str) -> dict[str, Any]:
    """Make an offer of a start price and 0.01 GLM a second."""
    return {
        "golem.com.pricing.model": "linear",
        "golem.com.usage.vector": ["golem.usage.duration_sec"],
        "golem.com.pricing.model.linear.coeffs": [0.01, float(start)],
    }


def agreement(id: str, start: str) -> Any:
    raw = SimpleNamespace(
        agreement_id=id,
        offer=SimpleNamespace(properties=offer(start), provider_id="0xa1fa"),
        demand=SimpleNamespace(properties={}),
        timestamp=datetime.now(UTC),
    )
    return SimpleNamespace(id=id, details=SimpleNamespace(raw_details=raw))


def offers(**starts: str) -> Any:
    """Make yapapi's pool with offers: provider -> start price."""
    buffered = {name: SimpleNamespace(proposal=SimpleNamespace(props=offer(start))) for name, start in starts.items()}
    return SimpleNamespace(_offer_buffer=buffered, _agreements={})


@pytest.fixture
def parts(store: Store, tmp_path: Path) -> GolemParts:
    context = make_context(tmp_path / "work", tmp_path / "models", store=store)
    return GolemParts(context, GolemSettings(budget_day=Decimal(1), start_seconds=10.0), EXACT)


async def make_pool(parts: GolemParts, model: str = "resnet50") -> WorkerPool:
    parts.ledger_writer.start()
    await parts.money.start()
    session: Any = SimpleNamespace(engine=None, allocation_id="al1")
    pool = WorkerPool(parts, session, model=model, payload=None)
    pool._demand = PublishedDemand(SimpleNamespace(id="d1", agreements_pool=offers()), 1000.0)
    return pool


def test_the_dearest_affordable_offer_is_reserved_and_dearer_ones_are_removed(parts: GolemParts, store: Store) -> None:
    async def main() -> None:
        pool = await make_pool(parts)
        buffered = offers(cheap="0.1", middle="0.3", dear="2")

        reservation = await pool._reserve(buffered)
        await parts.ledger_writer.close()

        assert reservation is not None and reservation.amount == Decimal("0.4")
        assert set(buffered._offer_buffer) == {"cheap", "middle"}
        assert [each.amount for each in store.reservations.list()] == [Decimal("0.4")]

    asyncio.run(main())


def test_if_even_the_cheapest_offer_is_above_the_budget_nothing_is_reserved_and_the_reason_is_known(
    parts: GolemParts, store: Store
) -> None:
    async def main() -> None:
        pool = await make_pool(parts)
        buffered = offers(dear="0.95", dearer="2")

        reservation = await pool._reserve(buffered)
        await parts.ledger_writer.close()

        assert (reservation, buffered._offer_buffer, store.reservations.list()) == (None, {}, [])
        assert "may cost up to 1.05 GLM" in str(parts.money.unavailable_reason("resnet50"))

    asyncio.run(main())


async def reserve(pool: WorkerPool, buffered: Any) -> None:
    """Reserve for an agreement that this task makes."""
    hire = await pool._reserve(buffered)
    assert hire is not None
    pool._hires[asyncio.current_task()] = hire


def queue_job(
    parts: GolemParts, folder: Path, *, items: int = 16, timeout_seconds: float = 60.0, model: str = "resnet50"
) -> QueuedJob:
    chunk = folder / "chunk.zip"
    chunk.touch()
    job = Job(
        chunk_id="one",
        model=model,
        items=items,
        chunk=chunk,
        results=folder / "results",
        timeout_seconds=timeout_seconds,
    )
    queued_job = QueuedJob(job=job, outcome=asyncio.get_running_loop().create_future())
    parts.job_queue.put(queued_job)
    return queued_job


@pytest.mark.parametrize(("speed", "seconds"), [(None, 60.0), (4.0, 50.0)])
def test_a_start_is_reserved_together_with_the_longest_chunk_that_waits(
    speed: float | None, seconds: float, parts: GolemParts, tmp_path: Path
) -> None:
    async def main() -> None:
        pool = await make_pool(parts)
        if speed is not None:
            parts.provider_records.speeds["resnet50"]["cheap"] = speed
        queue_job(parts, tmp_path, items=1)
        queue_job(parts, tmp_path)

        reservation = await pool._reserve(offers(cheap="0.1"))
        await parts.ledger_writer.close()

        # Where the speed is known: 30 s and five times 16 / 4 s.
        assert reservation is not None and reservation.amount == Decimal("0.1") + Decimal("0.01") * int(10 + seconds)

    asyncio.run(main())


def test_chunks_whose_first_start_the_budget_does_not_allow_end_with_the_reason_and_without_an_agreement(
    parts: GolemParts, tmp_path: Path, store: Store
) -> None:
    async def main() -> None:
        pool = await make_pool(parts)
        waiting = queue_job(parts, tmp_path, timeout_seconds=100.0)

        # Its first minute would be affordable.
        reservation = await pool._reserve(offers(cheap="0.1"))
        outcome = await waiting.outcome
        await parts.ledger_writer.close()

        assert (reservation, store.reservations.list()) == (None, [])
        assert outcome.is_blameless and isinstance(outcome.error, BudgetReached)
        assert outcome.error.reason == (
            "The budget of the day is too small: the next step may cost up to 1.2 GLM, and the limit is 1 GLM. Raise "
            "MLG_BUDGET_DAY; lower values of MLG_GOLEM_START_SECONDS and MLG_CHUNK_TIMEOUT_SECONDS make a step cheaper."
        )

    asyncio.run(main())


def test_a_model_that_costs_too_much_does_not_stop_the_others(parts: GolemParts, tmp_path: Path) -> None:
    async def main() -> None:
        pool = await make_pool(parts)
        queue_job(parts, tmp_path, timeout_seconds=100.0)
        other = queue_job(parts, tmp_path, timeout_seconds=10.0, model="vgg16")

        await pool._reserve(offers(cheap="0.1"))
        await parts.ledger_writer.close()

        assert parts.money.unavailable_reason("resnet50") is not None
        assert parts.money.unavailable_reason("vgg16") is None
        assert parts.job_queue.queued_jobs() == [other]

    asyncio.run(main())


class HandMadeWorker:
    """A worker that does nothing. :param demand: its agreement expires with that."""

    def __init__(self, model: str, demand: object, *, is_busy: bool, is_starting: bool = False) -> None:
        self.model, self.demand = model, demand
        self.queued_job = object() if is_busy else None
        self.is_stopping, self._is_starting = False, is_starting

    def is_idle(self) -> bool:
        return self.queued_job is None and not self._is_starting


async def two_models(
    parts: GolemParts, *, is_starting: bool = False, **settings: int
) -> tuple[GolemExecutor, WorkerPool, WorkerPool]:
    """Make an executor of two models whose pools have a worker at once whenever they may start one.

    :param is_starting: whether these workers never get ready.
    """

    async def start_worker(pool: WorkerPool) -> None:
        new: Any = HandMadeWorker(pool.model, pool._demand, is_busy=not is_starting, is_starting=is_starting)
        pool.workers.add(new)

    parts.settings = replace(parts.settings, **settings)  # type: ignore[arg-type]
    executor = GolemExecutor(parts.context, settings=parts.settings)
    executor._parts, executor._job_queue = parts, parts.job_queue
    pools = [await make_pool(parts, model) for model in ("resnet50", "vgg16")]
    executor._pools = {pool.model: pool for pool in pools}
    for pool in pools:
        pool._search_task = asyncio.create_task(asyncio.sleep(1000))
        pool._has_offers = lambda *_: True  # type: ignore[method-assign]
        pool._start_worker = functools.partial(start_worker, pool)  # type: ignore[method-assign]
    return executor, *pools


async def steps(executor: GolemExecutor) -> set[int]:
    """Run some steps. :return: how many workers there were after each."""
    found = set()
    for _ in range(10):
        await executor._step_pools(next(iter(executor._pools.values())).session)
        await asyncio.sleep(0)
        found.add(sum(len(pool.workers) for pool in executor._pools.values()))
    return found


@pytest.mark.parametrize("is_busy", [True, False])
def test_while_one_model_renews_its_agreements_another_does_not_exceed_the_maximum_of_workers(
    is_busy: bool, parts: GolemParts, tmp_path: Path
) -> None:
    async def main() -> None:
        executor, renewing, other = await two_models(parts, max_workers=2)
        old: Any = [HandMadeWorker("resnet50", PublishedDemand(None, 60.0), is_busy=is_busy) for _ in range(2)]
        renewing.workers.update(old)
        for _ in range(4):
            queue_job(parts, tmp_path, model="vgg16")

        counts = await steps(executor)
        stopping = [each for each in old if each.is_stopping]
        renewing.workers.difference_update(stopping)
        counts |= await steps(executor)
        await parts.ledger_writer.close()

        assert (max(counts), len(stopping)) == (2, 1)
        assert (len(renewing.workers), len(other.workers)) == (1, 1)
        assert sum(each.is_stopping for each in old) == (1 if is_busy else 2), "an idle one is no longer needed"

    asyncio.run(main())


def test_no_more_workers_start_than_chunks_wait(parts: GolemParts, tmp_path: Path) -> None:
    async def main() -> None:
        executor, pool, _ = await two_models(parts, is_starting=True, max_workers=8)
        for _ in range(2):
            queue_job(parts, tmp_path)

        counts = await steps(executor)
        await parts.ledger_writer.close()

        assert (max(counts), len(pool.workers)) == (2, 2)

    asyncio.run(main())


def test_offers_are_collected_until_none_comes_for_a_while_and_enough_are_there(parts: GolemParts) -> None:
    async def main() -> None:
        pool = await make_pool(parts)
        pool._timings = replace(EXACT, collect_offers_seconds=1.0, quiet_offers_seconds=0.25)
        buffered = pool._agreements_pool._offer_buffer
        pool._first_offer, found = 10.0, []
        for now, newest, names in [(10.1, 10.0, "a"), (10.3, 10.0, "a"), (10.5, 10.4, "ab"), (10.7, 10.4, "ab")]:
            pool._newest_offer = newest
            buffered.update(dict.fromkeys(names))
            found.append(pool._has_offers(now, missing=2))
        pool._on_event("ProposalResponded", {"proposal": SimpleNamespace(issuer="c")})
        found.append(pool._has_offers(10.8, missing=2))
        pool._on_event("ProposalConfirmed", {"proposal": SimpleNamespace(issuer="c")})
        pool._newest_offer = 10.4
        found.append(pool._has_offers(10.8, missing=2))
        too_few = pool._has_offers(10.9, missing=8), pool._has_offers(11.1, missing=8)
        await parts.ledger_writer.close()

        assert found == [False, False, False, True, False, True], "c was awaited when the fifth was asked for"
        assert too_few == (False, True)

    asyncio.run(main())


def test_nothing_is_looked_for_before_a_chunk_waits(parts: GolemParts) -> None:
    async def main() -> None:
        executor, _, pool = await two_models(parts, min_workers=1)
        del executor._pools["vgg16"]
        executor._new_pool = lambda *_: asyncio.sleep(0, pool)  # type: ignore[method-assign, assignment, return-value]

        # The cycle asks for the capacity of every model that it may claim, again and again.
        executor.capacity("vgg16")
        await steps(executor)
        await parts.ledger_writer.close()

        assert "vgg16" not in executor._pools and not executor._opening

    asyncio.run(main())


def test_one_start_at_a_time_reserves_and_takes_an_offer(parts: GolemParts, store: Store) -> None:
    async def main() -> None:
        pool, may_take = await make_pool(parts), asyncio.Event()
        pool._timings = replace(EXACT, collect_offers_seconds=0.0)
        pool._search_task = asyncio.create_task(asyncio.sleep(1000))
        found = pool._agreements_pool
        found._offer_buffer.update(offers(one="0.1", other="0.1")._offer_buffer)
        found.cycle = found.terminate_all = lambda **_: asyncio.sleep(0)

        async def start_worker(*_: Any) -> None:
            await may_take.wait()
            found._offer_buffer.popitem()
            pool._on_event("OfferTaken", {})
            await asyncio.sleep(1000)  # the provider takes its time to sign

        pool.session.engine = SimpleNamespace(start_worker=start_worker)

        async def reserved_for(count: int) -> int:
            """Return for how many starts money is reserved, when it is for so many and some steps later."""

            def is_reserved() -> bool:
                pool.step(4, may_start=True)
                return len(store.reservations.list()) >= count

            await until(is_reserved)
            for _ in range(5):
                pool.step(4, may_start=True)
                await asyncio.sleep(0.02)
            return len(store.reservations.list())

        before = await reserved_for(1)
        may_take.set()
        after = await reserved_for(2)
        pool._demand.job.finished = asyncio.Event()  # type: ignore[union-attr]
        await pool.close(0.0)
        await parts.ledger_writer.close()

        assert (before, after) == (1, 2), "the second start began before the first had taken its offer"

    asyncio.run(main())


def test_ban_that_is_not_yet_written_is_not_forgotten_when_bans_are_read(parts: GolemParts, store: Store) -> None:
    async def main() -> None:
        records = parts.provider_records
        records.record_offer("0xa1fa", offer("0.1"))
        records.record_overbilling("0xa1fa", "It charged too much.")  # the writer has not begun

        records.refresh()
        before = list(records.banned)
        parts.ledger_writer.start()
        await until(lambda: store.providers.banned(datetime.now(UTC)))
        await until(lambda: not records._unwritten_bans)
        records.refresh()
        written = list(records.banned)
        store.providers.unban("0xa1fa", by_operator=True)
        records.refresh()
        await parts.ledger_writer.close()

        assert (before, written, records.banned) == (["0xa1fa"], ["0xa1fa"], {})

    asyncio.run(main())


def test_a_kept_minimum_of_one_model_gives_way_to_the_work_of_another(parts: GolemParts, tmp_path: Path) -> None:
    async def main() -> None:
        executor, kept, other = await two_models(parts, max_workers=1, min_workers=1)
        idle: Any = HandMadeWorker("resnet50", kept._demand, is_busy=False)
        kept.workers.add(idle)
        queue_job(parts, tmp_path, model="vgg16")

        await steps(executor)
        is_stopping = idle.is_stopping
        kept.workers.discard(idle)
        await steps(executor)
        await parts.ledger_writer.close()

        assert (is_stopping, len(kept.workers), len(other.workers)) == (True, 0, 1)

    asyncio.run(main())


def test_an_agreement_commits_its_own_price_and_may_then_have_an_activity(parts: GolemParts, store: Store) -> None:
    async def main() -> None:
        pool = await make_pool(parts)
        await reserve(pool, offers(cheap="0.1", middle="0.3"))

        pool._commit(agreement("a1", "0.1"))
        pool._check_commitment(SimpleNamespace(id="a1"))
        await parts.ledger_writer.close()

        assert pool._hires == {}
        assert [(each.agreement_id, each.amount) for each in store.reservations.list()] == [("a1", Decimal("0.2"))]

    asyncio.run(main())


def test_an_agreement_that_the_daemon_does_not_end_is_ended_as_soon_as_it_does(
    parts: GolemParts, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([OSError("the daemon is busy")] * 9)

    async def end(*_: object) -> None:
        for failure in failures:
            raise failure

    monkeypatch.setattr(worker_pool, "end_agreement", end)

    async def main() -> None:
        pool = await make_pool(parts)
        pool._timings = replace(EXACT, terminate_backoff=Backoff(first_seconds=0.001, max_seconds=0.001))
        await reserve(pool, offers(cheap="0.1"))
        pool._commit(agreement("a1", "0.1"))

        pool._terminate_with_retries("a1")
        await asyncio.gather(*pool._background)
        await parts.ledger_writer.close()

        assert store.ledger.agreements(is_open=True) == []

    asyncio.run(main())


def test_an_agreement_that_is_dearer_than_what_was_reserved_gets_no_activity(parts: GolemParts, store: Store) -> None:
    async def main() -> None:
        pool = await make_pool(parts)
        await reserve(pool, offers(cheap="0.1"))

        pool._commit(agreement("a1", "0.3"))
        with pytest.raises(BudgetReached, match="More would be owed"):
            pool._check_commitment(SimpleNamespace(id="a1"))
        (unused,) = pool._hires.values()
        unused.release()
        await parts.ledger_writer.close()

        assert [each.id for each in store.ledger.agreements()] == ["a1"], "it is known, so that its bill is"
        # Its start may be billed; the seconds of a start and a chunk are not.
        assert [(each.agreement_id, each.amount) for each in store.reservations.list()] == [("a1", Decimal("0.3"))]

    asyncio.run(main())


def test_a_demand_is_published_again_only_when_nothing_is_negotiated_and_less_often_each_time(
    parts: GolemParts,
) -> None:
    async def main() -> None:
        pool = await make_pool(parts)
        pool._timings = replace(EXACT, stale_demand_backoff=Backoff(first_seconds=20.0, max_seconds=120.0))
        restarts = []

        def step(quiet_seconds: float, negotiated_seconds: float = float("inf")) -> bool:
            """Make a step after nothing happened for so long. :return: whether the demand was published again."""
            pool._search_task = asyncio.create_task(asyncio.sleep(1000))
            pool._wanted_since = time.monotonic() - quiet_seconds
            pool._negotiated_at = time.monotonic() - negotiated_seconds
            pool.step(1, may_start=True)
            return bool(pool._search_task.cancelling())

        assert not step(19)
        assert not step(60, negotiated_seconds=10)
        for seconds in (21, 41, 81, 121, 121):
            restarts.append((step(seconds - 2), step(seconds)))
        assert restarts == [(False, True)] * 5
        pool._on_event("AgreementConfirmed", {"agreement": agreement("a1", "0.1")})
        assert step(21)
        await parts.ledger_writer.close()

    asyncio.run(main())

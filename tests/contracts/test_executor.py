"""The contract of Executor. A new executor adds a function to `BACKENDS` and a row to `EXPECTED`, not tests."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from batcher.executors import Executor, Job, Outcome, load_executor
from provider_image.chunk import ChunkItem, read_results, write_chunk
from provider_image.errors import ChunkTimeout, MalformedChunk, MlgError, WorkerDied
from tests.contexts import make_context
from tests.decode_gate import DECODE_GATE
from tests.golem import devnet_and_store, make_executor, provider, scenario
from tests.process_tree import is_alive
from tests.timing import slowness, until

MODEL = "efficientnet_lite0"
WORKERS = 2


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Details of outcomes in which executors may differ."""

    #: Prefixes of the names of its workers.
    providers: tuple[str, ...]
    #: The error for a chunk file that cannot be read; a remote worker reports less detail.
    malformed: type[MlgError]
    #: A word of the reason when a worker was killed.
    killed: str
    #: Whether attempts cost money.
    is_billed: bool = False


EXPECTED = {
    "local": Expected(providers=("local",), malformed=MalformedChunk, killed="SIGKILL"),
    "local,local": Expected(providers=("local",), malformed=MalformedChunk, killed="SIGKILL"),
    "golem": Expected(providers=("alpha", "beta"), malformed=WorkerDied, killed="provider", is_billed=True),
}


class ExecutorHarness:
    """An executor, and a folder to make jobs in."""

    def __init__(self, executor: Executor, folder: Path, work: Path) -> None:
        self.executor = executor
        self.folder = folder
        #: The executor's own folder.
        self.work = work
        self.expected = EXPECTED[executor.name]

    def job(self, name: str, *, images: int = 1, timeout_seconds: float = 120, is_held: bool = False) -> Job:
        data = small_image() + (b"HOLD:" + os.fsencode(self.gate(name)) if is_held else b"")
        chunk = self.folder / f"{name}.chunk.zip"
        items = [ChunkItem(number=number, inputs={"image": data}) for number in range(images)]
        write_chunk(chunk, name, "classification", MODEL, None, items)
        return Job(
            chunk_id=name,
            model=MODEL,
            items=images,
            chunk=chunk,
            results=self.folder / f"{name}.results.zip",
            timeout_seconds=timeout_seconds,
        )

    def gate(self, name: str) -> Path:
        return self.folder / f"{name}.gate"

    def open(self, name: str) -> None:
        self.gate(name).touch()

    async def begun(self, name: str) -> int:
        """Wait until a held job runs, and return the id of its process."""
        path = self.gate(name).with_suffix(".begun")
        await until(path.exists)
        return int(path.read_text())

    async def assert_works(self, name: str = "next") -> None:
        job = self.job(name)
        outcome = await self.executor.run(job)
        assert outcome.error is None
        assert read_results(job.results, name, MODEL, [0]).items[0].error is None


def small_image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 24), (200, 120, 40)).save(file, "PNG")
    return file.getvalue()


@contextlib.asynccontextmanager
async def local(folder: Path, models: Path, environment: dict[str, str]) -> AsyncIterator[ExecutorHarness]:
    context = make_context(folder / "work", models, MLG_WORKERS=str(WORKERS), **environment)
    yield ExecutorHarness(load_executor("local", context), folder / "jobs", context.work)


@contextlib.asynccontextmanager
async def fallback(folder: Path, models: Path, environment: dict[str, str]) -> AsyncIterator[ExecutorHarness]:
    """Two executors of one worker each: what one does not begin goes to the other."""
    context = make_context(
        folder / "work", models, MLG_WORKERS="1", MLG_FALLBACK_SECONDS=str(2 * slowness()), **environment
    )
    yield ExecutorHarness(load_executor("local,local", context), folder / "jobs", context.work)


@contextlib.asynccontextmanager
async def golem(folder: Path, models: Path, environment: dict[str, str]) -> AsyncIterator[ExecutorHarness]:
    """One attempt, so that a failure is the outcome; a short ban, so that the provider works again soon."""
    plan = scenario(*(provider(name) for name in EXPECTED["golem"].providers[:WORKERS]))
    async with devnet_and_store(plan, folder, models, environment=environment) as (devnet, store):
        settings = {"max_workers": WORKERS, "attempts": 1, "ban_seconds": 1.0}
        executor = make_executor(devnet, store, folder, models, **settings)
        yield ExecutorHarness(executor, folder / "jobs", folder / "work" / "aaaa1111")


BACKENDS = {"local": local, "fallback": fallback, "golem": golem}


@pytest.fixture(params=BACKENDS)
def harness(
    request: pytest.FixtureRequest, tmp_path: Path, models_folder: Path
) -> Callable[[Callable[[ExecutorHarness], Coroutine[Any, Any, None]]], None]:
    """Run a test body with a started executor, and close it afterwards."""
    plugin = tmp_path / "plugin"
    plugin.mkdir()
    (tmp_path / "jobs").mkdir()
    (plugin / "sitecustomize.py").write_text(DECODE_GATE)

    def run(body: Callable[[ExecutorHarness], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            async with BACKENDS[request.param](tmp_path, models_folder, {"PYTHONPATH": str(plugin)}) as made:
                await made.executor.start()
                try:
                    await asyncio.wait_for(body(made), 300)
                finally:
                    await made.executor.close()

        asyncio.run(main())

    return run


def test_a_chunk_is_answered(harness: Any) -> None:
    async def body(harness: ExecutorHarness) -> None:
        job = harness.job("chunk", images=3)

        outcome = await harness.executor.run(job)

        assert (outcome.error, outcome.is_blameless) == (None, False)
        assert outcome.provider is not None and outcome.provider.startswith(harness.expected.providers)
        assert outcome.seconds > 0
        assert [bill.provider for bill in outcome.bills] == [outcome.provider] * harness.expected.is_billed
        assert all(bill.cost > 0 and bill.seconds == outcome.seconds for bill in outcome.bills)
        results = read_results(job.results, "chunk", MODEL, range(3))
        assert [len(item.output) for item in results.items] == [20, 20, 20]

    harness(body)


def test_as_many_jobs_as_workers_run_in_parallel_and_the_rest_of_the_capacity_is_queued(harness: Any) -> None:
    async def body(harness: ExecutorHarness) -> None:
        names = [f"job{number}" for number in range(harness.executor.capacity(MODEL))]

        runs = [asyncio.create_task(harness.executor.run(harness.job(name, is_held=True))) for name in names]
        pids = {await harness.begun(name) for name in names[: harness.executor.workers()]}
        for name in names:
            harness.open(name)
        outcomes = await asyncio.gather(*runs)

        assert len(pids) == WORKERS, "each worker runs its part of them"
        assert [outcome.error for outcome in outcomes] == [None] * len(names)

    harness(body)


def test_a_malformed_chunk_file_is_an_error_and_the_next_job_works(harness: Any) -> None:
    async def body(harness: ExecutorHarness) -> None:
        job = harness.job("broken")
        job.chunk.write_bytes(b"PK\x03\x04 not a zip at all")

        outcome = await harness.executor.run(job)

        assert isinstance(outcome.error, harness.expected.malformed)
        assert not outcome.is_blameless
        await harness.assert_works()

    harness(body)


def test_a_worker_killed_during_a_job_fails_only_that_job(harness: Any) -> None:
    async def body(harness: ExecutorHarness) -> None:
        run = asyncio.create_task(harness.executor.run(harness.job("killed", is_held=True)))
        os.kill(await harness.begun("killed"), signal.SIGKILL)
        outcome = await run

        assert isinstance(outcome.error, WorkerDied)
        assert harness.expected.killed in outcome.error.reason
        assert len(outcome.bills) == harness.expected.is_billed, "a failed attempt is billed too"
        assert not outcome.is_blameless
        for number in range(2 * WORKERS):
            await harness.assert_works(f"next{number}")

    harness(body)


def test_a_job_over_its_timeout_is_stopped_and_the_next_job_works(harness: Any) -> None:
    async def body(harness: ExecutorHarness) -> None:
        await harness.assert_works("first")  # so that the timeout does not include the start

        job = harness.job("slow", is_held=True, timeout_seconds=2 * slowness())
        run = asyncio.create_task(harness.executor.run(job))
        pid = await harness.begun("slow")
        outcome = await run

        assert isinstance(outcome.error, ChunkTimeout)
        await until(lambda: not is_alive(pid))
        await harness.assert_works()

    harness(body)


def test_cancelling_a_run_stops_the_work_and_the_next_job_works(harness: Any) -> None:
    async def body(harness: ExecutorHarness) -> None:
        run = asyncio.create_task(harness.executor.run(harness.job("unwanted", is_held=True)))
        pid = await harness.begun("unwanted")

        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run

        await until(lambda: not is_alive(pid))
        await harness.assert_works()

    harness(body)


def test_it_knows_its_limits_and_whom_it_trusts(harness: Any) -> None:
    async def body(harness: ExecutorHarness) -> None:
        executor = harness.executor

        assert executor.capacity(MODEL) >= executor.workers() >= WORKERS
        assert executor.unavailable_reason(MODEL) is None
        assert executor.is_remote != executor.is_trusted, "strangers get no originals, and are not believed"

    harness(body)


def test_closing_leaves_no_process_and_no_file_and_blames_no_item(harness: Any) -> None:
    async def body(harness: ExecutorHarness) -> None:
        jobs = [harness.job(f"job{number}", is_held=True) for number in range(harness.executor.capacity(MODEL))]
        runs = [asyncio.create_task(harness.executor.run(job)) for job in jobs]
        pids = [await harness.begun(f"job{number}") for number in range(harness.executor.workers())]

        started_at = time.monotonic()
        await harness.executor.close()
        seconds = time.monotonic() - started_at
        await harness.executor.close()
        outcomes: list[Outcome] = await asyncio.gather(*runs)
        late = await harness.executor.run(harness.job("late"))

        assert all(outcome.is_blameless and outcome.error is not None for outcome in [*outcomes, late])
        assert not any(is_alive(pid) for pid in pids)
        assert list(harness.work.iterdir()) == []
        assert 0 < seconds < harness.executor.stop_seconds() * slowness()

    harness(body)

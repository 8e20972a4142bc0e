"""Workers that have several chunks at a time: each chunk fails only by itself."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from batcher.executors import Job
from batcher.executors import local as local_module
from batcher.executors.local import LocalExecutor, LocalSettings
from batcher.executors.worker_jobs import LocalQueuedJob, WorkerJobs
from provider_image.cores import Share
from provider_image.errors import ChunkTimeout, ConfigError, WorkerDied
from provider_image.schemas import MAX_ITEMS
from tests.contexts import make_context
from tests.timing import until


class Process:
    """A worker process whose chunks end as their names say, once the test lets them."""

    #: Those of the test, in the order of their starts.
    started: list[Process]

    def __init__(self, number: int, *_: Any) -> None:
        self.number, self.pid = number, 1
        self.sent: list[str] = []
        self.begun: list[str] = []
        #: Chunks under way, and the most of them.
        self.current = self.most = 0
        self.free = asyncio.Semaphore(2)
        self.ended = asyncio.Event()
        self.released = asyncio.Event()

    async def start(self) -> None:
        self.started.append(self)

    @property
    def has_ended(self) -> bool:
        return self.ended.is_set()

    async def wait(self) -> None:
        await self.ended.wait()

    def kill(self) -> None:
        self.ended.set()

    async def stop(self, *, is_forced: bool = False) -> None:
        self.kill()

    async def run_chunk(
        self, chunk: Path, results: Path, on_progress: Any = None, on_begin: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        if chunk.name.startswith("warm-up"):
            return {"ok": True}
        self.sent.append(chunk.name)
        async with self.free:
            if self.has_ended:
                raise WorkerDied("It died.")
            self.begun.append(chunk.name)
            self.current += 1
            self.most = max(self.most, self.current)
            try:
                if on_begin is not None:
                    on_begin()
                return await self._run(chunk)
            finally:
                self.current -= 1

    async def _run(self, chunk: Path) -> dict[str, Any]:
        died, released = (asyncio.create_task(each.wait()) for each in (self.ended, self.released))
        await asyncio.wait({died, released}, return_when=asyncio.FIRST_COMPLETED)
        for each in (died, released):
            each.cancel()
        if chunk.name == "die":
            self.kill()
            raise WorkerDied("It died.")
        if chunk.name == "hang":
            await self.ended.wait()
        else:
            await asyncio.sleep(0)  # the other chunk comes first
        if self.has_ended:
            raise WorkerDied("It died.")
        return {"ok": True}


@contextlib.asynccontextmanager
async def executor(folder: Path, monkeypatch: pytest.MonkeyPatch, *, workers: int = 1) -> AsyncIterator[LocalExecutor]:
    """Run an executor with workers of two threads, whose processes are not started."""
    monkeypatch.setattr(Process, "started", [], raising=False)
    monkeypatch.setattr(local_module, "WorkerProcess", Process)
    monkeypatch.setattr(local_module, "divide_cores", lambda processes: [Share(threads=2)] * processes)
    running = LocalExecutor(make_context(folder / "work", folder / "models", MLG_WORKERS=str(workers)))
    await running.start()
    try:
        yield running
    finally:
        await running.close()


def make_job(name: str, *, timeout_seconds: float = 300.0) -> Job:
    paths = {"chunk": Path(name), "results": Path(f"{name}-results")}
    return Job(chunk_id=name, model="m", items=1, timeout_seconds=timeout_seconds, **paths)


@pytest.mark.parametrize("other", ["die", "hang", "cancelled"])
def test_chunk_beside_one_that_ends_the_worker_is_run_again_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    async def main() -> None:
        async with executor(tmp_path, monkeypatch) as running:
            good = asyncio.create_task(running.run(make_job("good")))
            bad = asyncio.create_task(running.run(make_job(other, timeout_seconds=0.2 if other == "hang" else 300)))
            await until(lambda: bool(Process.started) and set(Process.started[0].begun) == {"good", other})
            if other == "cancelled":
                bad.cancel()
            elif other == "die":
                Process.started[0].released.set()
            while not (good.done() and bad.done()):
                for each in Process.started[1:]:
                    each.released.set()
                await asyncio.sleep(0.01)

            assert (await good).error is None
            if other != "cancelled":
                outcome = await bad
                assert isinstance(outcome.error, WorkerDied if other == "die" else ChunkTimeout)
                assert not outcome.is_blameless
                assert sum(other in each.begun for each in Process.started) == 2
            assert Process.started[0].most == 2
            assert max(each.most for each in Process.started[1:]) == 1

    asyncio.run(main())


def test_chunk_that_must_be_alone_is_not_run_beside_another() -> None:
    async def main() -> None:
        jobs = WorkerJobs(2)
        first, second = (
            LocalQueuedJob(job=make_job(name), outcome=asyncio.get_running_loop().create_future()) for name in "ab"
        )
        second.must_be_alone = True

        jobs.add(first, 0.0)
        assert not jobs.may_take(second)
        jobs.remove(first, 1.0)
        assert jobs.may_take(second)
        jobs.add(second, 2.0)

        assert not jobs.may_take(first)
        assert not first.was_shared and not second.was_shared

    asyncio.run(main())


@pytest.mark.parametrize("slots", [1, 2])
def test_worker_gets_a_chunk_ahead_when_it_has_begun_those_that_it_runs(slots: int) -> None:
    async def main() -> None:
        jobs = WorkerJobs(slots)
        *running, ahead = (
            LocalQueuedJob(job=make_job(str(number)), outcome=asyncio.get_running_loop().create_future())
            for number in range(slots + 1)
        )
        for each in running:
            assert jobs.may_take(each)
            jobs.add(each, 0.0)

        for each in running:
            assert not jobs.may_take(ahead)
            jobs.begin(each, 1.0)

        assert jobs.may_take(ahead)

    asyncio.run(main())


def test_time_of_a_chunk_begins_when_those_before_it_have_ended() -> None:
    async def main() -> None:
        jobs = WorkerJobs(2)
        first, second, third = (
            LocalQueuedJob(job=make_job(name), outcome=asyncio.get_running_loop().create_future()) for name in "abc"
        )
        for now, each in enumerate((first, second, third)):
            jobs.add(each, float(now))
        # The worker should begin two of them; if it does not, that is noticed too.
        assert (first.started_at, second.started_at, third.started_at) == (0.0, 1.0, math.inf)
        jobs.begin(first, 3.0)
        jobs.begin(second, 4.0)
        jobs.begin(third, 5.0)

        jobs.remove(second, 10.0)

        assert (first.started_at, third.started_at) == (3.0, 10.0)
        assert first.was_shared and third.was_shared and not first.has_ended

    asyncio.run(main())


def test_only_job_is_left_to_the_worker_that_got_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with executor(tmp_path, monkeypatch, workers=2) as running:
            await until(lambda: len(running._worker_jobs) == 2)
            for each in Process.started:
                await each.free.acquire()
                await each.free.acquire()  # what it gets, it does not begin yet
            task = asyncio.create_task(running.run(make_job("one")))
            await until(lambda: any(each.sent for each in Process.started))
            for _ in range(50):
                await asyncio.sleep(0)
            assert sorted(each.sent for each in Process.started) == [[], ["one"]]
            for each in Process.started:
                each.released.set()
                each.free.release()
            assert (await task).error is None

    asyncio.run(main())


def test_idle_worker_takes_a_chunk_before_one_that_has_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with executor(tmp_path, monkeypatch, workers=2) as running:
            await until(lambda: len(running._worker_jobs) == 2)
            tasks = [asyncio.create_task(running.run(make_job(f"job-{number}"))) for number in range(4)]
            await until(lambda: sum(each.current for each in Process.started) == 4)
            assert [each.most for each in Process.started] == [2, 2]
            first_two = {each.begun[0] for each in Process.started}
            for each in Process.started:
                each.released.set()
            await asyncio.gather(*tasks)
            assert first_two == {"job-0", "job-1"}

    asyncio.run(main())


def test_each_gpu_has_a_worker_with_enough_chunks_to_fill_its_batches(tmp_path: Path) -> None:
    variables = {"MLG_WORKERS": "7", "MLG_BATCH_ITEMS": "64", "MLG_DEVICE": "cuda:0, CUDA:1"}

    running = LocalExecutor(make_context(tmp_path, tmp_path, **variables))

    assert LocalSettings.from_env(variables).gpus == ["cuda:0", "cuda:1"]
    assert running.workers() * MAX_ITEMS >= 2 * 2 * 64
    assert running.workers() % 2 == 0


@pytest.mark.parametrize("text", ["gpu", "cuda", "cuda:x", "cpu,cuda:0", "cuda:0,cuda:0", "cuda:0,"])
def test_bad_device_names_its_variable(text: str) -> None:
    with pytest.raises(ConfigError, match="MLG_DEVICE="):
        LocalSettings.from_env({"MLG_DEVICE": text})


def test_executor_does_not_start_without_the_gpu(tmp_path: Path) -> None:
    async def main() -> None:
        running = LocalExecutor(make_context(tmp_path / "work", tmp_path, MLG_DEVICE="cuda:99"))  # no machine has it
        with pytest.raises(ConfigError, match=r"cuda:99 cannot be used.*MLG_DEVICE=cpu"):
            await running.start()
        await running.close()

    asyncio.run(main())

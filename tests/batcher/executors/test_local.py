"""What is specific to the local executor: its processes start, warm up, and work from any folder."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batcher.executors import Job, Outcome
from batcher.executors import local as local_module
from batcher.executors.local import _PIXEL, LocalExecutor, LocalTimings
from batcher.executors.worker_process import WorkerProcess
from provider_image.chunk import ChunkItem, read_results, write_chunk
from provider_image.cores import Share
from provider_image.errors import ChunkError, WorkerDied
from provider_image.images.headers import media_type
from provider_image.progress import ProgressReport
from provider_image.subprocesses import child_environment
from tests.contexts import make_context
from tests.decode_gate import DECODE_GATE
from tests.extensions import FOLDER, install_extension_models
from tests.timing import until

MODEL = "efficientnet_lite0"


def job(folder: Path) -> Job:
    write_chunk(folder / "c.zip", "c", "classification", MODEL, None, [ChunkItem(number=0, inputs={"image": b"?"})])
    return Job(chunk_id="c", model=MODEL, items=1, chunk=folder / "c.zip", results=folder / "r.zip", timeout_seconds=60)


def with_plugin(folder: Path, code: str) -> dict[str, str]:
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


def test_workers_start_from_a_folder_with_another_package_named_server(
    tmp_path: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("provider_image", "server"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.chdir(tmp_path)

    async def main() -> None:
        executor = LocalExecutor(make_context(tmp_path / "work", models_folder, MLG_WORKERS="1"))
        await executor.start()
        outcome = await executor.run(job(tmp_path))
        await executor.close()
        assert outcome.error is None

    asyncio.run(main())


def test_a_worker_killed_while_idle_is_replaced(tmp_path: Path, models_folder: Path) -> None:
    async def main() -> None:
        executor = LocalExecutor(make_context(tmp_path / "work", models_folder, MLG_WORKERS="1"))
        await executor.start()
        await until(lambda: len(executor.pids()) == 1)
        (first,) = executor.pids()

        os.kill(first, signal.SIGKILL)
        await until(lambda: executor.pids() not in ([], [first]))
        outcome = await executor.run(job(tmp_path))

        await executor.close()
        assert outcome.error is None

    asyncio.run(main())


def test_jobs_fail_without_blame_if_no_worker_can_start(
    tmp_path: Path, models_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environment = with_plugin(tmp_path / "plugin", "import os, sys; print('no luck', file=sys.stderr); os._exit(3)")

    async def main() -> None:
        executor = LocalExecutor(make_context(tmp_path / "work", models_folder, MLG_WORKERS="2", **environment))
        await executor.start()
        outcome = await executor.run(job(tmp_path))
        await executor.close()
        assert isinstance(outcome.error, WorkerDied)
        assert outcome.is_blameless
        assert "status 3" in outcome.error.reason and "no luck" in outcome.error.reason

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())

    assert "worker 0: no luck" in caplog.messages


def test_long_output_on_standard_error_is_logged_and_blocks_no_pipe(
    tmp_path: Path, models_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flood = "import sys\nsys.stderr.write('x' * 3_000_000 + '\\n')\nsys.stderr.write('last line\\n')"
    environment = with_plugin(tmp_path / "plugin", flood)

    async def main() -> None:
        executor = LocalExecutor(make_context(tmp_path / "work", models_folder, MLG_WORKERS="1", **environment))
        await executor.start()
        outcome = await executor.run(job(tmp_path))
        await executor.close()
        assert outcome.error is None

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())

    assert "worker 0: last line" in caplog.messages


def test_workers_warm_up_before_the_first_job(tmp_path: Path) -> None:
    artefact = tmp_path / "models" / MODEL / "model.json"

    async def main() -> None:
        executor = LocalExecutor(make_context(tmp_path / "work", tmp_path / "models", MLG_WORKERS="1"))
        await executor.start()
        is_warm_at_start = artefact.exists()
        await until(artefact.exists)
        await executor.close()
        assert not is_warm_at_start, "the start waited for it"

    asyncio.run(main())


@pytest.mark.parametrize(("precision", "computed"), [("fastest", "f32"), ("bf16", "bf16")])  # there is no copy
def test_workers_compute_in_the_configured_precision(
    tmp_path: Path, models_folder: Path, precision: str, computed: str
) -> None:
    async def main() -> None:
        context = make_context(tmp_path / "work", models_folder, MLG_WORKERS="1", MLG_PRECISION=precision)
        executor = LocalExecutor(context)
        await executor.start()
        outcome = await executor.run(job(tmp_path))
        await executor.close()
        assert outcome.error is None

    asyncio.run(main())

    assert read_results(tmp_path / "r.zip", "c", MODEL, [0]).precision == computed


def test_a_bug_neither_ends_the_loop_of_a_worker_nor_leaves_a_job_without_outcome(
    tmp_path: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class BuggyProcess(WorkerProcess):
        starts = 0

        async def start(self) -> None:
            BuggyProcess.starts += 1
            if BuggyProcess.starts == 1:
                raise ValueError("a bug at the start")
            await super().start()

        async def stop(self, *, is_forced: bool = False) -> None:
            await super().stop(is_forced=is_forced)
            if BuggyProcess.starts == 2:
                raise ValueError("a bug at the end")

    def on_start() -> None:
        raise ValueError("a bug in a callback")

    monkeypatch.setattr("batcher.executors.local.WorkerProcess", BuggyProcess)

    async def main() -> None:
        executor = LocalExecutor(make_context(tmp_path / "work", models_folder, MLG_WORKERS="1"))
        await executor.start()
        failed = await executor.run(replace(job(tmp_path), on_start=on_start))
        outcome = await executor.run(job(tmp_path))
        await executor.close()
        assert isinstance(failed.error, ChunkError) and "a bug in a callback" in failed.error.reason
        assert outcome.error is None

    asyncio.run(main())

    assert BuggyProcess.starts == 3
    assert [record.message for record in caplog.records if record.exc_info] == [
        "worker 0 failed, it is started again",
        "worker 0 failed",
        "worker 0 failed, it is started again",
    ]


def test_a_worker_serves_though_it_could_not_warm_up(
    tmp_path: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def guess(models: Path) -> None:
        raise KeyError("a bug in another package's service")

    monkeypatch.setattr("batcher.executors.local._guess_first_model", guess)

    async def main() -> None:
        executor = LocalExecutor(make_context(tmp_path / "work", models_folder, MLG_WORKERS="1"))
        await executor.start()
        outcome = await executor.run(job(tmp_path))
        await executor.close()
        assert outcome.error is None

    asyncio.run(main())


@pytest.mark.parametrize(("chunk_timeout", "expected"), [(None, 120), ("5", 120), ("600", 600)])
def test_warming_up_may_take_as_long_as_a_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_timeout: str | None, expected: float
) -> None:
    limits = []

    @contextlib.asynccontextmanager
    async def timeout(seconds: float) -> AsyncIterator[None]:
        limits.append(seconds)
        yield

    class Process:
        number = 0

        async def run_chunk(self, chunk: Path, results: Path, on_progress: Any = None) -> dict[str, Any]:
            return {"ok": True}

    variables = {} if chunk_timeout is None else {"MLG_CHUNK_TIMEOUT_SECONDS": chunk_timeout}
    executor = LocalExecutor(make_context(tmp_path, tmp_path / "models", **variables))
    executor._folder.mkdir()
    monkeypatch.setattr("batcher.executors.local.asyncio.timeout", timeout)
    process: Any = Process()

    asyncio.run(executor._warm_up(process))

    assert limits == [expected]


def test_a_worker_sends_what_a_service_reports_before_its_reply(tmp_path: Path, photos: dict[str, bytes]) -> None:
    models = install_extension_models(tmp_path / "models")
    inputs = {"image": photos["coffee"], "style": photos["rocket"]}
    # Longer than the interval of reports, however fast the machine is.
    item = ChunkItem(number=0, inputs=inputs, params={"steps": 10, "pause": 0.15})
    write_chunk(tmp_path / "blend.zip", "c", "blend", "blend_even", None, [item])
    reports: list[ProgressReport] = []

    async def main() -> None:
        executor = LocalExecutor(make_context(tmp_path / "work", models, MLG_WORKERS="1", PYTHONPATH=str(FOLDER)))
        await executor.start()
        blend = replace(job(tmp_path), chunk=tmp_path / "blend.zip")
        outcome = await executor.run(replace(blend, on_progress=reports.append))
        silent = await executor.run(blend)
        await executor.close()
        assert (outcome.error, silent.error) == (None, None)

    asyncio.run(main())

    assert reports
    assert [report.fraction for report in reports] == sorted(report.fraction for report in reports)
    assert all(report.item == 0 and 0 < report.fraction <= 1 for report in reports)
    assert media_type(reports[0].preview or b"") == "image/jpeg"


def test_a_malformed_report_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    worker = WorkerProcess(0, tmp_path, (), {}, LocalTimings())
    reports: list[ProgressReport] = []

    for line in (b'{"progress": []}', b'{"progress": {"item": 0, "fraction": 9, "preview": null}}', b'{"progress":'):
        worker._report(line, reports.append)

    assert reports == []
    assert len(caplog.messages) == 3


class HeldJobs:
    """Jobs that a worker of one thread begins, and does not finish before they are opened."""

    def __init__(self, folder: Path, models: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
        monkeypatch.setattr(local_module, "divide_cores", lambda processes: [Share(threads=1)] * processes)
        self.folder = folder
        environment = with_plugin(folder / "plugin", DECODE_GATE)
        self.executor = LocalExecutor(make_context(folder / "work", models, MLG_WORKERS=str(workers), **environment))

    def start(self, name: str) -> asyncio.Task[Outcome]:
        image = _PIXEL + b"HOLD:" + bytes(self.folder / f"{name}.gate")
        item = ChunkItem(number=0, inputs={"image": image})
        write_chunk(self.folder / f"{name}.zip", name, "classification", MODEL, None, [item])
        each = replace(job(self.folder), chunk_id=name, chunk=self.folder / f"{name}.zip", timeout_seconds=300)
        return asyncio.create_task(self.executor.run(replace(each, results=self.folder / f"{name}.results.zip")))

    def open(self, name: str) -> None:
        (self.folder / f"{name}.gate").touch()

    def has_begun(self, name: str) -> bool:
        return (self.folder / f"{name}.begun").exists()

    async def pid(self, name: str) -> int:
        await until(lambda: self.has_begun(name))
        return int((self.folder / f"{name}.begun").read_text())

    async def sent_ahead(self) -> int:
        """Wait until a job has been sent ahead, and return the id of the process that has it."""
        number = await until(self._worker_with_more)
        pid = self.executor._workers[number - 1].pid
        assert pid is not None
        return pid

    def _worker_with_more(self) -> int:
        """Return the number of the worker that has more jobs than it runs, counted from 1; 0 if there is none."""
        each_jobs = self.executor._worker_jobs.items()
        return next((number + 1 for number, jobs in each_jobs if len(jobs) > jobs._slots), 0)


def test_a_job_that_was_sent_ahead_is_run_by_the_next_worker_if_this_one_dies(
    tmp_path: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        jobs = HeldJobs(tmp_path, models_folder, monkeypatch, workers=1)
        await jobs.executor.start()
        first, second = jobs.start("first"), jobs.start("second")
        jobs.open("second")
        pid = await jobs.pid("first")
        assert await jobs.sent_ahead() == pid

        os.kill(pid, signal.SIGKILL)
        killed, outcome = await first, await second

        await jobs.executor.close()
        assert isinstance(killed.error, WorkerDied) and not killed.is_blameless
        assert outcome.error is None

    asyncio.run(main())


def test_an_idle_worker_takes_over_a_job_that_was_sent_ahead(
    tmp_path: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        jobs = HeldJobs(tmp_path, models_folder, monkeypatch, workers=2)
        await jobs.executor.start()
        held = {name: jobs.start(name) for name in ("one", "two")}
        pids = {name: await jobs.pid(name) for name in held}
        third = jobs.start("third")
        busy = await jobs.sent_ahead()
        (other,) = (name for name, pid in pids.items() if pid != busy)

        jobs.open(other)
        pid = await jobs.pid("third")
        jobs.open("third")
        outcome = await third

        assert (outcome.error, pid) == (None, pids[other])
        assert [task.done() for name, task in held.items() if name != other] == [False]
        await jobs.executor.close()

    asyncio.run(main())


def test_a_job_that_is_cancelled_after_it_was_sent_ahead_is_left_out(
    tmp_path: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        jobs = HeldJobs(tmp_path, models_folder, monkeypatch, workers=1)
        await jobs.executor.start()
        first, unwanted = jobs.start("first"), jobs.start("unwanted")
        pid = await jobs.pid("first")
        await jobs.sent_ahead()

        unwanted.cancel()
        await asyncio.wait({unwanted})
        third = jobs.start("third")
        for name in ("first", "third"):
            jobs.open(name)
        outcomes = await first, await third

        assert [outcome.error for outcome in outcomes] == [None, None]
        assert not jobs.has_begun("unwanted")
        assert jobs.executor.pids() == [pid]
        await jobs.executor.close()

    asyncio.run(main())


def test_processes_that_see_bytes_of_strangers_get_no_secrets() -> None:
    variables = {"YAGNA_APPKEY": "secret", "MLG_API_KEY": "secret", "REGISTRY_TOKEN": "secret", "MLG_HOME": "/home"}

    assert "secret" not in child_environment(variables).values()
    assert child_environment(variables)["MLG_HOME"] == "/home"
    assert variables.items() <= child_environment(variables, has_secrets=True).items()

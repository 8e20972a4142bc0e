"""How a worker takes over the results of a chunk, and whose fault a failure is."""

from __future__ import annotations

import asyncio
import errno
import json
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batcher.errors import BudgetReached, GolemUnavailable
from batcher.executors import Job
from batcher.executors.golem.job_queue import JobQueue, QueuedJob
from batcher.executors.golem.timings import GolemTimings
from batcher.executors.golem.worker import GolemWorker, _accept_results, _classify_error
from provider_image.errors import MalformedResults


async def test_what_gftp_still_writes_after_the_check_does_not_change_the_results(tmp_path: Path) -> None:
    received, results, seen = tmp_path / "received.part", tmp_path / "results.zip", []
    with received.open("wb", buffering=0) as gftp:
        gftp.write(b"good" * 500_000)

        def check(path: Path) -> None:
            seen.append(path.read_bytes())
            gftp.seek(0)
            gftp.write(b"evil")

        job = Job(
            chunk_id="c1",
            model="vgg16",
            items=1,
            chunk=tmp_path / "chunk.zip",
            results=results,
            timeout_seconds=60,
            check=check,
        )
        _accept_results(received, QueuedJob(job=job, outcome=asyncio.get_running_loop().create_future()))
        gftp.write(b"evil")

    assert results.read_bytes() == seen[0] == b"good" * 500_000


async def test_results_that_fail_the_check_leave_nothing(tmp_path: Path) -> None:
    received = tmp_path / "received.part"
    received.write_bytes(b"bad")

    def check(path: Path) -> None:
        raise MalformedResults("It is bad.")

    job = Job(
        chunk_id="c1",
        model="vgg16",
        items=1,
        chunk=tmp_path / "chunk.zip",
        results=tmp_path / "results.zip",
        timeout_seconds=60,
        check=check,
    )
    with pytest.raises(MalformedResults):
        _accept_results(received, QueuedJob(job=job, outcome=asyncio.get_running_loop().create_future()))

    assert list(tmp_path.iterdir()) == [received]


def api_exception(status: int, message: str) -> Exception:
    """Make what yapapi raises when the daemon answers with an error."""
    error = Exception(f"({status})\nHTTP response body: {message}")
    error.status, error.body = status, json.dumps({"message": message})  # type: ignore[attr-defined]
    return error


def test_what_the_daemon_quotes_of_a_provider_is_no_failure_of_the_file_server() -> None:
    failure = _classify_error(api_exception(500, "Remote service error: gftp: no such file"), "run the chunk")

    assert not failure.is_file_server_fault
    assert _classify_error(RuntimeError("gftp ended"), "run the chunk").is_file_server_fault


@pytest.mark.parametrize(
    ("error", "is_unclear"),
    [
        (api_exception(500, "GSB error: endpoint address not found"), True),
        (api_exception(401, "no such key"), False),
        (AssertionError("Expected 0, got 5"), True),
        (AttributeError("'NoneType' object has no attribute 'lower'"), True),
        (ConnectionRefusedError("refused"), False),
        (TimeoutError(), False),
        (OSError(errno.EMFILE, "Too many open files", "/work/x.part"), False),
    ],
)
def test_a_failed_call_is_unclear_if_the_daemon_responds(error: Exception, is_unclear: bool) -> None:
    failure = _classify_error(error, "run the chunk")

    assert (failure.is_provider_fault, failure.is_unclear) == (False, is_unclear)
    assert isinstance(failure.error, GolemUnavailable)


def test_results_that_never_came_are_the_fault_of_the_provider(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "received.part").stat()

    assert _classify_error(caught.value, "run the chunk").is_provider_fault


class FakeReservation:
    """The reservation of an agreement that has used up what is reserved; counts how often it is extended."""

    def __init__(self, denial: BudgetReached | None = None) -> None:
        self.agreement, self.price = SimpleNamespace(provider_name="alpha"), SimpleNamespace()
        self.covered_seconds, self.extensions, self._denial = 0.0, 0, denial

    def seconds(self) -> float:
        return 1.0

    async def extend(self, seconds: float) -> None:
        self.extensions += 1
        if self._denial is not None:
            raise self._denial


@pytest.mark.parametrize("denial", [None, BudgetReached("It is used up.")])
async def test_money_is_reserved_while_results_are_checked_until_the_budget_denies_it(
    denial: BudgetReached | None,
) -> None:
    parts = SimpleNamespace(timings=GolemTimings(), settings=SimpleNamespace(start_seconds=10.0))
    reservation: Any = FakeReservation(denial)
    pool: Any = SimpleNamespace(model="vgg16", parts=parts)
    worker = GolemWorker(
        pool, Any, SimpleNamespace(provider_id="0xa1fa", _agreement=SimpleNamespace(id="ag1"), id="ac1"), reservation
    )
    worker.start_seconds, worker.queued_job = 1.0, Any

    worker._deadline = 1.0
    await worker._cover_idling()
    assert reservation.extensions == 0, "the chunk is reserved as a whole"
    worker._deadline = None
    await worker._cover_idling()
    await worker._cover_idling()

    assert reservation.extensions == (2 if denial is None else 1)
    assert worker.is_stopping == (denial is not None), "it takes no further chunk"
    assert not worker.abort.is_set(), "the results are still checked"


async def test_results_are_received_in_the_own_folder_whatever_the_activity_is_called(tmp_path: Path) -> None:
    (tmp_path / "chunk.zip").touch()
    job = Job(
        chunk_id="c1",
        model="vgg16",
        items=1,
        chunk=tmp_path / "chunk.zip",
        results=tmp_path / "results.zip",
        timeout_seconds=60,
    )
    job_queue, downloads = JobQueue(), list[str]()
    job_queue.put(QueuedJob(job=job, outcome=asyncio.get_running_loop().create_future()))
    parts = SimpleNamespace(
        timings=GolemTimings(),
        settings=SimpleNamespace(start_seconds=10.0, idle_seconds=10.0),
        context=SimpleNamespace(work=tmp_path / "work"),
        job_queue=job_queue,
        chunk_seconds=lambda job, speed: 60.0,
        provider_records=SimpleNamespace(speed=lambda model, provider_id: None),
    )
    script = SimpleNamespace(
        **{name: lambda *_: None for name in ("deploy", "start", "upload_file", "run")},
        download_file=lambda source, target: downloads.append(target),
        _commands=(),
    )
    activity: Any = SimpleNamespace(
        provider_id="0xa1fa",
        _agreement=SimpleNamespace(id="ag1"),
        id="/tmp/../etc/cron.d/x",
        new_script=lambda timeout: script,
    )
    pool: Any = SimpleNamespace(model="vgg16", parts=parts, release_earlier_worker=lambda: None)
    reservation: Any = FakeReservation()
    reservation.lower, reservation.price.second = (lambda seconds: None), Decimal(0)
    worker = GolemWorker(pool, SimpleNamespace(seconds_left=lambda: 1000.0), activity, reservation)  # type: ignore[arg-type]

    scripts = worker._scripts(None)
    await anext(scripts)
    await scripts.asend(None)
    await scripts.aclose()

    (target,) = downloads
    assert (Path(target).parent, Path(target).suffix) == (tmp_path / "work", ".part")

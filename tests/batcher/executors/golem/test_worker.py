"""How a worker takes over the results of a chunk, and whose fault a failure is."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
import time
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batcher.errors import BudgetReached, GolemUnavailable, UntrueResults
from batcher.executors import Job
from batcher.executors.golem.job_queue import JobQueue, QueuedJob
from batcher.executors.golem.scripts.attempt import Attempt, accept_results, own_seconds
from batcher.executors.golem.scripts.failure import AttemptFailure, classify_error
from batcher.executors.golem.timings import GolemTimings
from batcher.executors.golem.worker import GolemWorker, elapsed
from batcher.executors.golem.yapapi_adapter import import_yapapi, poll_without_pauses
from provider_image.errors import ChunkTimeout, MalformedResults
from tests.timing import DEADLINE_SECONDS, slowness


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
        accept_results(received, QueuedJob(job=job, outcome=asyncio.get_running_loop().create_future()))
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
        accept_results(received, QueuedJob(job=job, outcome=asyncio.get_running_loop().create_future()))

    assert list(tmp_path.iterdir()) == [received]


def api_exception(status: int, message: str) -> Exception:
    """Make what yapapi raises when the daemon answers with an error."""
    error = Exception(f"({status})\nHTTP response body: {message}")
    error.status, error.body = status, json.dumps({"message": message})  # type: ignore[attr-defined]
    return error


def test_what_the_daemon_quotes_of_a_provider_is_no_failure_of_the_file_server() -> None:
    failure = classify_error(api_exception(500, "Remote service error: gftp: no such file"), "run the chunk")

    assert not failure.is_file_server_fault
    assert classify_error(RuntimeError("gftp ended"), "run the chunk").is_file_server_fault


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
    failure = classify_error(error, "run the chunk")

    assert (failure.is_provider_fault, failure.is_unclear) == (False, is_unclear)
    assert isinstance(failure.error, GolemUnavailable)


def test_results_that_never_came_are_the_fault_of_the_provider(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "received.part").stat()

    assert classify_error(caught.value, "run the chunk").is_provider_fault


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
    worker.start_seconds, worker.attempts = 1.0, [Any]

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
        chunk_seconds=lambda attempts, speed: 60.0,
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


@pytest.mark.parametrize(("idle_seconds", "is_trusted"), [(200.0, True), (250.0, False)])
async def test_after_a_pause_a_chunk_is_sent_that_starts_the_warm_process_again(
    idle_seconds: float, is_trusted: bool
) -> None:
    records = SimpleNamespace(speed=lambda model, provider_id: 100.0)
    parts = SimpleNamespace(
        timings=GolemTimings(),
        settings=SimpleNamespace(start_seconds=10.0),
        job_queue=JobQueue(),
        provider_records=records,
    )
    pool: Any = SimpleNamespace(model="vgg16", parts=parts, workers=set())
    activity = SimpleNamespace(provider_id="0xa1fa", _agreement=SimpleNamespace(id="ag1"), id="ac1")
    reservation: Any = FakeReservation()
    worker = GolemWorker(pool, Any, activity, reservation)
    worker._accepts_next, worker._worked_at = True, elapsed() - idle_seconds

    await worker._take_jobs()

    assert worker._accepts_next == is_trusted


async def test_the_end_of_a_script_is_noticed_without_a_pause() -> None:
    import_yapapi()
    from yapapi.rest.activity import Activity

    ended, pauses = (
        SimpleNamespace(index=0, message=None, stdout="", stderr="", result="Ok", is_batch_finished=True),
        [],
    )
    answers = iter([[], [], [ended]])

    async def results(*_: Any, **__: Any) -> Any:
        pauses.append(time.monotonic())
        return next(answers)

    api = SimpleNamespace(call_exec=lambda *_: asyncio.sleep(0, "b1"), get_exec_batch_results=results)
    activity = poll_without_pauses(Activity(api, SimpleNamespace(), "ac1", False))

    batch = await activity.send([{"start": {}}])
    async with asyncio.timeout(60 * slowness()):
        events = [event async for event in batch]

    assert len(events) == 1
    assert len(pauses) == 3 and pauses[-1] - pauses[0] < 3.0, "yapapi's own pauses are of three seconds each"


@pytest.mark.parametrize(
    ("arrivals", "items", "seconds"),
    [
        ([3.0], [16], [3.0]),
        ([1.0, 2.0, 3.0], [16, 16, 16], [1.0, 1.0, 1.0]),
        ([3.0, 3.0, 3.0], [16, 16, 16], [1.0, 1.0, 1.0]),  # computed while others were sent
        ([1.0, 2.0, 60.0], [16, 16, 16], [1.0, 1.0, 58.0]),  # the last one is slow
        ([2.0, 2.0, 12.0], [1, 3, 16], [0.5, 1.5, 10.0]),
        ([2.0, 1.0], [16, 16], [1.0, 1.0]),  # a clock was set back
    ],
)
def test_each_chunk_has_its_own_time(arrivals: list[float], items: list[int], seconds: list[float]) -> None:
    assert own_seconds([100.0 + each for each in arrivals], items, since=100.0) == pytest.approx(seconds)


def make_worker(tmp_path: Path, *contents: bytes, check: Any) -> tuple[GolemWorker, list[QueuedJob], list[Any]]:
    """Make a worker of a price of 1 GLM a second that has had chunks for a minute. :return: it, them, its failures.

    :param contents: of the results file of each, which arrived one second after the other.
    """
    loop, began, failures = asyncio.get_running_loop(), time.monotonic() - 60.0, list[Any]()
    records = SimpleNamespace(
        record_success=lambda *_, **__: None,
        is_unclear_again=lambda _: False,
        record_failure=lambda worker, queued_job, reason, seconds: failures.append((queued_job, reason)),
    )
    parts = SimpleNamespace(
        timings=GolemTimings(),
        settings=SimpleNamespace(start_seconds=10.0, attempts=3),
        job_queue=JobQueue(),
        checks=asyncio.Semaphore(1),
        provider_records=records,
    )
    reservation: Any = FakeReservation()
    reservation.price.max_cost = lambda seconds: Decimal(f"{seconds:.6f}")
    pool: Any = SimpleNamespace(model="vgg16", parts=parts)
    activity = SimpleNamespace(provider_id="0xa1fa", _agreement=SimpleNamespace(id="ag1"), id="ac1")
    worker = GolemWorker(pool, Any, activity, reservation)
    worker._unattributed_since, worker._started = began, elapsed() - 60.0
    for number, data in enumerate(contents):
        received = tmp_path / f"{number}.part"
        received.write_bytes(data)
        os.utime(received, (0, time.time() - 59.0 + number))
        job = Job(
            chunk_id=f"c{number}",
            model="vgg16",
            items=16,
            chunk=tmp_path / f"{number}.zip",
            results=tmp_path / f"{number}.results",
            timeout_seconds=60,
            check=check,
        )
        queued_job = QueuedJob(job=job, outcome=loop.create_future(), attempts=1)
        worker.attempts.append(Attempt(queued_job=queued_job, size_bytes=1, received=received, slot=number))
    return worker, [each.queued_job for each in worker.attempts], failures


async def test_a_worker_without_chunks_may_fail(tmp_path: Path) -> None:
    worker, _, failures = make_worker(tmp_path, check=None)

    await worker._end_attempts(AttemptFailure(error=ChunkTimeout("It hangs."), is_provider_fault=True))

    assert failures == [(None, "It hangs.")]


async def test_transfers_that_were_too_slow_without_compression_stay_compressed(tmp_path: Path) -> None:
    worker, _, _ = make_worker(tmp_path, b"", b"", b"", check=None)
    found = worker._parts.quick_transfers = {}
    new, quick, slow = [*worker.attempts], [100.9, 101.9, 102.9], [103.0, 103.1, 103.2]

    def judge(new: Any, arrivals: list[float]) -> bool | None:
        worker._judge_transfers(new, arrivals, 100.0)
        return found.get("vgg16")

    assert [judge(new, slow), judge(new[:2], quick), judge(new, quick)] == [None, None, True]
    assert [judge([*new, new[0]], quick), judge([], slow), judge(new, slow), judge(new, quick)] == [
        True,
        True,
        False,
        False,
    ]


async def test_a_chunk_that_hangs_costs_those_before_it_in_its_script_nothing(tmp_path: Path) -> None:
    worker, (first, second, hanging), _ = make_worker(tmp_path, b"a", b"b", b"", check=lambda path: 16)
    late = AttemptFailure(error=ChunkTimeout("The provider does not respond."), is_provider_fault=True)

    await worker._end_attempts(late)

    bills = [bill for each in (first, second, hanging) for bill in each.bills]
    assert [bill.seconds for bill in bills] == pytest.approx([1.0, 1.0, 58.0], abs=0.5 * slowness())
    assert sum(bill.cost for bill in bills) == worker._attributed_cost
    assert float(bills[0].cost) == pytest.approx(bills[0].seconds, rel=0.1)
    assert first.outcome.result().seconds == bills[0].seconds


async def test_untrue_results_are_found_though_something_else_ended_their_script(tmp_path: Path) -> None:
    def check(path: Path) -> int:
        if path.read_bytes() == b"lie":
            raise UntrueResults("It refused an input that can be used.")
        return 16

    worker, (good, untrue, unbegun), failures = make_worker(tmp_path, b"good", b"lie", b"", check=check)
    unclear = AttemptFailure(error=GolemUnavailable("500"), is_provider_fault=False, is_unclear=True)

    await worker._end_attempts(unclear)

    assert good.outcome.result().error is None
    assert failures == [(untrue, "It refused an input that can be used.")]
    assert untrue.proven_wrong == {"0xa1fa"}
    assert (len(untrue.bills), len(unbegun.bills), unbegun.attempts) == (1, 0, 0)
    assert set(worker._parts.job_queue.queued_jobs()) == {untrue, unbegun}


async def test_no_job_is_lost_when_a_worker_is_cancelled_while_it_takes_over_results(tmp_path: Path) -> None:
    has_begun, may_end, queue = asyncio.Event(), threading.Event(), JobQueue()
    loop = asyncio.get_running_loop()

    def check(path: Path) -> int:
        if path.read_bytes() == b"slow":
            loop.call_soon_threadsafe(has_begun.set)
            may_end.wait(DEADLINE_SECONDS)
        return 1

    queued_jobs, attempts = [], []
    for number, data in enumerate((b"quick", b"slow", b"")):
        received, chunk = tmp_path / f"{number}.part", tmp_path / f"{number}.zip"
        received.write_bytes(data)
        job = Job(
            chunk_id=f"c{number}",
            model="vgg16",
            items=1,
            chunk=chunk,
            results=chunk.with_suffix(".results"),
            timeout_seconds=60,
            check=check,
        )
        queued_jobs.append(QueuedJob(job=job, outcome=loop.create_future(), attempts=1))
        attempts.append(Attempt(queued_job=queued_jobs[-1], size_bytes=1, received=received, slot=number))
    records = SimpleNamespace(record_success=lambda *_, **__: None)
    parts = SimpleNamespace(
        timings=GolemTimings(),
        settings=SimpleNamespace(start_seconds=10.0, attempts=3),
        job_queue=queue,
        checks=asyncio.Semaphore(1),
        provider_records=records,
    )
    reservation: Any = FakeReservation()
    reservation.price.max_cost = lambda seconds: Decimal("0.3")
    pool: Any = SimpleNamespace(model="vgg16", parts=parts)
    activity = SimpleNamespace(provider_id="0xa1fa", _agreement=SimpleNamespace(id="ag1"), id="ac1")
    worker = GolemWorker(pool, Any, activity, reservation)
    worker.attempts = attempts
    stopped = AttemptFailure(error=GolemUnavailable("It was stopped."), is_provider_fault=False)

    ending = asyncio.create_task(worker._end_attempts(stopped))
    await has_begun.wait()
    ending.cancel()
    await asyncio.wait({ending})
    may_end.set()

    quick, slow, unbegun = queued_jobs
    assert quick.outcome.result().provider == "alpha" and quick.job.results.read_bytes() == b"quick"
    assert queue.queued_jobs() == [slow, unbegun]
    assert (slow.attempts, unbegun.attempts) == (1, 0), "only one of them had been begun"
    assert [len(each.bills) for each in queued_jobs] == [1, 1, 0]
    assert worker.attempts == []

"""The cycle on a real store: what is claimed, its outcome, and what happens on failures."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from batcher.executors import Outcome
from provider_image.errors import InferenceFailed, NotInstalled, WorkerDied
from store.requests import MAX_ATTEMPTS, Answer
from store.states import RequestState
from tests.batcher.conftest import MODEL
from tests.timing import slowness


def states(requests: list[Any]) -> Counter[RequestState]:
    return Counter(request.state for request in requests)


def test_a_cycle_answers_each_request_with_the_result_of_its_own_image(harness: Any) -> None:
    images = [b"image %d" % number for number in range(40)]
    requests = [harness.add(image) for image in images]

    report = harness.run()

    found = harness.reload(*requests)
    assert [request.output for request in found] == [harness.expected_output(image) for image in images]
    assert {request.provider for request in found} == {"table/1"}
    assert (report.claimed, report.done, report.failed, report.released, report.chunks) == (40, 40, 0, 0, 3)
    assert list(harness.settings.work.iterdir()) == []
    chunks = harness.store.chunks.list()
    assert sorted((chunk.items, chunk.done, chunk.failed) for chunk in chunks) == [(8, 8, 0), (16, 16, 0), (16, 16, 0)]
    assert all(chunk.bytes_sent and chunk.bytes_received and chunk.executor == "table" for chunk in chunks)
    assert {request.chunk_id for request in found} == {chunk.id for chunk in chunks}


def test_a_poll_claims_full_chunks_and_requests_that_have_waited_long_enough(harness: Any) -> None:
    harness.add_many(17)

    first = harness.run(is_flushing=False)
    harness.clock.advance(599)
    second = harness.run(is_flushing=False)
    harness.clock.advance(1)
    third = harness.run(is_flushing=False)

    assert (first.claimed, second.claimed, third.claimed) == (16, 0, 1)


def test_requests_for_a_model_that_is_not_installed_are_not_claimed(harness: Any) -> None:
    request = harness.add(b"image", model="vgg16")

    report = harness.run()

    assert report.claimed == 0
    assert harness.reload(request)[0].state is RequestState.QUEUED


def test_equal_images_that_wait_together_are_processed_once(harness: Any) -> None:
    requests = [harness.add(b"the same", is_fresh=True) for _ in range(20)]

    report = harness.run()

    assert harness.executor.images == [[b"the same"]]
    assert report.done == 20
    assert states(harness.reload(*requests)) == {RequestState.DONE: 20}


def test_an_image_that_cannot_be_decoded_fails_alone_and_immediately(harness: Any) -> None:
    broken = harness.add(b"broken")
    others = harness.add_many(15)

    report = harness.run()

    (failed,) = harness.reload(broken)
    assert (failed.state, failed.code, failed.attempts) == (RequestState.FAILED, "broken_image", 1)
    assert "cut short or damaged" in failed.reason
    assert states(harness.reload(*others)) == {RequestState.DONE: 15}
    assert (report.done, report.failed, report.chunks) == (15, 1, 1)


def test_a_lie_about_an_image_fails_no_request_for_good(harness: Any) -> None:
    request = harness.add(b"broken")
    harness.try_item = lambda chunk, number: None

    harness.run()

    (found,) = harness.reload(request)
    assert (found.state, found.attempts, found.code) == (RequestState.QUEUED, 0, "malformed_results")


def test_an_image_whose_file_is_missing_fails_alone_with_a_reason(harness: Any) -> None:
    gone = harness.add(b"gone")
    others = harness.add_many(3)
    harness.store.images.path(gone.image_sha256).unlink()

    report = harness.run()

    (failed,) = harness.reload(gone)
    assert (failed.state, failed.code) == (RequestState.FAILED, "picture_missing")
    assert "Send the image again" in failed.reason
    assert states(harness.reload(*others)) == {RequestState.DONE: 3}
    assert (report.done, report.failed) == (3, 1)


def test_nothing_is_dispatched_when_all_image_files_are_missing(harness: Any) -> None:
    requests = harness.add_many(3)
    for request in requests:
        harness.store.images.path(request.image_sha256).unlink()

    report = harness.run()

    assert (report.failed, report.chunks, harness.executor.jobs) == (3, 0, [])


def test_an_item_that_fails_is_retried_with_growing_back_offs_and_then_fails(harness: Any) -> None:
    flaky = harness.add(b"flaky")
    others = harness.add_many(5)

    harness.run()
    assert states(harness.reload(*others)) == {RequestState.DONE: 5}
    assert harness.run().claimed == 0
    harness.clock.advance(1)
    assert harness.run().claimed == 1
    harness.clock.advance(3.9)
    assert harness.run().claimed == 0
    harness.clock.advance(0.1)
    last = harness.run()

    (failed,) = harness.reload(flaky)
    assert (failed.state, failed.attempts, failed.code) == (RequestState.FAILED, MAX_ATTEMPTS, "inference_failed")
    assert (last.claimed, last.failed, last.released) == (1, 1, 0)


def test_an_item_that_fails_its_chunk_is_isolated_and_the_other_items_are_answered(harness: Any) -> None:
    requests = [harness.add(b"poison" if number == 5 else b"image %d" % number) for number in range(16)]

    for _ in range(MAX_ATTEMPTS):
        harness.run()
        harness.clock.advance(20)

    found = harness.reload(*requests)
    poison = found.pop(5)
    assert states(found) == {RequestState.DONE: 15}
    assert [request.attempts for request in found] == [0] * 15
    assert (poison.state, poison.attempts, poison.code) == (RequestState.FAILED, MAX_ATTEMPTS, "worker_died")
    sizes = [len(chunk) for chunk in harness.executor.images if b"poison" in chunk]
    assert sizes == [16, 4, 1, 1, 1]


def test_a_blameless_failure_counts_no_attempt_and_is_not_retried_immediately(harness: Any) -> None:
    requests = harness.add_many(5)
    harness.executor.forced_outcome = Outcome(
        provider=None, seconds=0, error=WorkerDied("No worker process can be started."), is_blameless=True
    )

    harness.run()
    reload = harness.run()
    found = harness.reload(*requests)
    harness.executor.forced_outcome = None
    harness.clock.advance(30)
    last = harness.run()

    assert reload.claimed == 0
    assert {(request.state, request.attempts, request.isolation) for request in found} == {(RequestState.QUEUED, 0, 0)}
    assert found[0].reason == "No worker process can be started."
    assert last.done == 5


def test_a_model_that_cannot_be_used_is_not_claimed_for_a_while_and_its_requests_wait(harness: Any) -> None:
    first = harness.add(b"one")
    harness.executor.forced_outcome = Outcome(
        provider="table/1", seconds=0, error=NotInstalled("It is not installed there.")
    )

    async def main() -> tuple[Any, Any, str | None]:
        cycle = harness.cycle()
        cycle.flush()
        failing = await cycle.run(asyncio.Event())
        harness.add(b"two")
        cycle.flush()
        return failing, await cycle.run(asyncio.Event()), cycle.unavailable_reason(MODEL)

    failing, after, unavailable_reason = asyncio.run(main())

    assert (failing.claimed, failing.released, after.claimed) == (1, 1, 0)
    assert unavailable_reason == "It is not installed there."
    (found,) = harness.reload(first)
    assert (found.state, found.attempts, found.code) == (RequestState.QUEUED, 0, "not_installed")


def test_nothing_is_claimed_for_a_model_that_the_executor_reports_as_unavailable(harness: Any) -> None:
    request = harness.add(b"one")
    harness.executor.unavailable_reasons = {MODEL: "The budget of the day is used up."}

    unavailable = harness.run()
    harness.executor.unavailable_reasons = {}
    taken = harness.run()

    assert (unavailable.claimed, taken.done) == (0, 1)
    assert harness.reload(request)[0].state is RequestState.DONE


WRONG = {
    "a digest that is not installed here": lambda results: replace(results, digest="0" * 64),
    "the id of another chunk": lambda results: replace(results, chunk_id="f" * 32),
    "another model": lambda results: replace(results, model="vgg16"),
    "an item missing": lambda results: replace(results, items=results.items[:-1]),
    "an item twice": lambda results: replace(results, items=(*results.items, results.items[0])),
    "an item too many": lambda results: replace(
        results, items=(*results.items, replace(results.items[0], number=len(results.items)))
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_results_for_another_chunk_model_or_artefact_are_not_recorded(harness: Any, what: str) -> None:
    requests = harness.add_many(3)
    harness.executor.corrupt = WRONG[what]

    report = harness.run()

    found = harness.reload(*requests)
    assert states(found) == {RequestState.QUEUED: 3}
    assert [request.output for request in found] == [None] * 3
    assert {request.code for request in found} == {"malformed_results"}
    assert report.done == 0 and report.released >= 3


@pytest.mark.parametrize(
    "corrupt_file",
    [lambda path: path.unlink(), lambda path: path.write_bytes(b"garbage"), lambda path: path.write_bytes(b"")],
    ids=["gone", "garbage", "empty"],
)
def test_a_results_file_that_cannot_be_read_is_not_recorded(harness: Any, corrupt_file: Any) -> None:
    requests = harness.add_many(3)
    harness.executor.corrupt_file = corrupt_file

    report = harness.run()

    assert states(harness.reload(*requests)) == {RequestState.QUEUED: 3}
    assert report.done == 0


OUTPUTS = {
    "a probability over 1": lambda output: [[*output[0][:2], 1.5], *output[1:]],
    "a negative probability": lambda output: [*output[:-1], [*output[-1][:2], -0.1]],
    "a label that the model does not know": lambda output: [["n00000000", "unicorn", 0.5], *output[1:]],
    "too few rows": lambda output: output[:5],
    "no list at all": lambda output: "tiger_cat",
}


@pytest.mark.parametrize("what", OUTPUTS)
def test_an_invalid_output_is_not_recorded_but_the_other_outputs_are(harness: Any, what: str) -> None:
    first, *others = harness.add_many(4)
    harness.executor.corrupt = lambda results: replace(
        results,
        items=(replace(results.items[0], output=OUTPUTS[what](results.items[0].output)), *results.items[1:]),
    )

    harness.run()

    (invalid,) = harness.reload(first)
    assert (invalid.state, invalid.output, invalid.attempts, invalid.code) == (
        RequestState.QUEUED,
        None,
        1,
        "malformed_results",
    )
    assert states(harness.reload(*others)) == {RequestState.DONE: 3}


def test_results_that_are_always_wrong_fail_after_the_last_attempt(harness: Any) -> None:
    requests = harness.add_many(4)
    harness.executor.corrupt = WRONG["a digest that is not installed here"]

    for _ in range(MAX_ATTEMPTS):
        harness.run()
        harness.clock.advance(30)

    assert states(harness.reload(*requests)) == {RequestState.FAILED: 4}
    assert harness.run().claimed == 0


def test_control_characters_in_a_providers_reason_do_not_reach_the_store(harness: Any) -> None:
    harness.add(b"flaky")
    request = harness.add(b"image")

    def corrupt(results: Any) -> Any:
        error = InferenceFailed("red \x1b[31m text\r\nfake line")
        return replace(results, items=(replace(results.items[0], error=error), results.items[1]))

    harness.executor.corrupt = corrupt
    harness.run()

    flaky = next(found for found in harness.store.requests.list() if found.id != request.id)
    assert flaky.reason == "red  [31m text  fake line"


def test_a_result_that_comes_after_its_claim_was_lost_is_dropped(harness: Any) -> None:
    request = harness.add(b"image")

    async def main() -> Any:
        gate = asyncio.Event()
        harness.executor.before_answer = gate.wait
        cycle = harness.cycle()
        cycle.flush()
        run = asyncio.create_task(cycle.run(asyncio.Event()))
        await harness.until(lambda: harness.executor.in_flight == 1)
        later = harness.clock.now + timedelta(seconds=100)
        harness.store.requests.release_expired(later)
        (claim,) = harness.store.requests.claim(
            models={"efficientnet_lite0"},
            limit=16,
            now=later,
            lease_ends_at=later + timedelta(seconds=30),
            oldest_before=None,
        )
        other = Answer(
            claim=claim, output=[["x", "other", 1.0]], digest="d", chunk_id="o", provider="other/1", seconds=1.0
        )
        assert harness.store.requests.finish([other], now=later) == 1
        gate.set()
        return await run

    report = asyncio.run(main())

    (found,) = harness.reload(request)
    assert (found.provider, found.output) == ("other/1", [["x", "other", 1.0]])
    assert report.done == 0


def test_leases_are_renewed_during_a_long_chunk(harness: Any) -> None:
    harness.clock = lambda: datetime.now(UTC)
    harness.change_settings(lease_seconds=0.6)
    request = harness.add(b"image")
    released = []

    async def main() -> Any:
        gate = asyncio.Event()
        harness.executor.before_answer = gate.wait
        cycle = harness.cycle()
        cycle.flush()
        run = asyncio.create_task(cycle.run(asyncio.Event()))
        await harness.until(lambda: harness.executor.in_flight == 1)
        first_end = harness.reload(request)[0].lease_ends_at
        await harness.until(lambda: harness.reload(request)[0].lease_ends_at > first_end + timedelta(seconds=0.6))
        released.append(harness.store.requests.release_expired(datetime.now(UTC)))
        gate.set()
        return await run

    report = asyncio.run(main())

    assert released == [0]
    assert report.done == 1


def test_a_lost_claim_is_logged_once(harness: Any, caplog: pytest.LogCaptureFixture) -> None:
    harness.change_settings(lease_seconds=0.3)
    harness.add(b"image")

    async def main() -> None:
        gate = asyncio.Event()
        harness.executor.before_answer = gate.wait
        cycle = harness.cycle()
        cycle.flush()
        run = asyncio.create_task(cycle.run(asyncio.Event()))
        await harness.until(lambda: harness.executor.in_flight == 1)
        harness.store.requests.release_expired(harness.clock.now + timedelta(seconds=100))
        await harness.until(lambda: any("lost" in message for message in caplog.messages))
        await asyncio.sleep(0.3)  # two more renewals
        gate.set()
        await run

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())

    assert [message for message in caplog.messages if "lost" in message] == [
        "1 claims were lost, their results are dropped"
    ]


def test_stopping_lets_chunks_finish_and_releases_the_rest_unchanged(harness: Any) -> None:
    requests = harness.add_many(16 * 6)
    harness.executor.slots = 2

    async def main() -> Any:
        gate, stop = asyncio.Event(), asyncio.Event()
        harness.executor.before_answer = gate.wait
        cycle = harness.cycle()
        cycle.flush()
        run = asyncio.create_task(cycle.run(stop))
        await harness.until(lambda: harness.executor.in_flight == 2)
        stop.set()
        await asyncio.sleep(0.05)
        gate.set()
        return await run

    report = asyncio.run(main())

    found = harness.reload(*requests)
    assert states(found) == {RequestState.DONE: 32, RequestState.QUEUED: 64}
    assert {(request.attempts, request.isolation) for request in found} == {(0, 0)}
    assert report.done == 32
    assert len(harness.executor.jobs) == 2


def test_stopping_cancels_and_releases_without_blame_what_does_not_finish_in_time(harness: Any) -> None:
    requests = harness.add_many(20)
    harness.change_settings(drain_seconds=0.1)

    async def main() -> Any:
        stop = asyncio.Event()
        harness.executor.before_answer = asyncio.Event().wait
        cycle = harness.cycle()
        cycle.flush()
        run = asyncio.create_task(cycle.run(stop))
        await harness.until(lambda: harness.executor.in_flight == 2)
        stop.set()
        return await run

    report = asyncio.run(main())

    found = harness.reload(*requests)
    assert {(request.state, request.attempts, request.isolation) for request in found} == {(RequestState.QUEUED, 0, 0)}
    assert {request.due_at for request in found} == {harness.clock.now}
    assert harness.executor.was_cancelled == 2
    assert report.released == 20
    assert list(harness.settings.work.iterdir()) == []


def test_a_long_backlog_uses_all_slots_and_no_more(harness: Any) -> None:
    harness.add_many(16 * 12)
    harness.executor.slots = 3

    async def before_answer() -> None:
        # No chunk ends before all slots are used again, so a cycle that leaves one free would time out.
        await harness.until(lambda: harness.executor.in_flight == 3 or len(harness.executor.jobs) == 12)

    harness.executor.before_answer = before_answer

    report = harness.run()

    assert (report.done, report.chunks) == (16 * 12, 12)
    assert harness.executor.max_in_flight == 3


def test_requests_that_arrive_during_a_chunk_are_processed_in_the_same_cycle(harness: Any) -> None:
    first = harness.add(b"first")

    async def main() -> Any:
        gate = asyncio.Event()
        harness.executor.before_answer = gate.wait
        cycle = harness.cycle()
        cycle.flush()
        run = asyncio.create_task(cycle.run(asyncio.Event()))
        await harness.until(lambda: harness.executor.in_flight == 1)
        harness.add_many(16)
        cycle.poll()
        await harness.until(lambda: harness.executor.in_flight == 2)
        gate.set()
        return await run

    report = asyncio.run(main())

    assert report.done == 17
    assert harness.reload(first)[0].state is RequestState.DONE


def test_results_are_kept_until_a_locked_store_accepts_them(harness: Any, caplog: pytest.LogCaptureFixture) -> None:
    harness.store.close()
    home_settings = replace(harness.home_settings, busy_seconds=0.05)
    harness.store = type(harness.store)(home_settings)
    requests = harness.add_many(20)
    other = sqlite3.connect(home_settings.database, isolation_level=None, check_same_thread=False)

    async def lock() -> None:
        other.execute("BEGIN IMMEDIATE")
        harness.executor.before_answer = None
        threading.Timer(1.0, other.execute, ["ROLLBACK"]).start()

    harness.executor.before_answer = lock
    harness.executor.slots = 1
    with caplog.at_level(logging.WARNING):
        report = harness.run()
    other.close()

    assert report.done == 20
    assert states(harness.reload(*requests)) == {RequestState.DONE: 20}
    assert any("cannot record results" in message for message in caplog.messages)


def test_claiming_from_a_locked_store_is_retried(harness: Any, caplog: pytest.LogCaptureFixture) -> None:
    harness.store.close()
    home_settings = replace(harness.home_settings, busy_seconds=0.02)
    harness.store = type(harness.store)(home_settings)
    harness.add(b"image")
    other = sqlite3.connect(home_settings.database, isolation_level=None)

    async def main() -> list[int]:
        cycle = harness.cycle()
        claimed = []
        other.execute("BEGIN IMMEDIATE")
        for _ in range(5):
            cycle.flush()
            claimed.append((await cycle.run(asyncio.Event())).claimed)
        other.execute("ROLLBACK")
        while not claimed[-1]:
            await asyncio.sleep(0.05)
            cycle.flush()
            claimed.append((await cycle.run(asyncio.Event())).claimed)
        return claimed

    with caplog.at_level(logging.WARNING):
        claimed = asyncio.run(asyncio.wait_for(main(), 300))
    other.close()

    assert (sum(claimed), claimed[-1]) == (1, 1)
    assert sum("cannot claim" in message for message in caplog.messages) == 1


def test_claims_of_a_dead_batcher_are_processed_when_their_leases_end(harness: Any) -> None:
    requests = harness.add_many(16)
    harness.store.requests.claim(
        models={"efficientnet_lite0"},
        limit=16,
        now=harness.clock.now,
        lease_ends_at=harness.clock.now + timedelta(seconds=30),
        oldest_before=None,
    )

    before = harness.run()
    harness.clock.advance(30)
    after = harness.run()

    assert (before.claimed, after.done) == (0, 16)
    assert states(harness.reload(*requests)) == {RequestState.DONE: 16}


def test_an_executor_that_raises_does_not_end_the_cycle(harness: Any) -> None:
    requests = harness.add_many(2)

    async def fail() -> None:
        raise RuntimeError("a bug in an executor")

    harness.executor.before_answer = fail
    harness.run()
    harness.executor.before_answer = None
    harness.clock.advance(10)
    harness.run()

    assert states(harness.reload(*requests)) == {RequestState.DONE: 2}


def test_the_setting_for_items_per_chunk_is_respected(harness: Any) -> None:
    harness.change_settings(chunk_items=3)
    harness.add_many(8)

    report = harness.run()

    assert report.done == 8
    assert sorted(job.items for job in harness.executor.jobs) == [2, 3, 3]


def test_with_a_backlog_of_100000_requests_only_a_window_is_claimed_within_a_second(harness: Any) -> None:
    template = harness.add(b"image")
    with sqlite3.connect(harness.home_settings.database) as database:
        columns = [row[1] for row in database.execute("PRAGMA table_info(requests)") if row[1] not in ("number", "id")]
        names = ", ".join(columns)
        database.execute(
            f"WITH RECURSIVE counter (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM counter WHERE n < 99999) "
            f"INSERT INTO requests (id, {names}) SELECT printf('%032x', n), {names} FROM counter, requests "
            f"WHERE requests.id = '{template.id}'"
        )
    database.close()

    async def main() -> float:
        stop = asyncio.Event()
        harness.executor.before_answer = asyncio.Event().wait
        harness.change_settings(drain_seconds=0)
        cycle = harness.cycle()
        started_at = time.monotonic()
        cycle.flush()
        run = asyncio.create_task(cycle.run(stop))
        await harness.until(lambda: harness.executor.in_flight == harness.executor.slots)
        seconds = time.monotonic() - started_at
        stop.set()
        await run
        return seconds

    seconds = asyncio.run(main())

    # All have the same image, so each window is one item; four chunks need four windows.
    assert seconds < 1.0 * slowness()
    assert states(harness.store.requests.list(limit=100_000)) == {RequestState.QUEUED: 100_000}

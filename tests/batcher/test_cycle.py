"""The cycle on a real store: what is claimed, what becomes of it, and what happens when things go wrong on the way."""

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
from provider_image.errors import NotInstalled, WorkerDied
from store.records import Answer, State
from store.sqlite import MAX_ATTEMPTS
from tests.batcher.conftest import MODEL


def states(requests: list[Any]) -> Counter[State]:
    return Counter(request.state for request in requests)


def test_a_cycle_answers_everybody_with_the_answer_to_their_own_picture(bench: Any) -> None:
    pictures = [b"picture %d" % number for number in range(40)]
    requests = [bench.add(picture) for picture in pictures]

    report = bench.run()

    found = bench.again(*requests)
    assert [request.output for request in found] == [bench.right_output(picture) for picture in pictures]
    assert {request.provider for request in found} == {"table/1"}
    assert (report.claimed, report.done, report.failed, report.released, report.chunks) == (40, 40, 0, 0, 3)
    assert list(bench.settings.work.iterdir()) == []
    chunks = bench.store.list_chunks()
    assert sorted((chunk.items, chunk.done, chunk.failed) for chunk in chunks) == [(8, 8, 0), (16, 16, 0), (16, 16, 0)]
    assert all(chunk.bytes_sent and chunk.bytes_received and chunk.executor == "table" for chunk in chunks)
    assert {request.chunk_id for request in found} == {chunk.id for chunk in chunks}


def test_a_look_takes_full_chunks_and_what_has_waited_long_enough(bench: Any) -> None:
    bench.add_many(17)

    first = bench.run(takes_all=False)
    bench.clock.turn(599)
    second = bench.run(takes_all=False)
    bench.clock.turn(1)
    third = bench.run(takes_all=False)

    assert (first.claimed, second.claimed, third.claimed) == (16, 0, 1)


def test_a_model_that_is_not_installed_is_left_alone(bench: Any) -> None:
    request = bench.add(b"picture", model="vgg16")

    report = bench.run()

    assert report.claimed == 0
    assert bench.again(request)[0].state is State.QUEUED


def test_equal_pictures_that_wait_together_are_worked_on_once(bench: Any) -> None:
    requests = [bench.add(b"the same", is_fresh=True) for _ in range(20)]

    report = bench.run()

    assert bench.executor.pictures == [[b"the same"]]
    assert report.done == 20
    assert states(bench.again(*requests)) == {State.DONE: 20}


def test_a_picture_that_cannot_be_decoded_fails_alone_and_at_once(bench: Any) -> None:
    broken = bench.add(b"broken")
    others = bench.add_many(15)

    report = bench.run()

    (failed,) = bench.again(broken)
    assert (failed.state, failed.code, failed.attempts) == (State.FAILED, "broken_image", 1)
    assert "cut short or damaged" in failed.reason
    assert states(bench.again(*others)) == {State.DONE: 15}
    assert (report.done, report.failed, report.chunks) == (15, 1, 1)


def test_a_picture_whose_file_is_gone_fails_alone_with_a_reason(bench: Any) -> None:
    gone = bench.add(b"gone")
    others = bench.add_many(3)
    bench.store.blobs.path(gone.image_sha256).unlink()

    report = bench.run()

    (failed,) = bench.again(gone)
    assert (failed.state, failed.code) == (State.FAILED, "picture_missing")
    assert "Send the picture again" in failed.reason
    assert states(bench.again(*others)) == {State.DONE: 3}
    assert (report.done, report.failed) == (3, 1)


def test_nothing_is_dispatched_when_all_pictures_are_gone(bench: Any) -> None:
    requests = bench.add_many(3)
    for request in requests:
        bench.store.blobs.path(request.image_sha256).unlink()

    report = bench.run()

    assert (report.failed, report.chunks, bench.executor.jobs) == (3, 0, [])


def test_an_item_that_fails_is_tried_again_after_a_back_off_that_grows_and_then_fails(bench: Any) -> None:
    flaky = bench.add(b"flaky")
    others = bench.add_many(5)

    bench.run()
    assert states(bench.again(*others)) == {State.DONE: 5}
    assert bench.run().claimed == 0
    bench.clock.turn(1)
    assert bench.run().claimed == 1
    bench.clock.turn(3.9)
    assert bench.run().claimed == 0
    bench.clock.turn(0.1)
    last = bench.run()

    (failed,) = bench.again(flaky)
    assert (failed.state, failed.attempts, failed.code) == (State.FAILED, MAX_ATTEMPTS, "inference_failed")
    assert (last.claimed, last.failed, last.released) == (1, 1, 0)


def test_an_item_that_takes_its_chunk_along_is_isolated_and_its_neighbours_are_answered(bench: Any) -> None:
    requests = [bench.add(b"poison" if number == 5 else b"picture %d" % number) for number in range(16)]

    for _ in range(MAX_ATTEMPTS):
        bench.run()
        bench.clock.turn(20)

    found = bench.again(*requests)
    poison = found.pop(5)
    assert states(found) == {State.DONE: 15}
    assert [request.attempts for request in found] == [0] * 15
    assert (poison.state, poison.attempts, poison.code) == (State.FAILED, MAX_ATTEMPTS, "worker_died")
    sizes = [len(chunk) for chunk in bench.executor.pictures if b"poison" in chunk]
    assert sizes == [16, 4, 1, 1, 1]


def test_a_failure_that_is_nobodys_fault_counts_nothing_and_is_not_tried_again_at_once(bench: Any) -> None:
    requests = bench.add_many(5)
    bench.executor.refusal = Outcome(
        provider=None, seconds=0, error=WorkerDied("No worker process can be started."), is_blameless=True
    )

    bench.run()
    again = bench.run()
    found = bench.again(*requests)
    bench.executor.refusal = None
    bench.clock.turn(30)
    last = bench.run()

    assert again.claimed == 0
    assert {(request.state, request.attempts, request.isolation) for request in found} == {(State.QUEUED, 0, 0)}
    assert found[0].reason == "No worker process can be started."
    assert last.done == 5


def test_a_model_that_cannot_be_used_is_left_alone_for_a_while_and_its_requests_wait(bench: Any) -> None:
    first = bench.add(b"one")
    bench.executor.refusal = Outcome(provider="table/1", seconds=0, error=NotInstalled("It is not installed there."))

    async def main() -> tuple[Any, Any, str | None]:
        cycle = bench.cycle()
        cycle.take_all()
        failing = await cycle.run(asyncio.Event())
        bench.add(b"two")
        cycle.take_all()
        return failing, await cycle.run(asyncio.Event()), cycle.obstacle(MODEL)

    failing, after, obstacle = asyncio.run(main())

    assert (failing.claimed, failing.released, after.claimed) == (1, 1, 0)
    assert obstacle == "It is not installed there."
    (found,) = bench.again(first)
    assert (found.state, found.attempts, found.code) == (State.QUEUED, 0, "not_installed")


def test_nothing_is_claimed_that_the_executor_wants_no_more_of(bench: Any) -> None:
    request = bench.add(b"one")
    bench.executor.obstacles = {MODEL: "The budget of the day is used up."}

    refused = bench.run()
    bench.executor.obstacles = {}
    taken = bench.run()

    assert (refused.claimed, taken.done) == (0, 1)
    assert bench.again(request)[0].state is State.DONE


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
def test_results_that_answer_something_else_are_not_recorded(bench: Any, what: str) -> None:
    requests = bench.add_many(3)
    bench.executor.spoil = WRONG[what]

    report = bench.run()

    found = bench.again(*requests)
    assert states(found) == {State.QUEUED: 3}
    assert [request.output for request in found] == [None] * 3
    assert {request.code for request in found} == {"malformed_results"}
    assert report.done == 0 and report.released >= 3


@pytest.mark.parametrize(
    "spoil_file",
    [lambda path: path.unlink(), lambda path: path.write_bytes(b"garbage"), lambda path: path.write_bytes(b"")],
    ids=["gone", "garbage", "empty"],
)
def test_a_results_file_that_cannot_be_read_is_not_recorded(bench: Any, spoil_file: Any) -> None:
    requests = bench.add_many(3)
    bench.executor.spoil_file = spoil_file

    report = bench.run()

    assert states(bench.again(*requests)) == {State.QUEUED: 3}
    assert report.done == 0


OUTPUTS = {
    "a probability over 1": lambda output: [[*output[0][:2], 1.5], *output[1:]],
    "a negative probability": lambda output: [*output[:-1], [*output[-1][:2], -0.1]],
    "a label that the model does not know": lambda output: [["n00000000", "unicorn", 0.5], *output[1:]],
    "too few rows": lambda output: output[:5],
    "no list at all": lambda output: "tiger_cat",
}


@pytest.mark.parametrize("what", OUTPUTS)
def test_an_output_that_makes_no_sense_is_not_recorded_and_its_neighbours_are(bench: Any, what: str) -> None:
    first, *others = bench.add_many(4)
    bench.executor.spoil = lambda results: replace(
        results,
        items=(replace(results.items[0], output=OUTPUTS[what](results.items[0].output)), *results.items[1:]),
    )

    bench.run()

    (spoilt,) = bench.again(first)
    assert (spoilt.state, spoilt.output, spoilt.attempts, spoilt.code) == (State.QUEUED, None, 1, "malformed_results")
    assert states(bench.again(*others)) == {State.DONE: 3}


def test_results_that_keep_being_wrong_end_in_failure_and_not_in_a_circle(bench: Any) -> None:
    requests = bench.add_many(4)
    bench.executor.spoil = WRONG["a digest that is not installed here"]

    for _ in range(MAX_ATTEMPTS):
        bench.run()
        bench.clock.turn(30)

    assert states(bench.again(*requests)) == {State.FAILED: 4}
    assert bench.run().claimed == 0


def test_control_characters_in_a_providers_reason_do_not_reach_the_store(bench: Any) -> None:
    bench.add(b"flaky")
    request = bench.add(b"picture")

    def spoil(results: Any) -> Any:
        error = replace(results.items[0].error, reason="red \x1b[31m text\r\nfaked line")
        return replace(results, items=(replace(results.items[0], error=error), results.items[1]))

    bench.executor.spoil = spoil
    bench.run()

    flaky = next(found for found in bench.store.list() if found.id != request.id)
    assert flaky.reason == "red  [31m text  faked line"


def test_a_result_that_comes_after_its_claim_was_lost_is_dropped(bench: Any) -> None:
    request = bench.add(b"picture")

    async def main() -> Any:
        gate = asyncio.Event()
        bench.executor.hold = gate.wait
        cycle = bench.cycle()
        cycle.take_all()
        run = asyncio.create_task(cycle.run(asyncio.Event()))
        await bench.until(lambda: bench.executor.under_way == 1)
        later = bench.clock.now + timedelta(seconds=100)
        bench.store.release_expired(later)
        (claim,) = bench.store.claim(
            models={"efficientnet_lite0"},
            limit=16,
            now=later,
            lease_ends_at=later + timedelta(seconds=30),
            oldest_before=None,
        )
        other = Answer(
            claim=claim, output=[["x", "other", 1.0]], digest="d", chunk_id="o", provider="other/1", seconds=1.0
        )
        assert bench.store.finish([other], now=later) == 1
        gate.set()
        return await run

    report = asyncio.run(main())

    (found,) = bench.again(request)
    assert (found.provider, found.output) == ("other/1", [["x", "other", 1.0]])
    assert report.done == 0


def test_leases_are_renewed_while_a_long_chunk_is_under_way(bench: Any) -> None:
    bench.clock = lambda: datetime.now(UTC)
    bench.change(lease_seconds=0.6)
    request = bench.add(b"picture")
    released = []

    async def main() -> Any:
        gate = asyncio.Event()
        bench.executor.hold = gate.wait
        cycle = bench.cycle()
        cycle.take_all()
        run = asyncio.create_task(cycle.run(asyncio.Event()))
        await bench.until(lambda: bench.executor.under_way == 1)
        first_end = bench.again(request)[0].lease_ends_at
        await bench.until(lambda: bench.again(request)[0].lease_ends_at > first_end + timedelta(seconds=0.6))
        released.append(bench.store.release_expired(datetime.now(UTC)))
        gate.set()
        return await run

    report = asyncio.run(main())

    assert released == [0]
    assert report.done == 1


def test_a_claim_that_is_lost_is_noticed_and_logged_once(bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    bench.change(lease_seconds=0.3)
    bench.add(b"picture")

    async def main() -> None:
        gate = asyncio.Event()
        bench.executor.hold = gate.wait
        cycle = bench.cycle()
        cycle.take_all()
        run = asyncio.create_task(cycle.run(asyncio.Event()))
        await bench.until(lambda: bench.executor.under_way == 1)
        bench.store.release_expired(bench.clock.now + timedelta(seconds=100))
        await bench.until(lambda: any("lost" in message for message in caplog.messages))
        await asyncio.sleep(0.3)  # two more renewals
        gate.set()
        await run

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())

    assert [message for message in caplog.messages if "lost" in message] == [
        "1 claims were lost, their results will be dropped"
    ]


def test_stopping_lets_chunks_finish_and_gives_the_rest_back_untouched(bench: Any) -> None:
    requests = bench.add_many(16 * 6)
    bench.executor.places = 2

    async def main() -> Any:
        gate, stop = asyncio.Event(), asyncio.Event()
        bench.executor.hold = gate.wait
        cycle = bench.cycle()
        cycle.take_all()
        run = asyncio.create_task(cycle.run(stop))
        await bench.until(lambda: bench.executor.under_way == 2)
        stop.set()
        await asyncio.sleep(0.05)
        gate.set()
        return await run

    report = asyncio.run(main())

    found = bench.again(*requests)
    assert states(found) == {State.DONE: 32, State.QUEUED: 64}
    assert {(request.attempts, request.isolation) for request in found} == {(0, 0)}
    assert report.done == 32
    assert len(bench.executor.jobs) == 2


def test_stopping_calls_back_what_does_not_finish_in_time_without_blame(bench: Any) -> None:
    requests = bench.add_many(20)
    bench.change(drain_seconds=0.1)

    async def main() -> Any:
        stop = asyncio.Event()
        bench.executor.hold = asyncio.Event().wait
        cycle = bench.cycle()
        cycle.take_all()
        run = asyncio.create_task(cycle.run(stop))
        await bench.until(lambda: bench.executor.under_way == 2)
        stop.set()
        return await run

    report = asyncio.run(main())

    found = bench.again(*requests)
    assert {(request.state, request.attempts, request.isolation) for request in found} == {(State.QUEUED, 0, 0)}
    assert {request.due_at for request in found} == {bench.clock.now}
    assert bench.executor.was_cancelled == 2
    assert report.released == 20
    assert list(bench.settings.work.iterdir()) == []


def test_a_long_backlog_keeps_all_places_taken_and_no_more(bench: Any) -> None:
    bench.add_many(16 * 12)
    bench.executor.places = 3

    async def hold() -> None:
        # No chunk ends before the other places are taken again, so a cycle that left one free would stand still.
        await bench.until(lambda: bench.executor.under_way == 3 or len(bench.executor.jobs) == 12)

    bench.executor.hold = hold

    report = bench.run()

    assert (report.done, report.chunks) == (16 * 12, 12)
    assert bench.executor.most_under_way == 3


def test_requests_that_come_in_while_a_chunk_is_under_way_are_taken_too(bench: Any) -> None:
    first = bench.add(b"first")

    async def main() -> Any:
        gate = asyncio.Event()
        bench.executor.hold = gate.wait
        cycle = bench.cycle()
        cycle.take_all()
        run = asyncio.create_task(cycle.run(asyncio.Event()))
        await bench.until(lambda: bench.executor.under_way == 1)
        bench.add_many(16)
        cycle.look()
        await bench.until(lambda: bench.executor.under_way == 2)
        gate.set()
        return await run

    report = asyncio.run(main())

    assert report.done == 17
    assert bench.again(first)[0].state is State.DONE


def test_results_are_kept_until_a_locked_store_takes_them(bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    bench.store.close()
    server_settings = replace(bench.server_settings, busy_seconds=0.05)
    bench.store = type(bench.store)(server_settings)
    requests = bench.add_many(20)
    other = sqlite3.connect(server_settings.database, isolation_level=None, check_same_thread=False)

    async def lock() -> None:
        other.execute("BEGIN IMMEDIATE")
        bench.executor.hold = None
        threading.Timer(1.0, other.execute, ["ROLLBACK"]).start()

    bench.executor.hold = lock
    bench.executor.places = 1
    with caplog.at_level(logging.WARNING):
        report = bench.run()
    other.close()

    assert report.done == 20
    assert states(bench.again(*requests)) == {State.DONE: 20}
    assert any("cannot record results" in message for message in caplog.messages)


def test_a_store_that_cannot_be_claimed_from_is_tried_again_later(bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    bench.store.close()
    server_settings = replace(bench.server_settings, busy_seconds=0.02)
    bench.store = type(bench.store)(server_settings)
    bench.add(b"picture")
    other = sqlite3.connect(server_settings.database, isolation_level=None)

    async def main() -> list[int]:
        cycle = bench.cycle()
        claimed = []
        other.execute("BEGIN IMMEDIATE")
        for _ in range(5):
            cycle.take_all()
            claimed.append((await cycle.run(asyncio.Event())).claimed)
        other.execute("ROLLBACK")
        while not claimed[-1]:
            await asyncio.sleep(0.05)
            cycle.take_all()
            claimed.append((await cycle.run(asyncio.Event())).claimed)
        return claimed

    with caplog.at_level(logging.WARNING):
        claimed = asyncio.run(asyncio.wait_for(main(), 30))
    other.close()

    assert (sum(claimed), claimed[-1]) == (1, 1)
    assert sum("cannot claim" in message for message in caplog.messages) == 1


def test_what_a_dead_batcher_had_claimed_is_taken_when_its_leases_end(bench: Any) -> None:
    requests = bench.add_many(16)
    bench.store.claim(
        models={"efficientnet_lite0"},
        limit=16,
        now=bench.clock.now,
        lease_ends_at=bench.clock.now + timedelta(seconds=30),
        oldest_before=None,
    )

    before = bench.run()
    bench.clock.turn(30)
    after = bench.run()

    assert (before.claimed, after.done) == (0, 16)
    assert states(bench.again(*requests)) == {State.DONE: 16}


def test_an_executor_that_raises_does_not_end_the_cycle(bench: Any) -> None:
    requests = bench.add_many(2)

    async def fall() -> None:
        raise RuntimeError("a bug in an executor")

    bench.executor.hold = fall
    bench.run()
    bench.executor.hold = None
    bench.clock.turn(10)
    bench.run()

    assert states(bench.again(*requests)) == {State.DONE: 2}


def test_a_small_chunk_setting_is_kept(bench: Any) -> None:
    bench.change(chunk_items=3)
    bench.add_many(8)

    report = bench.run()

    assert report.done == 8
    assert sorted(job.items for job in bench.executor.jobs) == [2, 3, 3]


def test_of_a_hundred_thousand_that_wait_only_a_window_is_claimed_and_quickly(bench: Any) -> None:
    template = bench.add(b"picture")
    with sqlite3.connect(bench.server_settings.database) as database:
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
        bench.executor.hold = asyncio.Event().wait
        bench.change(drain_seconds=0)
        cycle = bench.cycle()
        started_at = time.monotonic()
        cycle.take_all()
        run = asyncio.create_task(cycle.run(stop))
        await bench.until(lambda: bench.executor.under_way == bench.executor.places)
        seconds = time.monotonic() - started_at
        stop.set()
        await run
        return seconds

    seconds = asyncio.run(main())

    # All are one picture, so each window is one item; four chunks take four windows.
    assert seconds < 1.0
    assert states(bench.store.list(limit=100_000)) == {State.QUEUED: 100_000}

"""The exe-unit: its states, the execution of batches, polling, transfers, usage and its end."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from devnet.errors import ApiError, Gone, NotFound
from devnet.provider.exe_unit import MAX_FINISHED_BATCHES
from tests.devnet.exe_units import BOOT_COMMANDS, FOREVER, GftpProcess, exe_unit, run, run_batch, sh, transfer
from tests.process_tree import is_alive
from tests.timing import DEADLINE_SECONDS, slowness, until


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def has_begun(folder: Path) -> Any:
    """Return a function that returns whether FOREVER has begun."""
    return (folder / "activity/golem/work/begun").exists


async def test_the_commands_of_an_activity_change_its_state(tmp_path: Path) -> None:
    async with exe_unit(tmp_path, is_started=False) as unit:
        states = [unit.state]
        for command in (*BOOT_COMMANDS, {"terminate": {}}):
            await run_batch(unit, command)
            states.append(unit.state)

        assert states == [
            "Initialized",
            "Deployed",
            "Ready",
            "Terminated",
        ]
        assert unit.reason == "The script terminated the activity."


async def test_results_have_the_fields_that_yapapi_reads(tmp_path: Path) -> None:
    async with exe_unit(tmp_path) as unit:
        results = await run_batch(unit, sh("echo out; echo err >&2"), sh("true", capture={}))

    assert [result.pop("eventDate")[-1] for result in results] == ["Z", "Z"]
    assert results == [
        {
            "index": 0,
            "result": "Ok",
            "stdout": "out\n",
            "stderr": "err\n",
            "message": None,
            "isBatchFinished": False,
        },
        {"index": 1, "result": "Ok", "stdout": None, "stderr": None, "message": None, "isBatchFinished": True},
    ]


async def test_yapapis_model_accepts_a_result(tmp_path: Path) -> None:
    models = pytest.importorskip("ya_activity.models")

    async with exe_unit(tmp_path) as unit:
        [result] = await run_batch(unit, sh("exit 7"))

    taken = models.ExeScriptCommandResult(
        index=result["index"],
        event_date=result["eventDate"],
        result=result["result"],
        message=result["message"],
        is_batch_finished=result["isBatchFinished"],
    )
    assert (taken.result, taken.message) == ("Error", "ExeScript command exited with code 7")


async def test_a_batch_stops_at_the_first_failed_command(tmp_path: Path) -> None:
    async with exe_unit(tmp_path) as unit:
        results = await run_batch(unit, sh("true"), sh("echo why >&2; exit 7"), sh("touch /golem/work/not"))

        assert [result["result"] for result in results] == ["Ok", "Error"]
        assert results[1]["message"] == "ExeScript command exited with code 7"
        assert (results[1]["stderr"], results[1]["isBatchFinished"]) == ("why\n", True)
        assert not (tmp_path / "activity/golem/work/not").exists()
        assert (await run_batch(unit, sh("true")))[0]["result"] == "Ok"


async def test_a_command_fails_in_a_state_that_does_not_allow_it(tmp_path: Path) -> None:
    async with exe_unit(tmp_path, is_started=False) as unit:
        for command in (sh("true"), {"start": {}}, {"transfer": {"from": "a", "to": "b"}}):
            [result] = await run_batch(unit, command)
            assert (result["result"], "Initialized" in result["message"]) == ("Error", True)
        await run_batch(unit, *BOOT_COMMANDS)
        for command in ({"deploy": {}}, {"sign": {}}):
            assert (await run_batch(unit, command))[0]["result"] == "Error"


@pytest.mark.parametrize(
    "script",
    [
        [],
        {},
        ["run"],
        [{}],
        [{"fly": {}}],
        [{"deploy": {}, "start": {}}],
        [{"deploy": []}],
        [{"run": {}}],
        [{"run": {"entry_point": 1}}],
        [{"run": {"entry_point": "/bin/sh", "args": "-c"}}],
        [{"run": {"entry_point": "/bin/sh", "args": [1]}}],
        [{"run": {"entry_point": "/bin/sh", "capture": {"stdin": {"stream": {}}}}}],
        [{"run": {"entry_point": "/bin/sh", "capture": {"stdout": {"sometimes": {}}}}}],
        [{"run": {"entry_point": "/bin/sh", "capture": {"stdout": "stream"}}}],
        [{"run": {"entry_point": "/bin/sh", "capture": {"stdout": {"atEnd": {"head": 4}}}}}],
        [{"transfer": {"from": "container:/golem/input/a"}}],
    ],
)
async def test_an_invalid_script_is_rejected_as_a_whole(tmp_path: Path, script: Any) -> None:
    async with exe_unit(tmp_path) as unit:
        with pytest.raises(ApiError):
            await unit.execute([*BOOT_COMMANDS, *script] if isinstance(script, list) and script else script)


async def test_fields_for_networks_and_progress_are_accepted(tmp_path: Path) -> None:
    async with exe_unit(tmp_path, is_started=False) as unit:
        deploy = {"net": [], "hosts": {}, "nodes": {}, "progress": {"updateInterval": "1s", "updateStep": None}}

        assert len(await run_batch(unit, {"deploy": deploy}, {"start": {"args": []}})) == 2


# Polling


async def test_a_poll_returns_the_results_so_far_at_its_timeout(tmp_path: Path) -> None:
    async with exe_unit(tmp_path) as unit:
        batch = await unit.execute([sh("true"), sh(FOREVER)])
        await until(has_begun(tmp_path))
        started_at = time.monotonic()

        results = await unit.results(batch, 0.1)

        assert 0.1 <= time.monotonic() - started_at < 5 * slowness()
        assert [(result["index"], result["isBatchFinished"]) for result in results] == [(0, False)]


async def test_batches_that_are_queued_run_in_order(tmp_path: Path) -> None:
    async with exe_unit(tmp_path) as unit:
        first = await unit.execute([sh("while ! [ -e go ]; do sleep .02; done; echo first >> order")])
        second = await unit.execute([sh("echo second >> order; cat order")])
        assert await unit.results(second, 0) == []

        (tmp_path / "activity/golem/work/go").touch()

        [result] = await unit.results(second, 30)
        assert result["stdout"] == "first\nsecond\n"
        assert (await unit.results(first, 0))[0]["isBatchFinished"]


async def test_only_the_latest_finished_batches_are_kept(tmp_path: Path) -> None:
    async with exe_unit(tmp_path) as unit:
        batches = []
        for _ in range(MAX_FINISHED_BATCHES + 2):
            batches.append(await unit.execute([sh("true")]))
            await unit.results(batches[-1], 30)

        for batch in ("none", batches[0]):
            with pytest.raises(NotFound):
                await unit.results(batch, 0)
        assert await unit.results(batches[-2], 0)


# Transfers


async def test_files_are_transferred_in_both_directions(tmp_path: Path) -> None:
    (tmp_path / "sent").write_bytes(b"there and back")
    gftp = GftpProcess(tmp_path)
    source, target = gftp.publish(tmp_path / "sent"), gftp.receive(tmp_path / "got")

    async with exe_unit(tmp_path) as unit:
        upload = transfer(source, "container:/golem/input/new/sent")
        upload["transfer"]["progress"] = {"updateInterval": None, "updateStep": None}
        results = await run_batch(
            unit,
            upload,
            sh("cp /golem/input/new/sent /golem/output/copy"),
            transfer("container:/golem/output/copy", target),
        )

        assert [result["result"] for result in results] == ["Ok", "Ok", "Ok"]
    gftp.end()

    assert (tmp_path / "got").read_bytes() == b"there and back"


async def test_a_slow_transfer_arrives_in_parts_and_ends_with_the_activity(tmp_path: Path) -> None:
    gftp, target = GftpProcess(tmp_path), tmp_path / "received"
    url = gftp.receive(target)
    async with exe_unit(tmp_path, bytes_per_second=640 * 1024.0) as unit:
        await run_batch(unit, sh("head -c 100000000 /dev/urandom > /golem/output/large"))
        batch = await unit.execute([transfer("container:/golem/output/large", url)])
        await until(lambda: target.stat().st_size > 0)
        first_size = target.stat().st_size
        await until(lambda: target.stat().st_size > first_size)
        assert await unit.results(batch, 0) == []

        await unit.end()
        last_size = target.stat().st_size
        assert first_size < last_size < 100_000_000
    gftp.end()
    assert target.stat().st_size == last_size


async def test_a_failed_transfer_has_a_message(tmp_path: Path) -> None:
    (tmp_path / "sent").write_bytes(b"bytes")
    gftp = GftpProcess(tmp_path)
    source, target = gftp.publish(tmp_path / "sent"), gftp.receive(tmp_path / "got")
    unknown = source[:-4] + "0000"

    async with exe_unit(tmp_path) as unit:
        (tmp_path / "activity/golem/work/link").symlink_to("/etc/passwd")
        (tmp_path / "activity/golem/work/file").touch()
        for source_side, target_side, message in (
            (unknown, "container:/golem/input/a", "Nothing is published"),
            (source, "container:/golem/input/../../../a", "not in one of the volumes"),
            (source, "container:/golem/work/file/a", "exists"),
            ("container:/golem/work/link", target, "outside the sandbox"),
            ("container:/golem/output/none", target, "No such file"),
            ("container:/golem/output/none", unknown, "Nothing is published"),
            (source, target, "exactly one side in the container"),
        ):
            [result] = await run_batch(unit, transfer(source_side, target_side))

            assert result["result"] == "Error" and message in result["message"], result

        [result] = await run_batch(unit, sh("cat /golem/../../secret"))
        assert "outside the sandbox" in result["message"]
    gftp.end()

    assert (tmp_path / "got").read_bytes() == b""


# Usage


async def test_usage_is_processor_time_and_duration(tmp_path: Path) -> None:
    async with exe_unit(tmp_path) as unit:
        await run_batch(unit, sh("i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done"))
        processor, duration = unit.usage()
        await unit.end()
        last = unit.usage()

        assert 0.02 < processor < duration < 30
        assert last == unit.usage() and last[0] >= processor and last[1] >= duration


async def test_a_slow_provider_takes_longer_and_has_more_usage(tmp_path: Path) -> None:
    work = run("/bin/sh", "-c", "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done")

    async with exe_unit(tmp_path, speed=0.25) as unit:
        started_at = time.monotonic()
        await run_batch(unit, work)
        seconds = time.monotonic() - started_at
        cpu_seconds = unit._sandbox.processes.cpu_seconds()

        assert seconds >= 3.9 * cpu_seconds > 0
        assert unit.usage()[0] == pytest.approx(4 * cpu_seconds)


# The end


async def test_destroying_kills_all_processes_and_ends_waiting_calls(tmp_path: Path) -> None:
    async with exe_unit(tmp_path) as unit:
        batch = await unit.execute([sh(f"setsid sleep 60 & {FOREVER}")])
        waiting = asyncio.create_task(unit.results(batch, 60))
        await until(has_begun(tmp_path))
        # A process that is just starting a program is not found for a moment.
        pids = await until(lambda: found if len(found := unit._sandbox.processes.pids()) >= 2 else [])

        async with asyncio.timeout(DEADLINE_SECONDS):
            await asyncio.gather(unit.end(), unit.end())
            with pytest.raises(Gone):
                await waiting
        await unit.end()

        assert not any(is_alive(pid) for pid in pids)
        assert not (tmp_path / "activity").exists()
        assert (unit.state, unit.reason) == ("Terminated", "The activity was destroyed.")
        with pytest.raises(Gone):
            await unit.execute([sh("true")])


async def test_the_results_of_a_finished_batch_outlive_the_activity(tmp_path: Path) -> None:
    async with exe_unit(tmp_path) as unit:
        batch = await unit.execute([sh("true"), {"terminate": {}}, sh("true")])
        results = await unit.results(batch, 30)
        await unit.end()

        assert [result["isBatchFinished"] for result in results] == [False, True]
        assert await unit.results(batch, 0) == results


async def test_a_queued_batch_ends_with_the_activity(tmp_path: Path) -> None:
    async with exe_unit(tmp_path) as unit:
        await unit.execute([sh(FOREVER)])
        second = await unit.execute([sh("true")])
        await until(has_begun(tmp_path))
        await unit.end()

        with pytest.raises(Gone):
            await unit.results(second, 60)


async def test_activities_are_separate(tmp_path: Path) -> None:
    async with exe_unit(tmp_path, activity_id="one") as one, exe_unit(tmp_path, activity_id="two") as two:
        await two.execute([sh(FOREVER)])
        await until((tmp_path / "two/golem/work/begun").exists)

        assert (await run_batch(one, sh("ls /golem/work")))[0]["stdout"] == ""
        await one.end()

        assert two.state == "Ready" and two._sandbox.processes.pids()


async def test_no_descriptors_are_left_open(tmp_path: Path) -> None:
    async with exe_unit(tmp_path) as unit:
        await run_batch(unit, sh("true"))
        before = open_descriptors()
        for _ in range(5):
            await run_batch(unit, sh("true"), sh("exit 1"))
            await run_batch(unit, run("/none/such"))

        assert open_descriptors() == before

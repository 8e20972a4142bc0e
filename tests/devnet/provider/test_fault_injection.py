"""The faults of a provider inside an activity."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from devnet.errors import Gone, TimedOut
from devnet.provider.exe_unit import ExeUnit
from devnet.scenario import Fault, FaultSchedule
from provider_image.chunk import ItemResult, Results, read_results, write_results
from provider_image.errors import MalformedResults
from tests.devnet.exe_units import BOOT_COMMANDS, exe_unit, run_batch, sh
from tests.process_tree import is_alive
from tests.timing import until

DIGEST = "ab" * 32
COPY_RESULTS = sh("cp /golem/input/results.zip /golem/output/")


def write_results_file(folder: Path, chunk_id: str = "chunk-1", activity_id: str = "activity") -> Path:
    """Write the results file that COPY_RESULTS copies. :return: the path of the copy."""
    golem = folder / activity_id / "golem"
    write_results(
        golem / "input/results.zip",
        Results(
            chunk_id=chunk_id,
            model="m",
            digest=DIGEST,
            versions={},
            precision="f32",
            cpu="some",
            load_seconds=0.0,
            peak_memory_bytes=1,
            items=(ItemResult(number=0, output=[chunk_id], files={"a.png": b"picture"}),),
        ),
    )
    return golem / "output/results.zip"


def read(path: Path, chunk_id: str = "chunk-1", digest: str | None = DIGEST) -> Results:
    return read_results(path, chunk_id, "m", [0], digest)


async def copy_results(unit: ExeUnit) -> None:
    assert (await run_batch(unit, COPY_RESULTS))[0]["result"] == "Ok"


async def test_without_faults_output_files_are_unchanged(tmp_path: Path) -> None:
    async with exe_unit(tmp_path) as unit:
        path = write_results_file(tmp_path)
        await copy_results(unit)

        assert path.read_bytes() == (tmp_path / "activity/golem/input/results.zip").read_bytes()


async def test_a_deploy_fails_as_often_as_the_fault_says(tmp_path: Path) -> None:
    async with exe_unit(tmp_path, Fault(kind="fail-deploy", times=1), is_started=False) as unit:
        [result] = await run_batch(unit, *BOOT_COMMANDS)
        assert (result["result"], unit.state) == ("Error", "Initialized")

        assert len(await run_batch(unit, *BOOT_COMMANDS)) == 2


async def test_exit_nonzero_does_not_run_the_program(tmp_path: Path) -> None:
    async with exe_unit(tmp_path, Fault(kind="exit-nonzero", after=1, times=1)) as unit:
        assert (await run_batch(unit, sh("true")))[0]["result"] == "Ok"
        [result] = await run_batch(unit, sh("touch done"))
        assert result["message"] == "ExeScript command exited with code 7"
        assert not (tmp_path / "activity/golem/work/done").exists()

        await run_batch(unit, sh("touch done"))

        assert (tmp_path / "activity/golem/work/done").exists()


async def test_a_run_that_hangs_ends_with_the_activity(tmp_path: Path) -> None:
    async with exe_unit(tmp_path, Fault(kind="hang")) as unit:
        batch = await unit.execute([sh("true")])
        assert await unit.results(batch, 0.1) == []
        waiting = asyncio.create_task(unit.results(batch, 60))
        await asyncio.sleep(0)

        await unit.end()

        with pytest.raises(Gone):
            await waiting


async def test_garbage_has_the_original_size_and_truncated_results_half_of_it(tmp_path: Path) -> None:
    async with exe_unit(tmp_path, Fault(kind="garbage", times=1), Fault(kind="truncate", after=0)) as unit:
        path = write_results_file(tmp_path)
        original = path.parents[1] / "input/results.zip"
        sizes = []
        for _ in range(2):
            await copy_results(unit)
            sizes.append(path.stat().st_size)
            with pytest.raises(MalformedResults):
                read(path)

        assert sizes == [original.stat().st_size, original.stat().st_size // 2]
        assert original.read_bytes().startswith(path.read_bytes())


async def test_an_oversized_file_uses_no_disk_space(tmp_path: Path) -> None:
    async with exe_unit(tmp_path, Fault(kind="oversize")) as unit:
        path = write_results_file(tmp_path)
        await copy_results(unit)

        assert path.stat().st_size > 100_000_000 and path.stat().st_blocks * 512 < 1_000_000
        with pytest.raises(MalformedResults):
            read(path)


async def test_wrong_digest_changes_nothing_else(tmp_path: Path) -> None:
    async with exe_unit(tmp_path, Fault(kind="wrong-digest")) as unit:
        path = write_results_file(tmp_path)
        await copy_results(unit)

        with pytest.raises(MalformedResults, match="digest"):
            read(path)
        results = read(path, digest=None)
        assert results.digest != DIGEST
        assert (results.items[0].output, results.items[0].files) == (["chunk-1"], {"a.png": b"picture"})


async def test_swapped_results_name_another_chunk(tmp_path: Path) -> None:
    async with exe_unit(tmp_path, Fault(kind="swap-results")) as unit:
        path = write_results_file(tmp_path)
        await copy_results(unit)

        with pytest.raises(MalformedResults, match="chunk_id"):
            read(path)


async def test_only_files_written_by_the_run_are_corrupted(tmp_path: Path) -> None:
    faults = FaultSchedule({"alpha": [Fault(kind="garbage", after=1)]})
    async with exe_unit(tmp_path, shared_faults=faults) as unit:
        output = tmp_path / "activity/golem/output"
        await run_batch(unit, sh("echo first > /golem/output/first; mkdir /golem/output/folder"))
        await run_batch(unit, sh("echo second > /golem/output/folder/second; ln -s /etc/passwd /golem/output/link"))

        assert (output / "first").read_text() == "first\n"
        assert (output / "folder/second").read_bytes() != b"second\n"


async def test_faults_in_results_leave_other_files_unchanged(tmp_path: Path) -> None:
    async with exe_unit(tmp_path, Fault(kind="swap-results", times=1), Fault(kind="wrong-digest")) as unit:
        for _ in range(2):
            await run_batch(unit, sh("echo text > /golem/output/text"))

            assert (tmp_path / "activity/golem/output/text").read_text() == "text\n"


@pytest.mark.parametrize("seconds", [0.0, 60.0])
async def test_an_exe_unit_that_dies_removes_everything(tmp_path: Path, seconds: float) -> None:
    fault = Fault(kind="die", after=1, seconds=seconds)
    async with exe_unit(tmp_path, fault) as unit:
        await run_batch(unit, sh("setsid sleep 60 &"))
        processes = unit._sandbox.processes
        left = await until(lambda: processes.pids()[0] if len(processes.pids()) == 1 else 0)
        # If the program ends first, the exe-unit dies then, so the test does not wait for `seconds`.
        batch = await unit.execute([sh("true"), sh("touch /golem/work/not")])

        with pytest.raises(Gone, match="killed"):
            await unit.results(batch, 60)
        await until(lambda: not (tmp_path / "activity").exists())

        assert (unit.state, unit.reason) == ("Terminated", "The exe-unit was killed.")
        assert not is_alive(left)
        await unit.end()


async def test_calls_for_a_vanished_activity_hang(tmp_path: Path) -> None:
    async with exe_unit(tmp_path, Fault(kind="vanish-http")) as unit:
        batch = await unit.execute([sh("true")])
        while not unit.vanished:
            await asyncio.sleep(0)

        for call in (unit.results(batch, 0), unit.execute([sh("true")]), unit.block_if_vanished()):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await call

        # The daemon itself does not block.
        await unit.end()
        assert unit.state == "Terminated"
        assert not (tmp_path / "activity").exists()


async def test_a_call_for_a_vanished_activity_fails_after_the_faults_seconds(tmp_path: Path) -> None:
    async with exe_unit(tmp_path, Fault(kind="vanish-http", seconds=0.1)) as unit:
        batch = await unit.execute([sh("true")])
        started_at = time.monotonic()

        with pytest.raises(TimedOut):
            await unit.results(batch, 0.01)

        assert time.monotonic() - started_at >= 0.1

"""Each misdeed of a provider, as far as it happens inside an activity."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from devnet.faults import Faults
from devnet.provider.exe_unit import ActivityEnded, ActivityVanished, ExeUnit
from devnet.scenario import Fault
from provider_image.chunk import ItemResult, Results, read_results, write_results
from provider_image.errors import MalformedResults
from tests.devnet.exe_units import BOOT_COMMANDS, FOREVER, exe_unit, run_batch, sh
from tests.process_tree import is_alive, wait_until

DIGEST = "ab" * 32
COPY_RESULTS = sh("cp /golem/input/results.zip /golem/output/")


def write_results_file(folder: Path, chunk_id: str = "chunk-1", activity_id: str = "activity") -> Path:
    """Put a results file where ANSWER takes it from, and return where it puts it."""
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


async def until(is_true: Any) -> None:
    await asyncio.to_thread(wait_until, is_true, 20)


async def answered(unit: ExeUnit) -> None:
    assert (await run_batch(unit, COPY_RESULTS))[0]["result"] == "Ok"


def test_without_faults_what_was_written_stays_as_it_is(tmp_path: Path) -> None:
    async def main() -> None:
        async with exe_unit(tmp_path) as unit:
            path = write_results_file(tmp_path)
            await answered(unit)

            assert path.read_bytes() == (tmp_path / "activity/golem/input/results.zip").read_bytes()

    asyncio.run(main())


def test_a_deploy_fails_as_often_as_planned(tmp_path: Path) -> None:
    async def main() -> None:
        async with exe_unit(tmp_path, Fault(kind="fail-deploy", times=1), is_started=False) as unit:
            [result] = await run_batch(unit, *BOOT_COMMANDS)
            assert (result["result"], unit.state) == ("Error", ("Initialized", None))

            assert len(await run_batch(unit, *BOOT_COMMANDS)) == 2

    asyncio.run(main())


def test_exit_nonzero_does_not_do_the_work(tmp_path: Path) -> None:
    async def main() -> None:
        async with exe_unit(tmp_path, Fault(kind="exit-nonzero", after=1, times=1)) as unit:
            assert (await run_batch(unit, sh("true")))[0]["result"] == "Ok"
            [result] = await run_batch(unit, sh("touch done"))
            assert result["message"] == "ExeScript command exited with code 7"
            assert not (tmp_path / "activity/golem/work/done").exists()

            await run_batch(unit, sh("touch done"))

            assert (tmp_path / "activity/golem/work/done").exists()

    asyncio.run(main())


def test_a_run_that_hangs_ends_with_the_activity(tmp_path: Path) -> None:
    async def main() -> None:
        async with exe_unit(tmp_path, Fault(kind="hang")) as unit:
            batch = await unit.execute([sh("true")])
            assert await unit.results(batch, 0.1) == []
            waiting = asyncio.create_task(unit.results(batch, 60))
            await asyncio.sleep(0)

            await unit.destroy()

            with pytest.raises(ActivityEnded):
                await waiting

    asyncio.run(main())


def test_garbage_is_as_long_as_the_truth_and_truncated_results_half_as_long(tmp_path: Path) -> None:
    async def main() -> None:
        async with exe_unit(tmp_path, Fault(kind="garbage", times=1), Fault(kind="truncate", after=0)) as unit:
            path = write_results_file(tmp_path)
            true = path.parents[1] / "input/results.zip"
            sizes = []
            for _ in range(2):
                await answered(unit)
                sizes.append(path.stat().st_size)
                with pytest.raises(MalformedResults):
                    read(path)

            assert sizes == [true.stat().st_size, true.stat().st_size // 2]
            assert true.read_bytes().startswith(path.read_bytes())

    asyncio.run(main())


def test_an_oversized_answer_takes_no_room_on_the_disk(tmp_path: Path) -> None:
    async def main() -> None:
        async with exe_unit(tmp_path, Fault(kind="oversize")) as unit:
            path = write_results_file(tmp_path)
            await answered(unit)

            assert path.stat().st_size > 100_000_000 and path.stat().st_blocks * 512 < 1_000_000
            with pytest.raises(MalformedResults):
                read(path)

    asyncio.run(main())


def test_a_wrong_digest_is_all_that_is_wrong(tmp_path: Path) -> None:
    async def main() -> None:
        async with exe_unit(tmp_path, Fault(kind="wrong-digest")) as unit:
            path = write_results_file(tmp_path)
            await answered(unit)

            with pytest.raises(MalformedResults, match="digest"):
                read(path)
            lie = read(path, digest=None)
            assert lie.digest != DIGEST
            assert (lie.items[0].output, lie.items[0].files) == (["chunk-1"], {"a.png": b"picture"})

    asyncio.run(main())


def test_swapped_results_are_those_of_another_chunk_of_any_provider(tmp_path: Path) -> None:
    async def main() -> None:
        async with exe_unit(tmp_path, activity_id="honest") as honest:
            for number in range(6):
                write_results_file(tmp_path, f"chunk-{number}", "honest")
                await answered(honest)
            assert len(list((tmp_path / "answers").iterdir())) == 4
        async with exe_unit(tmp_path, Fault(kind="swap-results")) as unit:
            path = write_results_file(tmp_path, "chunk-4")
            await answered(unit)

            with pytest.raises(MalformedResults, match="chunk_id"):
                read(path, "chunk-4")
            assert any(
                read(path, f"chunk-{number}").items[0].output == [f"chunk-{number}"]
                for number in (2, 3, 5)
                if f"chunk-{number}".encode() in path.read_bytes()
            )

    asyncio.run(main())


def test_with_nothing_to_swap_the_results_name_another_chunk(tmp_path: Path) -> None:
    async def main() -> None:
        async with exe_unit(tmp_path, Fault(kind="swap-results")) as unit:
            path = write_results_file(tmp_path)
            await answered(unit)

            with pytest.raises(MalformedResults, match="chunk_id"):
                read(path)

    asyncio.run(main())


def test_only_what_this_run_has_written_is_spoilt(tmp_path: Path) -> None:
    async def main() -> None:
        faults = Faults({"alpha": [Fault(kind="garbage", after=1)]})
        async with exe_unit(tmp_path, shared_faults=faults) as unit:
            output = tmp_path / "activity/golem/output"
            await run_batch(unit, sh("echo first > /golem/output/first; mkdir /golem/output/folder"))
            await run_batch(unit, sh("echo second > /golem/output/folder/second; ln -s /etc/passwd /golem/output/link"))

            assert (output / "first").read_text() == "first\n"
            assert (output / "folder/second").read_bytes() != b"second\n"

    asyncio.run(main())


def test_lies_leave_other_files_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with exe_unit(tmp_path, Fault(kind="swap-results", times=1), Fault(kind="wrong-digest")) as unit:
            for _ in range(2):
                await run_batch(unit, sh("echo text > /golem/output/text"))

                assert (tmp_path / "activity/golem/output/text").read_text() == "text\n"

    asyncio.run(main())


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_an_exe_unit_that_dies_takes_everything_along_and_says_so(tmp_path: Path, seconds: float) -> None:
    crashes: list[str] = []

    async def main() -> None:
        fault = Fault(kind="die", after=1, seconds=seconds)
        async with exe_unit(tmp_path, fault, on_crash=crashes.append) as unit:
            await run_batch(unit, sh("setsid sleep 60 &"))
            [left] = unit._sandbox.processes.pids()
            # With time left it dies when its program is over, so that no test waits for it.
            batch = await unit.execute([sh("true"), sh("touch /golem/work/not")])

            with pytest.raises(ActivityEnded, match="killed"):
                await unit.results(batch, 60)
            await until(lambda: crashes)

            assert crashes == ["activity"]
            assert (unit.state, unit.reason) == (("Terminated", None), "The exe-unit was killed.")
            assert not is_alive(left)
            assert not (tmp_path / "activity").exists()
            await unit.destroy()
            assert crashes == ["activity"]

    asyncio.run(main())


def test_destroying_is_no_death(tmp_path: Path) -> None:
    crashes: list[str] = []

    async def main() -> None:
        async with exe_unit(tmp_path, on_crash=crashes.append) as unit:
            await unit.execute([sh(FOREVER)])
            await until((tmp_path / "activity/golem/work/begun").exists)
            await unit.destroy()

    asyncio.run(main())

    assert crashes == []


def test_an_activity_that_vanishes_answers_nothing_any_more(tmp_path: Path) -> None:
    async def main() -> None:
        async with exe_unit(tmp_path, Fault(kind="vanish-http")) as unit:
            batch = await unit.execute([sh("true")])
            while not unit.is_vanished:
                await asyncio.sleep(0)

            for call in (unit.results(batch, 0), unit.execute([sh("true")]), unit.destroy()):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await call

            # It is gone all the same, and the daemon itself need not wait.
            assert unit.state[0] == "Terminated"
            await unit.end()
            assert not (tmp_path / "activity").exists()

    asyncio.run(main())


def test_who_waits_for_a_vanished_one_is_let_go_after_its_seconds(tmp_path: Path) -> None:
    async def main() -> None:
        async with exe_unit(tmp_path, Fault(kind="vanish-http", seconds=0.1)) as unit:
            batch = await unit.execute([sh("true")])
            started_at = time.monotonic()

            with pytest.raises(ActivityVanished):
                await unit.results(batch, 0.01)

            assert time.monotonic() - started_at >= 0.1

    asyncio.run(main())

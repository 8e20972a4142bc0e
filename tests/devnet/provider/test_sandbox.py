"""The sandbox: paths, programs with their output and cores, processes left behind, and captured output."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from devnet.image import Image
from devnet.provider.sandbox import CANNOT_RUN, NOT_FOUND, PathOutsideSandbox, Sandbox
from devnet.provider.script import OutputCapture
from tests.process_tree import is_alive
from tests.timing import wait_until


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return make_sandbox(tmp_path / "vm")


def make_sandbox(folder: Path, cpus: set[int] | None = None) -> Sandbox:
    """Make a sandbox with an image in which there is also this Python."""
    sandbox = Sandbox("activity", folder, environment={"PATH": os.defpath}, cpus=cpus)
    sandbox.use_image(Image(programs={sys.executable: sys.executable}))
    return sandbox


class Output:
    """The output of a program."""

    def __init__(self) -> None:
        self.out, self.err = b"", b""

    def on_stdout(self, data: bytes) -> None:
        self.out += data

    def on_stderr(self, data: bytes) -> None:
        self.err += data


async def run(sandbox: Sandbox, *words: str) -> tuple[int, Output]:
    output = Output()
    async with asyncio.timeout(120):
        status = await sandbox.run(words[0], words[1:], on_stdout=output.on_stdout, on_stderr=output.on_stderr)
    return status, output


def run_once(sandbox: Sandbox, *words: str) -> tuple[int, Output]:
    """Run a program, then remove the sandbox."""

    async def main() -> tuple[int, Output]:
        try:
            return await run(sandbox, *words)
        finally:
            await sandbox.remove()

    return asyncio.run(main())


# Paths


@pytest.mark.parametrize("text", ["/golem/input/a", "/golem/output/a/b", "/golem//work/./a", "/golem/input/../work/a"])
def test_paths_in_the_volumes_are_accepted(sandbox: Sandbox, text: str) -> None:
    assert sandbox.host_path(text) == sandbox.golem_folder / os.path.normpath(text).removeprefix("/golem/")


@pytest.mark.parametrize(
    "text",
    [
        "/golem/input/../../../../etc/passwd",
        "/golem/input/..",
        "/golem/input",
        "/golem/other/a",
        "/golem/inputs/a",
        "/etc/passwd",
        "golem/input/a",
        "",
        "/golem/input/a\0b",
        "/golem/input/link/passwd",
        "/golem/input/cycle/x",
    ],
)
def test_paths_outside_the_volumes_are_rejected(sandbox: Sandbox, text: str) -> None:
    (sandbox.golem_folder / "input/link").symlink_to("/etc")
    (sandbox.golem_folder / "input/cycle").symlink_to("cycle")

    with pytest.raises(PathOutsideSandbox):
        sandbox.host_path(text)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("/golem", "{}"),
        ("/golem/input/a", "{}/input/a"),
        ("--out=/golem/output", "--out={}/output"),
        ("cat /golem/input/a >'/golem/output/b';ls /golem", "cat {}/input/a >'{}/output/b';ls {}"),
        ("/golemine", "/golemine"),
        ("/my/golem/input", "/my/golem/input"),
        ("x/golem", "x/golem"),
        ("/golem-1 /golem.txt", "/golem-1 /golem.txt"),
    ],
)
def test_golem_paths_in_an_argument_are_rewritten(sandbox: Sandbox, argument: str, expected: str) -> None:
    assert sandbox.rewrite_paths(argument) == expected.replace("{}", str(sandbox.golem_folder))


@pytest.mark.parametrize("argument", ["/golem/../etc/passwd", "cat /golem/work/../../etc/passwd", "--x=/golem/.."])
def test_an_argument_with_a_path_outside_is_rejected(sandbox: Sandbox, argument: str) -> None:
    with pytest.raises(PathOutsideSandbox):
        sandbox.rewrite_paths(argument)


# Programs


def test_a_program_has_no_input_and_only_the_given_environment(sandbox: Sandbox) -> None:
    status, output = run_once(
        sandbox, "/bin/sh", "-c", "pwd; cat; echo $GOLEM_DEVNET_ROOT; echo ${HOME-none} >&2; exit 3"
    )

    assert status == 3
    assert output.out.decode().split() == [str(sandbox.golem_folder / "work"), str(sandbox.golem_folder)]
    assert output.err == b"none\n"


async def test_only_programs_of_the_image_are_found_and_only_by_their_path(sandbox: Sandbox, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\necho "found $1 in $MLG_HOME"')
    program.chmod(0o755)
    sandbox.use_image(Image(programs={"/usr/local/bin/mlg-something": str(program)}, home="/the/image"))

    status, output = await run(sandbox, "/usr/local/bin/mlg-something", "it")

    assert (status, output.out) == (0, b"found it in /the/image\n")
    for entry_point in ("mlg-something", "sh", "/usr/local/bin/mlg-other", str(program), "/bin/../bin/sh"):
        assert (await run(sandbox, entry_point))[0] == NOT_FOUND, entry_point
    await sandbox.remove()


async def test_a_transferred_program_is_not_searched_on_the_path(sandbox: Sandbox) -> None:
    assert (await run(sandbox, "/golem/work/true"))[0] == NOT_FOUND
    (sandbox.golem_folder / "work/true").write_text("#!/bin/sh\necho mine")
    assert (await run(sandbox, "/golem/work/true"))[0] == CANNOT_RUN
    (sandbox.golem_folder / "work/true").chmod(0o755)
    status, output = await run(sandbox, "/golem/work/true")
    assert (status, output.out) == (0, b"mine\n")
    await sandbox.remove()


def test_a_program_that_cannot_be_started_has_an_exit_status(sandbox: Sandbox) -> None:
    assert run_once(sandbox, "/usr/bin/none-such")[0] == NOT_FOUND
    status, output = run_once(sandbox, "/bin/echo", "a\0b")

    assert status == CANNOT_RUN and output.err


def test_a_program_ended_by_a_signal_has_the_exit_status_of_shells(sandbox: Sandbox) -> None:
    assert run_once(sandbox, "/bin/sh", "-c", "kill -9 $$")[0] == 137


def test_all_output_of_a_program_is_read(sandbox: Sandbox) -> None:
    status, output = run_once(sandbox, "/bin/sh", "-c", "head -c 3000000 /dev/zero; head -c 200000 /dev/zero >&2")

    assert (status, len(output.out), len(output.err)) == (0, 3_000_000, 200_000)


def test_a_run_does_not_wait_for_processes_left_behind(sandbox: Sandbox) -> None:
    status, output = run_once(sandbox, "/bin/sh", "-c", "sleep 60 & echo $!")

    assert status == 0
    assert not is_alive(int(output.out))


def test_programs_use_the_cores_of_their_provider(tmp_path: Path) -> None:
    own_cores = os.sched_getaffinity(0)
    sandbox = make_sandbox(tmp_path / "vm", {min(own_cores), 4711})

    _, output = run_once(sandbox, sys.executable, "-c", "import os; print(os.sched_getaffinity(0))")

    assert output.out.decode().strip() == str({min(own_cores)})
    assert os.sched_getaffinity(0) == own_cores


# Processes left behind

#: Uses 0.3 s of processor time (the system counts in hundredths), then creates a file and waits.
_USE_CPU = "import os,sys,time\nwhile time.process_time()<.3: pass\nopen(sys.argv[1],'w').close()\ntime.sleep(60)"


def in_loop(sandbox: Sandbox, steps: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        try:
            await steps()
        finally:
            await sandbox.remove()

    asyncio.run(main())


def test_processor_time_of_programs_is_measured(sandbox: Sandbox) -> None:
    async def steps() -> None:
        code = "import time\nwhile time.process_time()<.2: pass"
        before = sandbox.processes.cpu_seconds()
        await run(sandbox, sys.executable, "-c", code)
        await run(sandbox, "/bin/sh", "-c", f"'{sys.executable}' -c '{code}'; true")

        assert before == 0
        assert 0.4 <= sandbox.processes.cpu_seconds() < 2

    in_loop(sandbox, steps)


def test_a_process_left_behind_in_another_session_is_measured_and_killed(sandbox: Sandbox) -> None:
    async def steps() -> None:
        await run(sandbox, "/bin/sh", "-c", f'setsid {sys.executable} -c "$1" $2 &', "sh", _USE_CPU, "/golem/work/used")
        await asyncio.to_thread(wait_until, (sandbox.golem_folder / "work/used").exists, 20)

        assert sandbox.processes.cpu_seconds() >= 0.25
        left = sandbox.processes.pids()
        assert len(left) == 1

        await sandbox.processes.kill_all()

        assert not is_alive(left[0])
        assert sandbox.processes.cpu_seconds() >= 0.25

    in_loop(sandbox, steps)


def test_time_of_a_child_that_was_waited_for_is_not_counted_twice(sandbox: Sandbox) -> None:
    async def steps() -> None:
        work = sandbox.golem_folder / "work"
        text = f'{sys.executable} -c "$1" /golem/work/used & while ! [ -e go ]; do sleep .02; done; kill $!; wait'
        running = asyncio.create_task(run(sandbox, "/bin/sh", "-c", text, "sh", _USE_CPU))
        await asyncio.to_thread(wait_until, (work / "used").exists, 20)
        time_while_running = sandbox.processes.cpu_seconds()
        (work / "go").touch()
        await running

        assert 0.25 <= time_while_running <= sandbox.processes.cpu_seconds() < time_while_running + 0.2

    in_loop(sandbox, steps)


def test_the_processes_of_another_activity_are_not_killed(sandbox: Sandbox, tmp_path: Path) -> None:
    other = make_sandbox(tmp_path / "other")

    async def steps() -> None:
        await run(sandbox, "/bin/sh", "-c", "setsid sleep 60 &")
        await run(other, "/bin/sh", "-c", "setsid sleep 60 &")
        [other_pid] = other.processes.pids()

        await sandbox.remove()

        assert sandbox.processes.pids() == [] and other.processes.pids() == [other_pid]
        await other.remove()
        assert not is_alive(other_pid)

    in_loop(sandbox, steps)


def test_a_process_that_forks_repeatedly_is_killed(sandbox: Sandbox) -> None:
    text = "import os,time\nfor _ in range(500):\n  if os.fork(): os._exit(0)\n  os.setsid()\n  time.sleep(.005)"

    async def steps() -> None:
        await run(sandbox, sys.executable, "-c", text)
        await sandbox.remove()

        assert sandbox.processes.pids() == []

    in_loop(sandbox, steps)


def test_cancelling_a_run_kills_a_process_without_the_mark(sandbox: Sandbox) -> None:
    async def steps() -> None:
        mark = sandbox.golem_folder / "work/pid"
        text = f"env -i /bin/sh -c 'echo $$ >{mark}.new; mv {mark}.new {mark}; while :; do sleep 60; done'; true"
        running = asyncio.create_task(run(sandbox, "/bin/sh", "-c", text))
        await asyncio.to_thread(wait_until, mark.exists, 20)
        pid = int(mark.read_text())

        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

        await asyncio.to_thread(wait_until, lambda: not is_alive(pid), 20)

    in_loop(sandbox, steps)


def test_processor_time_of_a_cancelled_run_is_measured(sandbox: Sandbox) -> None:
    async def steps() -> None:
        text = f'{sys.executable} -c "$1" /golem/work/used; true'
        running = asyncio.create_task(run(sandbox, "/bin/sh", "-c", text, "sh", _USE_CPU))
        await asyncio.to_thread(wait_until, (sandbox.golem_folder / "work/used").exists, 20)

        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

        assert sandbox.processes.cpu_seconds() >= 0.25

    in_loop(sandbox, steps)


def test_removing_the_sandbox_twice_is_allowed(sandbox: Sandbox, tmp_path: Path) -> None:
    async def steps() -> None:
        (sandbox.golem_folder / "work/file").touch()
        await sandbox.remove()
        await sandbox.remove()

    in_loop(sandbox, steps)

    assert not (tmp_path / "vm").exists()


# Captured output


def capture_output(*pieces: bytes, is_wanted: bool = True) -> str | None:
    capture = OutputCapture(is_wanted)
    for piece in pieces:
        capture.write(piece)
    return capture.text


def test_output_is_captured_if_it_is_wanted() -> None:
    assert capture_output(b"01234", b"56789") == "0123456789"
    assert capture_output(b"01234", b"56789", is_wanted=False) is None


def test_output_is_captured_in_whole_characters() -> None:
    assert capture_output(b"gr\xc3", b"\xbc\xc3\x9fe\xff", b"\xc3") == "grüße\ufffd\ufffd"


def test_the_start_and_the_end_of_long_output_are_captured() -> None:
    text = capture_output(b"start", *[b"x" * 100_000] * 30, b"end")

    assert text is not None and len(text) < 66_000
    assert text.startswith("start") and text.endswith("end") and "[...]" in text

"""The sandbox of an activity: a folder in the place of a provider's virtual machine, and the programs run in it.

Used by `exe_unit.py`. It has the programs of the deployed image, and the three volumes of the provider image. /golem is
a folder of the activity: paths below it are rewritten in the arguments of a command, but not in files that were
transferred; programs find the folder in GOLEM_DEVNET_ROOT.

It separates activities, but gives no security: programs run as this user, with this user's rights.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import posixpath
import re
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from devnet.image import Image
from devnet.provider.processes import ACTIVITY_VARIABLE, Processes

log = logging.getLogger(__name__)

#: The environment variable with the path of the folder that replaces /golem.
ROOT_VARIABLE = "GOLEM_DEVNET_ROOT"
VOLUMES = ("input", "output", "work")
#: Exit statuses as in shells.
CANNOT_RUN, NOT_FOUND = 126, 127

#: A path that is /golem or below it, in a shell command too, and the part after /golem.
_GOLEM_PATH = re.compile(r"""(?<![\w./-])/golem(?![\w.-])((?:/[^\s'"`;:,|&<>()]*)?)""")
_READ_BYTES = 64 * 1024
#: Limit on the reads from a pipe after its program has ended, because a process left behind may never stop writing.
_MAX_FINAL_READS = 16
_REAP_SECONDS = 5.0
#: An interrupted transfer may still write its last block into a folder that is being removed.
_REMOVAL_ATTEMPTS, _REMOVAL_RETRY_SECONDS = 20, 0.1


class PathOutsideSandbox(Exception):
    """A path is outside the sandbox."""


class Sandbox:
    """The folder and the programs of an activity.

    :param folder: made here, and removed at the end.
    :param environment: the environment of programs, to which variables for the sandbox are added.
    :param cpus: the processor cores that programs may use; those of this process if None.
    """

    def __init__(
        self, activity_id: str, folder: Path, *, environment: Mapping[str, str], cpus: Collection[int] | None
    ) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder.resolve()
        self.golem_folder = self._folder / "golem"
        for name in (*(f"golem/{volume}" for volume in VOLUMES), "tmp"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        self.processes = Processes(activity_id)
        self._cpus = set(cpus or ()) & os.sched_getaffinity(0)
        self._image = Image(programs={})
        self._environment = {
            "TMPDIR": str(self._folder / "tmp"),
            # Each activity has its own warm process, as it would in its own virtual machine.
            "MLG_PLACE": str(self._folder / "warm"),
            **environment,
            ACTIVITY_VARIABLE: self.processes.mark,
            ROOT_VARIABLE: str(self.golem_folder),
        }

    def use_image(self, image: Image) -> None:
        """Deploy an image: from now on its programs can be run, with its models."""
        self._image = image
        if image.home is not None:
            self._environment["MLG_HOME"] = image.home

    # Paths

    def host_path(self, text: str) -> Path:
        """Return the real path of a path in a volume. :raises PathOutsideSandbox: it is in none, or links lead out."""
        normalized = posixpath.normpath(text)
        volume = next((name for name in VOLUMES if normalized.startswith(f"/golem/{name}/")), None)
        if volume is None or "\0" in text:
            raise PathOutsideSandbox(
                f"{text} is not in one of the volumes {', '.join(f'/golem/{name}' for name in VOLUMES)}."
            )
        path = self.golem_folder / normalized.removeprefix("/golem/")
        try:
            is_inside = path.resolve().is_relative_to(self.golem_folder)
        except (OSError, RuntimeError):  # a cycle of links
            is_inside = False
        if not is_inside:
            raise PathOutsideSandbox(f"{text} is outside the sandbox.")
        return path

    def rewrite_paths(self, argument: str) -> str:
        """Replace /golem by the real folder in an argument. :raises PathOutsideSandbox: a path in it is outside."""

        def rewrite(match: re.Match[str]) -> str:
            normalized = posixpath.normpath(match[0])
            if normalized != "/golem" and not normalized.startswith("/golem/"):
                raise PathOutsideSandbox(f"{match[0]} is outside the sandbox.")
            return f"{self.golem_folder}{match[1]}"

        return _GOLEM_PATH.sub(rewrite, argument)

    def find_program(self, entry_point: str) -> str | None:
        """Find a program by its absolute path: one that was transferred, or one of the image."""
        path = self.rewrite_paths(entry_point)
        if path != entry_point:
            return path if Path(path).exists() else None
        return self._image.find_program(entry_point)

    def list_outputs(self) -> dict[Path, tuple[int, int, int]]:
        """Return the regular files in the output volume -> inode, time of modification and size.

        Hidden ones are left out: a program may be writing them.
        """
        found = {}
        for path in (self.golem_folder / "output").rglob("[!.]*"):
            if path.is_file() and not path.is_symlink():
                status = path.stat()
                found[path] = (status.st_ino, status.st_mtime_ns, status.st_size)
        return found

    # Programs

    async def run(
        self,
        entry_point: str,
        arguments: Sequence[str],
        *,
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
    ) -> int:
        """Run a program to its end. If cancelled, kill its whole session.

        :return: its exit status; 128 + N if signal N ended it, 126 or 127 if it could not be started.
        :raises PathOutsideSandbox: an argument contains a path outside the folder.
        """
        program = self.find_program(entry_point)
        arguments = [self.rewrite_paths(argument) for argument in arguments]
        if program is None:
            on_stderr(f"{entry_point}: not found\n".encode())
            return NOT_FOUND
        loop = asyncio.get_running_loop()
        with _pipe() as (out, out_end), _pipe() as (err, err_end):
            try:
                process = self._start_process([program, *arguments], out_end, err_end)
            except (OSError, ValueError) as error:  # no interpreter, no rights, a NUL, too long
                on_stderr(f"{entry_point}: {error}\n".encode())
                return CANNOT_RUN
            streams = {out: on_stdout, err: on_stderr}
            exited = self._exit_status(process)
            for stream, on_data in streams.items():
                loop.add_reader(stream, _read, loop, stream, on_data)
            try:
                status = await asyncio.shield(exited)
                for stream, on_data in streams.items():
                    for _ in range(_MAX_FINAL_READS):
                        if not _read(loop, stream, on_data):
                            break
            finally:
                for stream in streams:
                    loop.remove_reader(stream)
                if not exited.done():
                    # Processes that are killed with their parent are not waited for, so their time is read before.
                    self.processes.cpu_seconds()
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(process.pid, 9)
                    await asyncio.wait({exited}, timeout=_REAP_SECONDS)
        # Processes left behind have a new parent from now on, so their time is read now.
        self.processes.cpu_seconds()
        return status if status >= 0 else 128 - status

    def _start_process(self, command: list[str], out_end: int, err_end: int) -> subprocess.Popen[bytes]:
        own_cpus = os.sched_getaffinity(0)
        try:
            # A child inherits the cores of the thread that starts it, so they are changed for that moment.
            if self._cpus:
                os.sched_setaffinity(0, self._cpus)
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out_end,
                stderr=err_end,
                cwd=self.golem_folder / "work",
                env=self._environment,
                start_new_session=True,
            )
        finally:
            os.sched_setaffinity(0, own_cpus)
            os.close(out_end)
            os.close(err_end)
        self.processes.add_child(process.pid)
        return process

    def _exit_status(self, process: subprocess.Popen[bytes]) -> asyncio.Future[int]:
        """Return a future of the exit status. The process is waited for even if the future is not."""
        loop = asyncio.get_running_loop()
        exited: asyncio.Future[int] = loop.create_future()
        descriptor = os.pidfd_open(process.pid)

        def reap() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            # Not Popen.wait, because only wait4 returns the processor time of this child.
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            self.processes.child_reaped(process.pid, usage.ru_utime + usage.ru_stime)
            if not exited.done():
                exited.set_result(process.returncode)

        loop.add_reader(descriptor, reap)
        return exited

    async def remove(self) -> None:
        """Kill every process of the activity and remove the folder."""
        await self.processes.kill_all()
        for _ in range(_REMOVAL_ATTEMPTS):
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
            if not self._folder.exists():
                return
            await asyncio.sleep(_REMOVAL_RETRY_SECONDS)
        log.warning("%s cannot be removed", self._folder)


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    """Open a pipe: a non-blocking read end, closed here, and a write end, closed by `_start_process`."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    try:
        yield read_end, write_end
    finally:
        os.close(read_end)


def _read(loop: asyncio.AbstractEventLoop, stream: int, on_data: Callable[[bytes], None]) -> bool:
    """Read the data that is available. :return: whether there was any."""
    try:
        data = os.read(stream, _READ_BYTES)
    except BlockingIOError:
        return False
    if data:
        on_data(data)
    else:
        loop.remove_reader(stream)  # a closed pipe is always ready for reading
    return bool(data)

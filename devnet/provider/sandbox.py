"""A folder that stands for a provider's virtual machine, and programs run in it.

Used by `exe_unit.py`. It has the three volumes of the provider's image; what a script calls /golem is a folder of
the activity's own here, and so are the paths in a command's words. Paths inside files that were sent are not touched:
they find the folder in GOLEM_DEVNET_ROOT.

It keeps honest programs apart and no dishonest one in: they run as this user, with this user's rights.
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

from devnet.provider.processes import ACTIVITY_VARIABLE, Processes

log = logging.getLogger(__name__)

#: The variable that names the folder which stands for /golem.
ROOT_VARIABLE = "GOLEM_DEVNET_ROOT"
VOLUMES = ("input", "output", "work")
#: Exit statuses as shells give them.
CANNOT_RUN, NOT_FOUND = 126, 127

#: /golem where it begins a path, on its own or in the text of a shell's command, and the rest of that path.
_GOLEM = re.compile(r"""(?<![\w./-])/golem(?![\w.-])((?:/[^\s'"`;:,|&<>()]*)?)""")
_READ_BYTES = 64 * 1024
#: What waits in a pipe when its program has ended; one that was left behind may go on writing for ever.
_MAX_FINAL_READS = 16
_REAP_SECONDS = 5.0
#: A transfer that was interrupted may still write its last block into a folder that is being removed.
_REMOVAL_ATTEMPTS, _REMOVAL_RETRY_SECONDS = 20, 0.1


class PathOutsideSandbox(Exception):
    """A path leads out of the folder."""


class Sandbox:
    """One activity's folder and its programs.

    :param folder: made here, and removed at the end.
    :param environment: all that programs get, beside where they are.
    :param cpus: the processor cores that programs may use; all of this process's if None.
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
        self._environment = {
            "TMPDIR": str(self._folder / "tmp"),
            # A warm process belongs to the activity that started it, as it does in a machine of one's own.
            "MLG_PLACE": str(self._folder / "warm"),
            **environment,
            ACTIVITY_VARIABLE: self.processes.mark,
            ROOT_VARIABLE: str(self.golem_folder),
        }

    # Paths

    def host_path(self, text: str) -> Path:
        """Turn a path in one of the volumes into where it is here.

        :raises PathOutsideSandbox: it is in none of them, or a link leads out of them.
        """
        normalized = posixpath.normpath(text)
        volume = next((name for name in VOLUMES if normalized.startswith(f"/golem/{name}/")), None)
        if volume is None or "\0" in text:
            raise PathOutsideSandbox(
                f"{text} is in none of the volumes {', '.join(f'/golem/{name}' for name in VOLUMES)}."
            )
        path = self.golem_folder / normalized.removeprefix("/golem/")
        try:
            is_inside = path.resolve().is_relative_to(self.golem_folder)
        except (OSError, RuntimeError):  # links in a circle
            is_inside = False
        if not is_inside:
            raise PathOutsideSandbox(f"{text} leads out of the sandbox.")
        return path

    def rewrite_paths(self, word: str) -> str:
        """Put the folder's path in the place of every /golem in a word of a command.

        :raises PathOutsideSandbox: a path leads out of the folder.
        """

        def moved(match: re.Match[str]) -> str:
            normalized = posixpath.normpath(match[0])
            if normalized != "/golem" and not normalized.startswith("/golem/"):
                raise PathOutsideSandbox(f"{match[0]} leads out of the sandbox.")
            return f"{self.golem_folder}{match[1]}"

        return _GOLEM.sub(moved, word)

    def find_program(self, entry_point: str) -> str | None:
        """Find a program: one that was sent, one of this machine's, or one by its base name on the PATH."""
        moved = self.rewrite_paths(entry_point)
        if moved != entry_point or (entry_point.startswith("/") and Path(entry_point).exists()):
            return moved if Path(moved).exists() else None
        # What the image has in /usr/local/bin may be anywhere on this machine.
        return shutil.which(posixpath.basename(entry_point), path=self._environment.get("PATH"))

    def list_outputs(self) -> dict[Path, tuple[int, int, int]]:
        """List the plain files in the output volume, each with what changes when it is written anew."""
        found = {}
        for path in (self.golem_folder / "output").rglob("*"):
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
        """Run a program to its end; it is killed with its whole session if this is cancelled.

        :return: its exit status, 128 and more if a signal ended it, 126 or 127 if it could not be started.
        :raises PathOutsideSandbox: a word leads out of the folder.
        """
        program = self.find_program(entry_point)
        words = [self.rewrite_paths(word) for word in arguments]
        if program is None:
            on_stderr(f"{entry_point}: not found\n".encode())
            return NOT_FOUND
        loop = asyncio.get_running_loop()
        with _pipe() as (out, out_end), _pipe() as (err, err_end):
            try:
                process = self._start_process([program, *words], out_end, err_end)
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
                    # What dies with its parent was waited for by nobody, so its time is never told again.
                    self.processes.cpu_seconds()
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(process.pid, 9)
                    await asyncio.wait({exited}, timeout=_REAP_SECONDS)
        # Those it left behind have another parent from now on, and their time is theirs alone.
        self.processes.cpu_seconds()
        return status if status >= 0 else 128 - status

    def _start_process(self, words: list[str], out_end: int, err_end: int) -> subprocess.Popen[bytes]:
        own_cpus = os.sched_getaffinity(0)
        try:
            # A child has its parent's cores from its first moment; only this thread's are changed, and only for now.
            if self._cpus:
                os.sched_setaffinity(0, self._cpus)
            process = subprocess.Popen(
                words,
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
        """Give a future of the exit status; the process is waited for even when nobody awaits that any more."""
        loop = asyncio.get_running_loop()
        exited: asyncio.Future[int] = loop.create_future()
        descriptor = os.pidfd_open(process.pid)

        def reap() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            # Not Popen.wait: only this tells the processor time of this child and no other.
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
    """Give a pipe: an end that is read without waiting and closed here, and one for a child, closed by its start."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    try:
        yield read_end, write_end
    finally:
        os.close(read_end)


def _read(loop: asyncio.AbstractEventLoop, stream: int, on_data: Callable[[bytes], None]) -> bool:
    """Read what is there. :return: whether there was something."""
    try:
        data = os.read(stream, _READ_BYTES)
    except BlockingIOError:
        return False
    if data:
        on_data(data)
    else:
        loop.remove_reader(stream)  # its end is ready for reading for ever
    return bool(data)

"""One warm worker process on this machine, and the communication with it.

Used by `local.py`. The process is `mlg-provider serve`, the same program as on a provider. Its standard input is a pipe
from this process, so it ends when this process ends, for whatever reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batcher.waiting import wait_for_first
from provider_image.errors import WorkerDied
from provider_image.progress import ProgressReport
from provider_image.runtime_paths import socket_path
from provider_image.subprocesses import child_environment, exit_description, module_command

if TYPE_CHECKING:
    from batcher.executors.local import LocalTimings

log = logging.getLogger(__name__)

_MAX_LINE_BYTES = 1024 * 1024
#: How lines begin that are no reply.
_PROGRESS, _BEGAN = b'{"progress":', b'{"began":'


class WorkerProcess:
    """A warm process, from its start to its end; a new object for each process."""

    def __init__(
        self, number: int, folder: Path, options: Sequence[str], environment: Mapping[str, str], timings: LocalTimings
    ) -> None:
        self.number = number
        self._timings = timings
        self._folder = folder
        always = ("--place", str(folder), "--idle-seconds", "0", "--exit-with-stdin")
        self._command = module_command("provider_image", "serve", *always, *options)
        self._environment = child_environment(environment)
        self._process: asyncio.subprocess.Process | None = None
        self._output_reader: asyncio.Task[None] | None = None
        self._is_ready = asyncio.Event()
        self._last_line = ""

    async def start(self) -> None:
        """Start the process and wait until it listens. :raises WorkerDied: it does not; quotes its last output."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=self._environment,
                limit=_MAX_LINE_BYTES,
                # Ctrl-C reaches every process of the terminal's group; only the batcher must handle it.
                start_new_session=True,
            )
        except OSError as error:
            raise WorkerDied(f"A worker process cannot be started: {error}") from error
        assert self._process.stdout is not None
        self._output_reader = asyncio.create_task(self._read_output(self._process.stdout))
        await wait_for_first(self._is_ready.wait(), self._process.wait(), timeout_seconds=self._timings.start_seconds)
        if not self._is_ready.is_set():
            how = await self._exit_description() if self._process.returncode is not None else "was not ready in time"
            raise WorkerDied(f"A worker process {how} at its start. {self._last_line}".strip())

    @property
    def pid(self) -> int | None:
        """The process's id; None before `start`."""
        return self._process.pid if self._process else None

    @property
    def has_ended(self) -> bool:
        """True when the process was started and has ended."""
        return self._process is not None and self._process.returncode is not None

    async def wait(self) -> None:
        """Wait until the process has ended."""
        if self._process is not None:
            await self._process.wait()

    async def run_chunk(
        self,
        chunk: Path,
        results: Path,
        on_progress: Callable[[ProgressReport], None] | None = None,
        on_begin: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """Run one chunk, after those that were sent before, and return the reply.

        :param on_begin: called when the process begins it; until then, cancelling the call takes it back.
        :raises WorkerDied: the process ended before it replied.
        """
        received = b""
        job = {"chunk": str(chunk), "results": str(results), "progress": on_progress is not None}
        job["announce"] = on_begin is not None
        try:
            reader, writer = await asyncio.open_unix_connection(str(socket_path(self._folder)), limit=_MAX_LINE_BYTES)
            try:
                writer.write(json.dumps(job).encode() + b"\n")
                await writer.drain()
                while (received := await reader.readline()).startswith((_PROGRESS, _BEGAN)):
                    if on_begin is not None and received.startswith(_BEGAN):
                        on_begin()
                    elif on_progress is not None:
                        self._report(received, on_progress)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
        except OSError as error:
            log.debug("the connection to worker %d broke: %s", self.number, error)
        if received.endswith(b"\n"):
            with contextlib.suppress(ValueError):
                reply = json.loads(received)
                if isinstance(reply, dict):
                    return reply
        raise WorkerDied(f"The worker process {await self._exit_description()} during the chunk.")

    def _report(self, line: bytes, on_progress: Callable[[ProgressReport], None]) -> None:
        try:
            report = ProgressReport.from_json(json.loads(line)["progress"])
        except (ValueError, TypeError, RecursionError) as error:
            log.warning("worker %d: a report is dropped: %s", self.number, error)
        else:
            on_progress(report)

    async def stop(self, *, is_forced: bool = False) -> None:
        """End the process, wait for it, and remove its files."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            if is_forced:
                self.kill()
            try:
                async with asyncio.timeout(self._timings.stop_seconds):
                    await self._process.wait()
            except TimeoutError:
                self.kill()
                await self._process.wait()
            if self._output_reader is not None:
                await self._output_reader
        socket_path(self._folder).unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """End the process at once; `stop` removes its files."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _exit_description(self) -> str:
        assert self._process is not None
        try:
            # The connection breaks a moment before the system has the exit status.
            async with asyncio.timeout(self._timings.stop_seconds):
                status = await self._process.wait()
        except TimeoutError:
            return "stopped responding"
        return exit_description(status)

    async def _read_output(self, stream: asyncio.StreamReader) -> None:
        while True:
            try:
                line = (await stream.readline()).decode(errors="replace")
            except ValueError:
                continue  # too long a line: only its end is logged, and the pipe does not fill up
            if not line:
                return
            text = line.rstrip()
            if text == "ready":
                self._is_ready.set()
            elif text:
                self._last_line = text
                log.warning("worker %d: %s", self.number, text)

"""Processes that decode images, of which a pool is kept warm.

Used by `batcher.resizing`, which reduces images before they are packed, and by the server's thumbnails and its check of
the quality of uploads. Decoding an
untrusted image may crash or hang its process, or take all memory, so `__main__.py` does it with limits on memory and
processor time, and without sockets: it reaches neither the network nor the Golem daemon. Where the kernel can restrict
that (`provider_image.system_calls`), it reads no file of the user but those that it is given. Each process has one
image at a time, so it is known which image killed it. This is not a `ProcessPoolExecutor`, which cannot tell which job
broke it and leaves its processes behind when its owner is killed.

A process and its owner exchange messages over a Unix socket, the process's standard input: one of JSON for each job
(`do` is the name of the work, `options` its keyword arguments, `inputs` a path by name, and there is `limit_seconds`),
followed by the opened files of its inputs, and one of JSON for each reply, followed by one for each output that it
names. The process reads the files itself, so the originals do not pass through its owner. It ends when the owner's end
of the socket closes, for whatever reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.errors import ChunkTimeout, DecodingUnavailable, MlgError, WorkerDied, error_from_reply
from provider_image.schemas import MAX_BYTES
from provider_image.subprocesses import child_environment, exit_description, module_command

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

#: Limit for a job; the largest accepted image needs two seconds on an idle machine. As much processor time is allowed.
JOB_TIMEOUT_SECONDS = 30.0
#: A process must be ready within this time after its start; importing takes a tenth of a second.
START_SECONDS = 60.0
#: What a process sends when it is ready.
READY = b"ready"
#: What the files of a job come with, and the most of them: those of a contact sheet. The kernel takes 253 at once.
FILES, MAX_FILES = b"f", 250
#: Longest message of JSON in both directions: paths of a hundred thumbnails, a reason.
MAX_JSON_BYTES = 256 * 1024
#: The kernel ends a process this long after the timeout of its item: a process that hangs while it holds the GIL would
#: not notice that its owner has ended.
KILL_MARGIN_SECONDS = 5.0
#: A process that has closed its socket is killed if it does not end within this time.
EXIT_GRACE_SECONDS = 2.0
#: Starts in a row that may end before the item begins: idle processes may be killed, but not endlessly.
_MAX_STARTS = 3

#: Variables that a process gets: not those with keys and passwords of its owner.
_VARIABLES = ("PATH", "LANG", "TZ", "TMPDIR", "PYTHON", "LC_", "LD_", "COV")

#: The result of a job: its outputs by name; why there are none; or that one of its files is missing.
DecoderResult = dict[str, bytes] | MlgError | FileNotFoundError


class DecoderPool:
    """A pool of warm processes; safe to use from several threads. They are started when they are needed.

    :param workers: maximum number of processes.
    :param environment: variables for them, in addition to those of this process that are not secret.
    :param limit_seconds: limit for a job.
    :param readable: folders that they may read beside the inputs.
    """

    def __init__(
        self,
        workers: int,
        *,
        environment: Mapping[str, str] | None = None,
        limit_seconds: float = JOB_TIMEOUT_SECONDS,
        readable: Iterable[Path] = (),
    ) -> None:
        self._limit_seconds = limit_seconds
        self._is_closed = False
        own = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
        variables = child_environment({**own, **(environment or {})})
        command = module_command("provider_image.decoders", *map(str, readable))
        self._decoders = [Decoder(command, variables) for _ in range(workers)]
        # Last in, first out, so that no more processes are started than are needed at the same time.
        self._free: queue.LifoQueue[Decoder] = queue.LifoQueue()
        for decoder in self._decoders:
            self._free.put(decoder)

    def run(self, job: Mapping[str, Any], *, wait_seconds: float | None = None) -> DecoderResult:
        """Run a job in a process that is free.

        :param job: see the module's docstring, without `limit_seconds`.
        :param wait_seconds: how long to wait for a free process; None waits without limit.
        :return: a BadInput has the text that a provider would have returned; WorkerDied and ChunkTimeout mean that this
            job killed its process or hung.
        :raises DecodingUnavailable: no process is free or can be started, or this is closed; the job is not at fault.
        :raises OSError: an existing file cannot be read.
        """
        try:
            decoder = self._free.get(timeout=wait_seconds)
        except queue.Empty:
            raise DecodingUnavailable("Too many images are being decoded. Try again in a moment.") from None
        try:
            for _ in range(_MAX_STARTS):
                with contextlib.suppress(DecoderExited):
                    return decoder.run(job, self._limit_seconds)
        except (WorkerDied, ChunkTimeout) as error:
            if self._is_closed:
                raise _closed_error() from error
            return error
        finally:
            self._free.put(decoder)
        raise _closed_error() if self._is_closed else DecodingUnavailable()

    def pids(self) -> list[int]:
        """List the running processes."""
        return [decoder.pid for decoder in self._decoders if decoder.pid is not None]

    def retire(self) -> None:
        """Kill the processes; running and further calls of `run` raise."""
        self._is_closed = True
        for decoder in self._decoders:
            decoder.retire()

    def close(self) -> None:
        """Kill the processes and wait for them, once no call of `run` is left. May be called twice."""
        self.retire()
        for decoder in self._decoders:
            decoder.stop()


class DecoderExited(Exception):
    """The process ended before it began the job, so the job is not at fault."""


class Decoder:
    """A process that decodes, started when needed and again after it ended; for one thread at a time.

    :param variables: its environment.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        self._command, self._variables = command, variables
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[bytes, bytes] | None = None
        self._is_retired = False
        #: Prevents a start after `retire`.
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The process's id; None if none runs."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def run(self, job: Mapping[str, Any], limit_seconds: float) -> DecoderResult:
        """Run one job, in a new process if none runs.

        :raises DecoderExited: the process had ended before; call again.
        :raises WorkerDied: the process ended during this job.
        :raises ChunkTimeout: it took too long.
        :raises DecodingUnavailable: no process can be started.
        :raises OSError: a file cannot be read.
        """
        with contextlib.ExitStack() as files:
            try:
                inputs = [files.enter_context(Path(path).open("rb")) for path in job["inputs"].values()]
            except FileNotFoundError as missing:
                return missing
            return self._run(job, [file.fileno() for file in inputs], limit_seconds)

    def _run(self, job: Mapping[str, Any], inputs: Sequence[int], limit_seconds: float) -> DecoderResult:
        if self.pid is None:
            self.stop()
            self._start()
        assert self._connection is not None and self._process is not None
        # A process that a malicious image controls could send half a message.
        killer = threading.Timer(limit_seconds + KILL_MARGIN_SECONDS, self._process.kill)
        killer.start()
        try:
            document = {**job, "inputs": list(job["inputs"]), "limit_seconds": limit_seconds}
            self._connection.send_bytes(json.dumps(document).encode())
            if inputs:
                with socket.fromfd(self._connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as stream:
                    socket.send_fds(stream, [FILES], inputs)
            if not self._connection.poll(limit_seconds):
                self.stop()
                raise _timeout_error(limit_seconds)
            reply = json.loads(self._connection.recv_bytes(MAX_JSON_BYTES))
            names, is_error = reply["inputs"], bool(reply.keys() & {"code", "errno"})
            if set(names) != (set() if is_error else _output_names(job)):
                raise ValueError("other outputs than those of the job")
            data, left = {}, MAX_BYTES
            for name in names:
                data[name] = self._connection.recv_bytes(left)
                left -= len(data[name])
        except (BrokenPipeError, ConnectionResetError) as error:
            # The kernel raises these only if the job was never read: this item did not end the process.
            self.stop()
            raise DecoderExited() from error
        except (OSError, EOFError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            status = self._exit_status()
            if status in (-signal.SIGALRM, -signal.SIGXCPU):
                raise _timeout_error(limit_seconds) from error
            raise WorkerDied(
                f"The process that decodes images {exit_description(status)} at this one. "
                "Save it again in an image program and send that file."
            ) from error
        finally:
            killer.cancel()
        if "errno" in reply:
            raise OSError(reply["errno"], str(reply.get("text")))
        return error_from_reply(reply) if "code" in reply else data

    def retire(self) -> None:
        """Kill the process permanently, from any thread; a running `run` raises WorkerDied."""
        with self._lock:
            self._is_retired = True
            if self._process is not None:
                self._process.kill()

    def stop(self) -> int | None:
        """Kill the process, wait for it, and close its socket. :return: its exit status; None if none ran."""
        with self._lock:
            process, self._process = self._process, None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if process is None:
            return None
        process.kill()
        return process.wait()

    def _exit_status(self) -> int:
        """Return the exit status of a process that has closed its socket; kill it if it does not end."""
        process = self._process
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                # The socket closes a moment before the system has the status.
                process.wait(EXIT_GRACE_SECONDS)
        return self.stop() or 0

    def _start(self) -> None:
        from multiprocessing import Pipe  # changes sys.modules, which a worker has no need of

        ours, theirs = Pipe()
        try:
            with self._lock:
                if self._is_retired:
                    raise _closed_error()
                self._process = subprocess.Popen(
                    self._command,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    env=dict(self._variables),
                    # Ctrl-C reaches every process of the terminal's group; only the owner must handle it.
                    start_new_session=True,
                )
        except BaseException as error:
            ours.close()
            if isinstance(error, OSError):
                raise DecodingUnavailable(f"A process that decodes images cannot be started: {error}") from error
            raise
        finally:
            theirs.close()
        self._connection = ours
        try:
            is_ready = ours.poll(START_SECONDS) and ours.recv_bytes(MAX_JSON_BYTES) == READY
        except (OSError, EOFError):
            is_ready = False
        if not is_ready:
            how = exit_description(self._exit_status())
            raise DecodingUnavailable(f"A process that decodes images {how} at its start. See the log.")


def _output_names(job: Mapping[str, Any]) -> set[str]:
    """Return the names of what a job returns: one for each input, but for a contact sheet and a trial."""
    return {"sheet": {"sheet"}, "try": set[str]()}.get(job["do"], set(job["inputs"]))


def _closed_error() -> DecodingUnavailable:
    return DecodingUnavailable("This process was stopped before the images were decoded.")


def _timeout_error(limit_seconds: float) -> ChunkTimeout:
    return ChunkTimeout(
        f"The image could not be decoded within {limit_seconds:g} s. "
        "Save it again in an image program and send that file."
    )

"""One process that shrinks items, and the conversation with it.

Used by `batcher.resizing`; `__main__.py` is the other side. They talk over one Unix socket, the process's standard
input: a line of JSON for each job, and a line of JSON for each reply with the shrunk inputs' bytes behind it. The
process reads the files itself, so that originals do not even pass through the batcher. When the batcher's end of the
socket closes, however that comes, the process ends.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from batcher.errors import ResizingUnavailable
from batcher.subprocesses import module_command
from provider_image.errors import ChunkTimeout, MlgError, WorkerDied, error_from_reply
from provider_image.schemas import MAX_BYTES

#: A process must be ready within this time after it was started; importing takes a tenth of a second.
START_SECONDS = 60.0
#: What a process says when it is ready.
READY = b"ready\n"
#: Longest line of either side: names, sizes, a reason.
MAX_LINE_BYTES = 64 * 1024
#: The kernel ends a process that is still at an item this long after its time limit: one that hangs while it holds
#: Python's lock could not see that its batcher is gone.
KILL_MARGIN_SECONDS = 5.0
#: A process that has closed its socket is killed if it has not ended after this time.
EXIT_GRACE_SECONDS = 2.0


class DecoderExited(Exception):
    """The process ended before it had begun the item, so the item has nothing to do with it."""


@dataclass(frozen=True, kw_only=True)
class ResizeJob:
    """One item to shrink."""

    #: The kind of service.
    service: str
    #: The fields of `ModelInput`.
    model_input: dict[str, Any]
    #: Input name -> path of the file.
    inputs: dict[str, str]


class Decoder:
    """A process that is started when it is needed, and again when it has ended. One thread asks it at a time.

    :param variables: its environment.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._stream: io.BufferedRWPair | None = None
        self._is_retired = False
        #: Guards the process against being started after it was retired.
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The process's id; None if there is none."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def run(self, job: ResizeJob, limit_seconds: float) -> dict[str, bytes] | MlgError | FileNotFoundError:
        """Have one item shrunk, in a fresh process if need be.

        :return: its inputs; or why there are none, as a provider would say it; or that one of its files is gone.
        :raises DecoderExited: the process had ended before; ask again.
        :raises WorkerDied: the process ended in the middle of this item.
        :raises ChunkTimeout: it took too long.
        :raises ResizingUnavailable: no process can be started.
        :raises OSError: a file cannot be read.
        """
        if self.pid is None:
            self.stop()
            self._start()
        assert self._socket is not None and self._stream is not None
        try:
            self._socket.settimeout(limit_seconds)
            self._stream.write(json.dumps({**asdict(job), "limit_seconds": limit_seconds}).encode() + b"\n")
            self._stream.flush()
            reply, data = self._read_reply()
        except TimeoutError as error:
            self.stop()
            raise _timeout_error(limit_seconds) from error
        except (BrokenPipeError, ConnectionResetError) as error:
            # The kernel says so when the job was never read: whatever ended the process, it was not this item.
            self.stop()
            raise DecoderExited() from error
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            status = self._exit_status()
            if status == -signal.SIGALRM:
                raise _timeout_error(limit_seconds) from error
            raise WorkerDied(
                f"The process that decodes pictures {_exit_description(status)} at this one. "
                "Save it again in an image program and send that file."
            ) from error
        if "errno" in reply:
            missing_or_unreadable = OSError(reply["errno"], reply["text"])
            if isinstance(missing_or_unreadable, FileNotFoundError):
                return missing_or_unreadable
            raise missing_or_unreadable
        return error_from_reply(reply) if "code" in reply else data

    def retire(self) -> None:
        """Kill the process for good, from whichever thread; who waits for its reply sees that it died."""
        with self._lock:
            self._is_retired = True
            if self._process is not None:
                self._process.kill()

    def stop(self) -> int | None:
        """Kill the process, wait for it, and let go of its socket. :return: its exit status, None without one."""
        with self._lock:
            process, self._process = self._process, None
        if self._stream is not None:
            with contextlib.suppress(OSError):  # what was not sent is not needed
                self._stream.close()
        if self._socket is not None:
            self._socket.close()
        self._socket = self._stream = None
        if process is None:
            return None
        process.kill()
        return process.wait()

    def _exit_status(self) -> int | None:
        """Return the exit status of a process that has closed its socket, and end it if it goes on without."""
        process = self._process
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                # The socket closes a moment before the system has the status.
                process.wait(EXIT_GRACE_SECONDS)
        return self.stop()

    def _read_reply(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Read a reply and the inputs behind it. :raises EOFError: it is cut short."""
        assert self._stream is not None
        line = self._stream.readline(MAX_LINE_BYTES)
        if not line.endswith(b"\n"):
            raise EOFError
        reply: dict[str, Any] = json.loads(line)
        data = {}
        for name, size in reply.get("sizes", {}).items():
            if not 0 <= size <= MAX_BYTES:
                raise ValueError(size)
            data[name] = self._stream.read(size)
            if len(data[name]) != size:
                raise EOFError
        return reply, data

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            with self._lock:
                if self._is_retired:
                    raise ResizingUnavailable("The batcher was stopped before the pictures were shrunk.")
                self._process = subprocess.Popen(
                    module_command("batcher.resizing"),
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    env=dict(self._variables),
                    # Ctrl-C reaches every process of the terminal's group; only the batcher shall act on it.
                    start_new_session=True,
                )
        except BaseException as error:
            ours.close()
            if isinstance(error, OSError):
                raise ResizingUnavailable(f"A process that shrinks pictures cannot be started: {error}") from error
            raise
        finally:
            theirs.close()
        self._socket, self._stream = ours, (stream := ours.makefile("rwb"))
        ours.settimeout(START_SECONDS)
        try:
            is_ready = stream.readline(MAX_LINE_BYTES) == READY
        except OSError:
            is_ready = False
        if not is_ready:
            how = _exit_description(self._exit_status())
            raise ResizingUnavailable(f"A process that shrinks pictures {how} at its start. See the batcher's log.")


def _timeout_error(limit_seconds: float) -> ChunkTimeout:
    return ChunkTimeout(
        f"The picture could not be decoded within {limit_seconds:g} s. "
        "Save it again in an image program and send that file."
    )


def _exit_description(status: int | None) -> str:
    if status is None or status >= 0:
        return f"ended with status {status or 0}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    return f"was killed by {name}"

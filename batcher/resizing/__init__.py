"""Resizes images to a model's input before they are packed, in separate processes.

Made by `batcher.scheduler`, called by `batcher.packing` in threads. Decoding an untrusted image may crash or hang its
process, so `__main__.py` does it in warm processes, up to MLG_WORKERS of them, started when the first image comes. Each
has one image at a time, so it is known which image killed it. This is not a `ProcessPoolExecutor`, which cannot tell
which job broke it and leaves its processes behind when the batcher is killed.

A process and the batcher exchange messages over a Unix socket, the process's standard input: one of JSON for each job
(`size` has height, width and crop, `inputs` a path by name, and there is `limit_seconds`), and one of JSON for each
reply, followed by one for each resized input that it names. A job may also name an item of a chunk file (`chunk`),
whose inputs are then only tried. The process reads the files itself, so the originals do not pass through the batcher.
It ends when the batcher's end of the socket closes, for whatever reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batcher.errors import ResizingUnavailable
from batcher.subprocesses import child_environment, exit_description, module_command
from provider_image.errors import ChunkTimeout, MlgError, WorkerDied, error_from_reply
from provider_image.schemas import MAX_BYTES

if TYPE_CHECKING:
    from batcher.executors import Executor
    from batcher.settings import BatcherSettings
    from provider_image.models.catalogue import ModelFacts

#: Limit for an item; the largest accepted image needs two seconds on an idle machine.
ITEM_TIMEOUT_SECONDS = 30.0
#: A process must be ready within this time after its start; importing takes a tenth of a second.
START_SECONDS = 60.0
#: What a process sends when it is ready.
READY = b"ready"
#: Longest message of JSON in both directions: names, sizes, a reason.
MAX_JSON_BYTES = 64 * 1024
#: The kernel ends a process this long after the timeout of its item: a process that hangs while it holds the GIL would
#: not notice that its batcher has ended.
KILL_MARGIN_SECONDS = 5.0
#: A process that has closed its socket is killed if it does not end within this time.
EXIT_GRACE_SECONDS = 2.0
#: Starts in a row that may end before the item begins: idle processes may be killed, but not endlessly.
_MAX_STARTS = 3

#: The result for an item: its resized inputs; why there are none; or that one of its files is missing.
ResizeResult = dict[str, bytes] | MlgError | FileNotFoundError


class Resizer:
    """A pool of warm processes that resize items; safe to use from several threads.

    :param workers: maximum number of processes.
    :param environment: variables for them, in addition to those of this process.
    """

    def __init__(
        self, workers: int, *, environment: Mapping[str, str] | None = None, limit_seconds: float = ITEM_TIMEOUT_SECONDS
    ) -> None:
        self._limit_seconds = limit_seconds
        self._is_closed = False
        variables = child_environment({**os.environ, **(environment or {})})
        self._decoders = [Decoder(variables) for _ in range(workers)]
        # Last in, first out, so that no more processes are started than are needed at the same time.
        self._free: queue.LifoQueue[Decoder] = queue.LifoQueue()
        for decoder in self._decoders:
            self._free.put(decoder)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="resize")

    def resize(self, model: ModelFacts, items: Iterable[Mapping[str, Path]]) -> list[ResizeResult]:
        """Resize items in parallel, and wait for all of them.

        :param items: input name -> image file, for each item.
        :return: a result for each item, in their order. A BadInput has the text that a provider would have returned;
            WorkerDied and ChunkTimeout mean that this item killed its process or hung.
        :raises ResizingUnavailable: no process can be started, or this is closed; no item is at fault.
        :raises OSError: an existing file cannot be read.
        """
        size = {"height": model.height, "width": model.width, "crop": model.crop}
        return self._run([{"size": size, "inputs": {name: str(path) for name, path in item.items()}} for item in items])

    def try_item(self, chunk: Path, models: Path, number: int) -> MlgError | None:
        """Decode the inputs of an item of a chunk file as a worker does.

        :param models: the folder of artefacts.
        :return: None, or why they cannot be used; WorkerDied and ChunkTimeout as in `resize`.
        :raises ResizingUnavailable: as `resize`.
        """
        (found,) = self._run([{"chunk": {"path": str(chunk), "models": str(models), "number": number}}])
        return found if isinstance(found, MlgError) else None

    def _run(self, jobs: Iterable[Mapping[str, Any]]) -> list[ResizeResult]:
        try:
            return list(self._threads.map(self._resize_one, jobs))
        except RuntimeError as error:
            if not self._is_closed:
                raise
            raise _closed_error() from error

    def pids(self) -> list[int]:
        """List the running processes."""
        return [decoder.pid for decoder in self._decoders if decoder.pid is not None]

    def close(self) -> None:
        """Kill the processes and wait for them; calls of `resize` raise. May be called twice."""
        self._is_closed = True
        for decoder in self._decoders:
            decoder.retire()
        self._threads.shutdown()
        for decoder in self._decoders:
            decoder.stop()

    def _resize_one(self, job: Mapping[str, Any]) -> ResizeResult:
        decoder = self._free.get()
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
        raise _closed_error() if self._is_closed else ResizingUnavailable()


def is_resizing(settings: BatcherSettings, executor: Executor) -> bool:
    """Tell whether an executor gets resized images; else it gets the originals."""
    return settings.shrink == "on" or (settings.shrink == "auto" and executor.is_remote)


class DecoderExited(Exception):
    """The process ended before it began the item, so the item is not at fault."""


class Decoder:
    """A process that decodes and resizes, started when needed and again after it ended; for one thread at a time.

    :param variables: its environment.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables
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

    def run(self, job: Mapping[str, Any], limit_seconds: float) -> ResizeResult:
        """Resize one item, in a new process if none runs.

        :raises DecoderExited: the process had ended before; call again.
        :raises WorkerDied: the process ended during this item.
        :raises ChunkTimeout: it took too long.
        :raises ResizingUnavailable: no process can be started.
        :raises OSError: a file cannot be read.
        """
        if self.pid is None:
            self.stop()
            self._start()
        assert self._connection is not None and self._process is not None
        # A process that a malicious image controls could send half a message.
        killer = threading.Timer(limit_seconds + KILL_MARGIN_SECONDS, self._process.kill)
        killer.start()
        try:
            self._connection.send_bytes(json.dumps({**job, "limit_seconds": limit_seconds}).encode())
            if not self._connection.poll(limit_seconds):
                self.stop()
                raise _timeout_error(limit_seconds)
            reply = json.loads(self._connection.recv_bytes(MAX_JSON_BYTES))
            data = {str(name): self._connection.recv_bytes(MAX_BYTES) for name in reply.get("inputs", ())}
        except (BrokenPipeError, ConnectionResetError) as error:
            # The kernel raises these only if the job was never read: this item did not end the process.
            self.stop()
            raise DecoderExited() from error
        except (OSError, EOFError, ValueError, AttributeError, TypeError) as error:
            status = self._exit_status()
            if status == -signal.SIGALRM:
                raise _timeout_error(limit_seconds) from error
            raise WorkerDied(
                f"The process that decodes images {exit_description(status)} at this one. "
                "Save it again in an image program and send that file."
            ) from error
        finally:
            killer.cancel()
        if "errno" in reply:
            missing_or_unreadable = OSError(reply["errno"], reply["text"])
            if isinstance(missing_or_unreadable, FileNotFoundError):
                return missing_or_unreadable
            raise missing_or_unreadable
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
        ours, theirs = Pipe()
        try:
            with self._lock:
                if self._is_retired:
                    raise _closed_error()
                self._process = subprocess.Popen(
                    module_command("batcher.resizing"),
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    env=dict(self._variables),
                    # Ctrl-C reaches every process of the terminal's group; only the batcher must handle it.
                    start_new_session=True,
                )
        except BaseException as error:
            ours.close()
            if isinstance(error, OSError):
                raise ResizingUnavailable(f"A process that resizes images cannot be started: {error}") from error
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
            raise ResizingUnavailable(f"A process that resizes images {how} at its start. See the batcher's log.")


def _closed_error() -> ResizingUnavailable:
    return ResizingUnavailable("The batcher was stopped before the images were resized.")


def _timeout_error(limit_seconds: float) -> ChunkTimeout:
    return ChunkTimeout(
        f"The image could not be decoded within {limit_seconds:g} s. "
        "Save it again in an image program and send that file."
    )

"""The warm process: keeps models loaded and processes chunks that it receives over a Unix socket, one after another.

Runs as `mlg-provider serve`, which the local executor starts once per worker, and `warm_client.py` when none is
running. The protocol is JSON lines: the request `{"chunk": PATH, "results": PATH}` is answered by
`{"ok": true, "seconds": S}` or `{"ok": false, "code": WORD, "reason": TEXT, "permanent": BOOL}`. A file lock in its
folder ensures that only one process serves there. The system releases the lock when the process dies, so a socket that
is found while holding the lock is stale. It must not serve other users: nobody else can access its folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from provider_image.errors import ChunkError, ConfigError, MalformedRequest, MlgError, WorkerDied
from provider_image.runtime import NetCache, run_chunk
from provider_image.runtime_paths import make_private_folder, socket_path

logger = logging.getLogger(__name__)

#: Longest request that is accepted.
_MAX_LINE_BYTES = 64 * 1024
#: Connections that were made just before an idle process stopped listening have this long to send a request.
_GRACE_SECONDS = 1.0
#: Interval at which a process that is about to end checks whether it may.
_POLL_SECONDS = 0.01


@contextlib.contextmanager
def _exclusive_lock(runtime_folder: Path) -> Iterator[None]:
    with (make_private_folder(runtime_folder) / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"Another process already serves in {runtime_folder}.") from error
        yield


def serve(
    runtime_folder: Path, nets: NetCache, *, idle_seconds: float, exit_with_stdin: bool, on_ready: Callable[[], None]
) -> None:
    """Serve until SIGTERM, SIGINT or `idle_seconds` without work; the current chunk is finished.

    Must be called in the main thread.

    :param runtime_folder: private folder for the lock and the socket.
    :param idle_seconds: 0 never exits because it is idle.
    :param exit_with_stdin: exit immediately, even during a chunk, when standard input is closed. If the parent holds
        the other end of that pipe, this process does not outlive it, however it dies.
    :param on_ready: called when the socket accepts connections.
    :raises ConfigError: another process serves in the folder, or the folder cannot be used.
    """
    with _exclusive_lock(runtime_folder):
        path = socket_path(runtime_folder)
        make_private_folder(path.parent)
        path.unlink(missing_ok=True)  # stale, because this process holds the lock
        if exit_with_stdin:
            threading.Thread(target=_exit_with_stdin, args=(path,), daemon=True).start()
        try:
            asyncio.run(_WarmServer(path, nets, idle_seconds).run(on_ready))
        finally:
            path.unlink(missing_ok=True)


def _exit_with_stdin(path: Path) -> None:
    with contextlib.suppress(OSError):  # standard input may be closed from the start
        while os.read(0, 65536):
            continue
    path.unlink(missing_ok=True)
    os._exit(0)  # from a thread, and without waiting for the current items: the parent is gone


class _WarmServer:
    """A loop for connections and signals, and a thread that processes chunks, so that neither blocks the other."""

    def __init__(self, path: Path, nets: NetCache, idle_seconds: float) -> None:
        self._path, self._nets, self._idle_seconds = path, nets, idle_seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chunk")
        #: Connected clients, and jobs that wait or run.
        self._clients = self._jobs = 0
        self._active_at = time.monotonic()
        self._stop_requested = asyncio.Event()

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Serve until it is time to stop."""
        for number in (signal.SIGTERM, signal.SIGINT):  # before on_ready, after which a signal may come
            asyncio.get_running_loop().add_signal_handler(number, self._stop_requested.set)
        async with await asyncio.start_unix_server(
            self._serve_client, self._path, backlog=64, limit=_MAX_LINE_BYTES
        ) as listener:
            on_ready()
            await self._wait_until_idle()
            # No new connections can be made; those that were just made are still served.
            self._path.unlink(missing_ok=True)
            self._active_at = time.monotonic()
            await asyncio.sleep(_POLL_SECONDS)
            while self._jobs or (self._clients and self._idle_for() < self._grace_seconds()):
                await asyncio.sleep(_POLL_SECONDS)
            listener.close()

    async def _wait_until_idle(self) -> None:
        """Wait until there was no work for `idle_seconds`, or until a signal."""
        limit = self._idle_seconds or None
        while limit is None or self._jobs or self._idle_for() < limit:
            rest = limit if limit is None or self._jobs else limit - self._idle_for()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rest):
                    await self._stop_requested.wait()
                    return

    def _grace_seconds(self) -> float:
        return 0.0 if self._stop_requested.is_set() else _GRACE_SECONDS

    def _idle_for(self) -> float:
        return time.monotonic() - self._active_at

    async def _serve_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        try:
            while (line := await reader.readline()).endswith(b"\n"):
                self._jobs += 1
                try:
                    reply = await asyncio.get_running_loop().run_in_executor(self._thread, self._run_job, line)
                    writer.write(json.dumps(reply).encode() + b"\n")
                    await writer.drain()
                finally:
                    self._jobs -= 1
                    self._active_at = time.monotonic()
        except (OSError, ValueError) as error:  # it has gone, or its line is too long
            logger.info("the connection of a client is closed: %s", error)
        finally:
            self._clients -= 1
            writer.close()

    def _run_job(self, line: bytes) -> dict[str, Any]:
        started = time.perf_counter()
        try:
            if self._stop_requested.is_set():
                raise WorkerDied("The warm process was stopped before it began the chunk.")
            chunk, results = _parse_job(line)
            run_chunk(chunk, results, self._nets)
        except MlgError as error:
            return {"ok": False, **error.to_reply()}
        except Exception as error:
            logger.exception("chunk failed")
            return {"ok": False, **ChunkError(f"{type(error).__name__}: {error}").to_reply()}
        return {"ok": True, "seconds": round(time.perf_counter() - started, 6)}


def _parse_job(line: bytes) -> tuple[Path, Path]:
    try:
        job = json.loads(line)
        chunk, results = Path(job["chunk"]), Path(job["results"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise MalformedRequest('Send one line: {"chunk": "/a/chunk.zip", "results": "/a/results.zip"}') from error
    if not (chunk.is_absolute() and results.is_absolute()):
        raise MalformedRequest("Both paths must be absolute: the warm process has another working folder.")
    return chunk, results

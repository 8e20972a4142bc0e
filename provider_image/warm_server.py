"""The warm process: keeps models loaded and processes chunks that it receives over a Unix socket, one after another.

Runs as `mlg-provider serve`, which the local executor starts once per worker, and `warm_client.py` when none is
running. The protocol is JSON lines: the request `{"chunk": PATH, "results": PATH}` is answered by
`{"ok": true, "seconds": S}` or `{"ok": false, "code": WORD, "reason": TEXT, "permanent": BOOL}`. A file lock in its
folder ensures that only one process serves there. The system releases the lock when the process dies, so a socket that
is found while holding the lock is stale. It must not serve other users: nobody else can access its folder.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import json
import logging
import os
import queue
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen(64)
        try:
            server = _WarmServer(listener, path, nets, idle_seconds)
            if exit_with_stdin:
                threading.Thread(target=_exit_with_stdin, args=(path,), daemon=True).start()
            server.install_signal_handlers()  # before on_ready, after which a signal may come
            on_ready()
            server.run()
        finally:
            path.unlink(missing_ok=True)
            listener.close()


def _exit_with_stdin(path: Path) -> None:
    with contextlib.suppress(OSError):  # standard input may be closed from the start
        while os.read(0, 65536):
            continue
    path.unlink(missing_ok=True)
    os._exit(0)  # from a thread, and without waiting for the current items: the parent is gone


@dataclass(eq=False, kw_only=True)
class _Connection:
    """A connection of a client."""

    connection: socket.socket
    #: The received part of an incomplete line.
    received: bytearray = field(default_factory=bytearray)
    #: Number of its jobs that wait or run.
    jobs: int = 0
    #: True when the client will send nothing more; it may still wait for a reply.
    has_ended: bool = False


class _WarmServer:
    """A loop for connections and signals, and a thread that processes chunks, so that neither blocks the other."""

    def __init__(self, listener: socket.socket, path: Path, nets: NetCache, idle_seconds: float) -> None:
        self._listener, self._path, self._nets = listener, path, nets
        self._idle_seconds = idle_seconds
        self._active_at = time.monotonic()
        self._is_listening, self._is_stopping = True, False
        self._waiting: collections.deque[tuple[_Connection, bytes]] = collections.deque()
        self._current: _Connection | None = None
        self._jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._wake_reader, self._wake_writer = socket.socketpair()
        for each in (self._wake_reader, self._wake_writer, listener):
            each.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._clients: dict[socket.socket, _Connection] = {}

    def install_signal_handlers(self) -> None:
        """Let SIGTERM and SIGINT stop the loop."""
        signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def run(self) -> None:
        """Serve until it is time to stop."""
        threading.Thread(target=self._run_jobs, daemon=True).start()
        while not self._is_finished():
            for key, _ in self._selector.select(self._select_timeout()):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._wake_reader:
                    with contextlib.suppress(BlockingIOError):
                        self._wake_reader.recv(4096)
                else:
                    self._receive(self._clients[key.fileobj])  # type: ignore[index]
            self._process_events()

    def _on_signal(self, number: int, frame: object) -> None:
        self._is_stopping = True

    def _select_timeout(self) -> float | None:
        if self._current is not None or (self._is_listening and not self._idle_seconds):
            return None
        limit = self._idle_seconds if self._is_listening else _GRACE_SECONDS
        return max(0.0, self._active_at + limit - time.monotonic())

    def _is_finished(self) -> bool:
        if self._current is not None or self._waiting:
            return False
        if self._is_stopping:
            return True
        return not self._is_listening and (not self._clients or self._select_timeout() == 0)

    def _process_events(self) -> None:
        while not self._replies.empty():
            assert self._current is not None
            self._send(self._current, self._replies.get())
            self._current, self._active_at = None, time.monotonic()
        if self._is_stopping:
            self._stop_listening()
            while self._waiting:
                client, _ = self._waiting.popleft()
                stopped = WorkerDied("The warm process was stopped before it began the chunk.")
                self._send(client, {"ok": False, **stopped.to_reply()})
        elif self._is_listening and self._idle_seconds and not self._waiting and self._select_timeout() == 0:
            # Stops accepting connections; those that were just made are still served.
            self._accept()
            self._stop_listening()
            self._active_at = time.monotonic()
        if self._current is None and self._waiting:
            self._current, line = self._waiting.popleft()
            self._jobs.put(line)

    def _stop_listening(self) -> None:
        if self._is_listening:
            self._path.unlink(missing_ok=True)
            self._selector.unregister(self._listener)
            self._listener.close()
            self._is_listening = False

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                self._clients[connection] = _Connection(connection=connection)
                self._selector.register(connection, selectors.EVENT_READ)

    def _receive(self, client: _Connection) -> None:
        try:
            data = client.connection.recv(_MAX_LINE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        client.received += data
        *lines, rest = bytes(client.received).split(b"\n")
        client.received = bytearray(rest)
        for line in lines:
            client.jobs += 1
            self._active_at = time.monotonic()
            self._waiting.append((client, line))
        if not data or len(rest) > _MAX_LINE_BYTES:
            client.has_ended = True
            self._selector.unregister(client.connection)
            self._close_if_done(client)

    def _send(self, client: _Connection, reply: dict[str, Any]) -> None:
        client.jobs -= 1
        try:
            client.connection.sendall(json.dumps(reply).encode() + b"\n")
        except OSError as error:
            logger.info("client has gone before the reply: %s", error)
        self._close_if_done(client)

    def _close_if_done(self, client: _Connection) -> None:
        if client.has_ended and not client.jobs:
            self._clients.pop(client.connection, None)
            client.connection.close()

    def _run_jobs(self) -> None:
        while True:
            reply = self._run_job(self._jobs.get())
            self._replies.put(reply)
            with contextlib.suppress(BlockingIOError):  # if the pipe is full, the loop wakes anyway
                self._wake_writer.send(b"\0")

    def _run_job(self, line: bytes) -> dict[str, Any]:
        started = time.perf_counter()
        try:
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

"""The warm process: keeps models loaded and processes chunks that it receives over a Unix socket, in their order.

It has one chunk under way at a time, or as many as it is told: the threads then begin the items of the next when none
of a chunk are left.

Runs as `mlg-provider serve`, which the local executor starts once per worker, and `warm_client.py` when none is
running. The protocol is JSON lines: the request `{"chunk": PATH, "results": PATH}` is answered by
`{"ok": true, "seconds": S}` or `{"ok": false, "code": WORD, "reason": TEXT, "permanent": BOOL}`. If the request has
`limit_seconds` and the chunk takes longer, the process ends: an item that hangs must not block the chunks that follow.
If it has `"progress": true`, lines like `{"progress": {"item": 3, "fraction": 0.5, "preview": BASE64 or null}}` come
before the answer, when the service reports any. If it has `"announce": true`, the line `{"began": true}` comes when the
chunk begins; one whose client has gone by then is left out, and one whose client goes later ends before its next item.
With `--pipes` it also takes chunks from named pipes, see `provider_image.pipes`; those are not interrupted, and have
the limit of every chunk.
A file lock in its folder ensures that only one process serves there. The system releases the lock when the process
dies, so a socket that is found while holding the lock is stale. It must not serve other users: nobody else can access
its folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import math
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from provider_image.errors import ChunkError, ConfigError, MalformedRequest, MlgError, WorkerDied
from provider_image.pipes import ChunkPipes
from provider_image.progress import REPORT_SECONDS, ProgressBoard
from provider_image.runtime import NetCache, run_chunk
from provider_image.runtime_paths import make_private_folder, socket_path
from provider_image.schemas import MAX_CHUNK_SECONDS

logger = logging.getLogger(__name__)

#: Longest request that is accepted.
_MAX_LINE_BYTES = 64 * 1024
#: Connections that were made just before an idle process stopped listening have this long to send a request.
_GRACE_SECONDS = 1.0
#: Interval at which a process that is about to end checks whether it may.
_POLL_SECONDS = 0.01
#: Once it is noticed that the client of a chunk has gone, the chunk may go on for so long.
_ABANDONED_SECONDS = 30.0


@contextlib.contextmanager
def _exclusive_lock(runtime_folder: Path) -> Iterator[None]:
    with (make_private_folder(runtime_folder) / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"Another process already serves in {runtime_folder}.") from error
        yield


def serve(
    runtime_folder: Path,
    nets: NetCache,
    *,
    idle_seconds: float,
    exit_with_stdin: bool,
    on_ready: Callable[[], None],
    has_pipes: bool = False,
    chunks: int = 1,
) -> None:
    """Serve until SIGTERM, SIGINT or `idle_seconds` without work; the current chunk is finished.

    Must be called in the main thread.

    :param runtime_folder: private folder for the lock and the socket.
    :param idle_seconds: 0 never exits because it is idle.
    :param exit_with_stdin: exit immediately, even during a chunk, when standard input is closed. If the parent holds
        the other end of that pipe, this process does not outlive it, however it dies.
    :param on_ready: called when the socket accepts connections.
    :param has_pipes: also take chunks from named pipes in the folder.
    :param chunks: most chunks under way at the same time.
    :raises ConfigError: another process serves in the folder, or the folder cannot be used.
    """
    with _exclusive_lock(runtime_folder):
        path = socket_path(runtime_folder)
        make_private_folder(path.parent)
        path.unlink(missing_ok=True)  # stale, because this process holds the lock
        pipes = _make_pipes(runtime_folder) if has_pipes else None
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            try:
                listener.bind(str(path))
                listener.listen(64)
                if exit_with_stdin:
                    threading.Thread(target=_exit_with_stdin, args=(path,), daemon=True).start()
                _WarmServer(listener, path, nets, idle_seconds, pipes, chunks).run(on_ready)
            finally:
                path.unlink(missing_ok=True)
                if pipes is not None:
                    pipes.close()


def _make_pipes(runtime_folder: Path) -> ChunkPipes | None:
    """Make the pipes; None where that is not possible, as on some file systems. Chunks then come by the socket only."""
    try:
        return ChunkPipes(runtime_folder)
    except OSError as error:
        logger.warning("no pipes for further chunks in %s: %s", runtime_folder, error)
        return None


def _exit_with_stdin(path: Path) -> None:
    with contextlib.suppress(OSError):  # standard input may be closed from the start
        while os.read(0, 65536):
            continue
    path.unlink(missing_ok=True)
    os._exit(0)  # from a thread, and without waiting for the current items: the parent is gone


class _WarmServer:
    """A loop that accepts connections, a thread for each of them, and threads that process chunks in their order."""

    def __init__(
        self,
        listener: socket.socket,
        path: Path,
        nets: NetCache,
        idle_seconds: float,
        pipes: ChunkPipes | None = None,
        chunks: int = 1,
    ) -> None:
        self._listener, self._path, self._nets, self._pipes = listener, path, nets, pipes
        self._idle_seconds = idle_seconds
        self._chunk_threads = ThreadPoolExecutor(chunks, thread_name_prefix="chunk")
        self._lock = threading.Lock()
        #: Connected clients, and jobs that wait or run.
        self._clients = self._jobs = 0
        self._active_at = time.monotonic()
        self._is_stopping = False
        #: The connections whose chunks are under way -> when the process ends because of one, on the monotonic clock.
        self._deadlines: dict[socket.socket | None, float] = {}

    def run(self, on_ready: Callable[[], None]) -> None:
        """Serve until it is time to stop."""
        wake_reader, wake_writer = socket.socketpair()
        with wake_reader, wake_writer:
            for each in (wake_writer, self._listener):
                each.setblocking(False)
            signal.set_wakeup_fd(wake_writer.fileno(), warn_on_full_buffer=False)
            for number in (signal.SIGTERM, signal.SIGINT):  # before on_ready, after which a signal may come
                signal.signal(number, self._on_signal)
            if self._pipes is not None:
                threading.Thread(target=self._read_pipes, args=(self._pipes,), daemon=True).start()
            on_ready()
            limit = self._idle_seconds or None
            while not self._is_stopping and (limit is None or self._jobs or self._idle_for() < limit):
                rest = limit if limit is None or self._jobs else max(0.0, limit - self._idle_for())
                select.select([self._listener, wake_reader], [], [], rest)
                self._accept()
            # No new connections can be made; those that were just made are still served.
            self._path.unlink(missing_ok=True)
            if self._pipes is not None:
                self._pipes.close()
            self._accept()
            self._active_at = time.monotonic()
            while self._jobs or (self._clients and self._idle_for() < (0 if self._is_stopping else _GRACE_SECONDS)):
                time.sleep(_POLL_SECONDS)
            signal.set_wakeup_fd(-1)

    def _on_signal(self, number: int, frame: object) -> None:
        self._is_stopping = True

    def _count(self, *, clients: int = 0, jobs: int = 0) -> None:
        """Add to the numbers of clients and jobs."""
        with self._lock:
            self._clients += clients
            self._jobs += jobs
            if jobs:
                self._active_at = time.monotonic()

    def _idle_for(self) -> float:
        return time.monotonic() - self._active_at

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                connection, _ = self._listener.accept()
                self._count(clients=1)
                threading.Thread(target=self._serve_client, args=(connection,), daemon=True).start()

    def _read_pipes(self, pipes: ChunkPipes) -> None:
        for chunk, results in pipes.read():
            self._count(jobs=1)
            self._chunk_threads.submit(self._run_queued, pipes, chunk, results)

    def _run_queued(self, pipes: ChunkPipes, chunk: Path, results: Path) -> None:
        try:
            job = {"chunk": str(chunk), "results": str(results), "limit_seconds": MAX_CHUNK_SECONDS}
            reply = self._run_job(json.dumps(job).encode(), None, None, ProgressBoard(), threading.Event())
            pipes.report(results, None if reply["ok"] else str(reply["reason"]))
        except OSError as error:
            logger.error("the end of a chunk cannot be reported: %s", error)
        finally:
            self._count(jobs=-1)

    def _serve_client(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rwb") as stream:
                while (line := stream.readline(_MAX_LINE_BYTES)).endswith(b"\n"):
                    self._count(jobs=1)
                    board, has_gone = ProgressBoard(), threading.Event()
                    try:
                        job = self._chunk_threads.submit(self._run_job, line, connection, stream, board, has_gone)
                        reply = self._wait(job, connection, stream, board, has_gone)
                        stream.write(json.dumps(reply).encode() + b"\n")
                        stream.flush()
                    finally:
                        self._count(jobs=-1)
        except OSError as error:
            logger.info("client has gone before the reply: %s", error)
        finally:
            self._count(clients=-1)

    def _wait(
        self,
        job: Future[dict[str, Any]],
        connection: socket.socket,
        stream: io.BufferedRWPair,
        board: ProgressBoard,
        has_gone: threading.Event,
    ) -> dict[str, Any]:
        """Wait for the reply, and send progress. A client that does not read it delays only its own reply.

        :param has_gone: set when it is noticed that the client has gone.
        """
        hang_up = select.poll()
        hang_up.register(connection, 0)  # reported without being requested
        while True:
            try:
                return job.result(REPORT_SECONDS)
            except TimeoutError:
                lines = [json.dumps({"progress": report.to_json()}).encode() + b"\n" for report in board.take()]
                with contextlib.suppress(OSError):  # it has gone, see below
                    stream.write(b"".join(lines))
                    stream.flush()
                with self._lock:
                    if not has_gone.is_set() and connection in self._deadlines and hang_up.poll(0):
                        has_gone.set()
                        until = time.monotonic() + _ABANDONED_SECONDS
                        self._deadlines[connection] = min(self._deadlines[connection], until)
                        self._set_timer()

    def _begin(self, connection: socket.socket | None, limit_seconds: float) -> None:
        with self._lock:
            self._deadlines[connection] = time.monotonic() + (limit_seconds or math.inf)
            self._set_timer()

    def _end(self, connection: socket.socket | None) -> None:
        with self._lock:
            self._deadlines.pop(connection, None)
            self._set_timer()

    def _set_timer(self) -> None:
        """Have the system end the process when the first of the chunks has had its time, also if it holds the GIL."""
        left = min(self._deadlines.values(), default=math.inf) - time.monotonic()
        # 0 would be no timer
        signal.setitimer(signal.ITIMER_REAL, 0.0 if math.isinf(left) else max(left, _POLL_SECONDS))

    def _run_job(
        self,
        line: bytes,
        connection: socket.socket | None,
        stream: io.BufferedRWPair | None,
        board: ProgressBoard,
        has_gone: threading.Event,
    ) -> dict[str, Any]:
        started = time.perf_counter()
        try:
            if self._is_stopping:
                raise WorkerDied("The warm process was stopped before it began the chunk.")
            chunk, results, limit_seconds, wants_progress, is_announced = _parse_job(line)
            if is_announced and stream is not None:
                stream.write(b'{"began": true}\n')
                stream.flush()
            self._begin(connection, limit_seconds)
            run_chunk(
                chunk,
                results,
                self._nets,
                board=board if wants_progress else None,
                is_wanted=lambda: not (is_announced and has_gone.is_set()),
            )
        except MlgError as error:
            return {"ok": False, **error.to_reply()}
        except ConnectionError as error:
            return {"ok": False, **WorkerDied(f"The client had gone before the chunk began: {error}").to_reply()}
        except Exception as error:
            logger.exception("chunk failed")
            return {"ok": False, **ChunkError(f"{type(error).__name__}: {error}").to_reply()}
        finally:
            self._end(connection)
        return {"ok": True, "seconds": round(time.perf_counter() - started, 6)}


def _parse_job(line: bytes) -> tuple[Path, Path, float, bool, bool]:
    """Return the chunk, the results file, the limit, 0 if there is none, and whether progress and the begin are sent.

    :raises MalformedRequest:
    """
    try:
        job = json.loads(line)
        chunk, results, limit = Path(job["chunk"]), Path(job["results"]), float(job.get("limit_seconds", 0))
        if not 0 <= limit <= MAX_CHUNK_SECONDS:
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MalformedRequest('Send one line: {"chunk": "/a/chunk.zip", "results": "/a/results.zip"}') from error
    if not (chunk.is_absolute() and results.is_absolute()):
        raise MalformedRequest("Both paths must be absolute: the warm process has another working folder.")
    return chunk, results, limit, job.get("progress") is True, job.get("announce") is True

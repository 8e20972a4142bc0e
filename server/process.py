"""The production server: granian in front of the Flask application, in one or more processes on one socket.

Called by `mlg serve`. The main process listens and supervises the workers; each worker creates its own store and
application. Five things that granian does not do are done here:

- The socket is opened here. Granian opens its own with SO_REUSEPORT, so that a second server on a used port starts
  without an error, and a worker's death resets the connections in its queue. This one is exclusive and shared by the
  workers.
- A pipe tells the workers that the main process stops, or was killed: then they end too instead of keeping the port.
- Granian closes the connection of a request whose body was not read, so the rest of the body of a refused request is
  read before the response is sent, within limits.
- Granian waits without limit for a request's body. So more threads read than work, no client gets all of them (see
  `ActiveReads`), the kernel probes connections, and a worker whose reading threads are all blocked is replaced.
- Granian asks a streamed response for its next piece in one of the reading threads, and closes it when a piece cannot
  be sent. So there is one more thread for every stream, and each stream writes a heartbeat. All other responses stay in
  memory until their clients have read them, so large ones are limited, see `auth/memory.py`.

Weakness: a client that stalls on purpose keeps its thread. Without a key it gets only a few, so that nobody but those
who log in from its address has to wait; a key gets half of them. On the open internet, run the server behind a proxy
that buffers requests.
"""

from __future__ import annotations

import _thread
import errno
import http.client
import logging
import multiprocessing
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from granian._granian import SocketHolder
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server.mp import MPServer

from provider_image.errors import ConfigError, MlgError
from server.address import reachable_host
from server.api.responses import exception_response
from server.app import create_app, get_context
from server.auth.guard import CLIENT, check_exposure
from server.auth.home_secret import read_home_secret
from server.auth.memory import MAX_DOWNLOADS, SMALL_BYTES, Downloads
from server.context import Context
from server.errors import TooManyDownloads
from server.http_client import HttpClient
from server.intake.uploads import ActiveThreads
from server.live.sse import STREAMED
from server.settings import ServerSettings
from server.webhooks import Deliverer
from store.store import Store

log = logging.getLogger(__name__)

#: Connections in the accept queue, and those that one process keeps open.
CONNECTIONS = 1024
#: Seconds for a request's headers; a connection without a request is closed after the same time.
HEADER_SECONDS = 20.0
#: Seconds after which the reading of a body counts as blocked.
SLOW_BODY_SECONDS = 60.0
#: Seconds that running requests get when the server stops.
STOP_SECONDS = 10
#: Seconds that running requests get when the main process was killed: its successor waits for the port.
ORPHAN_SECONDS = 2.0
#: Seconds that a successor waits for the port.
TAKEOVER_SECONDS = 5.0
#: A stopping worker ends when no request has been running for this long.
QUIET_SECONDS = 0.25


def serve(
    settings: ServerSettings,
    *,
    on_ready: Callable[[str, int], None],
    parent_fd: int | None = None,
    private_fds: tuple[int, ...] = (),
) -> None:
    """Serve until SIGTERM or SIGINT.

    :param on_ready: called once with host and port when requests are answered.
    :param parent_fd: when this file descriptor reports its end, the server stops as on SIGTERM.
    :param private_fds: closed in the workers.
    :raises ConfigError: the address cannot be used, or other machines reach it and there are no keys.
    :raises StoreError: the home cannot be used.
    :raises MlgError: the workers keep dying.
    """
    # Under a supervisor the workers of a killed predecessor may need a moment to release the port.
    listener = listen(settings.host, settings.port, retry_seconds=0.0 if parent_fd is None else TAKEOVER_SECONDS)
    store = Store(settings)
    try:
        store.migrate()
        store.check()
        check_exposure(settings, store.keys)
        read_home_secret(settings.home)  # created now, so that lists can be read later also when the disk is full
    finally:
        store.close()
    # The workers inherit the socket, the pipe and the imported modules; 3.14 would choose another method.
    multiprocessing.set_start_method("fork", force=True)
    server = _GranianServer(settings, listener, on_ready, private_fds + (() if parent_fd is None else (parent_fd,)))
    if parent_fd is not None:
        threading.Thread(target=_stop_when_closed, args=(parent_fd,), name="parent", daemon=True).start()
    server.run()


def request_threads(settings: ServerSettings) -> int:
    """Count the threads that the requests of one process may take."""
    # Each stream, held read and large response keeps a thread, which must not be one of those that read bodies.
    waiting = settings.max_streams + settings.max_held_reads + MAX_DOWNLOADS
    # Some are left for all that neither reads a body nor waits, `/healthz` for example.
    return settings.reading_threads + waiting + settings.server_threads


def listen(host: str, port: int, *, retry_seconds: float = 0.0) -> socket.socket:
    """Open the listening socket.

    :param retry_seconds: how long to wait for a port that is in use.
    :raises ConfigError: tells which setting to change.
    """
    give_up_at = time.monotonic() + retry_seconds
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"MLG_HOST={host}: this address is unknown ({error.strerror}).") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit these: a client that disappears during an upload is noticed after a minute.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        while True:
            try:
                listener.bind(address)
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > give_up_at:
                    raise
                time.sleep(0.05)
        listener.listen(CONNECTIONS)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Port {port} on {host} is used by another program. Choose another (--port, MLG_PORT), "
                "or 0 for any free one."
            ) from error
        if error.errno == errno.EACCES:
            raise ConfigError(f"MLG_PORT={port}: this user may not listen on it. Choose one above 1023.") from error
        raise ConfigError(f"MLG_HOST={host}, MLG_PORT={port}: cannot listen there ({error.strerror}).") from error
    listener.setblocking(False)
    return listener


def _stop_when_closed(descriptor: int) -> None:
    while os.read(descriptor, 4096):
        continue
    os.kill(os.getpid(), signal.SIGTERM)


def _file_identity(descriptor: int) -> tuple[int, int] | None:
    """Return what file a descriptor refers to; None if it is closed."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino


class _GranianServer(MPServer):
    """Granian's main process on a socket of this module."""

    def __init__(
        self,
        settings: ServerSettings,
        listener: socket.socket,
        on_ready: Callable[[str, int], None],
        private_fds: tuple[int, ...],
    ) -> None:
        host, port = listener.getsockname()[:2]
        self._settings = settings
        self._listener = listener
        self._on_ready = on_ready
        # The reading end becomes readable in the workers when no process holds the writing end any more.
        self._stop_reader, self._stop_writer = os.pipe()
        self._private_fds = {each: _file_identity(each) for each in (self._stop_writer, *private_fds)}
        super().__init__(
            "mlg",
            address=host,
            port=port,
            interface=Interfaces.WSGI,
            http=HTTPModes.http1,
            websockets=False,
            workers=settings.server_processes,
            blocking_threads=request_threads(settings),
            backlog=CONNECTIONS,
            backpressure=CONNECTIONS + request_threads(settings),
            http1_settings=HTTP1Settings(header_read_timeout=int(HEADER_SECONDS * 1000)),
            log_level=LogLevels.error,
            # Granian's own handlers write to stdout; its messages go to the log of the server instead.
            log_dictconfig={"loggers": {"_granian": {"handlers": [], "propagate": True}}},
            respawn_failed_workers=True,
            workers_kill_timeout=STOP_SECONDS,
        )

    def run(self) -> None:
        """Serve until a stop signal. :raises MlgError: the workers keep dying."""
        try:
            self.serve(target_loader=self._load, wrap_loader=False)
        except SystemExit as end:
            # Ctrl-C reaches the workers too, and granian counts those as failed that end before the main process
            # has told them to.
            if end.code and not self.interrupt_signal:
                raise MlgError("The server's worker processes end as soon as they start; see the log.") from end

    # Called by granian

    def signal_handler_interrupt(self, *args: object, **kwargs: object) -> None:
        """Stop. A handler must not wait for a lock that the code which it interrupts may hold, as that of an Event."""
        if not self.interrupt_signal:
            self.interrupt_signal = True
            _thread.start_new_thread(self.main_loop_interrupt.set, ())

    def _init_shared_socket(self) -> None:
        self._sso = self._listener
        # Granian's annotations are out of date: its own code sets both, and the holder accepts the backlog too.
        self._sfd = self._listener.fileno()  # type: ignore[assignment]
        self._shd = SocketHolder(self._sfd, False, CONNECTIONS)  # type: ignore[assignment,call-arg]

    def _drop_shared_socket(self) -> None:
        os.close(self._stop_writer)
        self._listener.close()

    def _spawn_workers(self, spawn_target: Any, target_loader: Any) -> None:
        super()._spawn_workers(spawn_target, target_loader)  # type: ignore[no-untyped-call]
        threading.Thread(target=self._wait_until_ready, name="ready", daemon=True).start()

    def _load(self) -> Callable[..., Any]:
        """Create the application; runs in the worker."""
        for descriptor, identity in self._private_fds.items():
            # A worker that replaces a dead one is forked later, when the main process may have closed the descriptor
            # and opened another file under the same number.
            if _file_identity(descriptor) == identity:
                os.close(descriptor)
        settings = self._settings
        store = Store(settings)
        app = create_app(settings, store)
        app.after_request(get_context(app).active_reads.discard_rest)
        active_requests, downloads = ActiveThreads(), Downloads()
        http_client = HttpClient(allows_private=settings.allows_private_webhooks)
        deliverer = Deliverer(store, http_client=http_client, models=settings.models)
        deliverer.start()
        watched = (get_context(app), deliverer, active_requests)
        threading.Thread(target=self._supervise_worker, args=watched, name="watch", daemon=True).start()

        def application(environ: dict[str, Any], start_response: Any) -> Any:
            with active_requests.track():
                response = app(environ, start_response)
                if environ.get(STREAMED):
                    # Granian reads it piece by piece, and closes it at its end or when the client has disconnected.
                    return response
                try:
                    body = b"".join(response)
                finally:
                    response.close()  # type: ignore[attr-defined]
                # As a list the response is sent in one piece.
                if len(body) <= SMALL_BYTES:
                    return [body]
                download = downloads.start(body, environ.get(CLIENT))
                if download is not None:
                    return download
                if environ["REQUEST_METHOD"] != "GET":
                    return [body]  # the work is done; only few of these are large
                return exception_response(TooManyDownloads())(environ, start_response)

        return application

    # Threads

    def _wait_until_ready(self) -> None:
        host, port = self._listener.getsockname()[:2]
        while not self.interrupt_signal:
            connection = http.client.HTTPConnection(reachable_host(host), port, timeout=5)
            try:
                connection.request("GET", "/healthz")
                is_ready = connection.getresponse().status == 200
            except (OSError, http.client.HTTPException):
                is_ready = False
            finally:
                connection.close()
            if is_ready:
                self._on_ready(host, port)
                return
            time.sleep(0.02)

    def _supervise_worker(self, context: Context, deliverer: Deliverer, active_requests: ActiveThreads) -> None:
        """Supervise one worker, from inside it."""
        main_pid = self.pid
        while not select.select([self._stop_reader], [], [], 5.0)[0]:
            if context.active_reads.count_older_than(SLOW_BODY_SECONDS) >= 0.9 * self._settings.reading_threads:
                log.error("slow clients block every reading thread; this worker is replaced")
                os._exit(1)
        # Held reads are answered and streams end now, so that they do not delay the stop.
        context.change_dispatcher.stop()
        deliverer.stop()
        os.kill(os.getpid(), signal.SIGTERM)
        give_up_at = time.monotonic() + (STOP_SECONDS + 1 if os.getppid() == main_pid else ORPHAN_SECONDS)
        while time.monotonic() < give_up_at:
            time.sleep(QUIET_SECONDS)
            # Granian waits for clients that have sent a part of a request, and sometimes for one of its threads that is
            # idle already (seen with 2.8.7 when the signal comes right after the first request).
            if not active_requests.count_older_than(0):
                os._exit(0)
        os._exit(1)

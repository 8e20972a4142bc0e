"""The supervisor of `mlg up`: starts the server and the batcher as processes of their own and keeps them alive.

Called by `commands.py`. It does none of their work, so that nothing can make it fall with them. The children live in
sessions of their own: Ctrl-C reaches only the supervisor, which stops them in order. Should it be killed itself, they
see the end of a pipe that only it held open, and stop.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from batcher.settings import BatcherSettings
from batcher.subprocesses import child_environment, module_command
from provider_image.errors import MlgError
from server.address import base_url
from server.auth.guard import check_exposure
from server.settings import ServerSettings
from store.sqlite import SqliteStore

log = logging.getLogger(__name__)

#: What `mlg up` waits by default, instead of ten minutes: whoever starts it wants to see answers.
SHORT_WAITS = {"MLG_MAX_WAIT_SECONDS": "0.2", "MLG_POLL_SECONDS": "0.05"}
#: Pause before a child that died is started again; doubles from the first to the last.
INITIAL_BACKOFF_SECONDS = 0.2
MAX_BACKOFF_SECONDS = 5.0
#: A child that lived this long was well: its next pause is the first again.
STABLE_SECONDS = 10.0
#: Everything must be ready within this time.
READY_SECONDS = 60.0
#: What a child gets to stop beyond what it gives its own work.
GRACE_SECONDS = 15.0
_POLL_SECONDS = 0.05


def with_short_waits(variables: Mapping[str, str]) -> dict[str, str]:
    """Fill in the waits of `mlg up` where the user has not set any."""
    return {**variables, **{name: value for name, value in SHORT_WAITS.items() if not variables.get(name, "").strip()}}


@dataclass(kw_only=True)
class _Child:
    """A child process and its history."""

    name: str
    command: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    #: When it is to be started; None while it runs.
    start_at: float | None = 0.0
    backoff_seconds: float = INITIAL_BACKOFF_SECONDS
    is_ready: bool = False
    #: Variables that differ from those of the other children.
    extra: dict[str, str] = field(default_factory=dict)


class Supervisor:
    """Starts, watches and stops the children.

    :param variables: the environment with options filled in; the children get it as it is.
    :param write_line: writes a line for the person who started it.
    :raises ConfigError: a setting cannot be used.
    """

    def __init__(self, variables: Mapping[str, str], *, write_line: Callable[[str], None]) -> None:
        self._settings = ServerSettings.from_env(variables)
        self._batcher_settings = BatcherSettings.from_env(variables)
        self._variables = dict(variables)
        self._write_line = write_line
        self._server = _Child(name="server", command=("serve",))
        self._batcher = _Child(name="batcher", command=("batch",))
        self._address: tuple[str, int] | None = None
        self._ready_fd: int | None = None
        self._parent_read, self._parent_write = os.pipe()
        self._signals = 0
        self._stop_requested = threading.Event()

    def run(self) -> int:
        """Run until told to stop. :return: the exit status. :raises MlgError: the home cannot be used."""
        store = SqliteStore(self._settings)
        try:
            # Once here, so that a home that cannot be used is one clear line and not two children that fall.
            store.migrate()
            store.check()
            check_exposure(self._settings, store)
            with self._signal_handlers():
                status = self._start_all(store)
                if status == 0:
                    self._watch()
                self._stop()
        finally:
            self._kill()
            store.close()
            for descriptor in (self._parent_read, self._parent_write):
                os.close(descriptor)
            self._close_ready()
        return status

    # Starting and watching

    def _start_all(self, store: SqliteStore) -> int:
        deadline = time.monotonic() + READY_SECONDS
        started_at = datetime.now(UTC) - timedelta(seconds=1)
        while not self._stop_requested.is_set():
            for child in (self._server, self._batcher):
                status = self._supervise(child)
                if status is not None and status > 0:
                    # It has said why on stderr, which is ours too; starting it again would say it again.
                    return 1
            self._read_address()
            self._batcher.is_ready = self._batcher.is_ready or self._is_registered(store, started_at)
            if self._server.is_ready and self._batcher.is_ready:
                self._write_line(self._startup_message())
                return 0
            if time.monotonic() > deadline:
                late = next(child.name for child in (self._server, self._batcher) if not child.is_ready)
                raise MlgError(f"The {late} did not get ready within {READY_SECONDS:g} s; see the lines above.")
            self._stop_requested.wait(_POLL_SECONDS / 2)
        return 0

    def _watch(self) -> None:
        while not self._stop_requested.wait(_POLL_SECONDS):
            for child in (self._server, self._batcher):
                self._supervise(child)

    def _supervise(self, child: _Child) -> int | None:
        """Start the child if it is time to. :return: the exit status of one that has just ended."""
        now = time.monotonic()
        if child.process is not None:
            status = child.process.poll()
            if status is None:
                return None
            if now - child.started_at > STABLE_SECONDS:
                child.backoff_seconds = INITIAL_BACKOFF_SECONDS
            child.process, child.start_at = None, now + child.backoff_seconds
            if child.is_ready or status < 0:
                log.warning(
                    "the %s %s; starting it again in %.1f s",
                    child.name,
                    _exit_description(status),
                    child.backoff_seconds,
                )
            child.backoff_seconds = min(2 * child.backoff_seconds, MAX_BACKOFF_SECONDS)
            return status
        if child.start_at is not None and now >= child.start_at:
            self._start(child)
        return None

    def _start(self, child: _Child) -> None:
        arguments = [*child.command, "--parent-fd", str(self._parent_read)]
        inherited = [self._parent_read]
        ready_write: int | None = None
        if child is self._server and self._address is None:
            self._close_ready()
            self._ready_fd, ready_write = os.pipe()
            os.set_blocking(self._ready_fd, False)
            arguments += ["--ready-fd", str(ready_write)]
            inherited.append(ready_write)
        try:
            child.process = subprocess.Popen(
                module_command("mlg", *arguments),
                env=child_environment(self._variables, child.extra),
                stdin=subprocess.DEVNULL,
                pass_fds=inherited,
                start_new_session=True,
            )
        finally:
            if ready_write is not None:
                os.close(ready_write)
        child.started_at, child.start_at = time.monotonic(), None

    def _read_address(self) -> None:
        """Learn where the server listens, once it does."""
        if self._ready_fd is None:
            return
        try:
            line = os.read(self._ready_fd, 1024).decode()
        except BlockingIOError:
            return
        self._close_ready()
        if line:
            host, _, port = line.strip().rpartition(" ")
            self._address = (host, int(port))
            self._server.is_ready = True
            # A server that is started again must be found where the first one was.
            self._server.extra["MLG_PORT"] = port

    def _close_ready(self) -> None:
        if self._ready_fd is not None:
            os.close(self._ready_fd)
            self._ready_fd = None

    def _is_registered(self, store: SqliteStore, since: datetime) -> bool:
        process = self._batcher.process
        return process is not None and any(
            batcher.pid == process.pid for batcher in store.list_batchers(seen_since=since)
        )

    def _startup_message(self) -> str:
        assert self._address is not None
        url = base_url(*self._address)
        workers = self._batcher_settings.workers
        where = f"{workers} worker{'s' if workers > 1 else ''}" if self._batcher_settings.executor == "local" else ""
        return "\n".join(
            (
                "mlg is up.",
                f"  address   {url}",
                f"  home      {self._settings.home}",
                f"  executor  {self._batcher_settings.executor}" + (f", {where}" if where else ""),
                "Try it with a picture of yours:",
                f"  curl -F image=@kitten.jpg {url}/requestPrediction/efficientnet_lite0",
                "Ctrl-C stops it.",
            )
        )

    # Stopping

    @contextlib.contextmanager
    def _signal_handlers(self) -> Iterator[None]:
        def on_signal(number: int, frame: object) -> None:
            self._signals += 1
            self._stop_requested.set()

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        earlier = {number: signal.signal(number, on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _stop(self) -> None:
        """Stop the batcher, which finishes its work, then the server. A second signal kills both at once."""
        grace = {"batcher": self._batcher_settings.drain_seconds + GRACE_SECONDS, "server": GRACE_SECONDS}
        for child in (self._batcher, self._server):
            if child.process is None or child.process.poll() is not None:
                continue
            child.process.terminate()
            deadline = time.monotonic() + grace[child.name]
            while child.process.poll() is None:
                if self._signals > 1 or time.monotonic() > deadline:
                    log.warning("the %s is killed", child.name)
                    _kill_session(child.process)
                time.sleep(_POLL_SECONDS / 2)

    def _kill(self) -> None:
        """Leave nobody behind, whatever happened; nothing is left to do after an orderly stop."""
        for child in (self._batcher, self._server):
            if child.process is not None:
                if child.process.poll() is None:
                    _kill_session(child.process)
                child.process.wait()


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    # The child is the leader of its session, so this reaches the server's own worker processes too.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _exit_description(status: int) -> str:
    return f"ended with status {status}" if status >= 0 else f"was killed by signal {-status}"

"""The supervisor of `mlg up`: starts the server and the batcher as child processes and restarts them.

Called by `up.py`. It does none of their work, so that their errors cannot crash it. Each child has its own session:
Ctrl-C reaches only the supervisor, which stops the children in order. If the supervisor itself is killed, the children
see a pipe close that only it held open, and stop.
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
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from batcher.backoff import Backoff
from batcher.executors import Executor, ExecutorContext, load_executor
from batcher.executors.local import LocalSettings
from batcher.settings import BatcherSettings
from provider_image.errors import MlgError
from provider_image.subprocesses import child_environment, exit_description, module_command
from server.address import base_url
from server.auth.guard import check_exposure
from server.settings import ServerSettings
from store.store import Store

log = logging.getLogger(__name__)

#: The defaults of `mlg up`, instead of ten minutes: its user wants to see results at once.
SHORT_WAITS = {"MLG_MAX_WAIT_SECONDS": "0.2", "MLG_POLL_SECONDS": "0.05"}
#: Delay before a child that exited is restarted.
RESTART_BACKOFF = Backoff(first_seconds=0.2, max_seconds=5.0)
#: After running for so long, a child is restarted with the first delay again.
STABLE_SECONDS = 10.0
#: Both children must be ready within this time.
READY_SECONDS = 60.0
#: Time that a child gets to stop, beyond the time that it gives its own work.
GRACE_SECONDS = 15.0
_POLL_SECONDS = 0.025


def with_short_waits(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with the defaults of `mlg up` for those that the user has not set."""
    return {**variables, **{name: value for name, value in SHORT_WAITS.items() if not variables.get(name, "").strip()}}


@dataclass(kw_only=True)
class _Child:
    """A child process and the state of its restarts."""

    name: str
    command: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    #: When to start it again after it ended, by the monotonic clock.
    start_at: float = 0.0
    #: How often it ended soon after its start, in a row.
    failures: int = 0
    is_ready: bool = False


class Supervisor:
    """Starts, watches and stops the children.

    :param variables: the environment with the options in it; only the batcher gets the secrets in it.
    :param write_line: writes a message for the user.
    :raises ConfigError: a setting is invalid.
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
        """Run until a signal arrives.

        :return: the exit status.
        :raises MlgError: the home cannot be used, or a child is not ready in time.
        """
        store = Store(self._settings)
        try:
            # Here first, so that a home that cannot be used is one error line, and not two children that crash.
            store.migrate()
            store.check()
            check_exposure(self._settings, store.keys)
            self._executor = self._load_executor(store)
            with self._signal_handlers():
                status = self._supervise_all(store)
                self._stop()
        finally:
            self._stop(is_forced=True)
            store.close()
            for descriptor in (self._parent_read, self._parent_write):
                os.close(descriptor)
            self._close_ready()
        return status

    def _load_executor(self, store: Store) -> Executor:
        """Make the batcher's executor to ask it about itself; it is never started."""
        context = ExecutorContext(
            owner="supervisor",
            work=self._batcher_settings.work,
            models=self._batcher_settings.models,
            store=store,
            environment=self._variables,
        )
        return load_executor(self._batcher_settings.executor, context)

    # Starting and watching

    def _supervise_all(self, store: Store) -> int:
        """Start the children, and restart them until a signal arrives. :return: the exit status."""
        deadline = time.monotonic() + READY_SECONDS
        started_at = datetime.now(UTC) - timedelta(seconds=1)
        is_up = False
        while not self._stop_requested.wait(_POLL_SECONDS):
            for child in (self._server, self._batcher):
                status = self._supervise(child)
                if status is not None and status > 0 and not is_up:
                    # It has written why to stderr, which it shares with us; a restart would only repeat that.
                    return 1
            if is_up:
                continue
            self._read_address()
            self._batcher.is_ready = self._batcher.is_ready or self._is_registered(store, started_at)
            late = [child.name for child in (self._server, self._batcher) if not child.is_ready]
            if not late:
                self._write_line(self._startup_message())
                is_up = True
            elif time.monotonic() > deadline:
                raise MlgError(f"The {late[0]} was not ready within {READY_SECONDS:g} s; see the lines above.")
        return 0

    def _supervise(self, child: _Child) -> int | None:
        """Start the child if it is due. :return: its exit status if it has just ended, else None."""
        now = time.monotonic()
        if child.process is not None:
            status = child.process.poll()
            if status is None:
                return None
            child.failures = 1 if now - child.started_at > STABLE_SECONDS else child.failures + 1
            pause = RESTART_BACKOFF.after(child.failures)
            child.process, child.start_at = None, now + pause
            if child.is_ready or status < 0:
                log.warning("the %s %s; starting it again in %.1f s", child.name, exit_description(status), pause)
            return status
        if now >= child.start_at:
            self._start(child)
        return None

    def _start(self, child: _Child) -> None:
        arguments = [*child.command, "--parent-fd", str(self._parent_read)]
        inherited = [self._parent_read]
        ready_write: int | None = None
        variables = dict(self._variables)
        if child is self._server and self._address is not None:
            variables["MLG_PORT"] = str(self._address[1])  # after a restart it must have the same port
        elif child is self._server:
            self._close_ready()
            self._ready_fd, ready_write = os.pipe()
            os.set_blocking(self._ready_fd, False)
            arguments += ["--ready-fd", str(ready_write)]
            inherited.append(ready_write)
        try:
            child.process = subprocess.Popen(
                module_command("mlg", *arguments),
                env=child_environment(variables, has_secrets=child is self._batcher),
                stdin=subprocess.DEVNULL,
                pass_fds=inherited,
                start_new_session=True,
            )
        finally:
            if ready_write is not None:
                os.close(ready_write)
        child.started_at = time.monotonic()

    def _read_address(self) -> None:
        """Read where the server listens, if it has written that yet."""
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

    def _close_ready(self) -> None:
        if self._ready_fd is not None:
            os.close(self._ready_fd)
            self._ready_fd = None

    def _is_registered(self, store: Store, since: datetime) -> bool:
        process = self._batcher.process
        return process is not None and any(
            batcher.pid == process.pid for batcher in store.batchers.list(seen_since=since)
        )

    def _startup_message(self) -> str:
        assert self._address is not None
        url = base_url(*self._address)
        executor = self._batcher_settings.executor
        if executor == "local":
            workers = LocalSettings.from_env(self._variables).processes
            executor += f", {workers} worker{'s' if workers > 1 else ''}"
        return "\n".join(
            (
                "mlg is up.",
                f"  address   {url}",
                f"  home      {self._settings.home}",
                f"  executor  {executor}",
                "Try it with an image:",
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

    def _grace_seconds(self, child: _Child) -> float:
        """Return how long a child may take to stop."""
        if child is not self._batcher:
            return GRACE_SECONDS
        return GRACE_SECONDS + self._batcher_settings.drain_seconds + self._executor.stop_seconds()

    def _stop(self, *, is_forced: bool = False) -> None:
        """Stop the batcher, which finishes its chunks, then the server. A second signal kills both at once.

        :param is_forced: kill what is left after an error; there is nothing after an orderly stop.
        """
        for child in (self._batcher, self._server):
            if child.process is None:
                continue
            child.process.terminate()  # no effect on a process that has ended
            deadline = time.monotonic() + (0.0 if is_forced else self._grace_seconds(child))
            while child.process.poll() is None:
                if self._signals > 1 or time.monotonic() >= deadline:
                    log.warning("killing the %s", child.name)
                    # It leads its own session, so this kills the worker processes of the server as well.
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child.process.pid, signal.SIGKILL)
                time.sleep(_POLL_SECONDS)

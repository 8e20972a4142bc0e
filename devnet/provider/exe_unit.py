"""The exe-unit: runs the batches of an activity in order and keeps their results.

Made by `Activities`, one per activity; called by the API. It executes scripts as Golem's exe-unit does, in a sandbox
instead of a virtual machine, and injects its provider's faults.

    Initialized -- deploy --> Deployed -- start --> Ready -- terminate, destroy, a fault --> Terminated
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from devnet.errors import Gone, NotFound, TimedOut
from devnet.gftp import TransferFailed, deliver, fetch
from devnet.image import Image, ImageUnusable
from devnet.provider.fault_injection import FAULTS_BEFORE_RUN, FaultInjector
from devnet.provider.sandbox import PathOutsideSandbox, Sandbox
from devnet.provider.script import ALLOWED_STATES, Command, CommandFailed, OutputCapture, ScriptBatch, parse_script
from devnet.scenario import Fault, FaultSchedule, ProviderPlan

log = logging.getLogger(__name__)

#: Number of finished batches whose results are kept.
MAX_FINISHED_BATCHES = 100
#: How long a call for an activity with the fault vanish-http hangs, if the fault has no `seconds`.
DEFAULT_VANISH_SECONDS = 300.0
_EXIT_STATUS = 7
_CONTAINER = "container:"


class _ActivityTerminated(Exception):
    """The activity terminates by a command or a fault."""


class ExeUnit:
    """The exe-unit of an activity. Must be made in a running event loop.

    :param folder: the activity's folder; made here, removed at its end.
    :param exchange: the folder that the `gftp` program shares with the daemon.
    :param load_image: returns the image to deploy; called in a thread; raises ImageUnusable.
    :param environment: the environment of programs.
    :param cpus: the processor cores that programs may use; all if None.
    """

    def __init__(
        self,
        activity_id: str,
        *,
        plan: ProviderPlan,
        folder: Path,
        exchange: Path,
        faults: FaultSchedule,
        load_image: Callable[[], Image],
        environment: Mapping[str, str],
        cpus: frozenset[int] | None,
    ) -> None:
        self.activity_id = activity_id
        self._plan = plan
        self._speed = min(1.0, plan.speed)
        #: Ends transfers.
        self._is_over = threading.Event()
        self._exchange = exchange
        self._load_image = load_image
        self._sandbox = Sandbox(activity_id, folder, environment=environment, cpus=cpus)
        self._fault_injector = FaultInjector(plan.name, faults)
        #: Processor time of which a slow provider has waited for the longer one.
        self._slowed_seconds = 0.0
        #: The output files at the end of the last run; a process that it left behind may write more before the next.
        self._outputs: dict[Path, tuple[int, int, int]] = {}
        self.state = "Initialized"
        #: Why the activity was terminated; None if it was not.
        self.reason: str | None = None
        self._batches: dict[str, ScriptBatch] = {}
        self._queue: asyncio.Queue[ScriptBatch] = asyncio.Queue()
        self._worker = asyncio.create_task(self._run_batches())
        self._cleanup_task: asyncio.Task[None] | None = None
        #: The fault vanish-http, once it has occurred.
        self.vanished: Fault | None = None
        self._created_at = time.monotonic()
        self._seconds: float | None = None

    # Called by the API

    def usage(self) -> list[float]:
        """Return seconds of processor time, longer on a slow provider, and seconds since the activity was created."""
        seconds = time.monotonic() - self._created_at if self._seconds is None else self._seconds
        return [self._sandbox.processes.cpu_seconds() / self._speed, seconds]

    async def execute(self, commands: list[dict[str, Any]]) -> str:
        """Queue a batch. :return: its id. :raises ApiError: the script is invalid."""
        await self.block_if_vanished()
        self._raise_if_ended()
        batch = ScriptBatch(id=secrets.token_hex(16), commands=parse_script(commands))
        for old in [old for old in self._batches.values() if old.is_finished][:-MAX_FINISHED_BATCHES]:
            del self._batches[old.id]
        self._batches[batch.id] = batch
        self._queue.put_nowait(batch)
        return batch.id

    async def results(self, batch_id: str, timeout: float) -> list[dict[str, Any]]:
        """Return the results of a batch so far, as soon as it is finished or after the timeout in seconds."""
        await self.block_if_vanished()
        batch = self._batch(batch_id)
        await batch.notifier.wait_until(lambda: batch.is_finished or self.state == "Terminated", timeout)
        await self.block_if_vanished()
        if not batch.is_finished:
            self._raise_if_ended()
        return list(batch.results)

    async def block_if_vanished(self) -> None:
        """Block if the fault vanish-http has occurred. :raises TimedOut: at the end of the fault's time."""
        if self.vanished is not None:
            await asyncio.sleep(self.vanished.seconds or DEFAULT_VANISH_SECONDS)
            raise TimedOut("The provider does not respond.")

    # Termination

    async def end(self, reason: str = "The activity was destroyed.") -> None:
        """End the activity: kill its processes and remove its folder. May be called twice."""
        await asyncio.shield(self._terminate(reason))

    def _terminate(self, reason: str) -> asyncio.Task[None]:
        """Terminate the activity, once. :return: the task that cleans up."""
        if self._cleanup_task is None:
            self.state, self.reason = "Terminated", reason
            self._seconds = time.monotonic() - self._created_at
            self._cleanup_task = asyncio.create_task(self._clean_up())
            for batch in self._batches.values():
                batch.notifier.notify()
        return self._cleanup_task

    async def _clean_up(self) -> None:
        self._is_over.set()
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)
        self._sandbox.processes.cpu_seconds()  # measures them for the last time
        await self._sandbox.remove()

    def _batch(self, batch_id: str) -> ScriptBatch:
        batch = self._batches.get(batch_id)
        if batch is None:
            raise NotFound(f"The activity has no batch {batch_id}.")
        return batch

    def _raise_if_ended(self) -> None:
        if self.state == "Terminated":
            raise Gone(f"The activity has terminated. {self.reason}")

    # Execution

    async def _run_batches(self) -> None:
        try:
            while True:
                await self._run_batch(await self._queue.get())
        except _ActivityTerminated as end:
            log.info("activity %s: %s", self.activity_id, end)
            self._terminate(str(end))
        except Exception:
            log.exception("activity %s failed", self.activity_id)
            self._terminate("Internal error of the devnet; see its log.")

    async def _run_batch(self, batch: ScriptBatch) -> None:
        await asyncio.sleep(self._plan.latency_seconds)
        for index, command in enumerate(batch.commands):
            captured = command.body.get("capture") or {}
            streams = {name: OutputCapture(captured.get(name) is not None) for name in ("stdout", "stderr")}
            error = None
            try:
                await self._run_command(command, streams)
            except CommandFailed as failure:
                error = failure
            except (PathOutsideSandbox, TransferFailed, ImageUnusable, OSError) as failure:
                error = CommandFailed(str(failure))
            batch.add_result(index, error, streams["stdout"].text, streams["stderr"].text)
            if error is not None:
                return
            if command.name == "terminate":
                raise _ActivityTerminated("The script terminated the activity.")

    async def _run_command(self, command: Command, streams: Mapping[str, OutputCapture]) -> None:
        if self.state not in ALLOWED_STATES[command.name]:
            raise CommandFailed(f"{command.name} is not allowed in the state {self.state}.")
        body = command.body
        if command.name == "deploy":
            if self._fault_injector.first("fail-deploy"):
                raise CommandFailed("Fault of the scenario: fail-deploy.")
            self._sandbox.use_image(await asyncio.to_thread(self._load_image))
            self.state = "Deployed"
        elif command.name == "start":
            self.state = "Ready"
        elif command.name == "transfer":
            await self._transfer(body["from"], body["to"])
        elif command.name == "run":
            await self._run(body["entry_point"], body.get("args") or [], streams)
        elif command.name == "sign":
            raise CommandFailed("The devnet does not support the command sign.")

    async def _transfer(self, source: str, target: str) -> None:
        if target.startswith(_CONTAINER) and not source.startswith(_CONTAINER):
            path = self._sandbox.host_path(target.removeprefix(_CONTAINER))
            path.parent.mkdir(parents=True, exist_ok=True)
            await asyncio.to_thread(fetch, self._exchange, source, path, self._pace)
        elif source.startswith(_CONTAINER) and not target.startswith(_CONTAINER):
            path = self._sandbox.host_path(source.removeprefix(_CONTAINER))
            await asyncio.to_thread(deliver, self._exchange, path, target, self._pace)
        else:
            raise CommandFailed(f"A transfer must have exactly one side in the container, unlike {source} -> {target}")

    def _pace(self, size: int) -> None:
        """Wait for as long as so many bytes take; called in a thread."""
        rate = self._plan.bytes_per_second
        if self._is_over.wait(size / rate) if rate else self._is_over.is_set():
            raise TransferFailed("The activity has ended.")

    async def _run(self, entry_point: str, arguments: list[str], streams: Mapping[str, OutputCapture]) -> None:
        fault = self._fault_injector.first(*FAULTS_BEFORE_RUN)
        kind = fault.kind if fault is not None else ""
        if kind:
            log.info("activity %s: %s", self.activity_id, kind)
        if kind == "exit-nonzero":
            raise CommandFailed.from_exit_status(_EXIT_STATUS)
        if kind == "vanish-http":
            self.vanished = fault
        if kind in ("hang", "vanish-http"):
            await asyncio.Event().wait()
        if fault is None:
            await self._run_program(entry_point, arguments, streams)
            return
        with contextlib.suppress(TimeoutError, CommandFailed, PathOutsideSandbox):
            async with asyncio.timeout(fault.seconds):
                await self._run_program(entry_point, arguments, streams)
        raise _ActivityTerminated("The exe-unit was killed.")

    async def _run_program(self, entry_point: str, arguments: list[str], streams: Mapping[str, OutputCapture]) -> None:
        started_at = time.monotonic()
        status = await self._sandbox.run(
            entry_point, arguments, on_stdout=streams["stdout"].write, on_stderr=streams["stderr"].write
        )
        if self._speed < 1:
            # All providers have the same processors; a slow one waits before it reports the end of the program. What a
            # process that an earlier run left behind has done since that run counts too.
            seconds, work_before = time.monotonic() - started_at, self._slowed_seconds
            self._slowed_seconds = self._sandbox.processes.cpu_seconds()
            await asyncio.sleep(max(seconds, self._slowed_seconds - work_before) / self._speed - seconds)
        if status != 0:
            raise CommandFailed.from_exit_status(status)
        before, outputs = self._outputs, self._sandbox.list_outputs()
        self._fault_injector.corrupt(path for path, file_stamp in outputs.items() if before.get(path) != file_stamp)
        self._outputs = self._sandbox.list_outputs()

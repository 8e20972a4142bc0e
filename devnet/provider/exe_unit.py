"""One activity on one provider: takes batches of commands, runs them in order and tells how it went.

Made by the market's side for each activity and asked by the API. It does what Golem's exe-unit does with a script, in
a sandbox instead of a virtual machine, and misbehaves where its provider's faults say so.

    Initialized -- deploy --> Deployed -- start --> Ready -- terminate, destroy, a fault --> Terminated
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devnet.errors import Gone, NotFound, TimedOut
from devnet.provider.batch import ScriptBatch
from devnet.provider.fault_injection import FaultInjector
from devnet.provider.output_capture import Capture
from devnet.provider.sandbox import PathOutsideSandbox, Sandbox
from devnet.provider.script import Command, CommandFailed, parse_script
from devnet.transfers import TransferFailed, Transfers

if TYPE_CHECKING:
    from devnet.faults import Faults
    from devnet.scenario import Fault, ProviderPlan

log = logging.getLogger(__name__)

#: Batches that can still be asked about after they are over.
MAX_FINISHED_BATCHES = 100
#: A call for an activity that vanished is held as long, unless its fault says otherwise.
DEFAULT_VANISH_SECONDS = 300.0
_EXIT_STATUS = 7
_CONTAINER = "container:"


class ScriptBatchNotFound(NotFound):
    """The activity has no such batch, or its events were streamed already."""


class ActivityEnded(Gone):
    """The activity is terminated; its state says why."""


class ActivityVanished(TimedOut):
    """The provider does not answer."""


class _ActivityOver(Exception):
    """The activity ends of its own accord."""

    def __init__(self, reason: str, *, is_crash: bool) -> None:
        super().__init__(reason)
        self.is_crash = is_crash


class ExeUnit:
    """See above. Must be made inside a running loop.

    :param folder: the activity's own; made here, removed at its end. Beside it all activities remember answers.
    :param environment: all that programs get.
    :param cpus: the processor cores that programs may use; None does not choose.
    :param on_crash: called with the activity's id when it dies of its own accord, not when it is destroyed.
    """

    def __init__(
        self,
        activity_id: str,
        *,
        plan: ProviderPlan,
        folder: Path,
        transfers: Transfers,
        faults: Faults,
        environment: Mapping[str, str],
        cpus: frozenset[int] | None,
        on_crash: Callable[[str], None] | None = None,
    ) -> None:
        self.activity_id = activity_id
        self._speed = min(1.0, plan.speed)
        self._transfers = transfers
        self._sandbox = Sandbox(activity_id, folder, environment=environment, cpus=cpus)
        self._fault_injector = FaultInjector(plan.name, faults, folder.parent / "answers")
        self._on_crash = on_crash
        self._state, self._next_state, self._reason = "Initialized", "", ""
        self._batches: dict[str, ScriptBatch] = {}
        self._queue: asyncio.Queue[ScriptBatch] = asyncio.Queue()
        self._worker = asyncio.create_task(self._run_batches())
        self._cleanup_task: asyncio.Task[None] | None = None
        self._vanished: Fault | None = None
        self._created_at = time.monotonic()
        self._seconds: float | None = None

    # Asked by the API

    @property
    def state(self) -> tuple[str, str | None]:
        """What the activity is, and what it is about to be."""
        return self._state, self._next_state or None

    @property
    def reason(self) -> str | None:
        """Why it was terminated; None as long as it was not."""
        return self._reason or None

    @property
    def is_vanished(self) -> bool:
        """Calls for it are not answered."""
        return self._vanished is not None

    def usage(self) -> list[float]:
        """Return processor seconds and seconds of life. A slow provider's processor works longer for the same."""
        seconds = time.monotonic() - self._created_at if self._seconds is None else self._seconds
        return [self._sandbox.processes.cpu_seconds() / self._speed, seconds]

    async def execute(self, commands: list[dict[str, Any]]) -> str:
        """Queue a batch behind those before and return its id.

        :raises BadScript: a command that there is not, or with other fields than it has.
        """
        await self.block_if_vanished()
        self._raise_if_ended()
        batch = ScriptBatch(id=secrets.token_hex(16), commands=parse_script(commands))
        for old in [old for old in self._batches.values() if old.is_finished][:-MAX_FINISHED_BATCHES]:
            del self._batches[old.id]
        self._batches[batch.id] = batch
        self._queue.put_nowait(batch)
        return batch.id

    async def results(self, batch_id: str, timeout: float) -> list[dict[str, Any]]:
        """Return all results of a batch so far, as soon as it is finished or the time is over.

        :raises ScriptBatchNotFound: there is none.
        :raises ActivityEnded: it will never be finished.
        """
        await self.block_if_vanished()
        batch = self._batch(batch_id)
        await batch.notifier.wait_until(lambda: batch.is_finished or self._state == "Terminated", timeout)
        await self.block_if_vanished()
        if not batch.is_finished:
            self._raise_if_ended()
        elif not batch.is_streamed:
            batch.events.clear()  # whoever polls does not stream
        return list(batch.results)

    def stream(self, batch_id: str) -> AsyncIterator[dict[str, Any]]:
        """Give a batch's runtime events as they come; they just stop when the activity ends.

        :raises ScriptBatchNotFound: there is none, or it was streamed already: yapapi cannot bear to see events twice.
        """
        batch = self._batch(batch_id)
        if batch.is_streamed:
            raise ScriptBatchNotFound(f"The events of batch {batch_id} were streamed already.")
        batch.is_streamed = True
        return self._events(batch)

    async def destroy(self) -> None:
        """End the activity: kill its processes and remove its folder. Harmless when called twice."""
        await self.end()
        await self.block_if_vanished()

    async def block_if_vanished(self) -> None:
        """Keep the caller waiting if the activity has vanished. :raises ActivityVanished: after a long time."""
        if self._vanished is not None:
            await asyncio.sleep(self._vanished.seconds or DEFAULT_VANISH_SECONDS)
            raise ActivityVanished("The provider does not answer.")

    # The end

    async def end(self, reason: str = "The activity was destroyed.") -> None:
        """End the activity, also one that has vanished: for the daemon itself."""
        await asyncio.shield(self._terminate(reason, is_crash=False))

    def _terminate(self, reason: str, *, is_crash: bool) -> asyncio.Task[None]:
        """Terminate it for everybody who asks, and give the task that cleans up."""
        if self._cleanup_task is None:
            self._state, self._next_state, self._reason = "Terminated", "", reason
            self._seconds = time.monotonic() - self._created_at
            self._cleanup_task = asyncio.create_task(self._clean_up(is_crash=is_crash))
            for batch in self._batches.values():
                batch.notifier.notify()
        return self._cleanup_task

    async def _clean_up(self, *, is_crash: bool) -> None:
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)
        self._sandbox.processes.cpu_seconds()  # once more before they are gone
        await self._sandbox.remove()
        if is_crash and self._on_crash is not None:
            self._on_crash(self.activity_id)

    def _batch(self, batch_id: str) -> ScriptBatch:
        batch = self._batches.get(batch_id)
        if batch is None:
            raise ScriptBatchNotFound(f"The activity has no batch {batch_id}.")
        return batch

    def _raise_if_ended(self) -> None:
        if self._state == "Terminated":
            raise ActivityEnded(f"The activity is terminated. {self._reason}")

    async def _events(self, batch: ScriptBatch) -> AsyncIterator[dict[str, Any]]:
        def is_over() -> bool:
            return batch.is_finished or self._state == "Terminated"

        while True:
            await batch.notifier.wait_until(lambda: batch.events or is_over(), None)
            events, batch.events = batch.events, []
            for event in events:
                yield event
            if not batch.events and is_over():
                return

    # The work

    async def _run_batches(self) -> None:
        try:
            while True:
                await self._run_batch(await self._queue.get())
        except _ActivityOver as over:
            log.info("activity %s: %s", self.activity_id, over)
            self._terminate(str(over), is_crash=over.is_crash)
        except Exception:
            log.exception("activity %s failed", self.activity_id)
            self._terminate("The devnet has a bug; see its log.", is_crash=True)

    async def _run_batch(self, batch: ScriptBatch) -> None:
        for index, command in enumerate(batch.commands):
            add_event = functools.partial(batch.add_event, index)
            add_event({"started": {"command": command.raw}})
            streams = {name: _capture(name, command, add_event) for name in ("stdout", "stderr")}
            error = None
            try:
                await self._run_command(command, streams, add_event)
            except CommandFailed as failure:
                error = failure
            except (PathOutsideSandbox, TransferFailed, OSError) as failure:
                error = CommandFailed(str(failure))
            for stream in streams.values():
                stream.close()
            batch.add_result(index, error, streams["stdout"].text, streams["stderr"].text)
            if error is not None:
                return
            if command.ends_activity:
                raise _ActivityOver("The script terminated the activity.", is_crash=False)

    async def _run_command(
        self, command: Command, streams: Mapping[str, Capture], add_event: Callable[[dict[str, Any]], None]
    ) -> None:
        if self._state not in command.allowed_states:
            raise CommandFailed(f"{command.name} is not possible in the state {self._state}.")
        body = command.body
        if command.name == "deploy":
            self._next_state = "Deployed"
            if self._fault_injector.deploy_fails():
                self._next_state = ""
                raise CommandFailed("Deploying failed: the image cannot be unpacked.")
            self._state, self._next_state = "Deployed", ""
        elif command.name == "start":
            self._state = "Ready"
        elif command.name == "transfer":
            size = await self._transfer(body["from"], body["to"])
            if body.get("progress") is not None:
                add_event({"progress": {"step": [1, 1], "message": None, "progress": [size, size], "unit": "Bytes"}})
        elif command.name == "run":
            await self._run(body["entry_point"], body.get("args") or [], streams)
        elif command.name == "sign":
            raise CommandFailed("There is no key to sign with.")

    async def _transfer(self, source: str, target: str) -> int:
        if target.startswith(_CONTAINER) and not source.startswith(_CONTAINER):
            path = self._sandbox.host_path(target.removeprefix(_CONTAINER))
            path.parent.mkdir(parents=True, exist_ok=True)
            return await self._transfers.fetch(source, path)
        if source.startswith(_CONTAINER) and not target.startswith(_CONTAINER):
            return await self._transfers.deliver(self._sandbox.host_path(source.removeprefix(_CONTAINER)), target)
        raise CommandFailed(f"A transfer has one side in the container, unlike {source} -> {target}")

    async def _run(self, entry_point: str, arguments: list[str], streams: Mapping[str, Capture]) -> None:
        fault = self._fault_injector.fault_before_run()
        if fault is not None:
            log.info("activity %s: %s", self.activity_id, fault.kind)
        kind = fault.kind if fault is not None else ""
        if kind == "exit-nonzero":
            raise CommandFailed.from_exit_status(_EXIT_STATUS)
        if kind == "vanish-http":
            self._vanished = fault
        if kind in ("hang", "vanish-http"):
            await asyncio.Event().wait()
        program_run = self._run_program(entry_point, arguments, streams)
        if fault is None:
            await program_run
            return
        task = asyncio.create_task(program_run)
        try:
            await asyncio.wait({task}, timeout=fault.seconds)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        raise _ActivityOver("The exe-unit was killed.", is_crash=True)

    async def _run_program(self, entry_point: str, arguments: list[str], streams: Mapping[str, Capture]) -> None:
        before = self._sandbox.list_outputs()
        started_at = time.monotonic()
        status = await self._sandbox.run(
            entry_point, arguments, on_stdout=streams["stdout"].write, on_stderr=streams["stderr"].write
        )
        # Its program had the same processor as everybody's; a slow provider just is not done yet.
        await asyncio.sleep((time.monotonic() - started_at) * (1 / self._speed - 1))
        if status != 0:
            raise CommandFailed.from_exit_status(status)
        changed = [path for path, file_stamp in self._sandbox.list_outputs().items() if before.get(path) != file_stamp]
        self._fault_injector.corrupt(changed)


def _capture(name: str, command: Command, add_event: Callable[[dict[str, Any]], None]) -> Capture:
    return Capture(command.capture.get(name), lambda text: add_event({name: text}))

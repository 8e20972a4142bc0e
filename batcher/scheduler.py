"""The timer of `mlg batch`, and the single run of `mlg batch --once`.

Called by `cli/batch.py`. Timed jobs process nothing themselves: they only wake the one loop here, so that cycles cannot
overlap however long one takes.

"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

from apscheduler.schedulers.asyncio import AsyncIOScheduler

from batcher.cycle import Cycle, available_models, now_utc
from batcher.executors import Executor, ExecutorContext, load_executor
from batcher.pipelines import PipelineRunner
from batcher.resizing import Resizer, is_compressing, is_resizing
from batcher.result_writer import Tally
from batcher.settings import BatcherSettings, BatcherTimings
from batcher.systemd import extend_stop_timeout
from batcher.trainings import TrainingRunner
from batcher.waiting import wait_for_first
from batcher.workspace import Workspace
from provider_image.errors import MlgError
from provider_image.models.artefact import find_artefact
from store.errors import StoreError
from store.pipelines.definition import PIPELINE
from store.processes.batchers import BatcherRecord
from store.processes.controls import ControlState
from store.settings import HomeSettings
from store.store import Store

log = logging.getLogger(__name__)

#: Time to stop that systemd is asked for beyond what drain, results and executor need.
_STOP_MARGIN_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True)
class OnceReport:
    """What a single run did, and what it left."""

    #: Requests that were released and tried again also count as done or failed.
    tally: Tally
    #: Model -> (number of requests that still wait, why).
    left: dict[str, tuple[int, str]]

    @property
    def is_clean(self) -> bool:
        """True when nothing failed and nothing waits."""
        return not self.tally.failed and not self.left


class Batcher:
    """One batcher, from its registration in the store to its end.

    :param trainings: fits trainings whose features are there; None leaves them to others.
    :param clock: returns the current time.
    """

    def __init__(
        self,
        *,
        store: Store,
        executor: Executor,
        settings: BatcherSettings,
        home_settings: HomeSettings,
        workspace: Workspace,
        batcher_id: str,
        trainings: TrainingRunner | None = None,
        clock: Callable[[], datetime] = now_utc,
        timings: BatcherTimings = BatcherTimings(),
    ) -> None:
        self._store = store
        self._executor = executor
        self._trainings = trainings
        self._settings = settings
        self._timings = timings
        self._home_settings = home_settings
        self._id = batcher_id
        self._owner = workspace.folder.name
        self._clock = clock
        self._started_at = clock()
        #: The operator's controls as last read; None before the first time.
        self._control_state: ControlState | None = None
        is_resized = is_resizing(settings, executor)
        #: Also tries what a stranger says of an input. Its processes are started when they are needed.
        has_resizer = is_resized or not executor.is_trusted
        self._resizer = (
            Resizer(
                settings.resizers,
                settings.models,
                is_compressed=functools.partial(is_compressing, settings, executor),
            )
            if has_resizer
            else None
        )
        self._cycle = Cycle(
            store=store,
            executor=executor,
            settings=settings,
            folder=workspace.folder,
            batcher_id=batcher_id,
            resizer=self._resizer if is_resized else None,
            try_item=None if executor.is_trusted or self._resizer is None else self._resizer.try_item,
            clock=clock,
            timings=timings,
        )
        self._pipelines = PipelineRunner(store, settings.models, clock=clock)

    async def run(self, stop: asyncio.Event) -> None:
        """Run cycles on the timer until stopped. :raises MlgError: the executor cannot start."""
        async with self._running() as scheduler:
            now = datetime.now(UTC)
            scheduler.add_job(self._flush, "interval", seconds=self._settings.every_seconds, next_run_time=now)
            scheduler.add_job(self._purge, "interval", seconds=self._timings.purge_seconds, next_run_time=now)
            polling = asyncio.create_task(self._poll_loop())
            beside = [asyncio.create_task(self._pipeline_loop(stop))]
            if self._trainings is not None:
                beside.append(asyncio.create_task(self._trainings.run(stop)))
            try:
                while not stop.is_set():
                    await wait_for_first(self._cycle.wait_for_wakeup(), stop.wait())
                    tally = await self._cycle.run(stop)
                    if tally.claimed:
                        log.info("cycle ended", extra={**asdict(tally), "seconds": round(tally.seconds, 3)})
            finally:
                polling.cancel()
                if stop.is_set():
                    await asyncio.wait(beside)
                for task in beside:
                    task.cancel()  # they remain only after a failure of the cycle itself

    async def run_once(self, stop: asyncio.Event) -> OnceReport:
        """Process everything that waits now, back-offs included, and end.

        Requests that come in meanwhile may be processed too, but are not waited for.

        :raises MlgError: the executor cannot start, or the store cannot be read.
        """
        started_at = time.monotonic()
        total = Tally()
        async with self._running():
            initial_backlog = _InitialBacklog(self._store, self._timings.once_backlog_seconds)
            await self._advance_pipelines(stop)
            while True:
                self._cycle.flush()
                tally = await self._cycle.run(
                    stop, models=lambda: initial_backlog.models() & available_models(self._settings.models)
                )
                total.add(tally)
                await self._advance_pipelines(stop)
                waiting = await asyncio.to_thread(initial_backlog.count)
                models = waiting.keys() & available_models(self._settings.models)
                if stop.is_set() or all(self._cycle.unavailable_reason(model) is not None for model in models):
                    break
                await wait_for_first(asyncio.sleep(self._timings.once_poll_seconds), stop.wait())
            if self._trainings is not None and not stop.is_set():
                await self._trainings.run_ready(stop)
            left = {model: (count, self._waiting_reason(model)) for model, count in waiting.items()}
            await self._purge()
        total.seconds = time.monotonic() - started_at
        return OnceReport(tally=total, left=left)

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[AsyncIOScheduler]:
        """Start the executor and, until the block ends, send heartbeats and obey the operator's controls.

        :return: a scheduler for further jobs.
        """
        # A late job runs late and once. The time zone is given because looking up the local one can fail.
        defaults = {"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
        scheduler = AsyncIOScheduler(job_defaults=defaults, timezone=UTC)
        watching_controls: asyncio.Task[None] | None = None
        try:
            # A server or batcher of an earlier version may have run until now.
            await asyncio.to_thread(self._store.requests.correct_open)
            await self._executor.start()
            await self._apply_controls()
            await self._send_heartbeat()
            scheduler.add_job(self._send_heartbeat, "interval", seconds=self._timings.heartbeat_seconds)
            scheduler.start()
            watching_controls = asyncio.create_task(self._watch_controls())
            yield scheduler
        finally:
            if watching_controls is not None:
                watching_controls.cancel()
            await self._shut_down(scheduler)

    async def _advance_pipelines(self, stop: asyncio.Event) -> None:
        has_any = True
        while has_any and not stop.is_set():
            has_any = bool(await asyncio.to_thread(self._pipelines.run_ready))

    # Jobs

    async def _flush(self) -> None:
        self._cycle.flush()

    async def _poll_loop(self) -> None:
        # Not a scheduled job: at twenty checks per second the scheduler would cost more than the checks.
        while True:
            await asyncio.sleep(self._settings.poll_seconds)
            self._cycle.poll()

    async def _pipeline_loop(self, stop: asyncio.Event) -> None:
        """Let requests to pipelines go on until stopped."""
        failures = 0
        while not stop.is_set():
            pause = self._timings.pipeline_poll_seconds
            try:
                has_any = bool(await asyncio.to_thread(self._pipelines.run_ready))
                failures = 0
                if has_any:
                    pause = 0.0
                    self._cycle.poll()
            except StoreError as error:
                failures += 1
                pause = self._timings.store_backoff.after(failures)
                log.warning("cannot let pipelines go on, trying again in %.1f s: %s", pause, error)
            except Exception:
                # A bug here must not stop all of them for good.
                log.exception("cannot let pipelines go on")
                pause = self._timings.store_backoff.max_seconds
            await wait_for_first(stop.wait(), asyncio.sleep(pause))

    async def _watch_controls(self) -> None:
        while True:
            await asyncio.sleep(self._timings.controls_poll_seconds)
            if await self._apply_controls():
                await self._send_heartbeat()

    async def _apply_controls(self) -> bool:
        """Read the operator's controls and apply them. :return: whether they have changed."""
        try:
            control_state = await asyncio.to_thread(self._store.controls.state)
        except StoreError as error:
            log.debug("cannot read the operator's controls: %s", error)
            if self._control_state is None:
                self._cycle.pause("The batcher cannot read from the store whether it is paused. See its log.")
            return False
        before, self._control_state = self._control_state, control_state
        if control_state == before:
            return False
        if before is None or control_state.pause != before.pause:
            if before is not None or control_state.pause is not None:
                log.info("processing resumes" if control_state.pause is None else control_state.pause.notice)
            self._cycle.pause(None if control_state.pause is None else control_state.pause.notice)
        # A `mlg operate run` from before this batcher's start is ignored: its first cycle processes everything anyway.
        if before is not None and control_state.run_token != before.run_token:
            self._cycle.flush()
        return True

    async def _send_heartbeat(self) -> None:
        try:
            await asyncio.to_thread(self._store.batchers.heartbeat, await self._batcher_record())
        except StoreError as error:
            log.warning("cannot write the heartbeat of this batcher: %s", error)

    async def _batcher_record(self) -> BatcherRecord:
        models = await asyncio.to_thread(available_models, self._settings.models)
        caps = await asyncio.to_thread(self._store.reservations.caps, self._owner)
        return BatcherRecord(
            id=self._id,
            host=socket.gethostname(),
            pid=os.getpid(),
            executor=self._executor.name,
            every_seconds=self._settings.every_seconds,
            max_wait_seconds=self._settings.max_wait_seconds,
            capacity=self._executor.workers(),
            budget={name: f"{amount:f}" for name, amount in caps.items()},
            notices={
                model: reason for model in models if (reason := self._cycle.unavailable_reason(model)) is not None
            },
            started_at=self._started_at,
            seen_at=self._clock(),
        )

    async def _purge(self) -> None:
        now = self._clock()
        try:
            purged = await asyncio.to_thread(
                self._store.retention.purge,
                images_before=now - timedelta(seconds=self._home_settings.keep_images_seconds),
                results_before=now - timedelta(seconds=self._home_settings.keep_results_seconds),
                usage_before=now - timedelta(seconds=self._home_settings.keep_usage_seconds),
                now=now,
            )
        except (StoreError, OSError) as error:
            log.warning("cannot delete expired data, trying again in an hour: %s", error)
            return
        if purged.images or purged.results or purged.leftovers:
            log.info(
                "deleted expired data",
                extra={"images": purged.images, "results": purged.results, "leftovers": purged.leftovers},
            )

    async def _shut_down(self, scheduler: AsyncIOScheduler) -> None:
        if scheduler.running:
            scheduler.shutdown(wait=False)
        self._store.retention.stop()
        if self._resizer is not None:
            await asyncio.to_thread(self._resizer.close)
        await self._executor.close()
        try:
            await asyncio.to_thread(self._store.batchers.deregister, self._id)
        except StoreError as error:
            log.warning("cannot deregister this batcher: %s", error)

    def _waiting_reason(self, model: str) -> str:
        unavailable_reason = self._cycle.unavailable_reason(model)
        if unavailable_reason is not None:
            return unavailable_reason
        if model in available_models(self._settings.models):
            return "The batcher was stopped before these requests were done."
        try:
            find_artefact(self._settings.models, model)
        except MlgError as error:
            return error.reason
        return "The model was installed during this run. Run mlg batch again."


class _InitialBacklog:
    """The waiting requests from before this object was made, and the steps of pipelines' requests from before."""

    def __init__(self, store: Store, refresh_seconds: float) -> None:
        self._store = store
        self._refresh_seconds = refresh_seconds
        newest = store.requests.list(limit=1)
        self._newest_number = newest[0].number if newest else 0
        self._models: frozenset[str] = frozenset()
        self._counted_at = float("-inf")

    def count(self) -> dict[str, int]:
        """Count the waiting requests by model; models with only newer requests are left out."""
        backlog = self._store.requests.backlog()
        found = {
            each.model: each.waiting
            for each in backlog
            if each.service != PIPELINE and each.oldest_number is not None and each.oldest_number <= self._newest_number
        }
        pipelines = [each.model for each in backlog if each.service == PIPELINE]
        if pipelines:
            found |= self._store.pipelines.waiting_models(pipelines, self._newest_number)
        return found

    def models(self) -> frozenset[str]:
        """Return the models with older requests waiting; reads the store at most once per interval."""
        if time.monotonic() - self._counted_at > self._refresh_seconds:
            self._models = frozenset(self.count())
            self._counted_at = time.monotonic()
        return self._models


async def run_batcher(
    settings: BatcherSettings,
    home_settings: HomeSettings,
    store: Store,
    environment: Mapping[str, str],
    *,
    batcher_id: str,
    is_once: bool,
    parent_fd: int | None = None,
) -> OnceReport | None:
    """Run a batcher until SIGTERM, Ctrl-C, or the end of its parent process.

    :param environment: from which executors read their settings.
    :param parent_fd: a pipe from the parent; the batcher stops when it is closed.
    :return: the report of a single run; None on the timer.
    """
    workspace = Workspace(settings.work, batcher_id)
    workspace.create()
    try:
        stop = asyncio.Event()
        context = ExecutorContext(
            owner=workspace.folder.name,
            work=workspace.folder,
            models=settings.models,
            store=store,
            environment=environment,
        )
        executor = load_executor(settings.executor, context)
        stop_seconds = settings.drain_seconds + BatcherTimings().final_write_seconds + executor.stop_seconds()
        _listen_for_stop(stop, parent_fd, lambda: extend_stop_timeout(stop_seconds + _STOP_MARGIN_SECONDS, environment))
        batcher = Batcher(
            store=store,
            executor=executor,
            settings=settings,
            home_settings=home_settings,
            workspace=workspace,
            batcher_id=batcher_id,
            trainings=TrainingRunner(store.trainings, home_settings.home, environment),
        )
        if is_once:
            return await batcher.run_once(stop)
        await batcher.run(stop)
        return None
    finally:
        workspace.remove()


def _listen_for_stop(stop: asyncio.Event, parent_fd: int | None, on_stop: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            # A second signal ends the process immediately: workers end with their standard input, leases expire.
            os._exit(130)
        stop.set()
        on_stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    if parent_fd is not None:
        descriptor = parent_fd

        def on_parent() -> None:
            if not os.read(descriptor, 4096):
                loop.remove_reader(descriptor)
                stop.set()

        loop.add_reader(descriptor, on_parent)

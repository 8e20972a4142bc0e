"""The golem executor: keeps a session open, and distributes workers among models.

Made by the registry. It and the modules without yapapi beside it make all decisions about money, providers and
retries; yapapi negotiates, deploys, transfers and runs.

Weaknesses compared with other executors: the first result takes seconds, because offers are collected first. A provider
sees the images as they are sent (resized to the model's input, unless that is switched off). Its results are checked
for format and identity, not for correctness.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections import Counter
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from decimal import Decimal

from batcher.errors import BudgetReached, GolemUnavailable, NoProvider
from batcher.executors import ExecutorContext, Job, Outcome
from batcher.executors.golem.job_queue import QueuedJob
from batcher.executors.golem.parts import GolemParts
from batcher.executors.golem.payload import make_payload
from batcher.executors.golem.recovery import home_tag
from batcher.executors.golem.session import Session
from batcher.executors.golem.settings import GolemSettings
from batcher.executors.golem.timings import GolemTimings
from batcher.executors.golem.worker_pool import WorkerPool
from batcher.executors.golem.yapapi_adapter import explain
from provider_image.errors import ConfigError, MlgError

log = logging.getLogger(__name__)

#: Jobs under way for each worker at least: one that it runs and one that is packed and queued, so that it never waits.
JOBS_PER_WORKER = 2
#: Size of an allocation, in GLM, when no budget is set.
_DEFAULT_ALLOCATION = Decimal(10)
#: Size of one for a session that only settles: old invoices get allocations of their own.
_SMALLEST_ALLOCATION = Decimal("0.0001")


class GolemExecutor:
    """See `batcher.executors.Executor`. Settings are read from the context's environment unless given."""

    name = "golem"
    is_remote = True
    is_trusted = False

    def __init__(
        self, context: ExecutorContext, *, settings: GolemSettings | None = None, timings: GolemTimings = GolemTimings()
    ) -> None:
        self._context = context
        self._settings = GolemSettings.from_env(context.environment) if settings is None else settings
        self._timings = timings
        self._parts = GolemParts(context, self._settings, timings)
        self._job_queue = self._parts.job_queue
        self._session: Session | None = None
        self._sessions = 0
        self._pools: dict[str, WorkerPool] = {}
        #: Pools that are being made, which may wait for the registry of images: model -> task.
        self._opening: dict[str, asyncio.Task[WorkerPool]] = {}
        #: Pools that are being closed.
        self._closing: set[asyncio.Task[None]] = set()
        self._session_task: asyncio.Task[None] | None = None
        self._closing_task: asyncio.Task[None] | None = None
        #: Why there is no session; None when there is one.
        self._session_error: str | None = "The batcher is connecting to the Golem daemon."
        self._refreshed_at = float("-inf")
        self._first_attempt_done = asyncio.Event()
        self._tag = ""

    # The Executor protocol

    async def start(self) -> None:
        """See Executor.start. A daemon that does not respond is no error: the connection is retried."""
        if not self._settings.app_key:
            raise ConfigError(
                "The golem executor needs a yagna daemon and an app key. Create one (yagna app-key create mlg) and set "
                "YAGNA_APPKEY to it. To try without a daemon: mlg devnet"
            )
        if shutil.which("gftp") is None:
            raise ConfigError(
                "The program gftp is not on the PATH. Install yagna, which includes it; mlg devnet has its own."
            )
        self._tag = await asyncio.to_thread(home_tag, self._context.work.parent / "golem-home")
        await asyncio.to_thread(self._context.work.mkdir, parents=True, exist_ok=True)
        self._parts.ledger_writer.start()
        await self._parts.money.start()
        session_task = self._session_task = asyncio.create_task(self._session_loop())
        first = asyncio.create_task(self._first_attempt_done.wait())
        await asyncio.wait({first, session_task}, return_when=asyncio.FIRST_COMPLETED)
        first.cancel()
        if session_task.done():
            session_task.result()  # raises a ConfigError; otherwise the task does not end

    def capacity(self, model: str) -> int:
        # Those that it answers next, those that it computes meanwhile, and those that are packed and queued.
        pipelined = 3 * self._timings.pipeline_chunks(self._parts.provider_records.speed(model, ""))
        return max(JOBS_PER_WORKER, pipelined) * self._settings.max_workers

    def workers(self) -> int:
        return self._settings.max_workers

    def has_quick_transfers(self, model: str) -> bool:
        # An earlier version of what providers have built in knows compressed images only.
        return self._settings.runtime is None and self._parts.quick_transfers.get(model, False)

    def unavailable_reason(self, model: str) -> str | None:
        if self._session_error is not None:
            return self._session_error
        denial = self._parts.money.unavailable_reason(model)
        if denial is not None:
            return denial
        pool = self._pools.get(model)
        if pool is None or pool.workers:
            return None
        oldest = min((each.waiting_since for each in self._job_queue.queued_jobs(model)), default=None)
        if oldest is None or time.monotonic() - oldest < self._timings.explain_wait_seconds:
            return None
        return self._parts.provider_records.unavailable_reason(model)

    async def run(self, job: Job) -> Outcome:
        queued_job = QueuedJob(job=job, outcome=asyncio.get_running_loop().create_future())
        self._job_queue.put(queued_job)
        try:
            return await queued_job.outcome
        finally:
            # After a cancellation the job is removed from the queue, or stopped on its worker.
            self._job_queue.remove(queued_job)
            if queued_job.outcome.cancelled():
                queued_job.cancel()

    def stop_seconds(self) -> float:
        """See Executor.stop_seconds: workers and agreements end, bills are paid, records are written.

        The sum of the limits of all that. Only a daemon that does not respond makes it last so long.
        """
        timings = self._timings
        pools = timings.close_seconds + 3 * timings.cleanup_seconds
        session = timings.recovery_seconds + 2 * timings.stop_seconds + timings.ledger_close_seconds
        return pools + session + self._settings.settle_seconds

    async def close(self) -> None:
        self._job_queue.close()
        session_task, self._session_task = self._session_task, None
        if session_task is None:
            return
        session_task.cancel()
        await asyncio.gather(session_task, return_exceptions=True)
        if self._closing_task is not None:
            await self._closing_task
        await self._end_session(self._settings.settle_seconds)
        self._parts.money.close()
        await self._parts.ledger_writer.close()

    # Sessions

    async def _session_loop(self) -> None:
        """Keep a session open, and run its steps."""
        failures = 0
        while True:
            try:
                await self._refresh()
                await self._open()
                self._session_error = None
                self._first_attempt_done.set()
                failures = 0
                await self._step_session()
                await self._end_session(0.0)
                continue
            except ConfigError:
                raise
            except MlgError as error:
                self._session_error = error.reason
                log.warning(
                    "%s Trying again in %.0f s.", error.reason, self._timings.session_backoff.after(failures + 1)
                )
            except Exception as error:
                # A bug here must not leave all requests waiting for ever.
                log.exception("the session with the Golem daemon failed, opening another")
                self._session_error = f"The session with the Golem daemon failed: {explain(error)}."
            failures += 1
            self._first_attempt_done.set()
            await self._wait_without_session(self._timings.session_backoff.after(failures))
            await self._end_session(0.0)

    async def _open(self) -> None:
        try:
            left = await self._parts.money.left()
        except BudgetReached as error:
            if await asyncio.to_thread(self._parts.money.has_leftovers, self._parts.is_gone):
                # What is left open counts against the caps until it is settled, and only a session settles it.
                await self._open_session(_SMALLEST_ALLOCATION, awaits_invoices=True)
                # `start` does not wait for invoices, which come when providers like.
                self._session_error = error.reason
                self._first_attempt_done.set()
                await self._end_session(self._settings.settle_seconds)
            raise
        await self._open_session(_DEFAULT_ALLOCATION if left is None else left)

    async def _open_session(self, amount: Decimal, *, awaits_invoices: bool = False) -> None:
        self._sessions += 1
        # Before it is open, so that it is closed if this is cancelled meanwhile.
        self._session = Session(self._parts, number=self._sessions, tag=self._tag, amount=amount)
        await self._session.open(awaits_invoices=awaits_invoices)

    async def _wait_without_session(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._expire_waiting()
            await asyncio.sleep(min(0.5, seconds))

    async def _step_session(self) -> None:
        """Run steps until the session has to be replaced."""
        session = self._session
        assert session is not None
        while True:
            await asyncio.sleep(self._timings.step_seconds)
            if session.broken_reason is not None:
                self._session_error = session.broken_reason
                return
            if session.day != datetime.now(UTC).date():
                session.is_stale = True
            if session.is_stale:
                for pool in self._pools.values():
                    pool.drain()
                if not any(pool.workers for pool in self._pools.values()):
                    return
                continue
            await self._refresh()
            self._expire_waiting()
            await self._step_pools(session)

    async def _step_pools(self, session: Session) -> None:
        if self._parts.provider_records.take_unbanned():
            for pool in self._pools.values():
                pool.restart_search()
        waiting = Counter(each.job.model for each in self._job_queue.queued_jobs())
        # Neither is waited for here: other models go on meanwhile.
        for model in waiting:
            if model not in self._pools and model not in self._opening:
                self._opening[model] = asyncio.create_task(self._new_pool(model, session))
        for model in [model for model, task in self._opening.items() if task.done()]:
            try:
                self._pools[model] = self._opening.pop(model).result()
            except MlgError as error:
                self._job_queue.fail_all(error, model=model)
        wanted = self._distribute_workers(waiting)
        for model, pool in list(self._pools.items()):
            total = sum(len(each.workers) + each.starting() for each in self._pools.values())
            # Where agreements expire, one worker more than allowed: it starts while an earlier one still works.
            has_earlier = len(pool.current_workers()) < len(pool.workers)
            pool.step(wanted.get(model, 0), may_start=total < self._settings.max_workers + has_earlier)
            is_idle = not pool.workers and not waiting.get(model)
            if is_idle and time.monotonic() - pool.last_wanted > self._timings.unused_pool_seconds:
                del self._pools[model]
                task = asyncio.create_task(pool.close(0.0))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    def _distribute_workers(self, waiting: Mapping[str, int]) -> dict[str, int]:
        """Return the number of workers for each model, distributed round-robin: busy ones, for work, the minimum."""
        now = time.monotonic()
        max_workers = self._settings.max_workers
        needed, wanted = {}, {}
        for model, pool in self._pools.items():
            if waiting.get(model) or any(worker.queued_job is not None for worker in pool.workers):
                pool.last_work = now
            current = pool.current_workers()
            working = sum(worker.queued_job is not None for worker in current)
            # One that starts will take a job that waits now.
            starting = sum(worker.queued_job is None and not worker.is_idle() for worker in current)
            needed[model] = working + max(starting, min(waiting.get(model, 0), max_workers))
            wanted[model] = max(needed[model], pool.min_workers())
        shared = dict.fromkeys(wanted, 0)
        for target in (needed, wanted):
            while sum(shared.values()) < max_workers and any(shared[model] < target[model] for model in target):
                for model in target:
                    if shared[model] < target[model] and sum(shared.values()) < max_workers:
                        shared[model] += 1
        is_full = sum(len(pool.workers) for pool in self._pools.values()) >= max_workers
        short = {each for each, pool in self._pools.items() if waiting.get(each) and len(pool.workers) < shared[each]}
        if is_full and short:
            self._release_one_worker(short)
        return shared

    def _release_one_worker(self, short: Collection[str]) -> None:
        """Stop one worker in favour of models that have too few: an idle one of another model.

        Where a model has none: any idle one, or one of the model that has most.
        """
        pools = sorted(self._pools.values(), key=lambda pool: len(pool.workers), reverse=True)
        workers = [worker for pool in pools for worker in pool.workers]
        if any(worker.is_stopping for worker in workers):
            return
        idle = [worker for worker in workers if worker.is_idle()]
        chosen = [worker for worker in idle if worker.model not in short]
        if any(not self._pools[model].workers for model in short):
            chosen += [*idle, *(pools[0].workers if len(pools[0].workers) > 1 else ())]
        for worker in chosen[:1]:
            worker.is_stopping = True
            self._job_queue.notify()

    async def _new_pool(self, model: str, session: Session) -> WorkerPool:
        speeds = await asyncio.to_thread(self._context.store.providers.speed, model)
        self._parts.provider_records.speeds[model].update(speeds)
        payload = await make_payload(model, session.owner, self._context.models, self._settings)
        return WorkerPool(self._parts, session, model=model, payload=payload)

    async def _end_session(self, settle_seconds: float) -> None:
        """End the session, if there is one; continues even if the caller is cancelled."""
        if self._closing_task is None or self._closing_task.done():
            self._closing_task = asyncio.create_task(self._end_session_now(settle_seconds))
        await asyncio.shield(self._closing_task)

    async def _end_session_now(self, settle_seconds: float) -> None:
        opening, self._opening = list(self._opening.values()), {}
        for task in opening:
            task.cancel()
        pools, self._pools = list(self._pools.values()), {}
        session, self._session = self._session, None
        is_usable = session is not None and session.broken_reason is None
        await asyncio.gather(*(pool.close(self._timings.close_seconds if is_usable else 0.0) for pool in pools))
        await asyncio.gather(*opening, *self._closing, return_exceptions=True)
        if session is not None:
            self._parts.money.release_all()  # a hire that was cancelled may have left its reservation
            await session.close(settle_seconds)

    async def _refresh(self) -> None:
        """Read from the store: bans by operators and other batchers, scores, what may be spent again."""
        now = time.monotonic()
        if now - self._refreshed_at < self._timings.refresh_seconds:
            return
        self._refreshed_at = now
        try:
            self._parts.provider_records.forget_old()
            await asyncio.to_thread(self._parts.provider_records.refresh)
            await self._parts.money.refresh()
        except MlgError as error:
            log.warning("cannot read the ledger: %s", error)

    def _expire_waiting(self) -> None:
        """End jobs that have been without a provider that may take them for too long."""
        now = time.monotonic()
        for queued_job in self._job_queue.queued_jobs():
            pool = self._pools.get(queued_job.job.model)
            if pool is not None and any(worker.provider_id not in queued_job.failed_on for worker in pool.workers):
                queued_job.waiting_since = now  # one of these workers will take it, unless it ends before
            if now - queued_job.waiting_since < self._settings.offer_seconds:
                continue
            self._job_queue.remove(queued_job)
            if queued_job.last_outcome is not None and not queued_job.last_outcome.is_blameless:
                # Every available provider has failed on it.
                self._parts.provider_records.lift_bans(queued_job)
                queued_job.complete(queued_job.last_outcome)
            elif self._session_error is not None:
                queued_job.complete(Outcome.not_run(GolemUnavailable(self._session_error)))
            else:
                reason = self._parts.provider_records.unavailable_reason(queued_job.job.model)
                queued_job.complete(Outcome.not_run(NoProvider(reason)))

"""The golem executor: keeps a session open, distributes workers among models, and decides what follows a failure.

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
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from batcher.errors import BudgetReached, ExecutorUnavailable, GolemUnavailable, NoProvider
from batcher.executors import Job, Outcome
from batcher.executors.golem.budget import Budget, BudgetCaps
from batcher.executors.golem.job_queue import JobQueue, QueuedJob
from batcher.executors.golem.ledger_writer import LedgerWriter, describe_agreement
from batcher.executors.golem.offers import BadOffer, OfferEvaluator, Price
from batcher.executors.golem.payload import make_payload
from batcher.executors.golem.provider_bans import ProviderBans
from batcher.executors.golem.recovery import home_tag
from batcher.executors.golem.session import Session
from batcher.executors.golem.worker import AttemptFailure, GolemWorker, WorkerContext
from batcher.executors.golem.worker_pool import PoolEvents, WorkerPool
from batcher.executors.golem.yapapi_adapter import explain
from batcher.settings import BatcherSettings
from batcher.workspace import is_alive
from provider_image.errors import ConfigError, MlgError, WorkerDied
from store.store import Store

log = logging.getLogger(__name__)

#: Jobs under way for each worker: one that it runs and one that is packed and queued, so that it never waits.
JOBS_PER_WORKER = 2
#: Interval at which the number of workers is adjusted to the queue.
_STEP_SECONDS = 0.2
#: Interval at which bans, scores and spending are read from the store.
_REFRESH_SECONDS = 5.0
#: Pause after a session could not be opened; doubles up to the maximum.
_INITIAL_BACKOFF_SECONDS = 1.0
_MAX_BACKOFF_SECONDS = 30.0
#: Waiting requests show a reason once a chunk has been queued for this long.
_EXPLAIN_WAIT_SECONDS = 5.0
#: A demand without work for this long is withdrawn.
_UNUSED_POOL_SECONDS = 60.0
#: A model that had work within this time keeps its minimum of workers.
_MIN_WORKERS_SECONDS = 3600.0
#: Limit for attempts of any kind, those that failed through this machine or the daemon included.
_MAX_ATTEMPTS = 10
#: Size of an allocation, in GLM, when no budget is set.
_DEFAULT_ALLOCATION = Decimal(10)
#: When the executor closes, workers get this long to end by themselves; their chunks are released before.
_CLOSE_SECONDS = 1.0


class GolemExecutor:
    """See `batcher.executors.Executor`.

    :param store: for the ledger and the providers.
    """

    name = "golem"
    is_remote = True

    def __init__(self, settings: BatcherSettings, store: Store) -> None:
        self._batcher_settings = settings
        self._settings = settings.golem
        self._ledger_writer = LedgerWriter(store.ledger, store.providers)
        self._id = settings.work.name
        self._offer_evaluator = OfferEvaluator(self._settings)
        self._budget = Budget(
            BudgetCaps(run=self._settings.budget_run, day=self._settings.budget_day, total=self._settings.budget_total),
            clock=lambda: datetime.now(UTC),
        )
        self._provider_bans = ProviderBans(self._settings, self._offer_evaluator, self._ledger_writer)
        self._job_queue: JobQueue | None = None
        self._session: Session | None = None
        self._sessions = 0
        self._pools: dict[str, WorkerPool] = {}
        self._session_task: asyncio.Task[None] | None = None
        self._closing_task: asyncio.Task[None] | None = None
        self._is_closed = False
        #: Why there is no session; None when there is one.
        self._session_error: str | None = "The batcher is connecting to the Golem daemon."
        #: What the last step that the budget did not allow would have cost at most.
        self._denied_cost: Decimal | None = None
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
        self._job_queue = JobQueue()
        self._tag = await asyncio.to_thread(home_tag, self._batcher_settings.work.parent / "golem-home")
        await asyncio.to_thread(self._batcher_settings.work.mkdir, parents=True, exist_ok=True)
        self._ledger_writer.start()
        self._session_task = asyncio.create_task(self._session_loop())
        first = asyncio.create_task(self._first_attempt_done.wait())
        await asyncio.wait({first, self._session_task}, return_when=asyncio.FIRST_COMPLETED)
        first.cancel()
        if self._session_task.done():
            self._session_task.result()  # raises a ConfigError; otherwise the task does not end

    def capacity(self) -> int:
        """See Executor.capacity."""
        return JOBS_PER_WORKER * self._settings.max_workers

    def workers(self) -> int:
        """See Executor.workers."""
        return self._settings.max_workers

    def unavailable_reason(self, model: str) -> str | None:
        """See Executor.unavailable_reason."""
        if self._session_error is not None:
            return self._session_error
        if self._denied_cost is not None:
            reason = self._budget.over_budget_reason(self._denied_cost)
            if reason is not None:
                return reason
        pool = self._pools.get(model)
        if pool is None or pool.workers or self._job_queue is None:
            return None
        oldest = min(
            (each.waiting_since for each in self._job_queue.queued_jobs() if each.job.model == model), default=None
        )
        if oldest is None or time.monotonic() - oldest < _EXPLAIN_WAIT_SECONDS:
            return None
        return self._offer_evaluator.unavailable_reason(model)

    async def run(self, job: Job) -> Outcome:
        """See Executor.run."""
        if self._is_closed or self._job_queue is None:
            return Outcome.not_run(WorkerDied("The executor is closed."))
        queued_job = QueuedJob(
            job=job, outcome=asyncio.get_running_loop().create_future(), waiting_since=time.monotonic()
        )
        self._job_queue.put(queued_job)
        try:
            return await queued_job.outcome
        finally:
            # After a cancellation the job is removed from the queue, or stopped on its worker.
            self._job_queue.remove([queued_job])
            if queued_job.outcome.cancelled():
                queued_job.cancel()

    async def close(self) -> None:
        """See Executor.close."""
        if self._is_closed or self._job_queue is None:
            self._is_closed = True
            return
        self._is_closed = True
        self._job_queue.fail_all(WorkerDied("The executor is closed."))
        if self._session_task is not None:
            self._session_task.cancel()
            await asyncio.gather(self._session_task, return_exceptions=True)
        if self._closing_task is not None:
            await self._closing_task
        await self._end_session(self._settings.settle_seconds)
        await self._ledger_writer.close()

    # Sessions

    async def _session_loop(self) -> None:
        """Keep a session open, and run its steps."""
        pause = _INITIAL_BACKOFF_SECONDS
        while True:
            try:
                await self._refresh_providers()
                await self._open()
            except ExecutorUnavailable as error:
                self._session_error = error.reason
                log.warning("%s Trying again in %.0f s.", error.reason, pause)
                self._first_attempt_done.set()
                await self._wait_without_session(pause)
                pause = min(2 * pause, _MAX_BACKOFF_SECONDS)
                continue
            except ConfigError:
                raise
            except Exception as error:
                # A bug here must not leave all requests waiting for ever.
                log.exception("the session with the Golem daemon failed")
                self._session_error = f"The session with the Golem daemon failed: {explain(error)}."
                self._first_attempt_done.set()
                await self._wait_without_session(pause)
                pause = min(2 * pause, _MAX_BACKOFF_SECONDS)
                continue
            self._session_error = None
            self._first_attempt_done.set()
            pause = _INITIAL_BACKOFF_SECONDS
            try:
                await self._step_session()
            except Exception as error:
                log.exception("the session with the Golem daemon failed, opening another")
                self._session_error = f"The session with the Golem daemon failed: {explain(error)}."
                await self._wait_without_session(pause)
            await self._end_session(0.0)

    async def _open(self) -> None:
        left = self._budget.left()
        if left is not None and left <= 0:
            raise BudgetReached(self._budget.over_budget_reason(Decimal("1e-9")))
        self._sessions += 1
        session = Session(
            batcher_id=self._id,
            number=self._sessions,
            tag=self._tag,
            amount=_DEFAULT_ALLOCATION if left is None else left,
            folder=self._batcher_settings.work,
            settings=self._settings,
            offer_evaluator=self._offer_evaluator,
            ledger_writer=self._ledger_writer,
            on_paid=self._budget.record_payment,
            on_overbilled=self._provider_bans.record_overbilling,
            on_offer=self._ledger_writer.record_offer,
            is_gone=lambda batcher_id: not is_alive(self._batcher_settings.work.parent, batcher_id),
        )
        await session.open()
        self._session = session

    async def _wait_without_session(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._expire_waiting()
            await asyncio.sleep(min(0.5, seconds))

    async def _step_session(self) -> None:
        """Run steps until the session has to be replaced."""
        session = self._session
        assert session is not None and self._job_queue is not None
        while True:
            await asyncio.sleep(_STEP_SECONDS)
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
            await self._refresh_providers()
            self._expire_waiting()
            await self._step_pools(session)

    async def _step_pools(self, session: Session) -> None:
        assert self._job_queue is not None
        waiting = {model: self._job_queue.count(model) for model in self._job_queue.models()}
        for model in waiting:
            if model not in self._pools:
                try:
                    self._pools[model] = await self._new_pool(model, session)
                except MlgError as error:
                    self._job_queue.fail_all(error, model=model)
        wanted = self._distribute_workers(waiting)
        for model, pool in list(self._pools.items()):
            pool.step(wanted.get(model, 0))
            is_idle = not pool.workers and not waiting.get(model)
            if is_idle and time.monotonic() - pool.last_wanted > _UNUSED_POOL_SECONDS:
                del self._pools[model]
                await pool.close(0.0)

    def _distribute_workers(self, waiting: dict[str, int]) -> dict[str, int]:
        """Return the number of workers for each model: busy ones stay, the rest are distributed round-robin."""
        now = time.monotonic()
        max_workers = self._settings.max_workers
        wanted = {}
        for model, pool in self._pools.items():
            busy = sum(worker.queued_job is not None or worker.start_seconds is None for worker in pool.workers)
            needed = max(busy, min(busy + waiting.get(model, 0), busy + max_workers))
            if now - pool.last_wanted < _MIN_WORKERS_SECONDS:
                needed = max(needed, self._settings.min_workers)
            wanted[model] = needed
        shared = dict.fromkeys(wanted, 0)
        while sum(shared.values()) < max_workers and any(shared[model] < wanted[model] for model in wanted):
            for model in wanted:
                if shared[model] < wanted[model] and sum(shared.values()) < max_workers:
                    shared[model] += 1
        worker_count = sum(len(pool.workers) for pool in self._pools.values())
        starving = [model for model, pool in self._pools.items() if waiting.get(model) and not pool.workers]
        if worker_count >= max_workers and starving:
            self._release_one_worker()
        return shared

    def _release_one_worker(self) -> None:
        """Stop one worker in favour of a model that has none: an idle one, or one of the model that has most."""
        pools = sorted(self._pools.values(), key=lambda pool: len(pool.workers), reverse=True)
        workers = [worker for pool in pools for worker in pool.workers]
        if any(worker.is_stopping for worker in workers):
            return
        idle = [worker for worker in workers if worker.queued_job is None and worker.start_seconds is not None]
        crowded = [worker for worker in workers if len(pools[0].workers) > 1 and worker in pools[0].workers]
        for worker in [*idle, *crowded][:1]:
            worker.is_stopping = True
            if self._job_queue is not None:
                self._job_queue.notify()

    async def _new_pool(self, model: str, session: Session) -> WorkerPool:
        assert self._job_queue is not None
        speeds = await asyncio.to_thread(self._ledger_writer.providers.speed, model)
        self._offer_evaluator.update_speeds(model, speeds)
        payload = await make_payload(model, session.owner, self._batcher_settings.models, self._settings)
        worker_context = WorkerContext(
            settings=self._settings,
            job_queue=self._job_queue,
            folder=self._batcher_settings.work,
            speed=lambda worker: self._offer_evaluator.speed(worker.model, worker.provider_id),
            over_budget_reason=self._over_budget_reason,
            is_retained=self._is_retained,
            on_ready=lambda worker: log.info(
                "provider %s is ready for %s after %.1f s",
                worker.provider_name,
                worker.model,
                worker.start_seconds or 0.0,
            ),
            on_done=self._on_chunk_done,
            on_failed=self._on_attempt_failed,
        )
        events = PoolEvents(
            on_agreement=self._on_agreement,
            on_agreement_ended=self._ledger_writer.record_agreement_end,
            on_not_signed=self._on_not_signed,
            on_worker_started=self._on_worker_started,
            on_worker_ended=self._on_worker_ended,
            on_over_budget=self._on_over_budget,
        )
        return WorkerPool(
            model=model,
            session=session,
            payload=payload,
            offer_evaluator=self._offer_evaluator,
            worker_context=worker_context,
            settings=self._settings,
            events=events,
            is_affordable=self._is_affordable,
        )

    async def _end_session(self, settle_seconds: float) -> None:
        """End the session, if there is one; continues even if the caller is cancelled."""
        if self._closing_task is None or self._closing_task.done():
            self._closing_task = asyncio.create_task(self._end_session_now(settle_seconds))
        await asyncio.shield(self._closing_task)

    async def _end_session_now(self, settle_seconds: float) -> None:
        pools, self._pools = list(self._pools.values()), {}
        grace_seconds = _CLOSE_SECONDS if self._session is not None and self._session.broken_reason is None else 0.0
        await asyncio.gather(*(pool.close(grace_seconds) for pool in pools))
        session, self._session = self._session, None
        if session is not None:
            await session.close(settle_seconds)

    async def _refresh_providers(self) -> None:
        """Read from the store: bans by operators and other batchers, scores, what other batchers spend."""
        now = time.monotonic()
        if now - self._refreshed_at < _REFRESH_SECONDS:
            return
        self._refreshed_at = now
        banned = self._offer_evaluator.banned()
        try:
            await asyncio.to_thread(self._refresh_providers_now)
        except MlgError as error:
            log.warning("cannot read the ledger: %s", error)
        if banned - self._offer_evaluator.banned():
            for pool in self._pools.values():
                pool.restart_search()

    def _refresh_providers_now(self) -> None:
        now, ledger = datetime.now(UTC), self._ledger_writer.ledger
        providers = self._ledger_writer.providers
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        self._offer_evaluator.update_providers(
            banned=providers.banned(now),
            reliability={each.id: each.score for each in providers.list()},
        )
        self._budget.set_spent_by_others(
            ledger.spent() - ledger.spent(batcher_id=self._id),
            ledger.spent(since=midnight) - ledger.spent(since=midnight, batcher_id=self._id),
        )

    # Money

    def _over_budget_reason(self, extra: Decimal) -> str | None:
        reason = self._budget.over_budget_reason(extra)
        if reason is None:
            return None
        if self._denied_cost is None:
            log.warning("%s", reason)
        self._denied_cost = extra if self._denied_cost is None else min(extra, self._denied_cost)
        if self._job_queue is not None and not self._is_closed:
            self._job_queue.fail_all(BudgetReached(reason))
        return reason

    def _is_affordable(self, price: Price) -> bool:
        return self._budget.over_budget_reason(self._start_cost(price)) is None

    def _on_over_budget(self, price: Price) -> None:
        self._over_budget_reason(self._start_cost(price))

    def _start_cost(self, price: Price) -> Decimal:
        # A start that hangs is paid until its timeout; the limit of 60 s lets a small budget start workers at all.
        return price.max_cost(min(60.0, self._settings.start_seconds))

    def _on_agreement(self, model: str, agreement: Any) -> None:
        assert self._session is not None
        try:
            record, _ = describe_agreement(agreement.details.raw_details, allocation_id=self._session.allocation_id)
        except BadOffer:
            return
        self._ledger_writer.record_agreement(replace(record, model=model, created_at=datetime.now(UTC)))

    # Workers

    def _on_worker_started(self, worker: GolemWorker) -> None:
        log.info(
            "provider %s starts a worker for %s",
            worker.provider_name,
            worker.model,
            extra={"agreement_id": worker.agreement_id},
        )
        self._denied_cost = None
        self._budget.add_agreement(worker.agreement_id, worker.max_cost)
        self._ledger_writer.record_activity_start(worker)

    def _on_worker_ended(self, worker: GolemWorker) -> None:
        log.info("the worker of provider %s ended after %d chunks", worker.provider_name, worker.chunks)
        self._ledger_writer.record_activity_end(worker)
        if self._session is not None and self._session.payment_processor is not None:
            self._session.payment_processor.expect_invoice(worker.agreement_id, worker.seconds())

    def _is_retained(self, worker: GolemWorker) -> bool:
        pool = self._pools.get(worker.model)
        if pool is None or self._is_closed:
            return False
        return len([each for each in pool.workers if not each.is_stopping]) <= self._settings.min_workers

    def _on_not_signed(self, provider_id: str) -> None:
        log.info("provider %s did not sign an agreement", provider_id)
        self._offer_evaluator.record_not_signed(provider_id)

    def _on_chunk_done(self, worker: GolemWorker, queued_job: QueuedJob, outcome: Outcome) -> None:
        self._provider_bans.record_success(worker, images=queued_job.job.items, seconds=outcome.seconds)
        queued_job.complete(outcome)

    def _on_attempt_failed(
        self, worker: GolemWorker, queued_job: QueuedJob | None, failure: AttemptFailure, seconds: float
    ) -> None:
        is_over = queued_job is not None and queued_job.outcome.done()
        if is_over and not failure.is_provider_fault:
            return  # stopped because it is no longer needed, which is no failure
        log.warning(
            "provider %s failed: %s", worker.provider_name, failure.error, extra={"agreement_id": worker.agreement_id}
        )
        if failure.is_file_server_fault and self._session is not None and self._session.broken_reason is None:
            self._session.broken_reason = failure.error.reason
        if failure.is_provider_fault:
            self._provider_bans.record_failure(worker, queued_job, failure, seconds)
        if queued_job is None or self._job_queue is None or is_over:
            return
        queued_job.last_outcome = Outcome(
            provider=worker.provider_name,
            seconds=seconds,
            cost=f"{worker.attribute_cost():f}",
            error=failure.error,
            is_blameless=not failure.is_provider_fault,
            provider_id=worker.provider_id,
            agreement_id=worker.agreement_id,
            activity_id=worker.activity_id,
        )
        if self._is_closed:
            queued_job.complete(Outcome.not_run(WorkerDied("The executor is closed.")))
        elif queued_job.running_attempts:
            return  # another attempt is running
        elif queued_job.failures >= self._settings.attempts or queued_job.attempts >= _MAX_ATTEMPTS:
            self._give_up(queued_job)
        else:
            self._job_queue.put(queued_job, is_retry=True)

    def _give_up(self, queued_job: QueuedJob) -> None:
        """End a job that failed too often."""
        self._provider_bans.lift_bans(queued_job)
        assert queued_job.last_outcome is not None
        queued_job.complete(queued_job.last_outcome)

    def _expire_waiting(self) -> None:
        """End jobs that have waited too long for a provider."""
        if self._job_queue is None:
            return
        now = time.monotonic()
        for queued_job in list(self._job_queue.queued_jobs()):
            if now - queued_job.waiting_since < self._settings.offer_seconds:
                continue
            pool = self._pools.get(queued_job.job.model)
            if pool is not None and any(worker.provider_id not in queued_job.failed_on for worker in pool.workers):
                continue  # one of these workers will take it
            self._job_queue.remove([queued_job])
            if queued_job.last_outcome is not None and not queued_job.last_outcome.is_blameless:
                self._give_up(queued_job)  # every available provider has failed on it
            elif self._session_error is not None:
                queued_job.complete(Outcome.not_run(GolemUnavailable(self._session_error)))
            else:
                reason = self._offer_evaluator.unavailable_reason(queued_job.job.model)
                queued_job.complete(Outcome.not_run(NoProvider(reason)))

"""The cycle: claims due requests, dispatches them in chunks, and records the results.

Run by `batcher.scheduler`, one cycle at a time. It claims only as many requests as the executor can process soon, so
that memory stays bounded and several batchers share the queue. Each chunk has its own task from packing to recording;
meanwhile others are claimed and packed, so that workers do not wait. Leases are renewed throughout; claims of a batcher
that was killed return to the queue when their leases end.

What is not asynchronous (planning, packing, checking results, writing) is in other modules.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from batcher.errors import ResizingUnavailable
from batcher.executors import Executor, Job, Outcome
from batcher.packing import PackedChunk, pack, resized_bytes
from batcher.planner import PlannedChunk, plan, stored_bytes
from batcher.progress import ProgressWriter
from batcher.resizing import Resizer
from batcher.result_writer import ResultWriter, Tally
from batcher.results import (
    UNAVAILABLE_RETRY_SECONDS,
    ChunkOutcome,
    TryItem,
    check_results,
    is_last_try,
    resolve_chunk,
    resolve_failed_chunk,
    resolve_unsent_items,
)
from batcher.settings import BatcherSettings, BatcherTimings
from batcher.waiting import wait_for_first
from provider_image.compiler import can_build_now, ensure_installed
from provider_image.errors import ChunkError, MlgError
from provider_image.models.artefact import installed_digest
from provider_image.models.registry import list_rows
from store.chunks import ChunkRecord
from store.errors import StoreError, StoreUnavailable
from store.requests import ISOLATION_STEPS, Claim
from store.store import Store

log = logging.getLogger(__name__)

#: Chunks that are resized and packed at the same time.
MAX_PACKING_THREADS = 4
#: Chunks whose outcome is decided at the same time; that may wait for decoders too.
_MAX_RESOLVING = 2


def now_utc() -> datetime:
    """Return the current time."""
    return datetime.now(UTC)


def available_models(models: Path) -> frozenset[str]:
    """Return the models that are installed or can be built on first use."""
    return frozenset(
        row.name for row in list_rows(models) if installed_digest(models, row.name) is not None or can_build_now(row)
    )


class Cycle:
    """One batcher's cycles; `run` must not be called while it runs.

    :param folder: the batcher's folder for temporary files.
    :param resizer: resizes images before they are packed; closed if stopping takes too long. None sends originals.
    :param try_item: tries the inputs that a worker refused; None trusts all workers.
    :param clock: returns the current time.
    :param lease_clock: returns the time by which leases end; by default the store's, which all batchers share.
    """

    def __init__(
        self,
        *,
        store: Store,
        executor: Executor,
        settings: BatcherSettings,
        folder: Path,
        batcher_id: str,
        resizer: Resizer | None = None,
        try_item: TryItem | None = None,
        clock: Callable[[], datetime] = now_utc,
        lease_clock: Callable[[], datetime] | None = None,
        timings: BatcherTimings = BatcherTimings(),
    ) -> None:
        self._store = store
        self._executor = executor
        self._settings = settings
        self._timings = timings
        self._folder = folder
        self._clock = clock
        self._lease_clock = store.lease_clock.now if lease_clock is None else lease_clock
        self._resizer = resizer
        self._try_item = try_item
        # Separate threads: packing that waits for decoders must not delay the renewal of leases.
        self._packers = None if resizer is None else ThreadPoolExecutor(MAX_PACKING_THREADS, thread_name_prefix="pack")
        self._resolving = asyncio.Semaphore(_MAX_RESOLVING)
        self._progress = ProgressWriter(store.progress.record, pause_seconds=timings.progress_seconds)
        self._batcher_id = batcher_id
        self._wake = asyncio.Event()
        self._is_flushing = False
        self._is_stopping = False
        self._tally = Tally()
        #: Planned but not started.
        self._ready: deque[PlannedChunk] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._runs: set[asyncio.Task[Outcome]] = set()
        #: Chunks that take a slot of the executor's capacity: being packed, or with the executor.
        self._slots_taken = 0
        #: (number, token) -> claim, for every claim without a recorded outcome.
        self._open_claims: dict[tuple[int, int], Claim] = {}
        #: Model -> until when (loop time) it is not claimed, and why.
        self._unavailable_models: dict[str, tuple[float, str]] = {}
        #: The models that could be claimed the last time.
        self._possible_models: frozenset[str] = frozenset()
        #: Why nothing is claimed at all; None if not paused.
        self._pause_reason: str | None = None
        self._no_claim_before = 0.0
        self._claim_failures = 0
        self._lease_checked_at = float("-inf")

    def poll(self) -> None:
        """Wake the cycle to claim what is due."""
        self._wake.set()

    def flush(self) -> None:
        """Wake the cycle to claim everything that waits, due or not."""
        self._is_flushing = True
        self._wake.set()

    def pause(self, reason: str | None) -> None:
        """Stop claiming, and finish what is under way; None resumes.

        :param reason: waiting requests show it.
        """
        self._pause_reason = reason
        self._wake.set()

    async def wait_for_wakeup(self) -> None:
        """Wait for `poll`, `flush` or `pause`."""
        await self._wake.wait()

    def unavailable_reason(self, model: str) -> str | None:
        """Return, in a sentence, why a model is not processed now; None if it is."""
        if self._pause_reason is not None:
            return self._pause_reason
        until, reason = self._unavailable_models.get(model, (0.0, ""))
        return reason if until > asyncio.get_running_loop().time() else self._executor.unavailable_reason(model)

    async def run(self, stop: asyncio.Event, *, models: Callable[[], Collection[str]] | None = None) -> Tally:
        """Process requests until nothing is due and nothing is under way, or until stopped.

        :param stop: set to stop: nothing more is claimed; what is under way gets `drain_seconds`, the rest is released.
        :param models: called in a thread, returns the models to claim; by default all available ones.
        """
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        self._tally = Tally()
        choose = models or (lambda: available_models(self._settings.models))
        renewing = asyncio.create_task(self._renew_leases())
        reporting = asyncio.create_task(self._progress.run())
        try:
            while not stop.is_set():
                self._wake.clear()
                claimed = await self._claim(choose)
                if stop.is_set():
                    break
                self._start_ready()
                if not claimed and not self._tasks:
                    break
                if not claimed or self._free_slots() <= 0:
                    # With a timeout, because leases and back-offs expire without an event.
                    await wait_for_first(
                        self._wake.wait(), stop.wait(), timeout_seconds=self._timings.lease_check_seconds
                    )
            if stop.is_set():
                await self._drain()
        finally:
            # Tasks remain only after a failure of the cycle itself; their leases expire.
            tasks = [*self._tasks, *self._runs, renewing, reporting]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._tally.seconds = loop.time() - started_at
        return self._tally

    # Claiming

    def _free_slots(self) -> int:
        """Return for how many more chunks of the models that were possible last the executor has capacity."""
        capacity = max(map(self._executor.capacity, self._possible_models), default=0)
        return capacity - self._slots_taken - len(self._ready)

    async def _claim(self, choose: Callable[[], Collection[str]]) -> int:
        """Claim and plan requests for the free slots. :return: the number of claims."""
        loop = asyncio.get_running_loop()
        is_full = bool(self._possible_models) and self._free_slots() <= 0
        if is_full or loop.time() < self._no_claim_before:
            return 0
        is_lease_check_due = loop.time() - self._lease_checked_at >= self._timings.lease_check_seconds
        is_flushing = self._is_flushing
        try:
            chosen = await asyncio.to_thread(choose)
            self._possible_models = frozenset(model for model in chosen if self.unavailable_reason(model) is None)
            limit = max(0, self._free_slots()) * ISOLATION_STEPS[0]
            models = self._possible_models if limit else frozenset()
            claims = await asyncio.to_thread(self._claim_now, models, limit, is_flushing, is_lease_check_due)
        except StoreError as error:
            self._claim_failures += 1
            pause = self._timings.store_backoff.after(self._claim_failures)
            log.warning("cannot claim requests, trying again in %.1f s: %s", pause, error)
            self._no_claim_before = loop.time() + pause
            return 0
        self._claim_failures = 0
        if is_lease_check_due:
            self._lease_checked_at = loop.time()
        self._open_claims.update(((claim.number, claim.token), claim) for claim in claims)
        packed_bytes = stored_bytes if self._resizer is None else resized_bytes(self._settings.models)
        max_items, max_bytes = self._settings.chunk_items, self._settings.chunk_bytes
        self._ready.extend(plan(claims, max_items=max_items, max_bytes=max_bytes, packed_bytes=packed_bytes))
        self._tally.claimed += len(claims)
        if is_flushing and (len(claims) < limit or not self._possible_models):
            self._is_flushing = False
        return len(claims)

    def _claim_now(
        self,
        models: Collection[str],
        limit: int,
        is_flushing: bool,
        is_lease_check_due: bool,
    ) -> list[Claim]:
        now, lease_now = self._clock(), self._lease_clock()
        if is_lease_check_due:
            released = self._store.requests.release_expired(now, lease_now=lease_now)
            if released:
                log.warning("the leases of %d requests expired, they are queued again", released)
            expired = self._store.requests.expire(now)
            if expired:
                log.info("%d requests expired: they were not processed before their deadline", expired)
        if not models:
            return []
        return self._store.requests.claim(
            models=models,
            limit=limit,
            now=now,
            lease_ends_at=lease_now + timedelta(seconds=self._settings.lease_seconds),
            oldest_before=None if is_flushing else now - timedelta(seconds=self._settings.max_wait_seconds),
        )

    def _start_ready(self) -> None:
        while self._ready and self._slots_taken < self._executor.capacity(self._ready[0].model):
            self._slots_taken += 1
            task = asyncio.create_task(self._process_chunk(self._ready.popleft()))
            self._tasks.add(task)
            task.add_done_callback(self._discard_task)

    def _discard_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._wake.set()

    # One chunk

    async def _process_chunk(self, planned: PlannedChunk) -> None:
        """Process one chunk from packing to recording. Never raises."""
        packed: PackedChunk | None = None
        outcome = Outcome(provider=None, seconds=0.0)
        failed: Outcome | None = None
        try:
            try:
                packed = await asyncio.get_running_loop().run_in_executor(self._packers, self._pack, planned)
                if packed.rejected:
                    await self._write(resolve_unsent_items(packed))
                if packed.items:
                    outcome = await self._dispatch(packed)
            finally:
                self._slots_taken -= 1
                self._wake.set()
            async with self._resolving:
                chunk_outcome = await asyncio.to_thread(
                    resolve_chunk,
                    packed,
                    outcome,
                    self._settings.models,
                    try_item=self._try_item,
                    is_stopping=self._is_stopping,
                )
        except OSError as error:
            # A full disk or a missing folder is no item's fault. But an image on a bad sector (EIO) must not block its
            # chunk for ever.
            failure = StoreUnavailable(f"A chunk could not be written: {error}")
            failed = Outcome.not_run(failure, is_blameless=error.errno != errno.EIO)
        except MlgError as error:
            failed = Outcome.not_run(error, is_blameless=isinstance(error, ResizingUnavailable))
        except Exception as error:
            # A bug here or in an executor must not stop the batcher, and its chunk must not be retried for ever.
            log.exception("a chunk failed", extra={"model": planned.model})
            failed = Outcome.not_run(ChunkError(f"{type(error).__name__}: {error}"), is_blameless=False)
        if failed is not None:
            if failed.is_blameless:  # an immediate retry is useless
                self._no_claim_before = asyncio.get_running_loop().time() + self._timings.store_backoff.max_seconds
            items = planned.items if packed is None else packed.items
            chunk_outcome = resolve_failed_chunk(items, failed, is_stopping=self._is_stopping)
        cause = chunk_outcome.error
        if cause is not None and not self._is_stopping:
            log_fields = {"model": planned.model, "code": cause.code, "items": len(planned.items)}
            log.warning("a chunk failed: %s", cause, extra=log_fields)
        if cause is not None and chunk_outcome.is_model_unusable:
            until = asyncio.get_running_loop().time() + UNAVAILABLE_RETRY_SECONDS
            self._unavailable_models[planned.model] = (until, cause.reason)
        try:
            await self._write(chunk_outcome)
            if packed is not None and packed.items:
                await asyncio.to_thread(self._record_end, packed, outcome, chunk_outcome)
        finally:
            for claim in planned.claims:
                self._open_claims.pop((claim.number, claim.token), None)
            if packed is not None:
                await asyncio.to_thread(packed.remove_files)

    def _pack(self, planned: PlannedChunk) -> PackedChunk:
        still_claimed = _without_lost_claims(planned, self._open_claims)
        if self._executor.is_remote:
            # Answers are checked with the artefact of this home, so it must be there before work elsewhere is paid for.
            ensure_installed(self._settings.models, planned.model)
        packed = pack(
            still_claimed,
            folder=self._folder,
            image_path=self._store.images.path,
            models=self._settings.models,
            resizer=self._resizer,
            timeout_seconds=self._settings.chunk_timeout_seconds,
        )
        if packed.items:
            self._record_start(packed)
        return packed

    async def _dispatch(self, packed: PackedChunk) -> Outcome:
        if self._is_stopping:
            return _stopped_outcome()
        job = Job(
            chunk_id=packed.chunk_id,
            model=packed.planned.model,
            items=len(packed.items),
            chunk=packed.chunk,
            results=packed.results,
            timeout_seconds=self._settings.chunk_timeout_seconds,
            is_last_try=is_last_try(packed.items),
            check=self._try_item and partial(check_results, packed, self._settings.models, self._try_item),
            on_progress=partial(self._progress.put, packed),
        )
        self._tally.chunks += 1
        run = asyncio.create_task(self._executor.run(job))
        self._runs.add(run)
        try:
            # Not awaited directly: when it is cancelled, this task must go on and release the claims.
            await asyncio.wait({run})
        finally:
            run.cancel()
            self._runs.discard(run)
        return _stopped_outcome() if run.cancelled() else run.result()

    # The records of chunks serve people and estimates: when the store does not accept one, work continues without it.

    def _record_start(self, packed: PackedChunk) -> None:
        record = ChunkRecord(
            id=packed.chunk_id,
            batcher_id=self._batcher_id,
            executor=self._executor.name,
            service=packed.planned.service,
            model=packed.planned.model,
            items=len(packed.items),
            bytes_sent=packed.size_bytes,
            dispatched_at=self._clock(),
        )
        try:
            self._store.chunks.start(record)
        except StoreError as error:
            log.warning("cannot record the start of a chunk: %s", error, extra={"chunk_id": packed.chunk_id})

    def _record_end(self, packed: PackedChunk, outcome: Outcome, chunk_outcome: ChunkOutcome) -> None:
        error = chunk_outcome.error
        # Attempts before the last one are in the ledger with their own agreements.
        bill = outcome.bills[-1] if outcome.bills and outcome.provider is not None else None
        try:
            self._store.chunks.finish(
                packed.chunk_id,
                provider=outcome.provider,
                bytes_received=packed.results.stat().st_size if packed.results.exists() else None,
                seconds=outcome.seconds,
                done=chunk_outcome.items_done,
                failed=len(packed.items) - chunk_outcome.items_done,
                cost=None if bill is None else f"{bill.cost:f}",
                code=error.code if error else None,
                reason=error.reason if error else None,
                provider_id=None if bill is None else bill.provider_id,
                agreement_id=None if bill is None else bill.agreement_id,
                activity_id=None if bill is None else bill.activity_id,
                now=self._clock(),
            )
        except StoreError as store_error:
            log.warning("cannot record the end of a chunk: %s", store_error, extra={"chunk_id": packed.chunk_id})

    async def _write(self, chunk_outcome: ChunkOutcome, *, is_retried: bool = True) -> None:
        """Write an outcome into the store; retry until it is written or the claims are lost."""
        claims = chunk_outcome.claims
        result_writer = ResultWriter(self._store.requests, chunk_outcome)
        failures = 0
        while True:
            try:
                await asyncio.to_thread(result_writer.write_pending, self._clock())
                break
            except StoreError as error:
                if not is_retried:
                    log.warning("cannot release claims, they are queued again when their leases expire: %s", error)
                    break
                if not any((claim.number, claim.token) in self._open_claims for claim in claims):
                    log.error("results are dropped, their leases expired before the store accepted them: %s", error)
                    break
                failures += 1
                pause = self._timings.store_backoff.after(failures)
                log.warning("cannot record results, trying again in %.1f s: %s", pause, error)
            await asyncio.sleep(pause)
        for claim in claims:
            self._open_claims.pop((claim.number, claim.token), None)
        self._tally.add(result_writer.tally)

    # Leases, stopping

    async def _renew_leases(self) -> None:
        period = self._settings.lease_seconds / 3
        pause = period
        while True:
            await asyncio.sleep(pause)
            open_claims = list(self._open_claims.values())
            try:
                now = await asyncio.to_thread(self._lease_clock)
                lease_ends_at = now + timedelta(seconds=self._settings.lease_seconds)
                renewed = await asyncio.to_thread(self._store.requests.renew, open_claims, lease_ends_at=lease_ends_at)
            except StoreError as error:
                log.warning("cannot renew leases: %s", error)
                pause = min(period, 1.0)
                continue
            pause = period
            lost = [claim for claim in open_claims if claim.number not in renewed]
            # Claims whose outcome was recorded meanwhile are not lost.
            gone = [claim for claim in lost if self._open_claims.pop((claim.number, claim.token), None) is not None]
            if gone:
                log.warning("%d claims were lost, their results are dropped", len(gone))

    async def _drain(self) -> None:
        """Finish what is under way, within the time limits, and release everything else."""
        self._is_stopping = True
        unstarted = [item for planned in self._ready for item in planned.items]
        self._ready.clear()
        if unstarted:
            released = resolve_failed_chunk(unstarted, _stopped_outcome(), is_stopping=True)
            await self._write(released, is_retried=False)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._settings.drain_seconds)
        for run in self._runs:
            run.cancel()
        if self._tasks and self._resizer is not None:
            await asyncio.to_thread(self._resizer.close)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._timings.final_write_seconds)


def _stopped_outcome() -> Outcome:
    return Outcome.not_run(ChunkError("The batcher was stopped before the chunk was done."))


def _without_lost_claims(planned: PlannedChunk, open_claims: Collection[tuple[int, int]]) -> PlannedChunk:
    """Leave out the items whose claims are all lost, unless that is every item."""
    items = tuple(
        item for item in planned.items if any((claim.number, claim.token) in open_claims for claim in item.claims)
    )
    return replace(planned, items=items or planned.items)

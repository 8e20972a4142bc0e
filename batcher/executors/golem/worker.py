"""One hire: a provider's activity, from its first command to its last.

Made by `rental.py` when yapapi has an agreement and an activity. Deploys, then takes chunk after chunk from the backlog
until there is nothing to do for long, until something fails, or until it is told to leave. After a failure it always
leaves: what goes on in an activity that failed is anybody's guess, and scripts that follow only queue behind it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from batcher.executors import Outcome
from batcher.executors.golem.prices import Price
from batcher.executors.golem.queue import Backlog, Errand
from batcher.executors.golem.settings import GolemSettings
from batcher.executors.golem.timeouts import chunk_seconds, idle_seconds, late_seconds
from batcher.executors.golem.yapapi_adapter import explain
from provider_image.errors import ChunkTimeout, GolemUnavailable, MalformedResults, MlgError, WorkerDied

log = logging.getLogger(__name__)

#: Where files lie in the provider's machine. The names are always the same, so that its disk does not fill.
_CHUNK, _RESULTS = "/golem/input/chunk.zip", "/golem/output/results.zip"
#: An HTTP call may hang longer than the script's own limit; then the hire is given up this much later.
_OVERTIME_SECONDS = 10.0
#: A results file larger than this is nobody's honest answer.
_LARGEST_RESULTS = 64 * 1024 * 1024
#: A wait for work is looked at this often.
_LOOK_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An attempt that gave no answer."""

    error: MlgError
    #: True when the provider is to blame, or may be.
    is_providers: bool
    #: True when our own file server cannot be trusted any more.
    is_file_servers: bool = False


@dataclass(kw_only=True, eq=False)
class Hire:
    """A provider at work for us."""

    model: str
    provider_id: str
    provider_name: str
    agreement_id: str
    activity_id: str
    price: Price
    created_at: datetime
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    #: Seconds that getting ready took; None until it is.
    start_seconds: float | None = None
    #: The errand under way, and until when (monotonic) it may take.
    errand: Errand | None = None
    deadline: float | None = None
    #: What its chunks are said to have cost so far.
    attributed: Decimal = Decimal(0)
    chunks: int = 0
    #: Set when it shall take nothing more; and when it shall end at once.
    leaving: bool = False
    abandon: asyncio.Event = field(default_factory=asyncio.Event)

    def seconds(self) -> float:
        """Return how long it has been or was hired."""
        return (self.ended if self.ended is not None else time.monotonic()) - self.started

    def most(self) -> Decimal:
        """Return what it costs at most by now, with what is under way worked on until its deadline."""
        promised = 0.0 if self.deadline is None or self.ended is not None else self.deadline - time.monotonic()
        return self.price.most(self.seconds() + max(0.0, promised))

    def attribute(self) -> Decimal:
        """Return what has been spent since the last chunk: that is what the chunk that ends now has cost."""
        total = self.price.most(self.seconds())
        part, self.attributed = total - self.attributed, total
        return part


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a hire needs to know and to tell."""

    settings: GolemSettings
    backlog: Backlog
    #: Folder for files that come back.
    folder: Path
    #: Tells images a second of this provider, if anything is known.
    speed: Callable[[Hire], float | None]
    #: Says why this much more must not be spent; None if it may.
    refusal: Callable[[Decimal], str | None]
    #: How many hires a model keeps even when they have nothing to do.
    is_kept: Callable[[Hire], bool]
    #: Called when a hire is ready, when a chunk was answered, and when one failed.
    on_ready: Callable[[Hire], None]
    on_done: Callable[[Hire, Errand, Outcome], None]
    on_failed: Callable[[Hire, Errand | None, Failure, float], None]


async def work(engine: Any, job_id: str, context: Any, hire: Hire, orders: Orders) -> None:
    """Work until the hire is over; what happened was told by then. Never raises but for cancellation."""
    scripts = _scripts(context, hire, orders)
    batches = asyncio.create_task(_process(engine, job_id, context, scripts))
    abandoning = asyncio.create_task(hire.abandon.wait())
    began = time.monotonic()
    try:
        while not batches.done():
            wait = _LOOK_SECONDS
            if hire.deadline is not None:
                wait = min(wait, max(0.05, hire.deadline + _OVERTIME_SECONDS - time.monotonic()))
            await asyncio.wait({batches, abandoning}, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
            if batches.done():
                break
            if hire.abandon.is_set():
                break
            if hire.deadline is not None and time.monotonic() >= hire.deadline + _OVERTIME_SECONDS:
                late = ChunkTimeout("The provider does not answer at all.")
                errand = hire.errand
                if errand is not None:
                    _put_down(hire, errand, orders)
                orders.on_failed(hire, errand, Failure(error=late, is_providers=True), time.monotonic() - began)
                break
    finally:
        was_abandoned = hire.abandon.is_set()
        hire.leaving = True
        abandoning.cancel()
        batches.cancel()
        # A call that hangs is not waited for: nobody needs its answer.
        await asyncio.wait({batches, abandoning}, timeout=2)
        hire.ended = time.monotonic()
        errand = hire.errand
        hire.deadline = None
        if errand is not None:
            _put_down(hire, errand, orders)
        error = None
        if batches.done() and not batches.cancelled():
            error = batches.exception()
        if errand is not None or error is not None:
            reason = explain(error) if error is not None else "the work was called off"
            # It was called back because somebody was quicker from a later start: this one hangs, or might as well.
            is_outrun = (
                errand is not None and errand.outcome.done() and not errand.outcome.cancelled() and was_abandoned
            )
            called_off = Failure(error=WorkerDied(f"The hire ended: {reason}."), is_providers=is_outrun)
            orders.on_failed(hire, errand, called_off, 0.0)


async def _process(engine: Any, job_id: str, context: Any, scripts: AsyncGenerator[Any, Any]) -> None:
    try:
        await engine.process_batches(job_id, context._agreement.id, context._activity, scripts)
    except StopAsyncIteration:
        return  # how yapapi learns that there are no more scripts
    finally:
        await scripts.aclose()


async def _scripts(context: Any, hire: Hire, orders: Orders) -> AsyncGenerator[Any, Any]:
    """Give yapapi script after script; it throws what became of one in here."""
    began = time.monotonic()
    script = context.new_script(timeout=timedelta(seconds=orders.settings.start_seconds))
    script.deploy()
    script.start()
    hire.deadline = began + orders.settings.start_seconds
    try:
        yield script
    except Exception as error:
        hire.deadline = None
        orders.on_failed(hire, None, _judge(error, "get ready"), time.monotonic() - began)
        return
    hire.deadline = None
    hire.start_seconds = time.monotonic() - began
    orders.on_ready(hire)
    while True:
        errand = await _next(hire, orders)
        if errand is None:
            return
        began = time.monotonic()
        received = orders.folder / f"{hire.activity_id[:8]}-{hire.chunks}.part"
        try:
            yield _script(context, hire, errand, received)
            await asyncio.to_thread(_take_over, received, errand)
        except Exception as error:
            _put_down(hire, errand, orders)
            orders.on_failed(hire, errand, _judge(error, "answer"), time.monotonic() - began)
            return
        finally:
            received.unlink(missing_ok=True)  # also when the hire is called off
        _put_down(hire, errand, orders)
        hire.chunks += 1
        orders.on_done(hire, errand, _outcome(hire, time.monotonic() - began))


async def _next(hire: Hire, orders: Orders) -> Errand | None:
    """Wait for the next errand; None when the hire shall end."""
    idle_since = time.monotonic()
    start_seconds = hire.start_seconds or 0.0
    patience = idle_seconds(hire.price, start_seconds=start_seconds, most=orders.settings.idle_seconds)
    while not hire.leaving:
        errand = orders.backlog.take(hire.model, hire.provider_id)
        is_second_try = errand is None
        errand = errand or orders.backlog.straggler(hire.model, hire.provider_id)
        if errand is not None:
            speed = orders.speed(hire)
            seconds = chunk_seconds(
                items=errand.job.items,
                # Not in a thread: whoever is called off between taking an errand and having it would lose it.
                size_bytes=errand.job.chunk.stat().st_size,
                images_per_second=speed,
                most=errand.job.timeout_seconds,
            )
            if orders.refusal(hire.price.most_per_second * Decimal(repr(seconds))) is not None:
                # Whoever watches the budget refuses everything that waits, and says why.
                if not is_second_try:
                    orders.backlog.put(errand, is_again=True)
                return None
            _pick_up(hire, errand, orders, seconds, late_seconds(items=errand.job.items, images_per_second=speed))
            return errand
        if time.monotonic() - idle_since > patience and not orders.is_kept(hire):
            return None
        await orders.backlog.changed(min(_LOOK_SECONDS, max(0.05, patience)))
    return None


def _pick_up(hire: Hire, errand: Errand, orders: Orders, seconds: float, late: float | None) -> None:
    now = time.monotonic()
    hire.errand, hire.deadline = errand, now + seconds
    late_at = None if late is None else now + late
    orders.backlog.begin(errand, hire.provider_id, stop=hire.abandon.set, late_at=late_at)
    if errand.job.on_start is not None:
        errand.job.on_start()


def _put_down(hire: Hire, errand: Errand, orders: Orders) -> None:
    hire.errand = hire.deadline = None
    orders.backlog.finish(errand, hire.provider_id)


def _script(context: Any, hire: Hire, errand: Errand, received: Path) -> Any:
    left = (hire.deadline or time.monotonic()) - time.monotonic()
    script = context.new_script(timeout=timedelta(seconds=max(0.1, left)))
    script.upload_file(str(errand.job.chunk), _CHUNK)
    script.run("/usr/local/bin/mlg-provider", "run", _CHUNK, _RESULTS)
    script.download_file(_RESULTS, str(received))
    return script


def _take_over(received: Path, errand: Errand) -> None:
    """Check what came back and put it where it is expected. :raises MlgError: it is no answer to this chunk."""
    size = received.stat().st_size
    if size > _LARGEST_RESULTS:
        raise MalformedResults(f"The results file has {size} bytes, more than any honest one.")
    if errand.job.check is not None:
        errand.job.check(received)
    if not errand.outcome.done():  # else another was quicker
        received.replace(errand.job.results)


def _outcome(hire: Hire, seconds: float) -> Outcome:
    return Outcome(
        provider=hire.provider_name,
        seconds=seconds,
        cost=f"{hire.attribute():f}",
        provider_id=hire.provider_id,
        agreement_id=hire.agreement_id,
        activity_id=hire.activity_id,
    )


def _judge(error: Exception, what: str) -> Failure:
    """Say what an exception out of yapapi means, and whose fault it is."""
    name = type(error).__name__
    if isinstance(error, MlgError):
        return Failure(error=error, is_providers=True)
    if name == "BatchTimeoutError":
        return Failure(error=ChunkTimeout(f"The provider did not {what} in time."), is_providers=True)
    if name == "CommandExecutionError":
        message = " ".join(f"{getattr(error, 'message', '') or ''} {getattr(error, 'stderr', '') or ''}".split())
        return Failure(error=WorkerDied(f"The provider could not {what}: {message[:400]}"), is_providers=True)
    if name == "BatchError":
        parts = " ".join(str(each) for each in error.args if each)
        return Failure(error=WorkerDied(f"The provider ended it: {parts[:300]}"), is_providers=True)
    if name in ("ProtocolError", "TransportError", "JSONDecodeError", "BrokenPipeError") or "gftp" in str(error):
        broken = GolemUnavailable(f"The file server gftp is out of step: {explain(error)}.")
        return Failure(error=broken, is_providers=False, is_file_servers=True)
    if isinstance(error, OSError) and getattr(error, "filename", None):
        return Failure(error=MalformedResults(f"No results came back: {error.strerror}."), is_providers=True)
    return Failure(error=GolemUnavailable(f"The daemon failed: {explain(error)}."), is_providers=False)

"""What subclasses or patches yapapi: the market strategy, jobs, the file server. Demands are in `payload.py`.

Imported early, so yapapi itself is imported inside the functions. yapapi is used below its own task executor (Job,
start_worker, process_batches), because that executor retries without limit, ends a job after one failed poll and keeps
agreements of idle workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import importlib
import logging
import random
import tempfile
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

#: The property that identifies our demands and agreements, even those of a batcher that was killed.
OWNER = "golem.srv.app.mlg.owner"
#: Pause between two calls for the results of a script, in case that the daemon holds none.
_POLL_PAUSE_SECONDS = 0.1


def import_yapapi() -> None:
    """Import yapapi, and silence its log, which repeats with tracebacks what is logged here in one line."""
    with warnings.catch_warnings():
        # pkg_resources is deprecated, which is why setuptools is pinned.
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        importlib.import_module("yapapi")
    if logging.getLogger().getEffectiveLevel() > logging.DEBUG:
        for name in ("yapapi", "ya_activity", "ya_market", "ya_payment"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def make_strategy(rate_offer: Callable[[str, Mapping[str, Any], str], float]) -> Any:
    """Make the market strategy.

    :param rate_offer: called with the provider's address, the offer's properties and the subscription id.
    """
    from yapapi.strategy import MarketStrategy

    class CheapestPerImage(MarketStrategy):  # type: ignore[misc, unused-ignore]
        async def score_offer(self, offer: Any) -> float:
            return rate_offer(offer.issuer, offer.props, offer._subscription.id)

    return CheapestPerImage()


def make_job(engine: Any, *, expires_at: datetime, payload: Any, id: str, on_event: Callable[[str, Any], None]) -> Any:
    """Make a yapapi job: one demand, its offers and its agreements.

    :param on_event: called immediately with the class name and the fields of each event, and with OfferTaken when one
        was chosen for an agreement.
    """
    from yapapi.agreements_pool import AgreementsPool
    from yapapi.engine import Job

    class ConcurrentAgreements(AgreementsPool):  # type: ignore[misc, unused-ignore]
        """Makes several agreements at the same time. yapapi's own holds a lock until a provider has signed."""

        async def use_agreement(self, cbk: Callable[[Any], Any], agreement_id: str | None = None) -> Any:
            offers = list(self._offer_buffer.values())
            if not offers:
                return None
            random.shuffle(offers)  # among equal ones none is preferred
            best = max(offers, key=lambda offer: offer.score)
            del self._offer_buffer[best.proposal.issuer]
            on_event("OfferTaken", {})
            agreement = await self._prepare_agreement(await best.proposal.create_agreement(), best.proposal)
            if agreement is None:
                return None
            task = cbk(agreement)
            self._set_worker(agreement.id, task)
            return task

    class ModelJob(Job):  # type: ignore[misc, unused-ignore]
        def emit(self, event_class: Any, **event_fields: Any) -> Any:
            on_event(event_class.__name__, event_fields)
            return super().emit(event_class, **event_fields)

    job = ModelJob(engine, expiration_time=expires_at, payload=payload, id=id)
    job.agreements_pool = ConcurrentAgreements(job.emit, engine.recycle_offer, market_api=engine._market_api)
    engine.add_job(job)
    return job


def shield_file_server(engine: Any) -> None:
    """Protect every exchange with gftp from cancellation.

    Its protocol matches responses to requests by their order alone. A coroutine cancelled between the two would leave a
    response unread, and every later upload would receive the address of the file before it.
    """
    process = engine._storage_manager._process
    original = type(process).send_message

    async def send_message(message: Any) -> Any:
        return await asyncio.shield(asyncio.ensure_future(original(process, message)))

    process.__dict__["send_message"] = send_message


def poll_without_pauses(activity: Any) -> Any:
    """Return a copy of yapapi's activity whose scripts ask for results all the time.

    The daemon holds each call for some seconds until there are some. yapapi pauses for three more if there were none,
    and its provider waits, and is paid, until the end of a script is noticed.
    """
    from yapapi.rest.activity import PollingBatch

    class PromptBatch(PollingBatch):  # type: ignore[misc, unused-ignore]
        known = 0

        async def _get_results(self, timeout: float) -> Any:
            results = await super()._get_results(timeout)
            while len(results) <= self.known and self.seconds_left() > _POLL_PAUSE_SECONDS:
                await asyncio.sleep(_POLL_PAUSE_SECONDS)
                results = await super()._get_results(min(timeout, self.seconds_left()))
            self.known = len(results)
            return results

    class PromptActivity(type(activity)):  # type: ignore[misc, unused-ignore]
        async def send(self, script: Any, deadline: datetime | None = None) -> Any:
            batch = await super().send(script, deadline)
            return PromptBatch(self, batch.id, batch._size, batch._deadline)

    prompt = copy.copy(activity)
    prompt.__class__ = PromptActivity
    return prompt


async def stop_receiving(engine: Any, script: Any) -> None:
    """Close the addresses at which a script's downloads arrive, to which the provider could write until then.

    :raises Exception: the file server fails.
    """
    slots = [getattr(command, "_dst_slot", None) for command in script._commands]
    urls = [slot.upload_url for slot in slots if slot is not None]
    if urls:
        await engine._storage_manager._process.close(urls=urls)


@contextlib.contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Make yapapi use our folder for temporary files, which is removed even if this process is killed."""
    before = tempfile.tempdir
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


async def run_with_timeout(seconds: float, work: Awaitable[Any], what: str, log: logging.Logger) -> bool:
    """Await something that may fail or hang, and log that in one line. :return: whether it succeeded."""
    task = asyncio.ensure_future(work)
    done, _ = await asyncio.wait({task}, timeout=seconds)
    if not done:
        task.cancel()
        await asyncio.wait({task}, timeout=1)
        log.warning("%s timed out after %g s", what, seconds)
        return False
    if task.cancelled():
        log.warning("%s was cancelled", what)
        return False
    error = task.exception()
    if error is not None:
        log.warning("%s failed: %s", what, explain(error))
    return error is None


def explain(error: BaseException) -> str:
    """Return a failure of yapapi or the daemon as one line for people."""
    status, body = getattr(error, "status", None), getattr(error, "body", None)
    if status is not None:
        text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            import json

            text = str(json.loads(text).get("message") or text)
        if status == 401:
            return "the daemon does not accept the app key, see YAGNA_APPKEY"
        return f"the daemon answered {status}: {' '.join(text.split())[:200] or getattr(error, 'reason', '')}"
    if isinstance(error, asyncio.TimeoutError):
        return "it timed out"
    name = type(error).__name__
    text = " ".join(str(error).split())[:300]
    return f"{text} ({name})" if text else name

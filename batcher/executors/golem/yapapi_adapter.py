"""Everything that is made of yapapi's own parts: demands, the strategy, and one shield around its file server.

Imported everywhere, so yapapi itself is imported inside the functions. yapapi is driven at the level its own task
executor stands on (Job, start_worker, process_batches): retries without end, jobs that die of one failed poll and
agreements kept by idle workers belong to that executor, which is not used.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import tempfile
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from batcher.executors.golem.offers import OfferRating

#: The property by which demands and agreements of ours are recognized, also those of a batcher that was killed.
OWNER = "golem.srv.app.mlg.owner"


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What a model asks of a computer."""

    memory_gib: float
    storage_gib: float
    threads: int = 1


def import_yapapi() -> None:
    """Import yapapi, and keep its own log from repeating, with tracebacks, what is told in one line here."""
    with warnings.catch_warnings():
        # It is known that pkg_resources goes away; that is why setuptools is pinned.
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        importlib.import_module("yapapi")
    if logging.getLogger().getEffectiveLevel() > logging.DEBUG:
        for name in ("yapapi", "ya_activity", "ya_market", "ya_payment"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def builtin_payload(runtime: str, requirements: Requirements, owner: str, model: str) -> Any:
    """Make the demand for a provider whose runtime has the models built in."""
    from yapapi.payload import Payload

    class BuiltIn(Payload):  # type: ignore[misc, unused-ignore]
        async def decorate_demand(self, demand: Any) -> None:
            demand.add_properties({OWNER: owner, "golem.srv.app.mlg.model": model})
            demand.ensure(
                f"(&(golem.runtime.name={runtime})(golem.inf.mem.gib>={requirements.memory_gib:g})"
                f"(golem.inf.storage.gib>={requirements.storage_gib:g})(golem.inf.cpu.threads>={requirements.threads}))"
            )

    return BuiltIn()


async def image_payload(image_hash: str, registry: str, requirements: Requirements, owner: str, model: str) -> Any:
    """Make the demand for a provider that runs a published image; asks the registry where the image is."""
    from yapapi.payload import Payload, vm

    package = await vm.repo(
        image_hash=image_hash,
        image_use_https=True,
        repository_url=registry.rstrip("/"),
        min_mem_gib=requirements.memory_gib,
        min_storage_gib=requirements.storage_gib,
        min_cpu_threads=requirements.threads,
    )

    class Image(Payload):  # type: ignore[misc, unused-ignore]
        async def decorate_demand(self, demand: Any) -> None:
            await package.decorate_demand(demand)
            demand.add_properties({OWNER: owner, "golem.srv.app.mlg.model": model})

    return Image()


def make_strategy(rate_offer: Callable[[str, Mapping[str, Any], str], OfferRating]) -> Any:
    """Make the market strategy.

    :param rate_offer: called with the provider's address, the offer's properties and the id of the subscription.
    """
    from yapapi.strategy import MarketStrategy

    class CheapestImage(MarketStrategy):  # type: ignore[misc, unused-ignore]
        async def score_offer(self, offer: Any) -> float:
            return rate_offer(offer.issuer, offer.props, offer._subscription.id).score

    return CheapestImage()


def make_job(engine: Any, *, expires_at: datetime, payload: Any, id: str, on_event: Callable[[str, Any], None]) -> Any:
    """Make a yapapi job: one demand, its offers and its agreements.

    :param on_event: called at once with the name of each event and what it is about.
    """
    from yapapi.engine import Job

    class ModelJob(Job):  # type: ignore[misc, unused-ignore]
        def emit(self, event_class: Any, **event_fields: Any) -> Any:
            on_event(event_class.__name__, event_fields)
            return super().emit(event_class, **event_fields)

    job = ModelJob(engine, expiration_time=expires_at, payload=payload, id=id)
    engine.add_job(job)
    return job


def shield_file_server(engine: Any) -> None:
    """Keep every exchange with gftp whole.

    Its protocol pairs answers with questions by their order alone. A coroutine that is cancelled between the two leaves
    an answer behind, and from then on every upload gets the address of the file before it.
    """
    process = engine._storage_manager._process
    original = type(process).send_message

    async def send_message(message: Any) -> Any:
        return await asyncio.shield(asyncio.ensure_future(original(process, message)))

    process.__dict__["send_message"] = send_message


@contextlib.contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Have yapapi put its temporary folder into ours: it is then removed even if this process is killed."""
    before = tempfile.tempdir
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


async def run_with_timeout(seconds: float, work: Awaitable[Any], what: str, log: logging.Logger) -> bool:
    """Await something that may fail or hang, and tell of it in one line. :return: whether it went well."""
    task = asyncio.ensure_future(work)
    done, _ = await asyncio.wait({task}, timeout=seconds)
    if not done:
        task.cancel()
        await asyncio.wait({task}, timeout=1)
        log.warning("%s took longer than %g s and was given up", what, seconds)
        return False
    if task.cancelled():
        log.warning("%s was cancelled", what)
        return False
    error = task.exception()
    if error is not None:
        log.warning("%s failed: %s", what, explain(error))
    return error is None


def explain(error: BaseException) -> str:
    """Say in one line what a failure of yapapi or the daemon means."""
    status, body = getattr(error, "status", None), getattr(error, "body", None)
    if status is not None:
        text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            import json

            text = str(json.loads(text).get("message") or text)
        if status == 401:
            return "the daemon does not know the app key (YAGNA_APPKEY)"
        return f"the daemon answered {status}: {' '.join(text.split())[:200] or getattr(error, 'reason', '')}"
    if isinstance(error, asyncio.TimeoutError):
        return "no answer in time"
    name = type(error).__name__
    text = " ".join(str(error).split())[:300]
    return f"{text} ({name})" if text else name

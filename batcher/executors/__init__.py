"""Executors: where chunks run. The Executor protocol, its jobs and outcomes, and the registry.

`batcher.cycle` packs a chunk into a file, passes a Job to an executor, and reads the results file itself. An executor
moves files and starts work. It must not open the store, and it must not trust the contents of a results file.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from provider_image.errors import ConfigError, MlgError

if TYPE_CHECKING:
    from batcher.settings import BatcherSettings
    from store.store import Store


@dataclass(frozen=True, kw_only=True)
class Job:
    """A packed chunk for an executor."""

    #: The chunk's random id.
    chunk_id: str
    #: The model's canonical name.
    model: str
    #: Number of items in the chunk.
    items: int
    #: The chunk file.
    chunk: Path
    #: Where the results file must be when `run` returns without an error; it does not exist before.
    results: Path
    #: The executor stops the job after this time.
    timeout_seconds: float
    #: Raises MlgError unless the file at a path is a valid answer to this chunk. Executors whose workers are not
    #: trusted call it in a thread, and try the chunk elsewhere when it raises. None: no such check is needed.
    check: Callable[[Path], None] | None = None
    #: Called when a worker begins; again for each further attempt.
    on_start: Callable[[], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended."""

    #: Name of the worker or provider that ran it; None if none did.
    provider: str | None
    #: From the start of the work to its end; waiting for a free worker does not count.
    seconds: float
    #: Cost, a decimal number as text; None for executors that cost nothing.
    cost: str | None = None
    #: Why there is no results file; None if there is one.
    error: MlgError | None = None
    #: True when the failure says nothing about the items, for example because the executor is closing.
    is_blameless: bool = False
    #: The provider's address, the agreement and the activity; None for executors that cost nothing.
    provider_id: str | None = None
    agreement_id: str | None = None
    activity_id: str | None = None

    @classmethod
    def not_run(cls, error: MlgError, *, is_blameless: bool = True) -> Outcome:
        """Return the outcome of a job that no worker ran."""
        return cls(provider=None, seconds=0.0, error=error, is_blameless=is_blameless)


class Executor(Protocol):
    """Runs chunks."""

    #: The name in the registry.
    name: str
    #: True when chunks leave this machine. Unless MLG_SHRINK says otherwise, the batcher then resizes images to the
    #: model's input before it packs them: less to transfer, and providers never receive the originals.
    is_remote: bool

    async def start(self) -> None:
        """Start. :raises MlgError: it can never work with these settings; says what to do."""

    def capacity(self) -> int:
        """Return how many jobs should be under way at once to keep the workers busy; at least 1 after `start`."""

    def workers(self) -> int:
        """Return how many jobs run at the same time; others under way are queued."""

    def unavailable_reason(self, model: str) -> str | None:
        """Return, in a sentence, why no more work for a model is accepted now; None if it is. Clients see it."""

    async def run(self, job: Job) -> Outcome:
        """Run one job. Failures are returned, not raised; cancelling the call stops the work."""

    async def close(self) -> None:
        """Stop every process and remove every temporary file. May be called twice."""


#: name -> "module:Class"; the class takes the settings and the store.
REGISTRY = {
    "local": "batcher.executors.local:LocalExecutor",
    "golem": "batcher.executors.golem.executor:GolemExecutor",
}


def load_executor(names: str, settings: BatcherSettings, store: Store) -> Executor:
    """Make an executor.

    :param names: a name of the registry, or several separated by commas: a chunk that waits too long for one goes to
        the next.
    :param store: where executors that cost money keep their accounts.
    :raises ConfigError: a name is not in the registry.
    """
    members = [_load_one(name.strip(), settings, store) for name in names.split(",")]
    if len(members) == 1:
        return members[0]
    from batcher.executors.fallback import FallbackExecutor

    return FallbackExecutor(members, fallback_seconds=settings.fallback_seconds)


def _load_one(name: str, settings: BatcherSettings, store: Store) -> Executor:
    if name not in REGISTRY:
        known = ", ".join(sorted(REGISTRY))
        raise ConfigError(
            f"There is no executor {name!r}. MLG_EXECUTOR takes one of: {known}; or several, as in golem,local."
        )
    module, _, attribute = REGISTRY[name].partition(":")
    executor: Executor = getattr(importlib.import_module(module), attribute)(settings, store)
    return executor

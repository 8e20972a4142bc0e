"""Where chunks run: the Executor protocol and the registry of executors.

`batcher.cycle` packs a chunk into a file, hands a Job to an executor, and reads the results file itself. An executor
moves files and starts work; it must not open the store, nor trust what is in a results file.
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
    from store.sqlite import SqliteStore


@dataclass(frozen=True, kw_only=True)
class Job:
    """A packed chunk on its way to an executor."""

    #: The chunk's random id.
    chunk_id: str
    #: The model's canonical name.
    model: str
    #: How many items are inside.
    items: int
    #: The chunk file.
    chunk: Path
    #: Where the results file must be when `run` returns without an error; it does not exist before.
    results: Path
    #: The executor gives up after this long.
    timeout_seconds: float
    #: Raises MlgError unless the file at a path is a true answer to this chunk. Called, in a thread, by executors whose
    #: workers are strangers: they try the chunk elsewhere then. None where nobody needs to ask.
    check: Callable[[Path], None] | None = None
    #: Called, more than once if it is tried again, when a worker begins with it.
    on_start: Callable[[], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a dispatch ended."""

    #: Who worked on it; None if nobody did.
    provider: str | None
    #: From the start of the work to its end, waiting for a free worker not counted.
    seconds: float
    #: What it cost, a decimal number as text; None where nothing is paid.
    cost: str | None = None
    #: Why there is no results file; None if there is one.
    error: MlgError | None = None
    #: True when the failure says nothing about the items, for example because the executor is stopping.
    is_blameless: bool = False
    #: Under which address, agreement and activity it was paid for; None where nothing is paid.
    provider_id: str | None = None
    agreement_id: str | None = None
    activity_id: str | None = None


class Executor(Protocol):
    """A place where chunks run."""

    #: The name in the registry.
    name: str
    #: True when chunks leave this machine. Unless MLG_SHRINK says otherwise, the batcher then reduces pictures to what
    #: the model sees of them before it packs them: less to send, and no stranger gets the original.
    is_remote: bool

    async def start(self) -> None:
        """Get ready. :raises MlgError: it never will be; says what to do."""

    def capacity(self) -> int:
        """Tell how many jobs should be under way at once to keep it busy; at least 1 after `start`."""

    def workers(self) -> int:
        """Tell how many jobs are worked on at the same time; the others under way wait for their turn."""

    def unavailable_reason(self, model: str) -> str | None:
        """Say in a sentence why no more work for a model is wanted now; None when it is. Waiting requests show it."""

    async def run(self, job: Job) -> Outcome:
        """Run one job. Failures are returned, not raised; cancelling the call stops the work."""

    async def close(self) -> None:
        """Stop every process and remove every temporary file. May be called twice."""


#: name -> "module:Class"; the class takes the settings, and the store's ledger.
REGISTRY = {
    "local": "batcher.executors.local:LocalExecutor",
    "golem": "batcher.executors.golem.executor:GolemExecutor",
}


def load_executor(names: str, settings: BatcherSettings, ledger: SqliteStore) -> Executor:
    """Make an executor.

    :param names: one of the registry, or several with commas between: what waited too long for one goes to the next.
    :param ledger: where executors that pay keep their accounts.
    :raises ConfigError: there is none of that name.
    """
    members = [_load_one(name.strip(), settings, ledger) for name in names.split(",")]
    if len(members) == 1:
        return members[0]
    from batcher.executors.fallback import FallbackExecutor

    return FallbackExecutor(members, fallback_seconds=settings.fallback_seconds)


def _load_one(name: str, settings: BatcherSettings, ledger: SqliteStore) -> Executor:
    if name not in REGISTRY:
        known = ", ".join(sorted(REGISTRY))
        raise ConfigError(
            f"There is no executor {name!r}. MLG_EXECUTOR takes one of: {known}; or several, as in golem,local."
        )
    module, _, attribute = REGISTRY[name].partition(":")
    executor: Executor = getattr(importlib.import_module(module), attribute)(settings, ledger)
    return executor

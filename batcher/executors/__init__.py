"""Executors: where chunks run. The Executor protocol, its jobs and outcomes, and the registry.

`batcher.cycle` packs a chunk into a file, passes a Job to an executor, and reads the results file itself. An executor
moves files and starts work. It must not open the store, and it must not trust the contents of a results file.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from provider_image.errors import ConfigError, MlgError
from provider_image.progress import ProgressReport

if TYPE_CHECKING:
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
    #: Returns how many items the file at a path answers; raises MlgError unless it is a valid answer to this chunk.
    #: Executors whose workers are not trusted call it in a thread, and try the chunk elsewhere when it raises. None: no
    #: such check is needed.
    check: Callable[[Path], int] | None = None
    #: True if its only item fails for good when this fails: workers that are trusted take it, if there are any.
    is_last_try: bool = False
    #: Called when a worker begins; again for each further attempt.
    on_start: Callable[[], None] | None = None
    #: Called with what a worker on this machine reports of an item under way; must not block. Reports are not checked.
    on_progress: Callable[[ProgressReport], None] | None = None


@dataclass(frozen=True, kw_only=True)
class AttemptBill:
    """What one attempt at a job cost, by this machine's clock."""

    #: The provider's name and its address.
    provider: str
    provider_id: str
    #: The agreement and the activity that are billed.
    agreement_id: str
    activity_id: str
    #: How long the attempt took.
    seconds: float
    #: In GLM. The ledger corrects it when the agreement's invoice comes.
    cost: Decimal


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended."""

    #: Name of the worker or provider that ran it; None if none did.
    provider: str | None
    #: From the start of the work to its end; waiting for a free worker does not count.
    seconds: float
    #: Why there is no results file; None if there is one.
    error: MlgError | None = None
    #: True when the failure says nothing about the items, for example because the executor is closing.
    is_blameless: bool = False
    #: What its attempts cost, failed ones included, in the order of their ends; the last one is that of `provider`.
    #: Empty for executors that cost nothing.
    bills: tuple[AttemptBill, ...] = ()

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
    #: True when its workers may see originals, and their answers need no check before the executor returns.
    is_trusted: bool

    async def start(self) -> None:
        """Start. :raises MlgError: it can never work with these settings; says what to do."""

    def capacity(self, model: str) -> int:
        """Return how many jobs, of all models, may be under way when one more of this model is given; at least 1.

        Enough to keep the workers busy. May change while it runs.
        """

    def workers(self) -> int:
        """Return how many jobs run at the same time; others under way are queued."""

    def has_quick_transfers(self, model: str) -> bool:
        """Return whether chunks reach the workers in less time than these need for them, even larger ones.

        Unless MLG_SHRINK says otherwise, resized images are then not compressed, which takes both sides time.
        """

    def unavailable_reason(self, model: str) -> str | None:
        """Return, in a sentence, why no more work for a model is accepted now; None if it is. Clients see it."""

    async def run(self, job: Job) -> Outcome:
        """Run one job. Failures are returned, not raised; cancelling the call stops the work."""

    def stop_seconds(self) -> float:
        """Return how long `close` may take. Supervisors and unit files grant that much. Works before `start`."""

    async def close(self) -> None:
        """Stop every process and remove every temporary file. May be called twice."""


@dataclass(frozen=True, kw_only=True)
class ExecutorContext:
    """What an executor is made from."""

    #: The batcher's name, unique in its home; the name of its folder of temporary files.
    owner: str
    #: The batcher's folder of temporary files.
    work: Path
    #: The folder of artefacts.
    models: Path
    #: Where executors that cost money keep their accounts: the ledger, the reservations, and what providers did.
    store: Store
    #: Environment variables; each executor reads its own settings from them.
    environment: Mapping[str, str]


#: Makes an executor; nothing starts before `Executor.start`. :raises ConfigError: a setting cannot be used.
Factory = Callable[[ExecutorContext], Executor]

#: name -> "module:Factory"; the executor's settings are in that module's folder.
REGISTRY = {
    "local": "batcher.executors.local:LocalExecutor",
    "golem": "batcher.executors.golem.executor:GolemExecutor",
}


def load_executor(names: str, context: ExecutorContext) -> Executor:
    """Make an executor.

    :param names: a name of the registry, or several separated by commas: a chunk that waits too long for one goes to
        the next.
    :raises ConfigError: a name is not in the registry, or a setting cannot be used.
    """
    members = [_load_one(name.strip(), context) for name in names.split(",")]
    if len(members) == 1:
        return members[0]
    from batcher.executors.fallback import FallbackExecutor

    return FallbackExecutor(members, context.environment)


def _load_one(name: str, context: ExecutorContext) -> Executor:
    if name not in REGISTRY:
        known = ", ".join(sorted(REGISTRY))
        raise ConfigError(
            f"There is no executor {name!r}. MLG_EXECUTOR takes one of: {known}; or several, as in golem,local."
        )
    module, _, attribute = REGISTRY[name].partition(":")
    factory: Factory = getattr(importlib.import_module(module), attribute)
    executor = factory(context)
    from batcher.executors.trusted import FacesSettings, WithoutFaces

    if executor.is_trusted or FacesSettings.from_env(context.environment).faces_remote:
        return executor
    return WithoutFaces(executor, context.models)

"""A harness with the golem executor, a devnet and a real store, in the event loop of a test."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from batcher.executors import Job, Outcome
from batcher.executors.golem.executor import GolemExecutor
from batcher.executors.golem.settings import GolemSettings
from batcher.executors.golem.timings import GolemTimings
from devnet.daemon import Devnet
from devnet.scenario import Fault, ProviderPlan, Scenario
from provider_image.chunk import ChunkItem, read_results, write_chunk
from provider_image.models.artefact import find_artefact
from store.settings import HomeSettings
from store.store import Store
from tests.contexts import make_context
from tests.devnet.running import paid, run_devnet
from tests.stores import open_store
from tests.timing import slowness

MODEL = "efficientnet_lite0"


def provider(name: str, *faults: Fault, start: str = "0.001", second: str = "0.00002", **fields: Any) -> ProviderPlan:
    """Make a provider with one core."""
    return ProviderPlan(
        name=name, start_price=Decimal(start), price_per_second=Decimal(second), faults=faults, **fields
    )


def scenario(*providers: ProviderPlan, faults: tuple[Fault, ...] = (), **fields: Any) -> Scenario:
    """Make a devnet's scenario."""
    return Scenario(providers=providers, faults=faults, **fields)


def make_image(color: int = 40) -> bytes:
    """Make a small image."""
    file = io.BytesIO()
    Image.new("RGB", (32, 24), (200, 120, color % 256)).save(file, "PNG")
    return file.getvalue()


class GolemHarness:
    """A devnet, a store and a started executor."""

    def __init__(self, devnet: Devnet, executor: GolemExecutor, store: Store, folder: Path, models: Path) -> None:
        self.devnet = devnet
        self.executor = executor
        self.store = store
        self.folder = folder
        self.models = models
        #: The executor's own folder.
        self.work = folder.parent / "work" / executor._context.owner
        folder.mkdir(exist_ok=True)

    def job(
        self,
        name: str,
        *,
        images: int = 1,
        timeout_seconds: float = 60,
        data: bytes | None = None,
        model: str = MODEL,
    ) -> Job:
        """Make a job that checks its results as the batcher does."""
        chunk = self.folder / f"{name}.chunk.zip"
        digest = find_artefact(self.models, model).digest
        items = [ChunkItem(number=number, inputs={"image": data or make_image(number)}) for number in range(images)]
        write_chunk(chunk, name, "classification", model, digest, items)

        def check(path: Path) -> int:
            results = read_results(path, name, model, range(images), digest)
            return sum(item.error is None for item in results.items)

        return Job(
            chunk_id=name,
            model=model,
            items=images,
            chunk=chunk,
            results=self.folder / f"{name}.results.zip",
            timeout_seconds=timeout_seconds,
            check=check,
        )

    async def run(self, *names: str, **options: Any) -> list[Outcome]:
        """Run jobs in parallel."""
        return await asyncio.gather(*(self.executor.run(self.job(name, **options)) for name in names))

    def next_executor(self, **settings: Any) -> GolemExecutor:
        """Make the executor of another batcher of the same home."""
        timings = self.executor._timings
        return make_executor(
            self.devnet, self.store, self.folder.parent, self.models, name="bbbb2222", timings=timings, **settings
        )

    def paid(self) -> Decimal:
        """Return what was paid, according to the daemon."""
        return sum(paid(self.devnet).values(), Decimal(0))


@contextlib.asynccontextmanager
async def devnet_and_store(
    plan: Scenario, folder: Path, models: Path, *, environment: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[Devnet, Store]]:
    """Run a devnet and open a store until the block ends.

    :param models: the folder of artefacts, for the providers.
    """
    async with run_devnet(folder, plan, models=models, environment=environment) as devnet:
        settings = HomeSettings(home=folder / "home", busy_seconds=5)
        with pytest.MonkeyPatch.context() as patch, contextlib.closing(open_store(settings)) as store:
            # yapapi looks for gftp on the PATH.
            patch.setenv("PATH", devnet.variables["PATH"])
            yield devnet, store


@contextlib.asynccontextmanager
async def golem(
    plan: Scenario,
    folder: Path,
    models: Path,
    *,
    environment: Mapping[str, str] | None = None,
    name: str = "aaaa1111",
    timings: GolemTimings = GolemTimings(),
    **settings: Any,
) -> AsyncIterator[GolemHarness]:
    """Run a devnet and an executor until the block ends.

    :param models: the folder of artefacts, for the executor and the providers.
    :param settings: of `GolemSettings`.
    """
    async with devnet_and_store(plan, folder, models, environment=environment) as (devnet, store):
        executor = make_executor(devnet, store, folder, models, name=name, timings=timings, **settings)
        try:
            await executor.start()
            yield GolemHarness(devnet, executor, store, folder / "jobs", models)
        finally:
            await executor.close()


def make_executor(
    devnet: Devnet,
    store: Store,
    folder: Path,
    models: Path,
    *,
    name: str = "aaaa1111",
    timings: GolemTimings = GolemTimings(),
    **settings: Any,
) -> GolemExecutor:
    """Make an executor for a devnet, with waits short enough for a test."""
    pace = slowness()
    short_waits: dict[str, Any] = {
        "idle_seconds": 5.0 * pace,
        "start_seconds": 20.0 * pace,
        "offer_seconds": 20.0 * pace,
        **settings,
    }
    context = make_context(folder / "work" / name, models, store=store, **devnet.variables)
    golem_settings = replace(GolemSettings.from_env(context.environment), **short_waits)
    return GolemExecutor(context, settings=golem_settings, timings=timings)

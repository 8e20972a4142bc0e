"""A real store, a clock that tests set, and an executor that runs in this process."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from batcher.cycle import Cycle
from batcher.executors import Job, Outcome
from batcher.scheduler import Batcher
from batcher.settings import BatcherSettings
from batcher.workspace import Workspace
from provider_image.chunk import ItemResult, Results, open_chunk, write_results
from provider_image.errors import BrokenImage, InferenceFailed, WorkerDied
from provider_image.models.artefact import Artefact, find_artefact
from store import new_id
from store.requests import NewRequest, RequestRecord
from store.settings import HomeSettings
from tests.stores import open_store
from tests.timing import until

MODEL = "efficientnet_lite0"


class Clock:
    """A clock that stands still until it is advanced."""

    def __init__(self) -> None:
        self.now = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def output_for(artefact: Artefact, image: bytes) -> list[list[Any]]:
    """Return a valid classification that depends only on the image's digest, and differs between images."""
    start = int(hashlib.sha256(image).hexdigest(), 16) % (len(artefact.labels) - 20)
    return [[*label, round(0.5 / 2**place, 6)] for place, label in enumerate(artefact.labels[start : start + 20])]


class TableExecutor:
    """Answers real chunk files with real results files, immediately and in this process.

    The first bytes of an image decide: `broken` cannot be decoded, `flaky` fails, `poison` fails the whole chunk as a
    crash does.
    """

    name = "table"
    is_remote = False
    is_trusted = True
    are_transfers_quick = False

    def __init__(self, models: Path, *, slots: int = 4) -> None:
        self.models = models
        #: For each chunk: whether its images were resized.
        self.resized_flags: list[bool] = []
        self.slots = slots
        self.jobs: list[Job] = []
        self.images: list[list[bytes]] = []
        self.in_flight = 0
        self.max_in_flight = 0
        self.was_cancelled = 0
        #: Awaited before each answer.
        self.before_answer: Callable[[], Awaitable[object]] | None = None
        #: Changes results before they are written.
        self.corrupt: Callable[[Results], Results] = lambda results: results
        #: Changes the results file after it was written.
        self.corrupt_file: Callable[[Path], object] = lambda path: None
        #: Returned for every job instead.
        self.forced_outcome: Outcome | None = None
        #: Model -> why it is unavailable.
        self.unavailable_reasons: dict[str, str] = {}

    async def start(self) -> None:
        """Do nothing."""

    def has_quick_transfers(self, model: str) -> bool:
        return self.are_transfers_quick

    def capacity(self, model: str) -> int:
        return self.slots

    def workers(self) -> int:
        return self.slots

    def unavailable_reason(self, model: str) -> str | None:
        return self.unavailable_reasons.get(model)

    def stop_seconds(self) -> float:
        return 0.0

    async def close(self) -> None:
        """Do nothing."""

    async def run(self, job: Job) -> Outcome:
        assert job.chunk.exists() and not job.results.exists()
        self.jobs.append(job)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            if self.before_answer is not None:
                await self.before_answer()
            await asyncio.sleep(0)
            return self.forced_outcome or self._answer(job)
        except asyncio.CancelledError:
            self.was_cancelled += 1
            raise
        finally:
            self.in_flight -= 1

    def _answer(self, job: Job) -> Outcome:
        with open_chunk(job.chunk) as reader:
            images = [reader.read_inputs(item)["image"] for item in reader.items]
            self.resized_flags.append(reader.is_resized)
        self.images.append(images)
        if any(image.startswith(b"poison") for image in images):
            return Outcome(provider="table/1", seconds=0.1, error=WorkerDied("The worker process was killed."))
        artefact = find_artefact(self.models, job.model)
        results = Results(
            chunk_id=job.chunk_id,
            model=job.model,
            digest=artefact.digest,
            versions={},
            precision="f32",
            cpu="table",
            load_seconds=0.0,
            peak_memory_bytes=1,
            items=tuple(self._item(artefact, number, image) for number, image in enumerate(images)),
        )
        write_results(job.results, self.corrupt(results))
        self.corrupt_file(job.results)
        return Outcome(provider="table/1", seconds=0.1)

    def _item(self, artefact: Artefact, number: int, image: bytes) -> ItemResult:
        for start, kind in ((b"broken", BrokenImage), (b"flaky", InferenceFailed)):
            if image.startswith(start):
                return ItemResult(number=number, error=kind())
        return ItemResult(number=number, output=output_for(artefact, image), seconds=0.01)


class Harness:
    """A store, an executor and everything else that a cycle needs."""

    def __init__(self, folder: Path, models: Path) -> None:
        self.models = models
        self.home_settings = HomeSettings(home=folder / "home", busy_seconds=5)
        self.store = open_store(self.home_settings)
        self.clock: Callable[[], datetime] = Clock()
        self.executor: Any = TableExecutor(models)
        self.resizer: Any = None
        #: What the cycle tries refused inputs with; None: the executor is trusted.
        self.try_item: Any = None
        self.settings = BatcherSettings(
            work=folder / "work", models=models, max_wait_seconds=600, poll_seconds=0.05, drain_seconds=5
        )
        self.settings.work.mkdir()

    def change_settings(self, **settings: Any) -> None:
        self.settings = replace(self.settings, **settings)

    def add(self, image: bytes, *, model: str = MODEL, is_fresh: bool = False) -> RequestRecord:
        new = NewRequest(id=new_id(), service="classification", model=model, is_fresh=is_fresh, created_at=self.clock())
        return self.store.requests.add(new, self.store.images.stage(image))

    def add_many(self, count: int, name: bytes = b"image") -> list[RequestRecord]:
        return [self.add(b"%s %d" % (name, number)) for number in range(count)]

    def reload(self, *requests: RequestRecord) -> list[RequestRecord]:
        """Read requests as they are now."""
        return [self.store.requests.get(request.id) for request in requests]

    def expected_output(self, image: bytes) -> list[list[Any]]:
        return output_for(find_artefact(self.models, MODEL), image)

    def cycle(self) -> Cycle:
        return Cycle(
            store=self.store,
            executor=self.executor,
            settings=self.settings,
            folder=self.settings.work,
            batcher_id="batcher",
            resizer=self.resizer,
            try_item=self.try_item,
            clock=self.clock,
            lease_clock=self.clock,
        )

    def run(self, *, is_flushing: bool = True) -> Any:
        """Run one cycle in a new event loop and return its report."""

        async def main() -> Any:
            cycle = self.cycle()
            if is_flushing:
                cycle.flush()
            return await cycle.run(asyncio.Event())

        return asyncio.run(main())

    until = staticmethod(until)


@pytest.fixture
def harness(tmp_path: Path, models_folder: Path) -> Iterator[Harness]:
    made = Harness(tmp_path, models_folder)
    yield made
    made.store.close()


def now() -> datetime:
    """Return the real time."""
    return datetime.now(UTC)


@pytest.fixture
def batcher(harness: Any) -> Any:
    """Make a batcher inside the loop that will run it."""
    harness.clock = now
    workspace = Workspace(harness.settings.work, "batcher-id")
    workspace.create()

    def make(**settings: Any) -> Batcher:
        harness.change_settings(**settings)
        return Batcher(
            store=harness.store,
            executor=harness.executor,
            settings=harness.settings,
            home_settings=harness.home_settings,
            workspace=workspace,
            batcher_id="batcher-id",
        )

    yield make
    workspace.remove()

"""A real store, a clock that is turned by hand, and an executor that works in this process."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from batcher.cycle import Cycle
from batcher.executors import Job, Outcome
from batcher.settings import BatcherSettings
from provider_image.chunk import ItemError, ItemResult, Results, open_chunk, write_results
from provider_image.errors import BrokenImage, InferenceFailed, WorkerDied
from provider_image.models.artefact import Artefact, find_artefact
from server.settings import ServerSettings
from store import new_id
from store.records import NewRequest, Request
from store.sqlite import SqliteStore

MODEL = "efficientnet_lite0"


class Clock:
    """A clock that stands still until it is turned."""

    def __init__(self) -> None:
        self.now = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def turn(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def output_for(artefact: Artefact, picture: bytes) -> list[list[Any]]:
    """Answer as a classifier that sees nothing but the picture's digest: right in form, and different for each."""
    start = int(hashlib.sha256(picture).hexdigest(), 16) % (len(artefact.labels) - 20)
    return [[*label, round(0.5 / 2**place, 6)] for place, label in enumerate(artefact.labels[start : start + 20])]


class TableExecutor:
    """Answers real chunk files with real results files, at once and in this process.

    What a picture's bytes begin with decides: `broken` cannot be decoded, `flaky` fails, `poison` takes the whole
    chunk with it as a crash does.
    """

    name = "table"
    sends_away = False

    def __init__(self, models: Path, *, places: int = 4) -> None:
        self.models = models
        #: Of each chunk: whether its pictures were shrunk.
        self.shrunk: list[bool] = []
        self.places = places
        self.jobs: list[Job] = []
        self.pictures: list[list[bytes]] = []
        self.under_way = 0
        self.most_under_way = 0
        self.was_cancelled = 0
        #: Awaited before each answer.
        self.hold: Callable[[], Awaitable[object]] | None = None
        #: Changes results before they are written.
        self.spoil: Callable[[Results], Results] = lambda results: results
        #: Changes the results file after it was written.
        self.spoil_file: Callable[[Path], object] = lambda path: None
        #: Ends every job instead.
        self.refusal: Outcome | None = None
        #: Model -> why no more of it is wanted.
        self.obstacles: dict[str, str] = {}

    async def start(self) -> None:
        """Nothing to start."""

    def capacity(self) -> int:
        return self.places

    def workers(self) -> int:
        return self.places

    def obstacle(self, model: str) -> str | None:
        return self.obstacles.get(model)

    async def close(self) -> None:
        """Nothing to close."""

    async def run(self, job: Job) -> Outcome:
        assert job.chunk.exists() and not job.results.exists()
        self.jobs.append(job)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if self.hold is not None:
                await self.hold()
            await asyncio.sleep(0)
            return self.refusal or self._answer(job)
        except asyncio.CancelledError:
            self.was_cancelled += 1
            raise
        finally:
            self.under_way -= 1

    def _answer(self, job: Job) -> Outcome:
        with open_chunk(job.chunk) as reader:
            pictures = [reader.read_inputs(item)["image"] for item in reader.items]
            self.shrunk.append(reader.is_shrunk)
        self.pictures.append(pictures)
        if any(picture.startswith(b"poison") for picture in pictures):
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
            items=tuple(self._item(artefact, number, picture) for number, picture in enumerate(pictures)),
        )
        write_results(job.results, self.spoil(results))
        self.spoil_file(job.results)
        return Outcome(provider="table/1", seconds=0.1)

    def _item(self, artefact: Artefact, number: int, picture: bytes) -> ItemResult:
        for start, kind in ((b"broken", BrokenImage), (b"flaky", InferenceFailed)):
            if picture.startswith(start):
                error = ItemError(code=kind.code, reason=kind().reason, permanent=kind.permanent)
                return ItemResult(number=number, error=error)
        return ItemResult(number=number, output=output_for(artefact, picture), seconds=0.01)


class Bench:
    """A store, an executor and what a cycle needs besides."""

    def __init__(self, folder: Path, models: Path) -> None:
        self.models = models
        self.server_settings = ServerSettings(home=folder / "home", busy_seconds=5)
        self.store = SqliteStore(self.server_settings)
        self.store.migrate()
        self.clock: Callable[[], datetime] = Clock()
        self.executor: Any = TableExecutor(models)
        self.shrinker: Any = None
        self.settings = BatcherSettings(
            work=folder / "work", models=models, workers=1, max_wait_seconds=600, poll_seconds=0.05, drain_seconds=5
        )
        self.settings.work.mkdir()

    def change(self, **settings: Any) -> None:
        self.settings = replace(self.settings, **settings)

    def add(self, picture: bytes, *, model: str = MODEL, is_fresh: bool = False) -> Request:
        new = NewRequest(id=new_id(), service="classification", model=model, is_fresh=is_fresh, created_at=self.clock())
        return self.store.add(new, self.store.blobs.stage(picture))

    def add_many(self, count: int, name: bytes = b"picture") -> list[Request]:
        return [self.add(b"%s %d" % (name, number)) for number in range(count)]

    def again(self, *requests: Request) -> list[Request]:
        """Read requests as they are now."""
        return [self.store.get(request.id) for request in requests]

    def right_output(self, picture: bytes) -> list[list[Any]]:
        return output_for(find_artefact(self.models, MODEL), picture)

    def cycle(self) -> Cycle:
        return Cycle(
            store=self.store,
            executor=self.executor,
            settings=self.settings,
            folder=self.settings.work,
            batcher_id="batcher",
            shrinker=self.shrinker,
            clock=self.clock,
        )

    def run(self, *, takes_all: bool = True) -> Any:
        """Run one cycle in a loop of its own and return its report."""

        async def main() -> Any:
            cycle = self.cycle()
            if takes_all:
                cycle.take_all()
            return await cycle.run(asyncio.Event())

        return asyncio.run(main())

    @staticmethod
    async def until(is_true: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not is_true():
            assert time.monotonic() < deadline, "waited in vain"
            await asyncio.sleep(0.01)


@pytest.fixture
def bench(tmp_path: Path, models_folder: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, models_folder)
    yield made
    made.store.close()

"""Worker processes of one thread each, against one process with as many threads: rate, processor time and memory.

Both are local executors, which run the same chunk again and again, in turns. Memory is what the processes have together
after the last chunk; pages that they share are divided among them (Pss).
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NamedTuple

import click

from batcher.executors import Job
from batcher.executors.local import LocalExecutor
from provider_image.cores import available_cores
from provider_image.models.artefact import Artefact
from scripts.benchmarks.models.keras_models import artefact_of
from scripts.benchmarks.support import photos
from scripts.benchmarks.support.measuring import in_turns, medians, print_table, rounds_option, work_folder
from tests.contexts import make_context
from tests.process_tree import cpu_seconds


class Figures(NamedTuple):
    """What one run took."""

    #: Images per second.
    rate: float
    #: Processor time of the workers for an image.
    milliseconds: float
    #: Memory of the workers together, in MB.
    megabytes: float


async def run_chunks(executor: LocalExecutor, folder: Path, chunk: Path, model: str, chunks: int) -> Figures:
    """Run a chunk so many times, after all workers have loaded the model."""

    async def run(number: int) -> None:
        results = folder / f"results-{number}.zip"
        job = Job(
            chunk_id=photos.CHUNK_ID,
            model=model,
            items=photos.CHUNK_ITEMS,
            chunk=chunk,
            results=results,
            timeout_seconds=300.0,
        )
        outcome = await executor.run(job)
        if outcome.error is not None:
            raise outcome.error
        results.unlink()

    await executor.start()
    try:
        await asyncio.gather(*(run(number) for number in range(4 * executor.workers())))
        loop, pids = asyncio.get_running_loop(), executor.pids()
        used, started = sum(map(cpu_seconds, pids)), loop.time()
        await asyncio.gather(*(run(number) for number in range(chunks)))
        seconds, used = loop.time() - started, sum(map(cpu_seconds, pids)) - used
        images = chunks * photos.CHUNK_ITEMS
        return Figures(images / seconds, 1000 * used / images, sum(map(_megabytes, pids)))
    finally:
        await executor.close()


def _megabytes(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1000


@click.command()
@click.option("--models", "names", default="efficientnet_lite0", show_default=True, help="Names, separated by commas.")
@click.option("--chunks", default=40, show_default=True, help="Chunks of 16 images in one run.")
@rounds_option(5)
def main(names: str, chunks: int, rounds: int) -> None:
    """Compare processes with threads. Example: scripts/bench workers --models efficientnet_lite0,resnet50"""
    cores, rows = available_cores(), []
    with work_folder() as folder:
        for model in names.split(","):
            artefact = artefact_of(model)
            chunk = photos.make_chunk(folder / "chunk.zip", model, photos.photo_jpegs())

            def measure(workers: int, artefact: Artefact = artefact, chunk: Path = chunk) -> Figures:
                context = make_context(folder / "work", artefact.folder.parent, MLG_WORKERS=str(workers))
                return asyncio.run(run_chunks(LocalExecutor(context), folder, chunk, artefact.name, chunks))

            ways = {
                f"processes: {cores}, of one thread": lambda turn: measure(cores),
                f"one process, of {cores} threads": lambda turn: measure(1),
            }
            for way, runs in in_turns(rounds, ways).items():
                figures = [f"{figure:.1f}" for figure in medians(runs)]
                rows.append((model, way, *figures, " ".join(f"{each.rate:.0f}" for each in runs)))
    head = ("model", "workers", "images/s", "processor ms an image", "MB of all", "images/s of each run")
    print_table(f"Chunks of {photos.CHUNK_ITEMS} JPEGs of 113 KB, 800 x 600", head, rows)

"""The real provider runtime in an activity: its warm process serves several runs, is billed, and ends with it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from devnet.image import Image
from devnet.scenario import Fault
from provider_image.chunk import ChunkItem, read_results, write_chunk
from provider_image.errors import MalformedResults
from provider_image.subprocesses import child_environment
from tests.devnet.exe_units import GftpProcess, exe_unit, run, run_batch, transfer
from tests.process_tree import command_line, is_alive

MODEL = "efficientnet_lite0"


@pytest.fixture
def image(tmp_path: Path, models_folder: Path) -> Image:
    """An image in which `mlg-provider` runs this checkout."""
    program = tmp_path / "mlg-provider"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m provider_image "$@"\n')
    program.chmod(0o755)
    return Image(programs={"/usr/local/bin/mlg-provider": str(program)}, home=str(models_folder))


@pytest.fixture
def photo_chunk(tmp_path: Path, photos: dict[str, bytes]) -> Path:
    items = [ChunkItem(number=number, inputs={"image": photo}) for number, photo in enumerate(photos.values())]
    write_chunk(tmp_path / "chunk.zip", "chunk-1", "classification", MODEL, None, items)
    return tmp_path / "chunk.zip"


async def test_the_warm_process_is_kept_is_measured_and_ends_with_the_activity(
    tmp_path: Path, image: Image, photo_chunk: Path, models_folder: Path
) -> None:
    gftp = GftpProcess(tmp_path)
    source = gftp.publish(photo_chunk)
    targets = [gftp.receive(tmp_path / f"results-{number}.zip") for number in range(2)]
    work = run(
        "/usr/local/bin/mlg-provider",
        *("run", "/golem/input/chunk.zip", "/golem/output/results.zip"),
        *("--models", str(models_folder), "--place", "/golem/work/warm"),
    )
    up = transfer(source, "container:/golem/input/chunk.zip")
    down = "container:/golem/output/results.zip"
    environment = child_environment(dict(os.environ))
    core = frozenset([max(os.sched_getaffinity(0))])

    faults = (Fault(kind="wrong-digest", after=1),)
    async with exe_unit(tmp_path, *faults, environment=environment, image=image, cpus=core) as unit:
        first = await run_batch(unit, up, work, transfer(down, targets[0]))
        assert [result["result"] for result in first] == ["Ok"] * 3, first
        [warm] = unit._sandbox.processes.pids()
        before = unit.usage()[0]

        second = await run_batch(unit, up, work, transfer(down, targets[1]))
        assert [result["result"] for result in second] == ["Ok"] * 3, second

        assert unit._sandbox.processes.pids() == [warm] and "serve" in command_line(warm)
        assert os.sched_getaffinity(warm) == core
        # The command only passes paths on; the warm process loads the model and runs it.
        assert unit.usage()[0] > before > 0.2

        await unit.end()

        assert not is_alive(warm)
    gftp.end()

    results = read_results(tmp_path / "results-0.zip", "chunk-1", MODEL, range(3))
    assert [item.output[0][1] for item in results.items] == ["tiger_cat", "espresso", "missile"]
    with pytest.raises(MalformedResults, match="digest"):
        read_results(tmp_path / "results-1.zip", "chunk-1", MODEL, range(3), results.digest)
    second = read_results(tmp_path / "results-1.zip", "chunk-1", MODEL, range(3))
    assert [item.output for item in second.items] == [item.output for item in results.items]
    assert second.load_seconds == 0

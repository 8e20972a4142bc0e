"""How a worker takes over the results of a chunk."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from batcher.executors import Job
from batcher.executors.golem.job_queue import QueuedJob
from batcher.executors.golem.worker import _accept_results
from provider_image.errors import MalformedResults


async def test_what_gftp_still_writes_after_the_check_does_not_change_the_results(tmp_path: Path) -> None:
    received, results, seen = tmp_path / "received.part", tmp_path / "results.zip", []
    with received.open("wb", buffering=0) as gftp:
        gftp.write(b"good" * 500_000)

        def check(path: Path) -> None:
            seen.append(path.read_bytes())
            gftp.seek(0)
            gftp.write(b"evil")

        job = Job(
            chunk_id="c1",
            model="vgg16",
            items=1,
            chunk=tmp_path / "chunk.zip",
            results=results,
            timeout_seconds=60,
            check=check,
        )
        _accept_results(received, QueuedJob(job=job, outcome=asyncio.get_running_loop().create_future()))
        gftp.write(b"evil")

    assert results.read_bytes() == seen[0] == b"good" * 500_000


async def test_results_that_fail_the_check_leave_nothing(tmp_path: Path) -> None:
    received = tmp_path / "received.part"
    received.write_bytes(b"bad")

    def check(path: Path) -> None:
        raise MalformedResults("It is bad.")

    job = Job(
        chunk_id="c1",
        model="vgg16",
        items=1,
        chunk=tmp_path / "chunk.zip",
        results=tmp_path / "results.zip",
        timeout_seconds=60,
        check=check,
    )
    with pytest.raises(MalformedResults):
        _accept_results(received, QueuedJob(job=job, outcome=asyncio.get_running_loop().create_future()))

    assert list(tmp_path.iterdir()) == [received]

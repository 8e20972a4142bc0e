"""The queue of chunks that wait for a worker."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from batcher.executors import Job, Outcome
from batcher.executors.golem.job_queue import JobQueue, QueuedJob


def queued_job() -> QueuedJob:
    """Make a job; needs a running event loop."""
    job = Job(
        chunk_id="one", model="resnet50", items=1, chunk=Path("chunk"), results=Path("results"), timeout_seconds=9
    )
    return QueuedJob(job=job, outcome=asyncio.get_running_loop().create_future())


@pytest.mark.parametrize("is_closed", [False, True])
@pytest.mark.parametrize("is_retry", [False, True])
def test_a_job_that_nobody_waits_for_is_not_queued(is_closed: bool, is_retry: bool) -> None:
    async def main() -> None:
        queue, cancelled, answered = JobQueue(), queued_job(), queued_job()
        outcome = Outcome(provider="alpha", seconds=1.0)
        cancelled.outcome.cancel()
        answered.complete(outcome)
        if is_closed:
            queue.close()

        queue.put(cancelled, is_retry=is_retry)
        queue.put(answered, is_retry=is_retry)

        assert queue._waiting == []
        assert queue.pop("resnet50", "0xa1fa") == []
        assert answered.outcome.result() == outcome and cancelled.outcome.cancelled()

    asyncio.run(main())

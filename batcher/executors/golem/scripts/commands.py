"""The commands of a script for chunks. Called by `worker.py`.

A provider executes commands one after the other. Where its image has `mlg-provider next`, chunks are computed meanwhile
by its warm process, which has a queue: while some are computed, further ones are uploaded and earlier results
downloaded, and the last ones are computed while the next script is on its way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batcher.executors.golem.offers import THREADS
from batcher.executors.golem.scripts.attempt import Attempt

_PROGRAM = "/usr/local/bin/mlg-provider"


def add_chunk(script: Any, attempt: Attempt) -> None:
    """Add what sends a chunk, processes it with the command that every image has, and receives the results.

    :param script: yapapi's Script; likewise below.
    """
    script.upload_file(str(attempt.queued_job.job.chunk), _chunk_path(attempt))
    script.run(_PROGRAM, "run", _chunk_path(attempt), _results_path(attempt), "--threads", str(THREADS))
    script.download_file(_results_path(attempt), str(attempt.received))


def add_chunks(script: Any, *, new: Sequence[Attempt], awaited: Sequence[Attempt], has_work: bool) -> None:
    """Add what sends chunks to a warm process, then waits for chunks and receives the results of each.

    :param new: chunks to send.
    :param awaited: chunks to wait for, at least one, in the order in which they are sent or were sent before.
    :param has_work: whether the warm process has a chunk to work on while these are sent.
    """
    unqueued: list[str] = []
    for attempt in new:
        script.upload_file(str(attempt.queued_job.job.chunk), _chunk_path(attempt))
        unqueued += [_chunk_path(attempt), _results_path(attempt)]
        if not has_work and attempt is not new[-1]:
            script.run(_PROGRAM, "next", "-", *unqueued)
            unqueued, has_work = [], True
    for attempt in awaited:
        script.run(_PROGRAM, "next", _results_path(attempt), *unqueued)
        script.download_file(_results_path(attempt), str(attempt.received))
        unqueued = []


# The files of a chunk take the place of those of an earlier one, so that the provider's disk does not fill.


def _chunk_path(attempt: Attempt) -> str:
    return f"/golem/input/chunk-{attempt.slot}.zip"


def _results_path(attempt: Attempt) -> str:
    return f"/golem/output/results-{attempt.slot}.zip"

"""Shrinks pictures to what a model sees of them, before they are packed.

Made by `batcher.scheduler`, called by `batcher.packing` in threads. Decoding a stranger's picture may crash or hang the
process that does it, so none is decoded here: warm processes do it (`process.py`, and `__main__.py` on the other side),
as many as MLG_WORKERS, started when the first picture comes. Each has one picture at a time, so whoever kills it is
known at once. Not a `ProcessPoolExecutor`: that one cannot tell which of its jobs broke it, and leaves its processes
behind when the batcher is killed.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from batcher.errors import ResizingUnavailable
from batcher.resizing.process import Decoder, DecoderExited, ResizeJob
from batcher.subprocesses import child_environment
from provider_image.errors import ChunkTimeout, MlgError, WorkerDied

if TYPE_CHECKING:
    from batcher.executors import Executor
    from batcher.settings import BatcherSettings
    from provider_image.service import ModelInput

#: An item may take this long; the largest picture that is taken needs two seconds on a quiet machine.
ITEM_TIMEOUT_SECONDS = 30.0
#: Starts in a row that may end before the item was begun; somebody may kill idle processes, but not for ever.
_MAX_STARTS = 3

#: What became of an item: its inputs shrunk; or why there are none; or that one of its files is gone.
ResizeResult = dict[str, bytes] | MlgError | FileNotFoundError


class Resizer:
    """A few warm processes that shrink items. Threads may share it.

    :param workers: processes at most.
    :param environment: variables that they get beside those of this process.
    """

    def __init__(
        self, workers: int, *, environment: Mapping[str, str] | None = None, limit_seconds: float = ITEM_TIMEOUT_SECONDS
    ) -> None:
        self._limit_seconds = limit_seconds
        self._is_closed = False
        variables = child_environment(os.environ, environment)
        self._decoders = [Decoder(variables) for _ in range(workers)]
        # The last one used comes first, so that there are no more processes than are needed at the same time.
        self._free: queue.LifoQueue[Decoder] = queue.LifoQueue()
        for decoder in self._decoders:
            self._free.put(decoder)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="shrink")

    def resize(self, service: str, model_input: ModelInput, items: Iterable[Mapping[str, Path]]) -> list[ResizeResult]:
        """Shrink items side by side; waits for all of them.

        :param items: input name -> file, for each.
        :return: what became of each, in their order. A BadInput is in the words that a provider would have used;
            WorkerDied and ChunkTimeout mean that this very item killed its process or hung.
        :raises ResizingUnavailable: no process can be started, or this is closed; says nothing about the items.
        :raises OSError: a file that is there cannot be read.
        """
        model_input_fields = asdict(model_input)
        jobs = [
            ResizeJob(
                service=service, model_input=model_input_fields, inputs={name: str(path) for name, path in item.items()}
            )
            for item in items
        ]
        try:
            return list(self._threads.map(self._resize_one, jobs))
        except RuntimeError as error:
            if not self._is_closed:
                raise
            raise _closed_error() from error

    def pids(self) -> list[int]:
        """List the processes that run."""
        return [decoder.pid for decoder in self._decoders if decoder.pid is not None]

    def close(self) -> None:
        """Kill the processes, at once, and wait for them; who waits for an item is told. May be called twice."""
        self._is_closed = True
        for decoder in self._decoders:
            decoder.retire()
        self._threads.shutdown()
        for decoder in self._decoders:
            decoder.stop()

    def _resize_one(self, job: ResizeJob) -> ResizeResult:
        decoder = self._free.get()
        try:
            for _ in range(_MAX_STARTS):
                try:
                    reply = decoder.run(job, self._limit_seconds)
                except DecoderExited:
                    continue
                return reply
        except (WorkerDied, ChunkTimeout) as error:
            if self._is_closed:
                raise _closed_error() from error
            return error
        finally:
            self._free.put(decoder)
        raise _closed_error() if self._is_closed else ResizingUnavailable()


def make_resizer(settings: BatcherSettings, executor: Executor) -> Resizer | None:
    """Return what shrinks pictures for this executor; None if it is to get the originals."""
    if settings.shrink == "off" or (settings.shrink == "auto" and not executor.is_remote):
        return None
    return Resizer(settings.workers)


def _closed_error() -> ResizingUnavailable:
    return ResizingUnavailable("The batcher was stopped before the pictures were shrunk.")

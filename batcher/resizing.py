"""Resizes images to a model's input before they are packed, in separate processes.

Made by `batcher.scheduler`, called by `batcher.packing` in threads. The processes are those of
`provider_image.decoders`, up to MLG_WORKERS of them, started when the first image comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batcher.errors import ResizingUnavailable
from provider_image.decoders import JOB_TIMEOUT_SECONDS, DecoderPool, DecoderResult
from provider_image.errors import DecodingUnavailable

if TYPE_CHECKING:
    from batcher.executors import Executor
    from batcher.settings import BatcherSettings
    from provider_image.models.catalogue import ModelFacts


class Resizer:
    """Resizes items in a pool of processes; safe to use from several threads.

    :param workers: maximum number of processes.
    :param environment, limit_seconds: see `DecoderPool`.
    """

    def __init__(
        self, workers: int, *, environment: Mapping[str, str] | None = None, limit_seconds: float = JOB_TIMEOUT_SECONDS
    ) -> None:
        self._pool = DecoderPool(workers, environment=environment, limit_seconds=limit_seconds)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="resize")
        self._is_closed = False
        #: Lists the running processes.
        self.pids = self._pool.pids

    def resize(self, model: ModelFacts, items: Iterable[Mapping[str, Path]]) -> list[DecoderResult]:
        """Resize items in parallel, and wait for all of them.

        :param items: input name -> image file, for each item.
        :return: a result for each item, in their order; see `DecoderPool.run`.
        :raises ResizingUnavailable: no process can be started, or this is closed; no item is at fault.
        :raises OSError: an existing file cannot be read.
        """
        size = {"height": model.height, "width": model.width, "crop": model.crop}
        inputs = ({name: str(path) for name, path in item.items()} for item in items)
        jobs: list[dict[str, Any]] = [{"do": "resize", "options": size, "inputs": each} for each in inputs]
        try:
            return list(self._threads.map(self._pool.run, jobs))
        except DecodingUnavailable as error:
            raise ResizingUnavailable(error.reason) from error
        except RuntimeError as error:
            if not self._is_closed:
                raise
            raise ResizingUnavailable("The batcher was stopped before the images were resized.") from error

    def close(self) -> None:
        """Kill the processes and wait for them; calls of `resize` raise. May be called twice."""
        self._is_closed = True
        self._pool.retire()
        self._threads.shutdown()
        self._pool.close()


def make_resizer(settings: BatcherSettings, executor: Executor) -> Resizer | None:
    """Return the resizer for an executor; None if it gets the originals."""
    if settings.shrink == "off" or (settings.shrink == "auto" and not executor.is_remote):
        return None
    return Resizer(settings.resizers)

"""Decodes images in separate processes: resizes them to a model's input, and tries what a provider refused.

Made by `batcher.scheduler`, called by `batcher.packing` and `batcher.results` in threads. The processes are those of
`provider_image.decoders`, up to MLG_WORKERS of them, started when the first image comes. There are others for what was
refused: a provider waits, and is paid, while that is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batcher.errors import ResizingUnavailable
from provider_image.decoders import JOB_TIMEOUT_SECONDS, DecoderPool, DecoderResult
from provider_image.errors import DecodingUnavailable, MlgError
from provider_image.extensions import extension_folders

if TYPE_CHECKING:
    from batcher.executors import Executor
    from batcher.settings import BatcherSettings
    from provider_image.models.catalogue import ModelFacts


class Resizer:
    """Resizes items in a pool of processes; safe to use from several threads.

    :param workers: maximum number of processes.
    :param models: the folder of artefacts.
    :param is_compressed: tells whether resized images for a model are compressed.
    :param environment, limit_seconds: see `DecoderPool`.
    """

    def __init__(
        self,
        workers: int,
        models: Path,
        *,
        is_compressed: Callable[[str], bool] = lambda model: True,
        environment: Mapping[str, str] | None = None,
        limit_seconds: float = JOB_TIMEOUT_SECONDS,
    ) -> None:
        self._models = models
        self._is_compressed = is_compressed
        self._pool, self._tries = (
            DecoderPool(workers, environment=environment, limit_seconds=limit_seconds, readable=readable)
            for readable in ((), (models, *extension_folders()))
        )
        self._threads, self._try_threads = (ThreadPoolExecutor(workers, name) for name in ("resize", "try"))
        self._is_closed = False

    def pids(self) -> list[int]:
        """List the running processes."""
        return [*self._pool.pids(), *self._tries.pids()]

    def resize(self, model: ModelFacts, items: Iterable[Mapping[str, Path]]) -> list[DecoderResult]:
        """Resize items in parallel, and wait for all of them.

        :param items: input name -> image file, for each item.
        :return: a result for each item, in their order; see `DecoderPool.run`.
        :raises ResizingUnavailable: no process can be started, or this is closed; no item is at fault.
        :raises OSError: an existing file cannot be read.
        """
        size = {"height": model.height, "width": model.width, "crop": model.crop}
        options = {**size, "is_compressed": self._is_compressed(model.name)}
        inputs = ({name: str(path) for name, path in item.items()} for item in items)
        jobs = [{"do": "resize", "options": options, "inputs": each} for each in inputs]
        return self._run(self._threads, self._pool, jobs)

    def try_item(self, chunk: Path, number: int) -> MlgError | None:
        """Decode the inputs of an item of a chunk file as a worker does.

        :return: None, or why they cannot be used; WorkerDied and ChunkTimeout as in `DecoderPool.run`.
        :raises ResizingUnavailable: as `resize`.
        """
        options = {"path": str(chunk), "models": str(self._models), "number": number}
        job = {"do": "try", "options": options, "inputs": {"chunk": str(chunk)}}
        (found,) = self._run(self._try_threads, self._tries, [job])
        return found if isinstance(found, MlgError) else None

    def _run(
        self, threads: ThreadPoolExecutor, pool: DecoderPool, jobs: Iterable[Mapping[str, Any]]
    ) -> list[DecoderResult]:
        try:
            return list(threads.map(pool.run, jobs))
        except DecodingUnavailable as error:
            raise ResizingUnavailable(error.reason) from error
        except RuntimeError as error:
            if not self._is_closed:
                raise
            raise ResizingUnavailable("The batcher was stopped before the images were resized.") from error

    def close(self) -> None:
        """Kill the processes and wait for them; calls of `resize` raise. May be called twice."""
        self._is_closed = True
        for pool in (self._pool, self._tries):
            pool.retire()
        for threads in (self._threads, self._try_threads):
            threads.shutdown()
        for pool in (self._pool, self._tries):
            pool.close()


def is_compressing(settings: BatcherSettings, executor: Executor, model: str) -> bool:
    """Tell whether resized images for a model are compressed."""
    return settings.shrink == "on" or (settings.shrink == "auto" and not executor.has_quick_transfers(model))


def is_resizing(settings: BatcherSettings, executor: Executor) -> bool:
    """Tell whether an executor gets resized images; else it gets the originals."""
    return settings.shrink in ("on", "uncompressed") or (settings.shrink == "auto" and executor.is_remote)

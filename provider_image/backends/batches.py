"""Batches that are filled with what is ready, from all chunks under way, for nets that run many items at once.

Used by the runtime for devices such as GPUs. Threads of their own run the batches, so items are decoded meanwhile. No
batch waits until it is full: what became ready while one ran is the next.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

_Item = TypeVar("_Item")
_Outcome = TypeVar("_Outcome")
#: Batches under way: the arrays of one are prepared, and its answers are read, while the device computes another.
_THREADS = 2


class DeviceBatches(Generic[_Item, _Outcome]):
    """Runs items in batches. Thread-safe.

    :param run: returns an outcome for each item of a batch, in their order.
    :param size: most items of a batch.
    """

    def __init__(self, run: Callable[[Sequence[_Item]], Sequence[_Outcome]], size: int) -> None:
        self._ready: queue.SimpleQueue[tuple[_Item, Future[_Outcome]] | None] = queue.SimpleQueue()
        for _ in range(_THREADS):
            threading.Thread(target=_work, args=(self._ready, run, size), name="batch", daemon=True).start()
        self._end = weakref.finalize(self, self._ready.put, None)

    def submit(self, item: _Item) -> Future[_Outcome]:
        """Have an item run with others. :return: its outcome, or what `run` raised for its batch."""
        outcome: Future[_Outcome] = Future()
        self._ready.put((item, outcome))
        return outcome

    def close(self) -> None:
        """End the threads when all items are done. Nothing may be submitted afterwards."""
        self._end()


def _work(ready: queue.SimpleQueue[Any], run: Callable[[Sequence[Any]], Sequence[Any]], size: int) -> None:
    while (batch := _take(ready, size)) is not None:
        try:
            outcomes = run([item for item, _ in batch])
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                future.set_result(outcome)
        except Exception as error:  # noqa: BLE001 - whoever waits must not wait for ever
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)


def _take(ready: queue.SimpleQueue[Any], size: int) -> list[Any] | None:
    """Wait for an item, and take those that are ready as well. :return: None at the end."""
    batch: list[Any] = []
    while len(batch) < size:
        try:
            item = ready.get(block=not batch)
        except queue.Empty:
            break
        if item is None:
            ready.put(None)  # for the other threads, and for the next call
            break
        batch.append(item)
    return batch or None

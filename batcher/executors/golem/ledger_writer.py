"""Writes into the ledger from the event loop: in order, in a thread, and again until the store takes it.

Used by everything here that has something to note. Work does not wait for it; what is noted last is written when the
executor closes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from provider_image.errors import MlgError
from store.errors import StoreError
from store.sqlite import SqliteStore

log = logging.getLogger(__name__)

_INITIAL_BACKOFF_SECONDS = 0.2
_MAX_BACKOFF_SECONDS = 5.0


class LedgerWriter:
    """A queue of entries.

    :param ledger: the store.
    """

    def __init__(self, ledger: SqliteStore) -> None:
        self.ledger = ledger
        self._entries: asyncio.Queue[Callable[[], object]] = asyncio.Queue()
        self._writer_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to write."""
        self._writer_task = asyncio.create_task(self._write())

    def enqueue(self, entry: Callable[[], object]) -> None:
        """Have an entry written, after all those before it."""
        self._entries.put_nowait(entry)

    async def flush(self, seconds: float) -> bool:
        """Wait until everything is written, but not longer than this. :return: whether it is."""
        try:
            async with asyncio.timeout(seconds):
                await self._entries.join()
        except TimeoutError:
            return False
        return True

    async def close(self, seconds: float = 5.0) -> None:
        """Write what is left, and end."""
        if self._writer_task is None:
            return
        if not await self.flush(seconds):
            log.error("%d entries of the ledger could not be written", self._entries.qsize() + 1)
        self._writer_task.cancel()
        await asyncio.gather(self._writer_task, return_exceptions=True)
        self._writer_task = None

    async def _write(self) -> None:
        while True:
            entry = await self._entries.get()
            try:
                await self._write_one(entry)
            finally:
                self._entries.task_done()

    async def _write_one(self, entry: Callable[[], object]) -> None:
        pause = _INITIAL_BACKOFF_SECONDS
        while True:
            try:
                await asyncio.to_thread(entry)
                return
            except StoreError as error:
                log.warning("the ledger cannot be written, trying again in %.1f s: %s", pause, error)
            except MlgError as error:
                log.warning("an entry of the ledger was refused: %s", error)
                return
            except Exception:
                # A bug in one entry must not keep all others from being written.
                log.exception("an entry of the ledger could not be written")
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MAX_BACKOFF_SECONDS)

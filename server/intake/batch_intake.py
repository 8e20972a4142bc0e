"""Takes the items of a batch: each is fetched if need be, checked like a single picture, and staged, or refused.

Used by `views/batches.py`. Several are worked on at the same time, because most of it is waiting for the disk or for
other servers; they come out in the order in which they were sent.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from provider_image import errors
from provider_image.images.headers import read_header
from server.context import Context
from server.errors import BacklogFull, FetchFailed
from server.intake.batch_parser import BatchItem
from server.intake.url_fetcher import fetch
from store.batches import RefusedItem
from store.images import StagedImage

#: Pictures of one batch that are checked, fetched and written at the same time.
MAX_CONCURRENT_ITEMS = 8
#: Seconds that fetching the pictures of one batch may take; what is not there by then is refused.
MAX_FETCH_SECONDS = 240.0


@dataclass(frozen=True, kw_only=True)
class ItemOutcome:
    """What became of one item at the door: staged, or refused."""

    item: BatchItem
    staged: StagedImage | None = None
    refused_item: RefusedItem | None = None


class BatchIntake:
    """How one server process takes batches."""

    def __init__(self, context: Context) -> None:
        self._context = context
        #: Fetching takes minutes, so it may not hold up every thread.
        self._fetch_slots = threading.BoundedSemaphore(max(1, context.settings.server_threads // 4))

    @contextlib.contextmanager
    def fetch_slot(self) -> Iterator[None]:
        """Take a place among the batches whose pictures are fetched. :raises BacklogFull: there is none."""
        if not self._fetch_slots.acquire(blocking=False):
            raise BacklogFull("Too many batches of addresses are being fetched already. Send it again later.")
        try:
            yield
        finally:
            self._fetch_slots.release()

    def stage_items(self, items: Iterator[BatchItem]) -> list[ItemOutcome]:
        """Check and stage items, several at a time, in order. :raises MlgError: nothing is left behind."""
        outcomes: list[ItemOutcome] = []
        give_up_at = time.monotonic() + MAX_FETCH_SECONDS
        with ThreadPoolExecutor(MAX_CONCURRENT_ITEMS, thread_name_prefix="batch") as threads:
            waiting: deque[Future[ItemOutcome]] = deque()
            try:
                for item in items:
                    waiting.append(threads.submit(self._stage_item, item, give_up_at))
                    if len(waiting) > 2 * MAX_CONCURRENT_ITEMS:
                        outcomes.append(waiting.popleft().result())
                while waiting:
                    outcomes.append(waiting.popleft().result())
            except BaseException:
                for future in waiting:
                    if not future.cancel() and future.exception() is None:
                        outcomes.append(future.result())
                self.discard(outcomes)
                raise
        return outcomes

    def _stage_item(self, item: BatchItem, give_up_at: float) -> ItemOutcome:
        try:
            if item.error is not None:
                raise item.error
            data = self._fetch(item.url, give_up_at) if item.url is not None else item.data or b""
            read_header(data, self._context.settings.max_pixels)
        except (errors.BadInput, FetchFailed) as error:
            refused_item = RefusedItem(
                position=item.position, client_id=item.client_id, code=error.code, reason=error.reason
            )
            return ItemOutcome(item=replace(item, data=None), refused_item=refused_item)
        return ItemOutcome(item=replace(item, data=None), staged=self._context.store.images.stage(data))

    def _fetch(self, url: str, give_up_at: float) -> bytes:
        seconds = min(self._context.settings.fetch_seconds, give_up_at - time.monotonic())
        if seconds <= 0:
            raise FetchFailed("Fetching the pictures of the batch took too long. Send the rest as another batch.")
        return fetch(url, max_image_bytes=self._context.settings.max_image_bytes, seconds=seconds)

    def discard(self, outcomes: list[ItemOutcome]) -> None:
        """Take back what was staged."""
        for outcome in outcomes:
            if outcome.staged is not None:
                self._context.store.images.discard(outcome.staged)

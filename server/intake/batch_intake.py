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
from provider_image.images.decoding import check_upload
from server.context import Context
from server.errors import FetchFailed
from server.intake.batch_parser import Item
from server.intake.url_fetcher import fetch
from store.batches import Refusal
from store.images import Staged

#: Pictures of one batch that are checked, fetched and written at the same time.
AT_ONCE = 8
#: Seconds that fetching the pictures of one batch may take; what is not there by then is refused.
FETCH_SECONDS = 240.0


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What became of one item at the door: staged, or refused."""

    item: Item
    staged: Staged | None = None
    refusal: Refusal | None = None


class Taking:
    """How one server process takes batches."""

    def __init__(self, context: Context) -> None:
        self._context = context
        #: Fetching takes minutes, so it may not hold up every thread.
        self._fetches = threading.BoundedSemaphore(max(1, context.settings.server_threads // 4))

    @contextlib.contextmanager
    def fetching(self) -> Iterator[None]:
        """Take a place among the batches whose pictures are fetched. :raises BacklogFull: there is none."""
        if not self._fetches.acquire(blocking=False):
            raise errors.BacklogFull("Too many batches of addresses are being fetched already. Send it again later.")
        try:
            yield
        finally:
            self._fetches.release()

    def take(self, items: Iterator[Item]) -> list[Taken]:
        """Check and stage items, several at a time, in order. :raises MlgError: nothing is left behind."""
        taken: list[Taken] = []
        give_up_at = time.monotonic() + FETCH_SECONDS
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="batch") as threads:
            waiting: deque[Future[Taken]] = deque()
            try:
                for item in items:
                    waiting.append(threads.submit(self._take_one, item, give_up_at))
                    if len(waiting) > 2 * AT_ONCE:
                        taken.append(waiting.popleft().result())
                while waiting:
                    taken.append(waiting.popleft().result())
            except BaseException:
                for future in waiting:
                    if not future.cancel() and future.exception() is None:
                        taken.append(future.result())
                self.discard(taken)
                raise
        return taken

    def _take_one(self, item: Item, give_up_at: float) -> Taken:
        try:
            if item.error is not None:
                raise item.error
            data = self._fetch(item.url, give_up_at) if item.url is not None else item.data or b""
            check_upload(data, self._context.settings.max_pixels)
        except (errors.BadInput, FetchFailed) as error:
            refusal = Refusal(position=item.position, client_id=item.client_id, code=error.code, reason=error.reason)
            return Taken(item=replace(item, data=None), refusal=refusal)
        return Taken(item=replace(item, data=None), staged=self._context.store.blobs.stage(data))

    def _fetch(self, url: str, give_up_at: float) -> bytes:
        seconds = min(self._context.settings.fetch_seconds, give_up_at - time.monotonic())
        if seconds <= 0:
            raise FetchFailed("Fetching the pictures of the batch took too long. Send the rest as another batch.")
        return fetch(url, max_image_bytes=self._context.settings.max_image_bytes, seconds=seconds)

    def discard(self, taken: list[Taken]) -> None:
        """Take back what was staged."""
        for one in taken:
            if one.staged is not None:
                self._context.store.blobs.discard(one.staged)

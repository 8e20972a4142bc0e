"""Records what workers report of items under way: the latest report of each request, in few commits.

Used by `batcher.cycle`. Nothing waits for a report: one that the store does not take is dropped, and a preview is
checked as any image of a stranger.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from batcher.packing import PackedChunk
from provider_image.errors import BadInput
from provider_image.images.headers import read_header
from provider_image.progress import MAX_PREVIEW_BYTES, ProgressReport
from store.errors import StoreError
from store.processes.progress import NewProgress

log = logging.getLogger(__name__)

#: Most pixels of a preview, which browsers decode.
MAX_PREVIEW_PIXELS = 2_000_000


class ProgressWriter:
    """Writes reports into the store.

    :param record: records reports.
    :param pause_seconds: least time between two calls of it.
    """

    def __init__(self, record: Callable[[Sequence[NewProgress]], None], *, pause_seconds: float) -> None:
        self._record = record
        self._pause_seconds = pause_seconds
        #: (number, token) of a claim -> its latest report that is not recorded yet.
        self._waiting: dict[tuple[int, int], ProgressReport] = {}
        self._has_waiting = asyncio.Event()

    def put(self, packed: PackedChunk, report: ProgressReport) -> None:
        """Take a report of an item of a chunk, for all claims that wait for the item."""
        if not 0 <= report.item < len(packed.items):
            log.warning("a worker reports item %d, which its chunk does not have", report.item)
            return
        for claim in packed.items[report.item].claims:
            earlier = self._waiting.get((claim.number, claim.token))
            if report.preview is None and earlier is not None:
                report = replace(report, preview=earlier.preview)
            self._waiting[claim.number, claim.token] = report
        self._has_waiting.set()

    async def run(self) -> None:
        """Record reports until cancelled."""
        while True:
            await self._has_waiting.wait()
            self._has_waiting.clear()
            waiting, self._waiting = self._waiting, {}
            await asyncio.to_thread(self._write, waiting)
            await asyncio.sleep(self._pause_seconds)

    def _write(self, waiting: Mapping[tuple[int, int], ProgressReport]) -> None:
        new = [
            NewProgress(number=number, token=token, fraction=report.fraction, preview=_checked(report.preview))
            for (number, token), report in waiting.items()
        ]
        try:
            self._record(new)
        except StoreError as error:
            log.warning("cannot record progress: %s", error)


def _checked(preview: bytes | None) -> bytes | None:
    """Return a preview, or None if it is no JPEG that may be shown."""
    if preview is None or len(preview) > MAX_PREVIEW_BYTES:
        return None
    try:
        if read_header(preview, MAX_PREVIEW_PIXELS).format == "JPEG":
            return preview
        reason = "it is no JPEG"
    except BadInput as error:
        reason = error.reason
    log.warning("a preview is dropped: %s", reason)
    return None

"""Progress of items under way: what services report while they run, and the latest report of each item.

A service whose run takes seconds calls `report_progress`. The runtime collects the reports of a chunk in a board, and
the warm process sends them to its client when that asks for them, as the local executor does. Nobody else does: on a
provider a report does nothing. A report changes no answer, and one that is lost is followed by the next.
"""

from __future__ import annotations

import base64
import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

#: Seconds between two reports of an item; others are dropped.
REPORT_SECONDS = 0.5
#: Seconds between two previews of an item.
PREVIEW_SECONDS = 2.0
#: Largest preview; a larger one is dropped.
MAX_PREVIEW_BYTES = 128 * 1024
#: Making previews takes at most this share of the time of an item.
_PREVIEW_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class ProgressReport:
    """How far an item of a chunk is."""

    #: Its number in the chunk.
    item: int
    #: The part that is done, 0 to 1.
    fraction: float
    #: What it looks like now, a JPEG; None if that is not new.
    preview: bytes | None = None

    def to_json(self) -> dict[str, Any]:
        """Format it as the warm process sends it."""
        preview = None if self.preview is None else base64.b64encode(self.preview).decode()
        return {"item": self.item, "fraction": self.fraction, "preview": preview}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ProgressReport:
        """Parse it. :raises ValueError: it is malformed."""
        try:
            item, fraction, preview = raw["item"], float(raw["fraction"]), raw["preview"]
            data = None if preview is None else base64.b64decode(preview, validate=True)
        except (TypeError, KeyError, OverflowError) as error:
            raise ValueError("A report has an item, a fraction and a preview.") from error
        is_valid = isinstance(item, int) and 0 <= fraction <= 1
        if not is_valid or len(data or b"") > MAX_PREVIEW_BYTES:
            raise ValueError("The report is impossible.")
        return cls(item=item, fraction=fraction, preview=data)


class ProgressBoard:
    """The reports of a chunk's items that were not taken yet, the latest of each. May be used by several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._reports: dict[int, ProgressReport] = {}
        #: Item -> when its next report, and its next preview, is accepted.
        self._report_at: dict[int, float] = {}
        self._preview_at: dict[int, float] = {}

    def add(self, item: int, fraction: float, preview: Callable[[], bytes] | None) -> None:
        """Add a report, unless the last one is too recent; likewise its preview, which is made only then."""
        started = self._clock()
        # Only the thread that runs an item reports it.
        if math.isnan(fraction) or started < self._report_at.get(item, started):
            return
        data = None
        if preview is not None and started >= self._preview_at.get(item, started):
            data = preview()
            seconds = self._clock() - started
            self._preview_at[item] = started + max(PREVIEW_SECONDS, seconds / _PREVIEW_SHARE)
        self._report_at[item] = started + REPORT_SECONDS
        if data is not None and len(data) > MAX_PREVIEW_BYTES:
            data = None
        report = ProgressReport(item=item, fraction=min(1.0, max(0.0, float(fraction))), preview=data)
        with self._lock:
            earlier = self._reports.get(item)
            if data is None and earlier is not None:
                report = replace(report, preview=earlier.preview)
            self._reports[item] = report

    def take(self) -> list[ProgressReport]:
        """Return the reports that were not taken yet."""
        with self._lock:
            reports = list(self._reports.values())
            self._reports.clear()
        return reports


#: Where the run of this thread reports, and the number of each of its items in the chunk.
_watched: ContextVar[tuple[ProgressBoard, Sequence[int]] | None] = ContextVar("watched", default=None)


@contextlib.contextmanager
def reporting(board: ProgressBoard | None, numbers: Sequence[int]) -> Iterator[None]:
    """Collect what a service's `run` reports inside of the `with` statement; the runtime calls it.

    :param board: None drops the reports.
    :param numbers: of the run's items in the chunk, in their order.
    """
    token = _watched.set(None if board is None else (board, numbers))
    try:
        yield
    finally:
        _watched.reset(token)


def report_progress(item: int, fraction: float, preview: Callable[[], bytes] | None = None) -> None:
    """Report how far an item is. Services call it in `run`, in the thread that called that, as often as they like.

    It takes microseconds unless a report is due: twice a second at most, and a preview every two seconds.

    :param item: the item's index in what `run` was given.
    :param fraction: the part that is done, 0 to 1.
    :param preview: returns a JPEG of at most MAX_PREVIEW_BYTES of what the item looks like now; called only when one is
        due, so that encoding costs nothing otherwise.
    """
    watched = _watched.get()
    if watched is not None:
        board, numbers = watched
        board.add(numbers[item], fraction, preview)

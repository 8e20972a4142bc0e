"""The progress bars of `mlg submit`: on stderr, and only when that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from cli.submit import Row


class ProgressBars:
    """One bar for the images sent and one for the results; a context manager.

    :param on_sent: called with each row that was sent, in the order of the files.
    """

    def __init__(self, total: int, *, is_waiting: bool, on_sent: Callable[[Row], None] | None) -> None:
        self._on_sent = on_sent
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not sys.stderr.isatty(),
            transient=True,
        )
        self._sent = self._progress.add_task("sent", total=total)
        self._answered = self._progress.add_task("answered", total=total, visible=is_waiting)

    def __enter__(self) -> ProgressBars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def sent(self, row: Row) -> None:
        """Count a file that was acknowledged, now or in an earlier run, or refused."""
        self._progress.advance(self._sent)
        if row.request is None:
            self._progress.advance(self._answered)
        if self._on_sent is not None:
            self._on_sent(row)

    def answered(self, row: Row) -> None:
        """Count a file that has its result."""
        self._progress.advance(self._answered)

"""The progress bars of `mlg submit`: on stderr, and only when that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cli.submit import Row


class Bars:
    """One bar for what was sent, one for what was answered; a context manager.

    :param tell: called with each row that was sent, in order.
    """

    def __init__(self, total: int, *, is_waiting: bool, tell: Callable[[Row], None] | None) -> None:
        self._tell = tell
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

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def sent(self, row: Row) -> None:
        """Count a file that was acknowledged, found in the journal, or refused; called in the order of the files."""
        self._progress.advance(self._sent)
        if row.request is None:
            self._progress.advance(self._answered)
        if self._tell is not None:
            self._tell(row)

    def answered(self, row: Row) -> None:
        """Count a file whose answer is there."""
        self._progress.advance(self._answered)

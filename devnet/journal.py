"""What the daemon was asked and what it answered: in memory, and in a file of JSON lines if one is wanted."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path

from devnet.timing import format_time

#: So many calls are kept in memory.
MAX_CALLS = 20_000


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the API, written down when it was over."""

    at: datetime
    method: str
    path: str
    query: str
    #: None if the caller went away before the answer.
    status: int | None
    seconds: float
    request_bytes: int
    answer_bytes: int
    #: The beginnings of the bodies, if they are text.
    request: str
    answer: str


class CallJournal:
    """All calls.

    :param path: the file that gets a line for each; none if None.
    """

    #: Longer bodies are cut.
    max_body_bytes = 4000

    def __init__(self, path: Path | None = None) -> None:
        self.calls: deque[Call] = deque(maxlen=MAX_CALLS)
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8", buffering=1)

    def __iter__(self) -> Iterator[Call]:
        return iter(tuple(self.calls))

    def add(self, call: Call) -> None:
        """Write a call down."""
        self.calls.append(call)
        if self._file is not None:
            row = {**asdict(call), "at": format_time(call.at), "seconds": round(call.seconds, 4)}
            self._file.write(json.dumps(row) + "\n")

    def matching(self, pattern: str) -> list[Call]:
        """List the calls of which "METHOD /path" fits the glob, oldest first."""
        return [call for call in self.calls if fnmatchcase(f"{call.method} {call.path}", pattern)]

    def failed(self) -> list[Call]:
        """List the calls that were answered with an error, except polls that ended without news."""
        return [call for call in self.calls if call.status is not None and call.status >= 400 and call.status != 408]

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

"""What is kept and told of a command's output stream, as its `capture` asked.

Used by `exe_unit.py`. However much a program writes, only so much is kept: from the start, from the end, or both.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping
from typing import Any

#: Bytes of a stream that are kept for the result at most.
KEPT_BYTES = 64 * 1024
#: Bytes of a stream that are told as they come at most.
TOLD_BYTES = 1024 * 1024
_LIMITS = ("head", "tail", "headTail", "stream", "limit")


class Capture:
    """One stream of one command.

    :param wish: `{"stream": {}}` or `{"atEnd": {...}}`, with limits in bytes; nothing is kept if it is None.
    :param tell: called with text as it comes, if it shall be streamed.
    """

    def __init__(self, wish: Mapping[str, Any] | None, tell: Callable[[str], None]) -> None:
        self._is_kept = wish is not None
        self._tell = tell if wish is not None and "stream" in wish else None
        how = _how(wish or {})
        limit = min([KEPT_BYTES, *(value for key, value in how.items() if key in _LIMITS and isinstance(value, int))])
        limit = max(0, limit)
        at_start = limit if "head" in how else 0 if "tail" in how else limit // 2
        self._start_bytes, self._end_bytes = at_start, limit - at_start
        self._start, self._end = bytearray(), bytearray()
        self._dropped = self._told = 0
        # A character may come in two pieces.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, data: bytes) -> None:
        """Take what the program wrote."""
        if self._tell is not None and self._told < TOLD_BYTES:
            self._told += len(data)
            self._say(self._decoder.decode(data))
        room = self._start_bytes - len(self._start)
        self._start += data[:room]
        self._end += data[room:]
        excess = len(self._end) - self._end_bytes
        if excess > 0:
            del self._end[:excess]
            self._dropped += excess

    def close(self) -> None:
        """Tell what was held back as half a character."""
        if self._tell is not None:
            self._say(self._decoder.decode(b"", final=True))

    @property
    def text(self) -> str | None:
        """What is kept, None if nothing was to be kept; a gap shows as [...]."""
        if not self._is_kept:
            return None
        gap = b"\n[...]\n" if self._dropped and self._start and self._end else b""
        return bytes(self._start + gap + self._end).decode("utf-8", "replace")

    def _say(self, text: str) -> None:
        if text and self._tell is not None:
            self._tell(text)


def _how(wish: Mapping[str, Any]) -> Mapping[str, Any]:
    how = wish.get("stream", wish.get("atEnd")) or {}
    part = how.get("part")
    # The API's description puts the limits one level deeper than yapapi does.
    return {**how, **part} if isinstance(part, dict) else how

"""What is kept and told of a command's output stream, as its `capture` asked.

Used by `exe_unit.py`. However much a program writes, only so much is kept: from the start, from the end, or both.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping
from typing import Any

#: Bytes of a stream that are kept for the result at most.
MAX_CAPTURED_BYTES = 64 * 1024
#: Bytes of a stream that are told as they come at most.
MAX_STREAMED_BYTES = 1024 * 1024
_LIMIT_KEYS = ("head", "tail", "headTail", "stream", "limit")


class Capture:
    """One stream of one command.

    :param options: `{"stream": {}}` or `{"atEnd": {...}}`, with limits in bytes; nothing is kept if it is None.
    :param on_text: called with text as it comes, if it shall be streamed.
    """

    def __init__(self, options: Mapping[str, Any] | None, on_text: Callable[[str], None]) -> None:
        self._is_captured = options is not None
        self._on_text = on_text if options is not None and "stream" in options else None
        limits = _capture_limits(options or {})
        limit = min(
            [
                MAX_CAPTURED_BYTES,
                *(value for key, value in limits.items() if key in _LIMIT_KEYS and isinstance(value, int)),
            ]
        )
        limit = max(0, limit)
        at_start = limit if "head" in limits else 0 if "tail" in limits else limit // 2
        self._start_bytes, self._end_bytes = at_start, limit - at_start
        self._start, self._end = bytearray(), bytearray()
        self._dropped_bytes = self._streamed_bytes = 0
        # A character may come in two pieces.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, data: bytes) -> None:
        """Take what the program wrote."""
        if self._on_text is not None and self._streamed_bytes < MAX_STREAMED_BYTES:
            self._streamed_bytes += len(data)
            self._emit(self._decoder.decode(data))
        free_bytes = self._start_bytes - len(self._start)
        self._start += data[:free_bytes]
        self._end += data[free_bytes:]
        excess = len(self._end) - self._end_bytes
        if excess > 0:
            del self._end[:excess]
            self._dropped_bytes += excess

    def close(self) -> None:
        """Tell what was held back as half a character."""
        if self._on_text is not None:
            self._emit(self._decoder.decode(b"", final=True))

    @property
    def text(self) -> str | None:
        """What is kept, None if nothing was to be kept; a gap shows as [...]."""
        if not self._is_captured:
            return None
        gap = b"\n[...]\n" if self._dropped_bytes and self._start and self._end else b""
        return bytes(self._start + gap + self._end).decode("utf-8", "replace")

    def _emit(self, text: str) -> None:
        if text and self._on_text is not None:
            self._on_text(text)


def _capture_limits(options: Mapping[str, Any]) -> Mapping[str, Any]:
    limits = options.get("stream", options.get("atEnd")) or {}
    part = limits.get("part")
    # The API's description puts the limits one level deeper than yapapi does.
    return {**limits, **part} if isinstance(part, dict) else limits

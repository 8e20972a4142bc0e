"""An exe-script: its commands, what is captured of their output, and the batch that runs it.

Used by `exe_unit.py`, which makes a batch of each script that the requestor sends. A script is checked as a whole
before any of its commands runs.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from devnet.errors import ApiError
from devnet.timing import ChangeNotifier, format_time, utc_now

#: Command -> the states of an activity in which it is allowed.
ALLOWED_STATES = {
    "deploy": {"Initialized"},
    "start": {"Deployed"},
    "transfer": {"Deployed", "Ready"},
    "run": {"Ready"},
    "sign": {"Ready"},
    "terminate": {"Initialized", "Deployed", "Ready"},
}
#: Command -> its required fields, which are strings.
_REQUIRED_STRINGS = {"transfer": ("from", "to"), "run": ("entry_point",)}
#: Limits on the bytes of an output stream in a command's result, and in the events sent while it runs.
MAX_CAPTURED_BYTES = 64 * 1024
MAX_STREAMED_BYTES = 1024 * 1024
_LIMIT_KEYS = ("head", "tail", "headTail", "stream", "limit")


# Commands


class CommandFailed(Exception):
    """A command failed with a return code that is not 0; the message goes into its result."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status

    @classmethod
    def from_exit_status(cls, status: int) -> CommandFailed:
        """Make the error for a program's exit status, with the message of Golem's exe-unit."""
        return cls(f"ExeScript command exited with code {status}", status)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of a script."""

    name: str
    body: Mapping[str, Any]
    #: As received, for the event that it has started.
    raw: Mapping[str, Any]

    @property
    def ends_activity(self) -> bool:
        """Return whether the command ends the activity."""
        return self.name == "terminate"


def parse_script(script: Any) -> list[Command]:
    """Check a whole script. :raises ApiError: it has no commands, unknown ones, or invalid fields."""
    if not isinstance(script, list) or not script:
        raise ApiError("A script must be a list of at least one command.")
    return [_command(number, entry) for number, entry in enumerate(script)]


def _command(number: int, entry: Any) -> Command:
    def require(holds: bool, problem: str) -> None:
        if not holds:
            raise ApiError(f"Command {number} of the script {problem}.")

    require(isinstance(entry, dict) and len(entry) == 1, "is not an object with one key")
    name, body = next(iter(entry.items()))
    require(name in ALLOWED_STATES, f"is unknown: {name!r}. Known: {', '.join(ALLOWED_STATES)}")
    body = {} if body is None else body
    require(isinstance(body, dict), "has a body that is not an object")
    for key in _REQUIRED_STRINGS.get(name, ()):
        require(isinstance(body.get(key), str), f"has no string {key!r}")
    words = body.get("args") or []
    require(isinstance(words, list) and all(isinstance(word, str) for word in words), "has args that are not strings")
    capture = body.get("capture") or {}
    require(isinstance(capture, dict) and capture.keys() <= {"stdout", "stderr"}, "captures an unknown stream")
    for options in capture.values():
        require(options is None or _is_capture_option(options), "has a capture that is neither stream nor atEnd")
    return Command(name=name, body=body, raw=entry)


# Output


class OutputCapture:
    """Captures an output stream of a command, with limited memory: its start, its end, or both.

    :param options: `{"stream": {}}` or `{"atEnd": {...}}`, with limits in bytes; nothing is captured if None.
    :param on_text: receives the text as it is written, if the options ask for a stream.
    """

    def __init__(self, options: Mapping[str, Any] | None, on_text: Callable[[str], None]) -> None:
        self._is_captured = options is not None
        self._on_text = on_text if options is not None and "stream" in options else None
        limits = _capture_limits(options or {})
        given = (value for key, value in limits.items() if key in _LIMIT_KEYS and isinstance(value, int))
        limit = max(0, min([MAX_CAPTURED_BYTES, *given]))
        at_start = limit if "head" in limits else 0 if "tail" in limits else limit // 2
        self._start_bytes, self._end_bytes = at_start, limit - at_start
        self._start, self._end = bytearray(), bytearray()
        self._dropped_bytes = self._streamed_bytes = 0
        # A character may be split between two writes.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, data: bytes) -> None:
        """Take output of the program."""
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
        """Emit the rest of an incomplete character."""
        if self._on_text is not None:
            self._emit(self._decoder.decode(b"", final=True))

    @property
    def text(self) -> str | None:
        """Return the captured text, with [...] for a gap; None if nothing was to be captured."""
        if not self._is_captured:
            return None
        gap = b"\n[...]\n" if self._dropped_bytes and self._start and self._end else b""
        return bytes(self._start + gap + self._end).decode("utf-8", "replace")

    def _emit(self, text: str) -> None:
        if text and self._on_text is not None:
            self._on_text(text)


def _is_capture_option(options: Any) -> bool:
    return (
        isinstance(options, dict)
        and len(options) == 1
        and options.keys() <= {"stream", "atEnd"}
        and all(limits is None or isinstance(limits, dict) for limits in options.values())
    )


def _capture_limits(options: Mapping[str, Any]) -> Mapping[str, Any]:
    limits = options.get("stream", options.get("atEnd")) or {}
    part = limits.get("part")
    # The API description puts the limits one level deeper than yapapi does.
    return {**limits, **part} if isinstance(part, dict) else limits


# Batches


@dataclass(eq=False, kw_only=True)
class ScriptBatch:
    """A script in execution: its results so far, and its runtime events. An event can be fetched once."""

    #: Random.
    id: str
    commands: list[Command]
    #: As the API returns them, one per command that has ended.
    results: list[dict[str, Any]] = field(default_factory=list)
    #: Runtime events that have not been fetched.
    events: list[dict[str, Any]] = field(default_factory=list)
    is_finished: bool = False
    #: The events are being fetched.
    is_streamed: bool = False
    #: Notified of every change.
    notifier: ChangeNotifier = field(default_factory=ChangeNotifier)

    def add_event(self, index: int, kind: dict[str, Any]) -> None:
        """Add a runtime event of a command."""
        timestamp = utc_now().replace(tzinfo=None).isoformat(timespec="microseconds")
        self.events.append({"batch_id": self.id, "index": index, "timestamp": timestamp, "kind": kind})
        self.notifier.notify()

    def add_result(self, index: int, error: CommandFailed | None, stdout: str | None, stderr: str | None) -> None:
        """Add the result of a command; the last command, or one that fails, finishes the batch."""
        message = str(error) if error else None
        self.is_finished = error is not None or index == len(self.commands) - 1 or self.commands[index].ends_activity
        self.results.append(
            {
                "index": index,
                "eventDate": format_time(utc_now()),
                "result": "Error" if error else "Ok",
                "stdout": stdout,
                "stderr": stderr,
                "message": message,
                "isBatchFinished": self.is_finished,
            }
        )
        self.add_event(index, {"finished": {"return_code": error.status if error else 0, "message": message}})

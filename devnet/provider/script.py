"""An exe-script: its commands, what is captured of their output, and the batch that runs it.

Used by `exe_unit.py`, which makes a batch of each script that the requestor sends. A script is checked as a whole
before any of its commands runs.
"""

from __future__ import annotations

from collections.abc import Mapping
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
#: Captures of an output stream, which all have the same result: those of yapapi without a limit or a format.
_CAPTURES: tuple[Any, ...] = (None, {"stream": {}}, {"atEnd": {}})
#: Limit on the bytes of the start and of the end of an output stream in a command's result.
_PART_BYTES = 32 * 1024


# Commands


class CommandFailed(Exception):
    """A command failed with a return code that is not 0; the message goes into its result."""

    @classmethod
    def from_exit_status(cls, status: int) -> CommandFailed:
        """Make the error for a program's exit status, with the message of Golem's exe-unit."""
        return cls(f"ExeScript command exited with code {status}")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of a script."""

    name: str
    body: Mapping[str, Any]


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
    problem = "has a capture that is neither stream nor atEnd, or one with options, which the devnet does not support"
    require(all(options in _CAPTURES for options in capture.values()), problem)
    return Command(name=name, body=body)


# Output


class OutputCapture:
    """Captures an output stream of a command: its start and its end, with [...] between them if there is more."""

    def __init__(self, is_wanted: bool) -> None:
        self._is_wanted = is_wanted
        self._start, self._end = bytearray(), bytearray()
        self._has_gap = False

    def write(self, data: bytes) -> None:
        """Take output of the program."""
        free_bytes = _PART_BYTES - len(self._start)
        self._start += data[:free_bytes]
        self._end += data[free_bytes:]
        if len(self._end) > _PART_BYTES:
            del self._end[:-_PART_BYTES]
            self._has_gap = True

    @property
    def text(self) -> str | None:
        """Return the captured text; None if the requestor did not want it."""
        gap = b"\n[...]\n" if self._has_gap else b""
        return bytes(self._start + gap + self._end).decode("utf-8", "replace") if self._is_wanted else None


# Batches


@dataclass(eq=False, kw_only=True)
class ScriptBatch:
    """A script in execution, and its results so far."""

    #: Random.
    id: str
    commands: list[Command]
    #: As the API returns them, one per command that has ended.
    results: list[dict[str, Any]] = field(default_factory=list)
    is_finished: bool = False
    #: Notified of every change.
    notifier: ChangeNotifier = field(default_factory=ChangeNotifier)

    def add_result(self, index: int, error: CommandFailed | None, stdout: str | None, stderr: str | None) -> None:
        """Add the result of a command; the last command, or one that fails, finishes the batch."""
        self.is_finished = (
            error is not None or index == len(self.commands) - 1 or self.commands[index].name == "terminate"
        )
        self.results.append(
            {
                "index": index,
                "eventDate": format_time(utc_now()),
                "result": "Error" if error else "Ok",
                "stdout": stdout,
                "stderr": stderr,
                "message": str(error) if error else None,
                "isBatchFinished": self.is_finished,
            }
        )
        self.notifier.notify()

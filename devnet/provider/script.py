"""The commands of an exe-script as yapapi writes them, checked before any is run.

Used by `exe_unit.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from devnet.errors import ApiError

#: Command -> the states of an activity in which it may be run.
_STATES = {
    "deploy": {"Initialized"},
    "start": {"Deployed"},
    "transfer": {"Deployed", "Ready"},
    "run": {"Ready"},
    "sign": {"Ready"},
    "terminate": {"Initialized", "Deployed", "Ready"},
}
#: Command -> the texts that it must have.
_REQUIRED_STRINGS = {"transfer": ("from", "to"), "run": ("entry_point",)}


class BadScript(ApiError):
    """The script is not one."""


class CommandFailed(Exception):
    """A command did not do what it should; the message is its result's.

    :param status: not 0.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status

    @classmethod
    def from_exit_status(cls, status: int) -> CommandFailed:
        """Say that a program ended so, in the words of Golem's exe-unit."""
        return cls(f"ExeScript command exited with code {status}", status)


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command."""

    name: str
    body: Mapping[str, Any]
    #: Word for word, for the event that it has started.
    raw: Mapping[str, Any]

    @property
    def allowed_states(self) -> set[str]:
        """In which states of the activity it may be run."""
        return _STATES[self.name]

    @property
    def capture(self) -> Mapping[str, Any]:
        """Stream -> how it shall be captured."""
        return self.body.get("capture") or {}

    @property
    def ends_activity(self) -> bool:
        """Whether the activity is over after it."""
        return self.name == "terminate"


def parse_script(script: Any) -> list[Command]:
    """Check a script.

    :raises BadScript: it has no commands, unknown ones, or ones with missing or odd fields.
    """
    if not isinstance(script, list) or not script:
        raise BadScript("A script is a list of at least one command.")
    return [_command(number, entry) for number, entry in enumerate(script)]


def _command(number: int, entry: Any) -> Command:
    def require(holds: bool, what: str) -> None:
        if not holds:
            raise BadScript(f"Command {number} of the script {what}.")

    require(isinstance(entry, dict) and len(entry) == 1, "is not an object with one key")
    name, body = next(iter(entry.items()))
    require(name in _STATES, f"is unknown: {name!r}. There are: {', '.join(_STATES)}")
    body = {} if body is None else body
    require(isinstance(body, dict), "has a body that is not an object")
    for key in _REQUIRED_STRINGS.get(name, ()):
        require(isinstance(body.get(key), str), f"has no text {key!r}")
    words = body.get("args") or []
    require(isinstance(words, list) and all(isinstance(word, str) for word in words), "has args that are no texts")
    capture = body.get("capture") or {}
    require(
        isinstance(capture, dict) and capture.keys() <= {"stdout", "stderr"}, "captures other streams than there are"
    )
    for options in capture.values():
        require(options is None or _is_capture_option(options), "captures in a way that is neither stream nor atEnd")
    return Command(name=name, body=body, raw=entry)


def _is_capture_option(options: Any) -> bool:
    return (
        isinstance(options, dict)
        and len(options) == 1
        and options.keys() <= {"stream", "atEnd"}
        and all(limits is None or isinstance(limits, dict) for limits in options.values())
    )

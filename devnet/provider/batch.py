"""A script under way: its commands, and what became of them so far, as results and as events.

Made by `exe_unit.py` for each script that the requestor sends. Results are asked for again and again, from the first
on; each event is fetched once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from devnet.provider.script import Command, CommandFailed
from devnet.timing import ChangeNotifier, format_time, utc_now


@dataclass(eq=False, kw_only=True)
class ScriptBatch:
    """One batch."""

    #: Random.
    id: str
    commands: list[Command]
    #: As the API gives them, from the first command on.
    results: list[dict[str, Any]] = field(default_factory=list)
    #: Runtime events that nobody has fetched yet.
    events: list[dict[str, Any]] = field(default_factory=list)
    is_finished: bool = False
    #: Somebody fetches the events.
    is_streamed: bool = False
    #: Rung whenever anything here has changed.
    notifier: ChangeNotifier = field(default_factory=ChangeNotifier)

    def add_event(self, index: int, kind: dict[str, Any]) -> None:
        """Add a runtime event."""
        timestamp = utc_now().replace(tzinfo=None).isoformat(timespec="microseconds")
        self.events.append({"batch_id": self.id, "index": index, "timestamp": timestamp, "kind": kind})
        self.notifier.notify()

    def add_result(self, index: int, error: CommandFailed | None, stdout: str | None, stderr: str | None) -> None:
        """Add a command's result; the batch is finished by its last command or one that failed."""
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

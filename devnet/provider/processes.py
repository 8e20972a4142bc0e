"""All processes of one activity: who they are, the processor time they used, and their end.

Used by `sandbox.py`. A program may leave others behind in sessions of their own (`mlg-provider run` leaves its
warm process, which does the real work), so they are known by a variable that each inherits, not by their parents.

Weaknesses: what empties its environment is lost sight of once the command that started it is over, and of a process
that ended by itself only the time up to the last look is known. Linux only.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import time
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

#: The variable that marks an activity's processes.
MARK = "GOLEM_DEVNET_ACTIVITY"
#: A process that is still there so long after SIGKILL hangs in the kernel; nothing can be done about it.
_KILL_SECONDS = 10.0
_LOOK_SECONDS = 0.01
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A living process as it was at the last look."""

    pid: int
    parent: int
    #: A pid is used again, but not with the same start.
    started: int
    #: Processor time of its own and of those of its children that it has waited for.
    seconds: float


class Processes:
    """The processes of one activity."""

    def __init__(self, activity_id: str) -> None:
        # Ids need not be unique among all devnets of a machine, and one must not kill for the other.
        self.mark = f"{activity_id}-{secrets.token_hex(6)}"
        self._needle = f"\0{MARK}={self.mark}\0".encode()
        self._children: set[int] = set()
        #: Children that were waited for since the last look.
        self._reaped: set[int] = set()
        self._seen: dict[tuple[int, int], _Seen] = {}
        self._settled_seconds = 0.0
        self._most_seconds = 0.0

    def add_child(self, pid: int) -> None:
        """Note a process that this one started as the leader of a new session."""
        self._children.add(pid)

    def settle_child(self, pid: int, seconds: float) -> None:
        """Note that a child was waited for. :param seconds: its processor time, with all that it waited for."""
        self._children.discard(pid)
        self._reaped.add(pid)
        self._settled_seconds += seconds
        self._seen = {key: seen for key, seen in self._seen.items() if seen.pid != pid}

    def pids(self) -> list[int]:
        """List the living processes of the activity."""
        return sorted(seen.pid for seen in self._look().values())

    def cpu_seconds(self) -> float:
        """Return the processor time that all processes have used so far; never less than at the call before."""
        found = self._look()
        families = {seen.pid for seen in self._seen.values()} | self._reaped
        for key in self._seen.keys() - found.keys():
            gone = self._seen[key]
            # Whoever had a parent among us was waited for by it and is in its time; children are settled when reaped.
            if gone.parent not in families and gone.pid not in self._children:
                self._settled_seconds += gone.seconds
        self._seen, self._reaped = found, set()
        now = self._settled_seconds + sum(seen.seconds for seen in found.values())
        self._most_seconds = max(self._most_seconds, now)
        return self._most_seconds

    async def kill_all(self) -> None:
        """Kill every process of the activity, again and again until none is left."""
        deadline, looks_in_vain = time.monotonic() + _KILL_SECONDS, 0
        # In the middle of an exec a process has no environment for a moment, hence the second look.
        while looks_in_vain < 2:
            for pid in self._children:
                _kill(-pid)  # not waited for, so the number is still its own
            pids = self.pids()
            for pid in pids:
                _kill(pid)
            looks_in_vain = 0 if pids else looks_in_vain + 1
            if time.monotonic() > deadline:
                log.warning("processes outlive their activity: %s", pids, extra={"activity": self.mark})
                return
            await asyncio.sleep(_LOOK_SECONDS)

    def _look(self) -> dict[tuple[int, int], _Seen]:
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                seen = self._looked_at(entry)
                if seen is not None:
                    found[seen.pid, seen.started] = seen
        return found

    def _looked_at(self, entry: Path) -> _Seen | None:
        try:
            if self._needle not in b"\0" + (entry / "environ").read_bytes():
                return None
            # The name in brackets may hold anything; from the state on, see proc(5).
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # gone, or somebody else's
            return None
        if fields[0] in "ZX":
            return None
        ticks = sum(int(field) for field in fields[11:15])
        return _Seen(pid=int(entry.name), parent=int(fields[1]), started=int(fields[19]), seconds=ticks / _TICKS)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # a group whose last member is dying gives the latter
        return

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
ACTIVITY_VARIABLE = "GOLEM_DEVNET_ACTIVITY"
#: A process that is still there so long after SIGKILL hangs in the kernel; nothing can be done about it.
_KILL_SECONDS = 10.0
_SCAN_SECONDS = 0.01
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class _ProcessInfo:
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
        self._environment_entry = f"\0{ACTIVITY_VARIABLE}={self.mark}\0".encode()
        self._children: set[int] = set()
        #: Children that were waited for since the last look.
        self._reaped: set[int] = set()
        self._processes: dict[tuple[int, int], _ProcessInfo] = {}
        self._reaped_seconds = 0.0
        self._max_seconds = 0.0

    def add_child(self, pid: int) -> None:
        """Note a process that this one started as the leader of a new session."""
        self._children.add(pid)

    def child_reaped(self, pid: int, seconds: float) -> None:
        """Note that a child was waited for. :param seconds: its processor time, with all that it waited for."""
        self._children.discard(pid)
        self._reaped.add(pid)
        self._reaped_seconds += seconds
        self._processes = {key: process for key, process in self._processes.items() if process.pid != pid}

    def pids(self) -> list[int]:
        """List the living processes of the activity."""
        return sorted(process.pid for process in self._scan().values())

    def cpu_seconds(self) -> float:
        """Return the processor time that all processes have used so far; never less than at the call before."""
        found = self._scan()
        known_parents = {process.pid for process in self._processes.values()} | self._reaped
        for key in self._processes.keys() - found.keys():
            ended_process = self._processes[key]
            # Whoever had a parent among us was waited for by it and is in its time; children are settled when reaped.
            if ended_process.parent not in known_parents and ended_process.pid not in self._children:
                self._reaped_seconds += ended_process.seconds
        self._processes, self._reaped = found, set()
        now = self._reaped_seconds + sum(process.seconds for process in found.values())
        self._max_seconds = max(self._max_seconds, now)
        return self._max_seconds

    async def kill_all(self) -> None:
        """Kill every process of the activity, again and again until none is left."""
        deadline, empty_scans = time.monotonic() + _KILL_SECONDS, 0
        # In the middle of an exec a process has no environment for a moment, hence the second look.
        while empty_scans < 2:
            for pid in self._children:
                _kill(-pid)  # not waited for, so the number is still its own
            pids = self.pids()
            for pid in pids:
                _kill(pid)
            empty_scans = 0 if pids else empty_scans + 1
            if time.monotonic() > deadline:
                log.warning("processes outlive their activity: %s", pids, extra={"activity": self.mark})
                return
            await asyncio.sleep(_SCAN_SECONDS)

    def _scan(self) -> dict[tuple[int, int], _ProcessInfo]:
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                process = self._read_process(entry)
                if process is not None:
                    found[process.pid, process.started] = process
        return found

    def _read_process(self, entry: Path) -> _ProcessInfo | None:
        try:
            if self._environment_entry not in b"\0" + (entry / "environ").read_bytes():
                return None
            # The name in brackets may hold anything; from the state on, see proc(5).
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # gone, or somebody else's
            return None
        if fields[0] in "ZX":
            return None
        ticks = sum(int(field) for field in fields[11:15])
        return _ProcessInfo(
            pid=int(entry.name), parent=int(fields[1]), started=int(fields[19]), seconds=ticks / _TICKS_PER_SECOND
        )


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # a group whose last member is dying gives the latter
        return

"""The processes of one activity: finding them, measuring their processor time, and killing them.

Used by `sandbox.py`. A program may leave processes behind in other sessions (`mlg-provider run` leaves its warm
process, which does the inference), so an inherited environment variable identifies processes, not their parents.

Limitations: a process that clears its environment is not found after the command that started it has ended. If a
process ends that is not a child of this one, its time since the last scan is lost. Linux only.
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

#: The environment variable that marks the processes of an activity.
ACTIVITY_VARIABLE = "GOLEM_DEVNET_ACTIVITY"
#: A process that still exists this long after SIGKILL hangs in the kernel.
_KILL_SECONDS = 10.0
_SCAN_SECONDS = 0.01
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class _ProcessInfo:
    """A running process at the last scan."""

    pid: int
    parent: int
    #: Start time in clock ticks; distinguishes processes that had the same pid one after the other.
    started: int
    #: Processor time of the process and of the children that it has waited for.
    seconds: float


class Processes:
    """The processes of one activity."""

    def __init__(self, activity_id: str) -> None:
        # Ids need not be unique among the devnets of a machine, and one must not kill the processes of another.
        self.mark = f"{activity_id}-{secrets.token_hex(6)}"
        self._environment_entry = f"\0{ACTIVITY_VARIABLE}={self.mark}\0".encode()
        self._children: set[int] = set()
        #: Children that were waited for since the last scan.
        self._reaped: set[int] = set()
        self._processes: dict[tuple[int, int], _ProcessInfo] = {}
        self._reaped_seconds = 0.0
        self._max_seconds = 0.0

    def add_child(self, pid: int) -> None:
        """Add a child of this process that leads a new session."""
        self._children.add(pid)

    def child_reaped(self, pid: int, seconds: float) -> None:
        """Remove a child that was waited for; its processor time includes the children that it waited for."""
        self._children.discard(pid)
        self._reaped.add(pid)
        self._reaped_seconds += seconds
        self._processes = {key: process for key, process in self._processes.items() if process.pid != pid}

    def pids(self) -> list[int]:
        """Return the running processes of the activity."""
        return sorted(process.pid for process in self._scan().values())

    def cpu_seconds(self) -> float:
        """Return the processor time that all processes have used so far; never less than at the previous call."""
        found = self._scan()
        known_parents = {process.pid for process in self._processes.values()} | self._reaped
        for key in self._processes.keys() - found.keys():
            ended_process = self._processes[key]
            # A process whose parent was known is in its parent's time; children are added when they are reaped.
            if ended_process.parent not in known_parents and ended_process.pid not in self._children:
                self._reaped_seconds += ended_process.seconds
        self._processes, self._reaped = found, set()
        now = self._reaped_seconds + sum(process.seconds for process in found.values())
        self._max_seconds = max(self._max_seconds, now)
        return self._max_seconds

    async def kill_all(self) -> None:
        """Kill every process of the activity, repeatedly until none is left."""
        deadline, empty_scans = time.monotonic() + _KILL_SECONDS, 0
        # During an exec a process has no environment for a moment, and a new one may be missed, hence the other scans.
        while empty_scans < 3:
            for pid in self._children:
                _kill(-pid)  # not waited for, so its pid has not been reused
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
            # The name in brackets may contain any character. The fields after it: see proc(5).
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended, or belongs to another user
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
    except (ProcessLookupError, PermissionError):  # the latter for a group whose last member is ending
        return

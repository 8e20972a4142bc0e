"""Processes that tests start, and those below them: to watch, kill and count them."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from tests.timing import wait_until


def ends_with_tests(*command: str) -> list[str]:
    """Return a command line whose program is ended with the process that starts it, even if that is killed."""
    return ["setpriv", "--pdeathsig", "TERM", "--", *command] if shutil.which("setpriv") else list(command)


def _status(pid: int) -> list[str]:
    """Read the fields of /proc/PID/stat from the state on: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def is_alive(pid: int) -> bool:
    """Tell whether the process runs; one that has ended and was not waited for does not."""
    try:
        return _status(pid)[0] != "Z"
    except OSError:
        return False


def cpu_seconds(pid: int) -> float:
    """Read how long the process has computed."""
    user, system = _status(pid)[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def wait_for_work(pid: int) -> None:
    """Wait until the process has computed a while longer than now: it is in the middle of what it was given."""
    idle = cpu_seconds(pid)
    wait_until(lambda: cpu_seconds(pid) >= idle + 0.2)


def command_line(pid: int) -> list[str]:
    """Return a process's words, none if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def _children() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # ended meanwhile
                state, parent = _status(int(entry.name))[:2]
                if state != "Z":
                    found.setdefault(int(parent), []).append(int(entry.name))
    return {parent: sorted(pids) for parent, pids in found.items()}


def children(pid: int) -> list[int]:
    """List the living processes that this one started."""
    return _children().get(pid, [])


def descendants(pid: int) -> list[int]:
    """List the living processes below this one, parents before their children."""
    children_of = _children()
    found, todo = [], [pid]
    while todo:
        pids = children_of.get(todo.pop(0), [])
        found += pids
        todo += pids
    return found

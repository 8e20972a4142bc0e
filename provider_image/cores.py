"""The number of cores that this process may use, by its affinity and the container's CPU quota.

In a container that is limited to two of 64 cores, 64 threads are slower than two. Read by the runtime, the check and
the batcher's settings.
"""

from __future__ import annotations

import math
import os
from pathlib import Path


def available_cores(root: Path = Path("/")) -> int:
    """Count the cores that this process may use, at least 1.

    :param root: the folder with /proc and /sys; another one in tests.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min(_quotas(root), default=math.inf)
    return cores if math.isinf(quota) else max(1, min(cores, math.ceil(quota - 0.01)))


def limit_cores(number: int) -> None:
    """Limit this process, and those that it starts, to so many of its cores, with all the threads of libraries."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        first = os.getpid() % len(cores)  # other processes may do the same
        os.sched_setaffinity(0, [*cores, *cores][first : first + min(number, len(cores))])


def _quotas(root: Path) -> list[float]:
    """Return the limits of this process's control groups and their parents, in cores."""
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            for base in ("sys/fs/cgroup", "sys/fs/cgroup/unified"):
                for folder in _ancestors(root / base, group):
                    quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
                    found += _cores(quota, period)
        elif "cpu" in controllers.split(","):
            for base in ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct"):
                for folder in _ancestors(root / base, group):
                    quota = _read(folder / "cpu.cfs_quota_us").strip()
                    found += _cores(quota, _read(folder / "cpu.cfs_period_us").strip())
    return found


def _ancestors(base: Path, group: str) -> list[Path]:
    folder = base / group.strip("/")
    # In a container the path is often the host's and does not exist; the base then is the container's own group.
    return [base, *(parent for parent in (folder, *folder.parents) if base in parent.parents)]


def _cores(quota: str, period: str) -> list[float]:
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max", or no such file
        return []
    return [share] if share > 0 else []


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

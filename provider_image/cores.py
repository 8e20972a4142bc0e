"""How many cores this process really has: by affinity and by the container's quota.

A container that may use two of a machine's 64 cores and starts 64 threads is slower than one that starts two.
"""

from __future__ import annotations

import math
import os
from pathlib import Path


def available_cores(root: Path = Path("/")) -> int:
    """Count the cores that this process may use, at least 1.

    :param root: where /proc and /sys are; another one in tests.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min(_quotas(root), default=math.inf)
    return cores if math.isinf(quota) else max(1, min(cores, math.ceil(quota - 0.01)))


def _quotas(root: Path) -> list[float]:
    """Collect the limits of this process's control groups and of those above them, in cores."""
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
    # Inside a container the path is often the host's and does not exist here; the base then is the container's own.
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

"""The cores and the memory that this process may use, by its affinity and the limits of its container.

In a container that is limited to two of 64 cores, 64 threads are slower than two. Read by the runtime, the check and
the batcher's settings. The runtime and the processes that read files of strangers limit themselves further here.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

#: Most processes that compute at the same time by default; with more cores, each gets several threads.
_MAX_PROCESSES = 8
#: Assumed where the system does not say how much memory there is.
_UNKNOWN_MEMORY_BYTES = 4 * 1024**3


def available_cores(root: Path = Path("/")) -> int:
    """Count the cores that this process may use, at least 1.

    :param root: the folder with /proc and /sys; another one in tests.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min(_quotas(root), default=math.inf)
    return cores if math.isinf(quota) else max(1, min(cores, math.ceil(quota - 0.01)))


def default_processes() -> int:
    """Return how many processes should share the cores: one a core, and on large machines fewer with several threads.

    Each process loads its own models, and threads of one compute as fast.
    """
    cores = available_cores()
    return math.ceil(cores / math.ceil(cores / _MAX_PROCESSES))


def threads_per_process(processes: int) -> int:
    """Return how many threads each process needs to use all cores."""
    return math.ceil(available_cores() / processes)


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Return the memory of this machine, or of this process's container if that is less.

    :param root: as in `available_cores`.
    """
    lines = (line.split() for line in _read(root / "proc/meminfo").splitlines())
    found = [int(words[1]) * 1024 for words in lines if words[:1] == ["MemTotal:"]]
    for folder in _control_groups(root, "memory", ("memory",)):
        texts = (_read(folder / name).strip() for name in ("memory.max", "memory.limit_in_bytes"))
        found += [int(text) for text in texts if text.isdecimal() and int(text) > 0]
    return min(found, default=_UNKNOWN_MEMORY_BYTES)


def limit_cores(number: int) -> None:
    """Limit this process, and those that it starts, to so many of its cores, with all the threads of libraries."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        first = os.getpid() % len(cores)  # other processes may do the same
        os.sched_setaffinity(0, [*cores, *cores][first : first + min(number, len(cores))])


def limit_resource(kind: int, value: int) -> None:
    """Have the kernel limit a resource of this process, one of `resource.RLIMIT_...`, unless it allows less already.

    The process may raise it again, up to what was allowed before.
    """
    _, most = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def allocated_bytes() -> int:
    """Return the memory that this process has allocated, used or not, as the kernel counts it for RLIMIT_DATA.

    0 where the system does not say it.
    """
    lines = _read(Path("/proc/self/status")).splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), 0)


@contextlib.contextmanager
def limited_memory(extra_bytes: int) -> Iterator[None]:
    """Let allocations of this process fail, while the block runs, beyond so much more than it has now.

    This is for all its threads together. The one that allocates gets a MemoryError, if its library reports it.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    known = allocated_bytes()
    if known and before[0] == resource.RLIM_INFINITY:
        limit_resource(resource.RLIMIT_DATA, known + extra_bytes)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _quotas(root: Path) -> list[float]:
    """Return the limits of this process's control groups and their parents, in cores."""
    found = []
    for folder in _control_groups(root, "cpu", ("cpu", "cpu,cpuacct")):
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        found += _cores(quota, period)
        found += _cores(_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip())
    return found


def _control_groups(root: Path, controller: str, v1_folders: tuple[str, ...]) -> Iterator[Path]:
    """Yield the folders of this process's control groups for a controller, of both generations, and their parents."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            bases: tuple[str, ...] = ("", "unified")
        else:
            bases = v1_folders if controller in controllers.split(",") else ()
        for base in bases:
            yield from _ancestors(root / "sys/fs/cgroup" / base, group)


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

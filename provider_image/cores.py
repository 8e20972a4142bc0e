"""The cores and the memory that this process may use, by its affinity and the limits of its container.

In a container that is limited to two of 64 cores, 64 threads are slower than two. Read by the runtime, the check and
the batcher's settings; the local executor divides both among its workers. The runtime and the processes that read files
of strangers limit themselves further here.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from provider_image.errors import ConfigError

#: Most processes that compute at the same time by default; with more cores, each gets several threads.
_MAX_PROCESSES = 8
#: Memory that there must be for each process by default: its libraries, a net of usual size and an image.
_PROCESS_BYTES = 512 * 1024 * 1024
#: Most memory that an item may take. An image takes at most 200 MB; the rest is for its file and for memory that is not
#: returned at once.
MAX_JOB_BYTES = 320 * 1024 * 1024
#: Most digits of the number of a core.
_MAX_CORE_DIGITS = 5
#: Assumed where the system does not say how much memory there is.
_UNKNOWN_MEMORY_BYTES = 4 * 1024**3


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one of several processes may use."""

    #: Threads that compute.
    threads: int
    #: The cores on which they run, those of one NUMA node; None: any.
    cores: frozenset[int] | None = None


def available_cores(root: Path = Path("/")) -> int:
    """Count the cores that this process may use, at least 1.

    :param root: the folder with /proc and /sys; another one in tests.
    """
    cores = len(_usable_cores())
    quota = min(_quotas(root), default=math.inf)
    return cores if math.isinf(quota) else max(1, min(cores, math.ceil(quota - 0.01)))


def default_processes(root: Path = Path("/")) -> int:
    """Return how many processes should share the cores: one a core, and on large machines fewer with several threads.

    Each process loads its own models, and threads of one compute as fast. There are never more than fit into memory.
    The number of processes is a multiple of that of NUMA nodes, if it is larger.

    :param root: as in `available_cores`.
    """
    cores, nodes = available_cores(root), len(_nodes(root)) or 1
    wanted = math.ceil(cores / math.ceil(cores / _MAX_PROCESSES))
    if wanted >= nodes:
        wanted = math.ceil(wanted / nodes) * nodes
    return min(wanted, cores, _processes_in_memory(_PROCESS_BYTES, root))


def default_decoders(root: Path = Path("/")) -> int:
    """Return how many processes should decode images: one a core, and no more than the memory is enough for."""
    return min(available_cores(root), _processes_in_memory(MAX_JOB_BYTES, root))


def divide_cores(processes: int, root: Path = Path("/")) -> list[Share]:
    """Divide the cores among processes so that each thread has one.

    With several NUMA nodes, each process gets the cores of one node, whose memory it then gets as well: that of another
    is slower. More processes are on a node with more cores. Fewer processes than nodes are not bound.

    :param root: as in `available_cores`.
    """
    threads, nodes = math.ceil(available_cores(root) / processes), _nodes(root)
    if len(nodes) < 2 or processes < len(nodes):
        return [Share(threads=threads)] * processes
    chosen: list[int] = []
    for _ in range(processes):
        chosen.append(max(range(len(nodes)), key=lambda node: len(nodes[node]) / (chosen.count(node) + 1)))
    usable, total = available_cores(root), sum(map(len, nodes))
    return [
        Share(threads=-(-len(nodes[node]) * usable // (total * chosen.count(node))), cores=nodes[node])
        for node in chosen
    ]


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Return the memory of this machine, or of this process's container if that is less.

    :param root: as in `available_cores`.
    """
    lines = (line.split() for line in _read(root / "proc/meminfo").splitlines())
    found = [int(words[1]) * 1024 for words in lines if words[:1] == ["MemTotal:"]]
    for folder in _control_groups(root, "memory", ("memory",)):
        names = ("memory.max", "memory.high", "memory.limit_in_bytes")
        texts = (_read(folder / name).strip() for name in names)
        found += [int(text) for text in texts if text.isdecimal() and int(text) > 0]
    return min(found, default=_UNKNOWN_MEMORY_BYTES)


def limit_cores(number: int) -> None:
    """Limit this process, and those that it starts, to so many of its cores, with all the threads of libraries."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        first = os.getpid() % len(cores)  # other processes may do the same
        os.sched_setaffinity(0, [*cores, *cores][first : first + min(number, len(cores))])


def use_cores(cores: Iterable[int]) -> None:
    """Let this process, with its threads and those that it starts, run on some cores only.

    :raises ConfigError: none of them may be used.
    """
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        raise ConfigError(f"This process may not use the cores {format_cores(cores)}: {error.strerror}.") from error


def format_cores(cores: Iterable[int]) -> str:
    """Write numbers of cores, as `parse_cores` reads them."""
    return ",".join(map(str, sorted(cores)))


def parse_cores(text: str) -> frozenset[int]:
    """Read a list of cores as the system writes it, for example 0-3,8. :raises ValueError: it is none."""
    found: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        first, _, last = part.partition("-")
        if len(last or first) > _MAX_CORE_DIGITS:
            raise ValueError(f"there is no core {last or first}")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


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


class AllocationLimit:
    """Lets allocations of this process fail beyond so much more than it has, while items are under way.

    This is for all its threads together. The one that allocates gets a MemoryError, if its library reports it. There is
    one such object in a process, and nothing else limits the same.
    """

    def __init__(self, extra_bytes: int) -> None:
        self._extra_bytes = extra_bytes
        self._lock = threading.Lock()
        #: Blocks under way of both kinds.
        self._applied = self._lifted = 0
        self._before = resource.getrlimit(resource.RLIMIT_DATA)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Limit it while the block runs. Of blocks that overlap, the first sets the limit."""
        with self._lock:
            if not self._applied:
                self._before = resource.getrlimit(resource.RLIMIT_DATA)
                if not self._lifted:
                    self._set()
            self._applied += 1
        try:
            yield
        finally:
            with self._lock:
                self._applied -= 1
                if not self._applied:
                    resource.setrlimit(resource.RLIMIT_DATA, self._before)

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Do not limit it while the block runs, for example while a model is loaded; the limit then is set again."""
        with self._lock:
            if self._applied:
                resource.setrlimit(resource.RLIMIT_DATA, self._before)
            self._lifted += 1
        try:
            yield
        finally:
            with self._lock:
                self._lifted -= 1
                if self._applied and not self._lifted:
                    self._set()

    def _set(self) -> None:
        known = allocated_bytes()
        if known and self._before[0] == resource.RLIM_INFINITY:
            limit_resource(resource.RLIMIT_DATA, known + self._extra_bytes)


class MemoryBudget:
    """Bytes that the items under way may take together. Thread-safe; who waits first is served first."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self._free = total_bytes
        self._turn = threading.Lock()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, size_bytes: int) -> Iterator[None]:
        """Wait until so many bytes are free, all of them for an item that takes more, and hold them for the block."""
        size_bytes = min(size_bytes, self.total_bytes)
        with self._turn, self._changed:  # else a large item would wait for as long as small ones come
            self._changed.wait_for(lambda: self._free >= size_bytes)
            self._free -= size_bytes
        try:
            yield
        finally:
            with self._changed:
                self._free += size_bytes
                self._changed.notify()


def _processes_in_memory(each_bytes: int, root: Path) -> int:
    return max(1, available_memory_bytes(root) // each_bytes)


def _nodes(root: Path) -> list[frozenset[int]]:
    """Return the cores of each NUMA node of which this process may use any."""
    usable = _usable_cores()
    found = []
    for folder in sorted((root / "sys/devices/system/node").glob("node[0-9]*")):
        with contextlib.suppress(ValueError):
            found.append(parse_cores(_read(folder / "cpulist")) & usable)
    return [cores for cores in found if cores]


def _usable_cores() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):  # has the cpuset of a container as well
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


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

"""Restrictions of processes that read files of strangers: no sockets, no other processes, few files, few resources.

Used by decoder processes, by `compiler/confined.py` and for `mlg models check`. System calls are filtered on x86-64 and
64-bit ARM, files are restricted by Landlock, on Linux 5.19 and newer; both only where the system allows it. Weaknesses:
with Landlock the process can still read Python's own folders, for example a source checkout, and the programs of the
system; without it, all files of the user.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import stat
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from provider_image.cores import available_memory_bytes

#: Most processor time of a process, of all threads together. The slowest model of the catalogue takes some minutes to
#: build.
MAX_CPU_SECONDS = 7200
#: Share of the memory that a process may take, and what it may take at least.
_MEMORY_SHARE = 0.75
_MIN_MEMORY_BYTES = 4 * 1024**3
#: Largest file that it may write.
_MAX_FILE_BYTES = 16 * 1024**3

# Constants of Linux.
_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_SECCOMP_MODE_FILTER = 2
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 1  # EPERM
#: Machine -> its number, and those of socket, io_uring_setup (which opens sockets too), ptrace, process_vm_readv,
#: process_vm_writev and pidfd_getfd.
_REFUSED_CALLS = {
    "x86_64": (0xC000003E, (41, 425, 101, 310, 311, 438)),
    "aarch64": (0xC00000B7, (198, 425, 117, 270, 271, 438)),
}

# Landlock: its system calls, which have the same numbers on every machine, and its rights.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_GET_VERSION, _RULE_PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1, 2, 4, 8, 1 << 14
_READ = _EXECUTE | _READ_FILE | _READ_DIR
#: Rights that a file can have which is no folder.
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
#: No signals to other processes, and no sockets of theirs without a file.
_SCOPED = 3
#: The first version can move no file to another folder.
MIN_LANDLOCK = 2
#: What Python and its libraries read of the system. Nothing of it is the user's.
_SYSTEM = (
    "/usr", "/lib", "/lib64", "/nix/store", "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat",
    "/sys/devices/system", "/sys/fs/cgroup", "/etc/ld.so.cache", "/etc/localtime", "/etc/ssl/openssl.cnf",
    "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom",
)  # fmt: skip


def landlock_version() -> int:
    """Return the version of Landlock that this system has, 0 if none."""
    return max(0, _landlock(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_long(_GET_VERSION)))


def _landlock(number: int, *arguments: object) -> int:
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    return int(syscall(ctypes.c_long(number), *arguments))


def restrict_files(readable: Iterable[Path], writable: Iterable[Path] = ()) -> str | None:
    """Refuse this thread, and threads and processes that it starts from now on, all other files, irrevocably.

    Files that are open stay usable. Python's own folders and the system's programs and libraries remain readable.

    :param readable: files, and folders with all that they contain; those that do not exist are left out.
    :param writable: folders in which it may also write.
    :return: why that is not possible; None if it was done.
    """
    version = landlock_version()
    if version < MIN_LANDLOCK:
        return "this system has no Landlock, or an old one"
    all_rights = (1 << (14 if version == 2 else 15)) - 1
    attributes = struct.pack("QQQ", all_rights, 0, _SCOPED if version >= 6 else 0)
    rules = _landlock(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_long(0))
    if rules < 0:
        return os.strerror(ctypes.get_errno())
    try:
        allowed = [(path, _READ) for path in (*map(Path, _SYSTEM), *_python_paths(), *readable)]
        for path, rights in [*allowed, (Path("/dev/null"), _OF_FILES), *((path, all_rights) for path in writable)]:
            try:
                opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:  # there is no such file, or it is none of ours
                continue
            is_folder = stat.S_ISDIR(os.fstat(opened).st_mode)
            rights &= all_rights if is_folder else all_rights & _OF_FILES
            rule = struct.pack("=Qi", rights, opened)
            failed = _landlock(
                _ADD_RULE, ctypes.c_long(rules), ctypes.c_long(_RULE_PATH_BENEATH), rule, ctypes.c_long(0)
            )
            error = ctypes.get_errno()
            os.close(opened)
            if failed:
                return os.strerror(error)
        zero = ctypes.c_ulong(0)
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        if prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero) or _landlock(
            _RESTRICT_SELF, ctypes.c_long(rules), ctypes.c_long(0)
        ):
            return os.strerror(ctypes.get_errno())
    finally:
        os.close(rules)
    return None


def _python_paths() -> Iterator[Path]:
    """Return where Python finds modules and libraries."""
    yield from (Path(each) for each in (*sys.path, sys.prefix, sys.base_prefix) if each)
    yield Path(__file__).parent
    # Those that are loaded, wherever the system has them.
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.partition("/")[1] + line.partition("/")[2])
        if ".so" in path.name and path.parent != path.parent.parent:
            yield path.parent


def memory_limit_bytes() -> int:
    """Return the most memory of a confined process."""
    return max(_MIN_MEMORY_BYTES, int(available_memory_bytes() * _MEMORY_SHARE))


def confine(
    max_bytes: int, max_cpu_seconds: int, readable: Iterable[Path], writable: Iterable[Path] = ()
) -> dict[str, str]:
    """Limit what this process may do, irrevocably; it also ends with the thread that started it.

    :param readable: see `restrict_files`.
    :return: what it keeps, as for people -> why.
    """
    for kind, limit in (
        (resource.RLIMIT_DATA, max_bytes),
        (resource.RLIMIT_CPU, max_cpu_seconds),
        (resource.RLIMIT_FSIZE, _MAX_FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        most = resource.getrlimit(kind)[1]
        limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
        # One more until the system kills it: SIGXCPU tells the parent why it ended.
        resource.setrlimit(kind, (limit, limit + 1 if most == resource.RLIM_INFINITY else most))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    problems = {"the network": refuse_sockets(), "the user's files": restrict_files(readable, writable)}
    return {what: problem for what, problem in problems.items() if problem is not None}


def refuse_sockets() -> str | None:
    """Refuse these calls to this thread, and to threads and processes that it starts from now on, irrevocably.

    :return: why that is not possible; None if it was done.
    """
    if platform.machine() not in _REFUSED_CALLS or struct.calcsize("P") != 8:
        return f"mlg cannot filter system calls on {platform.machine()}"
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    filters = _call_filter(*_REFUSED_CALLS[platform.machine()])
    packed = ctypes.create_string_buffer(b"".join(filters))
    program = ctypes.create_string_buffer(struct.pack("HP", len(filters), ctypes.addressof(packed)))
    if prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0
    ):
        return os.strerror(ctypes.get_errno())
    return None


def _call_filter(machine: int, calls: Sequence[int]) -> list[bytes]:
    """Return a program for seccomp that lets these system calls fail with EPERM, also those of other machines."""
    load, if_equal, if_at_least, end = 0x20, 0x15, 0x35, 0x06
    refuse = (end, 0, 0, _REFUSE)
    # It sees the number of the call at 0 and the machine at 4. A test names how many instructions to skip, if it is
    # true and if it is false; `refuse` is skipped or not. Numbers from 2^30 on are those of another ABI of x86-64.
    program = [
        (load, 0, 0, 4),
        (if_equal, 1, 0, machine),
        refuse,
        (load, 0, 0, 0),
        (if_at_least, 0, 1, 1 << 30),
        refuse,
    ]
    for call in calls:
        program += [(if_equal, 0, 1, call), refuse]
    return [struct.pack("HBBI", *one) for one in [*program, (end, 0, 0, _ALLOW)]]

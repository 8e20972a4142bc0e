"""What processes that read files of strangers may not do: open sockets, access other processes, take all resources.

Used by decoder processes, by `compiler/confined.py` and for `mlg models check`. Weaknesses: the process can read and
write the user's files, and there are filters of system calls on x86-64 and 64-bit ARM only, where the system allows
them.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
from collections.abc import Sequence

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


def memory_limit_bytes() -> int:
    """Return the most memory of a confined process."""
    return max(_MIN_MEMORY_BYTES, int(available_memory_bytes() * _MEMORY_SHARE))


def confine(max_bytes: int, max_cpu_seconds: int = MAX_CPU_SECONDS) -> str | None:
    """Limit what this process may do, irrevocably; it also ends with the thread that started it.

    :return: why it keeps the network; None if it does not.
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
    return refuse_sockets()


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

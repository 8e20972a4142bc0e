"""Builders for the tests of confined processes; each reports what it found as the reason of an error."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from provider_image.errors import UnsuitableModel

Step = Callable[[str], None]


def open_sockets(models: Path, *, on_step: Step) -> None:
    """Try to open sockets of several kinds, and to trace the parent."""
    found = []
    for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
        try:
            socket.socket(family).close()
        except OSError as error:
            found.append(errno.errorcode[error.errno or 0])
    libc = ctypes.CDLL(None, use_errno=True)
    found.append(f"{libc.ptrace(16, os.getppid(), 0, 0)} {errno.errorcode[ctypes.get_errno()]}")
    raise UnsuitableModel(" ".join(found))


def use_files(models: Path, given: Path, *, on_step: Step) -> None:
    """Try to use files: the one that is given, another one beside it, and one in the models folder."""
    found = [given.read_text()]
    for path, mode in ((given.parent / "secret", "r"), (given, "w"), (models / "new", "w"), (models / "new", "r")):
        try:
            with path.open(mode):
                found.append("ok")
        except OSError as error:
            found.append(errno.errorcode[error.errno or 0])
    raise UnsuitableModel(" ".join(found))


def name_folder(models: Path, *, on_step: Step) -> None:
    """Report the folder for relative paths."""
    raise UnsuitableModel(str(Path.cwd()))


def take_memory(models: Path, *, on_step: Step) -> None:
    """Take more memory than is allowed."""
    bytearray(1 << 31)


def spin(models: Path, *, on_step: Step) -> None:
    """Compute without end."""
    while True:
        pass


def crash(models: Path, *, on_step: Step) -> None:
    """Leave a folder behind and die."""
    (models / ".pets.abc.tmp").mkdir(parents=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def chatter(models: Path, *, on_step: Step) -> None:
    """Print what is no message, and use control characters in a step and in an error."""
    os.write(1, b"not a message\n{}\n")
    on_step("one\x1b[2J")
    raise UnsuitableModel("\x1b" + str(sorted(name for name in os.environ if "KEY" in name or "TOKEN" in name)))


def lie(models: Path, *, on_step: Step) -> None:
    """Say that all is done, though nothing is installed."""


def stay(models: Path, *, on_step: Step) -> None:
    """Write the process id to a file and stay."""
    (models / "pid.new").write_text(str(os.getpid()))
    (models / "pid.new").rename(models / "pid")
    time.sleep(1000)

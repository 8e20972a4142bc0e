"""Named pipes by which a shell gives chunks to a warm process and waits for their results, without starting Python.

Made by `warm_server.py`, used by `mlg-provider next`, which is a few lines of the shell script beside this folder. A
provider has one core, and a start of Python takes as much of it as several images. There are, in the folder that the
link `next` beside it leads to:

    queue   for each chunk two lines, the paths of the chunk file and of the results file
    done    for each chunk that has ended two lines, the path of the results file and `ok` or why there is none
    pid     the process that holds both pipes open, so that who reads `done` notices its end

Chunks are processed in the order in which they are queued.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

#: What `mlg-provider run` prints when its warm process takes further chunks.
ACCEPTS_NEXT = "accepts next"
#: Name of the link to the folder of the process that takes chunks.
LINK = "next"
_QUEUE, _DONE, _PID = "queue", "done", "pid"
_READ_BYTES = 4096
#: Longest reason, in characters. A report must fit into what the kernel writes at once.
_MAX_REASON = 500


class ChunkPipes:
    """The pipes of a warm process. Must be made by the one process that holds the lock of the folder.

    :param folder: the private folder of the process.
    :raises OSError: they cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        for name in (_QUEUE, _DONE, _PID):
            (folder / name).unlink(missing_ok=True)
        for name in (_QUEUE, _DONE):
            os.mkfifo(folder / name, 0o600)
        # Opened for reading and writing, which waits for no other side, and never reaches an end.
        self._queue = os.open(folder / _QUEUE, os.O_RDWR)
        self._done = os.open(folder / _DONE, os.O_RDWR | os.O_NONBLOCK)
        (folder / _PID).write_text(f"{os.getpid()}\n")
        temporary = link_of(folder).with_name(f".{LINK}.{secrets.token_hex(8)}")
        temporary.symlink_to(folder.absolute())
        temporary.replace(link_of(folder))
        self._folder = folder
        self._unread = b""

    def read(self) -> Iterator[tuple[Path, Path]]:
        """Yield the paths of chunk file and results file of each chunk that is queued, as they come; without end."""
        while True:
            chunk, results = self._read_line(), self._read_line()
            yield Path(os.fsdecode(chunk)), Path(os.fsdecode(results))

    def _read_line(self) -> bytes:
        while b"\n" not in self._unread:
            self._unread += os.read(self._queue, _READ_BYTES)
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def report(self, results: Path, reason: str | None) -> None:
        """Report the end of a chunk. :param reason: why there is no results file; None if there is one.

        :raises BlockingIOError: nobody has read a thousand of them.
        """
        text = "ok" if reason is None else " ".join(reason.split())[:_MAX_REASON] or "It failed."
        os.write(self._done, os.fsencode(results) + b"\n" + text.encode(errors="replace") + b"\n")

    def close(self) -> None:
        """Remove the link, so that no further chunks come. The pipes end with the process."""
        if accepts_next(self._folder):
            link_of(self._folder).unlink(missing_ok=True)


def link_of(folder: Path) -> Path:
    """Return the link that leads to the folder of the process that takes chunks."""
    return folder.absolute().parent / LINK


def accepts_next(folder: Path) -> bool:
    """Tell whether the warm process with this folder is the one that takes further chunks."""
    try:
        return link_of(folder).readlink() == folder.absolute()
    except OSError:
        return False

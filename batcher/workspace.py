"""A batcher's folder for temporary files, with a lock that shows whether the batcher still runs.

Made by `batcher.scheduler`. The next batcher that starts removes the folders of batchers that were killed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from pathlib import Path

from store.errors import StoreUnavailable
from store.processes.process_lock import is_held

log = logging.getLogger(__name__)

_LOCK = "lock"
#: The folder is named by the first characters of the id: paths of Unix sockets, which are inside, must be short.
_NAME_LENGTH = 8


class Workspace:
    """`work/<start of the batcher's id>`, locked by a file lock that the kernel releases when the process ends."""

    def __init__(self, work: Path, batcher_id: str) -> None:
        self._work = work
        self.folder = work / batcher_id[:_NAME_LENGTH]
        self._lock: int | None = None

    def create(self) -> list[str]:
        """Create the folder, and remove those of batchers that no longer run.

        :return: the names of the removed folders.
        :raises StoreUnavailable: the folder cannot be created.
        """
        try:
            self._work.mkdir(parents=True, exist_ok=True)
            # Without it, a batcher that starts could remove a folder that another has created but not locked yet.
            with (self._work / ".lock").open("w") as lock_file:
                fcntl.flock(lock_file, fcntl.LOCK_EX)
                removed = [
                    path.name for path in sorted(self._work.iterdir()) if path.is_dir() and not is_held(path / _LOCK)
                ]
                for name in removed:
                    shutil.rmtree(self._work / name, ignore_errors=True)
                self.folder.mkdir(mode=0o700)
                self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreUnavailable(
                f"The folder {self._work} cannot be used: {error.strerror or error}. "
                "Check that it belongs to this user and is not read-only."
            ) from error
        if removed:
            log.info("removed files of %d batchers that no longer run", len(removed))
        return removed

    def remove(self) -> None:
        """Remove the folder and its contents. May be called twice."""
        if self._lock is None:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        self._lock = None


def is_alive(work: Path, batcher_id: str) -> bool:
    """Return whether a batcher runs.

    :param work: the folder of all batchers' folders.
    :param batcher_id: or the name of its folder.
    """
    return is_held(work / batcher_id[:_NAME_LENGTH] / _LOCK)

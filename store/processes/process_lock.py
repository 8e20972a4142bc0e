"""File locks that tell other processes on the same home whether the one that holds them still runs.

Used by `store/clients/idempotency.py`, and by `batcher/workspace.py` for the folders of batchers. The kernel releases a
lock when the process ends, however it ends, so no clock decides and nothing has to be renewed.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
import weakref
from pathlib import Path

from store.images import as_store_error


def is_held(path: Path, *, removes_free: bool = False) -> bool:
    """Tell whether a process holds the lock on a file; False if there is no file.

    :param removes_free: remove a file that nobody holds.
    :raises OSError:
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if removes_free:
            path.unlink(missing_ok=True)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


class ProcessLock:
    """The lock of this process in a folder, taken when it is first needed, and a look at those of others.

    The next process removes the files of those that have ended.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mutex = threading.Lock()
        self._id: str | None = None
        self._descriptor = -1

    def acquire(self) -> str:
        """Take the lock, unless it is held already. :return: its id. :raises StoreError:"""
        with self._mutex:
            if self._id is None:
                id = secrets.token_hex(8)
                try:
                    self._folder.mkdir(exist_ok=True, mode=0o700)
                    for path in self._folder.iterdir():
                        is_held(path, removes_free=True)
                    self._descriptor = self._lock(self._folder / id)
                except OSError as error:
                    raise as_store_error(error, self._folder) from error
                self._id = id
                # A process that is forked has the descriptor too, and would hold the lock beyond the end of this one.
                this = weakref.ref(self)
                os.register_at_fork(after_in_child=lambda: None if (lock := this()) is None else lock._forget(id))
            return self._id

    def is_alive(self, id: str) -> bool:
        """Tell whether the process with this id runs. :raises StoreError:"""
        try:
            return id == self._id or is_held(self._folder / id, removes_free=True)
        except OSError as error:
            raise as_store_error(error, self._folder) from error

    def release(self) -> None:
        """Release the lock; may be called again."""
        with self._mutex:
            if self._id is not None:
                (self._folder / self._id).unlink(missing_ok=True)
                os.close(self._descriptor)
                self._id = None

    def _forget(self, id: str) -> None:
        """Leave the lock to the process that has forked this one."""
        self._mutex = threading.Lock()  # another thread may have held it
        if self._id == id:
            os.close(self._descriptor)
            self._id = None

    @staticmethod
    def _lock(path: Path) -> int:
        """Create and lock a file. A process that looks at it in between may have removed it; then again."""
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return descriptor
            os.close(descriptor)

"""A file lock that tells other processes on the same home whether this one still runs.

Used by `store/idempotency.py`. The kernel releases the lock when the process ends, however it ends, so no clock decides
and nothing has to be renewed. The files are in `locks` in the home; the next process removes those of ended ones.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
import weakref
from pathlib import Path

from store.images import as_store_error


class ProcessLock:
    """The lock of this process, taken when it is first needed, and a look at those of others."""

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
                        self._is_held(path)
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
            return id == self._id or self._is_held(self._folder / id)
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

    @staticmethod
    def _is_held(path: Path) -> bool:
        """Tell whether a process holds a lock file; remove it if none does."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            return False
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)

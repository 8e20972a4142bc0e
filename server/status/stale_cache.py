"""A cache for one value that is expensive to load: used for a moment, then reloaded in the background.

Used by `queue_stats.py` and `dashboard.py`, one for each value of a server process. It must not be used where a stale
value would be wrong.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from store.errors import StoreError

log = logging.getLogger(__name__)

Value = TypeVar("Value")


class StaleCache(Generic[Value]):
    """One value. May be read from any thread.

    :param load: loads it; never called twice at once.
    :param fresh_seconds: the age up to which it is used without a reload.
    :param stale_seconds: the age up to which it is used while it is reloaded; beyond that readers wait.
    """

    def __init__(self, load: Callable[[], Value], *, fresh_seconds: float, stale_seconds: float) -> None:
        self._load = load
        self._fresh_seconds = fresh_seconds
        self._stale_seconds = stale_seconds
        self._lock = threading.Lock()
        self._entry: tuple[float, Value] | None = None

    def get(self) -> Value:
        """Return the value. :raises StoreError: it cannot be loaded, and there is none that may still be used."""
        entry = self._entry
        age = float("inf") if entry is None else time.monotonic() - entry[0]
        if entry is not None and age < self._stale_seconds:
            if age >= self._fresh_seconds and self._lock.acquire(blocking=False):
                self._start_refresh()
            return entry[1]
        with self._lock:
            if self._entry is entry or self._entry is None:
                self._entry = (time.monotonic(), self._load())
            return self._entry[1]

    def invalidate(self) -> None:
        """Let the next reader reload the value."""
        self._entry = None

    def _start_refresh(self) -> None:
        """Start the thread that reloads and then releases the lock."""
        try:
            threading.Thread(target=self._refresh_in_background, name="refresh", daemon=True).start()
        except RuntimeError as error:  # no more threads
            self._lock.release()
            log.warning("cannot refresh a cached value: %s", error)

    def _refresh_in_background(self) -> None:
        """Reload while readers use the old value; the caller has acquired the lock."""
        try:
            self._entry = (time.monotonic(), self._load())
        except StoreError as error:
            log.warning("cannot refresh a cached value: %s", error)
        finally:
            self._lock.release()

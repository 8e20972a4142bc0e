"""A figure that is costly to find, kept for a moment and found anew behind the readers' backs.

Used by `server/status/dashboard.py`, one for each figure of a server process. It must not be used where an old value
would be wrong rather than old.
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
    """One figure.

    :param load: finds it anew; never called twice at once.
    :param fresh_seconds: so long it is used as it is.
    :param stale_seconds: so long it is used while it is found anew; beyond that readers wait.
    """

    def __init__(self, load: Callable[[], Value], *, fresh_seconds: float, stale_seconds: float) -> None:
        self._load = load
        self._fresh_seconds = fresh_seconds
        self._stale_seconds = stale_seconds
        self._lock = threading.Lock()
        self._entry: tuple[float, Value] | None = None

    def get(self) -> Value:
        """Return the figure. :raises StoreError: there is none yet, or none that may still be used."""
        entry = self._entry
        age = float("inf") if entry is None else time.monotonic() - entry[0]
        if entry is not None and age < self._stale_seconds:
            if age >= self._fresh_seconds and self._lock.acquire(blocking=False):
                threading.Thread(target=self._refresh_in_background, name="figures", daemon=True).start()
            return entry[1]
        with self._lock:
            if self._entry is entry or self._entry is None:
                self._entry = (time.monotonic(), self._load())
            return self._entry[1]

    def invalidate(self) -> None:
        """Have the figure found anew by the next reader."""
        self._entry = None

    def _refresh_in_background(self) -> None:
        """Find it anew while readers use the old one; the caller has taken the lock for this."""
        try:
            self._entry = (time.monotonic(), self._load())
        except StoreError as error:
            log.warning("a figure could not be found anew: %s", error)
        finally:
            self._lock.release()

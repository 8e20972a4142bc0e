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

from provider_image.errors import StoreError

log = logging.getLogger(__name__)

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """One figure.

    :param find: finds it anew; never called twice at once.
    :param fresh_seconds: so long it is used as it is.
    :param stale_seconds: so long it is used while it is found anew; beyond that readers wait.
    """

    def __init__(self, find: Callable[[], Value], *, fresh_seconds: float, stale_seconds: float) -> None:
        self._find = find
        self._fresh_seconds = fresh_seconds
        self._stale_seconds = stale_seconds
        self._lock = threading.Lock()
        self._known: tuple[float, Value] | None = None

    def get(self) -> Value:
        """Return the figure. :raises StoreError: there is none yet, or none that may still be used."""
        known = self._known
        age = float("inf") if known is None else time.monotonic() - known[0]
        if known is not None and age < self._stale_seconds:
            if age >= self._fresh_seconds and self._lock.acquire(blocking=False):
                threading.Thread(target=self._renew_behind, name="figures", daemon=True).start()
            return known[1]
        with self._lock:
            if self._known is known or self._known is None:
                self._known = (time.monotonic(), self._find())
            return self._known[1]

    def forget(self) -> None:
        """Have the figure found anew by the next reader."""
        self._known = None

    def _renew_behind(self) -> None:
        """Find it anew while readers use the old one; the caller has taken the lock for this."""
        try:
            self._known = (time.monotonic(), self._find())
        except StoreError as error:
            log.warning("a figure could not be found anew: %s", error)
        finally:
            self._lock.release()

"""Holds reads until their request is done (`?wait=SECONDS`).

One thread per server process looks at the requests that are waited for, many times a second; while nobody waits there
is no thread. The answers come from other processes, so there is nothing to be notified by but the store itself.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field

from provider_image.errors import MlgError, StoreUnavailable
from store import Store
from store.records import Request

log = logging.getLogger(__name__)

#: Seconds between two looks.
LOOK_SECONDS = 0.025


@dataclass(eq=False)
class _Waiter:
    id: str
    is_over: threading.Event = field(default_factory=threading.Event)
    latest: Request | None = None
    error: Exception | None = None


class Notifier:
    """The reads that are held by one server process.

    :param most: how many may be held at once; others are answered at once.
    """

    def __init__(self, store: Store, *, most: int) -> None:
        self._store = store
        self._places = threading.BoundedSemaphore(max(1, most))
        self._lock = threading.Lock()
        self._waiters: set[_Waiter] = set()
        self._is_running = False
        self._is_stopped = False

    def hold(self, request: Request, seconds: float) -> Request:
        """Wait until the request is final, or the time is over, or there is no place; return it as it is then.

        :raises UnknownRequest: it was removed meanwhile. :raises StoreError:
        """
        if request.state.is_final or seconds <= 0 or not self._places.acquire(blocking=False):
            return request
        try:
            waiter = _Waiter(request.id)
            with self._lock:
                if self._is_stopped:
                    return request
                self._waiters.add(waiter)
                if not self._is_running:
                    self._is_running = True
                    threading.Thread(target=self._look, name="notifier", daemon=True).start()
            waiter.is_over.wait(seconds)
            with self._lock:
                self._waiters.discard(waiter)
            if waiter.error is not None:
                raise waiter.error
            return waiter.latest or request
        finally:
            self._places.release()

    def stop(self) -> None:
        """Answer everybody now, and hold nobody any more: the server is stopping."""
        with self._lock:
            self._is_stopped = True
            for waiter in self._waiters:
                waiter.is_over.set()

    def _look(self) -> None:
        while True:
            with self._lock:
                waiters = list(self._waiters)
                if not waiters or self._is_stopped:
                    self._is_running = False
                    return
            for waiter in waiters:
                self._look_at(waiter)
            time.sleep(LOOK_SECONDS)

    def _look_at(self, waiter: _Waiter) -> None:
        try:
            waiter.latest = self._store.get(waiter.id)
        except MlgError as error:
            waiter.error = error
        except Exception as error:
            # The thread must outlive any failure; the waiter gets it.
            log.exception("cannot look at a request that is waited for", extra={"request": waiter.id})
            waiter.error = StoreUnavailable()
            waiter.error.__cause__ = error
        else:
            if not waiter.latest.state.is_final:
                return
        waiter.is_over.set()

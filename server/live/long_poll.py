"""Holds reads until their request is done (`?wait=SECONDS`).

Used by the views. One thread per server process polls the requests that reads wait for; without a held read there is no
thread. The answers come from other processes, so the store is the only source of notifications.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field

from provider_image.errors import MlgError
from store.errors import StoreUnavailable
from store.requests import RequestRecord, Requests

log = logging.getLogger(__name__)

#: Seconds between two polls.
POLL_SECONDS = 0.025


@dataclass(eq=False)
class _Waiter:
    id: str
    is_over: threading.Event = field(default_factory=threading.Event)
    latest: RequestRecord | None = None
    error: Exception | None = None


class LongPoller:
    """The reads that are held by one server process.

    :param capacity: how many are held at once; further ones are answered at once.
    """

    def __init__(self, requests: Requests, *, capacity: int) -> None:
        self._requests = requests
        self._slots = threading.BoundedSemaphore(max(1, capacity))
        self._lock = threading.Lock()
        self._waiters: set[_Waiter] = set()
        self._is_running = False
        self._is_stopped = False

    def wait_until_final(self, request: RequestRecord, seconds: float) -> RequestRecord:
        """Wait until the request is final or the time is over; return its state then. Without a free slot, do not wait.

        :raises UnknownRequest: it was deleted meanwhile. :raises StoreError:
        """
        if request.state.is_final or seconds <= 0 or not self._slots.acquire(blocking=False):
            return request
        try:
            waiter = _Waiter(request.id)
            with self._lock:
                if self._is_stopped:
                    return request
                self._waiters.add(waiter)
                if not self._is_running:
                    self._is_running = True
                    threading.Thread(target=self._poll_loop, name="long-poll", daemon=True).start()
            waiter.is_over.wait(seconds)
            with self._lock:
                self._waiters.discard(waiter)
            if waiter.error is not None:
                raise waiter.error
            return waiter.latest or request
        finally:
            self._slots.release()

    def stop(self) -> None:
        """End all waits now, and hold no more reads: the server is stopping."""
        with self._lock:
            self._is_stopped = True
            for waiter in self._waiters:
                waiter.is_over.set()

    def _poll_loop(self) -> None:
        while True:
            with self._lock:
                waiters = list(self._waiters)
                if not waiters or self._is_stopped:
                    self._is_running = False
                    return
            for waiter in waiters:
                self._check(waiter)
            time.sleep(POLL_SECONDS)

    def _check(self, waiter: _Waiter) -> None:
        try:
            waiter.latest = self._requests.get(waiter.id)
        except MlgError as error:
            waiter.error = error
        except Exception as error:
            # The thread must survive any failure; the waiter raises it.
            log.exception("cannot read a request that a read waits for", extra={"request": waiter.id})
            waiter.error = StoreUnavailable()
            waiter.error.__cause__ = error
        else:
            if not waiter.latest.state.is_final:
                return
        waiter.is_over.set()

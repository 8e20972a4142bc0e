"""Holds reads until their request is final (`?wait=SECONDS`).

Used by the views. A held read listens to the changes of its request, see `changes.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from server.auth.limits import FairSlots
from server.errors import KeyRefused
from server.live.changes import ChangeDispatcher, Listener
from store.requests import RequestRecord, Requests


class LongPoller:
    """The reads that are held by one server process.

    :param capacity: how many are held at once, shared fairly by the clients; further ones are answered at once.
    :param check_seconds: a read looks at its request at least so often, because what is deleted has no further changes.
    """

    def __init__(
        self, change_dispatcher: ChangeDispatcher, requests: Requests, *, capacity: int, check_seconds: float = 5.0
    ) -> None:
        self._change_dispatcher = change_dispatcher
        self._requests = requests
        self._check_seconds = check_seconds
        self._slots = FairSlots(capacity)

    def count_held(self) -> int:
        """Count the reads that are held now."""
        return self._slots.count_held()

    def wait_until_final(
        self, request: RequestRecord, seconds: float, *, client: str | None = None, is_allowed: Callable[[], bool]
    ) -> RequestRecord:
        """Wait until the request is final or the time is over; return its state then. Without a free slot, do not wait.

        :param client: whose slot it takes, see `FairSlots`.
        :param is_allowed: see `Listener`.
        :raises UnknownRequest: it was deleted meanwhile. :raises KeyRefused: the caller's key was revoked meanwhile.
        :raises StoreError:
        """
        if request.state.is_final or seconds <= 0 or self._change_dispatcher.is_stopped:
            return request
        give_up_at = time.monotonic() + seconds
        listener = Listener(numbers=[request.number], is_allowed=is_allowed)
        with self._slots.holding(client) as is_held:
            if not is_held:
                return request
            with self._change_dispatcher.listening(listener):
                while True:
                    if not is_allowed():
                        raise KeyRefused()
                    # Read while the changes are listened to, so that none is missed.
                    request = self._requests.get(request.id)
                    left = give_up_at - time.monotonic()
                    if request.state.is_final or left <= 0 or self._change_dispatcher.is_stopped:
                        return request
                    listener.wait(min(left, self._check_seconds))

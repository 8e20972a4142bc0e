"""Live events: tells listeners what changes.

Used by `streams.py`, which writes what they hear. One thread per server process looks at the feed for all listeners
together, many times a second; while nobody listens there is no thread. When a request changes several times between
two looks, its listeners are told the last state only.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from provider_image.errors import MlgError
from store.changes import Feed, Position
from store.records import Request

log = logging.getLogger(__name__)

#: Seconds between two looks.
LOOK_SECONDS = 0.05
#: Changes that one look reads at most.
LOOK_CHANGES = 1000
#: Events that wait for a slow listener at most; then it is told from the feed again.
MOST_WAITING = 5000


class StreamsFull(MlgError):
    """Too many listeners already. Try again in a moment, or ask with ?wait=SECONDS instead."""

    code = "streams_full"


@dataclass(eq=False)
class Told:
    """What listeners are told of one request; the text is made once for all of them."""

    position: Position
    request: Request
    text: str | None = None


class Listener:
    """What one stream listens to, and what it has not read yet."""

    def __init__(self, *, numbers: Collection[int] = (), batch_id: str | None = None, is_all: bool = False) -> None:
        self.numbers = frozenset(numbers)
        self.batch_id = batch_id
        self.is_all = is_all
        self._condition = threading.Condition()
        self._waiting: collections.deque[Told] = collections.deque()
        self._is_woken = False
        self._is_behind = False

    def put(self, told: Told) -> None:
        """Hand over an event."""
        with self._condition:
            if len(self._waiting) >= MOST_WAITING:
                self._waiting.clear()
                self._is_behind = True
            if not self._is_behind:
                self._waiting.append(told)
            self._is_woken = True
            self._condition.notify()

    def wake(self) -> None:
        """End a wait without an event."""
        with self._condition:
            self._is_woken = True
            self._condition.notify()

    def wait(self, seconds: float) -> list[Told] | None:
        """Wait for events. :return: those there are; None when too many came, and the feed must be asked."""
        with self._condition:
            if not self._is_woken:
                self._condition.wait(seconds)
            self._is_woken = False
            if self._is_behind:
                self._is_behind = False
                return None
            found = list(self._waiting)
            self._waiting.clear()
            return found


class Events:
    """The listeners of one server process.

    :param most: how many there may be.
    """

    def __init__(self, feed: Feed, *, most: int) -> None:
        self._feed = feed
        self._places = threading.BoundedSemaphore(max(1, most))
        self._lock = threading.Lock()
        self._listeners: set[Listener] = set()
        self._by_number: dict[int, set[Listener]] = collections.defaultdict(set)
        self._by_batch: dict[str, set[Listener]] = collections.defaultdict(set)
        self._cursor = 0
        self._is_running = False
        self.is_stopped = False

    def take_place(self) -> None:
        """Take a listener's place. :raises StreamsFull:"""
        if self.is_stopped or not self._places.acquire(blocking=False):
            raise StreamsFull()

    def free_place(self) -> None:
        """Give a place back."""
        self._places.release()

    def add(self, listener: Listener) -> None:
        """Tell a listener every change that is made from now on. :raises StoreError:"""
        with self._lock:
            if not self._is_running and not self.is_stopped:
                # Read here and not by the thread: what changes before it starts must be told too.
                self._cursor = self._feed.latest_change()
                self._is_running = True
                threading.Thread(target=self._look, name="events", daemon=True).start()
            self._listeners.add(listener)
            for number in listener.numbers:
                self._by_number[number].add(listener)
            if listener.batch_id is not None:
                self._by_batch[listener.batch_id].add(listener)

    def remove(self, listener: Listener) -> None:
        """Tell a listener nothing any more."""
        with self._lock:
            self._listeners.discard(listener)
            for number in listener.numbers:
                self._forget(self._by_number, number, listener)
            if listener.batch_id is not None:
                self._forget(self._by_batch, listener.batch_id, listener)

    def stop(self) -> None:
        """End every stream now, and begin none any more: the server is stopping."""
        with self._lock:
            self.is_stopped = True
            for listener in self._listeners:
                listener.wake()

    def _look(self) -> None:
        while True:
            with self._lock:
                if not self._listeners or self.is_stopped:
                    self._is_running = False
                    return
            try:
                count = self._tell()
            except MlgError as error:
                log.warning("cannot look for changes: %s", error)
                count = 0
            except Exception:
                # The thread must outlive any failure: there are listeners.
                log.exception("cannot look for changes")
                count = 0
            if count < LOOK_CHANGES:
                time.sleep(LOOK_SECONDS)

    def _tell(self) -> int:
        """Hand the changes since the last look to those who listen to them. :return: how many there were."""
        changes = self._feed.changes(self._cursor, limit=LOOK_CHANGES)
        if not changes:
            return 0
        #: number -> its last change, and who wants to know.
        latest = {change.number: change for change in changes}
        wanted: dict[int, set[Listener]] = {}
        with self._lock:
            for number, change in latest.items():
                found = self._by_number.get(number, set()) | self._by_batch.get(change.batch_id or "", set())
                if found:
                    wanted[number] = found
            for listener in self._listeners:
                if listener.is_all:
                    listener.wake()
        for position, request in self._feed.read_changed(wanted) if wanted else ():
            # What changed again meanwhile comes with the next look, under its later number.
            if position[0] == latest[request.number].seq:
                told = Told(position, request)
                for listener in wanted[request.number]:
                    listener.put(told)
        self._cursor = changes[-1].seq
        return len(changes)

    @staticmethod
    def _forget(index: dict[Any, set[Listener]], key: Any, listener: Listener) -> None:
        index[key].discard(listener)
        if not index[key]:
            del index[key]

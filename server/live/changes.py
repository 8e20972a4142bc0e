"""Notifies listeners of changes to requests.

Used by `sse.py`, which writes them as events, and by `long_poll.py`. One thread per server process polls the feed
for all listeners; without a listener there is no thread. When a request changes several times between two polls, its
listeners get the last state only. Listeners that follow progress get the latest report of each request too. The thread
also checks each listener's API key again, and ends those whose key is not valid any more.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from provider_image.errors import MlgError
from server.auth.limits import FairSlots
from server.errors import StreamsFull
from store.changes import Changes, Position
from store.processes.progress import Progress, ProgressRecord
from store.requests import RequestRecord

log = logging.getLogger(__name__)

#: Seconds between two polls.
POLL_SECONDS = 0.025
#: Seconds between two polls of what workers report.
PROGRESS_POLL_SECONDS = 0.25
#: Changes that one poll reads.
MAX_CHANGES_PER_POLL = 1000


@dataclass(eq=False)
class Change:
    """One change of a request; the text is built once for all listeners."""

    position: Position
    request: RequestRecord
    text: str | None = None


class Listener:
    """What one stream listens to, and the changes that it has not read yet.

    :param is_allowed: tells whether it may still listen; called again and again, must not raise.
    :param follows_progress: gets what workers report, too.
    """

    def __init__(
        self,
        *,
        is_allowed: Callable[[], bool],
        numbers: Collection[int] = (),
        batch_id: str | None = None,
        is_all: bool = False,
        follows_progress: bool = False,
    ) -> None:
        self.is_allowed = is_allowed
        self.follows_progress = follows_progress
        self.batch_id = batch_id
        self.is_all = is_all
        #: True once nothing may be read from it any more.
        self.is_ended = False
        #: The requests and the batch, by which the dispatcher finds it.
        self.keys: set[int | str] = {*numbers, *(() if batch_id is None else (batch_id,))}
        self._condition = threading.Condition()
        self._pending: collections.deque[Change] = collections.deque()
        #: Number of a request -> its latest report.
        self._progress: dict[int, ProgressRecord] = {}
        self._is_notified = False
        self._has_overflowed = False

    def put(self, change: Change, *, max_pending: int) -> None:
        """Add a change. :param max_pending: beyond that many, the listener reads them from the feed again."""
        with self._condition:
            if len(self._pending) >= max_pending:
                self._pending.clear()
                self._has_overflowed = True
            if not self._has_overflowed:
                self._pending.append(change)
            self._is_notified = True
            self._condition.notify()

    def put_progress(self, progress: ProgressRecord) -> None:
        """Replace the report of a request."""
        with self._condition:
            self._progress[progress.number] = progress
            self._is_notified = True
            self._condition.notify()

    def take_progress(self) -> list[ProgressRecord]:
        """Return the reports since the last call, the latest of each request."""
        with self._condition:
            found = list(self._progress.values())
            self._progress.clear()
            return found

    def wake(self) -> None:
        """End a wait without a change."""
        with self._condition:
            self._is_notified = True
            self._condition.notify()

    def end(self) -> None:
        """End its waits from now on."""
        with self._condition:
            self.is_ended = True
            self._condition.notify()

    def wait(self, seconds: float) -> list[Change] | None:
        """Wait for changes. :return: the pending ones; None when there were too many, and the feed must be read."""
        with self._condition:
            if not self._is_notified and not self.is_ended:
                self._condition.wait(seconds)
            self._is_notified = False
            if self._has_overflowed:
                self._has_overflowed = False
                return None
            found = list(self._pending)
            self._pending.clear()
            return found


class ChangeDispatcher:
    """The listeners of one server process; `capacity` of them have a slot, shared fairly by the clients."""

    def __init__(
        self,
        changes: Changes,
        progress: Progress,
        *,
        capacity: int,
        heartbeat_seconds: float = 15.0,
        max_pending: int = 5000,
        check_seconds: float = 1.0,
    ) -> None:
        self._changes = changes
        self._progress = progress
        #: Time after which an idle stream sends a comment; so a client that has disconnected is noticed.
        self.heartbeat_seconds = heartbeat_seconds
        #: Changes that are pending for a slow listener at most.
        self.max_pending = max_pending
        #: Time after which it is checked again whether the listeners are allowed.
        self.check_seconds = check_seconds
        self._slots = FairSlots(capacity)
        self._lock = threading.Lock()
        self._listeners: set[Listener] = set()
        #: Number of a request or id of a batch -> its listeners.
        self._by_key: dict[int | str, set[Listener]] = collections.defaultdict(set)
        self._cursor = 0
        self._progress_cursor = 0
        self._is_running = False
        self.is_stopped = False

    def acquire_slot(self, client: str | None) -> None:
        """Acquire a slot for a listener of a client. :raises StreamsFull:"""
        if self.is_stopped or not self._slots.acquire(client):
            raise StreamsFull()

    def release_slot(self, client: str | None) -> None:
        """Release a slot."""
        self._slots.release(client)

    @contextlib.contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Notify a listener of every change inside of the `with` statement. :raises StoreError:"""
        if not listener.is_allowed():
            listener.end()
        with self._lock:
            if not self._is_running and not self.is_stopped:
                # Read here and not by the thread, so that changes before it starts are included.
                self._cursor = self._changes.latest()
                self._progress_cursor = self._progress.latest()
                threading.Thread(target=self._poll_loop, name="events", daemon=True).start()
                self._is_running = True
            self._listeners.add(listener)
            for key in listener.keys:
                self._by_key[key].add(listener)
            if self.is_stopped:
                listener.end()
        try:
            yield
        finally:
            with self._lock:
                self._listeners.discard(listener)
                for key in listener.keys:
                    self._by_key[key].discard(listener)
                    if not self._by_key[key]:
                        del self._by_key[key]

    def stop(self) -> None:
        """End every stream now, and begin none any more: the server is stopping."""
        with self._lock:
            self.is_stopped = True
            for listener in self._listeners:
                listener.end()

    def _poll_loop(self) -> None:
        checked_at = progress_at = time.monotonic()
        while True:
            with self._lock:
                if not self._listeners or self.is_stopped:
                    self._is_running = False
                    return
            count = 0
            try:
                if time.monotonic() - checked_at >= self.check_seconds:
                    checked_at = time.monotonic()
                    self._end_refused_listeners()
                count = self._dispatch_changes()
                if time.monotonic() - progress_at >= PROGRESS_POLL_SECONDS:
                    progress_at = time.monotonic()
                    self._dispatch_progress()
            except MlgError as error:
                log.warning("cannot read the changes: %s", error)
            except Exception:
                # The thread must survive any failure: there are listeners.
                log.exception("cannot read the changes")
            if count < MAX_CHANGES_PER_POLL:
                time.sleep(POLL_SECONDS)

    def _end_refused_listeners(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            if not listener.is_allowed():
                listener.end()

    def _dispatch_changes(self) -> int:
        """Add the changes since the last poll to their listeners. :return: how many there were."""
        changes = self._changes.list(self._cursor, limit=MAX_CHANGES_PER_POLL)
        if not changes:
            return 0
        #: number -> its last change.
        latest = {change.number: change for change in changes}
        interested: dict[int, set[Listener]] = {}
        with self._lock:
            for number, change in latest.items():
                found = self._by_key.get(number, set()) | self._by_key.get(change.batch_id or "", set())
                if found:
                    interested[number] = found
            for listener in self._listeners:
                if listener.is_all:
                    listener.wake()
        for position, request in self._changes.read_changed(interested) if interested else ():
            # A request that changed again meanwhile comes with the next poll, under its later position.
            if position[0] == latest[request.number].seq:
                found_change = Change(position, request)
                for listener in interested[request.number]:
                    listener.put(found_change, max_pending=self.max_pending)
        self._cursor = changes[-1].seq
        return len(changes)

    def _dispatch_progress(self) -> None:
        """Pass on what workers reported since the last poll."""
        with self._lock:
            if not any(listener.follows_progress for listener in self._listeners):
                return  # one that comes later gets the next report
        reports = self._progress.list(self._progress_cursor)
        for report in reports:
            self._progress_cursor = report.seq
            with self._lock:
                found = self._by_key.get(report.number, set()) | self._by_key.get(report.batch_id or "", set())
            for listener in found:
                if listener.follows_progress:
                    listener.put_progress(report)

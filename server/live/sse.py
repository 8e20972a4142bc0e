"""Streams of server-sent events, as text that is sent piece by piece.

Used by `server/api/views/events.py`. Every stream has its own thread, which waits for the changes of `changes.py` and
writes them.

The id of an event is the position of its request in the change feed (see `store/changes.py`), written as a cursor of
the client's key. Events come in the order of the positions, so a client that reconnects with the last id it has seen
(`Last-Event-ID`) gets what it missed, and nothing twice.

Weakness: a client that keeps its connection open and reads nothing holds its thread and its slot until its connection
ends. Slots are limited (MLG_MAX_STREAMS) and have their own threads, so uploads are not affected.
"""

from __future__ import annotations

import collections
import json
import logging
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from typing import Any

from provider_image.errors import MlgError
from server.auth.cursors import CursorCodec
from server.live.changes import Change, ChangeDispatcher, Listener
from server.serializers import serialize_progress
from store.changes import Changes, Position
from store.requests import RequestRecord
from store.states import RequestState

log = logging.getLogger(__name__)

#: Marks a response that is sent piece by piece; see `server/process.py`.
STREAMED = "mlg.streamed"
#: Delay before a browser reconnects.
RETRY_MILLISECONDS = 2000
#: Seconds between two messages of a stream of counts.
COUNT_SECONDS = 0.5
#: Requests that are read in one query when a stream begins.
PAGE_SIZE = 200
#: In place of a request's number: after all requests of that change.
_AFTER_CHANGE = 2**62
_START: Position = (-1, -1)
_END = ".end"


class Stream:
    """The body of a response, piece by piece; an error ends it. Releases its slot however it ends.

    :param listener: no piece is written after its end, also to a client that reads slowly what happened before.
    """

    def __init__(self, pieces: Generator[bytes, None, None], listener: Listener, on_close: Callable[[], None]) -> None:
        self._pieces = pieces
        self._listener = listener
        self._on_close: Callable[[], None] | None = on_close

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> bytes:
        try:
            if not self._listener.is_ended:
                return next(self._pieces)
        except StopIteration:
            raise
        except MlgError as error:
            log.warning("a stream of events ends: %s", error)
        except Exception:
            # The response has begun, so the error can only be logged; the client reconnects.
            log.exception("a stream of events ends")
        raise StopIteration

    def close(self) -> None:
        """End the stream. May be called again."""
        on_close, self._on_close = self._on_close, None
        self._pieces.close()
        if on_close is not None:
            on_close()


def stream_requests(
    change_dispatcher: ChangeDispatcher,
    feed: Changes,
    listener: Listener,
    *,
    cursors: CursorCodec,
    ids: Collection[str],
    last_id: str | None,
    serialize: Callable[[RequestRecord], Mapping[str, Any]],
) -> Generator[bytes, None, None]:
    """Write the events of some requests, or of the listener's batch, until all of them are final.

    :param last_id: the last id that the client has seen.
    :param serialize: builds the JSON of a request.
    """
    yield f"retry: {RETRY_MILLISECONDS}\n\n".encode()
    with change_dispatcher.listening(listener):
        cursor = _position(cursors, last_id)
        while not listener.is_ended:
            snapshot = feed.snapshot(ids=ids, batch_id=listener.batch_id)
            if not snapshot.floor <= cursor[0] <= snapshot.latest:
                cursor = _START  # too old, or of another database
            states = {position[1]: state for position, state in snapshot.requests}
            missed = [
                (position, state)
                for position, state in snapshot.requests
                # The queued requests of a batch are in its counts.
                if position > cursor
                and (listener.batch_id is None or position[0] > snapshot.floor or state is not RequestState.QUEUED)
            ]
            for start in range(0, len(missed), PAGE_SIZE):
                page = {position[1]: position for position, _ in missed[start : start + PAGE_SIZE]}
                read = {now: request for now, request in feed.read_changed(page) if now[0] <= snapshot.latest}
                # Requests that changed meanwhile come from the dispatcher, at their new position.
                requests = {request.number: request for request in read.values()}
                for number, position in page.items():
                    if number in requests:
                        yield _event(Change(position, requests[number]), serialize, cursors, snapshot.floor)
            yield from _batch_counts(listener, states)
            last = yield from _stream_changes(change_dispatcher, listener, states, snapshot.latest, serialize, cursors)
            if last is None:
                return
            cursor = (last, _AFTER_CHANGE)


def stream_counts(
    change_dispatcher: ChangeDispatcher,
    feed: Changes,
    listener: Listener,
    *,
    cursors: CursorCodec,
    last_id: str | None,
) -> Generator[bytes, None, None]:
    """Write how many requests changed to which state since the last message, until the client disconnects."""
    yield f"retry: {RETRY_MILLISECONDS}\n\n".encode()
    with change_dispatcher.listening(listener):
        last, _ = _position(cursors, last_id)
        cursor = last if last >= 0 else feed.latest()
        while not listener.is_ended:
            latest, counts = feed.count(cursor)
            if latest > cursor:
                cursor = latest
                data = {"changes": {str(state): count for state, count in counts.items()}}
                id = cursors.write(cursor, _AFTER_CHANGE)
                yield f"id: {id}\nevent: changes\ndata: {json.dumps(data)}\n\n".encode()
                time.sleep(COUNT_SECONDS)
            began = time.monotonic()
            listener.wait(change_dispatcher.heartbeat_seconds)
            if time.monotonic() - began >= change_dispatcher.heartbeat_seconds:
                yield b": alive\n\n"


def is_end_id(text: str | None) -> bool:
    """Tell whether a client has received the end of its stream."""
    return text is not None and text.endswith(_END)


def _position(cursors: CursorCodec, id: str | None) -> Position:
    """Read the position of a client; any text that is not an event id of its key is the start."""
    found = cursors.read((id or "").removesuffix(_END))
    return _START if found is None else (found[0], found[1])


def _stream_changes(
    change_dispatcher: ChangeDispatcher,
    listener: Listener,
    states: dict[int, RequestState],
    covered: int,
    serialize: Callable[[RequestRecord], Mapping[str, Any]],
    cursors: CursorCodec,
) -> Generator[bytes, None, int | None]:
    """Write events as changes arrive, until all requests are final, the server stops or the listener overflows.

    :param states: state of each request by number; kept up to date.
    :param covered: changes up to this one are written already.
    :return: if the listener has too many pending changes, the last change that was written; else None.
    """
    last = covered
    while not listener.is_ended:
        if all(state.is_final for state in states.values()):
            id = cursors.write(last, _AFTER_CHANGE) + _END
            yield f"id: {id}\nevent: end\ndata: {json.dumps(_counts(states))}\n\n".encode()
            return None
        began = time.monotonic()
        found = listener.wait(change_dispatcher.heartbeat_seconds)
        if found is None:
            return last
        has_changes = False
        for change in found:
            if change.position[0] > covered:
                states[change.request.number] = change.request.state
                last, has_changes = change.position[0], True
                yield _event(change, serialize, cursors)
        for report in listener.take_progress():
            if states.get(report.number) is RequestState.CLAIMED:
                # Without an id: a client that reconnects gets the next one.
                data = {"req_id": report.id, **serialize_progress(report)}
                yield f"event: progress\ndata: {json.dumps(data)}\n\n".encode()
        if has_changes:
            yield from _batch_counts(listener, states)
        elif time.monotonic() - began >= change_dispatcher.heartbeat_seconds:
            yield b": alive\n\n"
    return None


def _batch_counts(listener: Listener, states: Mapping[int, RequestState]) -> Iterator[bytes]:
    """Write the counts of a batch; they have no id, as a client that reconnects gets a new one anyway."""
    if listener.batch_id is not None:
        data = {"batch_id": listener.batch_id, **_counts(states)}
        yield f"event: batch\ndata: {json.dumps(data)}\n\n".encode()


def _counts(states: Mapping[int, RequestState]) -> dict[str, Any]:
    counted = collections.Counter(states.values())
    return {"items": len(states), **{str(state): counted[state] for state in RequestState}}


def _event(
    change: Change, serialize: Callable[[RequestRecord], Mapping[str, Any]], cursors: CursorCodec, floor: int = -1
) -> bytes:
    if change.text is None:
        change.text = json.dumps(serialize(change.request), separators=(",", ":"), ensure_ascii=False)
    seq, number = change.position
    id = cursors.write(seq, _AFTER_CHANGE if seq > floor else number)
    return f"id: {id}\nevent: request\ndata: {change.text}\n\n".encode()

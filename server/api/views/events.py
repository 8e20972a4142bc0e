"""Views of live events: streams of the changes of some requests, of a batch, and of all requests for operators.

They check what the caller may see; `server/live/sse.py` writes the streams.
"""

from __future__ import annotations

import functools
from collections.abc import Generator

import flask

from provider_image.errors import InvalidParams
from server.api.responses import set_headers
from server.auth.guard import caller_check, current_key_id, is_owner, visible_key_id
from server.context import Views
from server.endpoint import Field, operation
from server.errors import ScopeMissing
from server.intake.uploads import query_fields
from server.live.changes import Listener
from server.live.sse import STREAMED, Stream, is_end_id, stream_counts, stream_requests
from store.clients.keys import Scope
from store.errors import UnknownRequest

#: Requests of one stream.
MAX_IDS = 1000
_IDS = Field(name="ids", help=f"Request ids with commas between, at most {MAX_IDS}.")
_ALL = Field(
    name="all",
    help="1: how many requests change to which state, those of all keys; needs the scope operate.",
    schema={"type": "string", "enum": ["1"]},
)
_operation = functools.partial(
    operation, tag="events", scope=Scope.READ, content_type="text/event-stream", responses={204: {}}
)


class EventViews(Views):
    """The views of live events."""

    @_operation(
        "GET /events",
        "Stream requests: an event whenever one changes, until all are final",
        query=(_IDS, _ALL),
    )
    def events(self) -> flask.Response:
        """Stream the changes of the requests in `ids`."""
        fields = query_fields(flask.request)
        is_all, ids = fields.pop("all", None), fields.pop("ids", None)
        if fields or (is_all is None) == (ids is None) or is_all not in (None, "1"):
            raise InvalidParams("Name the requests: /events?ids=ID,ID (or, for operators, /events?all=1).")
        if ids is None:
            return self._stream_all()
        wanted = list(dict.fromkeys(id for id in ids.split(",") if id))
        if not 1 <= len(wanted) <= MAX_IDS:
            raise InvalidParams(f"ids takes 1 to {MAX_IDS} request ids with commas between.")
        store = self._store
        numbers = [position[1] for position, _ in store.changes.snapshot(ids=wanted).requests]
        visible = {request.id for _, request in store.changes.read_changed(numbers) if is_owner(request)}
        unknown = set(wanted) - visible
        if unknown:
            raise UnknownRequest(f"There is no request {min(unknown)[:64]}. It was never accepted here, or is deleted.")
        return self._stream(Listener(numbers=numbers, is_allowed=caller_check(), follows_progress=True), ids=wanted)

    @_operation(
        "GET /batches/<id>/events",
        "Stream a batch: its progress, and an event whenever one of its requests changes",
    )
    def batch_events(self, id: str) -> flask.Response:
        """Stream the changes of a batch."""
        self._get_batch(id)
        return self._stream(Listener(batch_id=id, is_allowed=caller_check(), follows_progress=True), ids=[])

    def _stream(self, listener: Listener, *, ids: list[str]) -> flask.Response:
        context, last_id = self._context, flask.request.headers.get("Last-Event-ID")
        if is_end_id(last_id) and self._is_final(listener, ids):
            # The only response after which a browser's EventSource does not reconnect.
            return flask.Response(status=204)
        pieces = stream_requests(
            context.change_dispatcher,
            context.store.changes,
            listener,
            cursors=self._cursors("events"),
            ids=ids,
            last_id=last_id,
            serialize=context.serialize,
        )
        return self._response(pieces, listener)

    def _stream_all(self) -> flask.Response:
        if visible_key_id() is not None:
            raise ScopeMissing("/events?all=1 needs an API key with the scope operate.")
        last_id = flask.request.headers.get("Last-Event-ID")
        listener = Listener(is_all=True, is_allowed=caller_check())
        pieces = stream_counts(
            self._context.change_dispatcher,
            self._store.changes,
            listener,
            cursors=self._cursors("events"),
            last_id=last_id,
        )
        return self._response(pieces, listener)

    def _is_final(self, listener: Listener, ids: list[str]) -> bool:
        snapshot = self._store.changes.snapshot(ids=ids, batch_id=listener.batch_id)
        return all(state.is_final for _, state in snapshot.requests)

    def _response(self, pieces: Generator[bytes, None, None], listener: Listener) -> flask.Response:
        change_dispatcher = self._context.change_dispatcher
        client = current_key_id()
        change_dispatcher.acquire_slot(client)
        flask.request.environ[STREAMED] = True
        response = flask.Response(
            Stream(pieces, listener, functools.partial(change_dispatcher.release_slot, client)),
            mimetype="text/event-stream",
        )
        set_headers(response)
        # A proxy must not buffer events.
        response.headers["X-Accel-Buffering"] = "no"
        return response

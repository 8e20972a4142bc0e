"""Views of requests: the list with its filters, the details of one, its image, delete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flask

from provider_image import errors
from provider_image.models.registry import find_row
from server.api.query import CURSOR, LIMIT, PageQuery, check_names, to_cursor
from server.api.responses import json_response
from server.api.thumbnails import (
    MAX_THUMBNAIL_PIXELS,
    MIN_THUMBNAIL_PIXELS,
    media_type,
    thumbnail,
)
from server.auth.guard import owned
from server.context import Context
from server.endpoint import Field, operation
from server.intake.request_options import LABEL, parse_labels, parse_timestamp
from server.intake.uploads import clean_name, query_fields
from server.serializers import is_image
from store.errors import ImageGone, UnknownFile
from store.keys import Scope
from store.requests import RequestRecord
from store.rows import to_text
from store.search import Query
from store.states import EXPIRED, RequestState

_STATUSES = (*map(str, RequestState), EXPIRED)
_FILTERS = (
    Field(name="state", help="Only those in this state.", schema={"type": "string", "enum": list(_STATUSES)}),
    Field(name="model", help="Only those for this model."),
    Field(name="batch", help="Only those of this batch."),
    LABEL,
    Field(name="since", help="Only those created at this time or later.", schema={"type": "string"}),
    Field(name="until", help="Only those created before this time.", schema={"type": "string"}),
    Field(name="q", help="Only those whose file name contains this."),
)
_SIZE = Field(
    name="size",
    help="Returns a JPEG that fits into a square of so many pixels; without it the image is returned as it was sent.",
    schema={"type": "integer", "minimum": MIN_THUMBNAIL_PIXELS, "maximum": MAX_THUMBNAIL_PIXELS},
)


def register(app: flask.Flask, context: Context) -> None:
    """Add the views to an application."""
    views = _RequestViews(context)
    for rule, method, view in (
        ("/requests", "GET", views.list_requests),
        ("/requests/<id>", "GET", views.show_request),
        ("/requests/<id>/picture", "GET", views.show_picture),
        ("/requests/<id>/files/<name>", "GET", views.show_file),
        ("/requests/<id>/delete", "POST", views.delete_request),
    ):
        app.add_url_rule(rule, view.__name__, view, methods=[method])


class _RequestViews:
    def __init__(self, context: Context) -> None:
        self._context = context

    @operation(
        summary="List requests, newest first",
        scope=Scope.READ,
        tag="requests",
        query=(*_FILTERS, CURSOR, LIMIT),
        responses={200: "Requests"},
    )
    def list_requests(self) -> flask.Response:
        """List requests. A page may be short although more follow: `next` tells whether they do."""
        page = PageQuery.from_request(flask.request, [field.name for field in _FILTERS], repeatable="label")
        fields = page.fields
        status = fields.get("state")
        if status is not None and status not in _STATUSES:
            raise errors.InvalidParams(f"state takes one of: {', '.join(_STATUSES)}.")
        query = Query(
            status=status,
            model=self._model(fields.get("model")),
            batch_id=fields.get("batch"),
            key_id=page.key_id,
            labels=tuple(parse_labels(flask.request.args.getlist("label")).items()),
            since=parse_timestamp("since", fields["since"]) if "since" in fields else None,
            until=parse_timestamp("until", fields["until"]) if "until" in fields else None,
            text=fields.get("q", "")[:200] or None,
        )
        found = self._context.store.search.find(query, before=page.before, limit=page.limit)
        shown = [self._context.serialize(request) for request in found.requests]
        return json_response({"success": True, "requests": shown, "next": to_cursor(found.next_before)})

    @operation(
        summary="Read all details of a request, and what happened to it",
        scope=Scope.READ,
        tag="requests",
        responses={200: "Detail"},
    )
    def show_request(self, id: str) -> flask.Response:
        """Show a request with its timeline."""
        request = owned(self._context.store.requests.get, id)
        shown = self._context.serialize(request)
        shown |= {
            "params": dict(request.params),
            "image_sha256": request.image_sha256,
            "image_bytes": request.image_bytes,
            "picture_url": None if request.image_deleted_at is not None else f"/requests/{request.id}/picture",
            "timeline": self._timeline(request),
        }
        if request.deadline_at is not None:
            shown["deadline_at"] = to_text(request.deadline_at)
        if request.keep_seconds is not None:
            shown["keep_seconds"] = request.keep_seconds
        return json_response({"success": True, **shown})

    @operation(
        summary="The image of a request, or a thumbnail of it",
        scope=Scope.READ,
        tag="requests",
        query=(_SIZE,),
        responses={200: {"type": "string", "format": "binary"}, 410: "Error"},
        content_type="image/*",
    )
    def show_picture(self, id: str) -> flask.Response:
        """Return the image as it was sent, or a thumbnail; for a service without images its first input."""
        fields = query_fields(flask.request)
        size = _size(fields)
        request = owned(self._context.store.requests.get, id)
        if request.image_deleted_at is not None:
            raise ImageGone()
        data = self._read_stored(request.image_sha256)
        max_pixels = self._context.settings.max_pixels
        etag = f"{request.image_sha256}-{size or 'whole'}"
        if size is None:
            kind = media_type(data, max_pixels) if is_image(request) else "application/octet-stream"
            return _file_response(data, kind, etag=etag, name=clean_name(request.name) or "picture")
        if etag in flask.request.if_none_match:
            data = b""  # not sent
        else:
            with self._context.work_slots:
                data = thumbnail(data, size, max_pixels)
        return _file_response(data, "image/jpeg", etag=etag)

    @operation(
        summary="A file of an answer",
        scope=Scope.READ,
        tag="requests",
        responses={200: {"type": "string", "format": "binary"}, 410: "Error"},
        content_type="*/*",
    )
    def show_file(self, id: str, name: str) -> flask.Response:
        """Return a file that the answer has beside its JSON."""
        check_names(query_fields(flask.request), ())
        request = owned(self._context.store.requests.get, id)
        if name not in request.files:
            raise UnknownFile(f"The answer has no file {name[:64]!r}. Its files: {', '.join(request.files) or 'none'}.")
        file = request.files[name]
        return _file_response(self._read_stored(file.sha256), file.media_type, etag=file.sha256, name=name)

    @operation(
        summary="Delete a request that has ended, with its image and answer",
        scope=Scope.SUBMIT,
        tag="requests",
        responses={200: {"type": "object", "required": ["success", "req_id"]}, 409: "Error"},
    )
    def delete_request(self, id: str) -> flask.Response:
        """Delete a request."""
        owned(self._context.store.requests.get, id)
        self._context.store.requests.remove(id)
        return json_response({"success": True, "req_id": id, "status": "deleted"})

    def _read_stored(self, sha256: str) -> bytes:
        try:
            return self._context.store.images.read(sha256)
        except FileNotFoundError as error:
            raise ImageGone() from error

    def _model(self, name: str | None) -> str | None:
        """Return a model's canonical name; the name as given for one that is not in the catalogue any more."""
        if name is None:
            return None
        try:
            return find_row(self._context.settings.models, name).name
        except errors.UnknownModel:
            return name

    def _timeline(self, request: RequestRecord) -> list[dict[str, Any]]:
        """List what happened to a request, in order."""
        events: list[dict[str, Any]] = [{"event": "received", "at": to_text(request.created_at)}]
        if request.is_cached:
            events.append({"event": "answered", "at": to_text(request.finished_at or request.created_at), "by": "an "
                           "earlier answer to the same image"})  # fmt: skip
            return events
        events.append({"event": "queued", "at": to_text(request.created_at)})
        if request.claimed_at is not None:
            events.append({"event": "claimed", "at": to_text(request.claimed_at)})
        chunk = None if request.chunk_id is None else self._context.store.chunks.get(request.chunk_id)
        if chunk is not None and request.state is RequestState.DONE:
            events.append(
                {
                    "event": "dispatched",
                    "at": to_text(chunk.dispatched_at),
                    "to": chunk.provider,
                    "executor": chunk.executor,
                    "with": chunk.items - 1,
                }
            )
        if request.finished_at is not None:
            ended: dict[str, Any] = {
                "event": "answered" if request.state is RequestState.DONE else request.status,
                "at": to_text(request.finished_at),
            }
            if request.state is RequestState.DONE:
                ended["by"] = request.provider
            elif request.reason is not None:
                ended["reason"] = request.reason
            events.append(ended)
        return events


def _file_response(data: bytes, content_type: str, *, etag: str, name: str | None = None) -> flask.Response:
    """Respond with bytes of a client or a provider, which a browser must not take for a page.

    :param name: for a browser that saves it; only images are shown.
    """
    if etag in flask.request.if_none_match:
        response = flask.Response(status=304)
    else:
        response = flask.Response(data, content_type=content_type + "; charset=utf-8" * (content_type == "text/plain"))
        if name is not None:
            disposition = "inline" if content_type.startswith("image/") else "attachment"
            response.headers.set("Content-Disposition", disposition, filename=name.encode("ascii", "replace").decode())
    response.set_etag(etag)
    # Its owner's browser may cache it, but validates it each time, because it may be deleted.
    response.headers["Cache-Control"] = "private, no-cache"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Content-Security-Policy"] = "default-src 'none'; sandbox"
    return response


def _size(fields: Mapping[str, str]) -> int | None:
    check_names(fields, ("size",))
    text = fields.get("size")
    if text is None:
        return None
    smallest, largest = MIN_THUMBNAIL_PIXELS, MAX_THUMBNAIL_PIXELS
    if not text.isascii() or not text.isdigit() or len(text) > 4 or not smallest <= int(text) <= largest:
        raise errors.InvalidParams(f"size takes a whole number of pixels from {smallest} to {largest}.")
    return int(text)

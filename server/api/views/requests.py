"""Looking through many requests, and at one of them closely: its facts, its way here, its picture, its end.

Registered by `api.py`. The pages ask here for pictures, and programs for everything.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flask

from provider_image import errors
from provider_image.errors import MalformedRequest
from provider_image.models.registry import find_row
from server.api.endpoint import Field, operation
from server.api.responses import json_response
from server.auth.guard import check_owner, current_key_id, is_owner
from server.context import Context
from server.intake.request_options import LABEL, parse_timestamp, read_labels
from server.intake.uploads import clean_name, query_fields
from store.batches import EXPIRED
from store.errors import ImageGone
from store.keys import Scope
from store.records import RequestRecord, RequestState, to_text
from store.search import Query

#: Requests on a page.
MAX_PAGE_SIZE = 200
DEFAULT_PAGE_SIZE = 50
_STATUSES = (*map(str, RequestState), EXPIRED)
CURSOR = Field(name="cursor", help="The `next` of the page before.")
LIMIT = Field(
    name="limit",
    help="How many at most.",
    schema={"type": "integer", "minimum": 1, "maximum": MAX_PAGE_SIZE, "default": DEFAULT_PAGE_SIZE},
)
_FILTERS = (
    Field(name="state", help="Only those in this state.", schema={"type": "string", "enum": list(_STATUSES)}),
    Field(name="model", help="Only those for this model."),
    Field(name="batch", help="Only those of this batch."),
    LABEL,
    Field(name="since", help="Only those that came in at this time or later.", schema={"type": "string"}),
    Field(name="until", help="Only those that came in before this time.", schema={"type": "string"}),
    Field(name="q", help="Only those whose file name has this in it."),
)
_SIZE = Field(
    name="size",
    help="Makes a JPEG that fits into a square of so many pixels; without it the picture comes as it was sent.",
    schema={"type": "integer", "minimum": 16, "maximum": 1024},
)


def register(app: flask.Flask, context: Context) -> None:
    """Add the views to an application."""
    views = _RequestViews(context)
    for rule, method, view in (
        ("/requests", "GET", views.list_requests),
        ("/requests/<id>", "GET", views.show_request),
        ("/requests/<id>/picture", "GET", views.show_picture),
        ("/requests/<id>/delete", "POST", views.delete_request),
    ):
        app.add_url_rule(rule, view.__name__, view, methods=[method])


@dataclass(frozen=True, kw_only=True)
class _OperatorOnly:
    """What only an operator owns."""

    key_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class PageQuery:
    """Which page of a list is wanted, and whose."""

    #: Only what was made with this key; None shows everything.
    key_id: str | None
    #: Only numbers below this.
    before: int | None
    #: How many at most.
    limit: int
    #: What else stands in the query.
    fields: Mapping[str, str]

    @classmethod
    def from_request(cls, request: flask.Request, *others: str) -> PageQuery:
        """Read the query. :param others: names that stand there beside. :raises InvalidParams:"""
        fields: dict[str, str] = {}
        for name, value in request.args.items(multi=True) if request.query_string else ():
            if name in fields:
                raise MalformedRequest(f"{name[:64]!r} stands there twice. Send it once.")
            if name != "label" or "label" not in others:
                fields[name] = value
        cursor, limit = fields.pop("cursor", None), fields.pop("limit", str(DEFAULT_PAGE_SIZE))
        for name in fields:
            if name not in others:
                known = ", ".join(sorted({*others, "cursor", "limit"}))
                raise errors.InvalidParams(f"There is no parameter {name[:64]!r}. Parameters: {known}.")
        if not limit.isascii() or not limit.isdigit() or len(limit) > 4 or not 1 <= int(limit) <= MAX_PAGE_SIZE:
            raise errors.InvalidParams(f"limit takes a whole number from 1 to {MAX_PAGE_SIZE}.")
        return cls(
            key_id=None if is_owner(_OperatorOnly()) else current_key_id(),
            before=None if cursor is None else _from_cursor(cursor),
            limit=int(limit),
            fields=fields,
        )


def to_cursor(number: int | None) -> str | None:
    """Make the mark of a place in a list; None at its end."""
    return None if number is None else base64.urlsafe_b64encode(f"n{number}".encode()).decode().rstrip("=")


def _from_cursor(text: str) -> int:
    try:
        plain = base64.urlsafe_b64decode(text[:64] + "=" * (-len(text[:64]) % 4)).decode("ascii")
    except (binascii.Error, ValueError) as error:
        raise errors.InvalidParams("cursor takes the `next` of the page before.") from error
    if not plain.startswith("n"):
        raise errors.InvalidParams("cursor takes the `next` of the page before.")
    return read_cursor("cursor", plain[1:])


def read_cursor(name: str, text: str) -> int:
    """Read a number that this server gave out. :raises InvalidParams:"""
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise errors.InvalidParams(f"{name} takes what an earlier answer gave.")
    return int(text)


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
        """List requests. A page may be short although more follow: `next` says whether they do."""
        names = ("state", "model", "batch", "label", "since", "until", "q")
        page = PageQuery.from_request(flask.request, *names)
        fields = page.fields
        status = fields.get("state")
        if status is not None and status not in _STATUSES:
            raise errors.InvalidParams(f"state takes one of: {', '.join(_STATUSES)}.")
        query = Query(
            status=status,
            model=self._model(fields.get("model")),
            batch_id=fields.get("batch"),
            key_id=page.key_id,
            labels=tuple(read_labels(flask.request.args.getlist("label")).items()),
            since=parse_timestamp("since", fields["since"]) if "since" in fields else None,
            until=parse_timestamp("until", fields["until"]) if "until" in fields else None,
            text=fields.get("q", "")[:200] or None,
        )
        found = self._context.store.find(query, before=page.before, limit=page.limit)
        shown = [self._context.serialize(request) for request in found.requests]
        return json_response({"success": True, "requests": shown, "next": to_cursor(found.next_before)})

    @operation(
        summary="All facts about a request, and its way through here",
        scope=Scope.READ,
        tag="requests",
        responses={200: "Detail"},
    )
    def show_request(self, id: str) -> flask.Response:
        """Show a request with everything that happened to it."""
        request = self._get_owned(id)
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
        summary="The picture of a request, or a small one of it",
        scope=Scope.READ,
        tag="requests",
        query=(_SIZE,),
        responses={200: {"type": "string", "format": "binary"}, 410: "Error"},
        content_type="image/*",
    )
    def show_picture(self, id: str) -> flask.Response:
        """Send the picture, as it came or small."""
        from server.pages.thumbnails import media_type, thumbnail

        fields = query_fields(flask.request)
        size = _size(fields)
        request = self._get_owned(id)
        try:
            if request.image_deleted_at is not None:
                raise ImageGone()
            data = self._context.store.images.read(request.image_sha256)
        except FileNotFoundError as error:
            raise ImageGone() from error
        max_pixels = self._context.settings.max_pixels
        etag = f"{request.image_sha256}-{size or 'whole'}"
        if etag in flask.request.if_none_match:
            response = flask.Response(status=304)
        elif size is None:
            response = flask.Response(data, content_type=media_type(data, max_pixels))
            name = clean_name(request.name) or "picture"
            response.headers.set("Content-Disposition", "inline", filename=name.encode("ascii", "replace").decode())
        else:
            with self._context.work_slots:
                response = flask.Response(thumbnail(data, size, max_pixels), content_type="image/jpeg")
        response.set_etag(etag)
        # Whoever may see it may keep it for a while, but asks each time, because it may be deleted.
        response.headers["Cache-Control"] = "private, no-cache"
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Content-Security-Policy"] = "default-src 'none'; sandbox"
        return response

    @operation(
        summary="Delete a request that has ended, with its picture and answer",
        scope=Scope.SUBMIT,
        tag="requests",
        responses={200: {"type": "object", "required": ["success", "req_id"]}, 409: "Error"},
    )
    def delete_request(self, id: str) -> flask.Response:
        """Delete a request for good."""
        self._get_owned(id)
        self._context.store.remove(id)
        return json_response({"success": True, "req_id": id, "status": "deleted"})

    def _get_owned(self, id: str) -> RequestRecord:
        request = self._context.store.get(id)
        check_owner(request)
        return request

    def _model(self, name: str | None) -> str | None:
        """Return a model's own name; as it stands for one that is not in the catalogue any more."""
        if name is None:
            return None
        try:
            return find_row(self._context.settings.models, name).name
        except errors.UnknownModel:
            return name

    def _timeline(self, request: RequestRecord) -> list[dict[str, Any]]:
        """Tell what happened to a request, in order."""
        events: list[dict[str, Any]] = [{"event": "received", "at": to_text(request.created_at)}]
        if request.is_cached:
            events.append({"event": "answered", "at": to_text(request.finished_at or request.created_at), "by": "an "
                           "earlier answer to the same picture"})  # fmt: skip
            return events
        events.append({"event": "queued", "at": to_text(request.created_at)})
        if request.claimed_at is not None:
            events.append({"event": "claimed", "at": to_text(request.claimed_at)})
        chunk = None if request.chunk_id is None else self._context.store.get_chunk(request.chunk_id)
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


def _size(fields: Mapping[str, str]) -> int | None:
    text = fields.get("size")
    for name in fields:
        if name != "size":
            raise errors.InvalidParams(f"There is no parameter {name[:64]!r}. Parameters: size.")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 4 or not 16 <= int(text) <= 1024:
        raise errors.InvalidParams("size takes a whole number of pixels from 16 to 1024.")
    return int(text)

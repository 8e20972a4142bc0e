"""Views of requests: the list with its filters, the details of one, its image, delete."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import flask

from provider_image import errors
from provider_image.images.headers import media_type
from provider_image.service import IMAGE_ANSWER
from server.api.query import (
    CURSOR,
    LIMIT,
    PageQuery,
    parse_cursor,
    parse_limit,
    parse_number,
    parse_state,
    read_query,
    state_field,
)
from server.api.responses import json_response
from server.api.schemas import STATUSES
from server.auth.guard import current_key_id, visible_key_id
from server.context import Views
from server.endpoint import Field, operation
from server.errors import TooManyUploads
from server.intake.client_kind import current_client_kind
from server.intake.redo import MAX_REQUESTS, RedoPlan, RedoTarget, default_name, known_model
from server.intake.request_options import FRESH, LABEL, NAME, WEBHOOK, parse_flag, parse_labels, parse_timestamp
from server.intake.uploads import clean_name
from server.record_json import fields, given_fields, to_json
from server.serializers import is_image
from server.thumbnails import MAX_THUMBNAIL_PIXELS, MIN_THUMBNAIL_PIXELS
from server.webhooks import check_webhook
from store.batches import BatchRecord
from store.clients.keys import Scope
from store.errors import ImageGone, UnknownFile
from store.files import StoredFile
from store.requests import RequestRecord
from store.rows import to_text
from store.search import Query
from store.states import RequestState

_FILTERS = (
    state_field(STATUSES),
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
_NUMBER = Field(
    name="number",
    help="Any number; the latest preview is returned. It makes the address of each preview another one.",
    schema={"type": "integer", "minimum": 0},
)
_MODEL = Field(name="model", help="The model whose answered requests are done again.", is_required=True)
_WITH = Field(
    name="with",
    help="The model that answers them. The same one does those again that another version of it answered.",
    is_required=True,
)
_REDO_FILTERS = tuple(field for field in _FILTERS if field.name not in ("state", "model"))
_DRY_RUN = Field(
    name="dry_run",
    help="1 only counts them, and estimates time and cost.",
    schema=FRESH.schema,
)
_REDO_LIMIT = Field(
    name="limit",
    help="How many at most.",
    schema={"type": "integer", "minimum": 1, "maximum": MAX_REQUESTS, "default": MAX_REQUESTS},
)
#: Above every number.
_NEWEST = 2**62
_operation = functools.partial(operation, tag="requests")


class RequestViews(Views):
    """The views of requests."""

    @_operation(
        "GET /requests", "List requests, newest first", Scope.READ, returns="Requests", query=(*_FILTERS, CURSOR, LIMIT)
    )
    def list_requests(self) -> flask.Response:
        """List requests. A page may be short although more follow: `next` tells whether they do."""
        page = PageQuery.from_request(
            flask.request, self._cursors("requests"), [field.name for field in _FILTERS], repeatable="label"
        )
        query = self._query(page.fields, page.key_id)
        found = self._store.search.find(query, before=page.before, limit=page.limit)
        shown = self._context.serialize_list(found.requests)
        return json_response({"success": True, "requests": shown, "next": page.next_cursor(found.next_before)})

    @_operation(
        "GET /requests/<id>", "Read all details of a request, and what happened to it", Scope.READ, returns="Detail"
    )
    def show_request(self, id: str) -> flask.Response:
        """Show a request with its timeline."""
        request = self._get_request(id)
        shown = self._context.serialize(request)
        shown |= {
            **fields(request, "params image_sha256 image_bytes"),
            "picture_url": None if request.image_deleted_at is not None else f"/requests/{request.id}/picture",
            "inputs": {
                name: {
                    "url": f"/requests/{request.id}/inputs/{name}" if request.image_deleted_at is None else None,
                    "media_type": one.media_type,
                    "bytes": one.size_bytes,
                }
                for name, one in request.inputs.items()
            },
            "timeline": self._timeline(request),
            **given_fields(request, "deadline_at keep_seconds"),
        }
        return json_response({"success": True, **shown})

    @_operation(
        "GET /requests/<id>/picture",
        "The image of a request, or a thumbnail of it",
        Scope.READ,
        query=(_SIZE,),
        content_type="image/*",
        errors=(410,),
    )
    def show_picture(self, id: str) -> flask.Response:
        """Return the image as it was sent, or a thumbnail; for a service without images its first input."""
        size = _size(read_query(flask.request, "size").get("size"))
        request = self._get_request(id)
        if size is None:
            data = self._context.read_image(request)
            kind = media_type(data) if is_image(request) else "application/octet-stream"
            name = clean_name(request.name) or "picture"
            return _file_response(data, kind, etag=f"{request.image_sha256}-whole", name=name)
        if request.image_deleted_at is not None:
            raise ImageGone()
        return self._thumbnail(request.image_sha256, size)

    @_operation(
        "GET /requests/<id>/inputs/<name>",
        "A further input of a request, such as a style, or a thumbnail of it",
        Scope.READ,
        query=(_SIZE,),
        content_type="*/*",
        errors=(410,),
    )
    def show_input(self, id: str, name: str) -> flask.Response:
        """Return an input that the request has beside its first one, as it was sent, or a thumbnail."""
        size = _size(read_query(flask.request, "size").get("size"))
        request = self._get_request(id)
        if name not in request.inputs:
            names = ", ".join(request.inputs) or "none"
            raise UnknownFile(f"The request has no further input {name[:64]!r}. Its further inputs: {names}.")
        if request.image_deleted_at is not None:
            raise ImageGone()
        one = request.inputs[name]
        if size is not None:
            return self._thumbnail(one.sha256, size)
        data = self._context.read_stored(one.sha256, one.size_bytes)
        return _file_response(data, one.media_type, etag=one.sha256, name=name)

    @_operation(
        "GET /requests/<id>/image",
        "The image that answers a request, or a thumbnail of it",
        Scope.READ,
        query=(_SIZE,),
        content_type="image/*",
        errors=(410,),
    )
    def show_image(self, id: str) -> flask.Response:
        """Return the file `image` of the answer, or a thumbnail of it."""
        size = _size(read_query(flask.request, "size").get("size"))
        request = self._get_request(id)
        if IMAGE_ANSWER not in request.files:
            is_done = request.state is RequestState.DONE
            reason = "its answer is not an image" if is_done else f"it is {request.status}"
            raise UnknownFile(f"The request has no image that answers it: {reason}.")
        if size is None:
            return self._file(request, IMAGE_ANSWER)
        return self._thumbnail(request.files[IMAGE_ANSWER].sha256, size)

    @_operation(
        "GET /requests/<id>/preview",
        "What the image that will answer a request looks like now",
        Scope.READ,
        query=(_NUMBER,),
        content_type="image/jpeg",
    )
    def show_preview(self, id: str) -> flask.Response:
        """Return the latest preview of a request that a worker is working on."""
        parse_number("number", read_query(flask.request, "number").get("number", "0"))
        request = self._get_request(id)
        preview = self._store.progress.preview(request.number)
        if preview is None:
            raise UnknownFile(
                f"The request has no preview: it is {request.status}. Some services send one while they work on a "
                "request on the server's own machine."
            )
        return _file_response(preview, "image/jpeg", etag=hashlib.sha256(preview).hexdigest())

    @_operation("GET /requests/<id>/files/<name>", "A file of an answer", Scope.READ, errors=(410,), content_type="*/*")
    def show_file(self, id: str, name: str) -> flask.Response:
        """Return a file that the answer has beside its JSON."""
        read_query(flask.request)
        request = self._get_request(id)
        if name not in request.files:
            raise UnknownFile(f"The answer has no file {name[:64]!r}. Its files: {', '.join(request.files) or 'none'}.")
        return self._file(request, name)

    def _thumbnail(self, sha256: str, size: int) -> flask.Response:
        etag = f"{sha256}-{size}"
        is_known = etag in flask.request.if_none_match  # then it is not sent
        data = b"" if is_known else self._context.thumbnails.get(sha256, size, client=current_key_id())
        return _file_response(data, "image/jpeg", etag=etag)

    def _file(self, request: RequestRecord, name: str) -> flask.Response:
        file = request.files[name]
        data = self._context.read_stored(file.sha256, file.size_bytes)
        return _file_response(data, file.media_type, etag=file.sha256, name=_name_for_saving(request, name, file))

    @_operation(
        "POST /requests/redo",
        "Do answered requests again with another model",
        Scope.SUBMIT,
        query=(_MODEL, _WITH, *_REDO_FILTERS, NAME, WEBHOOK, _DRY_RUN, CURSOR, _REDO_LIMIT),
        responses={200: "Redo", 202: "Redo"},
        errors=(404,),
    )
    def redo_requests(self) -> flask.Response:
        """Add a request of another model for each answered one: 202 when they are durable; 200 if there are none."""
        names = ("model", "with", "name", "webhook", "dry_run", "cursor", "limit")
        given = read_query(flask.request, *names, *(field.name for field in _REDO_FILTERS), repeatable="label")
        for name in ("model", "with"):
            if not given.get(name):
                raise errors.InvalidParams(f"{name} is missing. Example: /requests/redo?model=resnet50&with=resnet152")
        settings, cursors, redo = self._context.settings, self._cursors("redo"), self._context.redo
        webhook = check_webhook(given.get("webhook"), allows_private=settings.allows_private_webhooks)
        target, query = redo.find_target(given["with"]), self._query(given, visible_key_id())
        before = parse_cursor(cursors, "cursor", given.get("cursor"))
        limit = parse_limit(given["limit"], MAX_REQUESTS) if "limit" in given else MAX_REQUESTS
        is_dry_run = parse_flag("dry_run", given.get("dry_run", "0"))
        shown: dict[str, Any] = {"success": True, "model": query.model, "with": target.row.name}
        with self._context.redo_slots.holding(current_key_id()) as is_held:
            if not is_held:
                raise TooManyUploads()
            if is_dry_run:
                plan = redo.plan(query, target, before=before, limit=limit)
                return json_response({**shown, **self._plan(plan, plan.next_before), **self._estimate(target, plan)})
            room, _ = self._context.intake.room()
            plan = redo.plan(query, target, before=before, limit=min(limit, room))
            name = clean_name(given.get("name")) or default_name(query.model, target)
            report = redo.add(
                plan,
                target,
                name=name,
                webhook=webhook,
                charged_key_id=current_key_id(),
                client=current_client_kind(),
            )
        if report.stopped_by is not None and not report.batches:
            raise report.stopped_by
        # Asked again from the same place, it adds those that were left out.
        next_before = plan.next_before if report.stopped_by is None else before or _NEWEST
        shown |= self._plan(plan, next_before)
        shown |= {"added": report.added, "batches": [_show_batch(batch) for batch in report.batches]}
        if report.stopped_by is not None:
            shown |= {"reason": report.stopped_by.reason, "code": report.stopped_by.code}
        if not report.batches:
            return json_response(shown)
        return json_response(shown, 202, {"Location": f"/batches/{report.batches[0].id}"})

    @_operation(
        "POST /requests/<id>/delete",
        "Delete a request that has ended, with its image and answer",
        Scope.SUBMIT,
        returns={"type": "object", "required": ["success", "req_id"]},
    )
    def delete_request(self, id: str) -> flask.Response:
        """Delete a request."""
        self._get_request(id)
        self._store.requests.remove(id)
        return json_response({"success": True, "req_id": id, "status": "deleted"})

    def _plan(self, plan: RedoPlan, next_before: int | None) -> dict[str, Any]:
        cursor = None if next_before is None else self._cursors("redo").write(next_before)
        return {"found": len(plan.new), **fields(plan, "existing without_inputs unsuitable"), "next": cursor}

    def _estimate(self, target: RedoTarget, plan: RedoPlan) -> dict[str, Any]:
        estimate = self._context.redo.estimate(target, len(plan.new))
        # What images cost is a figure of all keys.
        cost = estimate.cost if visible_key_id() is None else None
        return {"eta_seconds": estimate.seconds, "cost": to_json(cost)}

    def _query(self, fields: Mapping[str, str], key_id: str | None) -> Query:
        """Read the filters. :raises InvalidParams:"""
        model = fields.get("model")
        return Query(
            status=parse_state(fields.get("state"), STATUSES),
            model=None if model is None else known_model(self._context.settings.models, model),
            batch_id=fields.get("batch"),
            key_id=key_id,
            labels=tuple(parse_labels(flask.request.args.getlist("label")).items()),
            since=parse_timestamp("since", fields["since"]) if "since" in fields else None,
            until=parse_timestamp("until", fields["until"]) if "until" in fields else None,
            text=fields.get("q", "")[:200] or None,
        )

    def _timeline(self, request: RequestRecord) -> list[dict[str, Any]]:
        """List what happened to a request, in order."""
        if request.is_cached:
            answered_at = to_text(request.finished_at or request.created_at)
            return [
                {"event": "received", "at": to_text(request.created_at)},
                {"event": "answered", "at": answered_at, "by": "an earlier answer to the same image"},
            ]
        times = {"received": request.created_at, "queued": request.created_at, "claimed": request.claimed_at}
        events: list[dict[str, Any]] = [
            {"event": name, "at": to_text(at)} for name, at in times.items() if at is not None
        ]
        is_done = request.state is RequestState.DONE
        chunk = self._store.chunks.get(request.chunk_id) if is_done and request.chunk_id is not None else None
        if chunk is not None:
            dispatched = {"at": to_text(chunk.dispatched_at), "to": chunk.provider, "executor": chunk.executor}
            events.append({"event": "dispatched", **dispatched, "with": chunk.items - 1})
        if request.finished_at is not None:
            ended: dict[str, Any] = {
                "event": "answered" if is_done else request.status,
                "at": to_text(request.finished_at),
            }
            if is_done:
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


def _name_for_saving(request: RequestRecord, name: str, file: StoredFile) -> str:
    """Return the name of an answer's file: an image answer is named after the image that was sent."""
    if name != IMAGE_ANSWER:
        return name
    stem = PurePath(clean_name(request.name) or "image").stem
    return f"{stem}-{request.model}.{file.media_type.rpartition('/')[2]}"


def _size(text: str | None) -> int | None:
    if text is None:
        return None
    smallest, largest = MIN_THUMBNAIL_PIXELS, MAX_THUMBNAIL_PIXELS
    if not text.isascii() or not text.isdigit() or len(text) > 4 or not smallest <= int(text) <= largest:
        raise errors.InvalidParams(f"size takes a whole number of pixels from {smallest} to {largest}.")
    return int(text)


def _show_batch(batch: BatchRecord) -> dict[str, Any]:
    status_url = f"/batches/{batch.id}"
    return {
        "batch_id": batch.id,
        "status_url": status_url,
        "results_url": f"{status_url}/results.jsonl",
        "accepted": batch.total,
    }

"""One picture at a time: taking it, reading its answer, cancelling, trying again.

Registered by `api.py`. It checks what comes in, hands it to the store, and shows what the store has.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlencode, urlsplit

import flask

from provider_image import errors
from provider_image.errors import MalformedRequest
from provider_image.images.headers import read_header
from provider_image.models.registry import find_row
from provider_image.service import Service
from provider_image.services import load_service
from server.api.endpoint import operation
from server.api.parameters import FRESH, WAIT, form_schema, service_fields
from server.api.responses import json_response
from server.auth.guard import check_owner, check_quota, current_key_id
from server.context import Context, parse_read_params
from server.errors import BacklogFull, FetchingDisabled
from server.intake.request_options import REQUEST_OPTIONS, read_request_options
from server.intake.uploads import Upload, clean_name, read_fields, read_json, read_upload
from server.intake.url_fetcher import fetch
from server.webhooks import WEBHOOK, check_webhook
from store import new_id
from store.keys import Scope
from store.records import NewRequest, RequestRecord

_TRUE_VALUES, _FALSE_VALUES = frozenset({"1", "true", "yes", "on", ""}), frozenset({"0", "false", "no", "off"})
#: A picture, as the API description says it.
_IMAGE_SCHEMA = {"type": "string", "format": "binary", "description": "JPEG, PNG, WebP, GIF, BMP or TIFF."}
#: Where a picture is, likewise.
_URL_SCHEMA = {
    "type": "string",
    "format": "uri",
    "description": "https only; where the server fetches pictures at all.",
}


def register(app: flask.Flask, context: Context) -> None:
    """Add the views to an application."""
    views = _PredictionViews(context)
    for rule, methods, view in (
        ("/requestPrediction/<model>", ["POST"], views.request_prediction),
        ("/readPrediction/<id>", ["GET", "POST"], views.read_prediction),
        ("/requests/<id>", ["DELETE"], views.cancel),
        ("/requests/<id>/retry", ["POST"], views.retry),
    ):
        app.add_url_rule(rule, view.__name__, view, methods=methods)


class _PredictionViews:
    def __init__(self, context: Context) -> None:
        self._context = context
        #: Fetching takes seconds, so it may not hold up every thread.
        self._fetch_slots = threading.BoundedSemaphore(context.settings.server_threads)

    @operation(
        summary="Send a picture",
        scope=Scope.SUBMIT,
        query=(*service_fields(), FRESH, WEBHOOK, *REQUEST_OPTIONS),
        body={
            "multipart/form-data": form_schema((*service_fields(), FRESH, WEBHOOK), image=_IMAGE_SCHEMA),
            "image/*": _IMAGE_SCHEMA,
            "application/octet-stream": _IMAGE_SCHEMA,
            "application/json": form_schema((*service_fields(), FRESH, WEBHOOK), url=_URL_SCHEMA),
        },
        responses={202: "Submitted"},
    )
    def request_prediction(self, model: str) -> flask.Response:
        """Take a picture: 202 when it and its row are durable."""
        row = find_row(self._context.settings.models, model)
        service = load_service(row.service)
        query, options = read_request_options(flask.request, self._context.clock())
        check_fields(service, query)
        digest = self._context.get_artefact_digest(row)
        self._context.check_backlog()
        check_quota()
        upload = self._read_image()
        duplicates = sorted(query.keys() & upload.fields.keys())
        if duplicates:
            raise MalformedRequest(f"{duplicates[0]!r} stands in the URL and in the form. Send it once.")
        fields = {**query, **upload.fields}
        is_fresh, params = check_fields(service, fields)
        webhook = check_webhook(
            fields.get("webhook"), is_private_allowed=self._context.settings.allows_private_webhooks
        )
        given = {param.name: params[param.name] for param in service.params if param.is_read_time}
        new = NewRequest(
            id=new_id(),
            service=row.service,
            model=row.name,
            params={name: value for name, value in params.items() if name not in given},
            name=upload.name,
            digest=digest,
            is_fresh=is_fresh,
            webhook=webhook,
            labels=options.labels,
            key_id=current_key_id(),
            keep_seconds=options.keep_seconds,
            deadline_at=options.deadline_at,
            created_at=self._context.clock(),
        )
        with self._context.work_slots:
            try:
                read_header(upload.data, self._context.settings.max_pixels)
            except errors.NotAnImage as error:
                if upload.is_plain_field:
                    raise MalformedRequest(
                        "The field `image` holds text, not a file. With curl put an @ before the file's name: "
                        "curl -F image=@kitten.jpg URL"
                    ) from error
                raise
            request = self._context.store.add(new, self._context.store.images.stage(upload.data))
        # What only changes the view is not stored (equal pictures share an answer), so it travels in the address.
        shown = {name: value for name, value in given.items() if name in query or name in upload.fields}
        status_url = f"/readPrediction/{request.id}" + (f"?{urlencode(shown)}" if shown else "")
        return json_response(
            {
                "success": True,
                "req_id": request.id,
                "status": str(request.state),
                "status_url": status_url,
                "model": request.model,
                "cached": request.is_cached,
            },
            202,
            {"Location": status_url},
        )

    @operation(
        summary="Read an answer, or why there is none yet",
        scope=Scope.READ,
        query=(WAIT, *service_fields(is_read=True)),
        body={"application/x-www-form-urlencoded": form_schema((WAIT, *service_fields(is_read=True)))},
        responses={200: "Request"},
    )
    def read_prediction(self, id: str) -> flask.Response:
        """Show a request, after holding the read if the client asks for it."""
        fields = read_fields(flask.request, active_reads=self._context.active_reads)
        wait_seconds = self._wait_seconds(fields.pop("wait", None))
        request = self._get_owned(id)
        params = parse_read_params(request.service, fields)
        request = self._context.long_poller.wait_until_final(request, wait_seconds)
        return self._context.request_response(request, params)

    @operation(
        summary="Cancel what has not been dispatched",
        scope=Scope.SUBMIT,
        responses={200: "Request", 409: "Error"},
    )
    def cancel(self, id: str) -> flask.Response:
        """Cancel a queued request."""
        self._get_owned(id)
        return self._context.request_response(self._context.store.cancel(id, now=self._context.clock()))

    @operation(
        summary="Queue a failed or cancelled request again",
        scope=Scope.SUBMIT,
        responses={200: "Request", 409: "Error"},
    )
    def retry(self, id: str) -> flask.Response:
        """Queue a failed or cancelled request again."""
        self._get_owned(id)
        return self._context.request_response(self._context.store.retry(id, now=self._context.clock()))

    def _get_owned(self, id: str) -> RequestRecord:
        """Read a request of the caller's. :raises UnknownRequest:"""
        request = self._context.store.get(id)
        check_owner(request)
        return request

    def _read_image(self) -> Upload:
        """Read the picture from the body, or fetch it from where the body says."""
        settings, active_reads = self._context.settings, self._context.active_reads
        if flask.request.mimetype != "application/json":
            return read_upload(flask.request, max_image_bytes=settings.max_image_bytes, active_reads=active_reads)
        if not settings.fetches_urls:
            raise FetchingDisabled()
        fields = read_json(flask.request, active_reads=active_reads)
        url = fields.pop("url", None)
        if url is None:
            raise MalformedRequest('The JSON says no `url`. Send {"url": "https://example.org/kitten.jpg"}')
        if not self._fetch_slots.acquire(blocking=False):
            raise BacklogFull("Too many pictures are being fetched already. Send the URL again later.")
        try:
            data = fetch(url, max_image_bytes=settings.max_image_bytes, seconds=settings.fetch_seconds)
        finally:
            self._fetch_slots.release()
        if not data:
            raise errors.EmptyImage("There is nothing at this URL.")
        return Upload(data=data, name=clean_name(unquote(urlsplit(url).path)), fields=fields)

    def _wait_seconds(self, raw: str | None) -> float:
        return parse_wait_seconds(raw, self._context.settings.max_hold_seconds)


def parse_wait_seconds(raw: str | None, max_seconds: float) -> float:
    """Read how long an answer may be held, at most so many seconds. :raises InvalidParams:"""
    if raw is None:
        return 0.0
    try:
        seconds = float(raw)
    except ValueError as error:
        raise errors.InvalidParams("wait takes a number of seconds, for example ?wait=30") from error
    if not 0 <= seconds < float("inf"):  # also refuses nan
        raise errors.InvalidParams("wait takes a number of seconds from 0.")
    return min(seconds, max_seconds)


def check_fields(service: Service, fields: Mapping[str, str]) -> tuple[bool, dict[str, Any]]:
    """Check what stands beside a picture. :return: fresh, and the service's parameters. :raises InvalidParams:"""
    raw = dict(fields)
    raw.pop("webhook", None)  # checked where it is used
    fresh = raw.pop("fresh", "0").strip().lower()
    if fresh not in _TRUE_VALUES | _FALSE_VALUES:
        raise errors.InvalidParams("fresh takes 1 or 0.")
    return fresh in _TRUE_VALUES, service.check_params(raw)

"""One picture at a time: taking it, reading its answer, cancelling, trying again.

Registered by `api.py`. It checks what comes in, hands it to the store, and shows what the store has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

import flask

from provider_image import errors
from provider_image.imaging import check_upload
from provider_image.models.shelf import find_row
from provider_image.service import Service
from provider_image.services import load_service
from server.context import Context, read_time_params
from server.responses import answer
from server.store import new_id
from server.store.records import NewRequest
from server.uploads import query_fields, read_fields, read_upload

_YES, _NO = frozenset({"1", "true", "yes", "on", ""}), frozenset({"0", "false", "no", "off"})


def register(app: flask.Flask, context: Context) -> None:
    """Add the views to an application."""
    views = _Predictions(context)
    for rule, methods, view in (
        ("/requestPrediction/<model>", ["POST"], views.request_prediction),
        ("/readPrediction/<id>", ["GET", "POST"], views.read_prediction),
        ("/requests/<id>", ["DELETE"], views.cancel),
        ("/requests/<id>/retry", ["POST"], views.retry),
    ):
        app.add_url_rule(rule, view.__name__, view, methods=methods)


class _Predictions:
    def __init__(self, context: Context) -> None:
        self._context = context

    def request_prediction(self, model: str) -> flask.Response:
        """Take a picture: 202 when it and its row are durable."""
        row = find_row(self._context.settings.models, model)
        service = load_service(row.service)
        query = query_fields(flask.request)
        check_fields(service, query)
        digest = self._context.digest_to_answer_with(row)
        self._context.check_backlog()
        upload = read_upload(
            flask.request, max_image_bytes=self._context.settings.max_image_bytes, readings=self._context.readings
        )
        twice = sorted(query.keys() & upload.fields.keys())
        if twice:
            raise errors.MalformedRequest(f"{twice[0]!r} stands in the URL and in the form. Send it once.")
        is_fresh, params = check_fields(service, {**query, **upload.fields})
        given = {param.name: params[param.name] for param in service.params if param.is_read_time}
        new = NewRequest(
            id=new_id(),
            service=row.service,
            model=row.name,
            params={name: value for name, value in params.items() if name not in given},
            name=upload.name,
            digest=digest,
            is_fresh=is_fresh,
            created_at=self._context.clock(),
        )
        with self._context.work:
            try:
                check_upload(upload.data, self._context.settings.max_pixels)
            except errors.NotAnImage as error:
                if upload.is_plain_field:
                    raise errors.MalformedRequest(
                        "The field `image` holds text, not a file. With curl put an @ before the file's name: "
                        "curl -F image=@kitten.jpg URL"
                    ) from error
                raise
            request = self._context.store.add(new, self._context.store.blobs.stage(upload.data))
        # What only changes the view is not stored (equal pictures share an answer), so it travels in the address.
        shown = {name: value for name, value in given.items() if name in query or name in upload.fields}
        status_url = f"/readPrediction/{request.id}" + (f"?{urlencode(shown)}" if shown else "")
        return answer(
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

    def read_prediction(self, id: str) -> flask.Response:
        """Show a request, after holding the read if the client asks for it."""
        fields = read_fields(flask.request, readings=self._context.readings)
        hold_seconds = self._hold_seconds(fields.pop("wait", None))
        request = self._context.store.get(id)
        params = read_time_params(request.service, fields)
        request = self._context.notifier.hold(request, hold_seconds)
        return self._context.show(request, params)

    def cancel(self, id: str) -> flask.Response:
        """Cancel a queued request."""
        return self._context.show(self._context.store.cancel(id, now=self._context.clock()))

    def retry(self, id: str) -> flask.Response:
        """Queue a failed or cancelled request again."""
        return self._context.show(self._context.store.retry(id, now=self._context.clock()))

    def _hold_seconds(self, raw: str | None) -> float:
        if raw is None:
            return 0.0
        try:
            seconds = float(raw)
        except ValueError as error:
            raise errors.InvalidParams("wait takes a number of seconds, for example ?wait=30") from error
        if not 0 <= seconds < float("inf"):  # also refuses nan
            raise errors.InvalidParams("wait takes a number of seconds from 0.")
        return min(seconds, self._context.settings.max_hold_seconds)


def check_fields(service: Service, fields: Mapping[str, str]) -> tuple[bool, dict[str, Any]]:
    """Check what stands beside a picture. :return: fresh, and the service's parameters. :raises InvalidParams:"""
    raw = dict(fields)
    fresh = raw.pop("fresh", "0").strip().lower()
    if fresh not in _YES | _NO:
        raise errors.InvalidParams("fresh takes 1 or 0.")
    return fresh in _YES, service.check_params(raw)

"""Views of a single request: send an image, read the answer, cancel, retry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

import flask
from werkzeug.wrappers import Response

from server.api.query import WAIT, parse_wait_seconds
from server.api.responses import json_response
from server.auth.guard import caller_check, current_key_id
from server.context import Views
from server.endpoint import form_schema, input_schemas, operation, service_fields
from server.intake.accept import ReceivedImage
from server.intake.quality_gate import QUALITY_LIMITS
from server.intake.request_options import FRESH, REQUEST_OPTIONS, WEBHOOK
from server.intake.uploads import read_fields
from server.serializers import parse_read_params
from store.clients.keys import Scope
from store.requests import RequestRecord
from store.states import EXPIRED

_IMAGE_SCHEMA = {"type": "string", "format": "binary", "description": "JPEG, PNG, WebP, GIF, BMP or TIFF."}
_URL_SCHEMA = {
    "type": "string",
    "format": "uri",
    "description": "https only, if the server fetches images.",
}
_TEXT_SCHEMA = {"type": "string", "description": "A text, as UTF-8."}
#: What can be written in JSON.
_JSON_SCHEMAS = {"url": _URL_SCHEMA} | {name: one for name, one in input_schemas().items() if "format" not in one}


class PredictionViews(Views):
    """The views of a single request."""

    @operation(
        "POST /requestPrediction/<model>",
        "Send an image, a table row or a text",
        Scope.SUBMIT,
        query=(*service_fields(), FRESH, WEBHOOK, *QUALITY_LIMITS, *REQUEST_OPTIONS),
        body={
            "multipart/form-data": form_schema((*service_fields(), FRESH, WEBHOOK, *QUALITY_LIMITS), input_schemas()),
            "image/*": _IMAGE_SCHEMA,
            "application/octet-stream": _IMAGE_SCHEMA,
            "text/plain": _TEXT_SCHEMA,
            "application/json": form_schema((*service_fields(), FRESH, WEBHOOK, *QUALITY_LIMITS), _JSON_SCHEMAS),
        },
        responses={202: "Submitted"},
    )
    def request_prediction(self, model: str) -> Response:
        """Accept an image: 202 when it and its request are durable."""
        received = self._context.intake.read_image(flask.request, model)
        return self._context.repetitions.once(received.upload.digest, lambda: self._add(received))

    def _add(self, received: ReceivedImage) -> flask.Response:
        request, read_params = self._context.intake.add_image(received)
        # What only changes the view is not stored (equal images share an answer), so it is passed on in the URL.
        query = f"?{urlencode(read_params)}" if read_params else ""
        status_url = f"/readPrediction/{request.id}{query}"
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
        "GET|POST /readPrediction/<id>",
        "Read an answer, or why there is none yet",
        Scope.READ,
        returns="Request",
        query=(WAIT, *service_fields(is_read=True)),
        body={"application/x-www-form-urlencoded": form_schema((WAIT, *service_fields(is_read=True)))},
    )
    def read_prediction(self, id: str) -> flask.Response:
        """Show a request, after holding the read if the client asks for it."""
        fields = read_fields(flask.request, active_reads=self._context.active_reads)
        wait_seconds = parse_wait_seconds(fields.pop("wait", None), self._context.settings.max_hold_seconds)
        request = self._get_request(id)
        params = parse_read_params(request.service, fields)
        held = self._context.long_poller.wait_until_final(
            request, wait_seconds, client=current_key_id(), is_allowed=caller_check()
        )
        return self._response(held, params)

    @operation(
        "DELETE /requests/<id>",
        "Cancel a request that has not been dispatched",
        Scope.SUBMIT,
        returns="Request",
        errors=(409,),
    )
    def cancel(self, id: str) -> flask.Response:
        """Cancel a queued request."""
        self._get_request(id)
        return self._response(self._store.requests.cancel(id, now=self._now()))

    @operation(
        "POST /requests/<id>/retry", "Queue a failed or cancelled request again", Scope.SUBMIT, returns="Request"
    )
    def retry(self, id: str) -> flask.Response:
        """Queue a failed or cancelled request again."""
        request = self._get_request(id)
        self._context.intake.check_retry(request.model, has_expired=request.code == EXPIRED)
        return self._response(self._store.requests.retry(id, now=self._now()))

    def _response(self, request: RequestRecord, params: Mapping[str, Any] | None = None) -> flask.Response:
        return json_response({"success": True, **self._context.serialize(request, params)})

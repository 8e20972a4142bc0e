"""The HTTP API: a Flask application over a store.

Made by `wsgi.py` in each server process, and by tests. It checks what comes in, hands it to the store, and shows what
the store has; it must not run a model, write to the home beside the store, or keep anything between two requests that
another server process would have to know. Long because the views and the one table of status codes stand together.
"""

from __future__ import annotations

import functools
import json
import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol
from urllib.parse import urlencode

import flask
from werkzeug.exceptions import HTTPException

from provider_image import errors
from provider_image.imaging import check_upload
from provider_image.models.artefact import find_artefact, installed_digest
from provider_image.models.catalogue import CATALOGUE, ModelRow, install_command, own_install_command
from provider_image.models.compilers import can_build_now
from provider_image.models.shelf import find_row
from provider_image.service import Service
from provider_image.services import load_service
from server.answers import show_models, show_request
from server.estimates import Outlook, estimate
from server.notifier import Notifier
from server.settings import ServerSettings
from server.store import Journal, Store, new_id
from server.store.blobs import Blobs
from server.store.records import NewRequest, Request
from server.traffic import Traffic
from server.uploads import Readings, query_fields, read_fields, read_upload

log = logging.getLogger(__name__)

#: The one table of status codes: a class's own row, else that of the nearest class above it.
HTTP_STATUS: dict[type[errors.MlgError], int] = {
    errors.MlgError: 500,
    errors.BadInput: 400,
    errors.UnsupportedFormat: 415,
    errors.UnsupportedMediaType: 415,
    errors.ImageTooLarge: 413,
    errors.TooManyBytes: 413,
    errors.UnknownModel: 404,
    errors.UnknownRequest: 404,
    errors.NotInstalled: 503,
    errors.ModelError: 503,
    errors.BacklogFull: 503,
    errors.NotCancellable: 409,
    errors.NotRetryable: 409,
    errors.StoreError: 503,
    errors.DiskFull: 507,
}
#: Seconds after which a client may try again, for errors that pass; likewise the nearest class counts.
RETRY_AFTER_SECONDS: dict[type[errors.MlgError], int] = {
    errors.StoreBusy: 1,
    errors.StoreError: 5,
    errors.DiskFull: 60,
    errors.BacklogFull: 30,
    errors.NotInstalled: 60,
    errors.ModelError: 60,
}
#: `code` of the errors that Werkzeug raises.
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_media_type"}
_YES, _NO = frozenset({"1", "true", "yes", "on", ""}), frozenset({"0", "false", "no", "off"})


class Backend(Store, Journal, Protocol):
    """What the application needs: store and journal, the pictures, and a way to ask whether all is well."""

    @property
    def blobs(self) -> Blobs:
        """Where pictures are staged."""

    def check(self) -> None:
        """Prove that the store can be written. :raises StoreError:"""


def create_app(
    settings: ServerSettings,
    store: Backend,
    *,
    notifier: Notifier | None = None,
    readings: Readings | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> flask.Flask:
    """Make the application.

    :param notifier: holds reads; one for half of the server's threads is made when there is none.
    :param readings: where reads of slow bodies are noted.
    """
    app = flask.Flask("mlg", static_folder=None)
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    api = _Api(
        settings,
        store,
        notifier or Notifier(store, most=settings.server_threads // 2),
        readings or Readings(),
        clock,
    )
    for rule, methods, view in (
        ("/", ["GET"], api.index),
        ("/requestPrediction/<model>", ["POST"], api.request_prediction),
        ("/readPrediction/<id>", ["GET", "POST"], api.read_prediction),
        ("/requests/<id>", ["DELETE"], api.cancel),
        ("/requests/<id>/retry", ["POST"], api.retry),
        ("/models", ["GET"], api.models),
        ("/healthz", ["GET"], api.healthz),
        ("/readyz", ["GET"], api.readyz),
    ):
        app.add_url_rule(rule, view.__name__, view, methods=methods)
    app.register_error_handler(errors.MlgError, _refuse)
    app.register_error_handler(HTTPException, _refuse_http)
    app.register_error_handler(Exception, _confess)
    return app


class _Api:
    """The views, and what they share."""

    def __init__(
        self,
        settings: ServerSettings,
        store: Backend,
        notifier: Notifier,
        readings: Readings,
        clock: Callable[[], datetime],
    ) -> None:
        self._settings = settings
        self._store = store
        self._notifier = notifier
        self._readings = readings
        self._clock = clock
        self._traffic = Traffic(store)
        # Bodies are read by more threads than work at once, so that slow clients do not keep the quick ones out.
        self._work = threading.BoundedSemaphore(settings.server_threads)

    def index(self) -> flask.Response:
        """List the routes, with an example to copy."""
        base = flask.request.host_url.rstrip("/")
        return _answer(
            {
                "success": True,
                "name": "mlg",
                "routes": {
                    "POST /requestPrediction/MODEL": "a picture as the form field `image` or as the raw body",
                    "GET /readPrediction/ID": "the answer, or why it waits; ?wait=SECONDS, ?top=1..20",
                    "DELETE /requests/ID": "cancel what has not been dispatched",
                    "POST /requests/ID/retry": "queue a failed or cancelled request again",
                    "GET /models": "what can be asked for",
                    "GET /healthz": "the process is alive",
                    "GET /readyz": "the store is usable",
                },
                "try": [
                    f"curl -F image=@kitten.jpg {base}/requestPrediction/efficientnet_lite0",
                    f"curl '{base}/readPrediction/ID?wait=30'",
                ],
            }
        )

    def request_prediction(self, model: str) -> flask.Response:
        """Take a picture: 202 when it and its row are durable."""
        row = find_row(self._settings.models, model)
        service = load_service(row.service)
        query = query_fields(flask.request)
        _check_fields(service, query)
        digest = self._digest_to_answer_with(row)
        if self._traffic.waiting() >= self._settings.max_backlog:
            raise errors.BacklogFull()
        upload = read_upload(flask.request, max_image_bytes=self._settings.max_image_bytes, readings=self._readings)
        twice = sorted(query.keys() & upload.fields.keys())
        if twice:
            raise errors.MalformedRequest(f"{twice[0]!r} stands in the URL and in the form. Send it once.")
        is_fresh, params = _check_fields(service, {**query, **upload.fields})
        given = {param.name: params[param.name] for param in service.params if param.is_read_time}
        new = NewRequest(
            id=new_id(),
            service=row.service,
            model=row.name,
            params={name: value for name, value in params.items() if name not in given},
            name=upload.name,
            digest=digest,
            is_fresh=is_fresh,
            created_at=self._clock(),
        )
        with self._work:
            try:
                check_upload(upload.data, self._settings.max_pixels)
            except errors.NotAnImage as error:
                if upload.is_plain_field:
                    raise errors.MalformedRequest(
                        "The field `image` holds text, not a file. With curl put an @ before the file's name: "
                        "curl -F image=@kitten.jpg URL"
                    ) from error
                raise
            request = self._store.add(new, self._store.blobs.stage(upload.data))
        # What only changes the view is not stored (equal pictures share an answer), so it travels in the address.
        shown = {name: value for name, value in given.items() if name in query or name in upload.fields}
        status_url = f"/readPrediction/{request.id}" + (f"?{urlencode(shown)}" if shown else "")
        return _answer(
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
        fields = read_fields(flask.request, readings=self._readings)
        hold_seconds = self._hold_seconds(fields.pop("wait", None))
        request = self._store.get(id)
        params = _read_time_params(request.service, fields)
        request = self._notifier.hold(request, hold_seconds)
        return self._show(request, params)

    def cancel(self, id: str) -> flask.Response:
        """Cancel a queued request."""
        return self._show(self._store.cancel(id, now=self._clock()))

    def retry(self, id: str) -> flask.Response:
        """Queue a failed or cancelled request again."""
        return self._show(self._store.retry(id, now=self._clock()))

    def models(self) -> flask.Response:
        """List the catalogue and the models of users' own."""
        return _answer({"success": True, "models": show_models(self._settings.models)})

    def healthz(self) -> flask.Response:
        """Say that the process answers; does not touch the store."""
        return _answer({"success": True, "status": "alive"})

    def readyz(self) -> flask.Response:
        """Say whether the store can be written, and whether a batcher is alive."""
        self._store.check()
        batchers = len(self._traffic.batchers())
        payload: dict[str, Any] = {"success": True, "status": "ready", "store": "writable", "batchers": batchers}
        if not batchers:
            payload["warning"] = (
                "No batcher is running: requests are kept but not answered. Start one: mlg batch (or mlg up)."
            )
        return _answer(payload)

    def _show(self, request: Request, params: Mapping[str, Any] | None = None) -> flask.Response:
        if params is None:
            params = _read_time_params(request.service, {})
        wait = None
        if not request.state.is_final:
            outlook = Outlook(
                batchers=self._traffic.batchers(),
                backlog=self._traffic.backlog(),
                pace=self._traffic.pace(request.model),
                obstacle=self._obstacle(request.model),
            )
            wait = estimate(request, outlook, self._clock())
        return _answer({"success": True, **show_request(request, params, wait)})

    def _digest_to_answer_with(self, row: ModelRow) -> str | None:
        """Return the artefact's digest, None if it will be built on first use.

        :raises NotInstalled: :raises ModelError:
        """
        try:
            return find_artefact(self._settings.models, row.name).digest
        except (errors.NotInstalled, errors.BrokenArtefact):
            if not _can_build(row.name):
                raise
            return None

    def _obstacle(self, model: str) -> str | None:
        """Say why nobody can work on a model that requests wait for."""
        if installed_digest(self._settings.models, model) is not None or _can_build(model):
            return None
        row = CATALOGUE.get(model)
        if row is None:
            return (
                f"The model {model} is not installed any more and is not in the catalogue. If it is one of your own, "
                f"install it again: {own_install_command(model)}; else cancel the request."
            )
        return f"The model {model} is not installed any more. Install it: {install_command(row)}"

    def _hold_seconds(self, raw: str | None) -> float:
        if raw is None:
            return 0.0
        try:
            seconds = float(raw)
        except ValueError as error:
            raise errors.InvalidParams("wait takes a number of seconds, for example ?wait=30") from error
        if not 0 <= seconds < float("inf"):  # also refuses nan
            raise errors.InvalidParams("wait takes a number of seconds from 0.")
        return min(seconds, self._settings.max_hold_seconds)


@functools.cache
def _can_build(model: str) -> bool:
    # Looking for a package costs more than all else at the door, and packages do not come and go under a server.
    row = CATALOGUE.get(model)
    return row is not None and can_build_now(row)


def _check_fields(service: Service, fields: Mapping[str, str]) -> tuple[bool, dict[str, Any]]:
    """Check what stands beside a picture. :return: fresh, and the service's parameters. :raises InvalidParams:"""
    raw = dict(fields)
    fresh = raw.pop("fresh", "0").strip().lower()
    if fresh not in _YES | _NO:
        raise errors.InvalidParams("fresh takes 1 or 0.")
    return fresh in _YES, service.check_params(raw)


def _read_time_params(service_name: str, fields: Mapping[str, str]) -> dict[str, Any]:
    service = load_service(service_name)
    read_time = {param.name for param in service.params if param.is_read_time}
    for name in fields:
        if name not in read_time:
            raise errors.InvalidParams(
                f"A read has no parameter {name[:64]!r}. Parameters: {', '.join(sorted(read_time | {'wait'}))}."
            )
    checked = service.check_params(dict(fields))
    return {name: value for name, value in checked.items() if name in read_time}


def _answer(payload: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> flask.Response:
    response = flask.Response(
        json.dumps(payload, separators=(",", ":"), ensure_ascii=False) + "\n", status, mimetype="application/json"
    )
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
    if headers:
        response.headers.update(headers)
    return response


def _nearest(table: Mapping[type[errors.MlgError], int], error: errors.MlgError) -> int | None:
    return next((table[kind] for kind in type(error).__mro__ if kind in table), None)


def _refuse(error: errors.MlgError) -> flask.Response:
    status = _nearest(HTTP_STATUS, error) or 500
    if status == 500:
        return _confess(error)
    if isinstance(error, errors.StoreError | errors.ModelError):
        log.error("%s: %s", error.code, error.reason, extra={"path": flask.request.path})
    retry_after = _nearest(RETRY_AFTER_SECONDS, error) if status in (503, 507) else None
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return _answer({"success": False, "reason": error.reason, "code": error.code}, status, headers)


def _refuse_http(error: HTTPException) -> flask.Response:
    status = error.code or 500
    headers = {name: value for name, value in error.get_headers() if name.lower() != "content-type"}
    if status == 404:
        reason = "There is nothing at this address. GET / lists what there is."
    elif status == 405:
        reason = f"{flask.request.method} is not taken here. Use: {headers.get('Allow', '')}."
    else:
        reason = f"{error.description or error.name}"
    code = _HTTP_CODES.get(status, "bad_request" if status < 500 else "internal_error")
    return _answer({"success": False, "reason": reason, "code": code}, status, headers)


def _confess(error: Exception) -> flask.Response:
    error_id = secrets.token_hex(4)
    log.error(
        "error %s at %s %s",
        error_id,
        flask.request.method,
        flask.request.path,
        exc_info=error,
        extra={"error": error_id},
    )
    reason = f"Something went wrong inside the server; its log says what (error {error_id})."
    return _answer({"success": False, "reason": reason, "code": "internal_error"}, 500)

"""Views for operators: the dashboard's figures as JSON, Prometheus metrics, and the controls.

The figures come from `server/status/dashboard.py`, what the controls do is in `store/processes/controls.py`. The forms
of the operator's page and programs use the same paths; a browser is redirected to the page.
"""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import Any

import flask
from werkzeug.wrappers import Response

from provider_image.errors import InvalidParams
from server.api.query import check_names
from server.api.responses import json_response, set_headers, wants_page
from server.api.schemas import success
from server.auth.guard import current_key
from server.context import Views
from server.endpoint import Field, operation
from server.errors import UnsupportedMediaType
from server.intake.uploads import read_fields
from server.record_json import fields
from server.status.dashboard import ban_fields
from server.status.metrics import CONTENT_TYPE, exposition, families
from store.clients.keys import Scope
from store.processes.controls import Mode
from store.rentals.providers import ProviderRecord

#: The page that shows the same; see `server/pages/operator.py`.
PAGE_PATH = "/ui/operator"
#: Longest temporary ban in seconds; a hundred years.
MAX_BAN_SECONDS = 100 * 365 * 86400.0

_TEXT, _TEXT_OR_NULL = {"type": "string"}, {"type": ["string", "null"]}
_CONTROL_SCHEMA = success("", hold={"type": ["object", "null"]}, token=_TEXT)
_PROVIDER = success(
    "id name is_banned",
    id=_TEXT,
    name=_TEXT,
    is_banned={"type": "boolean"},
    banned_until=_TEXT_OR_NULL,
    ban_reason=_TEXT_OR_NULL,
)
_STATUS: dict[str, Any] = {"type": "object", "required": ["success", "at", "queue", "batchers", "throughput", "money"]}
_REASON = Field(name="reason", help="Why; shown to clients whose requests wait.")
_operation = functools.partial(operation, tag="operator", scope=Scope.OPERATE)
_control = functools.partial(_operation, returns=_CONTROL_SCHEMA)


class OperatorViews(Views):
    """The views for operators."""

    # Figures

    @_operation("GET /operator/status", "Read all figures of the operator's page", returns=_STATUS)
    def operator_status(self) -> flask.Response:
        """Return all figures."""
        return json_response({"success": True, **self._context.dashboard.status()})

    # Controls

    @_control("POST /operator/pause", "Claim nothing new until work is resumed", query=(_REASON,))
    def pause(self) -> Response:
        """Pause: claimed requests are finished, all others wait."""
        return self._pause(Mode.PAUSED)

    @_control("POST /operator/drain", "Claim nothing new before the batchers are stopped", query=(_REASON,))
    def drain(self) -> Response:
        """Drain: a pause before the batchers are stopped."""
        return self._pause(Mode.DRAINING)

    @_control("POST /operator/resume", "Resume work")
    def resume(self) -> Response:
        """End a pause or a drain."""
        self._fields()
        self._store.controls.resume(by=_caller_name(), now=self._now())
        return _respond({"hold": None})

    @_control("POST /operator/run", "Make every batcher claim all queued requests now")
    def run_now(self) -> Response:
        """Run a cycle now."""
        self._fields()
        token = self._store.controls.run_now(by=_caller_name(), now=self._now())
        return _respond({"token": token})

    @_operation(
        "POST /operator/providers/<id>/ban",
        "Give a provider no more work",
        returns=_PROVIDER,
        query=(
            Field(name="reason", help="Why."),
            Field(
                name="seconds",
                help="For how long; without it the ban has no end.",
                schema={"type": "number", "exclusiveMinimum": 0, "maximum": MAX_BAN_SECONDS},
            ),
        ),
    )
    def ban(self, id: str) -> Response:
        """Ban a provider, by its address or an unambiguous name."""
        fields = self._fields("reason", "seconds")
        now = self._now()
        seconds = _seconds(fields.get("seconds", ""))
        provider = self._store.providers.ban(
            id,
            until=None if seconds is None else now + timedelta(seconds=seconds),
            reason=" ".join(fields.get("reason", "").split())[:200] or f"Banned by {_caller_name()}.",
            by_operator=True,
        )
        return self._provider_response(provider)

    @_operation("POST /operator/providers/<id>/unban", "Lift a provider's ban", returns=_PROVIDER)
    def unban(self, id: str) -> Response:
        """Lift a ban, also one that a batcher has set."""
        self._fields()
        return self._provider_response(self._store.providers.unban(id))

    @_operation("GET /metrics", "Metrics for Prometheus", scope=Scope.METRICS, content_type="text/plain")
    def metrics(self) -> flask.Response:
        """Return the metrics in Prometheus' text format."""
        return set_headers(flask.Response(exposition(families(self._context.dashboard)), content_type=CONTENT_TYPE))

    def _pause(self, mode: Mode) -> Response:
        reason = self._fields("reason").get("reason")
        given = self._store.controls.pause(mode, by=_caller_name(), now=self._now(), reason=reason)
        return _respond({"hold": fields(given, "mode by since reason")})

    def _fields(self, *known: str) -> dict[str, str]:
        """Read the fields of a control. :raises InvalidParams: one that it does not have."""
        if flask.request.mimetype not in ("", "application/x-www-form-urlencoded"):
            raise UnsupportedMediaType(
                "Put the fields into the URL, for example ?reason=update, or send them as a form."
            )
        fields = read_fields(flask.request, active_reads=self._context.active_reads)
        check_names(fields, known)
        return fields

    def _provider_response(self, provider: ProviderRecord) -> Response:
        self._context.dashboard.spending.invalidate()
        return _respond({**fields(provider, "id name"), **ban_fields(provider, self._now())})


def _caller_name() -> str:
    """Return the name of the caller's key, shown as the author of a control."""
    key = current_key()
    return "the operator" if key is None else key.name


def _respond(payload: dict[str, Any]) -> Response:
    return flask.redirect(PAGE_PATH, 303) if wants_page() else json_response({"success": True, **payload})


def _seconds(raw: str) -> float | None:
    if not raw.strip():
        return None
    try:
        seconds = float(raw)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_BAN_SECONDS:  # also refuses nan
        raise InvalidParams("seconds takes a number above 0; leave it out for a ban without an end.")
    return seconds

"""Views for operators: the dashboard's figures as JSON, Prometheus metrics, and the controls.

The figures come from `server/status/dashboard.py`, what the controls do is in `store/controls.py`. The forms of
the operator's page and programs use the same paths; a browser is redirected to the page.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import flask
from werkzeug.wrappers import Response

from provider_image.errors import InvalidParams
from server.api.query import check_names
from server.api.responses import json_response, set_headers, wants_page
from server.auth.guard import current_key
from server.context import Context
from server.endpoint import Field, operation
from server.errors import UnsupportedMediaType
from server.intake.uploads import read_fields
from server.status.metrics import CONTENT_TYPE, exposition, families
from store.controls import Mode
from store.keys import Scope
from store.providers import ProviderRecord
from store.rows import to_text

#: The page that shows the same; see `server/pages/operator.py`.
PAGE_PATH = "/ui/operator"
#: Longest temporary ban in seconds; a hundred years.
MAX_BAN_SECONDS = 100 * 365 * 86400.0

_CONTROL_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["success"],
    "properties": {"success": {"const": True}, "hold": {"type": ["object", "null"]}, "token": {"type": "string"}},
}
_PROVIDER: dict[str, Any] = {
    "type": "object",
    "required": ["success", "id", "name", "is_banned"],
    "properties": {
        "success": {"const": True},
        "id": {"type": "string"},
        "name": {"type": "string"},
        "is_banned": {"type": "boolean"},
        "banned_until": {"type": ["string", "null"]},
        "ban_reason": {"type": ["string", "null"]},
    },
}
_STATUS: dict[str, Any] = {"type": "object", "required": ["success", "at", "queue", "batchers", "throughput", "money"]}
_REASON = Field(name="reason", help="Why; shown to clients whose requests wait.")


def register(app: flask.Flask, context: Context) -> None:
    """Add the views to an application."""
    views = _OperatorViews(context)
    for rule, methods, view in (
        ("/operator/status", ["GET"], views.operator_status),
        ("/operator/pause", ["POST"], views.pause),
        ("/operator/drain", ["POST"], views.drain),
        ("/operator/resume", ["POST"], views.resume),
        ("/operator/run", ["POST"], views.run_now),
        ("/operator/providers/<id>/ban", ["POST"], views.ban),
        ("/operator/providers/<id>/unban", ["POST"], views.unban),
        ("/metrics", ["GET"], views.metrics),
    ):
        app.add_url_rule(rule, view.__name__, view, methods=methods)


class _OperatorViews:
    def __init__(self, context: Context) -> None:
        self._context = context

    # Figures

    @operation(
        summary="Read all figures of the operator's page",
        scope=Scope.OPERATE,
        tag="operator",
        responses={200: _STATUS},
    )
    def operator_status(self) -> flask.Response:
        """Return all figures."""
        return json_response({"success": True, **self._context.dashboard.status()})

    @operation(
        summary="Metrics for Prometheus",
        scope=Scope.READ,
        tag="operator",
        content_type="text/plain",
        responses={200: {"type": "string"}},
    )
    def metrics(self) -> flask.Response:
        """Return the metrics in Prometheus' text format."""
        return set_headers(flask.Response(exposition(families(self._context.dashboard)), content_type=CONTENT_TYPE))

    # Controls

    @operation(
        summary="Claim nothing new until work is resumed",
        scope=Scope.OPERATE,
        tag="operator",
        query=(_REASON,),
        responses={200: _CONTROL_SCHEMA},
    )
    def pause(self) -> Response:
        """Pause: claimed requests are finished, all others wait."""
        return self._pause(Mode.PAUSED)

    @operation(
        summary="Claim nothing new before the batchers are stopped",
        scope=Scope.OPERATE,
        tag="operator",
        query=(_REASON,),
        responses={200: _CONTROL_SCHEMA},
    )
    def drain(self) -> Response:
        """Drain: a pause before the batchers are stopped."""
        return self._pause(Mode.DRAINING)

    @operation(summary="Resume work", scope=Scope.OPERATE, tag="operator", responses={200: _CONTROL_SCHEMA})
    def resume(self) -> Response:
        """End a pause or a drain."""
        self._fields()
        self._context.store.controls.resume(by=_caller_name(), now=self._context.clock())
        return _respond({"hold": None})

    @operation(
        summary="Make every batcher claim all queued requests now",
        scope=Scope.OPERATE,
        tag="operator",
        responses={200: _CONTROL_SCHEMA},
    )
    def run_now(self) -> Response:
        """Run a cycle now."""
        self._fields()
        token = self._context.store.controls.run_now(by=_caller_name(), now=self._context.clock())
        return _respond({"token": token})

    @operation(
        summary="Give a provider no more work",
        scope=Scope.OPERATE,
        tag="operator",
        query=(
            Field(name="reason", help="Why."),
            Field(
                name="seconds",
                help="For how long; without it the ban has no end.",
                schema={"type": "number", "exclusiveMinimum": 0, "maximum": MAX_BAN_SECONDS},
            ),
        ),
        responses={200: _PROVIDER},
    )
    def ban(self, id: str) -> Response:
        """Ban a provider, by its address or an unambiguous name."""
        fields = self._fields("reason", "seconds")
        now = self._context.clock()
        seconds = _seconds(fields.get("seconds", ""))
        provider = self._context.store.providers.ban(
            id,
            until=None if seconds is None else now + timedelta(seconds=seconds),
            reason=" ".join(fields.get("reason", "").split())[:200] or f"Banned by {_caller_name()}.",
            by_operator=True,
        )
        return self._provider_response(provider)

    @operation(
        summary="Lift a provider's ban",
        scope=Scope.OPERATE,
        tag="operator",
        responses={200: _PROVIDER},
    )
    def unban(self, id: str) -> Response:
        """Lift a ban, also one that a batcher has set."""
        self._fields()
        return self._provider_response(self._context.store.providers.unban(id))

    def _pause(self, mode: Mode) -> Response:
        reason = self._fields("reason").get("reason")
        given = self._context.store.controls.pause(mode, by=_caller_name(), now=self._context.clock(), reason=reason)
        pause = {"mode": str(given.mode), "by": given.by, "since": to_text(given.since), "reason": given.reason}
        return _respond({"hold": pause})

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
        self._context.dashboard.invalidate()
        is_banned = provider.is_banned(self._context.clock())
        return _respond(
            {
                "id": provider.id,
                "name": provider.name,
                "is_banned": is_banned,
                "banned_until": to_text(provider.banned_until) if is_banned and provider.banned_until else None,
                "ban_reason": provider.ban_reason if is_banned else None,
            }
        )


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

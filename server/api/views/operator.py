"""What operators see and do: the figures as a page and as JSON, Prometheus' metrics, and the few levers there are.

Registered by `api.py`. The figures come from `server/status/dashboard.py`, what the levers mean stands in
`store/controls.py`. The forms of the page and programs use the same addresses; a browser is sent back to the
page.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import flask
from werkzeug.wrappers import Response

from provider_image.errors import InvalidParams
from server.api.endpoint import Field, operation
from server.api.responses import json_response
from server.context import Context
from server.errors import UnsupportedMediaType
from server.intake.uploads import read_fields
from server.pages.charts import minutes_chart, points_chart
from server.pages.render import page, wants_page
from server.status.dashboard import Dashboard
from server.status.metrics import CONTENT_TYPE, exposition, families
from store import controls
from store.controls import Mode
from store.keys import Scope
from store.providers import ProviderRecord
from store.records import to_text

PAGE_PATH = "/ui/operator"
#: Longest ban in seconds that has an end; a hundred years.
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
_REASON = Field(name="reason", help="Why; clients whose requests wait read it.")


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
        (PAGE_PATH, ["GET"], views.operator_page),
    ):
        app.add_url_rule(rule, view.__name__, view, methods=methods)


class _OperatorViews:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._dashboard = Dashboard(context.store, context.queue_stats, context.clock)

    # Looking

    @operation(
        summary="Everything that the operator's page shows",
        scope=Scope.OPERATE,
        tag="operator",
        responses={200: _STATUS},
    )
    def operator_status(self) -> flask.Response:
        """Show all figures."""
        return json_response({"success": True, **self._dashboard.status()})

    @operation(
        summary="The operator's page",
        scope=Scope.OPERATE,
        tag="pages",
        content_type="text/html",
        responses={200: {"type": "string"}},
    )
    def operator_page(self) -> flask.Response:
        """Show all figures, with the levers."""
        status = self._dashboard.status()
        return page(
            "operator.html",
            board=status,
            minutes=minutes_chart(status["throughput"]["minutes"]),
            points=points_chart(status["points"]),
        )

    @operation(
        summary="Metrics for Prometheus",
        scope=Scope.READ,
        tag="operator",
        content_type="text/plain",
        responses={200: {"type": "string"}},
    )
    def metrics(self) -> flask.Response:
        """Show the metrics in Prometheus' text format."""
        response = flask.Response(exposition(families(self._dashboard)), content_type=CONTENT_TYPE)
        response.headers["Cache-Control"] = "no-store"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    # Doing

    @operation(
        summary="Claim nothing new until work is resumed",
        scope=Scope.OPERATE,
        tag="operator",
        query=(_REASON,),
        responses={200: _CONTROL_SCHEMA},
    )
    def pause(self) -> Response:
        """Pause: what is under way is finished, everything else waits."""
        return self._pause(Mode.PAUSED)

    @operation(
        summary="Claim nothing new because the batchers are to be stopped",
        scope=Scope.OPERATE,
        tag="operator",
        query=(_REASON,),
        responses={200: _CONTROL_SCHEMA},
    )
    def drain(self) -> Response:
        """Drain: as a pause, before an end."""
        return self._pause(Mode.DRAINING)

    @operation(summary="Let work go on", scope=Scope.OPERATE, tag="operator", responses={200: _CONTROL_SCHEMA})
    def resume(self) -> Response:
        """End a pause or a drain."""
        self._fields()
        controls.resume(self._context.store, by=_caller_name(), now=self._context.clock())
        return _respond({"hold": None})

    @operation(
        summary="Have every batcher take everything that waits now",
        scope=Scope.OPERATE,
        tag="operator",
        responses={200: _CONTROL_SCHEMA},
    )
    def run_now(self) -> Response:
        """Run a batch now."""
        self._fields()
        token = controls.run_now(self._context.store, by=_caller_name(), now=self._context.clock())
        return _respond({"token": token})

    @operation(
        summary="Give a provider no more work",
        scope=Scope.OPERATE,
        tag="operator",
        query=(
            Field(name="reason", help="Why."),
            Field(
                name="seconds",
                help="For how long; for good without it.",
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
        provider = self._context.store.ban_provider(
            id,
            until=None if seconds is None else now + timedelta(seconds=seconds),
            reason=" ".join(fields.get("reason", "").split())[:200] or f"Banned by {_caller_name()}.",
            by_operator=True,
        )
        return self._provider_response(provider)

    @operation(
        summary="Lift a provider's ban, whoever banned it",
        scope=Scope.OPERATE,
        tag="operator",
        responses={200: _PROVIDER},
    )
    def unban(self, id: str) -> Response:
        """Lift a ban."""
        self._fields()
        return self._provider_response(self._context.store.unban_provider(id))

    # What they are made of

    def _pause(self, mode: Mode) -> Response:
        reason = self._fields("reason").get("reason")
        given = controls.pause(self._context.store, mode, by=_caller_name(), now=self._context.clock(), reason=reason)
        pause = {"mode": str(given.mode), "by": given.by, "since": to_text(given.since), "reason": given.reason}
        return _respond({"hold": pause})

    def _fields(self, *known: str) -> dict[str, str]:
        """Read the fields of a lever. :raises InvalidParams: one that it does not have."""
        if flask.request.mimetype not in ("", "application/x-www-form-urlencoded"):
            raise UnsupportedMediaType(
                "Put the fields into the URL, for example ?reason=update, or send them as a form."
            )
        fields = read_fields(flask.request, active_reads=self._context.active_reads)
        for name in fields:
            if name not in known:
                there = f"It takes: {', '.join(known)}." if known else "It takes none."
                raise InvalidParams(f"There is no parameter {name[:64]!r} here. {there}")
        return fields

    def _provider_response(self, provider: ProviderRecord) -> Response:
        self._dashboard.invalidate()
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
    """Name the caller for those who read of it later."""
    key = flask.g.get("key")
    return "the operator" if key is None else str(key.name)


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
        raise InvalidParams("seconds takes a number above 0, or nothing for a ban for good.")
    return seconds

"""Webhooks over HTTP, for whoever operates: what became of the messages, and sending one again.

Registered by `api.py`. Addresses are added and removed with `mlg webhooks`; no secret is ever shown here.
"""

from __future__ import annotations

from typing import Any

import flask

from provider_image.errors import InvalidParams
from server.api.responses import json_response
from server.context import Context
from server.endpoint import Field, operation
from server.intake.uploads import query_fields
from store.keys import Scope
from store.records import to_text
from store.webhooks import DELIVERY_STATES, DeliveryRecord

#: Messages that one answer lists at most.
MAX_LISTED = 500
_DELIVERY = {"type": "object", "properties": {"success": {"type": "boolean"}, "delivery": {"type": "object"}}}
_DELIVERIES = {
    "type": "object",
    "properties": {"success": {"type": "boolean"}, "deliveries": {"type": "array", "items": {"type": "object"}}},
}


def register(app: flask.Flask, context: Context) -> None:
    """Add the views to an application."""
    views = _WebhookViews(context)
    app.add_url_rule("/webhooks/deliveries", "deliveries", views.deliveries, methods=["GET"])
    app.add_url_rule("/webhooks/deliveries/<id>/redeliver", "redeliver", views.redeliver, methods=["POST"])


def serialize_delivery(delivery: DeliveryRecord) -> dict[str, Any]:
    """Build a message's JSON, without its body."""
    return {
        "id": delivery.id,
        "endpoint_id": delivery.endpoint_id,
        "url": delivery.url,
        "event": delivery.event,
        "subject": delivery.subject,
        "state": delivery.status,
        "attempts": delivery.attempts,
        **{
            name: None if moment is None else to_text(moment)
            for name, moment in (
                ("created_at", delivery.created_at),
                ("next_at", delivery.next_at),
                ("delivered_at", delivery.delivered_at),
                ("dead_at", delivery.dead_at),
            )
        },
        "last_status": delivery.last_status,
        "last_error": delivery.last_error,
    }


class _WebhookViews:
    def __init__(self, context: Context) -> None:
        self._context = context

    @operation(
        summary="List webhook messages, newest first",
        scope=Scope.OPERATE,
        tag="webhooks",
        query=(
            Field(
                name="state",
                help="Only those that stand there.",
                schema={"type": "string", "enum": list(DELIVERY_STATES)},
            ),
            Field(
                name="limit",
                help="How many at most.",
                schema={"type": "integer", "minimum": 1, "maximum": MAX_LISTED, "default": 50},
            ),
        ),
        responses={200: _DELIVERIES},
    )
    def deliveries(self) -> flask.Response:
        """List messages."""
        fields = query_fields(flask.request)
        state, limit = fields.pop("state", None), fields.pop("limit", "50")
        if fields:
            raise InvalidParams(f"There is no parameter {min(fields)[:64]!r} here. Parameters: limit, state.")
        if state is not None and state not in DELIVERY_STATES:
            raise InvalidParams(f"state takes one of: {', '.join(DELIVERY_STATES)}.")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 6 and 1 <= int(limit) <= MAX_LISTED):
            raise InvalidParams(f"limit takes 1 to {MAX_LISTED}.")
        found = self._context.store.list_deliveries(status=state, limit=int(limit))
        return json_response({"success": True, "deliveries": [serialize_delivery(one) for one in found]})

    @operation(
        summary="Send a webhook message again",
        scope=Scope.OPERATE,
        tag="webhooks",
        responses={200: _DELIVERY},
    )
    def redeliver(self, id: str) -> flask.Response:
        """Have a message sent again."""
        delivery = self._context.store.redeliver(id, now=self._context.clock())
        return json_response({"success": True, "delivery": serialize_delivery(delivery)})

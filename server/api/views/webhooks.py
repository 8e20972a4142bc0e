"""Views of webhook deliveries, for operators: list them, send one again.

Webhooks are added and removed with `mlg webhooks`; no secret is ever shown here.
"""

from __future__ import annotations

import flask

from provider_image.errors import InvalidParams
from server.api.query import check_names, parse_limit
from server.api.responses import json_response
from server.context import Context
from server.endpoint import Field, operation
from server.intake.uploads import query_fields
from server.serializers import serialize_delivery
from store.keys import Scope
from store.webhooks import DELIVERY_STATES

#: Deliveries in one response.
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


class _WebhookViews:
    def __init__(self, context: Context) -> None:
        self._context = context

    @operation(
        summary="List webhook deliveries, newest first",
        scope=Scope.OPERATE,
        tag="webhooks",
        query=(
            Field(
                name="state",
                help="Only those in this state.",
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
        """List deliveries."""
        fields = query_fields(flask.request)
        check_names(fields, ("limit", "state"))
        state, limit = fields.get("state"), parse_limit(fields.get("limit", "50"), MAX_LISTED)
        if state is not None and state not in DELIVERY_STATES:
            raise InvalidParams(f"state takes one of: {', '.join(DELIVERY_STATES)}.")
        found = self._context.store.webhooks.list_deliveries(status=state, limit=limit)
        return json_response({"success": True, "deliveries": [serialize_delivery(one) for one in found]})

    @operation(
        summary="Send a webhook delivery again",
        scope=Scope.OPERATE,
        tag="webhooks",
        responses={200: _DELIVERY},
    )
    def redeliver(self, id: str) -> flask.Response:
        """Queue a delivery again."""
        delivery = self._context.store.webhooks.redeliver(id, now=self._context.clock())
        return json_response({"success": True, "delivery": serialize_delivery(delivery)})

"""Views of webhooks: a new secret for the caller's key; for operators, list deliveries and send one again.

Webhooks are added and removed with `mlg webhooks`. A secret is shown once, when it is made.
"""

from __future__ import annotations

import functools

import flask

from server.api.query import limit_field, parse_limit, parse_state, read_query, state_field
from server.api.responses import json_response
from server.auth.guard import current_key_id
from server.context import Views
from server.endpoint import operation
from server.serializers import serialize_delivery
from store.clients.keys import Scope
from store.clients.webhooks import DELIVERY_STATES

#: Deliveries in one response.
MAX_LISTED = 500
_DELIVERY = {"type": "object", "properties": {"success": {"type": "boolean"}, "delivery": {"type": "object"}}}
_DELIVERIES = {
    "type": "object",
    "properties": {"success": {"type": "boolean"}, "deliveries": {"type": "array", "items": {"type": "object"}}},
}
_operation = functools.partial(operation, tag="webhooks")


class WebhookViews(Views):
    """The views of webhooks."""

    @_operation(
        "POST /webhooks/secret",
        "Make a new secret for the webhooks of your requests",
        Scope.SUBMIT,
        returns={
            "type": "object",
            "required": ["success", "secret"],
            "properties": {"success": {"type": "boolean"}, "secret": {"type": "string"}},
        },
    )
    def rotate_secret(self) -> flask.Response:
        """Replace the secret that signs messages to the URLs that were sent with the caller's key, and show it once."""
        read_query(flask.request)
        secret = self._store.webhooks.rotate_secret(None, current_key_id() or "")
        return json_response({"success": True, "secret": secret})

    @_operation(
        "GET /webhooks/deliveries",
        "List webhook deliveries, newest first",
        Scope.OPERATE,
        returns=_DELIVERIES,
        query=(state_field(DELIVERY_STATES), limit_field(MAX_LISTED)),
    )
    def deliveries(self) -> flask.Response:
        """List deliveries."""
        fields = read_query(flask.request, "limit", "state")
        limit, state = parse_limit(fields.get("limit"), MAX_LISTED), parse_state(fields.get("state"), DELIVERY_STATES)
        found = self._store.webhooks.list_deliveries(status=state, limit=limit)
        return json_response({"success": True, "deliveries": [serialize_delivery(one) for one in found]})

    @_operation(
        "POST /webhooks/deliveries/<id>/redeliver", "Send a webhook delivery again", Scope.OPERATE, returns=_DELIVERY
    )
    def redeliver(self, id: str) -> flask.Response:
        """Queue a delivery again."""
        delivery = self._store.webhooks.redeliver(id, now=self._now())
        return json_response({"success": True, "delivery": serialize_delivery(delivery)})

"""The views of the HTTP API, a noun a file: each module has `register(app, context)`."""

from __future__ import annotations

#: "module:function" of what is registered, in this order.
REGISTRY = (
    "server.api.views.health:register",
    "server.api.views.predictions:register",
    "server.api.views.batches:register",
    "server.api.views.requests:register",
    "server.api.views.events:register",
    "server.api.views.webhooks:register",
    "server.api.views.operator:register",
)

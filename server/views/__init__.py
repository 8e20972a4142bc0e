"""The views of the HTTP API, a noun a file: each module has `register(app, context)`."""

from __future__ import annotations

#: "module:function" of what is registered, in this order.
REGISTRY = (
    "server.views.home:register",
    "server.views.predictions:register",
    "server.views.batches:register",
    "server.views.listing:register",
    "server.views.pages:register",
    "server.views.batch_pages:register",
    "server.views.events:register",
    "server.views.webhooks:register",
    "server.views.api_page:register",
    "server.views.login:register",
    "server.views.operator:register",
)

"""The views of the HTTP API, a noun a file: each module has `register(app, context)`."""

from __future__ import annotations

#: "module:function" of what is registered, in this order.
REGISTRY = ("server.views.home:register", "server.views.predictions:register")

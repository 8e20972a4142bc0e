"""Views of the server itself: the routes, the API description, the models, and the two health checks.

Browsers get a page at `/` instead of the list of routes, see `server/pages/home.py`.
"""

from __future__ import annotations

import re
from typing import Any

import flask

from server.api.openapi import get_document
from server.api.responses import json_response
from server.context import Views
from server.endpoint import get_operation, operation
from server.serializers import serialize_models


class HealthViews(Views):
    """The views of the server itself."""

    @operation("GET /", "List the routes", None, returns="Index", tag="server")
    def index(self) -> flask.Response:
        """List the routes, with examples to copy; browsers get the home page instead."""
        base = flask.request.host_url.rstrip("/")
        return json_response(
            {
                "success": True,
                "name": "mlg",
                "routes": _routes(flask.current_app),
                "try": [
                    f"curl -F image=@kitten.jpg {base}/requestPrediction/efficientnet_lite0",
                    f"curl '{base}/readPrediction/ID?wait=30'",
                ],
            },
            headers={"Vary": "Accept"},
        )

    @operation(
        "GET /models",
        "List the models: what is installed, and how to install the others",
        None,
        returns="Models",
        tag="models",
    )
    def models(self) -> flask.Response:
        """List the catalogue and the custom models."""
        return json_response({"success": True, "models": serialize_models(self._context.settings.models)})

    @operation("GET /healthz", "Check that the process is alive", None, returns="Health", tag="server")
    def healthz(self) -> flask.Response:
        """Answer without using the store."""
        return json_response({"success": True, "status": "alive"})

    @operation("GET /readyz", "Check that the store can be written", None, returns="Readiness", tag="server")
    def readyz(self) -> flask.Response:
        """Check that the store can be written, and count the batchers that are alive."""
        self._store.check()
        batchers = len(self._context.queue_stats.batchers())
        payload: dict[str, Any] = {"success": True, "status": "ready", "store": "writable", "batchers": batchers}
        if not batchers:
            payload["warning"] = (
                "No batcher is running: requests are kept but not answered. Start one: mlg batch (or mlg up)."
            )
        return json_response(payload)

    @operation("GET /openapi.json", "Describe the API (OpenAPI 3.1)", None, returns="Document", tag="server")
    def openapi(self) -> flask.Response:
        """Return this description."""
        # It changes only with the server's version.
        return json_response(get_document(flask.current_app), headers={"Cache-Control": "public, max-age=300"})


def _routes(app: flask.Flask) -> dict[str, str]:
    """List the summary of each route."""
    found: dict[str, str] = {}
    for view in app.view_functions.values():
        declared = get_operation(view)
        if declared is not None and declared.path != "/":
            path = re.sub(r"{(\w+)}", lambda match: match[1].upper(), declared.template)
            found |= {f"{method} {path}": declared.summary for method in declared.methods}
    return found

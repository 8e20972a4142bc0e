"""Views of the server itself: the routes, the API description, the models, and the two health checks.

Browsers get a page at `/` instead of the list of routes, see `server/pages/home.py`.
"""

from __future__ import annotations

import re
from typing import Any

import flask

from server.api.openapi import get_document
from server.api.responses import json_response
from server.context import Context
from server.endpoint import get_operation, operation
from server.serializers import serialize_models


def register(app: flask.Flask, context: Context) -> None:
    """Add the views to an application."""
    views = _HealthViews(context)
    for rule, view in (
        ("/", views.index),
        ("/models", views.models),
        ("/healthz", views.healthz),
        ("/readyz", views.readyz),
        ("/openapi.json", views.openapi),
    ):
        app.add_url_rule(rule, view.__name__, view, methods=["GET"])


class _HealthViews:
    def __init__(self, context: Context) -> None:
        self._context = context

    @operation(summary="List the routes", scope=None, tag="server", responses={200: "Index"})
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
        summary="List the models: what is installed, and how to install the others",
        scope=None,
        tag="models",
        responses={200: "Models"},
    )
    def models(self) -> flask.Response:
        """List the catalogue and the custom models."""
        return json_response({"success": True, "models": serialize_models(self._context.settings.models)})

    @operation(summary="Check that the process is alive", scope=None, tag="server", responses={200: "Health"})
    def healthz(self) -> flask.Response:
        """Answer without using the store."""
        return json_response({"success": True, "status": "alive"})

    @operation(summary="Check that the store can be written", scope=None, tag="server", responses={200: "Readiness"})
    def readyz(self) -> flask.Response:
        """Check that the store can be written, and count the batchers that are alive."""
        self._context.store.check()
        batchers = len(self._context.queue_stats.batchers())
        payload: dict[str, Any] = {"success": True, "status": "ready", "store": "writable", "batchers": batchers}
        if not batchers:
            payload["warning"] = (
                "No batcher is running: requests are kept but not answered. Start one: mlg batch (or mlg up)."
            )
        return json_response(payload)

    @operation(summary="Describe the API (OpenAPI 3.1)", scope=None, tag="server", responses={200: "Document"})
    def openapi(self) -> flask.Response:
        """Return this description."""
        # It changes only with the server's version.
        return json_response(get_document(flask.current_app), headers={"Cache-Control": "public, max-age=300"})


def _routes(app: flask.Flask) -> dict[str, str]:
    """List the summary of each route."""
    found = {}
    for rule in app.url_map.iter_rules():
        declared = get_operation(app.view_functions[rule.endpoint])
        path = re.sub(r"<(?:[^:<>]+:)?(\w+)>", lambda match: match[1].upper(), rule.rule)
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
            if rule.rule != "/":
                found[f"{method} {path}"] = "" if declared is None else declared.summary
    return found

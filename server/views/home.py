"""What is here and whether it is well: the list of routes, the models, and the two checks of health."""

from __future__ import annotations

from typing import Any

import flask

from server.answers import show_models
from server.context import Context
from server.responses import answer


def register(app: flask.Flask, context: Context) -> None:
    """Add the views to an application."""
    views = _Home(context)
    for rule, view in (
        ("/", views.index),
        ("/models", views.models),
        ("/healthz", views.healthz),
        ("/readyz", views.readyz),
    ):
        app.add_url_rule(rule, view.__name__, view, methods=["GET"])


class _Home:
    def __init__(self, context: Context) -> None:
        self._context = context

    def index(self) -> flask.Response:
        """List the routes, with an example to copy."""
        base = flask.request.host_url.rstrip("/")
        return answer(
            {
                "success": True,
                "name": "mlg",
                "routes": {
                    "POST /requestPrediction/MODEL": "a picture as the form field `image` or as the raw body",
                    "GET /readPrediction/ID": "the answer, or why it waits; ?wait=SECONDS, ?top=1..20",
                    "DELETE /requests/ID": "cancel what has not been dispatched",
                    "POST /requests/ID/retry": "queue a failed or cancelled request again",
                    "GET /models": "what can be asked for",
                    "GET /healthz": "the process is alive",
                    "GET /readyz": "the store is usable",
                },
                "try": [
                    f"curl -F image=@kitten.jpg {base}/requestPrediction/efficientnet_lite0",
                    f"curl '{base}/readPrediction/ID?wait=30'",
                ],
            }
        )

    def models(self) -> flask.Response:
        """List the catalogue and the models of users' own."""
        return answer({"success": True, "models": show_models(self._context.settings.models)})

    def healthz(self) -> flask.Response:
        """Say that the process answers; does not touch the store."""
        return answer({"success": True, "status": "alive"})

    def readyz(self) -> flask.Response:
        """Say whether the store can be written, and whether a batcher is alive."""
        self._context.store.check()
        batchers = len(self._context.traffic.batchers())
        payload: dict[str, Any] = {"success": True, "status": "ready", "store": "writable", "batchers": batchers}
        if not batchers:
            payload["warning"] = (
                "No batcher is running: requests are kept but not answered. Start one: mlg batch (or mlg up)."
            )
        return answer(payload)

"""The home page, where images are sent from a browser.

With JavaScript the page calls the API; without it, its form posts to `/ui/send`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flask
from werkzeug.wrappers import Response

from server.api.responses import wants_page
from server.context import Views
from server.endpoint import PAGES, operation
from server.pages.render import page
from server.serializers import serialize_models
from store.clients.keys import Scope


class HomeViews(Views):
    """The home page, which replaces the list of routes at `/` for browsers, and its form."""

    def register(self, app: flask.Flask) -> None:
        """Add the views to an application."""
        super().register(app)
        app.before_request(self.home_for_browsers)

    def home_for_browsers(self) -> flask.Response | None:
        """Show the home page if a browser requests `/`."""
        is_index = flask.request.endpoint == "index" and flask.request.method in ("GET", "HEAD")
        if not is_index or not wants_page():
            return None
        models = [model for model in serialize_models(self._context.settings.models) if _is_for_home(model)]
        ready = sorted(
            (model for model in models if model["installed"] or model["builds_on_first_use"]),
            key=lambda model: (model["service"] != "classification", not model["installed"]),
        )
        missing = [model for model in models if model not in ready]
        ready.sort(key=lambda model: model["base"] is not None)  # embeddings last
        return page(
            "home.html",
            ready=[model for model in ready if model["base"] is None],
            embeddings=[model for model in ready if model["base"] is not None],
            missing=[model for model in missing if model["base"] is None],
            missing_embeddings=[model["name"] for model in missing if model["base"] is not None],
            pipelines=self._context.pipelines_of_images(),
            chosen=ready[0]["name"] if ready else "",
            batchers=self._context.queue_stats.batchers(),
            max_bytes=self._context.settings.max_image_bytes,
            base=flask.request.host_url.rstrip("/"),
        )

    @operation("POST /ui/send", "The form that sends an image", Scope.SUBMIT, tag=PAGES)
    def send_form(self) -> Response:
        """Accept an image from a browser without JavaScript and redirect to the request's page."""
        intake = self._context.intake
        request, _ = intake.add_image(intake.read_image(flask.request, model=None))
        return flask.redirect(f"/ui/requests/{request.id}", 303)


def _is_for_home(model: Mapping[str, Any]) -> bool:
    """Tell whether a model takes one image and nothing else, and answers with something else: see `gallery.py`.

    Those that take faces are on a page that asks for consent, see `faces.py`.
    """
    others = list(model["inputs"].values())[1:]
    needs_others = any(not one["is_optional"] for one in others)
    return (
        model["input"] == "image" and not needs_others and not model["answers_with_image"] and not model["takes_faces"]
    )

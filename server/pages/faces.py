"""The page that finds the faces of a photo and draws what is answered as it comes.

With JavaScript it calls the API; without it, its form posts to `/ui/send` and leads to the request's page.
"""

from __future__ import annotations

import flask

from server.context import Views
from server.endpoint import PAGES, operation
from server.pages.render import SHOWS_FACES, page
from server.serializers import serialize_models
from server.status.eta import format_duration
from store.clients.keys import Scope

#: The pipeline that the page sends photos to.
PIPELINE = "faces"


class FacesViews(Views):
    """The page about faces."""

    def register(self, app: flask.Flask) -> None:
        """Add the view to an application."""
        super().register(app)
        app.config[SHOWS_FACES] = self._context.settings.faces

    @operation("GET /ui/faces", "The page that finds faces", Scope.SUBMIT, tag=PAGES)
    def faces_page(self) -> flask.Response:
        """Show the page."""
        settings = self._context.settings
        models = [model for model in serialize_models(settings.models) if model["takes_faces"]]
        return page(
            "faces.html",
            is_on=settings.faces,
            pipeline=PIPELINE,
            kept_for=format_duration(settings.faces_seconds),
            own=[model for model in models if model["source"] == "own"],
            identifies=any(model["source"] == "own" and model["service"] == "embedding" for model in models),
            batchers=self._context.queue_stats.batchers(),
            max_bytes=settings.max_image_bytes,
        )

"""The gallery: a model makes an image of a photo, such as a painting, and the page shows how it becomes one.

With JavaScript the page calls the API and follows its events; without it, its form posts to `/ui/gallery/MODEL`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flask
from werkzeug.wrappers import Response

from provider_image.errors import UnknownModel
from provider_image.service import IMAGE_ANSWER, Param
from provider_image.services import load_service
from server.api.query import read_query
from server.auth.guard import visible_key_id
from server.context import Views
from server.endpoint import PAGES, operation
from server.pages.render import page
from server.serializers import serialize_models
from store.clients.keys import Scope
from store.requests import RequestRecord
from store.search import Query

#: What a reader should know of a model before a first try.
_NOTES = {
    "texture": (
        "Texture takes a surface as its style, such as gravel, bark, fabric or grass. It does not paint: strokes that "
        "follow what is on the photo need another model."
    ),
}
#: Earlier images below the form.
SHOWN_IMAGES = 12


class GalleryViews(Views):
    """The gallery, and its form."""

    @operation("GET /ui/gallery", "The page where models make images of photos", Scope.READ, tag=PAGES)
    def gallery(self) -> flask.Response:
        """Show the form of one model, and what it made before."""
        wanted = read_query(flask.request, "model").get("model")
        models = [model for model in serialize_models(self._context.settings.models) if _takes_images(model)]
        ready = sorted(
            (model for model in models if model["installed"] or model["builds_on_first_use"]),
            # What needs further images first: that is what the page is for.
            key=lambda model: (len(model["inputs"]) == 1, not model["installed"]),
        )
        chosen = next((model for model in ready if wanted in (None, model["name"])), None)
        if chosen is None and wanted is not None:
            raise UnknownModel(f"No installed model {wanted[:64]!r} answers with an image.")
        return page(
            "gallery.html",
            models=ready,
            help="" if chosen is None else load_service(chosen["service"]).help,
            note="" if chosen is None else _NOTES.get(chosen["name"], ""),
            missing=[model for model in models if model not in ready],
            chosen=chosen,
            inputs={} if chosen is None else _image_inputs(chosen),
            params=() if chosen is None else _params(chosen["service"]),
            earlier=() if chosen is None else self._earlier(chosen["name"]),
            batchers=self._context.queue_stats.batchers(),
            max_bytes=self._context.settings.max_image_bytes,
        )

    @operation("POST /ui/gallery/<model>", "The form of the gallery", Scope.SUBMIT, tag=PAGES)
    def gallery_form(self, model: str) -> Response:
        """Accept the images from a browser without JavaScript and redirect to the request's page."""
        intake = self._context.intake
        request, _ = intake.add_image(intake.read_image(flask.request, model))
        return flask.redirect(f"/ui/requests/{request.id}", 303)

    def _earlier(self, model: str) -> Sequence[RequestRecord]:
        query = Query(key_id=visible_key_id(), status="done", model=model)
        found = self._store.search.find(query, before=None, limit=SHOWN_IMAGES).requests
        return [request for request in found if IMAGE_ANSWER in request.files]


def _takes_images(model: Mapping[str, Any]) -> bool:
    """Tell whether a model answers an image with an image, and needs nothing but images.

    Those that take faces are on a page that asks for consent, see `faces.py`.
    """
    kinds = [one["kind"] for one in model["inputs"].values() if not one["is_optional"]]
    return model["answers_with_image"] and set(kinds) == {"image"} and not model["takes_faces"]


def _image_inputs(model: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    return {name: one for name, one in model["inputs"].items() if one["kind"] == "image"}


def _params(service_name: str) -> Sequence[Param]:
    return [param for param in load_service(service_name).params if not param.is_read_time]

"""The pages of pipelines: the list, and one with its picture and a form that sends an image; and the list as JSON."""

from __future__ import annotations

import flask
from markupsafe import Markup
from werkzeug.wrappers import Response

from server.api.query import read_query
from server.api.responses import json_response
from server.context import Views
from server.endpoint import PAGES, operation
from server.pages.pipeline_picture import draw_pipeline
from server.pages.render import page
from server.record_json import fields
from server.status.eta import format_duration
from store.clients.keys import Scope
from store.errors import UnknownRequest
from store.pipelines.definition import Pipeline
from store.pipelines.folder import PipelineFolder


class UnknownPipeline(UnknownRequest):
    """There is no pipeline with this name. GET /pipelines lists those there are."""


class PipelineViews(Views):
    """The pages of pipelines, and the list."""

    @operation("GET /pipelines", "List the pipelines that can be used", Scope.READ, returns="Pipelines", tag="models")
    def pipelines(self) -> flask.Response:
        """List the pipelines with their steps."""
        read_query(flask.request)
        found = [file.pipeline for file in self._folder().list_files() if file.pipeline is not None]
        return json_response({"success": True, "pipelines": [_serialize(one) for one in found]})

    @operation("GET /ui/pipelines", "The list of pipelines", Scope.READ, tag=PAGES)
    def pipelines_page(self) -> flask.Response:
        """List the pipelines, and why some cannot be used."""
        return page("pipelines.html", files=self._folder().list_files())

    @operation("GET /ui/pipelines/<name>", "The page of one pipeline", Scope.READ, tag=PAGES)
    def pipeline_page(self, name: str) -> flask.Response:
        """Show the picture of a pipeline and a form that sends an image to it."""
        pipeline = self._find(name)
        return page(
            "pipeline.html",
            pipeline=pipeline,
            # It has no text that is not escaped.
            picture=Markup(draw_pipeline(pipeline)),
            faces=self._context.settings.faces,
            kept_for=format_duration(self._context.settings.faces_seconds),
            base=flask.request.host_url.rstrip("/"),
        )

    @operation("POST /ui/pipelines/<name>", "The form that sends an image to a pipeline", Scope.SUBMIT, tag=PAGES)
    def send_to_pipeline(self, name: str) -> Response:
        """Accept an image and redirect to the page of its request."""
        intake = self._context.intake
        request, _ = intake.add_image(intake.read_image(flask.request, self._find(name).name))
        return flask.redirect(f"/ui/requests/{request.id}", 303)

    def _folder(self) -> PipelineFolder:
        settings = self._context.settings
        return PipelineFolder(settings.home, settings.models)

    def _find(self, name: str) -> Pipeline:
        found = self._folder().find(name)
        if found is None:
            raise UnknownPipeline()
        return found


def _serialize(pipeline: Pipeline) -> dict[str, object]:
    return {
        **fields(pipeline, "name title"),
        "inputs": {name: one.kind for name, one in pipeline.inputs().items()},
        "steps": [fields(step, "name model service for_each when collection") for step in pipeline.steps],
    }

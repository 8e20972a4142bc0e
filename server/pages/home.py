"""The home page, where images are sent from a browser.

Registered by `server/app.py`. With JavaScript the page calls the API; without it, its form posts to `/ui/send`.
"""

from __future__ import annotations

import flask
from werkzeug.wrappers import Response

from provider_image.images.decoding import check_upload
from provider_image.models.registry import find_row
from provider_image.services import load_service
from server.api.responses import wants_html
from server.auth.guard import check_quota, current_key_id
from server.context import Context
from server.intake.uploads import read_upload
from server.pages.render import page, page_operation
from server.serializers import serialize_models
from store import new_id
from store.keys import Scope
from store.records import NewRequest


def register(app: flask.Flask, context: Context) -> None:
    """Add the views to an application. The home page replaces the list of routes at `/` for browsers."""
    views = _HomeViews(context)
    app.add_url_rule("/ui/send", "send_form", views.send_form, methods=["POST"])
    app.before_request(views.home_for_browsers)


class _HomeViews:
    def __init__(self, context: Context) -> None:
        self._context = context

    def home_for_browsers(self) -> flask.Response | None:
        """Show the home page if a browser requests `/`."""
        if flask.request.endpoint != "index" or not wants_html():
            return None
        models = serialize_models(self._context.settings.models)
        ready = sorted(
            (model for model in models if model["installed"] or model["builds_on_first_use"]),
            key=lambda model: not model["installed"],
        )
        return page(
            "home.html",
            ready=ready,
            missing=[model for model in models if model not in ready],
            chosen=ready[0]["name"] if ready else "",
            batchers=self._context.queue_stats.batchers(),
            max_bytes=self._context.settings.max_image_bytes,
            base=flask.request.host_url.rstrip("/"),
        )

    @page_operation("The form that sends an image", scope=Scope.SUBMIT)
    def send_form(self) -> Response:
        """Accept an image from a browser without JavaScript and redirect to the request's page."""
        context = self._context
        context.check_backlog()
        check_quota()
        upload = read_upload(
            flask.request, max_image_bytes=context.settings.max_image_bytes, active_reads=context.active_reads
        )
        row = find_row(context.settings.models, upload.fields.get("model", ""))
        service = load_service(row.service)
        read_time = {param.name for param in service.params if param.is_read_time}
        new = NewRequest(
            id=new_id(),
            service=row.service,
            model=row.name,
            params={name: value for name, value in service.check_params({}).items() if name not in read_time},
            name=upload.name,
            digest=context.get_artefact_digest(row),
            key_id=current_key_id(),
            created_at=context.clock(),
        )
        with context.work_slots:
            check_upload(upload.data, context.settings.max_pixels)
            request = context.store.add(new, context.store.images.stage(upload.data))
        return flask.redirect(f"/ui/requests/{request.id}", 303)

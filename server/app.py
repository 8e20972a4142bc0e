"""The Flask application: the HTTP API and the pages, over a store.

Created by `server/process.py` in each server process, and by tests. The views are in `server/api/views/` and
`server/pages/`. Nothing here or there runs a model, or writes to the home except through the store.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import flask

from server.api.responses import install_error_handlers
from server.api.views.batches import BatchViews
from server.api.views.collections import CollectionViews
from server.api.views.events import EventViews
from server.api.views.health import HealthViews
from server.api.views.operator import OperatorViews
from server.api.views.predictions import PredictionViews
from server.api.views.requests import RequestViews
from server.api.views.trainings import TrainingViews
from server.api.views.usage import UsageViews
from server.api.views.webhooks import WebhookViews
from server.auth.guard import install_guard
from server.auth.memory import RequestMemory
from server.context import Context, Views
from server.pages.api_reference import ApiReferenceViews
from server.pages.batches import BatchPageViews
from server.pages.collections import CollectionPageViews
from server.pages.faces import FacesViews
from server.pages.gallery import GalleryViews
from server.pages.home import HomeViews
from server.pages.login import LoginViews
from server.pages.operator import OperatorPageViews
from server.pages.pipelines import PipelineViews
from server.pages.render import RenderViews
from server.pages.requests import RequestPageViews
from server.pages.trainings import TrainingPageViews
from server.pages.usage import UsagePageViews
from server.settings import ServerSettings
from store.store import Store

_EXTENSION = "mlg_context"
#: All views, those of the API in the order of its description.
VIEWS: tuple[type[Views], ...] = (
    HealthViews,
    PredictionViews,
    BatchViews,
    RequestViews,
    CollectionViews,
    EventViews,
    TrainingViews,
    UsageViews,
    WebhookViews,
    OperatorViews,
    RenderViews,
    HomeViews,
    GalleryViews,
    RequestPageViews,
    BatchPageViews,
    CollectionPageViews,
    TrainingPageViews,
    FacesViews,
    PipelineViews,
    UsagePageViews,
    OperatorPageViews,
    ApiReferenceViews,
    LoginViews,
)


class _Application(flask.Flask):
    """Flask for views that are all plain functions, so that it need not ask each whether it is a coroutine."""

    def ensure_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
        return func


def create_app(
    settings: ServerSettings, store: Store, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> flask.Flask:
    """Create the application; `get_context` returns what its views share."""
    app = _Application("mlg", static_folder=None)
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    context = Context.create(settings, store, clock)
    app.extensions[_EXTENSION] = context
    RequestMemory(app, largest_bytes=settings.max_image_bytes)
    install_guard(app, settings, store.keys, clock)
    # After the guard, because idempotency keys are separate for each API key.
    app.before_request(context.repetitions.answer_repeated)
    for views in VIEWS:
        views(context).register(app)
    install_error_handlers(app)
    return app


def get_context(app: flask.Flask) -> Context:
    """Return what the views of an application share."""
    context: Context = app.extensions[_EXTENSION]
    return context

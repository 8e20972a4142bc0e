"""The Flask application: the HTTP API and the pages, over a store.

Created by `server/process.py` in each server process, and by tests. The views are in `server/api/views/` and
`server/pages/`. Nothing here or there runs a model, or writes to the home except through the store.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime

import flask

from server.api.idempotency import install_idempotency
from server.api.responses import install_error_handlers
from server.api.views.batches import BatchViews
from server.api.views.events import EventViews
from server.api.views.health import HealthViews
from server.api.views.operator import OperatorViews
from server.api.views.predictions import PredictionViews
from server.api.views.requests import RequestViews
from server.api.views.webhooks import WebhookViews
from server.auth.guard import install_guard
from server.context import Context, Views
from server.intake.accept import Intake
from server.intake.uploads import ActiveReads
from server.live.changes import ChangeDispatcher
from server.live.long_poll import LongPoller
from server.pages.api_reference import ApiReferenceViews
from server.pages.batches import BatchPageViews
from server.pages.home import HomeViews
from server.pages.login import LoginViews
from server.pages.operator import OperatorPageViews
from server.pages.render import RenderViews
from server.pages.requests import RequestPageViews
from server.settings import ServerSettings
from server.status.dashboard import Dashboard
from server.status.queue_stats import QueueStats
from store.store import Store

#: All views, those of the API in the order of its description.
VIEWS: tuple[type[Views], ...] = (
    HealthViews,
    PredictionViews,
    BatchViews,
    RequestViews,
    EventViews,
    WebhookViews,
    OperatorViews,
    RenderViews,
    HomeViews,
    RequestPageViews,
    BatchPageViews,
    OperatorPageViews,
    ApiReferenceViews,
    LoginViews,
)


def create_app(
    settings: ServerSettings,
    store: Store,
    *,
    long_poller: LongPoller | None = None,
    change_dispatcher: ChangeDispatcher | None = None,
    active_reads: ActiveReads | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> flask.Flask:
    """Create the application.

    :param long_poller: holds reads; by default one for half of the server's threads.
    :param change_dispatcher: notifies event streams.
    :param active_reads: counts the threads that read bodies.
    """
    app = flask.Flask("mlg", static_folder=None)
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    active_reads = active_reads or ActiveReads()
    queue_stats = QueueStats(store)
    work_slots = threading.BoundedSemaphore(settings.server_threads)
    context = Context(
        settings=settings,
        store=store,
        intake=Intake(
            settings, store, queue_stats=queue_stats, active_reads=active_reads, work_slots=work_slots, clock=clock
        ),
        long_poller=long_poller or LongPoller(store.requests, capacity=settings.server_threads // 2),
        change_dispatcher=change_dispatcher or ChangeDispatcher(store.changes, capacity=settings.max_streams),
        active_reads=active_reads,
        clock=clock,
        queue_stats=queue_stats,
        dashboard=Dashboard(store, queue_stats, clock),
        work_slots=work_slots,
    )
    install_guard(app, settings, store.keys, clock)
    install_idempotency(app, context)
    for views in VIEWS:
        views(context).register(app)
    install_error_handlers(app)
    return app

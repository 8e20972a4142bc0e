"""The Flask application: the HTTP API and the pages, over a store.

Created by `server/process.py` in each server process, and by tests. The views are in `server/api/views/` and
`server/pages/`. Nothing here or there runs a model, or writes to the home except through the store.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from datetime import UTC, datetime

import flask

from server.api.idempotency import install_idempotency
from server.api.responses import install_error_handlers
from server.auth.guard import install_guard
from server.context import Context
from server.intake.accept import Intake
from server.intake.uploads import ActiveReads
from server.live.changes import ChangeDispatcher
from server.live.long_poll import LongPoller
from server.settings import ServerSettings
from server.status.dashboard import Dashboard
from server.status.queue_stats import QueueStats
from store.store import Store

#: "module:function" that adds views to an application; those of the API in the order of its description.
VIEWS = (
    "server.api.views.health:register",
    "server.api.views.predictions:register",
    "server.api.views.batches:register",
    "server.api.views.requests:register",
    "server.api.views.events:register",
    "server.api.views.webhooks:register",
    "server.api.views.operator:register",
    "server.pages.render:register",
    "server.pages.home:register",
    "server.pages.requests:register",
    "server.pages.batches:register",
    "server.pages.operator:register",
    "server.pages.api_reference:register",
    "server.pages.login:register",
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
    for name in VIEWS:
        module, _, function = name.partition(":")
        getattr(importlib.import_module(module), function)(app, context)
    install_error_handlers(app)
    return app

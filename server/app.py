"""The HTTP API: a Flask application over a store.

Made by `wsgi.py` in each server process, and by tests. The views stand in `server/api/views/`, a noun a file. Nothing
here or there runs a model or writes to the home beside the store.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from datetime import UTC, datetime

import flask

from server.api.idempotency import install_idempotency
from server.api.responses import install_error_handlers
from server.api.views import REGISTRY
from server.auth.guard import install_guard
from server.context import Context
from server.intake.uploads import ActiveReads
from server.live.changes import ChangeDispatcher
from server.live.long_poll import LongPoller
from server.settings import ServerSettings
from server.status.queue_stats import QueueStats
from store.sqlite import SqliteStore


def create_app(
    settings: ServerSettings,
    store: SqliteStore,
    *,
    long_poller: LongPoller | None = None,
    change_dispatcher: ChangeDispatcher | None = None,
    active_reads: ActiveReads | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> flask.Flask:
    """Make the application.

    :param long_poller: holds reads; one for half of the server's threads is made when there is none.
    :param change_dispatcher: tells listeners what changes.
    :param active_reads: where reads of slow bodies are noted.
    """
    app = flask.Flask("mlg", static_folder=None)
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    context = Context(
        settings=settings,
        store=store,
        long_poller=long_poller or LongPoller(store, capacity=settings.server_threads // 2),
        change_dispatcher=change_dispatcher or ChangeDispatcher(store, capacity=settings.max_streams),
        active_reads=active_reads or ActiveReads(),
        clock=clock,
        queue_stats=QueueStats(store),
        work_slots=threading.BoundedSemaphore(settings.server_threads),
    )
    install_guard(app, context)
    install_idempotency(app, context)
    for name in REGISTRY:
        module, _, function = name.partition(":")
        getattr(importlib.import_module(module), function)(app, context)
    install_error_handlers(app)
    return app

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

from server.api.idempotency import keep_first_answers
from server.api.responses import handle_errors
from server.api.views import REGISTRY
from server.auth.guard import guard_views
from server.context import Backend, Context
from server.intake.uploads import Readings
from server.live.changes import Events
from server.live.long_poll import Notifier
from server.settings import ServerSettings
from server.status.queue_stats import Traffic


def create_app(
    settings: ServerSettings,
    store: Backend,
    *,
    notifier: Notifier | None = None,
    events: Events | None = None,
    readings: Readings | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> flask.Flask:
    """Make the application.

    :param notifier: holds reads; one for half of the server's threads is made when there is none.
    :param events: tells listeners what changes.
    :param readings: where reads of slow bodies are noted.
    """
    app = flask.Flask("mlg", static_folder=None)
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    context = Context(
        settings=settings,
        store=store,
        notifier=notifier or Notifier(store, most=settings.server_threads // 2),
        events=events or Events(store, most=settings.max_streams),
        readings=readings or Readings(),
        clock=clock,
        traffic=Traffic(store),
        work=threading.BoundedSemaphore(settings.server_threads),
    )
    guard_views(app, context)
    keep_first_answers(app, context)
    for name in REGISTRY:
        module, _, function = name.partition(":")
        getattr(importlib.import_module(module), function)(app, context)
    handle_errors(app)
    return app

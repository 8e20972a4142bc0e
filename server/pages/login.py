"""Logging in to the pages with an API key, and logging out. The page with the form is in `pages.py`.

Registered by `api.py`. A browser gets a signed cookie in place of the key, see `server/auth/sessions.py`; a program
does not need any of this.
"""

from __future__ import annotations

from typing import Any

import flask
from werkzeug.wrappers import Response

from provider_image.errors import MalformedRequest
from server.api.responses import json_response, wants_page
from server.auth.guard import check_same_origin, get_guard
from server.context import Context
from server.endpoint import operation
from server.errors import KeyRefused
from server.intake.uploads import read_fields, read_json
from server.pages.render import page

#: Where somebody who logged in goes when the form says nothing better, and who logged out.
_FIRST_PAGE, _LOGIN_PAGE = "/", "/ui/login"
_KEY = {"type": "string", "format": "password"}
_BODY: dict[str, Any] = {
    "type": "object",
    "required": ["key"],
    "properties": {
        "key": {**_KEY, "description": "An API key."},
        "next": {"type": "string", "description": "Path of the page to go to."},
    },
}
_ANSWER: dict[str, Any] = {"type": "object", "properties": {"success": {"const": True}}, "required": ["success"]}


def register(app: flask.Flask, context: Context) -> None:
    """Add the views to an application."""
    views = _LoginViews(context)
    app.add_url_rule("/login", "log_in", views.log_in, methods=["POST"])
    app.add_url_rule("/logout", "log_out", views.log_out, methods=["POST"])


class _LoginViews:
    def __init__(self, context: Context) -> None:
        self._context = context

    @operation(
        summary="Log in to the pages with an API key",
        scope=None,
        tag="pages",
        body={"application/x-www-form-urlencoded": _BODY, "application/json": _BODY},
        responses={200: _ANSWER, 303: _ANSWER},
    )
    def log_in(self) -> Response:
        """Give the browser a cookie: 303 to a page, or JSON for who does not ask for pages."""
        check_same_origin(is_strict=False)
        is_json = flask.request.mimetype == "application/json"
        fields = (read_json if is_json else read_fields)(flask.request, active_reads=self._context.active_reads)
        if "key" in flask.request.args:
            raise MalformedRequest("A key does not belong into the URL, where logs would keep it. Send it in the body.")
        guard = get_guard(flask.current_app)
        next_page = _local_path(fields.get("next", ""))
        try:
            record = guard.log_in(fields.get("key", "").strip())
        except KeyRefused as error:
            if is_json or not wants_page():
                raise
            return page("login.html", status=401, notice=error.reason, next=next_page)
        response = json_response({"success": True}) if is_json or not wants_page() else flask.redirect(next_page, 303)
        guard.sessions.start(response, record.id)
        return response

    @operation(summary="Log out of the pages", scope=None, tag="pages", responses={200: _ANSWER, 303: _ANSWER})
    def log_out(self) -> Response:
        """Have the browser forget its cookie."""
        check_same_origin(is_strict=False)
        response = flask.redirect(_LOGIN_PAGE, 303) if wants_page() else json_response({"success": True})
        get_guard(flask.current_app).sessions.end(response)
        return response


def _local_path(path: str) -> str:
    """Return a path of this server; what could lead to another one becomes the first page."""
    is_own = path.startswith("/") and not path.startswith("//") and "\\" not in path and path.isprintable()
    return path if is_own else _FIRST_PAGE

"""Signing in to the pages with an API key, and signing out.

A browser gets a signed cookie in place of the key, see `server/auth/sessions.py`;
programs send the key itself and need none of this.
"""

from __future__ import annotations

import flask
from werkzeug.wrappers import Response

from provider_image.errors import MalformedRequest
from server.api.responses import json_response, wants_page
from server.api.schemas import object_schema, string, success
from server.auth.guard import check_same_origin, get_guard
from server.auth.sessions import SESSION_SECONDS
from server.context import Views
from server.endpoint import PAGES, operation
from server.errors import KeyRefused
from server.intake.uploads import read_fields, read_json
from server.pages.render import page

_HOME_PAGE, _LOGIN_PAGE = "/", "/ui/login"
_BODY = object_schema("key", key=string("An API key.", format="password"), next=string("Path of the page to go to."))
_ANSWER = success()


class LoginViews(Views):
    """The views that sign in and out."""

    @operation("GET /ui/login", "The page to sign in", None, tag=PAGES)
    def login_page(self) -> flask.Response:
        """Show the form for the key."""
        return _render_form(next=safe_next_page(flask.request.args.get("next", "")))

    @operation(
        "POST /login",
        "Log in to the pages with an API key",
        None,
        tag=PAGES,
        body={"application/x-www-form-urlencoded": _BODY, "application/json": _BODY},
        responses={200: _ANSWER, 303: _ANSWER},
    )
    def log_in(self) -> Response:
        """Set the session cookie: 303 to a page for browsers, JSON for programs."""
        check_same_origin(is_strict=False)
        request, reads = flask.request, self._context.active_reads
        is_json = request.mimetype == "application/json"
        fields = read_json(request, active_reads=reads)[0] if is_json else read_fields(request, active_reads=reads)
        if "key" in request.args:
            raise MalformedRequest("Send the key in the body: a key in the URL ends up in logs.")
        guard = get_guard(flask.current_app)
        next_page = safe_next_page(fields.get("next", ""))
        try:
            record = guard.log_in(fields.get("key", "").strip())
        except KeyRefused as error:
            if is_json or not wants_page():
                raise
            return _render_form(next=next_page, status=401, notice=error.reason)
        response = json_response({"success": True}) if is_json or not wants_page() else flask.redirect(next_page, 303)
        guard.sessions.start(response, record.id)
        return response

    @operation("POST /logout", "Log out of the pages", None, tag=PAGES, responses={200: _ANSWER, 303: _ANSWER})
    def log_out(self) -> Response:
        """Delete the session cookie."""
        check_same_origin(is_strict=False)
        response = flask.redirect(_LOGIN_PAGE, 303) if wants_page() else json_response({"success": True})
        get_guard(flask.current_app).sessions.end(response)
        return response


def _render_form(*, next: str, status: int = 200, notice: str | None = None) -> flask.Response:
    return page("login.html", status=status, notice=notice, next=next, session_seconds=SESSION_SECONDS)


def safe_next_page(url: str) -> str:
    """Return the URL to redirect to after signing in: the given one if it is a page of this server, else the home page.

    Checked when the form is shown and when it is sent, so that no link can lead from here to another site.
    """
    is_page = url.startswith("/ui/") and "//" not in url and "\\" not in url and url.isprintable()
    return url if is_page else _HOME_PAGE

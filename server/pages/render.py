"""What all pages share: HTML from templates, response headers, static files, errors as pages.

Called by the view modules beside it. It must not read the store. Pages are rendered on the server and work without
JavaScript; static files come from this package only, so a browser never contacts another host.

The URL of a static file contains a hash of all static files: browsers may cache a file forever and never combine an old
one with a new page. The hash is common to all files because a script imports another by a relative URL.
"""

from __future__ import annotations

import functools
import hashlib
import mimetypes
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import flask
import jinja2
from werkzeug.wrappers import Response

from server.api.responses import error_response, wants_page
from server.auth.guard import current_key, get_guard
from server.context import Views
from server.endpoint import PAGES, operation
from server.pages.cards import STATE_LABELS, best_class, number_of
from server.serializers import is_image
from server.status.eta import format_duration
from store.amounts import format_amount, to_amount
from store.errors import StoreError
from store.rows import to_text

PACKAGE_FOLDER = Path(__file__).parent
#: No inline scripts or styles, no other hosts, no framing.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # A URL contains an id, and on a server without keys an id is enough to read a result.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
#: Types of the static files; the operating system's table may differ.
_MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
#: The application's configuration that shows the link to the page about faces.
SHOWS_FACES = "SHOWS_FACES"
_ERROR_TITLES = {401: "Sign in", 403: "Not allowed", 404: "Not found", 429: "Too many requests", 503: "Unavailable"}


class RenderViews(Views):
    """The static files; shows errors under /ui/ as pages."""

    def register(self, app: flask.Flask) -> None:
        """Add the view to an application."""
        super().register(app)
        app.after_request(_render_error)

    @operation("GET /static/<digest>/<path:name>", "A static file of the pages", None, tag=PAGES)
    def static(self, digest: str, name: str) -> flask.Response:
        """Return a stylesheet, a script or an icon."""
        known, files = _static_files()
        if name not in files or known != digest:
            return error_response("There is no such file.", "not_found", 404)
        kind = _MEDIA_TYPES.get(Path(name).suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
        response = flask.Response(files[name], mimetype=kind)
        response.headers.update({**_HEADERS, "Cache-Control": "public, max-age=31536000, immutable"})
        return response


def page(template: str, *, status: int = 200, **variables: Any) -> flask.Response:
    """Render a template as a response.

    :param template: a file in `templates/` that extends `base.html`.
    :param variables: the template's variables; the values are escaped.
    """
    found = _environment().get_template(template)
    html = found.render(
        path=flask.request.path,
        key=current_key(),
        needs_key=_is_login_available(),
        shows_faces=flask.current_app.config.get(SHOWS_FACES, False),
        **variables,
    )
    response = flask.Response(html, status, mimetype="text/html")
    # `/` is a page for browsers and JSON for programs.
    response.headers.update({**_HEADERS, "Cache-Control": "no-store", "Vary": "Accept, Cookie"})
    return response


def static_url(name: str) -> str:
    """Return the URL of a file in `static/`. :raises KeyError: there is none."""
    digest, files = _static_files()
    if name not in files:
        raise KeyError(name)
    return f"/static/{digest}/{name}"


def url_with_query(path: str, fields: Mapping[str, str]) -> str:
    """Return a path with its query."""
    return f"{path}?{urlencode(fields)}" if fields else path


def _render_error(response: flask.Response) -> Any:
    """Turn a JSON error into a page for browsers; a browser that needs a key is redirected to the login page."""
    path = flask.request.path
    if response.status_code < 400 or not response.is_json or not (path.startswith("/ui/") and wants_page()):
        return response
    if response.status_code == 401 and path != "/ui/login":
        query = {"next": path} if flask.request.method == "GET" else {}
        return _with_error_headers(response, flask.redirect(url_with_query("/ui/login", query), 303))
    body = response.get_json(silent=True) or {}
    is_unknown = body.get("code") == "not_found"
    reason = "This page does not exist." if is_unknown else body.get("reason", "The request failed.")
    shown = page(
        "error.html",
        status=response.status_code,
        title=_ERROR_TITLES.get(response.status_code, "Something went wrong"),
        reason=reason,
    )
    return _with_error_headers(response, shown)


def _with_error_headers(old: flask.Response, new: Response) -> Any:
    """Copy the headers that belong to an error."""
    for name in ("Retry-After", "WWW-Authenticate", "Allow"):
        if name in old.headers:
            new.headers[name] = old.headers[name]
    return new


def _is_login_available() -> bool:
    """Return whether the server requires keys, so that signing in is of use."""
    try:
        return not get_guard(flask.current_app).is_open()
    except StoreError:
        return False


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PACKAGE_FOLDER / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        auto_reload=False,
    )
    environment.globals["static"] = static_url
    environment.filters.update(
        amount=to_amount,
        money=format_amount,
        best=best_class,
        is_image=is_image,
        number=number_of,
        figure=_format_number,
        percent=_format_percent,
        duration=format_duration,
        bytes=_format_bytes,
        moment=_format_time,
        iso=lambda moment: to_text(_as_datetime(moment)),
        # A class name: tiger cat.
        label=lambda name: str(name).replace("_", " "),
        state=lambda status: STATE_LABELS.get(status, status),
        # The first characters of an id are the same for ids of the same time.
        short=lambda id: id[-8:],
    )
    return environment


@functools.cache
def _static_files() -> tuple[str, dict[str, bytes]]:
    """Return the hash of all files, and name -> bytes; the files are small and read once."""
    folder = PACKAGE_FOLDER / "static"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    whole = hashlib.sha256()
    for name, data in sorted(files.items()):
        whole.update(f"{name}\0{len(data)}\0".encode() + data)
    return whole.hexdigest()[:12], files


def _format_percent(share: float) -> str:
    """Format a fraction: 40.8 %. Only exactly 0 and 1 become 0 % and 100 %."""
    percent = share * 100
    if 0 < percent < 0.1:
        return "< 0.1 %"
    if 99.9 < percent < 100:
        return "> 99.9 %"
    return f"{percent:.1f} %"


def _format_number(number: float) -> str:
    """Format the number of a regression with six digits: 3.72."""
    return f"{number:.6g}"


def _format_bytes(count: float) -> str:
    """Format a size: 48 KB."""
    if count < 2**10:
        return f"{count:.0f} bytes"
    if count < 2**20:
        return f"{count / 2**10:.0f} KB"
    if count < 2**30:
        return f"{count / 2**20:.3g} MB"
    return f"{count / 2**30:.3g} GB"


def _as_datetime(moment: datetime | str) -> datetime:
    aware = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
    return aware.astimezone(UTC)


def _format_time(moment: datetime | str) -> str:
    """Format a time for people, in UTC; `page.js` replaces it with the reader's local time."""
    return _as_datetime(moment).strftime("%Y-%m-%d %H:%M:%S UTC")

"""Pages as HTML: templates, the headers that every page has, and the addresses of the files beside them.

Called by the views that answer browsers. Nothing here reads the store. A page is filled in on the server and works
without JavaScript; the files beside it come from this package only, so that no browser ever asks another host.

The files' addresses hold a hash of the bytes of all of them: browsers keep them for good and never show an old one with
a new page. One hash for all, because a script imports its neighbour by a relative address.
"""

from __future__ import annotations

import functools
import hashlib
import mimetypes
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import flask
import jinja2

from server.auth.guard import get_guard
from server.status.eta import format_duration
from store.errors import StoreError

PACKAGE_FOLDER = Path(__file__).parent
#: No inline script, no inline style, nobody else's host, nobody's frame.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Addresses hold ids, and an id is all that it takes to read an answer.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
#: The file types that are here; the machine's own table may say otherwise.
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def page(template: str, *, status: int = 200, **variables: Any) -> flask.Response:
    """Fill in a template and answer with it.

    :param template: a file in `templates/`; it extends `base.html` and fills its blocks `title` and `main`.
    :param variables: what the template names. Everything is escaped.
    """
    html = (
        _environment()
        .get_template(template)
        .render(here=flask.request.path, key=flask.g.get("key"), asks_for_keys=_is_login_available(), **variables)
    )
    response = flask.Response(html, status, mimetype="text/html")
    response.headers.update(_HEADERS)
    response.headers["Cache-Control"] = "no-store"
    # The first page of a server looks otherwise to those who ask for JSON.
    response.headers["Vary"] = "Accept, Cookie"
    return response


def static_url(name: str) -> str:
    """Return the address of a file in `static/`. :raises KeyError: there is none."""
    digest, files = _static_files()
    if name not in files:
        raise KeyError(name)
    return f"/static/{digest}/{name}"


def static_file(digest: str, name: str) -> flask.Response | None:
    """Answer with a file in `static/`; None if there is none under that name and hash."""
    known, files = _static_files()
    if name not in files or known != digest:
        return None
    suffix = Path(name).suffix
    kind = _TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    response = flask.Response(files[name], mimetype=kind)
    response.headers.update(_HEADERS)
    response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
    return response


def _is_login_available() -> bool:
    """Tell whether there is anything to sign in to."""
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
        percent=_format_percent,
        duration=format_duration,
        bytes=_format_bytes,
        moment=_format_time,
        iso=_format_iso,
        label=_format_label,
        short=_short_id,
    )
    return environment


@functools.cache
def _static_files() -> tuple[str, dict[str, bytes]]:
    """Return the hash of all, and name -> bytes. Some small files, read once."""
    folder = PACKAGE_FOLDER / "static"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    whole = hashlib.sha256()
    for name, data in sorted(files.items()):
        whole.update(f"{name}\0{len(data)}\0".encode() + data)
    return whole.hexdigest()[:12], files


def _format_percent(share: float) -> str:
    """Write a share of one: 40.8 %; never 0 for what is not nothing, never 100 for what is not all."""
    percent = share * 100
    if 0 < percent < 0.1:
        return "< 0.1 %"
    if 99.9 < percent < 100:
        return "> 99.9 %"
    return f"{percent:.1f} %"


def _format_bytes(count: float) -> str:
    """Write a size: 48 KB."""
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
    """Write a time for people, in UTC; the script in the page turns it into the reader's own time."""
    return _as_datetime(moment).strftime("%Y-%m-%d %H:%M:%S UTC")


def _format_iso(moment: datetime | str) -> str:
    """Write a time for machines."""
    return _as_datetime(moment).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _format_label(name: str) -> str:
    """Write a class's name for people: tiger cat."""
    return str(name).replace("_", " ")


def _short_id(id: str) -> str:
    """Write an id's last digits, those that differ."""
    return id[-8:]

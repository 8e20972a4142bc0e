"""Who may do what: every request passes here before its view, and views ask here whose a thing is.

`api.py` has the guard look at every request. It finds what the view says that it needs (`operations.py`):

- A view with scope None is open to everybody. One that says nothing of itself is for operators only.
- While there was never a key in the store, and the server listens on this machine only or was told to be open
  (MLG_OPEN), everybody may do everything: the door is open. Then a name that leads a browser here by a trick of DNS is
  refused, and so is what a page of another site sends.
- Else a key is asked for: `Authorization: Bearer KEY`, `X-API-Key: KEY`, or the cookie of somebody who logged in.
  With a cookie, whatever changes something must come from this server's own pages.

A view must not look at keys itself: it calls `current_key_id`, `check_owner` and `check_quota`. A key's end counts
within five seconds, see `key_ring.py`.
"""

from __future__ import annotations

import ipaddress
import logging
from datetime import datetime
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

import flask

from provider_image.errors import ConfigError
from server.address import is_loopback
from server.auth.key_cache import KeyCache
from server.auth.limits import IMAGES_PER_DAY, REQUESTS_PER_MINUTE, Limits, limit_headers
from server.auth.sessions import COOKIE, Sessions
from server.endpoint import get_operation
from server.errors import CrossSite, KeyMissing, KeyRefused, RateLimited, ScopeMissing, WrongHost
from server.settings import ServerSettings
from store.errors import StoreError, UnknownRequest
from store.keys import KeyRecord, Keys, Scope

if TYPE_CHECKING:
    from server.context import Context

log = logging.getLogger(__name__)

_EXTENSION = "mlg_access"
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Owned(Protocol):
    """What was made with a key, or without one: a request, a batch."""

    @property
    def key_id(self) -> str | None:
        """The key it was made with."""


# What views ask


def current_key_id() -> str | None:
    """Return the id of the caller's key; None where no key was asked for."""
    key: KeyRecord | None = flask.g.get("key")
    return None if key is None else key.id


def is_owner(owned: Owned) -> bool:
    """Tell whether the caller may see and change something. Who operates may, and where no key is asked for all may."""
    key: KeyRecord | None = flask.g.get("key")
    if key is None:
        return get_guard(flask.current_app).is_open()
    return key.is_operator or owned.key_id == key.id


def check_owner(owned: Owned) -> None:
    """Refuse what belongs to another key, as if it were not there. :raises UnknownRequest:"""
    if not is_owner(owned):
        raise UnknownRequest()


def check_quota(images: int = 1) -> None:
    """Refuse pictures that the caller's quota of the day has no room for, before they are read.

    The store counts them again, and for good, in the commit that adds them.

    :raises QuotaReached:
    """
    guard = get_guard(flask.current_app)
    guard.limits.check_images(flask.g.get("key"), images, guard.now())


def check_same_origin(*, is_strict: bool) -> None:
    """Refuse what a page of another site sends; browsers say where a request comes from, and scripts cannot change it.

    :param is_strict: refuse also what does not say where it comes from, as programs do not.
    :raises CrossSite:
    """
    site, origin = flask.request.headers.get("Sec-Fetch-Site"), flask.request.headers.get("Origin")
    if site is not None:
        is_same_origin = site == "same-origin" or (site == "none" and not is_strict)
    elif origin is not None:
        # Without the scheme: a proxy that ends TLS would make every origin look foreign.
        is_same_origin = urlsplit(origin).netloc.lower() == flask.request.host.lower()
    else:
        is_same_origin = not is_strict
    if not is_same_origin:
        raise CrossSite()


# The guard


def install_guard(app: flask.Flask, context: Context) -> None:
    """Have every request of an application looked at."""
    guard = Guard(app, context)
    app.extensions[_EXTENSION] = guard
    app.before_request(guard.before_request)
    app.after_request(guard.after_request)


def get_guard(app: flask.Flask) -> Guard:
    """Return the guard of an application."""
    guard = app.extensions[_EXTENSION]
    assert isinstance(guard, Guard)
    return guard


def check_exposure(settings: ServerSettings, keys: Keys) -> None:
    """Refuse to serve other machines while nobody needs a key. :raises ConfigError: names the cure."""
    if not is_loopback(settings.host) and not settings.is_open and not keys.has_keys():
        raise ConfigError(
            f"MLG_HOST={settings.host}: other machines could use this server, and there is no API key. Make one: "
            "mlg keys create NAME. To serve everybody without keys, say so: --open, or MLG_OPEN=1."
        )


class Guard:
    """See the module. One for each application."""

    def __init__(self, app: flask.Flask, context: Context) -> None:
        self._app = app
        self._settings = context.settings
        self._clock = context.clock
        self.key_cache = KeyCache(context.store)
        self.limits = Limits(context.store)
        self.sessions = Sessions(context.settings.home)

    def now(self) -> datetime:
        """Return the time."""
        return self._clock()

    def is_open(self) -> bool:
        """Tell whether everybody may do everything. :raises StoreError:"""
        return (self._settings.is_open or is_loopback(self._settings.host)) and not self.key_cache.has_keys()

    def before_request(self) -> None:
        """Look at a request before its view does. :raises AccessRefused: :raises RateLimited: :raises StoreError:"""
        flask.g.key = None
        endpoint = flask.request.endpoint
        if endpoint is None:
            return  # there is nothing at this address, and flask says so
        declared = get_operation(self._app.view_functions[endpoint])
        if endpoint == "static" or (declared is not None and declared.scope is None):
            self._identify_optional()
            return
        if self.is_open():
            self._check_host()
            if flask.request.method not in _SAFE_METHODS:
                check_same_origin(is_strict=False)
            return
        now = self.now()
        key = self._identify(now)
        scope = Scope.OPERATE if declared is None or declared.scope is None else declared.scope
        if not key.has_scope(scope):
            raise ScopeMissing(f"The API key is not good for this: it lacks the scope {scope}.")
        flask.g.key = key
        self.key_cache.touch(key, now)
        try:
            flask.g.minute_limit = self.limits.count_request(key, now)
        except RateLimited:
            flask.g.minute_limit, flask.g.refused_by = self.limits.exhausted(key, now), REQUESTS_PER_MINUTE
            raise

    def after_request(self, response: flask.Response) -> flask.Response:
        """Tell the owner of a limited key what is left, and everybody else how to ask."""
        if response.status_code == 401:
            response.headers["WWW-Authenticate"] = 'Bearer realm="mlg"'
        key: KeyRecord | None = flask.g.get("key")
        if key is None or "minute_limit" not in flask.g:
            return response
        try:
            found = (flask.g.minute_limit, self.limits.daily_limit(key, self.now()))
        except StoreError as error:
            log.warning("cannot tell what is left of a quota: %s", error)
            return response
        # What the minute refused never came to a view, so every other 429 is the store's, or that of `check_quota`.
        refused_by = flask.g.get("refused_by", IMAGES_PER_DAY) if response.status_code == 429 else None
        response.headers.update(limit_headers([limit for limit in found if limit is not None], refused_by=refused_by))
        return response

    def log_in(self, key: str) -> KeyRecord:
        """Find the key that somebody logs in with. :raises KeyRefused: :raises StoreError:"""
        record = self.key_cache.find(key, self.now())
        if record is None:
            raise KeyRefused()
        return record

    def _identify_optional(self) -> None:
        """Recognise the caller of a view that is open to everybody, if that goes without trouble."""
        if not {"Authorization", "X-API-Key", "Cookie"} & set(flask.request.headers.keys()):
            return
        try:
            flask.g.key = self._identify(self.now(), is_reading=True)
        except (KeyMissing, KeyRefused, StoreError):
            flask.g.key = None

    def _identify(self, now: datetime, *, is_reading: bool = False) -> KeyRecord:
        """Find the caller's key. :raises KeyMissing: :raises KeyRefused: :raises CrossSite:"""
        headers = flask.request.headers
        scheme, _, value = headers.get("Authorization", "").partition(" ")
        # Another scheme is meant for a proxy in front.
        given = value.strip() if scheme.lower() == "bearer" else headers.get("X-API-Key")
        if given is not None:
            record = self.key_cache.find(given, now)
        elif (cookie := flask.request.cookies.get(COOKIE)) is not None:
            if not is_reading and flask.request.method not in _SAFE_METHODS:
                check_same_origin(is_strict=True)
            id = self.sessions.key_id(cookie)
            record = None if id is None else self.key_cache.find_by_id(id, now)
        else:
            raise KeyMissing()
        if record is None:
            raise KeyRefused()
        return record

    def _check_host(self) -> None:
        """Refuse names that others may have pointed at this machine. :raises WrongHost:"""
        settings = self._settings
        given = flask.request.environ.get("HTTP_HOST")
        if not given or not (is_loopback(settings.host) or settings.allowed_hosts):
            return  # browsers always name the host
        host = given.lower()
        host = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
        if host in settings.allowed_hosts or host in ("localhost", settings.host.lower()):
            return
        try:
            is_local = ipaddress.ip_address(host.strip("[]")).is_loopback
        except ValueError:
            is_local = False
        if not is_local:
            raise WrongHost()

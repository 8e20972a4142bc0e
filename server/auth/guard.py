"""Authentication and authorisation: every request is checked here before its view, and views look up records here.

`server/app.py` installs the guard. It reads the scope that the view declares (`server/endpoint.py`):

- A view with scope None is open to everybody. One without a declaration is for operators only.
- While there was never a key in the store, and the server listens on this machine only or is open by MLG_OPEN,
  everybody may do everything. Then host names are checked, against DNS rebinding, and requests from pages of other
  sites are refused.
- Otherwise a key is required: `Authorization: Bearer KEY`, `X-API-Key: KEY`, or the cookie of a login. With a cookie,
  requests that change something must come from this server's own pages.

A view must not read keys itself: it calls `owned`, `visible_key_id`, `current_key_id` and `quota_left`. A revoked key
is refused after a few seconds at the latest, see `key_cache.py`; what takes longer checks the caller again, see
`caller_check`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TypeVar
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
from store.batches import BatchRecord, UnknownBatch
from store.clients.keys import KeyRecord, Keys, Scope
from store.collections.collections import CollectionRecord, UnknownCollection
from store.errors import QuotaReached, StoreError, UnknownRequest
from store.requests import RequestRecord
from store.trainings.records import TrainingRecord, UnknownTraining

log = logging.getLogger(__name__)

_EXTENSION = "mlg_access"
#: In the environment of a request: the id of its key, or None.
CLIENT = "mlg.client"
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


Record = TypeVar("Record", RequestRecord, BatchRecord, CollectionRecord, TrainingRecord)

#: Record -> the error for one that the caller must not see.
_UNKNOWN: Mapping[type, type[UnknownRequest]] = {
    RequestRecord: UnknownRequest,
    BatchRecord: UnknownBatch,
    CollectionRecord: UnknownCollection,
    TrainingRecord: UnknownTraining,
}

# For views


def current_key() -> KeyRecord | None:
    """Return the caller's key; None where no key is required."""
    key: KeyRecord | None = flask.g.get("key")
    return key


def current_key_id() -> str | None:
    """Return the id of the caller's key; None where no key is required."""
    key = current_key()
    return None if key is None else key.id


def visible_key_id() -> str | None:
    """Return the key whose requests and batches the caller may list; None for those of all keys."""
    key = current_key()
    return None if key is None or key.is_operator else key.id


def is_owner(record: RequestRecord | BatchRecord | CollectionRecord | TrainingRecord) -> bool:
    """Tell whether the caller may see and change a record. Operators may, and everybody where no key is required."""
    key = current_key()
    if key is None:
        return get_guard(flask.current_app).is_open()
    return key.is_operator or record.key_id == key.id


def owned(look_up: Callable[[str], Record], id: str) -> Record:
    """Look up a record of the caller's. That of another key is treated as if it did not exist.

    :param look_up: a method of the store: `requests.get`, `batches.get`.
    :raises UnknownRequest: :raises UnknownBatch: :raises UnknownCollection: :raises UnknownTraining:
    """
    record = look_up(id)
    if not is_owner(record):
        raise _UNKNOWN[type(record)]()
    return record


def caller_check() -> Callable[[], bool]:
    """Return a function that tells whether the caller of this request is still allowed to send it.

    For views that take long. It may be called in any thread and outside of the request, and raises nothing.
    """
    guard, key, cookie = get_guard(flask.current_app), current_key(), flask.g.get("session_cookie")

    def is_allowed() -> bool:
        try:
            if key is None:
                return guard.is_open()
            if cookie is not None and guard.sessions.key_id(cookie) != key.id:
                return False
            return guard.key_cache.find_by_id(key.id, guard.now()) is not None
        except StoreError as error:
            log.warning("cannot check again whether a caller is allowed: %s", error)
            return False

    return is_allowed


def quota_left() -> int | None:
    """Return how many images the caller's key may send today; None if that is not limited.

    The store counts it again, exactly, in the commit that adds images.

    :raises QuotaReached:
    """
    guard, key = get_guard(flask.current_app), current_key()
    limit = None if key is None else guard.limits.daily_limit(key, guard.now())
    if limit is not None and not limit.left:
        raise QuotaReached()
    return None if limit is None else limit.left


def check_same_origin(*, is_strict: bool) -> None:
    """Refuse requests from pages of other sites; browsers send the origin, and scripts cannot change it.

    :param is_strict: refuse also requests without an origin, as programs send them.
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


def install_guard(app: flask.Flask, settings: ServerSettings, keys: Keys, clock: Callable[[], datetime]) -> None:
    """Check every request of an application before its view."""
    guard = Guard(app, settings, keys, clock)
    app.extensions[_EXTENSION] = guard
    app.before_request(guard.before_request)
    app.after_request(guard.after_request)


def get_guard(app: flask.Flask) -> Guard:
    """Return the guard of an application."""
    guard = app.extensions[_EXTENSION]
    assert isinstance(guard, Guard)
    return guard


def check_exposure(settings: ServerSettings, keys: Keys) -> None:
    """Refuse to serve other machines while no key is required. :raises ConfigError: tells the cure."""
    if not is_loopback(settings.host) and not settings.is_open and not keys.has_any():
        raise ConfigError(
            f"MLG_HOST={settings.host}: other machines could use this server, and there is no API key. Create one: "
            "mlg keys create NAME. To serve everybody without keys, set --open, or MLG_OPEN=1."
        )


class Guard:
    """See the module. One for each application."""

    def __init__(self, app: flask.Flask, settings: ServerSettings, keys: Keys, clock: Callable[[], datetime]) -> None:
        self._app = app
        self._settings = settings
        self.now = clock
        self.key_cache = KeyCache(keys)
        self.limits = Limits(keys)
        self.sessions = Sessions(settings.home)

    def is_open(self) -> bool:
        """Tell whether everybody may do everything. :raises StoreError:"""
        return (self._settings.is_open or is_loopback(self._settings.host)) and not self.key_cache.has_keys()

    def before_request(self) -> None:
        """Check a request before its view runs. :raises AccessRefused: :raises RateLimited: :raises StoreError:"""
        flask.g.key = None
        endpoint = flask.request.endpoint
        if endpoint is None:
            return  # no view has this path; Flask answers with 404
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
            raise ScopeMissing(f"The API key lacks the scope {scope}.")
        flask.g.key = key
        self.key_cache.touch(key, now)
        try:
            flask.g.minute_limit = self.limits.count_request(key, now)
        except RateLimited:
            flask.g.minute_limit, flask.g.refused_by = self.limits.exhausted(key, now), REQUESTS_PER_MINUTE
            raise

    def after_request(self, response: flask.Response) -> flask.Response:
        """Add the headers with what is left of a key's limits, or with the scheme of a missing key."""
        if response.status_code == 401:
            response.headers["WWW-Authenticate"] = 'Bearer realm="mlg"'
        key = current_key()
        flask.request.environ[CLIENT] = current_key_id()
        if key is None or "minute_limit" not in flask.g:
            return response
        try:
            found = (flask.g.minute_limit, self.limits.daily_limit(key, self.now()))
        except StoreError as error:
            log.warning("cannot read what is left of a quota: %s", error)
            return response
        # A request over the minute's limit never reaches a view, so every other 429 is the store's or `quota_left`'s.
        refused_by = flask.g.get("refused_by", IMAGES_PER_DAY) if response.status_code == 429 else None
        response.headers.update(limit_headers([limit for limit in found if limit is not None], refused_by=refused_by))
        return response

    def log_in(self, key: str) -> KeyRecord:
        """Find the key of a login. :raises KeyRefused: :raises StoreError:"""
        record = self.key_cache.find(key, self.now())
        if record is None:
            raise KeyRefused()
        return record

    def _identify_optional(self) -> None:
        """Identify the caller of a view that is open to everybody; without a valid key there is none."""
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
        # Another scheme is for a proxy in front.
        given = value.strip() if scheme.lower() == "bearer" else headers.get("X-API-Key")
        if given is not None:
            record = self.key_cache.find(given, now)
        elif (cookie := flask.request.cookies.get(COOKIE)) is not None:
            if not is_reading and flask.request.method not in _SAFE_METHODS:
                check_same_origin(is_strict=True)
            id = self.sessions.key_id(cookie)
            record = None if id is None else self.key_cache.find_by_id(id, now)
            flask.g.session_cookie = cookie
        else:
            raise KeyMissing()
        if record is None:
            raise KeyRefused()
        return record

    def _check_host(self) -> None:
        """Refuse host names that others may have pointed at this machine. :raises WrongHost:"""
        settings = self._settings
        given = flask.request.environ.get("HTTP_HOST")
        if not given or not (is_loopback(settings.host) or settings.allowed_hosts):
            return  # browsers always send the host
        host = given.lower()
        host = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
        if host in settings.allowed_hosts or host in ("localhost", settings.host.lower()):
            return
        if not is_loopback(host.strip("[]")):
            raise WrongHost()

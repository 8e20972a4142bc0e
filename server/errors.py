"""Why the door stays shut: errors about keys, limits, hosts, and addresses that pictures are to be fetched from.

Raised by `access.py`, `limits.py`, `fetching.py` and the store's keys; their status codes stand in `responses.py`.
No sentence here may repeat a key or a part of one.
"""

from __future__ import annotations

from provider_image.errors import BadInput, MlgError
from store.errors import LimitReached


class AccessRefused(MlgError):
    """This is not allowed."""

    code = "access_refused"
    permanent = True


class KeyMissing(AccessRefused):
    """An API key is needed: send the header `Authorization: Bearer KEY`. An operator makes one: mlg keys create"""

    code = "key_missing"


class KeyRefused(AccessRefused):
    """The API key is not known, has expired or was revoked. An operator makes a new one: mlg keys create"""

    code = "key_refused"


class ScopeMissing(AccessRefused):
    """The API key is not good for this."""

    code = "scope_missing"


class CrossSite(AccessRefused):
    """A page of another site asked for this. Use the pages of this server, or send the request from a program."""

    code = "cross_site"


class WrongHost(AccessRefused):
    """This server is not known by that name. Name it in MLG_ALLOWED_HOSTS, or use http://127.0.0.1"""

    code = "wrong_host"


class RateLimited(LimitReached):
    """The API key sends too many requests. Send the next one when this minute is over."""

    code = "rate_limited"


class FetchingDisabled(AccessRefused):
    """This server fetches no pictures. Send the picture itself; an operator may allow URLs with MLG_FETCH_URLS=1."""

    code = "fetching_is_off"


class UrlRefused(BadInput):
    """This URL is not fetched. It must be https, on port 443, of a public host."""

    code = "url_refused"


class FetchFailed(MlgError):
    """The picture could not be fetched. Check its URL, or send the picture itself."""

    code = "fetch_failed"


class UnsupportedMediaType(BadInput):
    """This content type is not taken. Send multipart/form-data with the field `image`, or the raw bytes as image/*."""

    code = "unsupported_media_type"


class BacklogFull(MlgError):
    """Too many requests wait already. Send the picture again later."""

    code = "backlog_full"

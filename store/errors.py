"""The errors of the store, and of what clients ask of it.

The HTTP status of each stands in `server/errors.py`. A class's docstring is its default message and tells the cure.
"""

from __future__ import annotations

from provider_image.errors import MlgError


class UnknownRequest(MlgError):
    """There is no request with this id. It was never accepted here, or its retention time is over."""

    code = "unknown_request"
    permanent = True


class NotCancellable(MlgError):
    """The request has been dispatched or answered already, so it cannot be cancelled."""

    code = "not_cancellable"
    permanent = True


class NotRetryable(MlgError):
    """Only a failed or cancelled request whose picture is still kept can be tried again."""

    code = "not_retryable"
    permanent = True


class StoreError(MlgError):
    """The store cannot do this now."""

    code = "store_error"


class StoreBusy(StoreError):
    """The database is locked by another process. Send the request again in a moment."""

    code = "store_busy"


class StoreUnavailable(StoreError):
    """The store cannot be written. Check that its folder exists, belongs to this user and is not read-only."""

    code = "store_unavailable"


class DiskFull(StoreError):
    """The disk is full. Nothing was kept of this request; free some space and send it again."""

    code = "disk_full"


class LimitReached(MlgError):
    """The API key has used up what it may."""

    code = "limit_reached"


class QuotaReached(LimitReached):
    """The API key has used up its pictures of this day. The next day begins at midnight UTC."""

    code = "quota_reached"

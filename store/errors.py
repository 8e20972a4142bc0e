"""Errors of the store, and of operations that clients request of it.

`server/api/responses.py` has the HTTP status of each. A class's docstring is its default message and tells the cure.
"""

from __future__ import annotations

from provider_image.errors import MlgError


class UnknownRequest(MlgError):
    """There is no request with this id. It was never accepted here, or its retention time is over."""

    permanent = True


class NotCancellable(MlgError):
    """The request has been dispatched or answered already, so it cannot be cancelled."""

    permanent = True


class NotRetryable(MlgError):
    """Only a failed or cancelled request whose image is still kept can be retried."""

    permanent = True


class NotRemovable(MlgError):
    """Only a request that has ended can be deleted. Cancel it first, or wait for its answer."""

    permanent = True


class UnknownFile(UnknownRequest):
    """The answer has no file with this name."""


class ImageGone(MlgError):
    """The image is not kept any more: its retention time is over."""

    code = "picture_gone"
    permanent = True


class StoreError(MlgError):
    """The store cannot do this now."""


class StoreBusy(StoreError):
    """The database is locked by another process. Send the request again in a moment."""


class StoreUnavailable(StoreError):
    """The store cannot be written. Check that its folder exists, belongs to this user and is not read-only."""


class DiskFull(StoreError):
    """The disk is full. Nothing of this request was stored; free some space and send it again."""


class LimitReached(MlgError):
    """The API key has reached a limit."""


class QuotaReached(LimitReached):
    """The API key has used its images of this day. The next day begins at midnight UTC."""

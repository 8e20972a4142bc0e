"""What the daemon refuses, and with which HTTP status."""

from __future__ import annotations

from typing import ClassVar


class ApiError(Exception):
    """A call cannot be done; the message goes to the requestor."""

    status: ClassVar[int] = 400


class NotFound(ApiError):
    """There is no such thing."""

    status = 404


class TimedOut(ApiError):
    """It did not happen in time; the call may be repeated."""

    status = 408


class Conflict(ApiError):
    """The thing is not in the state for it yet."""

    status = 409


class Gone(ApiError):
    """The thing is over for good."""

    status = 410


class InternalError(ApiError):
    """The daemon or the provider failed."""

    status = 500

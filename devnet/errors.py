"""The errors of the daemon's API, with their HTTP status."""

from __future__ import annotations

from typing import ClassVar


class ApiError(Exception):
    """The call is invalid; the message is sent to the requestor."""

    status: ClassVar[int] = 400


class NotFound(ApiError):
    """The object does not exist."""

    status = 404


class TimedOut(ApiError):
    """It did not happen in time; the call may be repeated."""

    status = 408


class Conflict(ApiError):
    """The object is not yet in the required state."""

    status = 409


class Gone(ApiError):
    """The object has ended."""

    status = 410


class InternalError(ApiError):
    """The daemon or the provider failed."""

    status = 500

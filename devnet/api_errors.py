"""What the daemon refuses, and with which HTTP status."""

from __future__ import annotations

from typing import ClassVar


class Refusal(Exception):
    """A call cannot be done; the message goes to the requestor."""

    status: ClassVar[int] = 400


class NotKnown(Refusal):
    """There is no such thing."""

    status = 404


class NotYet(Refusal):
    """It did not happen in time; the call may be repeated."""

    status = 408


class Conflict(Refusal):
    """The thing is not in the state for it yet."""

    status = 409


class Gone(Refusal):
    """The thing is over for good."""

    status = 410


class Broken(Refusal):
    """The daemon or the provider failed."""

    status = 500

"""The errors of the client, and which answers of a server become which of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

#: Statuses after which the same request may succeed later.
RETRYABLE = frozenset({429, 502, 503, 504, 507})
#: Codes that come with such a status, but somebody has to do something before the request can succeed.
FATAL = frozenset({"not_installed", "broken_artefact", "model_error", "quota_reached"})
#: The first sending of a POST is not answered yet; its answer can be had in a moment.
_KEY_IN_USE = "key_under_way"
#: Statuses that concern one image and not the next, except with the codes below.
_IMAGE_STATUSES = frozenset({400, 413, 415})
_REQUEST_CODES = frozenset({"invalid_params", "url_refused"})


class ClientError(Exception):
    """Something did not work; `code` is for programs, `reason` for people, `status` is HTTP's or None."""

    def __init__(self, reason: str, *, code: str = "error", status: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code
        self.status = status


class Refused(ClientError):
    """The server does not do this, and will not if it is asked again."""

    @property
    def is_about_one_image(self) -> bool:
        """Tell whether another image may be accepted."""
        return self.status in _IMAGE_STATUSES and self.code not in _REQUEST_CODES


class Unavailable(ClientError):
    """The server cannot do this now, nor could it until the retry timeout was over."""


class Unreachable(ClientError):
    """The server does not answer."""


class StillWaiting(ClientError):
    """The time that the caller gave is over; the request goes on."""


def error_of(response: httpx.Response, answer: Mapping[str, Any]) -> Refused | Unavailable:
    """Make the error of a response that is not a success. :param answer: its JSON, empty if it has none."""
    status = response.status_code
    reason = str(answer.get("reason") or f"The server answered {status}.")
    code = str(answer.get("code") or f"http_{status}")
    is_retryable = status in RETRYABLE or code == _KEY_IN_USE
    return (Unavailable if is_retryable else Refused)(reason, code=code, status=status)


def retry_after(response: httpx.Response) -> float:
    """Return how many seconds the server wants the client to wait; 0 if it does not say."""
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() else 0.0

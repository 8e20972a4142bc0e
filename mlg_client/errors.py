"""The errors of the client, and which of them each response of a server becomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

#: Statuses after which the same request may succeed later.
RETRYABLE = frozenset({429, 502, 503, 504, 507})
#: Codes with such a status that need an operator to act before the request can succeed.
FATAL = frozenset({"not_installed", "broken_artefact", "model_error", "quota_reached"})
#: The first POST with this idempotency key is not answered yet; a retry gets its answer.
_KEY_IN_USE = "key_under_way"
#: Statuses that are about one image, except with the codes below.
_IMAGE_STATUSES = frozenset({400, 413, 415})
_REQUEST_CODES = frozenset({"invalid_params", "url_refused"})


class ClientError(Exception):
    """A call failed; `code` is for programs, `reason` for people, `status` is the HTTP status or None."""

    def __init__(self, reason: str, *, code: str = "error", status: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code
        self.status = status


class Refused(ClientError):
    """The server refuses the request; sending it again does not help."""

    @property
    def is_about_one_image(self) -> bool:
        """Tell whether the server may still accept other images."""
        return self.status in _IMAGE_STATUSES and self.code not in _REQUEST_CODES


class Unavailable(ClientError):
    """The server could not do this within the retry timeout."""


class Unreachable(ClientError):
    """The server does not answer."""


class StillWaiting(ClientError):
    """The timeout of the call is over; the server still works on the request."""


def error_of(response: httpx.Response, answer: Mapping[str, Any]) -> Refused | Unavailable:
    """Create the error for a response that is not a success. :param answer: its JSON object, empty if it has none."""
    status = response.status_code
    reason = str(answer.get("reason") or f"The server answered {status}.")
    code = str(answer.get("code") or f"http_{status}")
    is_retryable = status in RETRYABLE or code == _KEY_IN_USE
    return (Unavailable if is_retryable else Refused)(reason, code=code, status=status)


def retry_after(response: httpx.Response) -> float:
    """Return the seconds of the Retry-After header; 0 without one."""
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() else 0.0

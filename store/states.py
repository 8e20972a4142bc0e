"""The states of a request."""

from __future__ import annotations

import enum

#: `code` of requests whose deadline passed; they are cancelled, and shown as expired.
EXPIRED = "expired"


class RequestState(enum.StrEnum):
    """State of a request: `queued -> claimed -> done | failed | cancelled`, and back to `queued`."""

    QUEUED = "queued"
    CLAIMED = "claimed"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Tell whether the state changes no more unless somebody retries the request."""
        return self in (RequestState.DONE, RequestState.FAILED, RequestState.CANCELLED)
